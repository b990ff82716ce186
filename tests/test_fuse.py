"""fuse and unfuse: the same function of the same variables, whatever the model; what is left is named with the reason."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from keras_unet_collection import models as collection

from unet_fast import FusedUNet, _library, fuse, unfuse
from unet_fast.errors import UserError
from unet_fast.fusion import FusedModel
from unet_fast.layers import FusedConv2D, FusedConv2DTranspose

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _seed():
    """Else, once in a long while, weights bring a sum so near to 0 that its rounding decides what a ReLU lets through."""
    keras.utils.set_random_seed(0)


def images(model, batch=2):
    return keras.tree.map_structure(lambda x: rng.normal(size=(batch, *x.shape[1:])).astype("float32"), model.input)


def assert_equal(model, other, training=False, atol=2e-5):
    """Outputs and the gradients of all weights agree."""
    inputs = images(model)

    def run(which):
        with tf.GradientTape() as tape:
            outputs = keras.tree.flatten(which(inputs, training=training))
            loss = tf.add_n([tf.reduce_sum(tf.sin(3 * tf.cast(output, tf.float32))) for output in outputs])
        return outputs, tape.gradient(loss, model.trainable_variables)

    (outputs, gradients), (others, other_gradients) = run(model), run(other)
    assert len(outputs) == len(others) and len(gradients) == len(other_gradients)
    for a, b in zip(outputs, others, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=atol)
    largest = max([1.0, *(np.abs(gradient).max() for gradient in gradients)])
    for a, b in zip(gradients, other_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=atol * largest)


# What "auto" comes to depends on the machine; a GPU's fused ops take no float32, and a library may be missing.
BACKEND = "fused" if _library.status().available and not tf.config.list_physical_devices("GPU") else "auto"


def fused(model, backend=BACKEND):
    new = fuse(model, backend=backend, verbose=False)
    assert {id(v) for v in new.variables} == {id(v) for v in model.variables}
    return new


def reasons(model):
    return {entry.name: entry.reason for entry in model.fusion_report.left}


def roles(model):
    keys = ("pool", "input_is_relu", "activation")
    return [(layer.name, {key: layer.get_config().get(key) for key in keys}) for layer in model.layers]


@pytest.mark.parametrize(("padding", "size"), [("same", 16), ("valid", 44)])
def test_a_stock_unet_becomes_the_graph_of_the_fused_one(padding, size):
    stock = FusedUNet((size, size, 1), filters=2, depth=1, padding=padding, backend="stock", dropout=0)
    model = fused(stock)
    assert roles(model) == roles(FusedUNet((size, size, 1), filters=2, depth=1, padding=padding, dropout=0))
    assert [v.path for v in model.weights] == [v.path for v in stock.weights]
    assert not model.fusion_report.left
    assert_equal(stock, model)
    back = unfuse(model)
    assert not any(type(layer).__module__.startswith("unet_fast") for layer in back.layers)
    assert_equal(stock, back)


def test_the_report_says_what_was_done(capsys):
    x = keras.Input((16, 16, 1))
    y = layers.Conv2D(2, 3, name="first")(x)
    y = layers.ReLU(name="relu")(y)
    y = layers.MaxPooling2D(name="pool")(y)
    y = layers.BatchNormalization()(layers.Conv2D(2, 5, name="wide")(y))
    fuse(keras.Model(x, y))
    assert capsys.readouterr().out.splitlines() == [
        "fused 1 convolution, with 2 layers around them",
        "  first: FusedConv2D + ReLU 'relu' + MaxPooling2D 'pool'",
        "left 1 layer that might have been fused",
        "  wide: Conv2D, kernel_size=(5, 5) is not 3x3 or 1x1",
        "not looked at: 1 BatchNormalization",
    ]


@pytest.mark.parametrize(
    "relu",
    [layers.ReLU(), layers.Activation("relu"), keras.ops.relu, keras.activations.relu],
    ids=["ReLU", "Activation", "ops.relu", "activations.relu"],
)
@pytest.mark.parametrize("convolution", [layers.Conv2D, layers.Conv2DTranspose])
def test_a_relu_behind_a_convolution_is_taken_in(relu, convolution):
    x = keras.Input((8, 8, 2))
    options = {"strides": 2} if convolution is layers.Conv2DTranspose else {}
    model = keras.Model(x, relu(convolution(3, 3, padding="same", **options)(x)))
    new = fused(model)
    assert len(new.layers) == 2 and isinstance(new.layers[1], FusedConv2D | FusedConv2DTranspose)
    assert_equal(model, new)


@pytest.mark.parametrize(
    ("crop", "taken"),
    [
        (layers.Cropping2D(((1, 2), (0, 1))), True),
        (layers.Cropping2D(((2, 1), (0, 1))), False),  # not about the centre
        (layers.CenterCrop(8, 10), True),
        (lambda x: x[:, 1:9, :10, :], True),
        (lambda x: x[:, 1:-2, 0:-1], True),
        (lambda x: x[:, 2:10, 0:10], False),
    ],
)
def test_a_crop_about_the_centre_is_taken_in(crop, taken):
    x, skip = keras.Input((8, 10, 2)), keras.Input((11, 11, 3))
    joined = layers.Concatenate()([x, crop(skip)])
    model = keras.Model([x, skip], layers.Conv2D(3, 3, activation="relu")(joined))
    new = fused(model)
    assert len(new.fusion_report.fused[0].absorbed) == (2 if taken else 1)
    assert_equal(model, new)


def test_concatenations_in_either_order_and_of_unknown_size():
    x = keras.Input((None, None, 2))
    a, b = (layers.Conv2D(3, 3, padding="same", activation="relu")(x) for _ in range(2))
    cropped = layers.Cropping2D(1)(b)
    c = layers.Conv2D(2, 3)(layers.Concatenate()([cropped, layers.Cropping2D(1)(a)]))
    model = keras.Model(x, [c, layers.Conv2D(2, 1)(layers.Concatenate(axis=3)([b, a]))])
    new = fused(model)
    assert sum(isinstance(layer, layers.Cropping2D) for layer in new.layers) == 1  # the first input's
    x = rng.normal(size=(1, 9, 8, 2)).astype("float32")
    for expected, got in zip(model(x), new(x), strict=True):
        np.testing.assert_allclose(expected, got, atol=1e-5)


def left_over(x, kind):
    conv = layers.Conv2D(4, 3, padding="same", name="a")(x)
    if kind == "BatchNormalization":
        return (
            layers.ReLU(name="b")(layers.BatchNormalization(name="bn")(conv)),
            "b",
            "it follows BatchNormalization 'bn'",
        )
    if kind == "used twice":
        return [layers.ReLU(name="b")(conv), conv], "b", "its input is used elsewhere too"
    if kind == "pool":
        return layers.MaxPooling2D(3, name="b")(conv), "b", "pool_size=(3, 3) and strides=(3, 3) are not 2"
    if kind == "overlapping pool":
        return layers.MaxPooling2D(2, strides=1, name="b")(conv), "b", "pool_size=(2, 2) and strides=(1, 1) are not 2"
    if kind == "average":
        return layers.AveragePooling2D(2, name="b")(conv), "b", "it is no MaxPooling2D"
    if kind == "odd":
        odd = layers.Conv2D(2, 3, name="c")(layers.Cropping2D(((0, 1), (0, 1)))(x))
        return layers.MaxPooling2D(padding="same", name="b")(odd), "b", "padding='same' of a size that is odd"
    if kind == "three":
        joined = layers.Concatenate(name="b")([x, conv, conv])
        return layers.Conv2D(2, 3)(joined), "b", "it joins 3 inputs, and the op takes two"
    joined = layers.Concatenate(name="b")([x, conv])
    return [layers.Conv2D(2, 3)(joined), layers.Conv2D(2, 1)(joined)], "b", "more than one layer uses its output"


@pytest.mark.parametrize(
    "kind", ["BatchNormalization", "used twice", "pool", "overlapping pool", "average", "odd", "three", "joined twice"]
)
def test_what_does_not_fit_around_a_convolution_stays_and_is_named(kind):
    x = keras.Input((12, 12, 2))
    outputs, name, reason = left_over(x, kind)
    model = keras.Model(x, outputs)
    new = fused(model)
    assert reason in reasons(new)[name]
    assert isinstance(new.get_layer("a" if kind != "odd" else "c"), FusedConv2D)
    assert_equal(model, new, training=True)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (layers.Conv2D(4, 5), "kernel_size=(5, 5)"),
        (layers.Conv2D(4, 3, strides=2), "strides=(2, 2)"),
        (layers.Conv2D(4, 3, dilation_rate=2), "dilation_rate=(2, 2)"),
        (layers.Conv2D(4, 3, groups=2), "groups=2"),
        (layers.Conv2D(4, 3, use_bias=False), "use_bias=False"),
        (layers.Conv2D(4, 3, activation="gelu"), "activation=gelu"),
        (layers.Conv2D(4, 3, activity_regularizer="l2"), "activity regularizer"),
        (layers.Conv2D(4, 3, dtype="float64"), "compute dtype float64"),
        (layers.Conv2DTranspose(4, 3), "strides=(1, 1)"),
        (layers.Conv2DTranspose(4, 4, strides=2, padding="same"), "kernel_size=(4, 4)"),
        (layers.Conv2DTranspose(4, 3, strides=2), "padding='valid'"),
        (layers.Conv2DTranspose(4, 3, strides=2, padding="same", output_padding=0), "output_padding=(0, 0)"),
        (layers.SeparableConv2D(4, 3), "no fused op of this kind"),
        (type("Mine", (layers.Conv2D,), {})(4, 3), "a subclass of Conv2D"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_convolutions_that_the_ops_do_not_serve_stay_and_are_named(layer, reason):
    x = keras.Input((9, 9, 2))
    model = keras.Model(x, layers.ReLU()(layer(x)))
    new = fused(model)
    assert layer in new.layers and reason in reasons(new)[layer.name]
    assert_equal(model, new)


def test_lora_weights_stay():
    x = keras.Input((9, 9, 2))
    model = keras.Model(x, layers.Conv2D(4, 3, lora_rank=1)(x))
    assert "LoRA" in "".join(reasons(fused(model)).values())


def test_shared_layers_nested_models_and_several_outputs():
    inner_x = keras.Input((None, None, 3), name="features")
    inner_y = layers.ReLU(name="act")(layers.Conv2D(3, 3, padding="same", name="conv")(inner_x))
    inner = keras.Model(inner_x, inner_y, name="inner")
    sequential = keras.Sequential([layers.Conv2D(3, 1, name="one"), layers.ReLU()], name="sequential")
    shared = layers.Conv2D(3, 3, padding="same", name="shared")
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    a, b = shared(left), layers.ReLU()(shared(right))
    a, b = inner(a), inner(b)
    pooled = layers.MaxPooling2D(name="pool")(layers.Conv2D(3, 3, name="last")(sequential(keras.ops.add(a, b))))
    model = keras.Model({"left": left, "right": right}, {"low": pooled, "high": [a, b]}, name="twins")
    new = fused(model)
    assert [entry.name for entry in new.fusion_report.fused] == ["shared", "inner/conv", "sequential/one", "last"]
    assert "called several times" in "".join(reasons(new).values())
    assert new.name == "twins" and set(new.output) == {"low", "high"}
    assert_equal(model, new)
    assert_equal(model, unfuse(new))


def test_dtype_policies_stay():
    x = keras.Input((16, 16, 1))
    y = layers.Conv2D(4, 3, padding="same", dtype="mixed_float16", name="half")(x)
    y = layers.ReLU(dtype="float32", name="relu")(y)
    y = layers.Conv2D(4, 3, padding="same", activation="relu", dtype="mixed_float16")(y)
    y = layers.MaxPooling2D(dtype="float32", name="pool")(y)
    model = keras.Model(x, layers.Conv2D(2, 1, dtype="float32", name="logits")(y))
    new = fused(model)
    assert new.get_layer("half").compute_dtype == "float16" and new.get_layer("logits").compute_dtype == "float32"
    assert reasons(new).keys() == {"relu", "pool"}
    assert_equal(model, new, atol=2e-2)


def test_trainable_flags_regularizers_and_names_stay():
    x = keras.Input((8, 8, 1))
    y = layers.Conv2D(2, 3, activation="relu", kernel_regularizer="l2", name="frozen", trainable=False)(x)
    y = layers.Conv2D(2, 3, activation="relu", bias_constraint="non_neg", kernel_regularizer="l1", name="free")(y)
    model = keras.Model(x, y, name="net")
    new = fused(model)
    assert [layer.trainable for layer in new.layers[1:]] == [False, True]
    assert [v.path for v in new.trainable_variables] == ["free/kernel", "free/bias"]
    np.testing.assert_allclose(new.losses, model.losses)
    assert new.get_layer("free").bias.constraint is model.get_layer("free").bias.constraint
    new.get_layer("frozen").trainable = True
    assert len(new.trainable_variables) == 4 and len(new.weights) == 4


def test_training_the_fused_model_trains_the_stock_one():
    x = keras.Input((8, 8, 1))
    model = keras.Model(x, layers.Conv2D(2, 3, name="logits")(layers.Conv2D(4, 3, activation="relu")(x)))
    new = fused(model)
    before = model.get_weights()
    new.compile("sgd", "mse")
    new.fit(rng.normal(size=(4, 8, 8, 1)), rng.normal(size=(4, 4, 4, 2)), verbose=0)
    assert not np.array_equal(before[0], model.get_weights()[0])
    assert_equal(model, new)


def test_a_fused_model_loads_in_another_process(tmp_path):
    model = fused(FusedUNet((16, 16, 1), filters=2, depth=1, padding="same", backend="stock"))
    image = rng.normal(size=(1, 16, 16, 1)).astype("float32")
    model.save(tmp_path / "fused.keras")
    unfuse(model).save(tmp_path / "stock.keras")
    np.save(tmp_path / "image.npy", image)
    code = (
        "import sys, keras, numpy as np\n"
        "stock = keras.models.load_model('stock.keras')\n"
        "assert 'unet_fast' not in sys.modules\n"
        "import unet_fast\n"
        "fused = keras.models.load_model('fused.keras')\n"
        "assert type(fused).__name__ == 'FusedModel'\n"
        "np.save('outputs.npy', [m.predict(np.load('image.npy'), verbose=0) for m in (stock, fused)])\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for outputs in np.load(tmp_path / "outputs.npy"):
        np.testing.assert_allclose(outputs, model(image), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "convolutions", "left"),
    [
        ("unet_2d", {"unpool": True}, 13, set()),
        ("unet_2d", {"unpool": False}, 15, set()),
        ("unet_2d", {"unpool": False, "batch_norm": True, "pool": False}, 3, None),
        ("att_unet_2d", {"unpool": False}, 19, {"ReLU"}),  # of the attention gates, behind their additions
        ("unet_plus_2d", {"unpool": False, "deep_supervision": True}, 21, set()),
    ],
)
def test_unets_of_keras_unet_collection(name, options, convolutions, left):
    model = getattr(collection, name)((32, 32, 3), [4, 8, 16], n_labels=2, **options)
    new = fused(model)
    assert len(new.fusion_report.fused) == convolutions
    if left is not None:
        assert {entry.kind for entry in new.fusion_report.left} == left
        assert not any(type(layer) in (layers.Conv2D, layers.MaxPooling2D, layers.Concatenate) for layer in new.layers)
    assert_equal(model, new)


def test_the_separable_unet_of_the_keras_examples_is_mostly_left_and_said_to_be():
    """An encoder of separable convolutions and a decoder of transposed ones of stride 1, with residual additions, each
    convolution followed by batch normalisation: as in Keras' example on the Oxford pets."""
    x = keras.Input((32, 32, 3))
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, strides=2, padding="same")(x)))
    for filters in (8, 16):
        residual = layers.Conv2D(filters, 1, strides=2, padding="same")(y)
        for _ in range(2):
            y = layers.BatchNormalization()(layers.SeparableConv2D(filters, 3, padding="same")(layers.ReLU()(y)))
        y = layers.add([layers.MaxPooling2D(3, strides=2, padding="same")(y), residual])
    for filters in (16, 8, 4):
        residual = layers.Conv2D(filters, 1, padding="same")(layers.UpSampling2D()(y))
        for _ in range(2):
            y = layers.BatchNormalization()(layers.Conv2DTranspose(filters, 3, padding="same")(layers.ReLU()(y)))
        y = layers.add([layers.UpSampling2D()(y), residual])
    model = keras.Model(x, layers.Conv2D(3, 3, activation="softmax", padding="same")(y))
    new = fused(model)
    assert [entry.absorbed for entry in new.fusion_report.fused] == [()] * 3  # the decoder's 1x1 residuals
    left = [entry.kind for entry in new.fusion_report.left]
    assert [left.count(kind) for kind in ("SeparableConv2D", "Conv2DTranspose", "Conv2D")] == [4, 6, 4]
    assert_equal(model, new)


