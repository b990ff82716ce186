"""dice_cross_entropy, forward and gradient, against its reference in float64."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from numerics import check, normal, outputs_and_gradients

from unet_fast import _library, ops, reference
from unet_fast.errors import UserError

OPTIONS = [
    {},
    {"squared": False},
    {"ignore_class": 1},
    {"ignore_class": 255},
    {"include_background": False},
    {"label_smoothing": 0.1},
    {"class_weights": [1.0, 2.0, 0.5]},
    {"dice_weight": 0.0},
    {"ce_weight": 0.3, "smooth": 1.0},
]


def labels_of(seed, *shape, classes=3, dtype="int32"):
    return np.random.default_rng(seed).integers(0, classes, shape).astype(dtype)


def compare(labels, logits, dtype="float32", jit=None, **options):
    op, stock = (functools.partial(module.dice_cross_entropy, labels, **options) for module in (ops, reference))
    check(op, stock, [logits], dtype, jit)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, dtype):
    labels = labels_of(0, 3, 17, 19)
    if options.get("ignore_class") == 255:
        labels[:, :5] = 255
    compare(labels, normal(1, 3, 17, 19, 3, scale=3), dtype, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64, 65), (3, 5, 6, 7)])
def test_classes_and_shapes(shape, classes, dtype):
    compare(labels_of(0, *shape, classes=classes), normal(1, *shape, classes), dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "int64"])
def test_label_dtypes(dtype):
    logits = normal(0, 2, 8, 8, 3)
    expected = reference.dice_cross_entropy(labels_of(1, 2, 8, 8), logits)
    np.testing.assert_allclose(ops.dice_cross_entropy(labels_of(1, 2, 8, 8, dtype=dtype), logits), expected, 1e-6)


@pytest.mark.parametrize("value", [0, 1], ids=["all background", "all foreground"])
@pytest.mark.parametrize("options", [{}, {"include_background": False}, {"squared": False}], ids=str)
def test_one_class_only(value, options):
    compare(np.full((2, 32, 32), value, "int32"), normal(0, 2, 32, 32, 2, scale=4), **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_at_the_limits_of_float16(dtype):
    logits = np.where(np.random.default_rng(0).random((2, 16, 16, 2)) < 0.5, -6e4, 6e4).astype("float32")
    compare(labels_of(1, 2, 16, 16, classes=2), logits, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_2048_squared(dtype):
    """Four million pixels a sample: sums beyond what float16 holds and what a float32 sum of ones would keep exact."""
    compare(labels_of(0, 1, 2048, 2048, classes=2, dtype="uint8"), normal(1, 1, 2048, 2048, 2), dtype)


def test_perfect_prediction_has_no_loss_and_no_gradient():
    labels = labels_of(0, 2, 16, 16)
    loss, gradient = outputs_and_gradients(
        functools.partial(ops.dice_cross_entropy, labels), [tf.one_hot(labels, 3) * 200.0]
    )
    np.testing.assert_allclose(loss, [0, 0], atol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros((2, 16, 16, 3)), atol=1e-9)


def test_a_sample_with_every_pixel_ignored_has_no_cross_entropy_and_no_gradient():
    labels = labels_of(0, 2, 8, 8)
    labels[1] = 255
    op, stock = (functools.partial(m.dice_cross_entropy, labels, ignore_class=255) for m in (ops, reference))
    loss, gradient = outputs_and_gradients(op, [tf.constant(normal(1, 2, 8, 8, 3))])
    expected, _ = outputs_and_gradients(stock, [tf.constant(normal(1, 2, 8, 8, 3))])
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)
    assert not np.any(gradient[1]) and np.any(gradient[0])


def test_empty_batch():
    loss, gradient = outputs_and_gradients(
        functools.partial(ops.dice_cross_entropy, np.zeros((0, 4, 4), "int32")), [tf.zeros((0, 4, 4, 2))]
    )
    assert loss.shape == (0,) and gradient.shape == (0, 4, 4, 2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_xla_gives_what_the_graph_gives(dtype):
    op = functools.partial(ops.dice_cross_entropy, labels_of(0, 3, 17, 19), label_smoothing=0.1, ignore_class=2)
    logits = [tf.cast(normal(1, 3, 17, 19, 3), dtype)]
    graph, xla = (outputs_and_gradients(op, logits, jit=jit) for jit in (False, True))
    for a, b in zip(graph, xla, strict=True):
        np.testing.assert_array_equal(*(tf.cast(v, tf.float32) for v in (a, b)))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("label", [-1, 3, 255])
def test_labels_out_of_range_name_the_value_and_the_place(label, jit):
    labels = labels_of(0, 2, 4, 4)
    labels[1, 2, 3] = label
    run = tf.function(lambda logits: ops.dice_cross_entropy(labels, logits), jit_compile=jit)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=rf"expected classes 0 to 2.*got {label} in sample 1 at pixel 11"
    ):
        run(tf.zeros((2, 4, 4, 3)))


def test_wrong_arguments_are_one_clear_line():
    with pytest.raises(UserError, match="expected integer labels"):
        ops.dice_cross_entropy(tf.zeros((1, 4, 4)), tf.zeros((1, 4, 4, 2)))
    with pytest.raises(UserError, match="got logits float64"):
        ops.dice_cross_entropy(labels_of(0, 1, 4, 4), tf.zeros((1, 4, 4, 3), tf.float64))
    with pytest.raises(UserError, match="expected a class to count"):
        ops.dice_cross_entropy(labels_of(0, 1, 4, 4), tf.zeros((1, 4, 4, 2)), include_background=False, ignore_class=1)
    with pytest.raises(UserError, match="label_smoothing"):
        ops.dice_cross_entropy(labels_of(0, 1, 4, 4), tf.zeros((1, 4, 4, 3)), label_smoothing=1.0)
    with pytest.raises(UserError, match=r"label_smoothing in \[0, 1\), got -0.5"):
        ops.dice_cross_entropy(labels_of(0, 1, 4, 4), tf.zeros((1, 4, 4, 3)), label_smoothing=-0.5)


@pytest.mark.parametrize("shape", [None, (None, None, None, None), (None, 4, 4, 3)], ids=str)
def test_unknown_shapes_are_those_of_the_call(shape):
    run = tf.function(ops.dice_cross_entropy, input_signature=[tf.TensorSpec(None, tf.int32), tf.TensorSpec(shape)])
    labels, logits = labels_of(0, 2, 4, 4), normal(1, 2, 4, 4, 3)
    np.testing.assert_allclose(run(labels, logits), ops.dice_cross_entropy(labels, logits), rtol=1e-6)


def test_a_number_of_classes_that_is_known_is_checked_while_the_graph_is_built():
    signature = [tf.TensorSpec((None, 4, 4), tf.int32), tf.TensorSpec((None, 4, 4, 1))]
    run = tf.function(functools.partial(ops.dice_cross_entropy, include_background=False), input_signature=signature)
    with pytest.raises(UserError, match="expected a class to count"):
        run.get_concrete_function()
    with pytest.raises(tf.errors.InvalidArgumentError, match="labels: expected shape"):
        ops.dice_cross_entropy(labels_of(0, 1, 4, 5), tf.zeros((1, 4, 4, 3)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="class_weights: expected shape"):
        ops.dice_cross_entropy(labels_of(0, 1, 4, 4), tf.zeros((1, 4, 4, 3)), class_weights=[1.0, 2.0])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", ["dloss", "sums", "ce"])
def test_a_gradient_of_other_sums_names_the_argument(name, jit):
    """Only who calls the raw op can get that wrong; it is no reason to read what is not there."""
    inputs = {"dloss": tf.ones(2), "sums": tf.ones((2, 3, 3)), "ce": tf.ones((2, 2)), name: tf.ones(1)}
    attributes = {
        "dice_weight": 1.0, "ce_weight": 1.0, "smooth": 1.0, "label_smoothing": 0.0, "has_ignore_class": False,
        "ignore_class": 0, "include_background": True, "squared": False,
    }  # fmt: skip

    def grad():
        return _library.raw_ops().unet_fast_dice_cross_entropy_grad(
            labels=labels_of(0, 2, 4, 4),
            logits=tf.zeros((2, 4, 4, 3)),
            class_weights=tf.ones(3),
            **inputs,
            **attributes,
        )

    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=f"{name}: expected shape"):
        tf.function(grad, jit_compile=jit)()
