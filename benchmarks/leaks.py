"""Memory over thousands of calls of every op, forward and gradient: the process's, and the GPU's where there is one.

    python benchmarks/leaks.py [--calls 10000] [--json FILE] [--plot FILE]

Each mode - eager, a graph, a graph compiled by XLA - runs in turn in this one process: a tenth as many calls first, whose
memory is the start, then the calls, with the memory read fifty times. A call is one op with its gradient; the five ops take
turns. What grows with the calls is a leak; what the allocator keeps after the first ones is not.
"""

import argparse
import gc
import os
import pathlib
import sys

import numpy as np
import record

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

READINGS = 50
MODES = ("eager", "graph", "xla")


def op_calls():
    """Functions without arguments, one an op: each runs it and its gradient, and gives a tensor."""
    import tensorflow as tf

    from unet_fast import _library, ops

    dtype = "float16" if _library.status().cuda and tf.config.list_physical_devices("GPU") else "float32"
    generator = np.random.default_rng(0)
    x, skip, kernel, rows, logits = (
        tf.cast(generator.normal(size=shape), dtype)
        for shape in ((1, 16, 16, 8), (1, 18, 18, 8), (3, 3, 16, 8), (3, 3, 8, 8), (1, 16, 16, 2))
    )
    bias, labels, weights = tf.zeros(8, dtype), tf.zeros((1, 16, 16), tf.int32), tf.ones((32, 64))

    def conv2d(x, kernel, skip):
        return ops.conv2d_bias_relu(x, kernel, bias, skip, pool=True)

    def transpose(x, kernel):
        return ops.conv2d_transpose_bias_relu(x, kernel, bias)

    def loss(logits):
        return ops.dice_cross_entropy(labels, logits)

    def cast(weights):
        return ops.cast([weights], "float16")

    def with_gradient(op):
        def run(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = op(*inputs)
            return tape.gradient(outputs, inputs)[0]

        return run

    calls = [(conv2d, (x, kernel, skip)), (transpose, (x, rows)), (ops.max_pool2d, (x,)), (loss, (logits,))]
    return [(with_gradient(op), inputs) for op, inputs in [*calls, (cast, (weights,))]]


def host_mib():
    """Resident memory of this process."""
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2)


def device_mib():
    """What TensorFlow's allocator has given out on the first GPU; None without one."""
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return None
    return round(tf.config.experimental.get_memory_info("GPU:0")["current"] / 2**20, 2)


def measure(mode, calls):
    """Memory over `calls` calls in one mode: {"calls": [...], "host_mib": [...], "device_mib": [...]}."""
    import tensorflow as tf

    runs = [
        (run if mode == "eager" else tf.function(run, jit_compile=mode == "xla"), inputs) for run, inputs in op_calls()
    ]

    def call(first, last):
        for i in range(first, last):
            run, inputs = runs[i % len(runs)]
            result = run(*inputs)
        result.numpy()  # the GPU has done what came before

    call(0, max(calls // 10, len(runs)))
    gc.collect()
    gc.freeze()  # what is there stays: looking through TensorFlow's modules again at each reading takes most of the time
    found = {"calls": [0], "host_mib": [host_mib()], "device_mib": [device_mib()]}
    for reading in range(READINGS):
        first, last = calls * reading // READINGS, calls * (reading + 1) // READINGS
        call(first, last)
        for key, value in (("calls", last), ("host_mib", host_mib()), ("device_mib", device_mib())):
            found[key].append(value)
    return found


def draw(result, path):
    """A line a mode of what memory has grown by since the first reading; the GPU's dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for color, (mode, found) in zip(("tab:blue", "tab:orange", "tab:green"), result["modes"].items(), strict=False):
        for key, style, name in (("host_mib", "-", "host"), ("device_mib", "--", "GPU")):
            if None not in found[key]:
                grown = np.array(found[key]) - found[key][0]
                axes.plot(found["calls"], grown, style, color=color, label=f"{mode}, {name}")
    axes.set(xlabel="calls of an op with its gradient", ylabel="MiB more than at the start")
    axes.set_ylim(min(-1, axes.get_ylim()[0]), max(10, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"Memory over {max(found['calls']):,} calls a mode, {result['device']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10000, metavar="N", help="calls a mode (default 10000)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the readings to FILE")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw them into FILE, a PNG")
    arguments = parser.parse_args()
    if arguments.calls < READINGS:
        parser.error(f"expected --calls of at least {READINGS}, got {arguments.calls}")
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    device = tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else "CPU"
    result = {
        "device": device,
        "driver": record.driver() if gpus else None,
        "versions": record.versions("tensorflow", "keras"),
        "fingerprint": record.sources_fingerprint(),
        "modes": {},
    }
    for mode in MODES:
        found = result["modes"][mode] = measure(mode, arguments.calls)
        grown = [f"{key.split('_')[0]} {found[key][-1] - found[key][0]:+.2f} MiB" for key in ("host_mib", "device_mib")
                 if found[key][0] is not None]  # fmt: skip
        print(f"{mode}: {arguments.calls} calls, {', '.join(grown)}", flush=True)
        if arguments.json:
            record.save(arguments.json, result)
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(result, arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
