"""The rate of `unet-fast train`, from images on disk and with augmentation, against the bare step's in the same run.

    python benchmarks/train_rate.py [--json FILE] [--data DIR] [--stream]
    python benchmarks/train_rate.py --filters 8 --depth 3 --padding same --size 128    # in a minute on two CPU cores

The aim is 95 %: reading, feeding, preparing and augmenting images, and the loop itself, shall cost no more than a
twentieth of the speed. The network is the reference's by default, and a run on a GPU takes less than two minutes.

The bare step is `train_step` of the same network, loss and optimizer on one random batch that lies on the device, launched
step by step and waited for at the end of a run; its rate is the median of runs before and after the training. Where
these runs differ by more than the aim leaves, the machine had other work and the ratio says nothing.

The training is the library's own call, in the same process, on TIFFs that it reads from disk: 30 generated sections of
512 x 512 pixels in uint8 without --data. Its rate is the median over the intervals between evaluations after the first, in
which it compiles. What evaluations and checkpoints take is not in it; the rate with them, from the first evaluation to the
last, is given beside it.
"""

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import record
import rich.console
import tensorflow as tf

from unet_fast import _native, checkpoints, losses, training
from unet_fast.config import TrainConfig
from unet_fast.data import generate, pipeline, write_tiff
from unet_fast.errors import UserError
from unet_fast.evaluation import load_labelled

AIM = 0.95
RUNS, RUN_SECONDS = 3, 2.0  # of the bare step, before and after the training
SECTIONS, SIDE = 30, 512  # generated images
OPTIONS = ("filters", "depth", "padding", "size", "batch", "precision", "backend", "jit")  # of TrainConfig


class BareStep:
    """The training step of `config` without what feeds it. Calling it takes about RUN_SECONDS and returns images/s."""

    def __init__(self, config):
        dataset = load_labelled(config.data)
        classes, self._batch = dataset.spec.num_classes, config.batch
        model = training.network(config, dataset)
        jit = model.jit_compile
        # compile wraps the optimizer for mixed_float16 as `unet-fast train` does.
        loss = losses.DiceCrossEntropy(backend=config.backend)
        model.compile(training.AdamL2(config.lr, config.l2), loss, jit_compile=jit)
        self._step = tf.function(model.train_step, jit_compile=jit, autograph=False)
        images = tf.random.normal((config.batch, *model.input_shape[1:]))
        labels = tf.random.uniform((config.batch, *model.output_shape[1:3]), 0, classes, tf.int32)
        self._data = images, tf.cast(labels, tf.uint8)
        self._seconds(3)  # traces, compiles, tunes
        self._steps = max(3, round(3 * RUN_SECONDS / self._seconds(3)))

    def __call__(self):
        return self._batch * self._steps / self._seconds(self._steps)

    def _seconds(self, steps):
        begin = time.perf_counter()
        for _ in range(steps):
            result = self._step(self._data)
        float(result["loss"])
        return time.perf_counter() - begin


def train_rates(config, out):
    """images/s of a training: (median over the intervals after the first, over all of them with evaluations)."""
    training.train(config, out, console=rich.console.Console(quiet=True))
    with (Path(out) / checkpoints.HISTORY).open(newline="") as file:
        first, *rest = csv.DictReader(file)
    seconds = float(rest[-1]["seconds"]) - float(first["seconds"])
    steps = int(rest[-1]["step"]) - int(first["step"])
    return statistics.median(float(row["images_per_second"]) for row in rest), steps * config.batch / seconds


def measure(config, seconds, intervals):
    """The figures, a dict.

    Args:
        config: TrainConfig; its `steps` and `eval_every` are chosen here.
        seconds: how long the training would take at the bare step's rate.
        intervals: evaluations, at least 2.
    """
    begin = time.monotonic()
    bare = BareStep(config)
    runs = [bare() for _ in range(RUNS)]
    every = max(1, round(statistics.median(runs) * seconds / config.batch / intervals))
    options = {name: getattr(config, name) for name in OPTIONS}
    config = TrainConfig(data=config.data, steps=every * intervals, eval_every=every, **options)
    with tempfile.TemporaryDirectory() as folder:
        trained, overall = train_rates(config, Path(folder) / "run")
    runs += [bare() for _ in range(RUNS)]
    rate = statistics.median(runs)
    gpus = tf.config.list_physical_devices("GPU")
    return {
        "card": tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else "CPU",
        "driver": record.driver() if gpus else None,
        "versions": record.versions("tensorflow", "keras"),
        "fingerprint": _native.fingerprint,
        "streamed": pipeline.RESIDENT_BYTES == 0,
        **options,
        "steps": config.steps,
        "bare_img_s": round(rate, 2),
        "bare_runs_img_s": [round(r, 2) for r in runs],
        "bare_spread": round(max(runs) / min(runs) - 1, 4),
        "train_img_s": round(trained, 2),
        "train_with_evaluations_img_s": round(overall, 2),
        "ratio": round(trained / rate, 4),
        "aim": AIM,
        "wall_s": round(time.monotonic() - begin, 1),
    }


def write_data(folder):
    """ISBI-2012's layout of generated sections."""
    images, masks = generate(SECTIONS, size=(SIDE, SIDE))
    write_tiff(folder / "train-volume.tif", images[..., 0])
    write_tiff(folder / "train-labels.tif", masks * 255)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    precision = "mixed_float16" if tf.config.list_physical_devices("GPU") else "float32"
    parser.add_argument("--data", metavar="DIR", help="data folder as of `unet-fast train`; default: generated")
    parser.add_argument("--stream", action="store_true", help="as if the data were too large to lie on the device")
    parser.add_argument("--filters", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--depth", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument("--padding", default="valid", metavar="P", help="valid or same; default valid")
    parser.add_argument("--size", type=int, default=572, metavar="N", help="side of the input; default 572")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--precision", default=precision, metavar="P", help=f"dtype policy; default here {precision}")
    parser.add_argument("--backend", default="auto", metavar="B", help="auto, fused or stock; default auto")
    parser.add_argument("--jit", default="auto", metavar="J", help="auto, on or off; default auto")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of training, about; default 20")
    parser.add_argument("--intervals", type=int, default=4, metavar="N", help="evaluations, 2 or more; default 4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parsed = parser.parse_args(arguments)
    if parsed.intervals < 2:
        parser.error(f"--intervals: expected at least 2, for the first does not count; got {parsed.intervals}")
    if parsed.seconds <= 0:
        parser.error(f"--seconds: expected a positive time, got {parsed.seconds:g}")
    return parsed


def main(arguments=None):
    arguments = parse(arguments)
    keras.utils.set_random_seed(0)
    if arguments.stream:
        pipeline.RESIDENT_BYTES = 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is None:
            write_data(Path(folder))
        options = {name: getattr(arguments, name) for name in OPTIONS}
        try:
            config = TrainConfig(data=arguments.data or folder, **options)
            row = measure(config, arguments.seconds, arguments.intervals)
        except UserError as error:
            print(f"train_rate.py: {error}", file=sys.stderr)
            return 2
    print(
        f"{row['card']}, batch {row['batch']}, {row['precision']}: unet-fast train {row['train_img_s']:.1f} images/s "
        f"({row['train_with_evaluations_img_s']:.1f} with evaluations and checkpoints), "
        f"bare step {row['bare_img_s']:.1f} images/s, ratio {row['ratio']:.3f} (aim {AIM})"
    )
    if row["bare_spread"] > 1 - AIM:
        print(f"the bare step's runs differ by {row['bare_spread']:.0%}: repeat this on a machine without other work")
    if arguments.json:
        record.save(arguments.json, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
