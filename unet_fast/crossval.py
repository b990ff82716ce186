"""Cross-validation folds, and the file that keeps them.

`"partition"` validates every sample exactly once. `"nvidia"` gives the folds of UNet_Medical's published scores, which
overlap: indices shuffled with a seed, rotated by int((1 - 0.8) * n) a fold, the last fifth for validation. In floating
point that is 5 of ISBI's 30 sections, while a fifth is 6, so neighbouring folds share a section.

Slices of one volume are alike: a network that has trained on one scores too well on the next. So a partition deals out
whole files where there are enough of them.
"""

import json

import numpy as np

from unet_fast import json_file
from unet_fast.data.files import atomic_path
from unet_fast.errors import UserError

SPLITS = ("partition", "nvidia")


def folds(num_samples, *, num_folds=5, split="partition", seed=0, files=None):
    """Training and validation indices of each fold.

    Args:
        num_samples: n, the number of samples.
        num_folds: number of folds, at least 2.
        split: `"partition"` or `"nvidia"`.
        seed: seed of the shuffling, 0 to 2^32 - 1; UNet_Medical's scores used 0.
        files: n numbers; samples of equal numbers stay together, and folds get as many files each, not as many samples.
            For a partition only; None leaves each sample to itself.

    Returns:
        list of `num_folds` pairs `(train_indices, validation_indices)`, int64 arrays `[.]` in ascending order, disjoint
        and together all n.

    Raises:
        UserError: an argument is out of range, or there are too few samples or files for the split.

    Example:

    >>> from unet_fast.crossval import folds
    >>> [len(validation) for _, validation in folds(30)]
    [6, 6, 6, 6, 6]
    >>> first, second = (set(validation.tolist()) for _, validation in folds(30, split="nvidia")[:2])
    >>> len(first & second)
    1
    >>> [validation.tolist() for _, validation in folds(5, num_folds=2, files=[0, 0, 1, 1, 1])]
    [[2, 3, 4], [0, 1]]
    """
    if split not in SPLITS:
        raise UserError(f"expected a split of {' or '.join(SPLITS)}, got {split!r}")
    if num_folds < 2:
        raise UserError(f"expected at least 2 folds, got {num_folds}")
    if not 0 <= seed < 2**32:
        raise UserError(f"expected a seed from 0 to {2**32 - 1}, got {seed}")
    if files is not None and split != "partition":
        raise UserError("the nvidia split is one of images, not of files; use partition to keep files together")
    members = list(range(num_samples)) if files is None else sorted(set(files))
    # The published folds come from NumPy's old generator, whose streams are frozen.
    order = np.array(members, np.int64)
    np.random.RandomState(seed).shuffle(order)
    if split == "partition":
        if len(members) < num_folds:
            what = "samples" if files is None else "files"
            raise UserError(
                f"expected at least {num_folds} {what} for {num_folds} folds, got {len(members)}; use fewer folds"
                + ("" if files is None else ", or let images of one file be apart with --group image")
            )
        validations = np.array_split(order, num_folds)
        if files is not None:
            validations = [np.flatnonzero(np.isin(files, part)) for part in validations]
    else:
        shift, first = int((1 - 0.8) * num_samples), int(0.8 * num_samples)
        if shift < 1:
            raise UserError(
                f"expected at least 6 samples for the nvidia split, got {num_samples}, and all folds would be equal; "
                "use partition"
            )
        validations = [np.roll(order, fold * shift)[first:] for fold in range(num_folds)]
    everything = np.arange(num_samples, dtype=np.int64)
    return [(np.setdiff1d(everything, validation), np.sort(validation)) for validation in validations]


