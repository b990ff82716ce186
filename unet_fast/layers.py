"""Keras layers on the fused ops, drop-in for `keras.layers.Conv2D` and `Conv2DTranspose`."""

import contextlib
import os
import threading

import keras
import tensorflow as tf
from keras.src.backend.common.variables import AutocastScope  # not public; Keras has no other way past its own casts

from unet_fast import _library, ops, reference
from unet_fast.errors import UserError

_BACKENDS = ("auto", "fused", "stock")
_DTYPES = ("float32", "float16", "bfloat16")
GPU_DTYPES = ("float16", "bfloat16")  # what the ops' GPU kernels take


def use_fused(backend, dtype, *, on_cpu=True):
    """Whether a computation in `dtype` runs on the fused ops here.

    "auto" takes the fused ops where they are the faster ones: on a GPU in float16 and bfloat16, when the library was
    built with CUDA; on a CPU in float32, unless the caller knows better. With the environment variable
    UNET_FAST_REQUIRE_KERNELS=1 it raises rather than do without the library.

    Args:
        backend: "auto", "fused" or "stock".
        dtype: the compute dtype's name.
        on_cpu: whether the fused ops are the faster ones for this computation on a CPU in float32.

    Raises:
        UserError: an unknown backend; "fused", or "auto" with UNET_FAST_REQUIRE_KERNELS=1, where the ops cannot run.

    >>> from unet_fast.layers import use_fused
    >>> use_fused("stock", "float16")
    False
    """
    check_backend(backend)
    if backend == "stock":
        return False
    library = _library.status()
    gpu = bool(tf.config.list_physical_devices("GPU"))
    if not library.available:
        obstacle = library.reason
    elif gpu and not library.cuda:
        obstacle = "the library was built without CUDA and this machine has a GPU"
    elif gpu and dtype not in GPU_DTYPES:
        if backend == "auto":
            return False
        obstacle = f"on a GPU they take {' and '.join(GPU_DTYPES)}, not {dtype}"
    else:
        return backend == "fused" or gpu or (dtype == "float32" and on_cpu)
    if backend == "fused" or os.environ.get("UNET_FAST_REQUIRE_KERNELS") == "1":
        wanted = "backend='fused'" if backend == "fused" else "UNET_FAST_REQUIRE_KERNELS=1"
        raise unwrapped(
            UserError(f"{wanted} expects the fused ops, but {obstacle}; see `unet-fast info`, or use backend='stock'")
        )
    if (gpu and dtype in GPU_DTYPES) or (not gpu and dtype == "float32" and on_cpu):  # they would have been the faster
        _library.say_once(f"stock TensorFlow runs in place of the fused ops: {obstacle}; see `unet-fast info`")
    return False


def check_backend(backend):
    """Raises UserError unless backend is "auto", "fused" or "stock".

    >>> from unet_fast.layers import check_backend
    >>> check_backend("gpu")
    Traceback (most recent call last):
    unet_fast.errors.UserError: expected backend 'auto', 'fused' or 'stock', got 'gpu'; give one of those
    """
    if backend not in _BACKENDS:
        raise UserError(f"expected backend 'auto', 'fused' or 'stock', got {backend!r}; give one of those")


def fused_faster_on_cpu(filters):
    """Whether on a CPU, without XLA, a network whose narrowest layers have so many filters gains by the fused ops.

    Measured (docs/performance.md): under XLA the fused ops are the faster ones whatever the width; in a graph oneDNN's
    convolutions are, until a network is this wide, and unless its channels fill whole vectors.

    >>> from unet_fast.layers import fused_faster_on_cpu
    >>> fused_faster_on_cpu(64), fused_faster_on_cpu(32)
    (True, False)
    """
    return filters >= 64 and filters % 16 == 0


def unwrapped(error):
    """The error, marked so that Keras, if it is raised while a layer is called, keeps its one line as it is.

    Unmarked, Keras rewrites it into a page of the call's arguments.

    >>> from unet_fast.errors import UserError
    >>> from unet_fast.layers import unwrapped
    >>> unwrapped(UserError("one line"))
    UserError('one line')
    """
    error._keras_call_info_injected = True
    return error


