"""cast: many float32 tensors to a 16-bit type, and where a network's weights go through it."""

import numpy as np
import pytest
import tensorflow as tf
from numerics import normal

from unet_fast import FusedUNet, ops, reference
from unet_fast.errors import UserError
from unet_fast.layers import weights_cast_together

SHAPES = [(), (1,), (3, 3, 7, 5), (0, 4), (1000,)]


def tensors():
    made = [tf.constant(normal(seed, *shape, scale=1e3)) for seed, shape in enumerate(SHAPES)]
    return [*made, tf.constant([np.inf, -np.inf, np.nan, 1e6, 1e-8, -0.0], tf.float32)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("jit", [None, True], ids=["eager", "XLA"])
def test_equal_to_stock_casts_forward_and_backward(dtype, jit):
    def run(cast, inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = cast(inputs, dtype)
            total = tf.add_n([tf.reduce_sum(tf.cast(y, tf.float32) * 3.0) for y in outputs[:5]])
        return outputs, tape.gradient(total, inputs[:5])

    inputs = tensors()
    fused = (
        tf.function(lambda *x: run(ops.cast, list(x)), jit_compile=True) if jit else lambda *x: run(ops.cast, list(x))
    )
    for got, expected in zip(fused(*inputs), run(reference.cast, inputs), strict=True):
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(tf.cast(a, tf.float32), tf.cast(b, tf.float32))


def test_no_tensors_are_none():
    assert ops.cast([], "float16") == []


@pytest.mark.parametrize(("x", "dtype"), [(tf.zeros(2, tf.float64), "float16"), (tf.zeros(2), "float32")])
def test_what_it_does_not_cast_is_named(x, dtype):
    with pytest.raises(UserError, match=f"cast: expected float32 tensors and .* got {x.dtype.name} and {dtype}"):
        ops.cast([x], dtype)


def _casts(model, image):
    graph = tf.function(lambda x: model(x)).get_concrete_function(image).graph
    return [op for op in graph.get_operations() if op.type == "UnetFastCast"]


def test_a_networks_weights_are_cast_in_one_op_and_to_the_same_result():
    model = FusedUNet((44, 44, 1), filters=2, depth=1, backend="fused", dtype="mixed_float16")
    image = tf.constant(normal(1, 1, 44, 44, 1))
    (cast,) = _casts(model, image)
    assert len(cast.inputs) == len(model.trainable_variables)
    layer = model.get_layer("down1_conv1")
    with weights_cast_together([layer]):
        together = layer(image)
    np.testing.assert_array_equal(together, layer(image))


def test_float32_and_stock_networks_cast_nothing():
    image = tf.zeros((1, 44, 44, 1))
    assert not _casts(FusedUNet((44, 44, 1), filters=2, depth=1, backend="fused"), image)
    assert not _casts(FusedUNet((44, 44, 1), filters=2, depth=1, backend="stock", dtype="mixed_float16"), image)
