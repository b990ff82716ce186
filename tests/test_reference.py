"""The reference ops against NumPy in float64, written as the loops that the definitions are."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from unet_fast import reference
from unet_fast.errors import UserError

rng = np.random.default_rng(0)


def conv2d(x, kernel, bias, padding):
    kh, kw, _, _ = kernel.shape
    if padding == "same":
        x = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    n, h, w, _ = x.shape
    y = np.empty((n, h - kh + 1, w - kw + 1, kernel.shape[3]))
    for i, j in itertools.product(range(y.shape[1]), range(y.shape[2])):
        y[:, i, j] = np.einsum("nhwi,hwio->no", x[:, i : i + kh, j : j + kw], kernel)
    return y + bias


def max_pool(y):
    n, h, w, c = y.shape
    return y[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def conv2d_transpose(x, kernel, bias):
    """Scatters every input pixel through the kernel; "same" keeps 2H x 2W and cuts the rest off at the end."""
    n, h, w, _ = x.shape
    k = kernel.shape[0]
    full = np.zeros((n, 2 * h + k - 2, 2 * w + k - 2, kernel.shape[2]))
    for i, j in itertools.product(range(h), range(w)):
        full[:, 2 * i : 2 * i + k, 2 * j : 2 * j + k] += np.einsum("ni,hwoi->nhwo", x[:, i, j], kernel)
    return full[:, : 2 * h, : 2 * w] + bias


def dice_cross_entropy(
    labels,
    logits,
    *,
    dice_weight=1.0,
    ce_weight=1.0,
    class_weights=None,
    ignore_class=None,
    include_background=True,
    smooth=1e-6,
    squared=True,
    label_smoothing=0.0,
):
    classes = logits.shape[-1]
    weights = np.ones(classes) if class_weights is None else np.asarray(class_weights, np.float64)
    losses = []
    for label, logit in zip(labels.reshape(len(labels), -1), logits.reshape(len(logits), -1, classes), strict=True):
        ce, ce_weights = 0.0, 0.0
        both, p_sum, t_sum = np.zeros(classes), np.zeros(classes), np.zeros(classes)
        for t, z in zip(label, logit.astype(np.float64), strict=True):
            if t == ignore_class:
                continue
            log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
            p, one_hot = np.exp(log_p), np.eye(classes)[t]
            target = (1 - label_smoothing) * one_hot + label_smoothing / classes
            ce -= weights[t] * (target * log_p).sum()
            ce_weights += weights[t]
            both += p * one_hot
            p_sum += p**2 if squared else p
            t_sum += one_hot
        dice = (2 * both + smooth) / (p_sum + t_sum + smooth)
        counted = [c for c in range(classes) if c != ignore_class and (c or include_background)]
        losses.append(ce_weight * (ce / ce_weights if ce_weights else 0.0) + dice_weight * (1 - dice[counted]).mean())
    return np.array(losses)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("activation", ["relu", None])
def test_convolution_with_skip_and_pool(padding, size, activation):
    x, skip = rng.normal(size=(2, 7, 6, 3)), rng.normal(size=(2, 10, 8, 2))
    kernel, bias = rng.normal(size=(size, size, 5, 4)), rng.normal(size=4)
    expected = conv2d(np.concatenate([x, skip[:, 1:8, 1:7]], -1), kernel, bias, padding)
    if activation:
        expected = np.maximum(expected, 0)
    arguments = [tf.constant(v, tf.float32) for v in (x, kernel, bias, skip)]
    y, pooled = reference.conv2d_bias_relu(*arguments, padding=padding, activation=activation, pool=True)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(pooled, max_pool(expected), atol=1e-5)
    np.testing.assert_array_equal(
        y, reference.conv2d_bias_relu(*arguments, padding=padding, activation=activation), "pool changed the output"
    )


def test_input_is_relu_masks_the_input_gradients_only():
    x = tf.nn.relu(tf.random.stateless_normal((1, 6, 6, 2), (0, 1)))
    skip = tf.nn.relu(tf.random.stateless_normal((1, 6, 6, 3), (0, 2)))
    kernel, bias = tf.random.stateless_normal((3, 3, 5, 4), (0, 3)), tf.zeros(4)
    outputs, gradients = [], []
    for input_is_relu in (False, True):
        with tf.GradientTape() as tape:
            tape.watch([x, skip, kernel, bias])
            y = reference.conv2d_bias_relu(x, kernel, bias, skip, input_is_relu=input_is_relu)
        outputs.append(y)
        gradients.append(tape.gradient(y, [x, skip, kernel, bias], tf.random.stateless_normal(y.shape, (0, 4))))
    np.testing.assert_array_equal(*outputs)
    for plain, masked, tensor in zip(*gradients, [x, skip], strict=False):
        assert np.any(plain.numpy()[tensor.numpy() == 0] != 0)
        np.testing.assert_array_equal(masked, np.where(tensor > 0, plain, 0))
    for plain, masked in zip(gradients[0][2:], gradients[1][2:], strict=True):
        np.testing.assert_array_equal(plain, masked)


@pytest.mark.parametrize("size", [2, 3])
def test_transposed_convolution(size):
    x, kernel, bias = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(size, size, 2, 5)), rng.normal(size=2)
    expected = conv2d_transpose(x, kernel, bias)
    arguments = [tf.constant(v, tf.float32) for v in (x, kernel, bias)]
    np.testing.assert_allclose(
        reference.conv2d_transpose_bias_relu(*arguments, activation="linear"), expected, atol=1e-5
    )
    np.testing.assert_allclose(reference.conv2d_transpose_bias_relu(*arguments), np.maximum(expected, 0), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("jit", [False, True])
def test_half_precision_with_unknown_sizes(dtype, jit):
    """Shapes known only at run time, in the dtypes of mixed precision, differentiated."""
    x, skip = tf.ones((1, 6, 6, 2), dtype), tf.ones((1, 8, 9, 1), dtype)
    kernel, up, bias = tf.ones((3, 3, 3, 4), dtype), tf.ones((2, 2, 4, 4), dtype), tf.zeros(4, dtype)
    unknown = tf.TensorSpec([None, None, None, None], dtype)

    @tf.function(jit_compile=jit, input_signature=[unknown, unknown])
    def run(x, skip):
        with tf.GradientTape() as tape:
            tape.watch([x, skip])
            y, pooled = reference.conv2d_bias_relu(x, kernel, bias, skip, pool=True)
            z = reference.conv2d_transpose_bias_relu(pooled, up, bias)
        return y, z, tape.gradient(z, [x, skip])

    y, z, (dx, dskip) = run(x, skip)
    assert y.dtype == z.dtype == dx.dtype == dskip.dtype == tf.as_dtype(dtype)
    assert y.shape == z.shape == (1, 4, 4, 4)
    np.testing.assert_array_equal(tf.cast(y, tf.float32), 27.0)
    np.testing.assert_array_equal(
        tf.cast(dskip, tf.float32)[0, :, :, 0].numpy() != 0, np.pad(dx[0, :, :, 0] != 0, ((1, 1), (1, 2)))
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"squared": False},
        {"dice_weight": 0.25, "ce_weight": 3.0},
        {"ce_weight": 0.0, "smooth": 1.0},
        {"class_weights": [0.5, 2.0, 0.0]},
        {"ignore_class": 255},
        {"ignore_class": -1, "label_smoothing": 0.2, "class_weights": [1.0, 3.0, 2.0]},
        {"ignore_class": 1, "squared": False},
        {"include_background": False},
        {"include_background": False, "ignore_class": 2},
    ],
    ids=str,
)
def test_dice_cross_entropy(options):
    labels = rng.integers(0, 3, (3, 5, 4))
    ignored = options.get("ignore_class")
    if ignored is not None:
        labels[0, :3] = labels[2] = ignored  # one sample in part, one altogether
    logits = rng.normal(size=(3, 5, 4, 3), scale=2)
    for dtype in (np.int64, np.int8 if ignored == -1 else np.uint8):
        loss = reference.dice_cross_entropy(tf.constant(labels, dtype), tf.constant(logits, tf.float32), **options)
        assert loss.dtype == tf.float32
        np.testing.assert_allclose(loss, dice_cross_entropy(labels, logits, **options), rtol=2e-6, atol=1e-6)


def test_dice_cross_entropy_of_any_rank():
    labels, logits = rng.integers(0, 2, (2, 12)), rng.normal(size=(2, 12, 2)).astype(np.float32)
    flat = reference.dice_cross_entropy(labels, tf.constant(logits))
    volume = reference.dice_cross_entropy(labels.reshape(2, 2, 3, 2), tf.constant(logits.reshape(2, 2, 3, 2, 2)))
    np.testing.assert_allclose(flat, volume, rtol=1e-6)


def test_dice_cross_entropy_gradient():
    labels, logits = rng.integers(0, 3, (2, 6)), rng.normal(size=(2, 6, 3))
    labels[1, :2] = 7
    options = {"ignore_class": 7, "class_weights": [1.0, 0.5, 2.0], "label_smoothing": 0.1}
    with tf.GradientTape() as tape:
        z = tf.constant(logits, tf.float32)
        tape.watch(z)
        loss = reference.dice_cross_entropy(labels, z, **options)
    gradient = tape.gradient(loss, z)
    numeric = np.empty_like(logits)
    for index in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-5
        ends = [dice_cross_entropy(labels, logits + sign * step, **options).sum() for sign in (1, -1)]
        numeric[index] = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(gradient, numeric, atol=2e-5)
    np.testing.assert_array_equal(gradient[1, :2], 0)


@pytest.mark.parametrize("sign", [1, -1], ids=["right", "wrong"])
def test_extreme_half_precision_logits_stay_finite(sign):
    labels = tf.constant([[0, 1, 0, 1]])
    logits = tf.cast(sign * 6e4 * (2.0 * tf.one_hot(labels, 2) - 1.0), tf.float16)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = reference.dice_cross_entropy(labels, logits)
    gradient = tape.gradient(loss, logits)
    assert np.all(np.isfinite(gradient))
    expected = 0.0 if sign > 0 else 2 * 6e4 + 1
    np.testing.assert_allclose(loss, [expected], rtol=1e-3, atol=1e-6)


def test_label_out_of_range():
    labels, logits = tf.constant([[0, 1], [0, 2]]), tf.zeros((2, 2, 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels must lie in \[0, 2\)"):
        reference.dice_cross_entropy(labels, logits)
    compiled = tf.function(reference.dice_cross_entropy, jit_compile=True)(labels, logits)
    np.testing.assert_array_equal(np.isnan(compiled), [False, True])
    assert np.all(np.isfinite(reference.dice_cross_entropy(labels, logits, ignore_class=2)))


def test_no_class_left_for_dice():
    labels, logits = tf.zeros((1, 4), tf.int32), tf.zeros((1, 4, 2))
    with pytest.raises(UserError, match="expected a class to count"):
        reference.dice_cross_entropy(labels, logits, include_background=False, ignore_class=1)


def test_unknown_activation():
    with pytest.raises(UserError, match="got 'gelu'"):
        reference.conv2d_bias_relu(tf.ones((1, 3, 3, 1)), tf.ones((3, 3, 1, 1)), tf.zeros(1), activation="gelu")
