"""Loading the native library: before and after XLA has compiled something, for another TensorFlow, and not at all."""

import os
import subprocess
import sys
import textwrap

import pytest
import tensorflow as tf

from unet_fast import _library, _native, ops


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_ops_compile_though_xla_compiled_something_before_the_library_was_loaded():
    done = run(
        """
        import tensorflow as tf
        assert float(tf.function(lambda x: x + 1, jit_compile=True)(1.0)) == 2
        from unet_fast import ops
        x, kernel, bias = tf.ones((1, 8, 8, 2)), tf.ones((3, 3, 2, 8)), tf.zeros(8)
        run = tf.function(lambda *inputs: ops.conv2d_bias_relu(*inputs), jit_compile=True)
        assert run(x, kernel, bias)[0, 0, 0, 0] == 18
        assert "unet_fast_conv2d_bias_relu" in run.experimental_get_compiler_ir(x, kernel, bias)(stage="optimized_hlo")
        print("compiled")
        """
    )
    assert done.stdout.strip() == "compiled", done.stderr


def test_ops_run_in_a_while_loop_under_xla():
    @tf.function(jit_compile=True)
    def halve_three_times(x):
        return tf.while_loop(
            lambda i, x: i < 3,
            lambda i, x: (i + 1, ops.conv2d_bias_relu(x, tf.fill((1, 1, 4, 4), 0.125), tf.zeros(4))),
            (0, x),
        )[1]

    assert halve_three_times(tf.ones((1, 4, 4, 4)))[0, 0, 0, 0] == 0.125


def test_many_ops_side_by_side_under_xla_do_not_wait_for_each_other():
    """More independent ops than threads: a kernel that waited for a thread's help could hang here."""

    @tf.function(jit_compile=True)
    def side_by_side(x, kernel):
        outputs = [ops.conv2d_bias_relu(x * float(i), kernel, tf.zeros(160)) for i in range(1, 17)]
        return tf.add_n([tf.reduce_sum(output) for output in outputs])

    x, kernel = tf.ones((1, 24, 24, 160)), tf.fill((3, 3, 160, 160), 1e-3)
    assert float(side_by_side(x, kernel)) == pytest.approx(136 * 22 * 22 * 160 * 1.44, rel=1e-4)


def test_another_tensorflow_is_named_with_the_mend(monkeypatch):
    _library._load.cache_clear()
    _library.status.cache_clear()
    monkeypatch.setattr(_native, "tensorflow_version", "2.19.0")
    try:
        status = _library.status()
        assert not status.available
        assert status.reason.startswith(f"built for TensorFlow 2.19, found {tf.__version__}; reinstall unet_fast")
        with pytest.raises(_library.UnavailableError, match=r"built for TensorFlow 2\.19"):
            ops.max_pool2d(tf.zeros((1, 2, 2, 1)))
    finally:
        _library._load.cache_clear()
        _library.status.cache_clear()


def test_keras_on_another_backend_is_one_clear_line():
    # The others need packages that are not here, so Keras is made to say that it runs on one.
    done = run("import keras; keras.backend.backend = lambda: 'torch'; import unet_fast")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "ImportError: unet_fast needs Keras on TensorFlow, found KERAS_BACKEND=torch; set KERAS_BACKEND=tensorflow"
        )
    )


def test_a_narrower_instruction_set_is_chosen_on_request():
    done = run("from unet_fast import _native; print(_native.cpu_isa())", UNET_FAST_CPU_ISA="baseline")
    assert done.stdout.strip() == "baseline", done.stderr


def test_the_number_of_threads_changes_no_bit_on_a_cpu():
    """Narrow and wide weight gradients, pool, skip, odd sizes, several images a chunk, transposed convolution."""
    code = """
        import hashlib, os
        import tensorflow as tf
        tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["THREADS"]))
        from unet_fast import ops

        def normal(seed, *shape):
            return tf.random.stateless_normal(shape, (seed, 0))

        with tf.device("CPU"):
            digest = hashlib.sha256()
            for c, size in ((16, 37), (72, 19), (160, 9)):
                x, skip, k1, k2, k3 = inputs = [
                    normal(1, 3, size, size, c), normal(2, 3, size + 3, size + 2, c), normal(3, 3, 3, 2 * c, c),
                    normal(4, 3, 3, c, c), normal(5, 3, 3, c, c)]
                with tf.GradientTape() as tape:
                    tape.watch(inputs)
                    y = ops.conv2d_bias_relu(x, k1, tf.zeros(c), skip, padding="same")
                    y, pooled = ops.conv2d_bias_relu(y, k2, tf.zeros(c), pool=True, input_is_relu=True)
                    y = ops.conv2d_transpose_bias_relu(y, k3, tf.zeros(c))
                    total = tf.reduce_mean(y * y) + tf.reduce_mean(pooled)
                for value in tape.gradient(total, inputs + [y, pooled]):
                    digest.update(value.numpy().tobytes())
        print(digest.hexdigest())
        """
    # Without AVX-512 some products are Eigen's, which adds up in another order where it has one thread.
    counts = ("1", "2", "7") if _native.cpu_isa() == "avx512" else ("2", "7")
    outputs = [run(code, THREADS=threads) for threads in counts]
    assert len(outputs[0].stdout.strip()) == 64, outputs[0].stderr
    assert len({output.stdout for output in outputs}) == 1
