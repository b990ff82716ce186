"""Finding and pairing the images and masks of a data folder."""

import math
from pathlib import Path

import numpy as np

from unet_fast.data.dataset import Dataset
from unet_fast.data.formats import NAMES, SUFFIXES, open_stack
from unet_fast.data.stack import Pages, stem_of, suffix_of
from unet_fast.data.synthetic import generate
from unet_fast.errors import UserError

IN_MEMORY_BYTES = (
    2**31
)  # images and masks up to this size are read once, into memory; of larger ones each when it is used
_LAYOUTS = (
    f"either train-volume.tif and train-labels.tif (ISBI 2012), or folders images/ and masks/ with {NAMES} files "
    "of equal names"
)


def load_dataset(path, *, num_classes=None, mask_values=None, ignore_value=None):
    """Load a data folder: into memory up to 2 GiB; a larger one stays in its files, which are read as they are used.

    Two layouts are known. ISBI-2012's: `train-volume.tif` and `train-labels.tif`, multi-page TIFFs (`test-volume.tif`,
    which has no labels, is not read). Or `images/` and `masks/` with TIFF, PNG or NIfTI files of equal stem; a
    multi-page TIFF is as many images as it has pages, a NIfTI volume as it has slices; without a folder `masks/` the
    data set has no masks. Hidden files are ignored. All images must agree in size, channels and type.

    All masks are read at once, to find their classes, and all float images, to find their range.

    Args:
        path: data folder, or `"synthetic"` for `generate()`'s 30 sections (`"./synthetic"` is a folder of that name).
        num_classes, mask_values: classes, or what stands for them, when a model prescribes them; otherwise counted in
            the masks, see `Dataset.from_arrays`.
        ignore_value: what masks hold in pixels to leave out, or None, see there.

    Returns:
        Dataset. Names are the files' stems, with the page's number where a file holds several.

    Raises:
        UserError: one line that names the file and the mend: nothing there, no known layout or both, files without
            partner, damaged files, sizes or types that differ, images below 2 x 2 pixels, mask values that are no
            classes.

    Example:

    >>> from unet_fast.data import load_dataset
    >>> data = load_dataset("synthetic")
    >>> data.images.shape, data.masks.shape, data.names[0], data.spec.layout
    ((30, 512, 512, 1), (30, 512, 512), 'section_000', 'synthetic')
    """
    classes = {"num_classes": num_classes, "mask_values": mask_values, "ignore_value": ignore_value}
    if str(path) == "synthetic":
        images, masks = generate()
        names = [f"section_{i:03d}" for i in range(len(images))]
        return Dataset.from_arrays(images, masks * 255, names=names, layout="synthetic", **classes)
    root = Path(path)
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise UserError(f"{root}: expected a data folder or the word synthetic, found {found} there; check the path")
    is_isbi = any((root / name).exists() for name in ("train-volume.tif", "train-labels.tif"))
    is_folder = any((root / name).is_dir() for name in ("images", "masks"))
    if is_isbi and is_folder:
        raise UserError(f"{root}: holds both layouts, so which one is meant is unclear; keep {_LAYOUTS}")
    if not is_isbi and not is_folder:
        raise UserError(f"{root}: no data found; expected {_LAYOUTS}")
    pairs = _isbi_pairs(root) if is_isbi else _folder_pairs(root)
    stacks, masks = _open_pairs(pairs)
    names, spacings, files = [], [], []
    for number, stack in enumerate(stacks):
        stem, count = stem_of(stack.path), stack.shape[0]
        names += [stem] if count == 1 else [f"{stem}_{page:03d}" for page in range(count)]
        spacings += [stack.spacing] * count
        files += [number] * count
    images, masks = Pages(stacks), Pages(masks) if masks else None
    if sum(math.prod(p.shape) * p.dtype.itemsize for p in (images, masks) if p is not None) <= IN_MEMORY_BYTES:
        images, masks = images[:], masks and masks[:][..., 0]
    layout = "isbi" if is_isbi else "folder"
    try:
        about = {"names": names, "spacings": spacings, "files": files, "layout": layout}
        return Dataset.from_arrays(images, masks, **about, **classes)
    except UserError as error:
        raise error if str(root) in str(error) else UserError(f"{root}: {error}") from error


def _isbi_pairs(root):
    """`[(image file, mask file)]`, of one entry."""
    volume, labels = root / "train-volume.tif", root / "train-labels.tif"
    for here, missing in ((volume, labels), (labels, volume)):
        if not missing.exists():
            raise UserError(f"{root}: {here.name} is there but {missing.name} is missing; expected {_LAYOUTS}")
    return [(volume, labels)]


def _folder_pairs(root):
    """`[(image file, mask file or None)]` in the order of their stems."""
    images = _files(root / "images")
    if not (root / "masks").exists():
        return [(file, None) for file in images.values()]
    masks = _files(root / "masks")
    for ours, theirs, folder in ((images, masks, "masks"), (masks, images, "images")):
        alone = [file for stem, file in ours.items() if stem not in theirs]
        if alone:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            raise UserError(
                f"{alone[0]}{more}: no file of the same name in {root / folder} ({len(images)} images, {len(masks)} "
                "masks); expected equal names, add or rename"
            )
    return [(file, masks[stem]) for stem, file in images.items()]


def _files(folder):
    """`{stem: file}` of a folder's image files, sorted by stem."""
    if not folder.is_dir():
        raise UserError(f"{folder}: missing; expected {_LAYOUTS}")
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot read it ({error.strerror}); check its permissions") from error
    files = {}
    for file in entries:
        stem = stem_of(file)
        if suffix_of(file) not in SUFFIXES:
            raise UserError(f"{file}: expected only {NAMES} files in this folder; convert it or move it away")
        if stem in files:
            raise UserError(f"{file}: {files[stem].name} has the same name but for its suffix; keep one of them")
        files[stem] = file
    if not files:
        raise UserError(f"{folder}: the folder is empty; expected {NAMES} files in it")
    return dict(sorted(files.items()))


def _open_pairs(pairs):
    """`Stack`s of the images and of the masks, none where there are no masks, that agree in all that has to."""
    images, masks = [], []
    for image_file, mask_file in pairs:
        image = open_stack(image_file)
        if images and (image.shape[1:] != images[0].shape[1:] or image.dtype != images[0].dtype):
            raise UserError(
                f"{image_file}: {image.described()}, but {pairs[0][0].name} is {images[0].described()}; expected images "
                "of one size, type and number of channels, crop or convert them"
            )
        images.append(image)
        if mask_file is None:
            continue
        mask = open_stack(mask_file, labels=True)
        if mask.shape[3] != 1 or mask.dtype == np.float32:
            raise UserError(
                f"{mask_file}: expected a mask of one whole number a pixel, got {mask.described()}; save it as grey of "
                "8 or 16 bits"
            )
        if mask.shape[:3] != image.shape[:3]:
            raise UserError(
                f"{mask_file}: {mask.described()}, but its image {image_file.name} is {image.described()}; expected the "
                "same size and number of pages"
            )
        masks.append(mask)
    return images, masks