_together = threading.local()  # .weights: what `weights_cast_together` has cast in this thread, by the layer's id


@contextlib.contextmanager
def weights_cast_together(layers):
    """Within it, fused layers find their weights cast to their compute dtype already, all in one kernel.

    The weights of a network are some fifty small arrays, which mixed precision otherwise casts one by one.

    Args:
        layers: layers of a model; those that compute in float16 or bfloat16 on the fused ops are taken.

    >>> import keras
    >>> from unet_fast.layers import FusedConv2D, weights_cast_together
    >>> layer = FusedConv2D(4, 3, activation="relu", dtype="mixed_float16")
    >>> layer.build((None, 8, 8, 1))
    >>> with weights_cast_together([layer]):
    ...     layer(keras.ops.ones((1, 8, 8, 1))).dtype.name
    'float16'
    """
    by_dtype = {}
    for layer in layers:
        if not isinstance(layer, FusedConv2D | FusedConv2DTranspose) or layer.variable_dtype != "float32":
            continue
        if layer.compute_dtype in GPU_DTYPES and layer.on_fused_op:
            by_dtype.setdefault(layer.compute_dtype, []).append(layer)
    weights = {}
    for dtype, taken in by_dtype.items():
        with AutocastScope(None):  # the variables as they are
            tensors = [tf.convert_to_tensor(value) for layer in taken for value in (layer.kernel, layer.bias)]
        cast = iter(ops.cast(tensors, dtype))
        weights |= {id(layer): (next(cast), next(cast)) for layer in taken}
    outer, _together.weights = getattr(_together, "weights", {}), weights
    try:
        yield
    finally:
        _together.weights = outer


def _weights(layer):
    """Kernel and bias in the layer's compute dtype."""
    cast = getattr(_together, "weights", {}).get(id(layer))
    return cast or [keras.ops.cast(value, layer.compute_dtype) for value in (layer.kernel, layer.bias)]


def _on_fused_op(layer):
    return layer._obstacle is None and use_fused(layer.backend, layer.compute_dtype, on_cpu=layer.fused_on_cpu)


