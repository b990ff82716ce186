"""Random calls of every op: what stock TensorFlow computes, or one error that names the argument, and never a crash.

Values are small integers, of which every sum here is exact in float32: results must be those of the reference in float32,
rounded once, to the bit. UNET_FAST_FUZZ_EXAMPLES=N runs N random examples a test, others each time; the default ones are few
and always the same.
"""

import functools
import os
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from numerics import check, integers, normal, outputs_and_gradients

from unet_fast import ops, reference

MANY = os.environ.get("UNET_FAST_FUZZ_EXAMPLES")


def fuzz(examples):
    """Settings of a test of so many examples, unless the environment says how many."""
    return settings(
        max_examples=int(MANY or examples),
        derandomize=not MANY,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


DTYPES = st.sampled_from(["float32", "float32", "float16", "bfloat16"])
CHANNELS = st.sampled_from([1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 33])  # around the widths of vectors
SEEDS = st.integers(0, 2**16)
# "partial": in a graph that knows nothing of the shapes, or some of their sizes.
MODES = st.sampled_from(["eager", "eager", "partial"])


class Call(NamedTuple):
    """A call of an op: the arrays are x, kernel, bias and skip, as many as there are."""

    name: str
    arrays: list
    options: dict

    def __repr__(self):
        return f"{self.name}({', '.join(str(array.shape) for array in self.arrays)}, {self.options})"


@st.composite
def conv2d(draw):
    """A valid call of conv2d_bias_relu."""
    k, padding, seed = draw(st.sampled_from([3, 3, 1])), draw(st.sampled_from(["valid", "same"])), draw(SEEDS)
    least = k if padding == "valid" else 1
    batch, height, width = draw(st.integers(0, 3)), least + draw(st.integers(0, 8)), least + draw(st.integers(0, 8))
    channels, filters, skip = draw(CHANNELS), draw(CHANNELS), draw(st.none() | CHANNELS)
    ones = functools.partial(integers, low=-1, high=2)
    kernel = ones(seed + 1, k, k, channels + (skip or 0), filters)
    arrays = [integers(seed, batch, height, width, channels), kernel, integers(seed + 2, filters)]
    if skip is not None:
        rows, columns = height + draw(st.integers(0, 3)), width + draw(st.integers(0, 3))
        arrays.append(ones(seed + 3, batch, rows, columns, skip))
    activation, pool = draw(st.sampled_from(["relu", "relu", "linear", None])), draw(st.booleans())
    options = {"padding": padding, "activation": activation, "pool": pool, "input_is_relu": draw(st.booleans())}
    return Call("conv2d_bias_relu", arrays, options)


@st.composite
def conv2d_transpose(draw):
    k, channels, filters, seed = draw(st.sampled_from([3, 2])), draw(CHANNELS), draw(CHANNELS), draw(SEEDS)
    x = integers(seed, draw(st.integers(0, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7)), channels)
    kernel = integers(seed + 1, k, k, filters, channels, low=-1, high=2)
    options = {"activation": draw(st.sampled_from(["relu", "linear", None]))}
    return Call("conv2d_transpose_bias_relu", [x, kernel, integers(seed + 2, filters)], options)


@st.composite
def max_pool2d(draw):
    sizes = [draw(st.integers(0, high)) for high in (3, 9, 9)]
    return Call("max_pool2d", [integers(draw(SEEDS), *sizes, draw(st.just(0) | CHANNELS))], {})


CALLS = st.one_of(conv2d(), conv2d(), conv2d_transpose(), max_pool2d())


@st.composite
def losses(draw):
    """(labels, logits, options) of a valid call of dice_cross_entropy."""
    classes, seed = draw(st.integers(1, 9)), draw(SEEDS)
    shape = [draw(st.integers(0, 3)), *draw(st.lists(st.integers(1, 9), max_size=3))]
    ignore = draw(st.none() | st.just(255) | (st.integers(0, classes - 1) if classes > 2 else st.none()))
    labels = np.random.default_rng(seed).integers(0, classes, shape)
    if ignore is not None:
        labels[np.random.default_rng(seed + 1).random(shape) < 0.2] = ignore
    options = {
        "dice_weight": draw(st.sampled_from([1.0, 0.0, 0.3])),
        "ce_weight": draw(st.sampled_from([1.0, 0.0, 2.0])),
        "class_weights": draw(st.none() | st.just([1.0 + i % 3 for i in range(classes)])),
        "ignore_class": ignore,
        "include_background": classes < 3 or draw(st.booleans()),
        "smooth": draw(st.sampled_from([1e-6, 1.0])),
        "squared": draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
    }
    if classes == 3 and ignore in (1, 2):
        options["include_background"] = True  # else one class alone is left, which is fine, or none
    dtype = draw(st.sampled_from(["uint8", "int32", "int64", "int16"]))
    return labels.astype(dtype), normal(seed + 2, *shape, classes, scale=3), options


def hidden(draw, shape):
    """A static shape that tells less of `shape`: some sizes, none, or not even the rank."""
    known = draw(st.none() | st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    return None if known is None else [size if tell else None for size, tell in zip(shape, known, strict=True)]


def in_mode(draw, mode, function, tensors):
    """`function` of tensors like these, to be called eagerly, from a graph or compiled by XLA."""
    if mode == "eager":
        return function
    if mode == "partial":
        return tf.function(function, [tf.TensorSpec(hidden(draw, t.shape.as_list()), t.dtype) for t in tensors])
    return tf.function(function, jit_compile=mode == "XLA")


def assert_exact(name, arrays, options, dtype, wrap):
    """The op's outputs and gradients are those of the reference in float32, rounded to `dtype`, to the bit."""
    tensors = [tf.cast(array, dtype) for array in arrays]
    op = wrap(functools.partial(getattr(ops, name), **options), tensors)
    exact = functools.partial(getattr(reference, name), **options)
    got = outputs_and_gradients(op, tensors)
    expected = outputs_and_gradients(exact, [tf.constant(array) for array in arrays])
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == dtype
        np.testing.assert_array_equal(*(tf.cast(v, tf.float32) for v in (a, tf.cast(b, dtype))), f"result {index}")


@fuzz(60)
@given(st.data(), CALLS, DTYPES, MODES)
def test_valid_calls_give_the_references_bits(data, call, dtype, mode):
    assert_exact(*call, dtype, functools.partial(in_mode, data.draw, mode))


@fuzz(5)
@given(CALLS, DTYPES)
def test_valid_calls_give_the_references_bits_under_xla(call, dtype):
    assert_exact(*call, dtype, functools.partial(in_mode, None, "XLA"))


@fuzz(25)
@given(st.data(), losses(), DTYPES, MODES)
def test_losses_are_the_references(data, loss, dtype, mode):
    labels, logits, options = loss
    op, stock = (functools.partial(m.dice_cross_entropy, labels, **options) for m in (ops, reference))
    check(in_mode(data.draw, mode, op, [tf.cast(logits, dtype)]), stock, [logits], dtype)


@fuzz(15)
@given(st.data(), st.sampled_from(["float16", "bfloat16"]), MODES)
def test_casts_are_stock_tensorflows(data, dtype, mode):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=4))
    arrays = [tf.constant(normal(seed, *shape, scale=1e4)) for seed, shape in enumerate(shapes)]
    arrays.append(tf.constant([np.nan, np.inf, -np.inf, 1e38, 1e-8, -0.0], tf.float32))
    run = in_mode(data.draw, mode, lambda *x: ops.cast(list(x), dtype), arrays)
    for got, x in zip(run(*arrays), arrays, strict=True):
        np.testing.assert_array_equal(*(tf.cast(v, tf.float32) for v in (got, tf.cast(x, dtype))))


