"""A program for test_distribution.py: trains on one device, on two of this process, and by two workers, all on CPUs.

    python tests/distributed_runs.py FOLDER

leaves runs, arrays and what was printed in FOLDER. Each part is a fork of this process, which has imported TensorFlow but
computes nothing itself.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import rich.console
import tensorflow as tf

from unet_fast import training
from unet_fast.cli import main as command_line
from unet_fast.config import TrainConfig
from unet_fast.data import Dataset, TrainingBatches, generate, write_tiff
from unet_fast.distribution import Cluster, Distribution
from unet_fast.errors import UserError
from unet_fast.losses import DiceCrossEntropy
from unet_fast.models import FusedUNet
from unet_fast.step_loop import StepLoop
from unet_fast.training import train

TWO = ["CPU:0", "CPU:1"]
OPTIONS = {
    "filters": 2,
    "depth": 1,
    "padding": "same",
    "size": 32,
    "dropout": 0.0,
    "lr": 3e-2,
    "steps": 20,
    "eval_every": 2,
    "accumulate": 2,
    "ema": 0.5,
    "clip_norm": 0.45,  # the norm of about every second step: where all were clipped, a wrong scale would not be seen
    "schedule": "plateau",
    "warmup": 2,
    "plateau_patience": 1,
    "patience": 3,
    "ignore_class": 128,
    "class_weights": (0.5, 2.0),
    "jit": "off",
}
QUIET = rich.console.Console(quiet=True)


def write_data(folder):
    """Eight images of 40 x 40 pixels with classes 0 and 255 and pixels to ignore, and weights of some."""
    images, masks = generate(8, size=(40, 40))
    masks = masks * np.uint8(255)
    masks[:, 10:16, 5:25] = 128
    for name, pages in (("images", images[..., 0]), ("masks", masks)):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(8):
            write_tiff(folder / "data" / name / f"{i}.tif", pages[i : i + 1])
    (folder / "weights.csv").write_text("name,weight\n" + "".join(f"{i},{0.25 * i}\n" for i in range(6)))


# On devices of one process


def local(folder):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    options = OPTIONS | {"data": str(folder / "data"), "sample_weights": str(folder / "weights.csv")}
    train(TrainConfig(batch=2, **options), folder / "one", console=QUIET)
    # On two devices with fused ops, and compiled.
    two = options | {"backend": "fused", "jit": "on"}
    train(TrainConfig(batch=1, **two), folder / "two", console=QUIET, devices=TWO)
    replicas(folder)
    (folder / "errors.json").write_text(json.dumps(errors(folder, options)))
    return 0


def replicas(folder):
    """Steps of two replicas with dropout and a loss scale: the second replica alone overflows in the first."""
    factor = [np.inf]
    loop = make_loop(factor)
    before = weights(loop.replicas[0])
    loop.advance(1)
    factor[0] = 1.0
    scales = [float(replica.optimizer.dynamic_scale) for replica in loop.replicas]
    skipped = [weights(replica) for replica in loop.replicas]
    loop.advance(1)
    np.savez(
        folder / "replicas.npz",
        before=before,
        scales=scales,
        skipped=skipped,
        weights=[weights(replica) for replica in loop.replicas],
        dropout=[replica.model.non_trainable_variables[0].numpy() for replica in loop.replicas],
    )


def make_loop(factor):
    """A loop over two replicas; `factor` holds what the second one's loss is multiplied by."""
    keras.utils.set_random_seed(0)
    model = FusedUNet(
        (32, 32, 1), filters=2, depth=1, padding="same", dropout=0.5, backend="stock", dtype="mixed_float16"
    )
    model.jit_compile = False
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-2), initial_scale=1024.0)
    optimizer.build(model.trainable_variables)
    batches = TrainingBatches(
        Dataset.from_arrays(*generate(5, size=(40, 40))), range(4), input_size=32, output_size=32, batch_size=4, seed=1
    )
    own, traced = DiceCrossEntropy(), []

    def loss(labels, outputs):
        traced.append(1)  # a replica's program is traced once
        if len(traced) == 1:
            return own(labels, outputs)
        return own(labels, outputs) * tf.ensure_shape(
            tf.numpy_function(lambda: np.float32(factor[0]), [], "float32"), []
        )

    return Distribution(devices=TWO).loop(model, optimizer, loss, batches, 0)


def weights(replica):
    return np.concatenate([np.ravel(v) for v in replica.model.trainable_variables])


