"""The folder of a run: what lies where, who may write to it, and how training goes on from it.

    model.keras    the best model so far, by the mean hard Dice on the validation fold
    last/          state.npz: everything that training needs to go on as if it had never stopped
    config.json    the options, and what the model has to know about its data
    split.json     the folds         history.csv, history.json   a line an evaluation
    metrics.json   of model.keras    curves.png, overlays.png
    sample_weights.csv               tensorboard/                where they were asked for

Every file is written beside its place and moved there, so that a reader and a kill find the old or the new one, whole.
"""

import contextlib
import csv
import dataclasses
import fcntl
import json
import math
import os
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from unet_fast import archives, json_file
from unet_fast.config import TrainConfig, read_options
from unet_fast.data.files import atomic_path
from unet_fast.environment import environment
from unet_fast.errors import UserError
from unet_fast.models import FusedUNet

MODEL, STATE, CONFIG, SPLIT = "model.keras", "last/state.npz", "config.json", "split.json"
HISTORY, HISTORY_JSON, METRICS = "history.csv", "history.json", "metrics.json"
CURVES, OVERLAYS, SAMPLE_WEIGHTS, TENSORBOARD = "curves.png", "overlays.png", "sample_weights.csv", "tensorboard"
CROSSVAL = "crossval.json"  # of a folder of runs, see `unet_fast.crossval_runs`
LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What a trained model has to know about the images that it was trained on.

    Attributes:
        layout, num_classes, value_range, mask_values, ignore_value: as in `unet_fast.data.DatasetSpec`.
        image_shape: (height, width, channels) of an image before it was resized.
        image_dtype: "uint8", "uint16" or "float32".
    """

    layout: str
    num_classes: int
    value_range: tuple[float, float]
    image_shape: tuple[int, int, int]
    image_dtype: str
    mask_values: tuple[int, ...]
    ignore_value: int | None = None

    def __post_init__(self):
        """Raises ValueError for what cannot be: a config file may have been written by anything."""

        def whole(values, least, most):
            return isinstance(values, tuple) and all(type(v) is int and least <= v <= most for v in values)

        low, high = self.value_range
        wrong = [
            name
            for name, right in (
                ("num_classes", type(self.num_classes) is int and 1 <= self.num_classes <= 2**16),
                ("value_range", math.isfinite(low) and math.isfinite(high) and low < high),
                ("image_shape", len(self.image_shape) == 3 and whole(self.image_shape, 1, 2**31)),
                ("image_dtype", self.image_dtype in ("uint8", "uint16", "float32")),
                ("mask_values", whole(self.mask_values, 0, 2**16 - 1) and len(self.mask_values) == self.num_classes),
                ("ignore_value", self.ignore_value is None or whole((self.ignore_value,), 0, 2**16 - 1)),
            )
            if not right
        ]
        if wrong:
            raise ValueError(f"{wrong[0]} of its data cannot be {_one_line(repr(getattr(self, wrong[0])))}")

    @classmethod
    def of(cls, dataset):
        """The facts of a `unet_fast.data.Dataset`."""
        spec = dataset.spec
        images = dataset.images
        shape, dtype = tuple(images.shape[1:]), images.dtype.name
        return cls(spec.layout, spec.num_classes, spec.value_range, shape, dtype, spec.mask_values, spec.ignore_value)

    def check(self, images, name):
        """Raises UserError unless images [..., H, W, C] have the channels and the type of those trained on."""
        channels = self.image_shape[2]
        if images.shape[-1] != channels or images.dtype.name != self.image_dtype:
            raise UserError(
                f"{name}: expected images like the training's, {self.image_dtype} with {channels} channel(s), got "
                f"{images.dtype.name} with {images.shape[-1]}; convert them"
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run: `model` (the best), its options and its data's facts."""

    path: Path
    model: FusedUNet
    config: TrainConfig
    facts: DataFacts


