"""A program for test_distribution.py: trains on one and on two logical CPU devices, which a process has to ask for first.

    python tests/two_devices.py FOLDER

leaves runs and arrays in FOLDER, and says in result.json what was raised where something should be.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import rich.console
import tensorflow as tf

from unet_fast.config import TrainConfig
from unet_fast.data import Dataset, TrainingBatches, generate
from unet_fast.distribution import Distribution
from unet_fast.errors import UserError
from unet_fast.losses import DiceCrossEntropy
from unet_fast.models import FusedUNet
from unet_fast.training import train

TWO = ["CPU:0", "CPU:1"]
SMALL = {"filters": 2, "depth": 1, "padding": "same", "size": 32, "lr": 1e-2, "eval_every": 3}
QUIET = rich.console.Console(quiet=True)


def runs(folder):
    """Trainings of six steps by `train`."""
    stock = {"data": "synthetic", "backend": "stock", "dropout": 0.0, "steps": 6, **SMALL}
    train(TrainConfig(batch=4, **stock), folder / "stock-one", console=QUIET)
    train(TrainConfig(batch=2, **stock), folder / "stock-two", console=QUIET, devices=TWO)
    fused = {**stock, "backend": "fused", "jit": "on"}
    train(TrainConfig(batch=4, **fused), folder / "fused-one", console=QUIET)
    train(TrainConfig(batch=2, **fused), folder / "fused-two", console=QUIET, devices=TWO)
    dropout = TrainConfig(batch=2, **{**stock, "dropout": 0.5})
    train(dropout, folder / "dropout", console=QUIET, devices=TWO)
    half = folder / "dropout-resumed"
    train(TrainConfig(batch=2, **{**stock, "dropout": 0.5, "steps": 3}), half, console=QUIET, devices=TWO)
    train(dropout, half, console=QUIET, devices=TWO, resume=True)


def loop(dropout=0.0, precision="float32", spoil=None):
    """A loop over two replicas; `spoil` is what the second one's loss is multiplied by."""
    keras.utils.set_random_seed(0)
    model = FusedUNet(
        (32, 32, 1), filters=2, depth=1, padding="same", dropout=dropout, backend="stock", dtype=precision
    )
    model.jit_compile = False
    optimizer = keras.optimizers.SGD(1e-2)
    if precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
    optimizer.build(model.trainable_variables)
    data = Dataset.from_arrays(*generate(5, size=(40, 40)))
    batches = TrainingBatches(data, range(4), input_size=32, output_size=32, batch_size=4, seed=1)
    own, traced = DiceCrossEntropy(), []

    def loss(labels, outputs):
        traced.append(1)  # a replica's program is traced once
        return own(labels, outputs) * (spoil if len(traced) == 2 and spoil is not None else 1.0)

    return Distribution(devices=TWO).loop(model, optimizer, loss, batches, 0)


def weights(replica):
    return np.concatenate([np.ravel(v) for v in replica.model.trainable_variables])


def overflow(folder):
    """One step in which the second replica alone overflows."""
    spoiled = loop(precision="mixed_float16", spoil=np.inf)
    before = weights(spoiled.replicas[0])
    spoiled.advance(1)
    scales = [float(replica.optimizer.dynamic_scale) for replica in spoiled.replicas]
    after = [weights(replica) for replica in spoiled.replicas]
    np.savez(folder / "overflow.npz", before=before, after=after, scales=scales)


def dropout(folder):
    """Three steps with dropout: the replicas' weights and dropout's states after them."""
    dropping = loop(dropout=0.5)
    done = 0
    while done < 3:
        done += len(dropping.advance(3 - done))
    states = [replica.model.non_trainable_variables[0].numpy() for replica in dropping.replicas]
    np.savez(folder / "dropout.npz", weights=[weights(replica) for replica in dropping.replicas], states=states)


def errors(folder):
    """The messages of what is refused."""

    def message(action):
        try:
            action()
        except UserError as error:
            return str(error)

    config = TrainConfig(data="synthetic", batch=4, backend="stock", dropout=0.0, steps=8, **SMALL)
    return {
        "devices": message(lambda: Distribution(devices=["CPU:0", "CPU:5"])),
        "twice": message(lambda: Distribution(devices=["CPU:0", "CPU:0"])),
        "order": message(lambda: Distribution(devices=["CPU:1", "CPU:0"])),
        "replicas": message(lambda: train(config, folder / "stock-one", console=QUIET, devices=TWO, resume=True)),
    }


def main(folder):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    runs(folder)
    overflow(folder)
    dropout(folder)
    (folder / "result.json").write_text(json.dumps(errors(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
