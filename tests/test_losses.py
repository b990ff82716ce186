"""DiceCrossEntropy as Keras calls it; its numbers are the ops' own tests' business."""

import re
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from unet_fast import _library, ops, reference
from unet_fast.errors import UserError
from unet_fast.losses import DiceCrossEntropy

rng = np.random.default_rng(0)
BACKENDS = [
    "stock",
    pytest.param(
        "fused", marks=pytest.mark.skipif(not _library.status().available, reason="the library was not built")
    ),
]


def batch(n=3, classes=3, dtype=np.float32):
    labels = rng.integers(0, classes, (n, 6, 5)).astype(np.uint8)
    return labels, rng.normal(size=(n, 6, 5, classes), scale=2).astype(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dice_weight": 0.0, "class_weights": [1.0, 0.0, 2.0], "label_smoothing": 0.1},
        {"ce_weight": 0.0, "squared": False, "smooth": 1.0, "include_background": False},
        {"ignore_class": 2},
    ],
    ids=str,
)
def test_is_the_mean_of_the_op(backend, options):
    labels, logits = batch()
    expected = reference.dice_cross_entropy(tf.constant(labels), tf.constant(logits), **options)
    loss = DiceCrossEntropy(**options, backend=backend)
    np.testing.assert_allclose(loss(labels, logits), np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(loss.call(labels, logits), expected, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_term_by_itself(backend):
    """Against Keras' cross-entropy, and for Dice against a perfect prediction."""
    labels, logits = batch()
    ce = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits)
    np.testing.assert_allclose(DiceCrossEntropy(dice_weight=0.0, backend=backend)(labels, logits), ce, rtol=1e-5)
    perfect = 40.0 * np.eye(3, dtype=np.float32)[labels]
    np.testing.assert_allclose(DiceCrossEntropy(ce_weight=0.0, backend=backend)(labels, perfect), 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "convert",
    [
        lambda y: y[..., None],
        lambda y: y.astype(np.int64),
        lambda y: y.astype(np.float32)[..., None],
        lambda y: y + np.float32(1e-4) - np.float32(2e-4) * (y > 0),  # as resampling leaves them
        lambda y: tf.cast(y, tf.bfloat16),
    ],
    ids=["channel", "int64", "float", "nearly whole", "bfloat16"],
)
def test_labels_as_pipelines_hand_them_over(convert):
    labels, logits = batch()
    loss = DiceCrossEntropy()
    np.testing.assert_array_equal(loss(convert(labels), logits), loss(labels, logits))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_reach_the_op_as_they_are(monkeypatch, dtype):
    seen = []

    def op(labels, logits, **_):
        seen.append((labels.dtype.name, logits.dtype.name))
        return tf.zeros(labels.shape[0])

    monkeypatch.setattr(_library, "status", lambda: types.SimpleNamespace(available=True, reason=None, cuda=True))
    monkeypatch.setattr(ops, "dice_cross_entropy", op)
    labels, logits = batch()
    assert DiceCrossEntropy()(labels, tf.cast(logits, dtype)).dtype == tf.float32
    assert seen == [("int32", dtype)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_extremes(backend):
    """Loss and gradient stay finite for the largest logits that float16 holds, all background, and nothing valid."""
    loss = DiceCrossEntropy(ignore_class=255, backend=backend)
    extreme = tf.constant(6e4 * np.sign(rng.normal(size=(1, 4, 4, 2))), tf.float16)
    for labels in (rng.integers(0, 2, (1, 4, 4)), np.zeros((1, 4, 4), int), np.full((1, 4, 4), 255)):
        with tf.GradientTape() as tape:
            tape.watch(extreme)
            value = loss(labels, extreme)
        assert np.isfinite(value), labels
        assert np.all(np.isfinite(tape.gradient(value, extreme))), labels


@pytest.mark.parametrize("weights", [[1.0, 0.0, 3.0], np.array([[1], [0], [3]])], ids=["[N]", "[N, 1]"])
def test_sample_weight_and_reduction(weights):
    labels, logits = batch()
    each = DiceCrossEntropy(reduction=None)(labels, logits).numpy()
    weighted = each * [1.0, 0.0, 3.0]
    for reduction, expected in (
        (None, weighted),
        ("sum", weighted.sum()),
        ("sum_over_batch_size", weighted.mean()),
        ("mean_with_sample_weight", weighted.sum() / 4),
    ):
        loss = DiceCrossEntropy(reduction=reduction)(labels, logits, sample_weight=weights)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_keras_mask_leaves_pixels_out():
    labels, logits = batch()
    mask = rng.random(labels.shape) < 0.5
    for ignore_class in (None, 255):
        masked = tf.constant(logits)
        masked._keras_mask = tf.constant(mask)
        expected = DiceCrossEntropy(ignore_class=255)(np.where(mask, labels, 255), logits)
        np.testing.assert_allclose(DiceCrossEntropy(ignore_class=ignore_class)(labels, masked), expected, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_fit(jit, policy):
    """Learns to tell bright pixels from dark ones; with float16, through Keras' own loss scaling."""
    keras.utils.set_random_seed(0)
    x = rng.normal(size=(16, 8, 8, 1)).astype(np.float32)
    y = (x > 0).astype(np.uint8)
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 1, dtype=policy)])
    model.dtype_policy = keras.dtype_policies.get(policy)
    model.compile(keras.optimizers.Adam(0.3), DiceCrossEntropy(), jit_compile=jit)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    history = model.fit(x, y, sample_weight=np.ones(16), batch_size=8, epochs=8, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
    np.testing.assert_allclose(
        model.evaluate(x, y, verbose=0), DiceCrossEntropy()(y, model.predict(x, verbose=0)), rtol=1e-2
    )


def test_config_round_trip():
    loss = DiceCrossEntropy(
        dice_weight=2.0,
        ce_weight=0.5,
        class_weights=(1, 2),
        ignore_class=7,
        include_background=False,
        smooth=1.0,
        squared=False,
        label_smoothing=0.1,
        reduction="sum",
        name="mine",
        backend="stock",
    )
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert isinstance(again, DiceCrossEntropy)
    assert again.get_config() == loss.get_config()
    assert again.get_config()["class_weights"] == [1.0, 2.0]


@pytest.mark.parametrize(
    "argument",
    [
        {"dice_weight": -1.0},
        {"ce_weight": -0.5},
        {"smooth": 0.0},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.5},
        {"class_weights": []},
        {"class_weights": [1.0, -1.0]},
        {"class_weights": 2.0},
        {"ignore_class": 1.5},
        {"backend": "gpu"},
    ],
    ids=str,
)
def test_bad_argument(argument):
    ((name, value),) = argument.items()
    with pytest.raises(UserError, match=f"expected {name} .*{re.escape(str(value))}") as error:
        DiceCrossEntropy(**argument)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "logits", "weights", "message"),
    [
        (np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4, 3)), None, r"shape \(2, 4, 4\) for logits .* take np.argmax"),
        (np.zeros((2, 8, 8)), np.zeros((2, 4, 4, 3)), None, "crop or resize"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 1)), None, "at least 2 classes"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 3)), np.ones((2, 4, 4)), "one weight a sample"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 3)), np.ones(3), "one weight a sample"),
    ],
    ids=["one-hot", "size", "one class", "pixel weights", "too many weights"],
)
def test_bad_shapes(labels, logits, weights, message):
    with pytest.raises(UserError, match=message) as error:
        DiceCrossEntropy()(labels, logits, sample_weight=weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": [1.0, 2.0]}, "class_weights for the 3 classes of the logits, got 2"),
        ({"include_background": False, "ignore_class": 1}, "expected a class to count"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_logits(backend, options, message):
    labels, logits = batch(classes=3 if "class_weights" in options else 2)
    with pytest.raises(UserError, match=message):
        DiceCrossEntropy(**options, backend=backend)(labels, logits)


def test_fused_without_the_library(monkeypatch):
    monkeypatch.delenv("UNET_FAST_REQUIRE_KERNELS", raising=False)
    monkeypatch.setattr(
        _library, "status", lambda: types.SimpleNamespace(available=False, reason="it was not built", cuda=False)
    )
    with pytest.raises(UserError, match="it was not built"):
        DiceCrossEntropy(backend="fused")(*batch())
    assert np.isfinite(DiceCrossEntropy()(*batch()))
