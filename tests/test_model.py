"""FusedUNet: its shape, its backends against each other, and everything that Keras does with a model."""

import itertools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from unet_fast import _library
from unet_fast.errors import UserError
from unet_fast.layers import FusedConv2D
from unet_fast.losses import DiceCrossEntropy
from unet_fast.metrics import Dice
from unet_fast.models import FusedUNet, output_size

rng = np.random.default_rng(0)
NEEDS_LIBRARY = pytest.mark.skipif(not _library.status().available, reason="the library was not built")
FUSED = pytest.param("fused", marks=NEEDS_LIBRARY)
SMALL = {"input_shape": (44, 44, 1), "filters": 4, "depth": 2}


def images(*shape):
    return rng.normal(size=shape).astype(np.float32)


def with_random_biases(model):
    """Glorot kernels with zero biases would hide a bias that is left out."""
    model.set_weights([w if w.ndim > 1 else 0.1 * images(*w.shape) for w in model.get_weights()])
    return model


def test_reference_shape():
    model = FusedUNet()
    assert model.output_shape == (None, 388, 388, 2)
    assert model.count_params() == 34_512_258
    assert len(model.weights) == len(model.trainable_weights) == 46
    channels = [1, 64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024]
    down = [(3, 3, i, o) for i, o in itertools.pairwise(channels)]
    up = [shape for c in (512, 256, 128, 64) for shape in [(3, 3, c, 2 * c), (3, 3, 2 * c, c), (3, 3, c, c)]]
    assert [w.shape for w in model.weights[::2]] == [*down, *up, (1, 1, 64, 2)]
    assert [w.shape for w in model.weights[1::2]] == [
        (o,) for o in [*channels[1:], *np.repeat([512, 256, 128, 64], 3), 2]
    ]
    assert model.losses == [], "a regularizer"


def test_initial_weights():
    model = FusedUNet(filters=16)
    units = []
    for kernel, bias in zip(model.get_weights()[::2], model.get_weights()[1::2], strict=True):
        height, width, a, b = kernel.shape
        units.append(kernel.ravel() / np.sqrt(6 / (height * width * (a + b))))
        assert np.abs(units[-1]).max() <= 1 + 1e-6
        assert not bias.any()
    assert min(np.std(u) for u in units if u.size > 1000) == pytest.approx(1 / np.sqrt(3), rel=0.05), "not uniform"


@pytest.mark.parametrize("backend", ["auto", FUSED])
@pytest.mark.parametrize(
    "arguments",
    [
        SMALL,
        {**SMALL, "upsampling": "transpose2x2", "num_classes": 5},
        {"input_shape": (24, 16, 3), "padding": "same", "depth": 3, "filters": 3},
        {"input_shape": (None, None, 1), "depth": 1, "filters": 8, "dropout": 0},
        {"input_shape": (64, 64, 1), "padding": "same", "depth": 6, "filters": 1, "num_classes": 1},
    ],
    ids=str,
)
def test_is_its_stock_twin(backend, arguments):
    model = with_random_biases(FusedUNet(**arguments, backend=backend))
    stock = model.with_backend("stock")
    assert {type(layer).__module__.split(".")[0] for layer in stock.layers if layer.weights} == {"keras"}
    named = [[layer.name for layer in m.layers if layer.weights] for m in (model, stock)]
    assert named[0] == named[1]
    x = tf.constant(images(2, *(size or 28 for size in model.input_shape[1:3]), model.input_shape[3]))
    labels = rng.integers(0, 2, stock(x).shape[:-1])
    assert stock(x).shape[1:3] == tuple(output_size(size, model.depth, model.padding) for size in x.shape[1:3])
    outputs, gradients = [], []
    for m in (model, stock):
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = m(x)
            loss = tf.reduce_sum(tf.square(logits - tf.cast(labels, tf.float32)[..., None]))
        outputs.append(logits)
        gradients.append(tape.gradient(loss, [x, *(v.value for v in m.trainable_variables)]))
    np.testing.assert_allclose(*outputs, atol=2e-5)
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_only_the_image_is_no_relu_output():
    convolutions = [layer for layer in FusedUNet(**SMALL).layers if isinstance(layer, FusedConv2D)]
    assert [layer.name for layer in convolutions if not layer.input_is_relu] == ["down1_conv1"]


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_the_gradient_of_a_skip_is_passed_on_without_zeros_around_it(dtype):
    model = FusedUNet(**SMALL, backend="fused", dtype=dtype)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    operations = step.get_concrete_function(images(1, 44, 44, 1)).graph.get_operations()
    pooled = [op for op in operations if op.type == "UnetFastConv2DBiasReluGrad" and op.get_attr("num_pooled") == 1]
    # Inputs dy, dpooled, y; from the deeper level to the image's.
    assert [(op.inputs[0].shape[1], op.inputs[2].shape[1]) for op in pooled] == [(8, 16), (8, 40)]