def test_backend_and_jit_decide_on_a_cpu(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])
    x = keras.Input((8, 8, 1))
    narrow = fused(keras.Model(x, layers.Conv2D(4, 3, activation="relu")(x)), backend="auto")
    narrow(np.zeros((1, 8, 8, 1)))
    assert not narrow.layers[1].fused_on_cpu
    narrow.jit_compile = True
    narrow(np.zeros((1, 8, 8, 1)))
    assert narrow.layers[1].fused_on_cpu
    assert fused(keras.Model(x, layers.Conv2D(4, 3)(x)), backend="stock").layers[1].backend == "stock"


def test_a_model_without_a_graph_is_refused():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    for function in (fuse, unfuse):
        with pytest.raises(UserError, match=r"expected a functional keras\.Model, .* got Subclassed"):
            function(Subclassed())
        with pytest.raises(UserError, match="got Sequential"):
            function(keras.Sequential([layers.Conv2D(2, 3)]))
    with pytest.raises(UserError, match="backend 'auto', 'fused' or 'stock', got 'gpu'"):
        fuse(FusedUNet((16, 16, 1), filters=2, depth=1, padding="same"), backend="gpu")


def test_what_a_users_class_adds_is_said_to_be_lost():
    class Mine(keras.Model):
        def train_step(self, data):
            return super().train_step(data)

    x = keras.Input((8, 8, 1))
    new = fused(Mine(x, layers.Conv2D(2, 3)(x)))
    assert isinstance(new, FusedModel) and "what Mine adds" in str(new.fusion_report)


def test_a_fused_unet_is_unfused():
    model = FusedUNet((None, None, 1), filters=2, depth=1, padding="valid", dropout=0)
    stock = unfuse(model)
    x = rng.normal(size=(1, 44, 48, 1)).astype("float32")
    np.testing.assert_allclose(model(x), stock(x), atol=1e-5)
    assert {id(v) for v in stock.weights} == {id(v) for v in model.weights}


def test_a_layer_that_also_applies_a_relu_does_not_end_in_one():
    """What reads it masks no gradients: they pass where the sum of both is negative."""

    class Residual(layers.Layer):
        activation = staticmethod(keras.activations.relu)

        def call(self, x):
            return x + 0.1 * self.activation(x)

    x = keras.Input((16, 16, 3))
    y = Residual()(layers.Conv2D(4, 3, padding="same")(x))
    y = layers.Conv2D(4, 3, padding="same", activation="relu")(y)
    model = keras.Model(x, layers.Conv2D(2, 3, padding="same")(y))
    new = fused(model)
    assert [layer.input_is_relu for layer in new.layers if isinstance(layer, FusedConv2D)] == [False, False, True]
    assert_equal(model, new)
