"""How much of the bare training step's speed `unet-fast train` keeps, from images on disk and with augmentation.

    python benchmarks/train_rate.py [--json FILE] [--data DIR] [--stream]
    python benchmarks/train_rate.py --filters 8 --depth 2 --padding same --size 128 --batch 4 --steps 200    # on a CPU

The bare step is `train_step` of the same network, loss and optimizer on one random batch that lies on the device, launched
step by step and waited for at the end of a run; its rate is the median of runs before and after the training. The training
is the library's own call, in the same process, on TIFFs that it reads from disk (generated ones without --data); its rate is
the median over the intervals between evaluations after the first, in which it compiles. Prints one line.
"""

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import rich.console
import tensorflow as tf

from unet_fast import FusedUNet, _native, checkpoints, losses, training
from unet_fast.config import TrainConfig
from unet_fast.data import generate, pipeline, write_tiff

RUNS = 3  # of the bare step, before and after the training


def bare_rate(config, seconds):
    """A function that measures images/s of the bare step, in a run of about so many seconds."""
    model = FusedUNet(
        (config.size, config.size, 1),
        filters=config.filters,
        depth=config.depth,
        padding=config.padding,
        dropout=config.dropout,
        backend=config.backend,
        dtype=config.precision,
    )
    checkpoints.set_jit(model, config)
    jit = model.jit_compile
    # compile wraps the optimizer for mixed_float16 as `unet-fast train` does.
    loss = losses.DiceCrossEntropy(backend=config.backend)
    model.compile(training.AdamL2(config.lr, config.l2), loss, jit_compile=jit)
    step = tf.function(model.train_step, jit_compile=jit)
    images = tf.random.normal((config.batch, *model.input_shape[1:]))
    labels = tf.random.uniform((config.batch, *model.output_shape[1:3]), 0, 2, tf.int32)

    def run(steps):
        begin = time.perf_counter()
        for _ in range(steps):
            result = step((images, labels))
        float(result["loss"])
        return time.perf_counter() - begin

    run(3)
    steps = max(3, round(3 * seconds / run(3)))
    return lambda: config.batch * steps / run(steps)


def train_rate(config, out):
    """images/s of a training: (median between evaluations, over all from the first step on)."""
    training.train(config, out, console=rich.console.Console(quiet=True))
    with (Path(out) / checkpoints.HISTORY).open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["images_per_second"]) for row in rows[1:]]
    first, last = rows[0], rows[-1]
    seconds = float(last["seconds"]) - float(first["seconds"])
    return statistics.median(rates), (int(last["step"]) - int(first["step"])) * config.batch / seconds


def write_data(folder, count, side):
    """ISBI-2012's layout of generated sections."""
    images, masks = generate(count, size=(side, side))
    write_tiff(folder / "train-volume.tif", images[..., 0])
    write_tiff(folder / "train-labels.tif", masks * 255)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = bool(tf.config.list_physical_devices("GPU"))
    parser.add_argument("--data", metavar="DIR", help="grey images with two classes; default 30 generated sections")
    parser.add_argument("--side", type=int, default=512, metavar="N", help="pixels of a generated section; default 512")
    parser.add_argument("--stream", action="store_true", help="as if the data were too large to lie on the device")
    parser.add_argument("--filters", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--depth", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument("--padding", choices=("valid", "same"), default="valid", help="default valid")
    parser.add_argument("--size", type=int, default=572, metavar="N", help="default 572")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--precision", default="mixed_float16" if gpu else "float32", help="default for the device")
    parser.add_argument("--backend", default="auto", help="default auto")
    parser.add_argument("--jit", default="auto", help="default auto")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="in all; default 1500")
    parser.add_argument("--intervals", type=int, default=6, metavar="N", help="evaluations; default 6, at least 2")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of a run of the bare step; default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    return parser.parse_args()


def main():
    arguments = parse()
    keras.utils.set_random_seed(0)
    if arguments.stream:
        pipeline.RESIDENT_BYTES = 0
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data
        if data is None:
            write_data(Path(folder), 30, arguments.side)
            data = folder
        names = ("filters", "depth", "padding", "size", "batch", "precision", "backend", "jit", "steps")
        options = {name: getattr(arguments, name) for name in names}
        config = TrainConfig(data=data, eval_every=arguments.steps // arguments.intervals, **options)
        bare = bare_rate(config, arguments.seconds)
        runs = [bare() for _ in range(RUNS)]
        trained, overall = train_rate(config, Path(folder) / "run")
        runs += [bare() for _ in range(RUNS)]
    rate = statistics.median(runs)
    gpus = tf.config.list_physical_devices("GPU")
    row = {
        "device": tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else "CPU",
        "fingerprint": _native.fingerprint,
        "streamed": arguments.stream,
        **{name: options[name] for name in ("filters", "size", "batch", "precision")},
        "bare_img_s": round(rate, 2),
        "bare_runs_img_s": [round(r, 2) for r in runs],
        "train_img_s": round(trained, 2),
        "train_with_evaluations_img_s": round(overall, 2),
        "ratio": round(trained / rate, 4),
    }
    print(
        f"{row['device']}, batch {config.batch}, {config.precision}: unet-fast train {trained:.1f} images/s "
        f"({overall:.1f} with evaluations and checkpoints), bare step {rate:.1f} images/s, ratio {trained / rate:.3f}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
