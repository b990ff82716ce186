"""The command line, `unet-fast`: train, crossval, evaluate, predict, tune, report, export, import-checkpoint, info.

TensorFlow is imported only once the arguments are known to be good, so that help and a mistyped option answer at once.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import tempfile

from unet_fast import __version__, commands
from unet_fast.config import TrainConfig, flag, numbers
from unet_fast.errors import UserError

_DESCRIPTIONS = {
    "data": "A data folder is ISBI-2012's three TIFFs, or images/ and masks/ with equal names.",
    "network": "The defaults are the network of the U-Net paper: 572 pixels in, 388 out.",
    "augmentation": "All of it is drawn anew for each image and step.",
    "training": "The defaults are the recipe of NVIDIA's UNet_Medical.",
    "engine": None,
}


def main(argv=None):
    """Run a command.

    Args:
        argv: arguments without the program's name; None for the process's own.

    Returns:
        exit status: 0; 1 if info's self-test fails; 2 for a mistake of the user's, which one line on standard error
        explains; 128 and the signal's number if a signal ended it.

    >>> from unet_fast.cli import main
    >>> main(["evaluate", "--run", "no/such/run"])
    2
    """
    try:
        options = _parser().parse_args(argv)
        _prepare_tensorflow("3" if getattr(options, "hosts", None) or os.environ.get("TF_CONFIG") else "2")
        status = options.command(options) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(error)
    except BrokenPipeError:  # whoever read what is printed has left, as `head` does: nothing that one needs be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds to print
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder that vanished
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except MemoryError:
        return _fail(
            "this computer's memory does not suffice; use a smaller --batch, --size or --tile, or smaller images"
        )
    except Exception as error:
        import tensorflow as tf

        mistake = re.search(r"UserError: (.*)", str(error))
        if isinstance(error, tf.errors.OpError) and mistake:  # of a file that TensorFlow's threads were reading
            return _fail(mistake[1])
        if not isinstance(error, tf.errors.ResourceExhaustedError):
            raise
        return _fail(
            "the device's memory does not suffice; use a smaller --batch, --size or --tile, or mixed precision"
        )
    except KeyboardInterrupt as error:
        print(f"unet-fast: {error or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "signum", 2)


def _fail(message):
    print(f"unet-fast: error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    return 2


def _prepare_tensorflow(level):
    """Imports TensorFlow without its start-up messages, unless the user has set how much of them to see.

    Args:
        level: what is left out after that, up to warnings ("2") or up to errors ("3"). On the loss of a worker all others
            tell of it and of all that it stops, which we say in one line.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever the user's other programs run on
    if "tensorflow" in sys.modules or "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = level  # which counts only from somewhere within the import on
    with _stderr_held_back():
        import tensorflow as tf

        tf.config.list_physical_devices()  # a machine without a GPU says so at length
    tf.get_logger().setLevel("ERROR")