# --- calls that cannot work: argument, and what a valid call's argument is changed to


def resized(axis, by):
    return lambda array: np.zeros([size + by * (i == axis) for i, size in enumerate(array.shape)], array.dtype)


def of_size(**axes):
    return lambda array: np.zeros([axes.get(f"a{i}", size) for i, size in enumerate(array.shape)], array.dtype)


def flattened(array):
    return array.reshape(-1)


def nested(array):
    return array[None]


RANKS = [flattened, nested]
WRONG = {
    "conv2d_bias_relu": [
        *[("x", change) for change in (*RANKS, of_size(a1=0), of_size(a2=0))],
        *[("kernel", change) for change in (*RANKS, resized(2, 1), of_size(a0=2, a1=2), of_size(a0=5, a1=5))],
        *[("kernel", change) for change in (of_size(a0=1, a1=3), of_size(a2=0))],
        *[("bias", change) for change in (nested, resized(0, 1), of_size(a0=0))],
        *[("skip", change) for change in (*RANKS, resized(0, 1), of_size(a1=0), of_size(a2=0))],
    ],
    "conv2d_transpose_bias_relu": [
        *[("x", change) for change in (*RANKS, of_size(a1=0), of_size(a2=0))],
        *[("kernel", change) for change in (*RANKS, resized(3, 1), of_size(a0=4, a1=4), of_size(a0=2, a1=3))],
        *[("bias", change) for change in (nested, resized(0, 1), of_size(a0=0))],
    ],
    "max_pool2d": [("x", change) for change in RANKS],
}
ARGUMENTS = ["x", "kernel", "bias", "skip"]
REFUSED = (tf.errors.InvalidArgumentError, ValueError)


