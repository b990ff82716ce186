"""Helpers beside the tests that are no tests."""

collect_ignore = ["kernels.py"]  # imports PyTorch, which only machines with a GPU need to have
