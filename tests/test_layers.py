"""FusedConv2D, FusedConv2DTranspose and CenterCrop against Keras' own layers."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from unet_fast import FusedUNet, _library, ops, reference
from unet_fast.errors import UserError
from unet_fast.layers import CenterCrop, FusedConv2D, FusedConv2DTranspose, use_fused

rng = np.random.default_rng(0)


def library(monkeypatch, *, available=True, cuda=False, gpus=0):
    """Pretends that this is what was built and what the machine has."""
    reason = None if available else "it was not built"
    monkeypatch.setattr(
        _library, "status", lambda: types.SimpleNamespace(available=available, reason=reason, cuda=cuda)
    )
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["gpu"] * gpus)


@pytest.fixture
def calls(monkeypatch):
    """Records what the layers ask of the ops, and answers from the reference; the library counts as available."""
    library(monkeypatch)
    recorded = []

    def recording(name):
        def op(*args, **kwargs):
            recorded.append((name, kwargs))
            return getattr(reference, name)(*args, **kwargs)

        return op

    for name in ("conv2d_bias_relu", "conv2d_transpose_bias_relu"):
        monkeypatch.setattr(ops, name, recording(name))
    return recorded


def image(*shape):
    return rng.normal(size=shape).astype(np.float32)


def twin(layer, stock_class, shape, **overrides):
    """Keras' own layer with the same arguments and weights."""
    config = {k: v for k, v in layer.get_config().items() if k not in ("pool", "input_is_relu", "backend")}
    stock = stock_class.from_config({**config, **overrides})
    stock.build(shape)
    stock.set_weights(layer.get_weights())
    return stock


CONVOLUTIONS = [
    {"kernel_size": 3, "activation": "relu"},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (1, 1), "activation": "linear"},
]
STOCK_CONVOLUTIONS = [
    {"kernel_size": 5},
    {"kernel_size": 3, "strides": 2},
    {"kernel_size": 3, "dilation_rate": 2},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 3, "use_bias": False},
    {"kernel_size": 3, "activation": "gelu"},
    {"kernel_size": 3, "dtype": "float64"},
]


@pytest.mark.parametrize("arguments", CONVOLUTIONS + STOCK_CONVOLUTIONS, ids=str)
def test_convolution_is_keras_own(arguments, calls):
    x = image(2, 9, 8, 4)
    layer = FusedConv2D(6, bias_initializer="normal", **arguments)
    y = layer(x)
    assert len(calls) == (arguments in CONVOLUTIONS)
    np.testing.assert_allclose(y, twin(layer, keras.layers.Conv2D, x.shape)(x), atol=1e-5)
    assert y.shape == layer.compute_output_shape(x.shape)


@pytest.mark.parametrize("backend", ["auto", "stock"])
def test_skip_and_pool(backend, calls):
    x, skip = image(2, 7, 6, 3), image(2, 10, 8, 2)
    layer = FusedConv2D(
        4, 3, activation="relu", bias_initializer="normal", pool=True, input_is_relu=True, backend=backend
    )
    y, pooled = layer([x, skip])
    expected = {"padding": "valid", "activation": "relu", "pool": True, "input_is_relu": True}
    assert calls == ([("conv2d_bias_relu", expected)] if backend == "auto" else [])
    joined = np.concatenate([x, skip[:, 1:8, 1:7]], -1)
    stock = twin(layer, keras.layers.Conv2D, joined.shape)(joined)
    np.testing.assert_allclose(y, stock, atol=1e-5)
    np.testing.assert_allclose(pooled, keras.layers.MaxPooling2D()(stock), atol=1e-5)
    assert layer.compute_output_shape([x.shape, skip.shape]) == (y.shape, pooled.shape)