@fuzz(60)
@given(st.data(), CALLS, DTYPES, st.sampled_from(["eager", "graph", "partial"]))
def test_wrong_shapes_are_refused_by_name(data, call, dtype, mode):
    name, arrays, options = call
    wrong = [(argument, change) for argument, change in WRONG[name] if ARGUMENTS.index(argument) < len(arrays)]
    argument, change = data.draw(st.sampled_from(wrong))
    index = ARGUMENTS.index(argument)
    arrays[index] = change(arrays[index])
    tensors = [tf.cast(array, dtype) for array in arrays]
    with pytest.raises(REFUSED, match=rf"{name}: {argument}: expected"):
        in_mode(data.draw, mode, functools.partial(getattr(ops, name), **options), tensors)(*tensors)


@fuzz(3)
@given(st.data(), CALLS)
def test_wrong_shapes_are_refused_by_name_under_xla(data, call):
    name, arrays, options = call
    argument, change = data.draw(st.sampled_from([wrong for wrong in WRONG[name] if wrong[0] != "skip"]))
    index = ARGUMENTS.index(argument)
    arrays[index] = change(arrays[index])
    tensors = [tf.constant(array) for array in arrays]
    # Shapes that the graph knows are refused while it is built; these it does not know, and XLA does.
    run = tf.function(functools.partial(getattr(ops, name), **options), [tf.TensorSpec(None)] * len(tensors))
    with pytest.raises(REFUSED, match=rf"{name}: {argument}: expected"):
        tf.function(run, jit_compile=True)(*tensors)


@fuzz(25)
@given(st.data(), CALLS)
def test_wrong_dtypes_are_refused_by_name(data, call):
    name, arrays, options = call
    index = data.draw(st.integers(0, len(arrays) - 1))
    other = data.draw(st.sampled_from(["float64", "int32", *(["float16", "bfloat16"] if len(arrays) > 1 else [])]))
    tensors = [tf.cast(array, other if i == index else "float32") for i, array in enumerate(arrays)]
    with pytest.raises(REFUSED, match=rf"{name}: expected .*{ARGUMENTS[index]} {other}.*; cast them"):
        getattr(ops, name)(*tensors, **options)


@fuzz(25)
@given(st.data(), losses(), st.sampled_from(["eager", "graph", "partial"]))
def test_wrong_losses_are_refused_by_name(data, loss, mode):
    labels, logits, options = loss
    argument = data.draw(st.sampled_from(["labels", "logits", "class_weights", "label_smoothing"]))
    if argument == "labels":
        labels = data.draw(st.sampled_from([nested, resized(0, 1)]))(labels)
    elif argument == "logits":
        logits = np.zeros(logits.shape[-1], logits.dtype)
    elif argument == "class_weights":
        options["class_weights"] = [1.0] * (logits.shape[-1] + 1)
    else:
        options["label_smoothing"] = data.draw(st.sampled_from([-0.1, 1.0, float("nan")]))
    run = in_mode(data.draw, mode, functools.partial(ops.dice_cross_entropy, labels, **options), [tf.constant(logits)])
    with pytest.raises(REFUSED, match=rf"dice_cross_entropy: ({argument}: )?expected .*"):
        run(tf.constant(logits))


# --- NaN and infinities


def spoilt(data, arrays, dtype):
    """The arrays in `dtype` with a few of their values not finite; those of kernels and masks stay."""
    values = [tf.cast(array, dtype).numpy() for array in arrays]
    for value in (values[0], *values[2:]):
        for bad in data.draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=3)):
            if value.size:
                value.flat[data.draw(st.integers(0, value.size - 1))] = bad
    return [tf.constant(value) for value in values]


@fuzz(40)
@given(st.data(), st.one_of(conv2d(), conv2d_transpose()), DTYPES)
def test_what_is_not_finite_stays_so(data, call, dtype):
    """NaN and infinities of outputs are the reference's; gradients have no finite value where the reference has none."""
    name, arrays, options = call
    options["pool"] = False  # of a NaN in a window, stock TensorFlow's pool may know nothing
    if name == "conv2d_transpose_bias_relu":
        del options["pool"]
    tensors = spoilt(data, arrays, dtype)
    got, expected = (
        [tf.cast(v, tf.float64).numpy() for v in outputs_and_gradients(functools.partial(f, **options), tensors)]
        for f in (getattr(ops, name), getattr(reference, name))
    )
    for same in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(same(got[0]), same(expected[0]))
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert not np.any(np.isfinite(a) & ~np.isfinite(b))


