"""Training on several GPUs of one machine: unet_fast against stock Keras under MirroredStrategy.

    python benchmarks/scaling.py [--json FILE [--resume]] [--gpus N ...] [--systems NAME ...] [--minutes M]
    python benchmarks/scaling.py --filters 2 --depth 1 --padding same --size 32 --batch 2    # also without any GPU

The network, loss and optimizer are UNet_Medical's, batch 8 on each GPU, mixed_float16. Each figure comes from a process of
its own, the most telling ones first; the next process imports its framework while the one before compiles.

`unet_fast` is the loop of `unet-fast train --gpus N`, preparation and augmentation of the images within the step. Keras
trains as `Model.fit` does under the strategy, on random images that lie on the GPUs already: `graph` as Keras comes, which
leaves XLA out under a strategy, and `xla` with the replica's `train_step` compiled by hand. `unet_fast graph` is without
XLA too. On one GPU Keras runs under a strategy of that GPU.

`ms` is the median over runs of a step, all replicas' waited for at a run's end; `scaling` is images a second over N times
those of the same system on one GPU. With --resume, rows that FILE has of the same card, sources and network stay. Without
GPUs it runs on logical CPU devices, which tells that it works and nothing about speed.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

import record
import step
from timing import INPUTS, WARM_UP

SYSTEMS = {  # name: (whose, whether XLA compiles the replica's step)
    "unet_fast": ("unet_fast", True),
    "keras xla": ("keras", True),
    "keras graph": ("keras", False),
    "unet_fast graph": ("unet_fast", False),
}
RUNS, STEPS = 5, 40
NETWORK = {"filters": 64, "depth": 4, "padding": "valid", "size": 572}  # the reference
SECTIONS, SIDE = 30, 512  # generated images, as many and as large as ISBI-2012's
AIM = 0.95  # of the scaling on two GPUs


class UnetFast:
    """`unet-fast train`'s loop on some devices; `run(count)` runs so many steps and waits for them."""

    def __init__(self, network, batch, precision, devices, xla):
        import keras

        from unet_fast import losses
        from unet_fast.data import Dataset, TrainingBatches, generate
        from unet_fast.distribution import Distribution

        distribution = Distribution(devices=devices)
        model = _model(network, "auto", precision)
        model.jit_compile = xla
        optimizer = _optimizer()
        if precision == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(model.trainable_variables)
        data = Dataset.from_arrays(*generate(SECTIONS, size=(SIDE, SIDE)))
        batches = TrainingBatches(
            data,
            range(SECTIONS),
            input_size=network["size"],
            output_size=model.output_shape[1:3],
            batch_size=batch * len(devices),
            seed=0,
        )
        self._loop = distribution.loop(model, optimizer, losses.DiceCrossEntropy(), batches, 0)

    def run(self, count):
        while count:
            count -= len(self._loop.advance(count))


class Keras:
    """Keras' train_step under MirroredStrategy, on random images on the devices."""

    def __init__(self, network, batch, precision, devices, xla):
        import tensorflow as tf

        from unet_fast import losses

        strategy = tf.distribute.MirroredStrategy(devices)
        with strategy.scope():
            model = _model(network, "stock", precision)
            model.compile(_optimizer(), losses.DiceCrossEntropy(backend="stock"), jit_compile=False)
            model.optimizer.build(model.trainable_variables)

        def data(at):
            images = tf.random.normal((batch, *model.input_shape[1:]))
            labels = tf.random.uniform((batch, *model.output_shape[1:3]), 0, 2, tf.int32)
            with tf.device(strategy.extended.worker_devices[at.replica_id_in_sync_group]):
                return tf.identity(images), tf.identity(labels)

        self._data = [strategy.experimental_distribute_values_from_function(data) for _ in range(INPUTS)]
        train_step = tf.function(model.train_step, jit_compile=True) if xla else model.train_step
        self._step = tf.function(lambda data: strategy.run(train_step, args=(data,)))
        self._local = strategy.experimental_local_results

    def run(self, count):
        for i in range(count):
            results = self._step(self._data[i % INPUTS])
        for loss in self._local(results["loss"]):
            float(loss)


def _model(network, backend, precision):
    from unet_fast import FusedUNet

    options = {name: network[name] for name in ("filters", "depth", "padding")}
    return FusedUNet((network["size"], network["size"], 1), backend=backend, dtype=precision, **options)


def _optimizer():
    from unet_fast.training import AdamL2

    return AdamL2(1e-4, 5e-4)


def measure(system, images, before_timing=lambda: None):
    """Figures of a system, a dict, with so many images a step; calls `before_timing` after compilation and warm-up."""

    def seconds(count):
        begin = time.perf_counter()
        system.run(count)
        return time.perf_counter() - begin

    first_step_s = seconds(1)
    seconds(WARM_UP)
    seconds(STEPS)  # chunks find their length
    before_timing()
    runs = [1e3 / STEPS * seconds(STEPS) for _ in range(RUNS)]
    ms = statistics.median(runs)
    return {
        "ms": round(ms, 3),
        "img_s": round(1e3 * images / ms, 1),
        "runs_ms": [round(run, 3) for run in runs],
        "first_step_s": round(first_step_s, 1),
    }