def load_run(path):
    """Load a run to use its model.

    Args:
        path: folder that `unet-fast train` wrote.

    Returns:
        Run.

    Raises:
        UserError: no such folder, no run in it, no model yet, or a damaged file.

    Example: see `unet_fast.inference.predict_files`.
    """
    path = Path(path)
    config, facts = load_config(path)
    if not (path / MODEL).is_file():
        raise UserError(f"{path}: holds no {MODEL} yet; train until the first evaluation")
    try:
        archives.check_model(path / MODEL)
        model = keras.models.load_model(path / MODEL, compile=False)
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path / MODEL}: {error}") from error
    except Exception as error:  # whatever zipfile, HDF5 and Keras raise on damaged bytes
        raise UserError(f"{path / MODEL}: damaged, or of another version ({_one_line(error)}); train again") from error
    channels = facts.image_shape[2]
    options = {name: getattr(config, name) for name in ("filters", "depth", "padding", "upsampling")}
    options |= {"input_shape": (config.size, config.size, channels), "num_classes": facts.num_classes}
    for name, value in options.items():
        if (found := model.get_config()[name]) != value:
            raise UserError(
                f"{path / MODEL}: expected a network like that of {CONFIG}, with {name} {value}, got {found}; restore both "
                "files of one training"
            )
    set_jit(model, config)
    return Run(path, model, config, facts)


def load_runs(paths):
    """Load the runs of an ensemble.

    Args:
        paths: folders of runs, or of folders of runs, such as a cross-validation's.

    Returns:
        list of Run, at least one.

    Raises:
        UserError: as `load_run`.

    Example:
        load_runs(["runs/crossval"])
    """
    folders = []
    for path in map(Path, paths):
        inner = [] if (path / MODEL).is_file() else sorted(file.parent for file in path.glob(f"*/{MODEL}"))
        if (path / CROSSVAL).is_file() and not (path / METRICS).is_file():
            raise UserError(
                f"{path}: this cross-validation is not finished; go on with `unet-fast crossval --out {path} --resume`, or "
                "name runs in it"
            )
        folders += inner or [path]
    return [load_run(folder) for folder in folders]


def set_jit(model, config):
    """Makes `model.jit_compile`, which Keras decides by itself where it is not set, what the options say."""
    if config.jit != "auto":
        model.jit_compile = config.jit == "on"


def save_config(path, config, facts, version, *, imported=False):
    """Write a run's config.json; `imported` marks a model that was trained elsewhere."""
    about = {"dataset": dataclasses.asdict(facts), "version": version, "environment": environment()}
    about |= {"imported": True} if imported else {}
    write_json(path / CONFIG, {**dataclasses.asdict(config), **about})


def check_trained_here(path):
    """Raises UserError unless the run in `path` was trained by `unet-fast train`: an imported one cannot go on."""
    if read_json(Path(path) / CONFIG).get("imported"):
        raise UserError(f"{path}: holds an imported model, which has no training to go on with; train a new run")


def load_config(path):
    """Read a run's config.json: (TrainConfig, DataFacts).

    Raises:
        UserError: no run there, or a damaged file.
    """
    path = Path(path)
    file = path / CONFIG
    if not file.is_file():
        found = "no such folder" if not path.exists() else f"no {CONFIG} in it"
        if (path / CROSSVAL).is_file():
            raise UserError(
                f"{path}: is a cross-validation's folder; give one of the runs in it, such as {path / 'fold0'}"
            )
        raise UserError(f"{path}: expected the folder of a run, found {found}; give the --out of `unet-fast train`")
    options = read_options(file)
    try:
        facts = read_json(file)["dataset"]
        if not isinstance(facts, dict):
            raise TypeError("no facts about its data")
        if "mask_values" not in facts:
            raise UserError(
                f"{file}: written by an earlier version, which did not record the values of the masks; train again, or add "
                'them to "dataset", such as "mask_values": [0, 255]'
            )
        facts = DataFacts(**{key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()})
        return TrainConfig(**options), facts
    except UserError as error:
        raise error if str(file) in str(error) else UserError(f"{file}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: not the config of a run ({_one_line(error)}); restore it") from error