def draw(dataset, *, num_folds=5, split="partition", group="auto"):
    """`folds` of a data set.

    Args:
        dataset: `unet_fast.data.Dataset`.
        num_folds, split: as `folds`.
        group: what a partition deals out: `"file"`, `"image"`, or `"auto"`, files where there are at least `num_folds`.

    Returns, errors: as `folds`.

    >>> from unet_fast.crossval import draw
    >>> from unet_fast.data import Dataset, generate
    >>> images, masks = generate(6, size=(32, 32))
    >>> volumes = Dataset.from_arrays(images, masks, files=[0, 0, 1, 1, 2, 2])
    >>> [validation.tolist() for _, validation in draw(volumes, num_folds=3)]
    [[4, 5], [2, 3], [0, 1]]
    """
    enough = split == "partition" and len(set(dataset.files)) >= num_folds
    by_file = group == "file" or (group == "auto" and enough)
    return folds(len(dataset.files), num_folds=num_folds, split=split, files=dataset.files if by_file else None)


def shared_files(dataset, fold):
    """How many of a data set's files are on both sides of a fold, and how many there are in all.

    Args:
        dataset: `unet_fast.data.Dataset`.
        fold: `(train_indices, validation_indices)`.

    >>> from unet_fast.crossval import draw, shared_files
    >>> from unet_fast.data import Dataset, generate
    >>> data = Dataset.from_arrays(*generate(6, size=(32, 32)), files=[0, 0, 0, 1, 1, 1])
    >>> shared_files(data, draw(data, num_folds=3)[0])
    (2, 2)
    """
    train, validation = (set(np.array(dataset.files)[indices].tolist()) for indices in fold)
    return len(train & validation), len(train | validation)


def save_split(path, folds, names):
    """Write folds to a JSON file, in place of one that is there; it appears whole or not at all.

    Args:
        path: file to write, by custom `split.json`.
        folds: as `folds` returns them.
        names: the samples' names, `Dataset.names`; indices mean nothing without them.

    Raises:
        UserError: the folder is missing or cannot be written to.

    Example:

    >>> import tempfile
    >>> from unet_fast.crossval import folds, load_split, save_split
    >>> path = tempfile.mkdtemp() + "/split.json"
    >>> names = [f"cell{i}" for i in range(6)]
    >>> save_split(path, folds(6, num_folds=3), names)
    >>> len(load_split(path, names))
    3
    """
    content = {
        "names": list(names),
        "folds": [{"train": train.tolist(), "validation": validation.tolist()} for train, validation in folds],
    }
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_split(path, names):
    """Read folds that `save_split` wrote, for the same samples.

    Args:
        path: file to read.
        names: names of the samples at hand, `Dataset.names`.

    Returns:
        list of `(train_indices, validation_indices)`, as `folds`.

    Raises:
        UserError: the file is missing or no split file, was made for other samples, or a fold is empty, names a sample
            twice or one that is not there.

    Example: see `save_split`.
    """
    mend = "delete it to have a new one drawn, or give the data it was made for"
    try:
        content = json_file.load(path)
        saved, pairs = content["names"], [(fold["train"], fold["validation"]) for fold in content["folds"]]
    except OSError as error:
        raise UserError(f"{path}: cannot read the split file ({error.strerror}); check the path") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a split file ({' '.join(str(error).split())[:160]}); {mend}") from error
    names = list(names)
    if saved != names:
        count = len(saved) if isinstance(saved, list) else 0
        raise UserError(f"{path}: made for other data ({count} samples, here {len(names)}, or other names); {mend}")
    if not pairs:
        raise UserError(f"{path}: expected at least one fold, got none; {mend}")
    for number, pair in enumerate(pairs):
        for part in pair:
            if not isinstance(part, list) or not part or not all(type(index) is int for index in part):
                raise UserError(f"{path}: fold {number} is not two lists of sample numbers; {mend}")
        used = pair[0] + pair[1]
        if len(set(used)) != len(used) or min(used) < 0 or max(used) >= len(names):
            raise UserError(f"{path}: fold {number} names a sample twice or one that is not there; {mend}")
    return [(np.array(train, np.int64), np.array(validation, np.int64)) for train, validation in pairs]
