"""The command line, `unet-fast`: train, evaluate, predict, export, import-checkpoint, info.

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

    export = command(
        "export",
        _export,
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
            _import_checkpoint,
            "make a run of UNet_Medical's weights",
            "Make a run of a checkpoint of NVIDIA's UNet_Medical, TensorFlow 1 or 2, or of a Keras file of its network, "
            "for evaluate, predict and export.",
        )
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


def _add_train(parser):
    parser.add_argument("--out", metavar="RUN", default=argparse.SUPPRESS, help="folder to write; new or empty")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in RUN and its options; only --data, --steps, --jit and --backend may be given anew",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help='JSON object of these options, such as {"steps": 300, "eval_every": 50}; the command line wins over it',
    )
    groups = {}
    for field in dataclasses.fields(TrainConfig):
        about = field.metadata
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

    given = read_options(options.config, extra=("out",)) if options.config else {}
    given |= {key: value for key, value in vars(options).items() if key not in ("command", "config", "resume")}
    out = given.pop("out", None)
    if not isinstance(out, str):
        raise UserError("train: expected --out RUN, the folder to write; give it")
    if options.resume:
        config = checkpoints.load_config(out)[0].resumed(given)
    elif "data" not in given:
        raise UserError("train: expected --data, a data folder or the word synthetic; give it")
    else:
        config = TrainConfig(**given)
    scores = training.train(config, out, resume=options.resume)
    _print_scores(scores, f"{out}/{checkpoints.MODEL}, of step {scores['step']}, on validation fold {scores['fold']}")


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


def _export(options):
    from unet_fast import export

    done = export.export_run(options.run, options.format, options.output, precision=options.precision)
    facts = done.facts
    low, high = (f"{value:g}" for value in facts.value_range)
    print(f"wrote {done.path}, which computes in {facts.precision}")
    print(
        f"input {export.INPUT}: float32 [batch, height, width, {facts.channels}], pixel values as in the training's "
        f"{facts.image_dtype} images ({low} to {high}); height and width {facts.sizes}"
    )
    if facts.scale != (1.0, 1.0):
        print(f"resize images by {facts.scale[0]:g} (height) and {facts.scale[1]:g} (width) before, as training did")
    smaller = f", {facts.margin} pixels smaller on each side" if facts.margin else ""
    values = ", ".join(map(str, facts.mask_values))
    print(
        f"output {export.OUTPUT}: float32 [batch, height, width, {len(facts.mask_values)}]{smaller}; the classes are "
        f"{values} in the training's masks"
    )
    for size, difference in done.differences.items():
        print(f"largest difference from the run's model, {size}: {difference:.1e}")


def _import_checkpoint(options):
    from unet_fast import migration

    try:
        values = options.mask_values and tuple(map(int, options.mask_values.split(",")))
    except ValueError as error:
        raise UserError(
            f"expected --mask-values to be whole numbers with commas between, got {options.mask_values!r}; correct it"
        ) from error
    names = ("data", "split", "fold", "padding", "size", "precision", "image_dtype", "value_range")
    arguments = {name: getattr(options, name) for name in names}
    done = migration.import_checkpoint(
        options.path, options.out, image_size=tuple(options.image_size), mask_values=values, **arguments
    )
    model = done.model
    print(f"{done.kind}: took {done.variables} variables, left {done.skipped} of the optimizer and the like")
    print(
        f"{model.count_params():,} parameters: filters {model.filters}, depth {model.depth}, padding {model.padding}, "
        f"{model.upsampling}, {model.num_classes} classes; input {model.input_shape[1]}, output {model.output_shape[1]}"
    )
    if done.difference is not None:
        print(f"largest difference from the file's own model, on a random image: {done.difference:.1e}")
    print(f"wrote {options.out}")


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
