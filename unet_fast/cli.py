"""The command line, `unet-fast`: train, evaluate, predict, tune, info.
"""The command line, `unet-fast`: train, crossval, evaluate, predict, report, info.

TensorFlow is imported only once the arguments are known to be good, so that help and a mistyped option answer at once.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import tempfile

from unet_fast import __version__
from unet_fast.config import TrainConfig, flag, read_options
from unet_fast.errors import UserError

_DESCRIPTIONS = {
    "data": "A data folder is ISBI-2012's three TIFFs, or images/ and masks/ with equal names.",
    "network": "The defaults are the network of the U-Net paper: 572 pixels in, 388 out.",
    "training": "The defaults are the recipe of NVIDIA's UNet_Medical.",
    "engine": None,
}
_TUNED = ("size", "filters", "depth", "padding", "upsampling")  # of TrainConfig: what a network's products depend on


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
        _prepare_tensorflow()
        return options.command(options) or 0
    except UserError as error:
        return _fail(error)
    except OSError as error:  # a full disk, a folder that vanished
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
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


def _prepare_tensorflow():
    """Imports TensorFlow without its start-up messages, unless the user has set how much of them to see."""
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever the user's other programs run on
    if "tensorflow" in sys.modules or "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # which counts only from somewhere within the import on
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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, help, description):
        added = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
        added.set_defaults(command=run)
        return added

    _add_train(
        command(
            "train",
            _train,
            "train a network on a folder of images and masks",
            "Train a network. RUN receives the best model, a checkpoint to resume from, scores and pictures.",
        )
    )
    _add_train(
        command(
            "crossval",
            _crossval,
            "train a network on each fold",
            "Train a network on each fold of the data. OUT receives the runs, fold0 and so on, and the scores of all.",
        ),
        one_fold=False,
    )

    evaluate = command(
        "evaluate",
        _evaluate,
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
        _predict,
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
        _tune,
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
    for name in _TUNED:
        field = TrainConfig.__dataclass_fields__[name]
        about = field.metadata
        tune.add_argument(
            flag(field), type=about["kind"], metavar=about["metavar"], choices=about["choices"], help=about["help"]
        )
    report = command(
        "report",
        _report,
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

    info = command(
        "info",
        _info,
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
            arguments |= {"type": about["kind"], "metavar": about["metavar"], "choices": about["choices"]}
        groups[about["group"]].add_argument(flag(field), **arguments)


def _train(options):
    from unet_fast import checkpoints, training

    given, out = _given(options, "train", "RUN")
    config = checkpoints.load_config(out)[0].resumed(given) if options.resume else TrainConfig(**given)
    scores = training.train(config, out, resume=options.resume)
    _print_scores(scores, f"{out}/{checkpoints.MODEL}, of step {scores['step']}, on validation fold {scores['fold']}")


def _crossval(options):
    import rich.console

    from unet_fast import crossval_runs

    given, out = _given(options, "crossval", "OUT")
    given.pop("fold", None)  # of a run's own config
    config = crossval_runs.load_options(out).resumed(given) if options.resume else TrainConfig(**given)
    result = crossval_runs.cross_validate(config, out, resume=options.resume)
    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
    crossval_runs.show(result, f"{out}, {config.folds} folds: mean ± standard deviation", console)


def _given(options, command, metavar):
    """The options of a training from the config file and the command line, and the folder to write."""
    given = read_options(options.config, extra=("out",)) if options.config else {}
    given |= {key: value for key, value in vars(options).items() if key not in ("command", "config", "resume")}
    out = given.pop("out", None)
    if not isinstance(out, str):
        raise UserError(f"{command}: expected --out {metavar}, the folder to write; give it")
    if "data" not in given and not options.resume:
        raise UserError(f"{command}: expected --data, a data folder or the word synthetic; give it")
    return given, out


def _evaluate(options):
    from unet_fast import evaluation

    scores = evaluation.evaluate_run(options.run, options.data, tolerance=options.tolerance)
    if options.json:
        _print_json(scores)
    else:
        what = options.data or f"validation fold {scores['fold']}"
        _print_scores(scores, f"{options.run}, {what}, {scores['samples']} images", each=True)


def _print_scores(scores, title, each=False):
    """Prints a table of the classes and, with `each`, one of the images."""
    import rich.console
    import rich.table

    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)

    def show(headings, rows, last=None):
        table = rich.table.Table()
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i else "left", overflow="fold")  # a name is not cut
        for row in rows:
            table.add_row(*row)
        if last:
            table.add_section()
            table.add_row(*last)
        console.print(table)

    def numbers(values):
        return ["-" if value is None else f"{value:.4f}" for value in values]

    def mean(values):
        return sum(values) / len(values)

    images = scores["images"]
    units = {image["unit"] for image in images}
    unit = f" ({units.pop()})" if len(units) == 1 else ""
    measures = ("dice", "iou", "hd95", "nsd")
    columns = list(zip(*(scores[f"{name}_per_class"] for name in measures), strict=True))
    console.print(title)
    show(
        ("class", "Dice", "IoU", f"HD95{unit}", "NSD"),
        [[str(k), *numbers(values)] for k, values in enumerate(columns)],
        ["mean", *numbers(scores[name] for name in measures)],
    )
    objects = ("adapted_rand_error", "voi_split", "voi_merge")
    error, split, merge = numbers(scores[name] for name in objects)
    console.print(f"cross-entropy {scores['cross_entropy']:.4f}, soft Dice {scores['soft_dice']:.4f}")
    console.print(f"adapted Rand error {error}, VOI split {split}, VOI merge {merge}")
    if each:
        show(
            ("image", "Dice", "IoU", f"HD95{unit}", "NSD", "Rand error", "VOI split", "VOI merge"),
            [
                [
                    image["name"],
                    *numbers([mean(image[f"{name}_per_class"]) for name in measures]),
                    *numbers([image[name] for name in objects]),
                ]
                for image in images
            ],
        )


def _print_json(content):
    import json

    print(json.dumps(content, indent=1, allow_nan=False))


def _predict(options):
    import rich.console
    import rich.progress

    from unet_fast import checkpoints, inference

    runs = checkpoints.load_runs(options.run)
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("predicting", total=None)
        written = inference.predict_files(
            runs,
            options.input,
            options.output,
            tile=options.tile,
            overlap=options.overlap,
            tta=options.tta,
            probabilities=options.probabilities,
            on_start=lambda files: progress.update(task, total=files),
            on_progress=lambda done: progress.update(task, completed=done),
        )
    print(f"wrote {written[0]}" if len(written) == 1 else f"wrote {len(written)} files to {options.output}")


def _tune(options):
    import tensorflow as tf

    from unet_fast import FusedUNet, checkpoints, tuning

    tf.config.set_visible_devices([], "GPU")  # whose memory TensorFlow would take, all of it
    given = {name: getattr(options, name) for name in _TUNED if getattr(options, name) is not None}
    if options.run and given:
        raise UserError(
            f"tune: expected --run or options of a network, got both (--{next(iter(given))}); leave one out"
        )
    if min(options.batch) < 1:
        raise UserError(f"tune: expected --batch of at least 1, got {min(options.batch)}")
    precision = options.precision
    if options.run:
        config = checkpoints.load_config(options.run)[0]
        if precision is None and config.precision == "float32":
            raise UserError(f"tune: {options.run} is in float32, which runs on stock TensorFlow; give --precision")
        precision = precision or config.precision
        given = {name: getattr(config, name) for name in _TUNED}
    size = given.pop("size", 572)
    model = FusedUNet((size, size, 1), backend="fused", **given)
    tuning.tune(model, options.batch, (precision or "mixed_float16").removeprefix("mixed_"))
def _report(options):
    from unet_fast import report_page

    written = report_page.write_report(options.run, options.output, data=options.data, images=options.images)
    print(f"wrote {written}")


def _info(options):
    from unet_fast import info

    if options.batch < 1:
        raise UserError(f"expected --batch of at least 1, got {options.batch}")
    collected = info.collect(layers_batch=options.batch if options.layers else None)
    if options.json:
        _print_json(collected)
    else:
        info.show(collected)
    return 0 if collected["self_test_passed"] else 1