@keras.saving.register_keras_serializable(package="unet_fast")
class FusedConv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` in one kernel: concatenation, convolution, bias, ReLU and 2x2 max pooling.

    Serves 3x3 and 1x1 kernels of stride 1 with a bias and ReLU or no activation, in float32, float16 and bfloat16;
    everything else that Conv2D can do runs as Conv2D does it.

    Args:
        filters, kernel_size, **kwargs: as `keras.layers.Conv2D` has them, all of them.
        pool: also return the output after 2x2 max pooling with stride 2.
        input_is_relu: promise that every input is a ReLU output, possibly pooled or dropped out. The input gradient is
            then masked where the input is zero, which saves its producer a pass and changes no weight's gradient.
        backend: "auto" takes the fused op where it can serve and is the faster one, "fused" always, "stock" never.

    Input: [N, H, W, C], or a list [x, skip]: x [N, H, W, Cx] with the centre H x W of skip [N, Hs, Ws, Cs]
        concatenated after it. With `pool` or a list, channels last only.

    Output: [N, Ho, Wo, filters] in the compute dtype; with `pool` the pair of it and [N, Ho // 2, Wo // 2, filters].

    Raises:
        UserError: when constructed: a backend unknown, or "fused" for what the op does not serve. When built: inputs
            that do not fit together. When called: "fused" where the library is not available; so late, so that a saved
            model loads anywhere.

    >>> import keras
    >>> from unet_fast.layers import FusedConv2D
    >>> skip, x = FusedConv2D(8, 3, padding="same", activation="relu", pool=True)(keras.ops.ones((1, 32, 32, 1)))
    >>> up = keras.layers.UpSampling2D()(x)
    >>> FusedConv2D(8, 3, activation="relu", input_is_relu=True)([up, skip]).shape
    TensorShape([1, 30, 30, 8])
    """

    def __init__(self, filters, kernel_size, *args, pool=False, input_is_relu=False, backend="auto", **kwargs):
        super().__init__(filters, kernel_size, *args, **kwargs)
        check_backend(backend)
        self.pool = pool
        self.input_is_relu = input_is_relu
        self.backend = backend
        self.fused_on_cpu = True  # for backend "auto"; a model that knows better sets it
        self.input_spec = None  # Conv2D's own admits a single input only; build() sets the right one.
        _check_servable(self)
        if pool and self.data_format != "channels_last":
            raise UserError(
                "expected data_format='channels_last' with pool=True, got 'channels_first'; pool in a layer of its own"
            )

    on_fused_op = property(_on_fused_op, doc="Whether the layer, called here, runs on the fused op.")

    @property
    def _obstacle(self):
        """Why the op cannot serve this layer, or None."""
        return _first(
            (self.kernel_size not in ((3, 3), (1, 1)), f"kernel_size={self.kernel_size} is not 3x3 or 1x1"),
            (self.strides != (1, 1), f"strides={self.strides} are not 1"),
            (self.dilation_rate != (1, 1), f"dilation_rate={self.dilation_rate} is not 1"),
            (self.groups != 1, f"groups={self.groups} is not 1"),
            *_common_obstacles(self),
        )

    def build(self, input_shape):
        x, skip = _pair(input_shape)
        if skip is None:
            super().build(x)
            return
        self._check_pair(x, skip)
        super().build((*x[:3], x[3] + skip[3]))
        self.input_spec = [keras.layers.InputSpec(ndim=4, axes={-1: shape[3]}) for shape in (x, skip)]

    def call(self, inputs):
        x, skip = _pair(inputs)
        if self.on_fused_op:
            return ops.conv2d_bias_relu(
                x,
                *_weights(self),
                skip,
                padding=self.padding,
                activation=keras.activations.serialize(self.activation),
                pool=self.pool,
                input_is_relu=self.input_is_relu,
            )
        if skip is not None:
            x = tf.concat([x, reference.center_crop(skip, x)], axis=-1)
        y = super().call(x)
        return (y, reference.max_pool2d(y)) if self.pool else y

    def compute_output_shape(self, input_shape):
        x, skip = _pair(input_shape)
        if skip is not None:
            self._check_pair(x, skip)
        y = super().compute_output_shape(tuple(x))
        if not self.pool:
            return y
        return y, (y[0], *(size if size is None else size // 2 for size in y[1:3]), y[3])

    def get_config(self):
        return {
            **super().get_config(),
            "pool": self.pool,
            "input_is_relu": self.input_is_relu,
            "backend": self.backend,
        }

    def _check_pair(self, x, skip):
        if self.data_format != "channels_last":
            raise UserError(
                "expected data_format='channels_last' with [x, skip], got 'channels_first'; concatenate beforehand"
            )
        fits = len(x) == len(skip) == 4 and all(
            outer is None or inner is None or outer >= inner for outer, inner in zip(skip[1:3], x[1:3], strict=True)
        )
        if not fits:
            raise UserError(
                "expected [x, skip] of rank 4 with skip at least as high and wide as x, "
                f"got {tuple(x)} and {tuple(skip)}; crop x or pad skip"
            )


@keras.saving.register_keras_serializable(package="unet_fast")
class FusedConv2DTranspose(keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` in one kernel: transposed convolution, bias and ReLU.

    Serves 3x3 and 2x2 kernels of stride 2 with "same" padding, a bias and ReLU or no activation, in float32, float16
    and bfloat16; everything else that Conv2DTranspose can do runs as Conv2DTranspose does it.

    Args:
        filters, kernel_size, **kwargs: as `keras.layers.Conv2DTranspose` has them, all of them.
        backend: "auto" takes the fused op where it can serve and is the faster one, "fused" always, "stock" never.

    Input: [N, H, W, C]. Output: [N, 2H, 2W, filters] in the compute dtype, where the op serves.

    Raises:
        UserError: when constructed: a backend unknown, or "fused" for what the op does not serve. When called: "fused"
            where the library is not available; so late, so that a saved model loads anywhere.

    >>> import keras
    >>> from unet_fast.layers import FusedConv2DTranspose
    >>> FusedConv2DTranspose(4, 2, strides=2, activation="relu")(keras.ops.ones((1, 16, 16, 8))).shape
    TensorShape([1, 32, 32, 4])
    """

    def __init__(self, filters, kernel_size, *args, backend="auto", **kwargs):
        super().__init__(filters, kernel_size, *args, **kwargs)
        check_backend(backend)
        self.backend = backend
        self.fused_on_cpu = True  # for backend "auto"; a model that knows better sets it
        _check_servable(self)

    on_fused_op = property(_on_fused_op, doc="Whether the layer, called here, runs on the fused op.")

    @property
    def _obstacle(self):
        """Why the op cannot serve this layer, or None."""
        # Without overlap, as a 2x2 kernel of stride 2 has none, "valid" and "same" are one thing.
        same = self.padding == "same" or self.kernel_size == (2, 2)
        return _first(
            (self.kernel_size not in ((3, 3), (2, 2)), f"kernel_size={self.kernel_size} is not 3x3 or 2x2"),
            (self.strides != (2, 2), f"strides={self.strides} are not 2"),
            (self.dilation_rate != (1, 1), f"dilation_rate={self.dilation_rate} is not 1"),
            (not same, f"padding={self.padding!r} is not 'same'"),
            (self.output_padding is not None, f"output_padding={self.output_padding} is not None"),
            *_common_obstacles(self),
        )

    def call(self, inputs):
        if self.on_fused_op:
            return ops.conv2d_transpose_bias_relu(
                inputs,
                *_weights(self),
                activation=keras.activations.serialize(self.activation),
            )
        return super().call(inputs)

    def get_config(self):
        # Keras 3.12, the last one for Python 3.10, leaves output_padding out.
        return {**super().get_config(), "output_padding": self.output_padding, "backend": self.backend}


@keras.saving.register_keras_serializable(package="unet_fast")
class CenterCrop(keras.layers.Layer):
    """The centre of a skip connection, cropped to what it is concatenated with, whatever the sizes.

    Input: a list [skip, like]: [N, Hs, Ws, C] and [N, H, W, ...] with Hs >= H and Ws >= W.

    Output: [N, H, W, C], from the offset ((Hs - H) // 2, (Ws - W) // 2).

    >>> import keras
    >>> from unet_fast.layers import CenterCrop
    >>> CenterCrop()([keras.ops.ones((1, 10, 10, 3)), keras.ops.ones((1, 6, 6, 8))]).shape
    TensorShape([1, 6, 6, 3])
    """

    def call(self, inputs):
        skip, like = inputs
        return reference.center_crop(skip, like)

    def compute_output_shape(self, input_shape):
        skip, like = input_shape
        return (skip[0], *like[1:3], skip[3])


def _pair(inputs):
    """(x, skip) of an input or of its shape; skip is None for a single one."""
    is_shape = isinstance(inputs, (list, tuple)) and (inputs[0] is None or isinstance(inputs[0], int))
    if is_shape or not isinstance(inputs, (list, tuple)):
        return inputs, None
    if len(inputs) != 2:
        raise UserError(
            f"expected one input or [x, skip], got a list of {len(inputs)}; concatenate the rest before the layer"
        )
    return inputs


def _first(*obstacles):
    return next((reason for applies, reason in obstacles if applies), None)


def _common_obstacles(layer):
    activation = getattr(layer.activation, "__name__", layer.activation)
    return (
        (layer.data_format != "channels_last", f"data_format={layer.data_format!r} is not 'channels_last'"),
        (not layer.use_bias, "use_bias=False"),
        (
            layer.activation not in (keras.activations.relu, keras.activations.linear),
            f"activation={activation} is not relu or linear",
        ),
        (layer.compute_dtype not in _DTYPES, f"compute dtype {layer.compute_dtype} is not one of {', '.join(_DTYPES)}"),
    )


def _check_servable(layer):
    if layer.backend == "fused" and layer._obstacle is not None:
        raise UserError(
            f"{type(layer).__name__} {layer.name!r} expects what the fused op serves with backend='fused', but "
            f"{layer._obstacle}; use backend='auto'"
        )
