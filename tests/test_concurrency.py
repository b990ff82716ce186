"""Ops and models called from many threads, from forked and spawned processes, and so often that a leak would show."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import tensorflow as tf
from numerics import normal, outputs_and_gradients

from unet_fast import FusedUNet, ops

ROOT = pathlib.Path(__file__).resolve().parent.parent
THREADS = 8


def run(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)


def two_convolutions(x, kernel, up):
    """An op that pools, one after it, and the loss: with the gradients, all of the CPU's kernels."""
    y, pooled = ops.conv2d_bias_relu(x, kernel, tf.zeros(16), padding="same", pool=True)
    z = ops.conv2d_transpose_bias_relu(pooled, up, tf.zeros(16))
    loss = ops.dice_cross_entropy(tf.zeros(tf.shape(z)[:-1], tf.int32), z)
    return y, ops.max_pool2d(z), loss


def digest(seed=0, jit=None):
    """Hash of outputs and gradients for inputs of a size that depends on `seed`."""
    size = 16 + 2 * seed
    inputs = [tf.constant(normal(seed, *shape)) for shape in ((2, size, size, 9), (3, 3, 9, 16), (2, 2, 16, 16))]
    found = hashlib.sha256()
    for value in outputs_and_gradients(two_convolutions, inputs, jit=jit):
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def at_once(functions):
    """Results of functions that begin at the same moment, each in a thread of its own."""
    barrier = threading.Barrier(len(functions))

    def begin(function):
        barrier.wait()
        return function()

    with concurrent.futures.ThreadPoolExecutor(len(functions)) as threads:
        return list(threads.map(begin, functions))


@pytest.mark.parametrize("jit", [None, False, True], ids=["eager", "graph", "XLA"])
def test_threads_at_once_get_the_bits_that_each_gets_alone(jit):
    alone = [digest(seed, jit) for seed in range(THREADS)]
    repeats = 5 if jit is None else 1  # a graph is built and compiled anew each time
    together = at_once([lambda seed=seed: [digest(seed, jit) for _ in range(repeats)] for seed in range(THREADS)])
    assert together == [[one] * repeats for one in alone] and len(set(alone)) == THREADS


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "XLA"])
def test_threads_may_share_a_function(jit):
    shared = tf.function(
        lambda x, kernel: ops.conv2d_bias_relu(x, kernel, tf.zeros(16)), jit_compile=jit, reduce_retracing=False
    )
    inputs = [(tf.constant(normal(seed, 2, 20, 20, 9)), tf.constant(normal(9, 3, 3, 9, 16))) for seed in range(THREADS)]
    alone = [shared(*tensors).numpy() for tensors in inputs]
    together = at_once([lambda t=t: [shared(*t).numpy() for _ in range(20)] for t in inputs])
    for results, expected in zip(together, alone, strict=True):
        assert all(np.array_equal(result, expected) for result in results)


def test_models_side_by_side_predict_what_each_predicts_alone():
    image = normal(1, 2, 44, 44, 1)
    models = [FusedUNet((44, 44, 1), filters=2 + i % 3, depth=1, backend=("fused", "stock")[i % 2]) for i in range(4)]
    alone = [model.predict(image, verbose=0) for model in models]
    together = at_once([lambda m=m: [m.predict_on_batch(image) for _ in range(3)] for m in models])
    for results, expected in zip(together, alone, strict=True):
        assert all(np.array_equal(result, expected) for result in results)


FORKED = """
    import os, sys
    import tensorflow as tf
    from unet_fast import ops, reference

    def works():
        x, kernel = tf.ones((1, 8, 8, 2)), tf.ones((3, 3, 2, 8))
        return float(ops.conv2d_bias_relu(x, kernel, tf.zeros(8))[0, 0, 0, 0]) == 18

    {before}
    child = os.fork()
    if child == 0:
        try:
            print("works" if works() else "is wrong", flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    """


def test_a_process_forked_after_the_import_works():
    done = run(FORKED.format(before=""))
    assert done.stdout.strip() == "works", done.stdout + done.stderr


def test_a_process_forked_after_tensorflow_ran_gets_one_clear_line():
    done = run(FORKED.format(before="assert works()"))
    (line,) = done.stdout.splitlines()
    assert line.startswith("UserError expected a process with TensorFlow's threads, got one forked") and "spawn" in line


def test_spawned_processes_compute_the_same_bits():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(digest, range(2)) == [digest(0), digest(1)]


def test_memory_does_not_grow_with_the_calls(tmp_path):
    """3000 calls a mode; a single tensor of 8 KiB kept from each would be 23 MiB. benchmarks/leaks.py makes 10,000."""
    readings, plot = tmp_path / "leaks.json", tmp_path / "memory.png"
    command = [sys.executable, str(ROOT / "benchmarks" / "leaks.py"), "--calls", "3000"]
    done = subprocess.run(
        [*command, "--json", str(readings), "--plot", str(plot)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    modes = json.loads(readings.read_text())["modes"]
    assert set(modes) == {"eager", "graph", "xla"} and plot.stat().st_size > 0
    for mode, found in modes.items():
        assert found["calls"][-1] == 3000
        for memory in (found["host_mib"], found["device_mib"]):
            assert None in memory or memory[-1] - memory[0] < 8, (mode, memory)