@fuzz(25)
@given(st.data(), max_pool2d(), DTYPES)
def test_a_pooled_window_with_a_nan_is_nan(data, call, dtype):
    (x,) = spoilt(data, call[1], dtype)
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    windows = tf.cast(x, tf.float64).numpy()[:, : 2 * rows, : 2 * columns]
    windows = windows.reshape(len(windows), rows, 2, columns, 2, x.shape[3])
    # np.max gives NaN wherever there is one.
    np.testing.assert_array_equal(tf.cast(ops.max_pool2d(x), tf.float64), windows.max((2, 4), initial=-np.inf))


@fuzz(15)
@given(st.data(), losses(), DTYPES)
def test_a_nan_logit_of_a_counted_pixel_makes_its_samples_loss_nan(data, loss, dtype):
    labels, logits, options = loss
    options["dice_weight"] = 1.0
    clean = ops.dice_cross_entropy(labels, tf.cast(logits, dtype), **options).numpy()
    if labels.size == 0:
        return
    at = np.unravel_index(data.draw(st.integers(0, labels.size - 1)), labels.shape)
    logits[at] = np.nan
    dirty = ops.dice_cross_entropy(labels, tf.cast(logits, dtype), **options).numpy()
    clean[at[0]] = clean[at[0]] if labels[at] == options["ignore_class"] else np.nan
    np.testing.assert_array_equal(dirty, clean)


# --- sizes beyond 32 bits, of which nothing is allocated

HUGE = st.sampled_from([2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**33])


def static_shapes(function, *shapes):
    """What a graph knows of the shapes of function(*placeholders) and of its gradients, in one list."""
    found = []

    @tf.function
    def build():
        tensors = [tf.raw_ops.Placeholder(dtype=tf.float32, shape=shape) for shape in shapes]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs = tf.nest.flatten(function(*tensors))
        gradients = tape.gradient(outputs, tensors)
        found.extend(t.shape.as_list() for t in (*outputs, *gradients) if t is not None)

    build.get_concrete_function()
    return found


def loss_of_zeros(logits):
    return ops.dice_cross_entropy(tf.zeros(tf.shape(logits, tf.int64)[:-1], tf.int32), logits)


@fuzz(10)
@given(HUGE, st.sampled_from(["valid", "same"]))
def test_shapes_beyond_32_bits(huge, padding):
    cut = 2 if padding == "valid" else 0
    conv = functools.partial(ops.conv2d_bias_relu, padding=padding, pool=True)
    for shape in ([huge, 8, 9, 4], [1, huge, 9, 4], [1, 8, huge, 4]):
        n, h, w, c = shape
        out = [n, h - cut, w - cut, 8]
        pooled = [n, out[1] // 2, out[2] // 2, 8]
        arguments = [shape, [3, 3, c, 8], [8]]
        assert static_shapes(conv, *arguments) == [out, pooled, *arguments]
        skip = [n, h + 3, w + 2, c]
        arguments = [shape, [3, 3, 2 * c, 8], [8], skip]
        assert static_shapes(conv, *arguments) == [out, pooled, *arguments]
        arguments = [shape, [2, 2, 8, c], [8]]
        assert static_shapes(ops.conv2d_transpose_bias_relu, *arguments) == [[n, 2 * h, 2 * w, 8], *arguments]
        assert static_shapes(ops.max_pool2d, shape) == [[n, h // 2, w // 2, c], shape]
        assert static_shapes(loss_of_zeros, shape) == [[n], shape]


def test_a_size_that_no_integer_holds_is_refused_by_name():
    with pytest.raises(ValueError, match="conv2d_transpose_bias_relu: x: expected a smaller height"):
        static_shapes(ops.conv2d_transpose_bias_relu, [1, 2**62, 1, 1], [3, 3, 1, 1], [1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("jit", [None, True], ids=["eager", "XLA"])
def test_an_empty_batch_of_images_beyond_any_memory(dtype, jit):
    x = tf.zeros((0, 2**20, 2**20, 64), dtype)
    for op, kernel in ((ops.conv2d_bias_relu, (3, 3, 64, 8)), (ops.conv2d_transpose_bias_relu, (3, 3, 8, 64))):
        y, dx, dkernel, dbias = outputs_and_gradients(op, [x, tf.ones(kernel, dtype), tf.ones(8, dtype)], jit=jit)
        assert y.shape[0] == 0 and dx.shape == x.shape and not np.any(dkernel) and not np.any(dbias)
    y, dx = outputs_and_gradients(ops.max_pool2d, [x], jit=jit)
    assert y.shape == (0, 2**19, 2**19, 64) and dx.shape == x.shape
