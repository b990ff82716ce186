"""unet_fast: a U-Net on fused ops for TensorFlow and Keras.

>>> from unet_fast import FusedUNet
>>> model = FusedUNet(input_shape=(64, 64, 1), filters=4, depth=2, padding="same")
>>> model.output_shape
(None, 64, 64, 2)
"""

import sys as _sys

__version__ = "0.1.0"
__all__ = ["FusedUNet", "fuse", "layers", "losses", "metrics", "ops", "reference", "unfuse"]

# The command line answers --help and a mistyped option before it imports TensorFlow, whose import takes seconds.
_for_command_line = "".join(_sys.argv[:1]).endswith("/unet-fast") or _sys.orig_argv[1:3] == ["-m", "unet_fast"]

if not _for_command_line:
    import keras as _keras

    if _keras.backend.backend() != "tensorflow":
        raise ImportError(
            f"unet_fast needs Keras on TensorFlow, found KERAS_BACKEND={_keras.backend.backend()}; "
            "set KERAS_BACKEND=tensorflow before keras is first imported"
        )

    from unet_fast import _library, layers, losses, metrics, ops, reference
    from unet_fast.fusion import fuse, unfuse
    from unet_fast.models import FusedUNet

    _library.status()  # registers the ops, by which alone a SavedModel of them can be loaded; never raises
