"""What the gradients of the convolutions' ops leave out, as the graph they build shows it.

A mask that is on already, what nobody asks for, and zeros around a gradient.
"""

import functools

import numpy as np
import pytest
import tensorflow as tf
from numerics import normal

from unet_fast import ops


def _gradient_ops(function, *inputs):
    """The gradient ops in a function's graph, in the order of the forward pass."""
    graph = tf.function(function).get_concrete_function(*inputs).graph
    return [op for op in reversed(graph.get_operations()) if op.type.endswith("BiasReluGrad")]


def test_a_gradient_that_its_consumers_have_masked_is_not_masked_again():
    x, k1, k2, k3 = normal(1, 1, 12, 12, 8), normal(2, 3, 3, 8, 8), normal(3, 3, 3, 8, 8), normal(4, 2, 2, 8, 8)
    inputs = [tf.constant(array) for array in (x, k1, k2, k3)]
    zeros = tf.zeros(8)

    def gradients(x, k1, k2, k3, masks=True, elsewhere=False):
        with tf.GradientTape() as tape:
            tape.watch((x, k1, k2, k3))
            a = ops.conv2d_bias_relu(x, k1, zeros)
            b = ops.conv2d_bias_relu(a, k2, zeros, input_is_relu=masks)
            c = ops.conv2d_transpose_bias_relu(b, k3, zeros)
            total = tf.reduce_sum(c * c) + (tf.reduce_sum(a) if elsewhere else 0.0)
        return tape.gradient(total, (x, k1, k2, k3))

    # Of a, b and c: a's consumer masks where it is told to, b's by itself, c's is no convolution.
    for options, expected in [({}, [True, True, False]), ({"masks": False}, [False, True, False]),
                              ({"elsewhere": True}, [False, True, False])]:  # fmt: skip
        run = functools.partial(gradients, **options)
        assert [op.get_attr("dy_is_masked") for op in _gradient_ops(run, *inputs)] == expected
        for value, eager in zip(tf.function(run)(*inputs), run(*inputs), strict=True):
            np.testing.assert_allclose(value, eager, rtol=1e-5, atol=1e-5 * np.abs(eager).max())


def test_the_mask_of_a_skip_s_gradient_is_known_to_be_on():
    x, down, up = normal(1, 1, 12, 12, 8), normal(2, 3, 3, 8, 8), normal(3, 3, 3, 16, 8)
    inputs = [tf.constant(array) for array in (x, down, up)]

    def gradients(x, down, up, between=tf.stop_gradient):
        with tf.GradientTape() as tape:
            tape.watch((x, down, up))
            skip = ops.conv2d_bias_relu(x, down, tf.zeros(8))
            deep, pooled = ops.conv2d_bias_relu(skip, down, tf.zeros(8), pool=True, input_is_relu=True)
            y, pooled_too = ops.conv2d_bias_relu(deep, up, tf.zeros(8), between(skip), pool=True, input_is_relu=True)
            total = tf.reduce_sum(y) + tf.reduce_sum(pooled) + tf.reduce_sum(pooled_too)
        return tape.gradient(total, (x, down, up))

    def masked(between):
        first, *_ = _gradient_ops(functools.partial(gradients, between=between), *inputs)
        return first.get_attr("dy_is_masked")

    assert masked(lambda skip: skip)
    assert masked(tf.stop_gradient)
    assert not masked(tf.identity)  # another tensor's mask; that it has the same zeros, the graph does not say
    assert not masked(lambda skip: skip + 0.0)