@pytest.mark.parametrize("backend", ["auto", "stock"])
def test_dropout_at_the_bottom(backend):
    model = FusedUNet(**SMALL, dropout=0.5, backend=backend)
    x = images(1, 44, 44, 1)
    assert np.array_equal(model(x), model(x))
    assert not np.array_equal(model(x, training=True), model(x, training=True))
    still = FusedUNet(**SMALL, dropout=0.0, backend=backend)
    assert np.array_equal(still(x, training=True), still(x))


@pytest.mark.parametrize(
    ("policy", "jit", "backend"),
    [
        ("float32", False, "auto"),
        ("float32", True, "stock"),
        ("mixed_float16", True, "auto"),
        ("mixed_bfloat16", False, "stock"),
        pytest.param("float32", True, "fused", marks=NEEDS_LIBRARY),
        pytest.param("mixed_float16", False, "fused", marks=NEEDS_LIBRARY),
        pytest.param("mixed_bfloat16", True, "fused", marks=NEEDS_LIBRARY),
    ],
)
def test_compile_fit_evaluate_predict(policy, jit, backend):
    keras.utils.set_random_seed(0)
    model = FusedUNet(input_shape=(16, 16, 1), filters=4, depth=1, padding="same", backend=backend, dtype=policy)
    assert isinstance(model(images(1, 16, 16, 1)), tf.Tensor)
    assert model(images(1, 16, 16, 1)).dtype == model.compute_dtype
    assert {w.dtype for w in model.weights} == {"float32"}
    x = images(8, 16, 16, 1)
    y = (x > 0).astype(np.uint8)
    model.compile(keras.optimizers.Adam(0.01), DiceCrossEntropy(), metrics=[Dice(2)], jit_compile=jit)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    history = model.fit(x, y, batch_size=4, epochs=6, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    loss, dice = model.evaluate(x, y, verbose=0)
    logits = model.predict(x, verbose=0)
    assert logits.shape == (8, 16, 16, 2)
    assert loss == pytest.approx(float(DiceCrossEntropy()(y, logits)), rel=2e-2)
    assert 0 < dice <= 1


def test_global_policy_is_the_default():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = FusedUNet(**SMALL)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_config()["dtype"] == model.dtype_policy.name == "mixed_bfloat16"
    assert {layer.compute_dtype for layer in model.layers if layer.weights} == {"bfloat16"}


LOAD = """
import sys
import numpy as np
import keras
import unet_fast
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0).astype("float32"))
print(type(model).__name__, model.dtype_policy.name, model.optimizer.iterations.numpy(), model.loss.ignore_class)
"""


@pytest.mark.parametrize("backend", ["auto", "stock"])
def test_saved_model_in_a_fresh_process(tmp_path, backend):
    """Weights, policy, optimizer and loss come back with nothing imported but the package."""
    model = FusedUNet(**SMALL, backend=backend, dtype="mixed_bfloat16")
    x = images(2, 44, 44, 1)
    model.compile("adam", DiceCrossEntropy(ignore_class=3), metrics=[Dice(2)])
    model.fit(x, np.ones((2, 4, 4), np.uint8), verbose=0)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    files = [str(tmp_path / name) for name in ("model.keras", "x.npy", "y.npy")]
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, *files], env=os.environ, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[-4:] == ["FusedUNet", "mixed_bfloat16", "1", "3"]
    np.testing.assert_allclose(np.load(files[2]), model.predict(x, verbose=0).astype(np.float32), rtol=1e-2, atol=1e-2)