def worker(name, options, gpus):
    """Times one system in this process, taking each of its steps when told to by a line on standard input."""

    def turn(state):
        print(f"{step.MARK}{state}", flush=True)
        sys.stdin.readline()

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    options, (whose, xla) = json.loads(options), SYSTEMS[name]
    try:
        import keras
        import tensorflow as tf

        turn("imported")
        keras.utils.set_random_seed(0)
        physical = tf.config.list_physical_devices("GPU")
        if physical:
            os.environ["UNET_FAST_REQUIRE_KERNELS"] = "1"  # what would quietly run on something else fails
            tf.config.set_visible_devices(physical[:gpus], "GPU")
        else:
            logical = [tf.config.LogicalDeviceConfiguration() for _ in range(gpus)]
            tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
        devices = [f"{'GPU' if physical else 'CPU'}:{i}" for i in range(gpus)]
        make = UnetFast if whose == "unet_fast" else Keras
        with contextlib.redirect_stdout(sys.stderr):
            system = make(options["network"], options["batch"], options["precision"], devices, xla)
        row = measure(system, options["batch"] * gpus, lambda: turn("warm"))
        print(f"{step.MARK}row {json.dumps(row)}", flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"{step.MARK}failed {step.headline(error)}", flush=True)
        return 1
    return 0


def with_scaling(rows):
    """The rows in the order of SYSTEMS, each with its `scaling`, None where the system has no row of one GPU.

    >>> with_scaling([{"system": "keras xla", "gpus": n, "img_s": 100.0 * n**0.5} for n in (1, 4)])[1]["scaling"]
    0.5
    """
    alone = {row["system"]: row["img_s"] for row in rows if row["gpus"] == 1}
    rows = sorted(rows, key=lambda row: (list(SYSTEMS).index(row["system"]), row["gpus"]))
    scaled = []
    for row in rows:
        one = alone.get(row["system"])
        scaled.append({**row, "scaling": one and round(row["img_s"] / row["gpus"] / one, 3)})
    return scaled


def markdown(rows):
    """A table of the rows.

    >>> row = {"system": "keras xla", "gpus": 1, "ms": 20.0, "img_s": 400.0, "first_step_s": 30.0}
    >>> print(markdown(with_scaling([row])).splitlines()[-1])
    | keras xla | 1 | 20.00 | 400.0 | 1.000 | 30.0 |
    """
    lines = ["| system | GPUs | ms a step | images/s | scaling | first step, s |", "|---|---|---|---|---|---|"]
    for row in rows:
        scaling = "-" if row["scaling"] is None else f"{row['scaling']:.3f}"
        lines.append(
            f"| {row['system']} | {row['gpus']} | {row['ms']:.2f} | {row['img_s']:.1f} | {scaling} "
            f"| {row['first_step_s']:.1f} |"
        )
    return "\n".join(lines)


def run(arguments):
    """Measures, prints and records; whether every row that was asked for is there."""
    built = record.native.load_from_package("_native")
    found = built.gpu_devices()[0] if hasattr(built, "gpu_devices") else []
    counts = arguments.gpus or sorted({1, len(found) or 2})
    if found and max(counts) > len(found):
        sys.exit(f"benchmarks/scaling.py: expected {max(counts)} GPUs, got {len(found)}; give --gpus what is there")
    network = {name: getattr(arguments, name) for name in NETWORK}
    options = {
        "network": network,
        "batch": arguments.batch,
        "precision": arguments.precision or ("mixed_float16" if found else "float32"),
    }
    facts = {"card": found[0]["name"] if found else "CPU", "fingerprint": built.fingerprint, **options}
    rows, runs = step.previous(arguments.json, facts) if arguments.resume else ([], [])
    rows = {(row["system"], row["gpus"]): row for row in rows}
    runs = [*runs, {"driver": record.driver() if found else None, "versions": record.versions("tensorflow", "keras")}]
    jobs = [(name, json.dumps(options), n) for name in arguments.systems for n in counts if (name, n) not in rows]
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    start = functools.partial(step.Worker, command=(sys.executable, __file__, "--worker"))
    missed, failures = len(jobs), []
    print(f"{facts['card']}, {len(found)} GPUs, batch {arguments.batch} each, {options['precision']}", flush=True)
    for (name, _, gpus), figures in step.measured(jobs, deadline, start):
        if isinstance(figures, step.WorkerError):
            print(f"{name} on {gpus}: FAILED: {figures.args[0]}", flush=True)
            failures.append((name, gpus, figures.args[1]))
            continue
        missed -= 1
        rows[name, gpus] = {"system": name, "gpus": gpus, **figures, "run": len(runs)}
        print(f"{name} on {gpus}: {figures['ms']:.2f} ms, {figures['img_s']:.1f} images/s", flush=True)
        if arguments.json:
            record.save(arguments.json, facts | {"aim": AIM, "runs": runs, "rows": with_scaling(list(rows.values()))})
    print(f"\n{markdown(with_scaling(list(rows.values())))}")
    for name, gpus, lines in failures:
        print(f"\n{name} on {gpus} failed; its last lines:", *lines, sep="\n", file=sys.stderr)
    if missed > len(failures):
        print(f"{missed - len(failures)} rows are left for a further call with --resume", file=sys.stderr)
    return not missed


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows in FILE")
    parser.add_argument("--resume", action="store_true", help="measure only what FILE has not")
    parser.add_argument("--gpus", type=int, nargs="+", metavar="N", help="default 1 and all")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="default all")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes (default: when done)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="on each GPU; default 8")
    for name, value in NETWORK.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, metavar="X", help=f"default {value}")
    parser.add_argument("--precision", metavar="P", help="dtype policy; default mixed_float16, without GPUs float32")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.worker:
        name, options, gpus = parsed.worker
        return worker(name, options, int(gpus))
    if parsed.resume and parsed.json is None:
        parser.error("--resume needs --json FILE")
    return 0 if run(parsed) else 1


if __name__ == "__main__":
    sys.exit(main())
