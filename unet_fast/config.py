"""The options of a training run: one list for the command line, config files and Python. Imports nothing heavy."""

import dataclasses
import json
import math
from pathlib import Path

from unet_fast.errors import UserError

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


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
    augment: bool = _option("data", True, "flip, crop and brighten the training images at random", bool)

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
    batch: int = _option("training", 8, "images a step", int, metavar="N", rule=_POSITIVE)
    lr: float = _option(
        "training",
        1e-4,
        "learning rate of Adam",
        float,
        metavar="RATE",
        rule=("positive", lambda value: value > 0),
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.metadata["kind"]
            if value is None and field.default is None:
                continue
            accepted = (int, float) if kind is float else kind
            is_kind = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
            if not is_kind or (kind is float and not math.isfinite(value)):
                raise UserError(f"expected {flag(field)} to be {_KINDS[kind]}, got {value!r}; give one")
            choices, rule = field.metadata["choices"], field.metadata["rule"]
            if choices and value not in choices:
                raise UserError(
                    f"expected {flag(field)} to be {' or '.join(choices)}, got {value!r}; give one of those"
                )
            if rule and not rule[1](value):
                raise UserError(f"expected {flag(field)} to be {rule[0]}, got {value!r}; give such a value")
        if self.fold >= self.folds:
            raise UserError(
                f"expected --fold to be from 0 to {self.folds - 1} with --folds {self.folds}, got {self.fold}; "
                "give one of those"
            )

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
            if given != own and not field.metadata["resumable"]:
                raise UserError(
                    f"{flag(field)} is {given} but the run to resume has {own}; leave it out, or start a new run"
                )
        return dataclasses.replace(self, **changes)


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
        UserError: no such file, no JSON object, or an unknown name.

    >>> import tempfile
    >>> from unet_fast.config import read_options
    >>> path = Path(tempfile.mkdtemp()) / "config.json"
    >>> _ = path.write_text('{"steps": 300}')
    >>> read_options(path)
    {'steps': 300}
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file ({error.strerror}); check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got something else ({error}); correct it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object of options, got {type(content).__name__}; write {{...}}")
    for recorded in ("dataset", "version", "environment", "imported"):
        content.pop(recorded, None)
    known = [field.name for field in dataclasses.fields(TrainConfig)] + list(extra)
    for name in content:
        if name not in known:
            raise UserError(f"{path}: unknown option {name!r}; expected {', '.join(known)}")
    return content
