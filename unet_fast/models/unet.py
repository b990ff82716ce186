"""The U-Net of NVIDIA's UNet_Medical, after Ronneberger et al. (arXiv:1505.04597), on fused or on stock layers."""

import contextlib
import functools
import numbers
import os
import zipfile

import h5py
import keras
import tensorflow as tf

from unet_fast.errors import UserError
from unet_fast.layers import (
    CenterCrop,
    FusedConv2D,
    FusedConv2DTranspose,
    check_backend,
    fused_faster_on_cpu,
    unwrapped,
    use_fused,
    weights_cast_together,
)
from unet_fast.models.geometry import output_size

_UPSAMPLING = {"transpose3x3": 3, "transpose2x2": 2}


@keras.saving.register_keras_serializable(package="unet_fast")
class FusedUNet(keras.Model):
    """A U-Net whose every convolution, with all that surrounds it, is one kernel.

    A level is two 3x3 convolutions with ReLU, then 2x2 max pooling; `filters` double from level to level. Below the
    last pooling come two convolutions and dropout; each level upwards is a transposed convolution of stride 2 with
    ReLU, concatenated with the centre of the skip connection, and two convolutions. A 1x1 convolution gives the
    logits. Kernels start Glorot uniform, biases zero; there is no regularizer. By default 572x572x1 becomes 388x388x2
    with 34,512,258 parameters in 46 tensors, ordered as the layers run; among the convolutions, and among the
    transposed ones, that is the order in which UNet_Medical creates them.

    The weights of any backend fit any other: `set_weights(get_weights())`, `load_weights` and `with_backend`.

    Args:
        input_shape: (height, width, channels); height and width in pixels, or None for any that fits.
        num_classes: channels of the logits.
        filters: channels of the first level.
        depth: how many times the image is halved, 1 to 6.
        padding: of the 3x3 convolutions. With "valid" the logits are smaller than the image, see `output_size`.
        upsampling: "transpose3x3" or "transpose2x2".
        dropout: rate after the bottom level, in [0, 1).
        backend: "fused" uses the fused ops, "auto" does where they are the faster ones, "stock" is made of plain Keras
            layers.
        name: of the model.
        dtype: policy of every layer, such as "mixed_float16", or None for Keras' global policy.

    Input: images [N, H, W, C]. Output: logits [N, Ho, Wo, num_classes] in the compute dtype.

    Raises:
        UserError: an argument out of range, or a size that does not fit, with the nearest ones that do; when called,
            backend="fused" where the library is not available.

    >>> from unet_fast.models import FusedUNet
    >>> model = FusedUNet((124, 124, 1), num_classes=3, filters=4, depth=2)
    >>> model.output_shape
    (None, 84, 84, 3)
    """

    def __init__(
        self,
        input_shape=(572, 572, 1),
        num_classes=2,
        filters=64,
        depth=4,
        padding="valid",
        upsampling="transpose3x3",
        dropout=0.5,
        backend="auto",
        name=None,
        dtype=None,
    ):
        _check_arguments(input_shape, num_classes, filters, depth, padding, upsampling, dropout)
        check_backend(backend)
        policy = keras.dtype_policies.get(dtype)
        build = _stock_graph if backend == "stock" else functools.partial(_fused_graph, backend=backend)
        inputs = keras.Input(input_shape, name="image")
        outputs = build(inputs, num_classes, filters, depth, padding, _UPSAMPLING[upsampling], dropout, policy)
        super().__init__(inputs=inputs, outputs=outputs, name=name)
        # The optimizer's loss scale hangs on the model's own policy, which otherwise would be the global one.
        self.dtype_policy = policy
        self.num_classes = num_classes
        self.filters = filters
        self.depth = depth
        self.padding = padding
        self.upsampling = upsampling
        self.dropout = dropout
        self.backend = backend

    def call(self, inputs, training=None, mask=None):
        inputs = keras.tree.map_structure(self._of_checked_size, inputs)
        for layer in self.layers:
            if isinstance(layer, FusedConv2D | FusedConv2DTranspose):
                layer.fused_on_cpu = self._fused_on_cpu
        with weights_cast_together(self.layers):
            return super().call(inputs, training=training, mask=mask)

    @property
    def uses_fused_ops(self):
        """Whether this model, compiled as it is, runs on the fused ops here; what "auto" comes to.

        >>> from unet_fast.models import FusedUNet
        >>> FusedUNet((32, 32, 1), filters=2, depth=1, backend="stock").uses_fused_ops
        False
        """
        return use_fused(self.backend, self.compute_dtype, on_cpu=self._fused_on_cpu)

    @property
    def _fused_on_cpu(self):
        return fused_faster_on_cpu(self.filters) or self.jit_compile

    def with_backend(self, backend):
        """A new FusedUNet with the same weights on another backend; not compiled.

        Args:
            backend: "auto", "fused" or "stock".

        >>> import numpy as np
        >>> from unet_fast.models import FusedUNet
        >>> model = FusedUNet((32, 32, 1), filters=2, depth=1)
        >>> twin = model.with_backend("stock")
        >>> image = np.ones((1, 32, 32, 1))
        >>> np.allclose(model(image), twin(image), atol=1e-5)
        True
        """
        twin = type(self).from_config({**self.get_config(), "backend": backend})
        twin.set_weights(self.get_weights())
        return twin

    def for_prediction(self):
        """The network with its weights in the dtype that it computes in, to predict with; not to be trained further.

        Under a mixed policy every call casts all weights, which at a batch of 1 is a tenth of the time. Here they are
        cast once; the outputs are the same to the bit.

        Returns:
            FusedUNet of policy "float16" where this one's is "mixed_float16", and so on; this one itself where its
            weights are of that dtype already.

        >>> from unet_fast.models import FusedUNet
        >>> model = FusedUNet((32, 32, 1), filters=2, depth=1, padding="same", dtype="mixed_float16")
        >>> model.for_prediction().dtype_policy.name
        'float16'
        """
        policy = self.dtype_policy
        if policy.variable_dtype == policy.compute_dtype:
            return self
        twin = type(self).from_config({**self.get_config(), "dtype": policy.compute_dtype})
        twin.set_weights(self.get_weights())
        twin.jit_compile = self.jit_compile
        return twin

    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        """`keras.Model.load_weights`, which also reads a file saved from another backend.

        Keras files a layer's weights under its class, so a fused and a stock model look for them in different places; a
        file of the other kind is read through a twin of that kind, and an optimizer's state in it is left there.

        Args:
            filepath: a `.weights.h5` or `.keras` file.
            skip_mismatch: leave as they are the weights whose shapes do not fit.

        Raises:
            ValueError: the file holds the weights of another architecture.
        """
        fused_file = _is_fused_file(filepath)
        if fused_file is None or fused_file == (self.backend != "stock"):
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
            return
        twin = self.with_backend("auto" if fused_file else "stock")
        twin.load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
        self.set_weights(twin.get_weights())

    def get_config(self):
        return {
            "input_shape": self.input_shape[1:],
            "num_classes": self.num_classes,
            "filters": self.filters,
            "depth": self.depth,
            "padding": self.padding,
            "upsampling": self.upsampling,
            "dropout": self.dropout,
            "backend": self.backend,
            "name": self.name,
            "dtype": self.dtype_policy.name,
        }

    def _of_checked_size(self, x):
        """The image, where its size fits; stops one that would come out misaligned.

        Pooling drops an odd row without a word. In a graph the network waits for the check of a size that is known
        only there: run beside it, a concatenation could fail first, with a message about shapes inside the network.
        """
        checks = []
        for axis, size in enumerate(x.shape[1:3], start=1):
            if size is not None:
                try:
                    output_size(size, self.depth, self.padding)
                except UserError as error:
                    raise unwrapped(error) from None
                continue
            multiple = 2**self.depth
            offset = -4 if self.padding == "valid" else 0
            check = tf.debugging.assert_equal(
                (tf.shape(x)[axis] - offset) % multiple,
                0,
                f"FusedUNet of depth {self.depth} and padding {self.padding!r} expects image sizes of "
                f"{multiple} * n{offset or ''} pixels; pad or crop the image",
            )
            checks.append(check)
        if not checks:
            return x
        with tf.control_dependencies(checks):
            return tf.identity(x)