def check_new(path):
    """Raises UserError unless `path` can become the folder of a new run: there is none, or an empty one."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: expected a folder for the run, found a file; choose another name")
    own = {path / LOCK, *_leftovers(path)}  # of a start that was killed
    if path.is_dir() and any(entry not in own for entry in path.iterdir()):
        is_ours = (path / CONFIG).exists() or (path / CROSSVAL).exists()
        mend = "go on with --resume, or choose another folder" if is_ours else "choose another folder"
        raise UserError(f"{path}: expected a new or empty folder for the run, found files in it; {mend}")


def check_no_link(path):
    """Raises UserError if what a run writes at `path` would go where a link there leads: out of the run."""
    if path.is_symlink():
        raise UserError(
            f"{path}: is a link, which a run does not write through; remove it, or put what it leads to there"
        )


@contextlib.contextmanager
def locked(path):
    """Hold a run's folder, made if need be, so that no other process trains into it.

    The lock is the kernel's and ends with its holder, however that ends; the file that stays behind means nothing.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.

    >>> import tempfile
    >>> from unet_fast.checkpoints import locked
    >>> with locked(tempfile.mkdtemp() + "/run"):
    ...     pass
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name in (LOCK, Path(STATE).parent, TENSORBOARD):
            check_no_link(path / name)
        file = (path / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"{path}: in use by process {holder}; wait until it ends, or choose another folder"
            ) from error
        except OSError as error:
            raise UserError(f"{path}: cannot be locked ({error.strerror}); choose a folder on another disk") from error
        for leftover in _leftovers(path):
            leftover.unlink()
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def snapshot(model, optimizer):
    """What training needs to go on, to be saved while it does so.

    Args:
        model: FusedUNet, whose variables hold the state of its dropout beside the weights.
        optimizer: built keras.optimizers.Optimizer.

    Returns:
        dict of tensors. They share the variables' memory until these are assigned to, which TensorFlow then does elsewhere.
    """
    return {name: tf.convert_to_tensor(v.value) for name, v in _state_variables(model, optimizer).items()}


def save_state(path, state, progress):
    """Write all that training needs to go on, in one file.

    Args:
        path: folder of the run.
        state: of `snapshot`.
        progress: what the loop itself remembers, as JSON takes it; losses that are not finite, such as a loss scale has, are
            kept as not finite.
    """
    losses = [loss if math.isfinite(loss) else None for loss in progress["losses"]]
    text = json.dumps({**progress, "losses": losses}, allow_nan=False)
    (path / STATE).parent.mkdir(exist_ok=True)
    with atomic_path(path / STATE, overwrite=True) as temporary:
        np.savez(temporary, progress=np.array(text), **state)


def load_state(path, model, optimizer):
    """Put back what `snapshot` took and `save_state` wrote.

    Returns:
        progress, or None where no state was saved yet.

    Raises:
        UserError: the file is damaged, or of another network.
    """
    file = path / STATE
    if not file.exists():
        return None
    try:
        arrays = archives.read_arrays(file)
        progress = _checked_progress(json_file.parse(str(arrays.pop("progress")[()]).encode()))
    except MemoryError:
        raise
    except Exception as error:  # whatever zipfile and NumPy raise on damaged bytes
        raise UserError(f"{file}: damaged ({_one_line(error)}); restore it, or start a new run") from error
    targets = _state_variables(model, optimizer)
    found = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    if found != {name: (tuple(v.shape), keras.backend.standardize_dtype(v.dtype)) for name, v in targets.items()}:
        raise UserError(f"{file}: holds the state of another network; restore it, or start a new run")
    for name, variable in targets.items():
        variable.assign(arrays[name])
    return progress


