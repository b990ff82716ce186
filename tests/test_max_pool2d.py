"""max_pool2d, forward and gradient, against stock TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf
from numerics import integers, outputs_and_gradients

from unet_fast import _library, ops, reference


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("jit", [None, True])
@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (3, 7, 8, 3), (2, 8, 9, 33), (0, 4, 4, 2), (1, 64, 64, 8)])
def test_equal_to_the_bit_with_many_ties(shape, jit, dtype):
    x = [tf.cast(integers(0, *shape), dtype)]
    got, expected = outputs_and_gradients(ops.max_pool2d, x, jit=jit), outputs_and_gradients(reference.max_pool2d, x)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(*(tf.cast(v, tf.float32) for v in (a, b)))


def test_a_single_row_has_no_output():
    y, dx = outputs_and_gradients(ops.max_pool2d, [tf.ones((1, 1, 4, 2))])
    assert y.shape == (1, 0, 2, 2)
    np.testing.assert_array_equal(dx, np.zeros((1, 1, 4, 2)))


def test_wrong_rank_names_the_argument():
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"x: expected a shape \[batch"):
        ops.max_pool2d(tf.zeros((4, 4, 2)))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("x", "dy", "message"),
    [((2, 4, 4), (2, 2, 2), "x: expected a shape"), ((1, 4, 4, 2), (1, 2, 1, 2), "dy: expected shape")],
)
def test_a_gradient_of_another_shape_names_the_argument(x, dy, message, jit):
    grad = tf.function(lambda x, dy: _library.raw_ops().unet_fast_max_pool2d_grad(x=x, dy=dy), jit_compile=jit)
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=message):
        grad(tf.zeros(x), tf.zeros(dy))


def test_static_shapes():
    @tf.function(input_signature=[tf.TensorSpec((None, 9, None, 3))])
    def build(x):
        assert ops.max_pool2d(x).shape.as_list() == [None, 4, None, 3]
        return ops.max_pool2d(x)

    build.get_concrete_function()