TRANSPOSED = [
    {"kernel_size": 3, "strides": 2, "padding": "same", "activation": "relu"},
    {"kernel_size": 2, "strides": (2, 2), "padding": "same"},
    {"kernel_size": 2, "strides": 2, "activation": "relu"},
]
STOCK_TRANSPOSED = [
    {"kernel_size": 3, "strides": 2},
    {"kernel_size": 4, "strides": 2, "padding": "same"},
    {"kernel_size": 3},
    {"kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 0},
    {"kernel_size": 2, "strides": 2, "use_bias": False},
    {"kernel_size": 2, "strides": 2, "activation": "tanh"},
]


@pytest.mark.parametrize("arguments", TRANSPOSED + STOCK_TRANSPOSED, ids=str)
def test_transposed_convolution_is_keras_own(arguments, calls):
    x = image(2, 5, 4, 3)
    layer = FusedConv2DTranspose(6, bias_initializer="normal", **arguments)
    y = layer(x)
    assert len(calls) == (arguments in TRANSPOSED)
    np.testing.assert_allclose(y, twin(layer, keras.layers.Conv2DTranspose, x.shape)(x), atol=1e-5)
    assert y.shape == layer.compute_output_shape(x.shape)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_ops_are_called_in_the_compute_dtype(policy, calls):
    x = image(1, 6, 6, 2)
    for layer in (
        FusedConv2D(4, 3, dtype=policy, backend="fused"),
        FusedConv2DTranspose(4, 2, strides=2, dtype=policy, backend="fused"),
    ):
        y = layer(x)
        assert (y.dtype, layer.kernel.dtype) == (layer.compute_dtype, "float32")
        exact = twin(layer, type(layer).__base__, x.shape, dtype="float32")(x)
        np.testing.assert_allclose(tf.cast(y, tf.float32), exact, atol=3e-2)
    assert [name for name, _ in calls] == ["conv2d_bias_relu", "conv2d_transpose_bias_relu"]


def test_gradients_are_those_of_keras_layers(calls):
    x, skip = image(1, 8, 8, 2), image(1, 8, 8, 2)
    fused = FusedConv2D(4, 3, activation="relu")
    fused([x, skip])
    stock = twin(fused, keras.layers.Conv2D, (1, 8, 8, 4))
    results = []
    for layer, inputs in ((fused, lambda a, b: [a, b]), (stock, lambda a, b: tf.concat([a, b], -1))):
        tensors = [tf.constant(x), tf.constant(skip)]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = tf.reduce_sum(layer(inputs(*tensors)) ** 2)
        results.append(tape.gradient(loss, [*tensors, *(v.value for v in layer.trainable_variables)]))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def unknown_sizes():
    x, skip = keras.Input((None, None, 3)), keras.Input((None, 20, 2))
    y, pooled = FusedConv2D(4, 3, padding="same", pool=True, name="joined")([x, skip])
    up = FusedConv2DTranspose(2, 2, strides=2, backend="stock", name="up")(pooled)
    return keras.Model([x, skip], [y, up, CenterCrop()([skip, up])])


def test_symbolic_shapes_of_unknown_sizes():
    model = unknown_sizes()
    assert [tuple(o.shape) for o in model.outputs] == [
        (None, None, None, 4),
        (None, None, None, 2),
        (None, None, None, 2),
    ]
    y, up, crop = model([image(1, 9, 7, 3), image(1, 12, 20, 2)])
    assert (y.shape, up.shape, crop.shape) == ((1, 9, 7, 4), (1, 8, 6, 2), (1, 8, 6, 2))


def test_a_saved_model_loads(tmp_path):
    model = unknown_sizes()
    inputs = [image(1, 9, 7, 3), image(1, 12, 20, 2)]
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.get_layer("joined").get_config() == model.get_layer("joined").get_config()
    assert loaded.get_layer("up").backend == "stock"
    for ours, theirs in zip(model(inputs), loaded(inputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_odd_margins_crop_as_the_op_does():
    skip = image(1, 7, 8, 2)
    crop = CenterCrop()([skip, image(1, 4, 5, 1)])
    np.testing.assert_array_equal(crop, skip[:, 1:5, 1:6])


@pytest.mark.parametrize(
    ("available", "cuda", "gpus", "dtype", "expected"),
    [
        (True, True, 1, "float16", True),
        (True, True, 1, "bfloat16", True),
        (True, True, 1, "float32", False),  # the op has no such kernel on a GPU
        (True, False, 0, "float32", True),
        # CPUs have no half-precision arithmetic that would make the op the faster one.
        (True, True, 0, "float16", False),
        (True, False, 1, "float32", False),  # the op would leave the GPU
        (False, False, 0, "float32", False),
    ],
)
def test_auto_takes_the_faster(monkeypatch, available, cuda, gpus, dtype, expected):
    monkeypatch.delenv("UNET_FAST_REQUIRE_KERNELS", raising=False)
    library(monkeypatch, available=available, cuda=cuda, gpus=gpus)
    assert use_fused("auto", dtype) is expected
    assert use_fused("stock", dtype) is False
    if available and (cuda or not gpus) and not (gpus and dtype == "float32"):
        assert use_fused("fused", dtype) is True
    if not gpus:
        assert use_fused("auto", dtype, on_cpu=False) is False


def test_auto_on_a_cpu_goes_by_the_width_and_by_xla():
    narrow = FusedUNet((32, 32, 1), filters=8, depth=1, padding="same")
    assert not narrow.uses_fused_ops
    narrow.compile("sgd", "mse", jit_compile=True)
    assert narrow.uses_fused_ops
    assert FusedUNet((32, 32, 1), filters=64, depth=1, padding="same").uses_fused_ops
    assert not FusedUNet((32, 32, 1), filters=72, depth=1, padding="same").uses_fused_ops
    assert FusedUNet((32, 32, 1), filters=8, depth=1, padding="same", backend="fused").uses_fused_ops


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_missing_kernels_are_an_error_of_one_line_where_they_are_required(monkeypatch, backend):
    library(monkeypatch, available=False)
    monkeypatch.setenv("UNET_FAST_REQUIRE_KERNELS", "1")
    x = keras.Input((8, 8, 1))
    model = keras.Model(x, FusedConv2D(1, 3, backend=backend)(x))
    model.compile(loss="mse")
    for call in (model, model.predict, lambda x: model.fit(x, image(1, 6, 6, 1), verbose=0)):
        with pytest.raises(UserError, match="expects the fused ops, but it was not built") as error:
            call(image(1, 8, 8, 1))
        assert "\n" not in str(error.value)
    if backend == "auto":
        FusedConv2D(1, 5)(image(1, 8, 8, 1))  # which the op never serves


@pytest.mark.parametrize("arguments", STOCK_CONVOLUTIONS, ids=str)
def test_fused_refuses_a_convolution_the_op_does_not_serve(arguments):
    with pytest.raises(UserError, match="use backend='auto'"):
        FusedConv2D(6, backend="fused", **arguments)


@pytest.mark.parametrize("arguments", STOCK_TRANSPOSED, ids=str)
def test_fused_refuses_a_transposed_convolution_the_op_does_not_serve(arguments):
    with pytest.raises(UserError, match="use backend='auto'"):
        FusedConv2DTranspose(6, backend="fused", **arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FusedConv2D(1, 3, backend="cuda"), "got 'cuda'"),
        (lambda: FusedConv2DTranspose(1, 2, backend="cuda"), "got 'cuda'"),
        (lambda: FusedConv2D(1, 3, pool=True, data_format="channels_first"), "channels_last"),
        (lambda: FusedConv2D(1, 3)([image(1, 8, 8, 1), image(1, 6, 8, 1)]), "at least as high and wide"),
        (lambda: FusedConv2D(1, 3)([image(1, 8, 8, 1)] * 3), "a list of 3"),
        (lambda: FusedConv2D(1, 3, data_format="channels_first")([image(1, 1, 8, 8)] * 2), "channels_last"),
    ],
)
def test_mistakes_are_one_line(build, message):
    with pytest.raises(UserError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