def _checked_progress(progress):
    """What a training loop goes on from; raises ValueError for what it cannot have saved."""
    whole = [progress["step"], progress.get("replicas", 1)]
    losses = [math.nan if loss is None else loss for loss in progress["losses"]]
    numbers = [progress["seconds"], *losses]
    if any(type(n) is not int or n < 0 for n in whole) or any(type(n) not in (int, float) for n in numbers):
        raise ValueError("its progress is not that of a training")
    return {**progress, "losses": losses}


class ModelWriter:
    """Writes model.keras while the model that is trained goes on to change.

    Args:
        model: FusedUNet; a twin of it in the computer's memory takes the weights that are to be saved.
    """

    def __init__(self, model):
        with tf.device("CPU:0"):
            self._twin = type(model).from_config(model.get_config())

    def __call__(self, path, values):
        """Write a model, whole or not at all, in place of one that is there.

        Args:
            path: folder of the run.
            values: of all variables of the model, in their order, tensors or arrays.
        """
        with tf.device("CPU:0"):
            for variable, value in zip(self._twin.variables, values, strict=True):
                variable.assign(np.asarray(value))
        with atomic_path(path / MODEL, overwrite=True) as temporary:
            self._twin.save(temporary)


def write_json(path, content):
    """Write a JSON file, whole or not at all, in place of one that is there."""
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path):
    """Read a JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json_file.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({_one_line(error)}); restore it") from error


def write_history(path, rows):
    """Write a run's history.csv and history.json: a dict a row, all with the same keys; None is an empty cell or null."""
    with atomic_path(path / HISTORY, overwrite=True) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    write_json(path / HISTORY_JSON, rows)


def read_history(path):
    """Read a run's history.csv, [] if there is none: a dict a row of numbers, None for an empty cell.

    Raises:
        UserError: the file is damaged.
    """
    file = path / HISTORY
    if not file.exists():
        return []
    try:
        with file.open(newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            rows = [{key: _number(cell) for key, cell in row.items()} for row in reader]
        if not reader.fieldnames:
            raise ValueError("empty")
        steps = [row["step"] for row in rows]
        if any(type(step) is not int for step in steps) or steps != sorted(set(steps)):
            raise ValueError("its steps are no ascending numbers")
        for row in rows:
            _check_row(row)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        raise UserError(f"{file}: not a history of a run ({_one_line(error)}); restore it") from error
    return rows


def _check_row(row):
    """Raises ValueError unless a row of a history has what a run reads of it again."""
    missing = [name for name in ("val_loss", "val_dice", "val_soft_dice", "seconds") if row.get(name) is None]
    if missing or not {"loss", "images_per_second"} <= set(row):
        raise ValueError(f"no {missing[0] if missing else 'loss or images_per_second'} of step {row['step']}")
    if not all(value is None or math.isfinite(value) for value in row.values()):
        raise ValueError(f"not finite at step {row['step']}")


def best_row(history):
    """The row of the history whose model was kept: the first with the highest mean Dice."""
    return max(history, key=lambda row: row["val_dice"])


def _state_variables(model, optimizer):
    """The variables of a state by their names in its file."""
    named = {f"model_{i}": v for i, v in enumerate(model.variables)}
    return named | {f"optimizer_{i}": v for i, v in enumerate(optimizer.variables)}


def _leftovers(path):
    """Files that were being written when a process was killed."""
    names = (MODEL, STATE, CONFIG, SPLIT, HISTORY, HISTORY_JSON, METRICS, CURVES, OVERLAYS, SAMPLE_WEIGHTS)
    patterns = (Path(name).with_name(f".{Path(name).stem}-*{Path(name).suffix}") for name in names)
    return [file for pattern in patterns for file in path.glob(str(pattern))]


def _number(cell):
    if cell == "":
        return None
    value = float(cell)
    return int(cell) if cell.lstrip("-").isdigit() else value


def _one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__