def errors(folder, options):
    """The messages of what is refused."""

    def message(action):
        try:
            action()
        except UserError as error:
            return str(error)

    config = TrainConfig(batch=2, **options)
    return {
        "devices": message(lambda: Distribution(devices=["CPU:0", "CPU:5"])),
        "twice": message(lambda: Distribution(devices=["CPU:0", "CPU:0"])),
        "order": message(lambda: Distribution(devices=["CPU:1", "CPU:0"])),
        "replicas": message(lambda: train(config, folder / "one", console=QUIET, devices=TWO, resume=True)),
    }


# By workers


def worker(out, *arguments, at=0, signum=None, environment=None):
    """The command line; after step number `at` it sends itself a signal."""
    os.environ.update(environment or {})
    advance = StepLoop.advance

    def counting(self, most):
        nonlocal at
        losses = advance(self, min(most, at) if at > 0 else most)
        at -= len(losses)
        if at == 0:
            os.kill(os.getpid(), signum)
        return losses

    StepLoop.advance = counting
    training._CHECKPOINT_SECONDS = 0.0  # one an evaluation
    return command_line(["train", "--out", str(out), *arguments])


def free_hosts():
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{probe.getsockname()[1]}" for probe in (first, second)]


def workers(folder):
    """Trains by two workers: the second is killed, and then goes on to the end; returns what came of it."""
    given = OPTIONS | {"batch": 1, "data": folder / "data", "sample_weights": folder / "weights.csv"}
    given["class_weights"] = ",".join(map(str, given["class_weights"]))
    options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    hosts = ["--hosts", ",".join(free_hosts()), "--host-index"]
    out, elsewhere = folder / "workers", folder / "elsewhere"
    killed = [
        fork(folder, "killed-0", worker, out, *options, *hosts, "0"),
        fork(folder, "killed-1", worker, elsewhere, *options, *hosts, "1", at=4, signum=signal.SIGKILL),
    ]
    results = {"killed": ends(killed)}
    cluster = {"worker": free_hosts()}
    tasks = [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})} for i in range(2)]
    resumed = [fork(folder, f"resumed-{i}", worker, out, "--resume", environment=tasks[i]) for i in range(2)]
    results["resumed"] = ends(resumed)
    hosts = tuple(free_hosts())
    asking = [fork(folder, f"asking-{i}", ask, folder, Cluster(hosts, i)) for i in range(2)]
    hosts = ["--hosts", ",".join(free_hosts()), "--host-index=1", "--join-timeout=2"]
    alone = fork(folder, "alone", worker, folder / "alone", *options, *hosts)
    results["asking"], results["alone"] = ends(asking), wait(alone)[0]
    return results


def ask(folder, cluster):
    """Writes what a worker is told by the other one, and whether the chief handles a signal while it waits for that."""
    index, handled = cluster.index, folder / "handled"
    signal.signal(signal.SIGUSR1, lambda *_: handled.touch())
    with Distribution(cluster=cluster) as distribution:
        told = {"gathered": distribution.gather(10 + index)}
        if index == 0:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        deadline = time.monotonic() + 30
        while index == 1 and not handled.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        told["signal"] = index == 0 or handled.exists()
        told["any"] = [distribution.any(flag) for flag in (False, index == 1, index == 0)]
        arrays = [np.full(2, index + 0.5, np.float32), np.array([index + 7, 1], np.uint32)]
        told["chief"] = [[array.dtype.name, *array.tolist()] for array in distribution.from_chief(arrays)]
        try:
            distribution.check_same({"lr": 0.1 * (1 + index)}, "options")
        except UserError as error:
            told["refused"] = str(error)
    (folder / f"asked-{index}.json").write_text(json.dumps(told))
    return 0


def fork(folder, name, function, *arguments, **options):
    """Calls the function in a process that prints to NAME.out and NAME.err; its number."""
    number = os.fork()
    if number:
        return number
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    sys.exit(function(*arguments, **options))


def ends(numbers):
    """How the chief and the other worker end, and how long after the other the chief does."""
    chief, other = numbers
    other, since = wait(other)
    chief, then = wait(chief)
    return {"status": [chief, other], "seconds": then - since}


def wait(number):
    """(status, time) of a process's end; it is killed if that takes too long."""
    deadline = time.monotonic() + 240
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic()
        if time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
        time.sleep(0.05)


def main(folder):
    write_data(folder)
    alongside = fork(folder, "local", local, folder)
    results = workers(folder)
    results["local"] = wait(alongside)[0]
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
