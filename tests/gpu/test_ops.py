"""The ops on a GPU, eagerly, in graphs and under XLA, against their reference in float64."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from numerics import check, integers, normal, outputs_and_gradients
from on_gpu import GPUS, NEEDS_GPU

from unet_fast import ops, reference
from unet_fast.errors import UserError
from unet_fast.layers import use_fused

pytestmark = NEEDS_GPU
half = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@pytest.fixture(autouse=True)
def _on_the_gpu():
    # The stock ops are the measure of what is good enough: without TF32 they are the better ones.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with tf.device("/GPU:0"):
        yield


def conv_inputs(batch, height, width, channels, filters, k=3, skip=None, make=normal):
    skip_channels = skip[2] if skip else 0
    arrays = [
        make(1, batch, height, width, channels),
        make(2, k, k, channels + skip_channels, filters) / (k * np.sqrt(channels + skip_channels)).astype("float32"),
        make(3, filters),
    ]
    return arrays + ([make(4, batch, *skip)] if skip else [])


def pair(name, **options):
    return (functools.partial(getattr(module, name), **options) for module in (ops, reference))


CHANNELS = [1, 2, 3, 7, 8, 33, 64]


@half
@pytest.mark.parametrize(
    ("channels", "filters"), [(c, CHANNELS[(i + turn) % 7]) for turn in (0, 2) for i, c in enumerate(CHANNELS)]
)
def test_conv2d_channels(channels, filters, dtype):
    padding = "same" if (channels + filters) % 2 else "valid"
    inputs = conv_inputs(2, 9, 8, channels, filters)
    check(*pair("conv2d_bias_relu", padding=padding, activation=None), inputs, dtype)


@half
@pytest.mark.parametrize(("height", "width"), [(3, 3), (4, 7), (33, 34), (130, 131)])
@pytest.mark.parametrize(("k", "padding"), [(3, "valid"), (3, "same"), (1, "valid")])
def test_conv2d_sizes(height, width, k, padding, dtype):
    check(*pair("conv2d_bias_relu", padding=padding), conv_inputs(3, height, width, 16, 24, k), dtype)


@half
@pytest.mark.parametrize("margin", [(0, 0), (1, 2), (4, 3), (9, 8)])
@pytest.mark.parametrize(("channels", "skip_channels"), [(16, 16), (10, 6)])
def test_conv2d_skip(margin, channels, skip_channels, dtype):
    skip = (18 + margin[0], 17 + margin[1], skip_channels)
    check(*pair("conv2d_bias_relu"), conv_inputs(2, 18, 17, channels, 16, skip=skip), dtype)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("skip", [None, (10, 12, 8)])
def test_conv2d_with_pool_exactly(skip, channels, padding):
    """Small integers are exact in float16: equal to the bit, zeros under the ReLU and ties under the pool included."""
    arrays = conv_inputs(2, 8, 10, channels, 8, 3, skip, make=functools.partial(integers, low=-1, high=2))
    arrays[1] = integers(2, *arrays[1].shape, low=-1, high=2)
    op, stock = pair("conv2d_bias_relu", padding=padding, pool=True)
    got = outputs_and_gradients(op, [tf.cast(array, "float16") for array in arrays])
    exact = outputs_and_gradients(stock, [tf.constant(array) for array in arrays])
    for value, expected in zip(got, exact, strict=True):
        np.testing.assert_array_equal(tf.cast(value, tf.float32), expected)


def test_one_row_has_nothing_to_pool():
    x, kernel, bias = conv_inputs(2, 1, 70, 64, 128)
    x, kernel, bias = (tf.cast(v, tf.float16) for v in (x, kernel, bias))
    run = tf.function(functools.partial(ops.conv2d_bias_relu, padding="same"), jit_compile=True)
    y, pooled = run(x, kernel, bias, pool=True)
    assert pooled.shape == (2, 0, 35, 128)
    np.testing.assert_array_equal(y, run(x, kernel, bias))


@half
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("channels", "filters"), [(1, 1), (3, 7), (8, 33), (64, 64), (33, 2), (128, 64)])
def test_conv2d_transpose(channels, filters, k, dtype):
    kernel = normal(2, k, k, filters, channels) / np.sqrt(2.25 * channels).astype("float32")
    for size in ((1, 1, 1), (2, 16, 17)):
        check(*pair("conv2d_transpose_bias_relu"), [normal(1, *size, channels), kernel, normal(3, filters)], dtype)


@half
@pytest.mark.parametrize("jit", [None, True])
@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (3, 7, 8, 3), (2, 8, 9, 33), (0, 4, 4, 2), (1, 64, 64, 8)])
def test_max_pool2d_with_ties(shape, jit, dtype):
    x = integers(0, *shape)
    got = outputs_and_gradients(ops.max_pool2d, [tf.cast(x, dtype)], jit=jit)
    with tf.device("/CPU:0"):  # cuDNN gives ties to another pixel
        expected = outputs_and_gradients(reference.max_pool2d, [tf.constant(x)])
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(tf.cast(a, tf.float32), b)


@half
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"squared": False},
        {"ignore_class": 1},
        {"include_background": False},
        {"label_smoothing": 0.1},
        {"class_weights": [1.0, 2.0, 0.5]},
        {"ce_weight": 0.3, "smooth": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3, 17, 19), (1, 388, 388)])
def test_dice_cross_entropy_options(shape, options, dtype):
    labels = np.random.default_rng(0).integers(0, 3, shape).astype("int32")
    op, stock = (functools.partial(m.dice_cross_entropy, labels, **options) for m in (ops, reference))
    check(op, stock, [normal(1, *shape, 3, scale=3)], dtype)


@half
@pytest.mark.parametrize("classes", [2, 7, 33])
@pytest.mark.parametrize("label_dtype", ["uint8", "int32", "int64"])
def test_dice_cross_entropy_classes(classes, label_dtype, dtype):
    labels = np.random.default_rng(0).integers(0, classes, (2, 40, 41)).astype(label_dtype)
    op, stock = (functools.partial(m.dice_cross_entropy, labels) for m in (ops, reference))
    check(op, stock, [normal(1, 2, 40, 41, classes)], dtype)


@pytest.mark.parametrize("value", [0, 1], ids=["all background", "all foreground"])
def test_dice_cross_entropy_of_one_class_at_2048(value):
    labels = np.full((1, 2048, 2048), value, "uint8")
    op, stock = (functools.partial(m.dice_cross_entropy, labels) for m in (ops, reference))
    check(op, stock, [normal(0, 1, 2048, 2048, 2)], "float16")


def test_dice_cross_entropy_at_the_limits_of_float16():
    labels = np.random.default_rng(1).integers(0, 2, (2, 64, 64)).astype("int32")
    logits = np.where(np.random.default_rng(0).random((2, 64, 64, 2)) < 0.5, -6e4, 6e4).astype("float32")
    op, stock = (functools.partial(m.dice_cross_entropy, labels) for m in (ops, reference))
    check(op, stock, [logits], "float16")


@pytest.mark.parametrize("jit", [False, True])
def test_a_label_out_of_range_makes_the_loss_of_its_sample_nan(jit):
    labels = np.zeros((3, 8, 8), "int32")
    labels[1, 2, 3] = 5
    run = tf.function(lambda logits: ops.dice_cross_entropy(labels, logits), jit_compile=jit)
    assert np.isnan(run(tf.zeros((3, 8, 8, 2), tf.float16))).tolist() == [False, True, False]


@half
def test_results_lie_on_the_gpu(dtype):
    y, pooled, dx, dkernel, dbias = outputs_and_gradients(
        functools.partial(ops.conv2d_bias_relu, pool=True),
        [tf.cast(array, dtype) for array in conv_inputs(1, 10, 10, 8, 8)],
    )
    for tensor in (y, pooled, dx, dkernel, dbias):
        assert "GPU" in tensor.device


@half
def test_empty_batch(dtype):
    arrays = [tf.cast(array, dtype) for array in conv_inputs(0, 8, 8, 8, 8, skip=(12, 12, 8))]
    y, pooled, _, dkernel, dbias, _ = outputs_and_gradients(functools.partial(ops.conv2d_bias_relu, pool=True), arrays)
    assert y.shape == (0, 6, 6, 8) and pooled.shape == (0, 3, 3, 8)
    assert not np.any(dkernel) and not np.any(dbias)


def _block(x, skip, kernel, bias, kernel2, bias2, labels):
    """Enough ops in a row that XLA records them into a CUDA graph."""
    y, pooled = ops.conv2d_bias_relu(x, kernel, bias, skip, pool=True, input_is_relu=True)
    up = ops.conv2d_transpose_bias_relu(pooled, kernel2, bias2)
    loss = ops.dice_cross_entropy(labels, up)
    return loss, tf.reduce_sum(tf.cast(ops.max_pool2d(y), tf.float32), (1, 2, 3)) * 1e-3


def test_xla_replayed_with_new_inputs_gives_what_eager_gives():
    def gradients(x, *rest):
        with tf.GradientTape() as tape:
            tape.watch((x, *rest[:-1]))
            outputs = _block(x, *rest)
            total = tf.reduce_sum(outputs[0]) + tf.reduce_sum(outputs[1])
        return outputs, tape.gradient(total, (x, *rest[:-1]))

    compiled = tf.function(gradients, jit_compile=True)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        shapes = [(2, 34, 34, 16), (2, 40, 40, 16), (3, 3, 32, 24), (24,), (3, 3, 8, 24), (8,)]
        inputs = [tf.constant(0.3 * rng.normal(size=shape), tf.float16) for shape in shapes]
        inputs.append(tf.constant(rng.integers(0, 8, (2, 32, 32)), tf.int32))
        for a, b in zip(tf.nest.flatten(compiled(*inputs)), tf.nest.flatten(gradients(*inputs)), strict=True):
            a, b = (np.asarray(tf.cast(v, tf.float32)) for v in (a, b))
            assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b)


@half
@pytest.mark.parametrize("side", [34, 35])
def test_a_skip_whose_gradient_is_of_the_crop_alone_gives_what_a_padded_one_gives(side, dtype):
    shapes = [(2, side, side, 16), (3, 3, 16, 64), (3, 3, 64, 64), (3, 3, 32, 64), (3, 3, 96, 64)]
    image, *kernels = (tf.cast(normal(seed, *shape, scale=0.2), dtype) for seed, shape in enumerate(shapes))
    dy = tf.cast(normal(9, 2, 26, 26, 64), dtype)
    zeros = {n: tf.zeros(n, dtype) for n in (32, 64)}

    def gradients(image, *kernels):
        with tf.GradientTape() as tape:
            tape.watch(kernels)
            skip, x = ops.conv2d_bias_relu(image, kernels[0], zeros[64], pool=True)
            x = ops.conv2d_bias_relu(x, kernels[1], zeros[64], input_is_relu=True)
            x = ops.conv2d_transpose_bias_relu(x, kernels[2], zeros[32])
            y = ops.conv2d_bias_relu(x, kernels[3], zeros[64], skip, input_is_relu=True)
        return tape.gradient(y, kernels, dy)

    eager = gradients(image, *kernels)
    for jit in (False, True):
        for value, expected in zip(tf.function(gradients, jit_compile=jit)(image, *kernels), eager, strict=True):
            np.testing.assert_array_equal(tf.cast(value, tf.float32), tf.cast(expected, tf.float32))


@half
def test_a_hundred_repeats_are_equal_to_the_bit(dtype):
    arrays = [tf.cast(array, dtype) for array in conv_inputs(2, 66, 67, 64, 64, skip=(70, 71, 64))]
    op = functools.partial(ops.conv2d_bias_relu, pool=True)
    first = outputs_and_gradients(op, arrays)
    for _ in range(100):
        for a, b in zip(first, outputs_and_gradients(op, arrays), strict=True):
            assert bool(tf.reduce_all(tf.equal(a, b)))


@pytest.mark.skipif(len(GPUS) < 2, reason="one GPU")
def test_second_gpu():
    with tf.device("/GPU:1"):
        check(*pair("conv2d_bias_relu"), conv_inputs(2, 20, 21, 16, 16), "float16")


def test_float32_is_served_by_stock_and_refused_by_name_where_forced():
    assert not use_fused("auto", "float32") and use_fused("auto", "float16")
    with pytest.raises(UserError, match="on a GPU they take float16 and bfloat16, not float32"):
        use_fused("fused", "float32")
    run = tf.function(lambda x, k, b: ops.conv2d_bias_relu(x, k, b), jit_compile=True)
    with pytest.raises(tf.errors.OpError, match="the GPU kernels take float16"):
        run(tf.zeros((1, 8, 8, 8)), tf.zeros((3, 3, 8, 8)), tf.zeros(8))
