"""Dice and IoU against NumPy, over several batches, as Keras runs them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from unet_fast.errors import UserError
from unet_fast.losses import DiceCrossEntropy
from unet_fast.metrics import Dice, IoU

rng = np.random.default_rng(0)


def batches(classes=3, count=3):
    for _ in range(count):
        yield (
            rng.integers(0, classes, (2, 7, 6)).astype(np.uint8),
            rng.normal(size=(2, 7, 6, classes)).astype(np.float32),
        )


def hard_scores(data, classes, ignore=None, weights=(1.0, 1.0)):
    """(Dice, IoU) of each class over all pixels of all batches."""
    both, truth, predicted = np.zeros((3, classes))
    for labels, logits in data:
        for label, logit, weight in zip(labels, logits, weights, strict=True):
            valid = label != ignore
            prediction = logit.argmax(-1)
            for c in range(classes):
                both[c] += weight * np.sum(valid & (label == c) & (prediction == c))
                truth[c] += weight * np.sum(valid & (label == c))
                predicted[c] += weight * np.sum(valid & (prediction == c))
    return 2 * both / (truth + predicted), both / (truth + predicted - both)


def soft_dice(data, classes, ignore=None, weights=(1.0, 1.0)):
    each = []
    for labels, logits in data:
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(-1, keepdims=True)
        for label, q in zip(labels, p, strict=True):
            q, t = q[label != ignore], np.eye(classes)[label[label != ignore]]
            each.append((2 * (q * t).sum(0) + 1e-6) / ((q**2).sum(0) + (t**2).sum(0) + 1e-6))
    return np.average(each, axis=0, weights=np.tile(weights, len(each) // 2))


def updated(metric, data, weights=None):
    for labels, logits in data:
        metric.update_state(labels, logits, sample_weight=weights)
    return float(metric.result())


@pytest.mark.parametrize(
    "weights", [None, np.array([2.0, 0.5]), np.array([[2.0], [0.5]])], ids=["plain", "[N]", "[N, 1]"]
)
@pytest.mark.parametrize("ignore", [None, 1, 255])
def test_scores(ignore, weights):
    data = list(batches())
    if ignore == 255:
        data[0][0][:, :3] = 255
    flat = (1.0, 1.0) if weights is None else weights.ravel()
    dice, iou = hard_scores(data, 3, ignore, flat)
    soft = soft_dice(data, 3, ignore, flat)
    for make, scores in (
        (Dice, dice),
        (IoU, iou),
        (lambda *a, **k: Dice(*a, soft=True, **k), soft),
    ):
        for c in {0, 1, 2} - {ignore}:
            metric = make(3, class_id=c, ignore_class=ignore)
            np.testing.assert_allclose(updated(metric, data, weights), scores[c], rtol=1e-6)
        for background in (True, False):
            counted = [c for c in range(3) if c != ignore and (background or c)]
            metric = make(3, include_background=background, ignore_class=ignore)
            np.testing.assert_allclose(updated(metric, data, weights), scores[counted].mean(), rtol=1e-6)


def test_a_class_that_is_nowhere_scores_one():
    labels, logits = np.zeros((1, 4, 4), int), np.tile([5.0, 0.0, -5.0], (1, 4, 4, 1))
    for metric in (Dice(3), IoU(3), Dice(3, class_id=2), IoU(3, class_id=2)):
        assert updated(metric, [(labels, logits)]) == 1.0
    assert updated(Dice(3, class_id=1), [(labels + 1, logits)]) == 0.0


def test_counts_do_not_saturate():
    """2^24 + 3 correct pixels and one wrong: float32 cannot tell that from none wrong, nor add one pixel to 2^24."""
    metric = IoU(2, class_id=0)
    one, wrong = (
        (np.zeros((1, 1, 1), int), np.array([[[[1.0, 0.0]]]])),
        (np.ones((1, 1, 1), int), np.array([[[[1.0, 0.0]]]])),
    )
    metric._totals.assign(np.array([[2.0**24, 0.0]] * 3))
    assert updated(metric, [one] * 3 + [wrong]) == np.float32((2**24 + 3) / (2**24 + 4))
    np.testing.assert_array_equal(metric._totals[:, 0], [2**24 + 3, 2**24 + 3, 2**24 + 4])


def test_reset():
    metric = Dice(3)
    data = list(batches())
    updated(metric, data[:2])
    metric.reset_state()
    assert updated(metric, data[2:]) == updated(Dice(3), data[2:])


@pytest.mark.parametrize("make", [Dice, IoU, lambda k: Dice(k, soft=True)], ids=["dice", "iou", "soft"])
def test_label_out_of_range_is_not_passed_over(make):
    labels, logits = next(batches())
    labels[0, 0, 0] = 3
    assert np.isnan(updated(make(3), [(labels, logits)]))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_in_evaluate(jit, policy):
    model = keras.Sequential([keras.Input((7, 6, 1)), keras.layers.Conv2D(3, 3, padding="same", dtype=policy)])
    x, labels = rng.normal(size=(4, 7, 6, 1)), rng.integers(0, 3, (4, 7, 6, 1)).astype(np.float32)
    model.compile(
        loss=DiceCrossEntropy(),
        metrics=[Dice(3), IoU(3, class_id=1), Dice(3, soft=True)],
        weighted_metrics=[Dice(3, class_id=2)],
        jit_compile=jit,
    )
    weights = np.array([1.0, 2.0, 0.0, 1.0])
    values = model.evaluate(x, labels, sample_weight=weights, batch_size=2, return_dict=True, verbose=0)
    logits = model.predict(x, verbose=0).astype(np.float32)
    data = [(labels[..., 0].astype(int), logits)]
    dice, iou = hard_scores(data, 3, weights=np.ones(4))
    assert values["dice"] == pytest.approx(dice.mean(), rel=1e-6)
    assert values["iou_1"] == pytest.approx(iou[1], rel=1e-6)
    assert values["dice_2"] == pytest.approx(hard_scores(data, 3, weights=weights)[0][2], rel=1e-6)
    assert values["soft_dice"] == pytest.approx(
        soft_dice([(data[0][0], logits)], 3, weights=np.ones(2)).mean(), rel=1e-5
    )


@pytest.mark.parametrize(
    "metric",
    [
        Dice(4, class_id=2, ignore_class=255, soft=True),
        Dice(3, include_background=False, name="foreground"),
        IoU(5, ignore_class=0),
    ],
    ids=lambda metric: metric.name,
)
def test_config_round_trip(metric):
    again = keras.metrics.deserialize(keras.metrics.serialize(metric))
    assert type(again) is type(metric)
    assert again.get_config() == metric.get_config()


@pytest.mark.parametrize("make", [Dice, IoU])
@pytest.mark.parametrize(
    "arguments",
    [{"class_id": 3}, {"class_id": 1, "ignore_class": 1}, {"num_classes": 1, "include_background": False}],
    ids=str,
)
def test_nothing_to_score(make, arguments):
    with pytest.raises(UserError, match=r"expected (class_id to be one of 3|a class to count)"):
        make(**{"num_classes": 3, **arguments})


@pytest.mark.parametrize(
    ("labels", "logits", "weights", "message"),
    [
        (np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4, 3)), None, "take np.argmax"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 2)), None, "num_classes=3"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 3)), np.ones((2, 4, 4)), "one weight a sample"),
    ],
    ids=["one-hot", "classes", "pixel weights"],
)
def test_bad_shapes(labels, logits, weights, message):
    with pytest.raises(UserError, match=message) as error:
        Dice(3).update_state(labels, tf.constant(logits), sample_weight=weights)
    assert "\n" not in str(error.value)
