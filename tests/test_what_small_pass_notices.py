"""What tests/gpu/small_pass.py notices of a kernel, by stand-ins for kernels and for a GPU's memory."""

import ctypes
import pathlib

import numpy as np
import pytest


@pytest.fixture
def small_pass(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent / "gpu"))
    import small_pass

    return small_pass


class Memory:
    """The host's, in place of `Device`."""

    def __init__(self):
        self.buffers = {}

    def allocate(self, size):
        buffer = ctypes.create_string_buffer(size)
        self.buffers[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def read(self, address, array):
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def fill(self, address, size, byte):
        ctypes.memset(address, byte, size)

    def wait(self):
        pass

    def free(self, address):
        del self.buffers[address]


def writes(arrays):
    ctypes.memmove(arrays.output(2), np.ones(2, np.float16).ctypes.data, 4)


def leaves_the_second_number(arrays):
    ctypes.memmove(arrays.output(2), np.ones(1, np.float16).ctypes.data, 2)


def reads_its_workspace(arrays):
    output, workspace = arrays.output(1), arrays.workspace(2)
    ctypes.memmove(output, workspace, 1)
    ctypes.memset(output + 1, 0, 1)  # finite whatever was there


def digests(small_pass, run):
    memory = Memory()
    try:
        return [small_pass.digest(memory, "float16", run, byte) for byte in small_pass.FILLINGS]
    finally:
        assert not memory.buffers


def test_what_is_not_written_is_not_finite(small_pass):
    first, second = digests(small_pass, writes)
    assert first == second
    with pytest.raises(AssertionError, match=r"output 0 of shape \(2,\) is not finite"):
        digests(small_pass, leaves_the_second_number)


def test_what_is_read_before_it_is_written_differs(small_pass):
    first, second = digests(small_pass, reads_its_workspace)
    assert first != second