def _fused_graph(x, num_classes, filters, depth, padding, upsampling, dropout, dtype, *, backend):
    common = {"data_format": "channels_last", "backend": backend, "dtype": dtype}
    conv = functools.partial(FusedConv2D, padding=padding, **common)
    # input_is_relu: every convolution's input but the image is a ReLU output: a convolution's, seen directly or through
    # max pooling (a maximum that is zero passes its gradient to a zero, which the ReLU there stops), or the pair of a
    # transposed convolution's and a skip connection. Dropout feeds a transposed convolution, which asks for no promise.
    relu = functools.partial(conv, activation="relu", input_is_relu=True)
    skips = []
    for level in range(depth):
        width, stage = filters * 2**level, f"down{level + 1}"
        x = relu(width, 3, input_is_relu=level > 0, name=f"{stage}_conv1")(x)
        skip, x = relu(width, 3, pool=True, name=f"{stage}_conv2")(x)
        skips.append(skip)
    for i in (1, 2):
        x = relu(filters * 2**depth, 3, name=f"bottom_conv{i}")(x)
    x = keras.layers.Dropout(dropout, dtype=dtype, name="bottom_dropout")(x)
    for level in reversed(range(depth)):
        width, stage = filters * 2**level, f"up{level + 1}"
        x = FusedConv2DTranspose(
            width, upsampling, strides=2, padding="same", activation="relu", name=f"{stage}_transpose", **common
        )(x)
        x = relu(width, 3, name=f"{stage}_conv1")([x, skips[level]])
        x = relu(width, 3, name=f"{stage}_conv2")(x)
    return conv(num_classes, 1, input_is_relu=True, name="logits")(x)


