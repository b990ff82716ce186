"""conv2d_bias_relu, forward and gradient, against stock TensorFlow in float64."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from numerics import check, integers, normal, outputs_and_gradients

from unet_fast import _library, ops, reference
from unet_fast.errors import UserError


def inputs(batch, height, width, channels, filters, k=3, skip=None, make=normal):
    """x, kernel, bias and, where `skip` is (height, width, channels), skip."""
    skip_channels = skip[2] if skip else 0
    arrays = [
        make(1, batch, height, width, channels),
        make(2, k, k, channels + skip_channels, filters) / (k * np.sqrt(channels + skip_channels)).astype("float32"),
        make(3, filters),
    ]
    return arrays + ([make(4, batch, *skip)] if skip else [])


def pair(**options):
    return (functools.partial(module.conv2d_bias_relu, **options) for module in (ops, reference))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 33, 64])
@pytest.mark.parametrize("filters", [1, 2, 3, 7, 8, 33, 64])
def test_channels(channels, filters, dtype):
    padding = "same" if (channels + filters) % 2 else "valid"
    check(*pair(padding=padding, activation=None), inputs(2, 9, 8, channels, filters), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("height", "width"), [(3, 3), (4, 7), (9, 16), (33, 34)])
@pytest.mark.parametrize(("k", "padding"), [(3, "valid"), (3, "same"), (1, "valid"), (1, "same")])
def test_sizes(height, width, k, padding, dtype):
    check(*pair(padding=padding), inputs(3, height, width, 5, 16, k), dtype)


@pytest.mark.parametrize("size", [1, 2])
def test_same_padding_of_images_smaller_than_the_kernel(size):
    check(*pair(padding="same"), inputs(2, size, size, 3, 8), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("margin", [(0, 0), (1, 2), (4, 3), (9, 8)])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_skip(margin, padding, dtype):
    skip = (8 + margin[0], 7 + margin[1], 6)
    check(*pair(padding=padding), inputs(2, 8, 7, 10, 16, skip=skip), dtype)


@pytest.mark.parametrize("jit", [None, False, True], ids=["eager", "graph", "XLA"])
@pytest.mark.parametrize("margin", [(0, 0), (0, 3), (1, 2), (4, 3), (5, 0)])
@pytest.mark.parametrize("channels", [(3, 4), (16, 160)])
def test_gradients_of_a_skip_are_of_its_size(channels, margin, jit):
    skip = (8 + margin[0], 7 + margin[1], channels[0])
    check(*pair(pool=True), inputs(2, 8, 7, channels[0], channels[1], skip=skip), "float32", jit=jit)


@pytest.mark.parametrize("known", [(None, None), (None, 7), (8, None)], ids=str)
@pytest.mark.parametrize("rank", [None, 4])
def test_a_skip_of_sizes_known_only_when_run(rank, known):
    x, kernel, bias, skip = (tf.constant(array) for array in inputs(2, 8, 7, 4, 6, skip=(11, 7, 3)))
    shapes = [[2, *known, 4], kernel.shape, bias.shape, None if rank is None else [None] * 4]

    def run(x, kernel, bias, skip):
        with tf.GradientTape() as tape:
            tape.watch(skip)
            total = tf.reduce_sum(ops.conv2d_bias_relu(x, kernel, bias, skip) ** 2)
        return tape.gradient(total, skip)

    dynamic = tf.function(run, input_signature=[tf.TensorSpec(shape) for shape in shapes])
    np.testing.assert_array_equal(dynamic(x, kernel, bias, skip), run(x, kernel, bias, skip))


@pytest.mark.parametrize(
    ("k", "padding", "activation", "pool", "skip", "channels"),
    list(itertools.product([1, 3], ["valid", "same"], ["relu", None], [False, True], [None, (10, 12, 4)], [3, 16])),
)
def test_every_combination_exactly(k, padding, activation, pool, skip, channels):
    """With small integers nothing is rounded: equal to the bit, zeros under the ReLU and ties under the pool included."""
    arrays = inputs(2, 8, 9, channels, 8, k, skip, make=integers)
    arrays[1] = integers(2, *arrays[1].shape)
    op, stock = pair(padding=padding, activation=activation, pool=pool)
    tensors = [tf.constant(array) for array in arrays]
    for got, expected in zip(outputs_and_gradients(op, tensors), outputs_and_gradients(stock, tensors), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_channels_at_which_the_cpu_kernels_change():
    for channels, filters in [(7, 24), (8, 48), (16, 16), (64, 128), (128, 128), (130, 136), (160, 160)]:
        for padding in ("valid", "same"):
            check(*pair(padding=padding), inputs(1, 20, 19, channels, filters), "float32")


@pytest.mark.parametrize("size", [62, 64, 65])
def test_rows_around_the_vector_blocks(size):
    check(*pair(padding="same"), inputs(1, 3, size, 16, 16), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("skip", [None, (12, 12, 4)])
def test_empty_batch(dtype, skip):
    arrays = [tf.cast(array, dtype) for array in inputs(0, 8, 8, 3, 5, skip=skip)]
    y, pooled, dx, dkernel, dbias, *_ = outputs_and_gradients(
        functools.partial(ops.conv2d_bias_relu, pool=True), arrays
    )
    assert y.shape == (0, 6, 6, 5) and pooled.shape == (0, 3, 3, 5) and dx.shape == (0, 8, 8, 3)
    assert not np.any(dkernel) and not np.any(dbias)


def test_input_is_relu_masks_the_input_gradients():
    x, kernel, bias, skip = (tf.constant(a) for a in inputs(2, 8, 8, 4, 8, skip=(10, 10, 5)))
    x, skip = tf.nn.relu(x), tf.nn.relu(skip)
    plain = outputs_and_gradients(ops.conv2d_bias_relu, [x, kernel, bias, skip])
    op = functools.partial(ops.conv2d_bias_relu, input_is_relu=True)
    masked = outputs_and_gradients(op, [x, kernel, bias, skip])
    for index, mask in ((1, x > 0), (4, skip > 0)):
        assert np.any((plain[index] != 0) & ~mask)  # there is something to mask
        np.testing.assert_array_equal(masked[index], tf.where(mask, plain[index], 0))
    for index in (0, 2, 3):
        np.testing.assert_array_equal(masked[index], plain[index])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_xla_gives_what_the_graph_gives(dtype):
    op, _ = pair(pool=True, input_is_relu=True)
    arrays = [tf.cast(array, dtype) for array in inputs(2, 14, 15, 8, 16, skip=(18, 18, 8))]
    graph, xla = (outputs_and_gradients(op, arrays, jit=jit) for jit in (False, True))
    for a, b in zip(graph, xla, strict=True):
        # Half-precision gradients of the weighing may be rounded elsewhere by XLA; the ops' own results are equal bits.
        np.testing.assert_allclose(*(tf.cast(v, tf.float32) for v in (a, b)), rtol=1e-6, atol=1e-6)


def test_non_finite_values_propagate():
    x, kernel, bias = inputs(1, 8, 8, 3, 16)
    x[0, 4, 4, 1] = np.nan
    got, expected = (module.conv2d_bias_relu(x, kernel, bias) for module in (ops, reference))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    bias[2] = np.inf
    assert np.isposinf(ops.conv2d_bias_relu(np.zeros_like(x), kernel, bias)[..., 2]).all()
    assert (ops.conv2d_bias_relu(np.zeros_like(x), kernel, np.full_like(bias, -np.inf)) == 0).numpy().all()


def test_large_float16_values_accumulate_in_float32():
    x = tf.fill((1, 8, 8, 64), tf.constant(200.0, tf.float16))
    kernel = tf.concat([tf.fill((3, 3, 32, 8), 2.0), tf.fill((3, 3, 32, 8), -2.0)], axis=2)
    y = ops.conv2d_bias_relu(x, tf.cast(kernel, tf.float16), tf.ones(8, tf.float16))
    np.testing.assert_array_equal(y, np.ones((1, 6, 6, 8)))  # partial sums reach 115200, beyond float16


def test_repeats_are_equal_to_the_bit():
    arrays = [tf.constant(array) for array in inputs(3, 40, 41, 24, 32, skip=(44, 44, 24))]
    first = outputs_and_gradients(ops.conv2d_bias_relu, arrays)
    for _ in range(5):
        for a, b in zip(first, outputs_and_gradients(ops.conv2d_bias_relu, arrays), strict=True):
            np.testing.assert_array_equal(a, b)


def test_unwanted_gradients_are_not_computed():
    x, kernel, bias = (tf.constant(array) for array in inputs(1, 8, 8, 3, 5))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            y = ops.conv2d_bias_relu(x, kernel, bias)
        return tape.gradient(y, kernel)

    nodes = step.get_concrete_function().graph.as_graph_def().node
    (node,) = [node for node in nodes if node.op == "UnetFastConv2DBiasReluGrad"]
    assert node.attr["num_dx"].i == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": np.zeros((5, 5, 3, 4), "f")}, "kernel: expected 3x3 or 1x1"),
        ({"kernel": np.zeros((3, 3, 2, 4), "f")}, "kernel: expected 3 input channels"),
        ({"x": np.zeros((2, 8, 8), "f")}, r"x: expected a shape \[batch"),
        ({"x": np.zeros((1, 2, 8, 3), "f")}, "x: expected at least 3 rows"),
        ({"bias": np.zeros(5, "f")}, "bias: expected shape"),
        ({"skip": np.zeros((1, 6, 9, 1), "f"), "kernel": np.zeros((3, 3, 4, 4), "f")}, "skip: expected x's batch"),
    ],
)
def test_wrong_shapes_name_the_argument(change, message):
    good = {"x": np.zeros((1, 8, 8, 3), "f"), "kernel": np.zeros((3, 3, 3, 4), "f"), "bias": np.zeros(4, "f")}
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=message):
        ops.conv2d_bias_relu(**{**good, **change})


def test_wrong_dtypes_and_choices_are_one_clear_line():
    x, kernel, bias = (tf.constant(array) for array in inputs(1, 8, 8, 3, 5))
    with pytest.raises(UserError, match=r"got x float64.*cast them"):
        ops.conv2d_bias_relu(tf.cast(x, tf.float64), kernel, bias)
    with pytest.raises(UserError, match="kernel float16"):
        ops.conv2d_bias_relu(x, tf.cast(kernel, tf.float16), bias)
    with pytest.raises(UserError, match="expected padding"):
        ops.conv2d_bias_relu(x, kernel, bias, padding="reflect")
    with pytest.raises(UserError, match="expected activation"):
        ops.conv2d_bias_relu(x, kernel, bias, activation="gelu")


@pytest.mark.parametrize(
    ("x", "kernel", "padding", "expected"),
    [
        ((None, None, None, None), (3, 3, None, 7), "valid", ([None, None, None, 7], [None, None, None, 7])),
        ((2, None, 9, 3), (3, 3, 3, None), "valid", ([2, None, 7, None], [2, None, 3, None])),
        ((2, 10, 9, 3), (None, None, 3, 5), "same", ([2, 10, 9, 5], [2, 5, 4, 5])),
        (None, None, "valid", ([None] * 4, [None] * 4)),
        ((1, 2**32, 6, 4), (3, 3, 4, 8), "same", ([1, 2**32, 6, 8], [1, 2**31, 3, 8])),
    ],
)
def test_static_shapes(x, kernel, padding, expected):
    @tf.function
    def build():
        arguments = [tf.raw_ops.Placeholder(dtype=tf.float32, shape=tf.TensorShape(s)) for s in (x, kernel, [None])]
        y, pooled = ops.conv2d_bias_relu(*arguments, padding=padding, pool=True)
        assert (y.shape.as_list(), pooled.shape.as_list()) == expected

    build.get_concrete_function()


def test_shape_mismatch_is_found_while_the_graph_is_built():
    @tf.function
    def build(x, kernel, bias):
        return ops.conv2d_bias_relu(x, kernel, bias)

    with pytest.raises(ValueError, match="Dimensions must be equal"):
        build(tf.zeros((1, 8, 8, 3)), tf.zeros((3, 3, 4, 5)), tf.zeros(5))


def test_second_order_gradient_is_refused_in_one_line():
    x, kernel, bias = (tf.constant(array) for array in inputs(1, 8, 8, 3, 5))
    with tf.GradientTape() as outer:
        outer.watch(kernel)
        with tf.GradientTape() as inner:
            inner.watch(kernel)
            y = ops.conv2d_bias_relu(x, kernel, bias)
        gradient = inner.gradient(y, kernel)
    with pytest.raises(tf.errors.UnimplementedError, match="a gradient of a gradient is not available"):
        outer.gradient(gradient, kernel)


def _gradient_op(dy, x, kernel, bias, skip=None, *, pool=False, **attributes):
    """The gradient op itself: [dx, dskip, dkernel, dbias], without dskip where there is no skip."""
    y = ops.conv2d_bias_relu(x, kernel, bias, skip, pool=pool, **attributes)
    y, pooled = y if pool else (y, None)
    skips = [] if skip is None else [skip]
    results = _library.raw_ops().unet_fast_conv2d_bias_relu_grad(
        dy=dy, dpooled=[pooled] if pool else [], y=y, x=x, skip=skips, kernel=kernel, num_dx=1, num_dskip=len(skips),
        padding=attributes.pop("padding", "valid"), **attributes,
    )  # fmt: skip
    return tf.nest.flatten(results)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "XLA"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("activation", "padding"), [("relu", "valid"), ("linear", "same")])
@pytest.mark.parametrize("size", [(8, 9), (7, 8), (4, 5), (1, 2), (8, 3)], ids=str)
def test_dy_of_the_centre_alone_gives_what_dy_with_zeros_around_it_gives(size, activation, padding, pool, dtype, jit):
    arrays = [tf.cast(array, dtype) for array in inputs(3, 10, 11, 6, 16, skip=(13, 14, 5))]
    dy = tf.cast(normal(5, 3, *size, 16), dtype)
    margins = [whole - part for whole, part in zip((10, 11) if padding == "same" else (8, 9), size, strict=True)]
    whole = tf.pad(dy, [(0, 0), *((m // 2, m - m // 2) for m in margins), (0, 0)])
    run = functools.partial(_gradient_op, activation=activation, padding=padding, pool=pool)
    run = tf.function(run, jit_compile=True) if jit else run
    for value, expected in zip(run(dy, *arrays), run(whole, *arrays), strict=True):
        np.testing.assert_array_equal(tf.cast(value, "float32"), tf.cast(expected, "float32"))


def test_the_gradient_of_a_skip_has_the_size_of_the_crop():
    arrays = [tf.constant(array) for array in inputs(1, 8, 9, 3, 4, skip=(12, 12, 5))]
    assert [result.shape.as_list() for result in _gradient_op(tf.ones((1, 6, 7, 4)), *arrays)[:2]] == [
        [1, 8, 9, 3],
        [1, 8, 9, 5],
    ]

    @tf.function(input_signature=[tf.TensorSpec(shape) for shape in [(None, None, 9, 3), (None, 12, None, 5)]])
    def build(x, skip):
        y, kernel = tf.zeros((1, 6, 7, 4)), tf.zeros((3, 3, 8, 4))
        _, dskip, *_ = _library.raw_ops().unet_fast_conv2d_bias_relu_grad(
            dy=y, dpooled=[], y=y, x=x, skip=[skip], kernel=kernel, num_dskip=1
        )
        assert dskip[0].shape.as_list() == [None, None, 9, 5]

    build.get_concrete_function()


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "XLA"])
@pytest.mark.parametrize("shape", [(1, 7, 6, 4), (1, 6, 7, 4), (2, 6, 6, 4), (1, 6, 6, 5)], ids=str)
def test_dy_that_is_larger_than_y_is_refused_by_name(shape, jit):
    arrays = [tf.constant(array) for array in inputs(1, 8, 8, 3, 4)]
    run = tf.function(_gradient_op, jit_compile=True) if jit else _gradient_op
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"dy: expected y's shape \[1, 6, 6, 4\] or a smaller"):
        run(tf.zeros(shape), *arrays)