@contextlib.contextmanager
def _stderr_held_back():
    """Keeps what C++ code writes to standard error, too, from showing, but for an error's sake."""
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            held.seek(0)
            os.write(shown, held.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser():
    parser = _Parser(
        prog="unet-fast", description="Train, check and use U-Nets for image segmentation.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"unet-fast {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, help, description):
        added = subparsers.add_parser(name, help=help, description=description, allow_abbrev=False)
        added.set_defaults(command=run)
        return added

    _add_train(
        command(
            "train",
            commands.train,
            "train a network on a folder of images and masks",
            "Train a network. RUN receives the best model, a checkpoint to resume from, scores and pictures.",
        )
    )
    _add_train(
        command(
            "crossval",
            commands.crossval,
            "train a network on each fold",
            "Train a network on each fold of the data. OUT receives the runs, fold0 and so on, and the scores of all.",
        ),
        one_fold=False,
    )

    evaluate = command(
        "evaluate",
        commands.evaluate,
        "score a trained network",
        "Score a run's best model on its validation fold, and record that in RUN/metrics.json; or on another folder.",
    )
    _add_run(evaluate)
    evaluate.add_argument("--data", metavar="DIR", help="score all images of this folder instead, with their masks")
    evaluate.add_argument(
        "--tolerance",
        metavar="X",
        type=float,
        help="distance of two outlines that NSD takes for none, in units of the images' spacing (default: one pixel)",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")

    predict = command(
        "predict",
        commands.predict,
        "segment new images",
        "Segment images of any size with a run's best model, or an ensemble of several runs'. Labels are those of the "
        "training's masks.",
    )
    predict.add_argument(
        "--run",
        metavar="RUN",
        required=True,
        action="append",
        help="folder that `unet-fast train` wrote, or a folder of such folders; given more than once, and of several "
        "runs, the probabilities are averaged",
    )
    predict.add_argument("--input", metavar="PATH", required=True, help="TIFF, PNG or NIfTI file, or a folder of them")
    predict.add_argument(
        "--output", metavar="PATH", required=True, help="file or folder to write; nothing there is overwritten"
    )
    predict.add_argument(
        "--tile", metavar="N", type=int, help="side of the network's input in pixels (default: as in training)"
    )
    predict.add_argument(
        "--overlap",
        metavar="SHARE",
        type=float,
        help="share of a tile that the next one covers again, in [0, 1), for padding same; tiles of valid fit together "
        "without (default: 0.5)",
    )
    predict.add_argument("--tta", action="store_true", help="average over four flips: slower, a little better")
    predict.add_argument(
        "--probabilities",
        action="store_true",
        help="write each class's probability, as float32 TIFF or NIfTI, instead of labels",
    )

    tune = command(
        "tune",
        commands.tune,
        "measure which engine and tile is the fastest for each layer on this GPU",
        "Measure on this machine's GPU on which engine and tile each convolution of a network is the fastest, forward and "
        "backward, and record that for all programs that start later. The defaults are the reference network's.",
    )
    tune.add_argument("--run", metavar="RUN", help="the network of this run; then no option of the network is taken")
    tune.add_argument("--batch", metavar="N", type=int, nargs="+", default=[8, 1], help="images a step (default: 8 1)")
    tune.add_argument(
        "--precision",
        choices=("mixed_float16", "mixed_bfloat16"),
        help="dtype policy (default: mixed_float16, or RUN's)",
    )
    for name in commands.TUNED:
        field = TrainConfig.__dataclass_fields__[name]
        about = field.metadata
        tune.add_argument(
            flag(field), type=about["kind"], metavar=about["metavar"], choices=about["choices"], help=about["help"]
        )
    tune.add_argument("--json", action="store_true", help="print each product's times as JSON instead of a table")

    report = command(
        "report",
        commands.report,
        "write a page about a run",
        "Write one HTML page of a run, or of a cross-validation: scores, curves, best and worst images, settings.",
    )
    report.add_argument("--run", metavar="RUN", required=True, help="folder that `unet-fast train` or `crossval` wrote")
    report.add_argument(
        "--output",
        metavar="FILE",
        help="file to write; nothing there is overwritten (default: RUN/report.html, renewed)",
    )
    report.add_argument("--data", metavar="DIR", help="the run's data, if they have moved")
    report.add_argument(
        "--images",
        metavar="N",
        type=int,
        default=3,
        help="how many of the best and how many of the worst images to show (default: %(default)s)",
    )

    export = command(
        "export",
        commands.export,
        "write a run's network for other programs",
        "Write a run's best model as a SavedModel or as ONNX, and compare what it computes with the run's own model.",
    )
    _add_run(export)
    export.add_argument(
        "--format",
        required=True,
        choices=("savedmodel", "savedmodel-fused", "onnx"),
        help="SavedModel of TensorFlow's own ops, SavedModel of the fused ops, or ONNX",
    )
    export.add_argument(
        "--output", metavar="PATH", required=True, help="folder (SavedModel) or .onnx file to write; new"
    )
    export.add_argument(
        "--precision",
        choices=("float32", "float16", "bfloat16"),
        help="what to compute in (default: the run's own for savedmodel-fused, else float32)",
    )

    _add_import(
        command(
            "import-checkpoint",
            commands.import_checkpoint,
            "make a run of UNet_Medical's weights",
            "Make a run of a checkpoint of NVIDIA's UNet_Medical, TensorFlow 1 or 2, or of a Keras file of its network, "
            "for evaluate, predict and export.",
        )
    )

    info = command(
        "info",
        commands.info,
        "say what is installed, what runs here, and test it",
        "Say what was built, what this machine has and what runs on it, and test every op. Exit status 1 if one fails.",
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of tables")
    info.add_argument(
        "--layers",
        action="store_true",
        help="also say on which engine each convolution of the reference network runs, and why; without a GPU, on which "
        "it would on the first architecture that was built for",
    )
    info.add_argument("--batch", type=int, default=8, help="images a step, for --layers (default: %(default)s)")
    return parser


def _add_run(parser):
    parser.add_argument("--run", metavar="RUN", required=True, help="folder that `unet-fast train` wrote")


def _add_train(parser, one_fold=True):
    """The options of `TrainConfig`; without `one_fold` those of all folds alike."""
    out, what = ("RUN", "the run in RUN") if one_fold else ("OUT", "the folds in OUT that are not finished")
    parser.add_argument("--out", metavar=out, default=argparse.SUPPRESS, help="folder to write; new or empty")
    anew = [flag(field) for field in dataclasses.fields(TrainConfig) if field.metadata["resumable"]]
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"go on with {what} and its options; only {', '.join(anew[:-1])} and {anew[-1]} may be given anew",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help='JSON object of these options, such as {"steps": 300, "eval_every": 50}; the command line wins over it',
    )
    if one_fold:
        _add_workers(parser)
    groups = {}
    for field in dataclasses.fields(TrainConfig):
        about = field.metadata
        if field.name == "fold" and not one_fold:
            continue
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"], _DESCRIPTIONS[about["group"]])
        text = about["help"]
        if field.default not in (None, dataclasses.MISSING) and about["kind"] is not bool:
            text += f" (default: {field.default})"
        # What is not given is absent, so that a config file's value is not overruled by a default.
        arguments = {"default": argparse.SUPPRESS, "help": text}
        if about["kind"] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            kind = numbers if about["kind"] is tuple else about["kind"]
            arguments |= {"type": kind, "metavar": about["metavar"], "choices": about["choices"]}
        groups[about["group"]].add_argument(flag(field), **arguments)


def _add_workers(parser):
    workers = parser.add_argument_group("several machines", "The same command on each; the first host writes RUN.")
    workers.add_argument(
        "--hosts",
        metavar="HOST:PORT,...",
        default=argparse.SUPPRESS,
        help="all workers, one a machine; the environment variable TF_CONFIG says the same",
    )
    workers.add_argument(
        "--host-index",
        metavar="I",
        type=int,
        default=argparse.SUPPRESS,
        help="which of the hosts this one is, from 0 (default: found by its addresses)",
    )
    workers.add_argument(
        "--join-timeout",
        metavar="SECONDS",
        type=float,
        default=argparse.SUPPRESS,
        help="how long to wait for the other hosts at the start (default: 60)",
    )


def _add_import(parser):
    parser.add_argument(
        "path",
        metavar="PATH",
        help="TensorFlow checkpoint (its folder, or PREFIX of PREFIX.index), .keras, .h5 or .weights.h5 file",
    )
    parser.add_argument("--out", metavar="RUN", required=True, help="folder to write; new or empty")
    network = parser.add_argument_group("network", "What shapes and names do not tell.")
    network.add_argument(
        "--padding",
        choices=("valid", "same"),
        help="of the 3x3 convolutions (default: valid, or what a Keras file says)",
    )
    network.add_argument(
        "--size",
        metavar="N",
        type=int,
        help="side of the network's input in pixels (default: 572, or what a Keras file says; for padding same the "
        "largest that fits the images)",
    )
    network.add_argument(
        "--precision",
        choices=("float32", "mixed_float16", "mixed_bfloat16"),
        default="float32",
        help="dtype policy (default: %(default)s)",
    )
    images = parser.add_argument_group("images", "Those that it was trained on. The defaults are those of ISBI 2012.")
    images.add_argument(
        "--data", metavar="DIR", help="data folder, or the word synthetic; it tells all of the following"
    )
    images.add_argument(
        "--split",
        choices=("partition", "nvidia"),
        default="nvidia",
        help="with --data: the folds (default: %(default)s)",
    )
    images.add_argument(
        "--fold", metavar="K", type=int, default=0, help="with --data: fold to validate on (default: %(default)s)"
    )
    images.add_argument(
        "--image-size",
        metavar=("HEIGHT", "WIDTH"),
        nargs=2,
        type=int,
        default=(512, 512),
        help="before they were resized (default: 512 512)",
    )
    images.add_argument("--image-dtype", choices=("uint8", "uint16", "float32"), default="uint8", help="default: uint8")
    images.add_argument(
        "--value-range",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
        help="pixel values that became -1 and 1 (default: 0 and the type's greatest)",
    )
    images.add_argument(
        "--mask-values",
        metavar="VALUES",
        help="what masks hold for each class, such as 0,128,255 (default: 0,255 of two classes, else 0,1,2 and so on)",
    )