def _stock_graph(x, num_classes, filters, depth, padding, upsampling, dropout, dtype):
    common = {"data_format": "channels_last", "dtype": dtype}
    relu = functools.partial(keras.layers.Conv2D, kernel_size=3, padding=padding, activation="relu", **common)
    skips = []
    for level in range(depth):
        width, stage = filters * 2**level, f"down{level + 1}"
        for i in (1, 2):
            x = relu(width, name=f"{stage}_conv{i}")(x)
        skips.append(x)
        x = keras.layers.MaxPooling2D(2, name=f"{stage}_pool", **common)(x)
    for i in (1, 2):
        x = relu(filters * 2**depth, name=f"bottom_conv{i}")(x)
    x = keras.layers.Dropout(dropout, dtype=dtype, name="bottom_dropout")(x)
    for level in reversed(range(depth)):
        width, stage = filters * 2**level, f"up{level + 1}"
        x = keras.layers.Conv2DTranspose(
            width, upsampling, strides=2, padding="same", activation="relu", name=f"{stage}_transpose", **common
        )(x)
        skip = skips[level]
        if padding == "valid":
            skip = CenterCrop(dtype=dtype, name=f"{stage}_crop")([skip, x])
        x = keras.layers.Concatenate(dtype=dtype, name=f"{stage}_concat")([x, skip])
        for i in (1, 2):
            x = relu(width, name=f"{stage}_conv{i}")(x)
    return keras.layers.Conv2D(num_classes, 1, name="logits", **common)(x)


def _is_fused_file(filepath):
    """Whether a weights file comes from fused layers; None for a file of neither kind."""
    path = str(filepath)
    if not os.path.isfile(path) or not path.endswith((".keras", ".weights.h5")):
        return None
    with contextlib.ExitStack() as stack:
        if path.endswith(".keras"):
            path = stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open("model.weights.h5"))
        stored = stack.enter_context(h5py.File(path)).get("layers", {})
        return True if "fused_conv2d" in stored else False if "conv2d" in stored else None


def _check_arguments(input_shape, num_classes, filters, depth, padding, upsampling, dropout):
    for name, value in (("num_classes", num_classes), ("filters", filters)):
        if not _is_int(value) or value < 1:
            raise UserError(f"expected {name} to be a positive integer, got {value!r}; give one")
    if not _is_int(depth) or not 1 <= depth <= 6:
        raise UserError(f"expected depth from 1 to 6, got {depth!r}; give one of those")
    if padding not in ("valid", "same"):
        raise UserError(f"expected padding 'valid' or 'same', got {padding!r}; give one of those")
    if upsampling not in _UPSAMPLING:
        raise UserError(f"expected upsampling 'transpose3x3' or 'transpose2x2', got {upsampling!r}; give one of those")
    if not isinstance(dropout, numbers.Real) or not 0 <= dropout < 1:
        raise UserError(f"expected dropout in [0, 1), got {dropout!r}; give the share of activations to drop")
    shape = tuple(input_shape) if isinstance(input_shape, (list, tuple)) else ()
    if len(shape) != 3 or not all(size is None or (_is_int(size) and size > 0) for size in shape) or shape[2] is None:
        raise UserError(
            f"expected input_shape to be (height, width, channels), got {input_shape!r}; "
            "only height and width may be None"
        )
    for size in shape[:2]:
        if size is not None:
            output_size(size, depth, padding)


def _is_int(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
