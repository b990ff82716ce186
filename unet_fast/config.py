"""The options of a training run: one list for the command line, config files and Python. Imports nothing heavy."""

import dataclasses
import os
import sys

from unet_fast import json_file
from unet_fast.errors import UserError

_LARGEST = sys.float_info.max  # whole numbers beyond it have no float
_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple: "a list of numbers, such as 1,2.5",
}


def _option(group, default, help, kind, *, metavar=None, choices=None, rule=None, resumable=False):
    """A field of `TrainConfig` with all that a parser needs to know about it.

    Args:
        rule: (what a value has to be, predicate), or None.
        resumable: whether a resumed run may change it.
    """
    metadata = {
        "group": group,
        "help": help,
        "kind": kind,
        "metavar": metavar,
        "choices": choices,
        "rule": rule,
        "resumable": resumable,
    }
    return dataclasses.field(default=default, metadata=metadata)


_POSITIVE = ("at least 1", lambda value: value >= 1)
_NOT_NEGATIVE = ("at least 0", lambda value: value >= 0)
_ABOVE_ZERO = ("positive", lambda value: value > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What `unet-fast train` is told; a field is an option of the same name.

    Raises:
        UserError: a value of the wrong type or out of its range, named.

    >>> from unet_fast.config import TrainConfig
    >>> TrainConfig(data="synthetic", steps=300).batch
    8
    """

    data: str = _option(
        "data", dataclasses.MISSING, "data folder, or the word synthetic", str, metavar="DIR", resumable=True
    )
    split: str = _option("data", "partition", "how the folds are drawn", str, choices=("partition", "nvidia"))
    folds: int = _option("data", 5, "number of folds", int, metavar="N", rule=("at least 2", lambda value: value >= 2))
    fold: int = _option("data", 0, "fold to validate on, from 0", int, metavar="K", rule=_NOT_NEGATIVE)
    group: str = _option(
        "data",
        "auto",
        "what the folds deal out, whole files or images; auto: files where there are as many as folds",
        str,
        choices=("auto", "file", "image"),
    )
    ignore_class: int | None = _option(
        "data",
        None,
        "value in the masks whose pixels are left out of loss and scores, and which is then no class (default: none)",
        int,
        metavar="VALUE",
        rule=_NOT_NEGATIVE,
    )
    sample_weights: str | None = _option(
        "data",
        None,
        "CSV file with the columns name and weight: by how much the loss of these training images is multiplied "
        "(default: all by 1)",
        str,
        metavar="FILE",
    )

    augment: bool = _option("augmentation", True, "flip, crop and brighten at random, as UNet_Medical does", bool)
    rotation: float = _option(
        "augmentation",
        0.0,
        "greatest angle by which images are turned, either way",
        float,
        metavar="DEGREES",
        rule=("from 0 to 180", lambda value: 0 <= value <= 180),
    )
    elastic: float = _option(
        "augmentation",
        0.0,
        "standard deviation of random displacements on a grid of 3 x 3 points, between which images are bent smoothly",
        float,
        metavar="PIXELS",
        rule=_NOT_NEGATIVE,
    )
    gamma: float = _option(
        "augmentation",
        0.0,
        "gamma correction with an exponent from 1 / (1 + RANGE) to 1 + RANGE",
        float,
        metavar="RANGE",
        rule=_NOT_NEGATIVE,
    )
    contrast: float = _option(
        "augmentation",
        0.0,
        "contrast multiplied by a factor from 1 - RANGE to 1 + RANGE",
        float,
        metavar="RANGE",
        rule=("in [0, 1]", lambda value: 0 <= value <= 1),
    )
    noise: float = _option(
        "augmentation",
        0.0,
        "greatest standard deviation of Gaussian noise; the values of images span 2",
        float,
        metavar="SD",
        rule=_NOT_NEGATIVE,
    )

    size: int | None = _option(
        "network",
        None,
        "side of the network's input in pixels (default: 572 for padding valid, else the largest that fits the images)",
        int,
        metavar="N",
        rule=_POSITIVE,
    )
    filters: int = _option("network", 64, "channels of the first level", int, metavar="N", rule=_POSITIVE)
    depth: int = _option(
        "network", 4, "how often the image is halved", int, metavar="N", rule=("1 to 6", lambda value: 1 <= value <= 6)
    )
    padding: str = _option("network", "valid", "of the 3x3 convolutions", str, choices=("valid", "same"))
    upsampling: str = _option(
        "network", "transpose3x3", "transposed convolution", str, choices=("transpose3x3", "transpose2x2")
    )
    dropout: float = _option(
        "network",
        0.5,
        "rate after the bottom level",
        float,
        metavar="RATE",
        rule=("in [0, 1)", lambda value: 0 <= value < 1),
    )

    steps: int = _option("training", 6400, "training steps in all", int, metavar="N", rule=_POSITIVE, resumable=True)
    batch: int = _option("training", 8, "images at a time on each GPU", int, metavar="N", rule=_POSITIVE)
    accumulate: int = _option(
        "training",
        1,
        "batches a step, one after the other: trains as a batch of N times as many images, in the memory of one",
        int,
        metavar="N",
        rule=_POSITIVE,
    )
    lr: float = _option("training", 1e-4, "learning rate of Adam", float, metavar="RATE", rule=_ABOVE_ZERO)
    schedule: str = _option(
        "training",
        "constant",
        "how the learning rate goes: constant, along a cosine to 0, or reduced when the validation Dice stands still",
        str,
        choices=("constant", "cosine", "plateau"),
    )
    warmup: int = _option(
        "training",
        0,
        "steps over which the learning rate rises to --lr first",
        int,
        metavar="STEPS",
        rule=_NOT_NEGATIVE,
    )
    plateau_patience: int | None = _option(
        "training",
        None,
        "for --schedule plateau: evaluations in a row without a new best after which the rate is reduced (default: 3)",
        int,
        metavar="N",
        rule=_POSITIVE,
    )
    plateau_factor: float | None = _option(
        "training",
        None,
        "for --schedule plateau: by what the rate is then multiplied (default: 0.5)",
        float,
        metavar="X",
        rule=("between 0 and 1", lambda value: 0 < value < 1),
    )
    patience: int | None = _option(
        "training",
        None,
        "evaluations in a row without a new best after which training ends early (default: never)",
        int,
        metavar="N",
        rule=_POSITIVE,
        resumable=True,
    )
    clip_norm: float | None = _option(
        "training",
        None,
        "greatest norm of the loss's gradients, of all weights together (default: any)",
        float,
        metavar="X",
        rule=_ABOVE_ZERO,
    )
    ema: float | None = _option(
        "training",
        None,
        "momentum of a moving average of the weights, such as 0.999, which is then what is scored and kept "
        "(default: the weights themselves)",
        float,
        metavar="MOMENTUM",
        rule=("between 0 and 1", lambda value: 0 < value < 1),
    )
    class_weights: tuple[float, ...] | None = _option(
        "training",
        None,
        "weights of the classes in the cross-entropy, in the order of their values in the masks (default: all 1)",
        tuple,
        metavar="W0,W1,...",
        rule=("of numbers that are not negative, and not all 0", lambda value: min(value) >= 0 and max(value) > 0),
    )
    l2: float = _option(
        "training",
        5e-4,
        "weight of half the squared weights and biases in the loss",
        float,
        metavar="X",
        rule=_NOT_NEGATIVE,
    )
    eval_every: int | None = _option(
        "training",
        None,
        "steps from one evaluation and checkpoint to the next (default: a twentieth of the steps)",
        int,
        metavar="N",
        rule=_POSITIVE,
    )
    seed: int = _option(
        "training",
        0,
        "of weights, order, augmentation and dropout",
        int,
        metavar="N",
        rule=("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32),
    )

    tensorboard: bool = _option("training", False, "write RUN/tensorboard for TensorBoard, too", bool, resumable=True)

    precision: str = _option(
        "engine", "float32", "dtype policy", str, choices=("float32", "mixed_float16", "mixed_bfloat16")
    )
    jit: str = _option(
        "engine",
        "auto",
        "compile the training step with XLA; auto: on a GPU",
        str,
        choices=("auto", "on", "off"),
        resumable=True,
    )
    backend: str = _option(
        "engine",
        "auto",
        "fused ops or stock TensorFlow; auto: fused where it is the faster",
        str,
        choices=("auto", "fused", "stock"),
        resumable=True,
    )

    gpus: int | None = _option(
        "engine",
        None,
        "train on N GPUs of this machine, or of each of --hosts (default: one, or the CPU where there is none)",
        int,
        metavar="N",
        rule=_POSITIVE,
        resumable=True,
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.fold >= self.folds:
            raise UserError(
                f"expected --fold to be from 0 to {self.folds - 1} with --folds {self.folds}, got {self.fold}; "
                "give one of those"
            )
        if self.schedule != "plateau" and (self.plateau_patience is not None or self.plateau_factor is not None):
            raise UserError(
                f"expected --plateau-patience and --plateau-factor with --schedule plateau alone, got {self.schedule}; "
                "leave them out, or add --schedule plateau"
            )
        if self.warmup >= self.steps:
            raise UserError(f"expected --warmup below the {self.steps} --steps, got {self.warmup}; give fewer")

    def resumed(self, changes):
        """The options of a run that goes on.

        Args:
            changes: dict of options that are given anew.

        Raises:
            UserError: an option that decides what the run computes differs from the run's own.

        >>> from unet_fast.config import TrainConfig
        >>> TrainConfig(data="synthetic", steps=300).resumed({"steps": 600}).steps
        600
        """
        for field in dataclasses.fields(self):
            own = getattr(self, field.name)
            given = changes.get(field.name, own)
            given = tuple(given) if isinstance(given, list) else given
            if given != own and not field.metadata["resumable"]:
                raise UserError(
                    f"{flag(field)} is {given} but the run to resume has {own}; leave it out, or start a new run"
                )
        return dataclasses.replace(self, **changes)


def _checked(field, value):
    """An option's value, a list as a tuple; raises UserError if it is of the wrong type or out of its range."""
    kind, choices, rule = (field.metadata[name] for name in ("kind", "choices", "rule"))
    if value is None and field.default is None:
        return value
    if kind is tuple and isinstance(value, list):  # as JSON has it
        value = tuple(value)
    got = _shown(value)
    if not _is_kind(value, kind):
        raise UserError(f"expected {flag(field)} to be {_KINDS[kind]}, got {got}; give one")
    if choices and value not in choices:
        raise UserError(f"expected {flag(field)} to be {' or '.join(choices)}, got {got}; give one of those")
    if rule and not rule[1](value):
        raise UserError(f"expected {flag(field)} to be {rule[0]}, got {got}; give such a value")
    return float(value) if kind is float else value


def _shown(value):
    """A value for an error, which stays one line however long it is."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def numbers(text):
    """Numbers from the command line: "1,2.5" becomes (1.0, 2.5).

    Raises:
        ValueError: it is no such list.

    >>> from unet_fast.config import numbers
    >>> numbers("1,2.5")
    (1.0, 2.5)
    """
    return tuple(float(part) for part in text.split(","))


def _is_kind(value, kind):
    if kind is tuple:
        return isinstance(value, tuple) and len(value) > 0 and all(_is_kind(part, float) for part in value)
    if isinstance(value, bool) and kind is not bool:
        return False
    if kind is float:
        return isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, kind) and (kind is not str or _is_path(value))


def _is_path(text):
    """Whether the system can be asked for a file of this name at all; JSON can say others."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def flag(field):
    """The option of a field on the command line.

    >>> from unet_fast.config import TrainConfig, flag
    >>> flag(TrainConfig.__dataclass_fields__["eval_every"])
    '--eval-every'
    """
    return "--" + field.name.replace("_", "-")


def read_options(path, extra=()):
    """Options from a JSON file: an object of `TrainConfig`'s names, such as a run's own config.json.

    Args:
        path: file to read.
        extra: further names to take; what a run's config.json records beside its options is passed over.

    Returns:
        dict of the options that the file names.

    Raises:
        UserError: no such file, no JSON object, an unknown name, or a value of the wrong type or out of its range.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from unet_fast.config import read_options
    >>> path = Path(tempfile.mkdtemp()) / "config.json"
    >>> _ = path.write_text('{"steps": 300}')
    >>> read_options(path)
    {'steps': 300}
    """
    try:
        content = json_file.load(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file ({error.strerror}); check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got something else ({error}); correct it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object of options, got {type(content).__name__}; write {{...}}")
    for recorded in ("dataset", "version", "environment", "imported"):
        content.pop(recorded, None)
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name, value in content.items():
        if name in fields:
            try:
                _checked(fields[name], value)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
        elif name not in extra:
            raise UserError(f"{path}: unknown option {_shown(name)}; expected {', '.join([*fields, *extra])}")
    return content