def test_config_is_the_constructor_arguments():
    arguments = {
        "input_shape": (None, 48, 3),
        "num_classes": 4,
        "filters": 2,
        "depth": 2,
        "padding": "same",
        "upsampling": "transpose2x2",
        "dropout": 0.25,
        "backend": "stock",
        "name": "mine",
        "dtype": "mixed_float16",
    }
    model = FusedUNet(**arguments)
    assert model.get_config() == arguments
    assert FusedUNet.from_config(model.get_config()).get_config() == arguments


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize(
    ("source", "target"), [("auto", "stock"), ("stock", "auto"), ("auto", "auto"), ("stock", "stock")]
)
def test_weights_files_fit_every_backend(tmp_path, suffix, source, target):
    saved = with_random_biases(FusedUNet(**SMALL, backend=source))
    path = tmp_path / f"saved{suffix}"
    (saved.save if suffix == ".keras" else saved.save_weights)(path)
    model = FusedUNet(**SMALL, backend=target)
    model.load_weights(path)
    for ours, theirs in zip(model.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_weights_of_another_architecture_are_refused(tmp_path):
    FusedUNet(**{**SMALL, "filters": 3}).save_weights(tmp_path / "other.weights.h5")
    for backend in ("auto", "stock"):
        with pytest.raises(ValueError, match="shape"):
            FusedUNet(**SMALL, backend=backend).load_weights(tmp_path / "other.weights.h5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes to be a positive integer, got 0"),
        ({"filters": 6.5}, "filters to be a positive integer, got 6.5"),
        ({"depth": 7}, "depth from 1 to 6, got 7"),
        ({"depth": True}, "depth from 1 to 6, got True"),
        ({"padding": "full"}, "padding 'valid' or 'same', got 'full'"),
        ({"upsampling": "bilinear"}, "got 'bilinear'"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
        ({"backend": "tpu"}, "got 'tpu'"),
        ({"input_shape": (572, 572)}, r"\(height, width, channels\), got \(572, 572\)"),
        ({"input_shape": (572, 572, None)}, "only height and width may be None"),
        ({"input_shape": 572}, "got 572"),
        ({"input_shape": (512, 572, 1)}, r"508.*524"),
        ({"input_shape": (512, 500, 1), "padding": "same"}, r"496.*512"),
    ],
    ids=str,
)
def test_bad_argument(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        FusedUNet(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["auto", "stock"])
@pytest.mark.parametrize(("padding", "nearest"), [("valid", "44"), ("same", "40")])
def test_an_image_that_does_not_fit(backend, padding, nearest):
    """Never a concatenation error, nor an image misaligned by half a pixel."""
    model = FusedUNet((None, None, 1), filters=2, depth=2, padding=padding, backend=backend)
    for call in (model, model.predict):
        with pytest.raises(UserError, match=nearest) as error:
            call(images(1, 42, 44, 1))
        assert "\n" not in str(error.value)
    late = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, 1))])
    for _ in range(100):  # the check comes first each time: a race with it would be won now and then
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"expects image sizes of 4 \* n"):
            late(images(1, 42, 44, 1))
    assert late(images(1, 44, 44, 1)).shape == model(images(1, 44, 44, 1)).shape


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("backend", ["fused", "stock"])
def test_weights_cast_once_predict_the_same_bits(policy, backend):
    model = FusedUNet((32, 32, 1), filters=4, depth=1, padding="same", backend=backend, dtype=policy)
    rng = np.random.default_rng(0)
    model.set_weights([rng.standard_normal(w.shape) * 0.2 for w in model.get_weights()])
    cast = model.for_prediction()
    assert {v.dtype for v in cast.variables if "kernel" in v.path} == {policy.removeprefix("mixed_")}
    image = rng.standard_normal((2, 32, 32, 1)).astype(np.float32)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(image)), keras.ops.convert_to_numpy(cast(image)))
    assert cast.for_prediction() is cast


def test_float32_predicts_as_it_is():
    model = FusedUNet((32, 32, 1), filters=2, depth=1, padding="same")
    assert model.for_prediction() is model
