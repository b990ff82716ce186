"""conv2d_transpose_bias_relu, forward and gradient, against stock TensorFlow in float64."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from numerics import check, integers, normal, outputs_and_gradients

from unet_fast import ops, reference


def inputs(batch, height, width, channels, filters, k=3, make=normal):
    kernel = make(2, k, k, filters, channels) / np.sqrt(2.25 * channels).astype("float32")
    return [make(1, batch, height, width, channels), kernel, make(3, filters)]


def pair(**options):
    return (functools.partial(module.conv2d_transpose_bias_relu, **options) for module in (ops, reference))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("channels", "filters"), [(1, 1), (2, 3), (3, 7), (7, 8), (8, 33), (33, 2), (64, 64), (16, 1)])
def test_channels(channels, filters, k, dtype):
    check(*pair(activation=None), inputs(2, 5, 6, channels, filters, k), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (3, 1, 4), (1, 7, 2), (2, 16, 17)])
def test_sizes(batch, height, width, k, dtype):
    check(*pair(), inputs(batch, height, width, 8, 16, k), dtype)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("activation", ["relu", None])
def test_exactly(k, activation):
    arrays = inputs(2, 5, 6, 8, 8, k, make=integers)
    arrays[1] = integers(2, *arrays[1].shape)
    op, stock = pair(activation=activation)
    tensors = [tf.constant(array) for array in arrays]
    for got, expected in zip(outputs_and_gradients(op, tensors), outputs_and_gradients(stock, tensors), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("k", [2, 3])
def test_empty_batch(k):
    y, dx, dkernel, dbias = outputs_and_gradients(
        ops.conv2d_transpose_bias_relu, [tf.constant(array) for array in inputs(0, 4, 4, 3, 5, k)]
    )
    assert y.shape == (0, 8, 8, 5) and dx.shape == (0, 4, 4, 3)
    assert not np.any(dkernel) and not np.any(dbias)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_xla_gives_what_the_graph_gives(dtype):
    arrays = [tf.cast(array, dtype) for array in inputs(2, 7, 9, 8, 16)]
    graph, xla = (outputs_and_gradients(ops.conv2d_transpose_bias_relu, arrays, jit=jit) for jit in (False, True))
    for a, b in zip(graph, xla, strict=True):
        np.testing.assert_allclose(*(tf.cast(v, tf.float32) for v in (a, b)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": np.zeros((4, 4, 5, 3), "f")}, "kernel: expected 3x3 or 2x2"),
        ({"kernel": np.zeros((3, 3, 5, 4), "f")}, "kernel: expected 3 input channels"),
        ({"x": np.zeros((1, 0, 4, 3), "f")}, "x: expected at least 1 row"),
        ({"bias": np.zeros(4, "f")}, "bias: expected shape"),
    ],
)
def test_wrong_shapes_name_the_argument(change, message):
    good = {"x": np.zeros((1, 4, 4, 3), "f"), "kernel": np.zeros((3, 3, 5, 3), "f"), "bias": np.zeros(5, "f")}
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        ops.conv2d_transpose_bias_relu(**{**good, **change})


@pytest.mark.parametrize(
    ("x", "kernel", "expected"),
    [
        ((None, None, 5, 3), (3, 3, 7, 3), [None, None, 10, 7]),
        (None, None, [None] * 4),
        ((2, 4, 5, 3), (2, 2, None, 3), [2, 8, 10, None]),
    ],
)
def test_static_shapes(x, kernel, expected):
    @tf.function
    def build():
        arguments = [tf.raw_ops.Placeholder(dtype=tf.float32, shape=tf.TensorShape(s)) for s in (x, kernel, [None])]
        assert ops.conv2d_transpose_bias_relu(*arguments).shape.as_list() == expected

    build.get_concrete_function()
