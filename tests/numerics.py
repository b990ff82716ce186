"""What the numerics tests share: the reference in float64, and errors measured the same way everywhere."""

import numpy as np
import tensorflow as tf

FLOAT32_ERROR = 1e-5
DTYPES = {"float32": tf.float32, "float16": tf.float16, "bfloat16": tf.bfloat16}


def relative_error(value, expected):
    """Norm of the difference over the norm of what is expected; NaN and Inf must be in the same places."""
    value, expected = (np.asarray(tf.cast(v, tf.float64)) for v in (value, expected))
    assert value.shape == expected.shape, (value.shape, expected.shape)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(value), finite)
    norm = np.linalg.norm(expected[finite])
    return (
        np.linalg.norm((value - expected)[finite]) / norm if norm > 0 else float(np.abs(value[finite]).max(initial=0))
    )


def outputs_and_gradients(function, inputs, seed=0, jit=None):
    """Outputs of function(*inputs) and the gradients of a random weighing of them with respect to all inputs.

    The weights are small integers, which every dtype holds exactly, drawn from `seed` by NumPy: XLA has random numbers of its own.
    """

    def run(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = tf.nest.flatten(function(*inputs))
            total = tf.zeros((), tf.float64)
            for index, output in enumerate(outputs):
                weights = tf.constant(np.random.default_rng((seed, index)).integers(-3, 4, output.shape), output.dtype)
                total += tf.reduce_sum(tf.cast(output * weights, tf.float64))
        return outputs, tape.gradient(total, inputs)

    outputs, gradients = (run if jit is None else tf.function(run, jit_compile=jit))(*inputs)
    return [*outputs, *gradients]


def check(op, reference, arrays, dtype, jit=None):
    """op(*inputs) in `dtype` against reference(*inputs) in float64, outputs and gradients.

    Inputs are rounded to `dtype` first, so the error is that of the arithmetic. In float32 it is at most 1e-5; in 16 bits,
    at most twice that of the reference's stock ops in the same dtype.
    """
    rounded = [tf.cast(array, DTYPES[dtype]) for array in arrays]
    got = outputs_and_gradients(op, rounded, jit=jit)
    exact = outputs_and_gradients(reference, [tf.cast(value, tf.float64) for value in rounded])
    stock = outputs_and_gradients(reference, rounded) if dtype != "float32" else None
    assert len(got) == len(exact)
    for index, (value, expected) in enumerate(zip(got, exact, strict=True)):
        error = relative_error(value, expected)
        limit = FLOAT32_ERROR
        if stock is not None:
            # A result that stock happens to round to perfection leaves one rounding to each element.
            limit = max(2 * relative_error(stock[index], expected), float(np.finfo(np.float16).eps) / 2)
            if dtype == "bfloat16":
                limit = max(limit, 2.0**-9)
        assert error <= limit, f"output {index}: error {error:.3g}, limit {limit:.3g}"


def normal(seed, *shape, scale=1.0):
    """A float32 array of normal random numbers."""
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype("float32")


def integers(seed, *shape, low=-3, high=4):
    """A float32 array of small integers: sums and products of them are exact, and equal values (ties) are many."""
    return np.random.default_rng(seed).integers(low, high, shape).astype("float32")
