"""Cross-validation: a run a fold, and the scores of all of them together.

The folder of a cross-validation:

    fold0, ...     the runs, each as `unet-fast train --fold` would have made it
    crossval.json  the options of all of them     split.json    the folds
    metrics.json   mean, standard deviation and each fold's value of every score, once all folds are finished
"""

import dataclasses
import gc
import math
import statistics
from pathlib import Path

import keras
import rich.console
import rich.table

from unet_fast import __version__, checkpoints, crossval, training
from unet_fast.checkpoints import METRICS, SPLIT
from unet_fast.config import TrainConfig, read_options
from unet_fast.errors import UserError
from unet_fast.evaluation import load_labelled

OPTIONS = checkpoints.CROSSVAL


def cross_validate(config, out, *, resume=False, console=None):
    """Train and score a network on each fold, or go on with that.

    Args:
        config: TrainConfig, whose `fold` does not matter; to go on, `load_options` with what is given anew.
        out: folder to write, new or empty; to go on, one that holds a cross-validation.
        resume: keep the folds that are finished, go on with one that was interrupted, and train the others.
        console: rich.console.Console to report to; None for standard output.

    Returns:
        dict, as `aggregate`, which metrics.json gets, too.

    Raises:
        UserError, unet_fast.training.Interrupted: as `unet_fast.training.train`; what was finished stays.

    >>> import os, tempfile
    >>> from unet_fast.config import TrainConfig
    >>> from unet_fast.crossval_runs import cross_validate
    >>> small = {"filters": 2, "depth": 1, "padding": "same", "size": 32, "steps": 1, "batch": 1}
    >>> out = tempfile.mkdtemp()
    >>> quiet = rich.console.Console(quiet=True)
    >>> result = cross_validate(TrainConfig(data="synthetic", folds=2, **small), out, console=quiet)
    >>> len(result["scores"]["dice"]["per_fold"]), sorted(os.listdir(out))[1:]
    (2, ['crossval.json', 'fold0', 'fold1', 'metrics.json', 'split.json'])
    """
    out, console = Path(out), console or rich.console.Console()
    if not resume:
        checkpoints.check_new(out)
    dataset = load_labelled(config.data, ignore_value=config.ignore_class)
    if not resume:
        folds = crossval.draw(dataset, num_folds=config.folds, split=config.split, group=config.group)
    with checkpoints.locked(out):
        if resume:
            folds = crossval.load_split(out / SPLIT, dataset.names)
        else:
            checkpoints.check_new(out)  # again, now that nobody else can fill it
            crossval.save_split(out / SPLIT, folds, dataset.names)
        _save_options(out, config)
        del dataset  # each run loads its own
        try:
            for fold in range(config.folds):
                _train_fold(config, out, fold, folds, console)
        except UserError:
            # Refused before anything was trained: the folder is as new as before.
            left = list(out.glob("fold*/*"))
            if all(path.name == checkpoints.LOCK for path in left):
                for path in left:
                    path.unlink()
                    path.parent.rmdir()
                (out / OPTIONS).unlink()
                (out / SPLIT).unlink()
            raise
        result = aggregate(out)
        checkpoints.write_json(out / METRICS, result)
        return result


def _train_fold(config, out, fold, folds, console):
    folder = fold_folder(out, fold)
    checkpoints.check_no_link(folder)
    resume = (folder / checkpoints.CONFIG).is_file()
    config = dataclasses.replace(config, fold=fold)
    if resume:
        changes = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata["resumable"]}
        if _is_finished(folder, config.steps):
            console.print(f"fold {fold} is finished", markup=False, highlight=False)
            return
        config = checkpoints.load_config(folder)[0].resumed(changes)
    elif folder.is_dir():
        (folder / SPLIT).unlink(missing_ok=True)  # of a run that was killed before it began
    try:
        training.train(config, folder, resume=resume, folds=folds, console=console)
    except training.Interrupted as error:
        where = str(error).split(";")[0]
        mend = f"go on with `unet-fast crossval --out {out} --resume`"
        raise training.Interrupted(f"fold {fold}: {where}; {mend}", error.signum) from error
    except UserError as error:
        raise error if str(folder) in str(error) else UserError(f"fold {fold}: {error}") from error
    finally:
        # The next fold's network needs this one's memory.
        keras.backend.clear_session()
        gc.collect()


def _is_finished(folder, steps):
    """Whether a run was trained so far and has its final scores; where in doubt, to go on with it does no harm."""
    history = checkpoints.read_history(folder)
    if not history or history[-1]["step"] < steps or not (folder / METRICS).is_file():
        return False
    return "images" in checkpoints.read_json(folder / METRICS)


def fold_folder(out, fold):
    """The folder of a fold's run.

    >>> from unet_fast.crossval_runs import fold_folder
    >>> fold_folder("runs/cells", 2).as_posix()
    'runs/cells/fold2'
    """
    return Path(out) / f"fold{fold}"