def test_a_kernel_that_a_convolution_has_computed_gets_its_gradient():
    x, seed, kernel = (tf.constant(normal(i, *s)) for i, s in enumerate([(1, 8, 8, 4), (3, 5, 6, 4), (3, 3, 4, 5)]))

    @tf.function
    def gradients(seed):
        with tf.GradientTape() as tape:
            tape.watch(seed)
            computed = ops.conv2d_bias_relu(seed, kernel, tf.zeros(5))  # [3, 3, 4, 5]
            y = ops.conv2d_bias_relu(x, computed, tf.zeros(5))
        return tape.gradient(y, seed)

    with tf.GradientTape() as tape:
        tape.watch(seed)
        expected = tf.nn.relu(tf.nn.conv2d(x, tf.nn.relu(tf.nn.conv2d(seed, kernel, 1, "VALID")), 1, "VALID"))
    expected = tape.gradient(expected, seed)
    np.testing.assert_allclose(gradients(seed), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def _convolve(x, kernel, skip=None, pool=False):
    return ops.conv2d_bias_relu(x, kernel, tf.zeros(kernel.shape[-1]), skip, pool=pool)


def test_what_nobody_asks_for_is_not_computed():
    x, skip, kernel, up = (
        tf.constant(normal(i, *s)) for i, s in enumerate([(1, 8, 8, 4), (1, 8, 8, 4), (3, 3, 8, 5), (3, 3, 5, 4)])
    )

    def asked(function, *watched):
        def run(*inputs):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([inputs[i] for i in watched])
                y = function(*inputs)
            return tape.gradient(y, [inputs[i] for i in watched])

        return run

    def counts(*watched):
        (op,) = _gradient_ops(asked(lambda x, skip, k: _convolve(x, k, skip), *watched), x, skip, kernel)
        return op.get_attr("num_dx"), op.get_attr("num_dskip")

    assert [counts(0, 2), counts(1, 2), counts(2), counts(0, 1, 2)] == [(1, 0), (0, 1), (0, 0), (1, 1)]
    for watched, expected in (((0,), 1), ((1,), 0)):
        (op,) = _gradient_ops(asked(lambda x, k: ops.conv2d_transpose_bias_relu(x, k, tf.zeros(5)), *watched), x, up)
        assert op.get_attr("num_dx") == expected
    graph = tf.function(_convolve).get_concrete_function(x, tf.zeros((3, 3, 4, 5))).graph
    (forward,) = (op for op in graph.get_operations() if op.type.endswith("BiasRelu"))
    assert forward.get_attr("num_pooled") == 0


@pytest.mark.parametrize("margin", [0, 1, 2])
def test_zeros_surround_the_gradient_of_a_skip_that_was_cropped(margin):
    x, kernel = tf.constant(normal(1, 2, 6, 7, 3)), tf.constant(normal(2, 3, 3, 7, 8))
    skip = tf.constant(normal(3, 2, 6 + margin, 7 + margin, 4))

    def gradient(skip):
        with tf.GradientTape() as tape:
            tape.watch(skip)
            y = _convolve(x, kernel, skip)
        return tape.gradient(y, skip)

    before, after = margin // 2, margin - margin // 2
    found = gradient(skip).numpy()
    centre = found[:, before : 6 + before, before : 7 + before]
    assert found.shape == skip.shape and np.abs(centre).min() > 0
    assert np.count_nonzero(found) == np.count_nonzero(centre)
    graph = tf.function(gradient).get_concrete_function(skip).graph
    assert [op.type for op in graph.get_operations()].count("Pad") == (after > 0)


def _two_levels(image, *kernels):
    """Gradients of a U-Net of depth 1 with respect to its kernels."""
    zeros = tf.zeros(8)
    with tf.GradientTape() as tape:
        tape.watch(kernels)
        skip, x = ops.conv2d_bias_relu(image, kernels[0], zeros, pool=True)
        x = ops.conv2d_bias_relu(x, kernels[1], zeros, input_is_relu=True)
        x = ops.conv2d_transpose_bias_relu(x, kernels[2], zeros)
        y = ops.conv2d_bias_relu(x, kernels[3], zeros, skip, input_is_relu=True)
        loss = tf.reduce_sum(y**2)
    return tape.gradient(loss, kernels)


@pytest.mark.parametrize("side", [18, 19])
def test_a_skip_passes_no_zeros_back(side):
    shapes = [(2, side, side, 3), (3, 3, 3, 8), (3, 3, 8, 8), (3, 3, 8, 8), (3, 3, 16, 8)]
    arrays = [tf.constant(normal(seed, *shape, scale=0.2)) for seed, shape in enumerate(shapes)]
    pooled, low, _, expanding = _gradient_ops(_two_levels, *arrays)
    assert pooled.inputs[0].op.type == "UnetFastConv2DBiasReluGrad"
    # The gradient of a convolution that pools masks whatever comes back: its consumers need not.
    assert [op.get_attr("mask_dx") for op in (low, expanding)] == [False, True] and not expanding.get_attr("mask_dskip")
    assert pooled.inputs[0].shape == (2, 12, 12, 8) and pooled.inputs[2].shape == (2, side - 2, side - 2, 8)
    compiled = tf.function(_two_levels, jit_compile=True)
    hlo = compiled.experimental_get_compiler_ir(*arrays)(stage="optimized_hlo")
    assert hlo.count("unet_fast_conv2d_bias_relu_grad") >= 3 and " pad(" not in hlo
    eager = _two_levels(*arrays)
    for run in (tf.function(_two_levels), compiled):
        for value, expected in zip(run(*arrays), eager, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("paddings", "value", "size"),
    [
        ([[0, 0], [2, 2], [3, 3], [0, 0]], 0.0, (12, 10)),
        ([[0, 0], [2, 3], [0, 0], [0, 0]], 0.0, (11, 16)),
        ([[0, 0], [3, 2], [1, 1], [0, 0]], 0.0, None),  # beside the centre
        ([[1, 0], [2, 2], [1, 1], [0, 0]], 0.0, None),
        ([[0, 0], [2, 2], [1, 1], [0, 1]], 0.0, None),
        ([[0, 0], [2, 2], [1, 1], [0, 0]], 1.0, None),  # no zeros
    ],
)
def test_of_all_paddings_only_zeros_around_the_centre_are_left_out(paddings, value, size):
    image, kernel = tf.constant(normal(1, 2, 18, 18, 3)), tf.constant(normal(2, 3, 3, 3, 8))
    shape = [whole - sum(padding) for whole, padding in zip((2, 16, 16, 8), paddings, strict=True)]
    part = tf.constant(normal(3, *shape))

    def run(image, kernel, dy):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            y = ops.conv2d_bias_relu(image, kernel, tf.zeros(8))
        return tape.gradient(y, kernel, tf.pad(dy, paddings, constant_values=value))

    (gradient,) = _gradient_ops(run, image, kernel, part)
    assert gradient.inputs[0].shape[1:3] == (size or (16, 16))
    graph, eager = tf.function(run)(image, kernel, part), run(image, kernel, part)
    np.testing.assert_array_equal(graph, eager)


@pytest.mark.parametrize(("around", "cut"), [(0.0, True), (-1.0, False), (None, False)])
def test_a_value_around_a_gradient_that_is_not_known_to_be_zero_stays(around, cut):
    x, kernel = tf.constant(normal(1, 1, 8, 8, 3)), tf.constant(normal(2, 3, 3, 3, 4))
    dy = tf.constant(normal(3, 1, 4, 4, 4))

    def gradient(dy, unknown, whole=None):
        value = unknown if around is None else tf.constant(around)
        if whole is None:
            whole = tf.raw_ops.PadV2(input=dy, paddings=[[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=value)
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            y = ops.conv2d_bias_relu(x, kernel, tf.zeros(4))
        return tape.gradient(y, (x, kernel), output_gradients=whole)

    unknown = tf.constant(2.0)
    (op,) = _gradient_ops(gradient, dy, unknown)
    assert op.inputs[0].shape.as_list() == ([1, 4, 4, 4] if cut else [1, 6, 6, 4])
    whole = tf.pad(dy, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=2.0 if around is None else around)
    for value, expected in zip(tf.function(gradient)(dy, unknown), gradient(dy, unknown, whole), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
