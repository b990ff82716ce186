"""The raw GPU kernels and all that is known of their choices, without PyTorch or TensorFlow."""

import importlib.util
import pathlib


def load_from_package(name):
    """A module of unet_fast, without importing the package: that would bring TensorFlow and its CUDA libraries in.

    Args:
        name: of the module, Python or native, such as "_native"; it must import nothing of the package itself.
    """
    spec = importlib.util.find_spec("unet_fast")
    if spec is None:
        raise ImportError("expected unet_fast to be installed or in a folder of PYTHONPATH, found it in none")
    (package,) = spec.submodule_search_locations
    files = [*pathlib.Path(package).glob(f"{name}.py"), *pathlib.Path(package).glob(f"{name}.*.so")]
    if not files:
        raise ImportError(f"expected {name} in {package}, found none; build it, see docs/building.md")
    spec = importlib.util.spec_from_file_location(name, files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_kernels():
    """The module of the raw kernels, csrc/python/gpu_kernels.cc."""
    try:
        import _gpu_kernels  # tests/gpu/build_native.sh
    except ImportError:
        return load_from_package("_native").gpu
    return _gpu_kernels


def tuning(kernels, **fields):
    """A Conv2DTuning; what is not among `fields` follows from the problem.

    Args:
        kernels: the module of the raw kernels.
        **fields: engine, gemm, wgrad, splits; see csrc/kernels/conv/gpu.h.
    """
    value = kernels.Conv2DTuning()
    for name, field in fields.items():
        setattr(value, name, field)
    return value


def tiles(kernels):
    """Of each engine in the build, how many tiles its implicit GEMM and its weight gradient have.

    Args:
        kernels: the module of the raw kernels.

    Returns:
        dict from an engine's name to {"gemm": count, "wgrad": count}; a number below it can be forced by `tuning`.
    """
    return {name: dict(zip(("gemm", "wgrad"), counts, strict=True)) for name, counts in kernels.engines.items()}