def _save_options(out, config):
    options = dataclasses.asdict(config)
    del options["fold"]
    if config.data != "synthetic":
        options["data"] = str(Path(config.data).resolve())
    if config.sample_weights:
        options["sample_weights"] = str(Path(config.sample_weights).resolve())
    checkpoints.write_json(out / OPTIONS, {**options, "version": __version__})


def load_options(out):
    """The options of a cross-validation, TrainConfig.

    Raises:
        UserError: `out` holds none.
    """
    out = Path(out)
    if not (out / OPTIONS).is_file():
        found = "no such folder" if not out.exists() else f"no {OPTIONS} in it"
        raise UserError(
            f"{out}: expected the folder of a cross-validation, found {found}; give the --out of `unet-fast crossval`"
        )
    options = read_options(out / OPTIONS)
    if "data" not in options:
        raise UserError(f"{out / OPTIONS}: names no data; restore it")
    try:
        return TrainConfig(**options)
    except UserError as error:
        raise UserError(f"{out / OPTIONS}: {error}") from error


def aggregate(out):
    """The scores of all folds together.

    Args:
        out: folder of a cross-validation, all of whose folds are finished.

    Returns:
        dict: `samples` and `step`, lists, of each fold the number of its validation images and the step of its best model;
        `unit` of HD95, None where images differ in it; and `scores`, by the names of `unet_fast.evaluation.score`: `mean`
        over the folds, `sd`, their standard deviation (of a sample, n - 1), and `per_fold`. Those of the classes are
        lists a class, in `per_fold` a fold a list. A fold where a score is not defined is left out of its mean.

    Raises:
        UserError: a fold is missing or has no final scores.
    """
    folds = [checkpoints.read_json(fold_folder(out, fold) / METRICS) for fold in range(load_options(out).folds)]
    for number, fold in enumerate(folds):
        if "images" not in fold:
            raise UserError(f"{fold_folder(out, number)}: is not finished; go on with --resume")
    scores = {}
    for name, first in folds[0].items():
        if name in ("fold", "step", "samples", "images"):
            continue
        values = [fold[name] for fold in folds]
        if isinstance(first, list):
            each = [_mean_and_sd(column) for column in zip(*values, strict=True)]
            mean, sd = ([pair[i] for pair in each] for i in (0, 1))
        else:
            mean, sd = _mean_and_sd(values)
        scores[name] = {"mean": mean, "sd": sd, "per_fold": values}
    units = {image["unit"] for fold in folds for image in fold["images"]}
    return {
        "samples": [fold["samples"] for fold in folds],
        "step": [fold.get("step") for fold in folds],
        "unit": units.pop() if len(units) == 1 else None,
        "scores": scores,
    }


def _mean_and_sd(values):
    known = [value for value in values if value is not None]
    mean = math.fsum(known) / len(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def mean_text(mean, sd):
    """A mean and its standard deviation as they are printed.

    >>> from unet_fast.crossval_runs import mean_text
    >>> mean_text(0.89021, 0.00123), mean_text(0.5, None), mean_text(None, None)
    ('0.8902 ± 0.0012', '0.5000', '-')
    """
    return "-" if mean is None else f"{mean:.4f}" + ("" if sd is None else f" ± {sd:.4f}")


def show(result, title, console):
    """Print tables of the classes and of the folds.

    Args:
        result: as `aggregate`.
        title: line above them.
        console: rich.console.Console.
    """
    scores, unit = result["scores"], f" ({result['unit']})" if result["unit"] else ""

    def text(name, k=None):
        mean, sd = scores[name]["mean"], scores[name]["sd"]
        return mean_text(mean, sd) if k is None else mean_text(mean[k], sd[k])

    def table(headings, rows, last=None):
        made = rich.table.Table()
        for i, heading in enumerate(headings):
            made.add_column(heading, justify="right" if i else "left", overflow="fold")
        for row in rows:
            made.add_row(*row)
        if last:
            made.add_section()
            made.add_row(*last)
        console.print(made)

    console.print(title)
    measures = {"dice": "Dice", "iou": "IoU", "hd95": f"HD95{unit}", "nsd": "NSD"}
    classes = range(len(scores["dice_per_class"]["mean"]))
    table(
        ("class", *measures.values()),
        [[str(k), *(text(f"{name}_per_class", k) for name in measures)] for k in classes],
        ["mean", *map(text, measures)],
    )
    console.print(f"cross-entropy {text('cross_entropy')}, soft Dice {text('soft_dice')}")
    error, split, merge = map(text, ("adapted_rand_error", "voi_split", "voi_merge"))
    console.print(f"adapted Rand error {error}, VOI split {split}, VOI merge {merge}")
    columns = {"soft_dice": "soft Dice", **measures, "adapted_rand_error": "Rand error"}
    table(
        ("fold", "images", "best step", *columns.values()),
        [
            [str(fold), str(samples), str(step), *(mean_text(scores[name]["per_fold"][fold], None) for name in columns)]
            for fold, (samples, step) in enumerate(zip(result["samples"], result["step"], strict=True))
        ],
    )
