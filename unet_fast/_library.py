"""Loads the native op library once, and says why where that fails. Importing this module never fails."""

import functools
import os
import pathlib
import sys
from typing import NamedTuple

from unet_fast.errors import UserError


class Status(NamedTuple):
    """What became of the native library in this process."""

    available: bool  # the ops can be called
    reason: str | None  # why not
    cuda: bool  # the ops have kernels for the GPU in this build


class UnavailableError(ImportError):
    """An op was called whose native library could not be loaded."""


_ENGINES = ("auto", "sm90", "cudnn", "wmma")


def _minor(version):
    return ".".join(version.split(".")[:2])


@functools.cache
def _load():
    """Returns (module of the raw ops or None, reason or None)."""
    import tensorflow as tf

    try:
        from unet_fast import _native
    except ImportError as error:
        return None, f"the native module is not built ({error}); install with `pip install .` in the source folder"
    if _minor(_native.tensorflow_version) != _minor(tf.__version__):
        return None, (
            f"built for TensorFlow {_minor(_native.tensorflow_version)}, found {tf.__version__}; reinstall unet_fast "
            f"beside this TensorFlow, or `pip install 'tensorflow=={_minor(_native.tensorflow_version)}.*'`"
        )
    engine = os.environ.get("UNET_FAST_ENGINE", "auto")  # read by csrc/kernels/conv/tuning.cu
    if engine not in _ENGINES:
        return None, f"UNET_FAST_ENGINE: expected {', '.join(_ENGINES[:-1])} or {_ENGINES[-1]}, got {engine!r}"
    path = pathlib.Path(__file__).with_name("_ops.so")
    try:
        return tf.load_op_library(str(path)), None
    except (tf.errors.NotFoundError, OSError) as error:
        return None, f"{path.name} does not load: {str(error).splitlines()[0]}"


@functools.cache
def status():
    """Whether the native ops are there, and why not: a `Status`.

    >>> from unet_fast import _library
    >>> _library.status().available
    True
    """
    module, reason = _load()
    if module is None:
        return Status(False, reason, False)
    from tensorflow.python.framework import kernels

    registered = kernels.get_registered_kernels_for_op("UnetFastConv2DBiasRelu").kernel
    return Status(True, None, any(kernel.device_type == "GPU" for kernel in registered))


@functools.cache
def say_once(text):
    """Tells a user, once a process, what runs otherwise than was to be expected; as the kernels do, on standard error.

    >>> from unet_fast import _library
    >>> _library.say_once("")
    """
    print(f"unet_fast: {text}", file=sys.stderr)


_threads_lost = False


def _after_fork():
    # TensorFlow has its threads from the first op on, and a fork takes none along: much of it would wait forever.
    global _threads_lost
    module = sys.modules.get("tensorflow.python.eager.context")
    _threads_lost = getattr(getattr(module, "_context", None), "_initialized", False)


os.register_at_fork(after_in_child=_after_fork)


def raw_ops():
    """The module of raw ops.

    Raises:
        UnavailableError: with the reason and the mend, where the library could not be loaded.
        UserError: in a process that was forked after TensorFlow had run something.
    """
    if _threads_lost:
        raise UserError(
            "expected a process with TensorFlow's threads, got one forked after TensorFlow had started them; "
            "start it by multiprocessing.get_context('spawn'), or fork before anything runs"
        )
    module, reason = _load()
    if module is None:
        raise UnavailableError(f"unet_fast's ops are not available: {reason}")
    return module
