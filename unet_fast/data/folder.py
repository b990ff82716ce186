"""Finding and pairing the images and masks of a data folder."""

from pathlib import Path

import numpy as np

from unet_fast.data.dataset import Dataset
from unet_fast.data.png import read_png
from unet_fast.data.synthetic import generate
from unet_fast.data.tiff import read_tiff
from unet_fast.errors import UserError

_TIFF, _PNG = (".tif", ".tiff"), (".png",)
_LAYOUTS = (
    "either train-volume.tif and train-labels.tif (ISBI 2012), or folders images/ and masks/ with TIFF or PNG files "
    "of equal names"
)


def load_dataset(path, *, num_classes=None):
    """Load a data folder into memory.

    Two layouts are known. ISBI-2012's: `train-volume.tif` and `train-labels.tif`, multi-page TIFFs (`test-volume.tif`,
    which has no labels, is not read). Or `images/` and `masks/` with TIFF or PNG files of equal stem; a multi-page TIFF
    is as many images as it has pages; without a folder `masks/` the data set has no masks. Hidden files are ignored.
    All images must agree in size, channels and type.

    Args:
        path: data folder, or `"synthetic"` for `generate()`'s 30 sections (`"./synthetic"` is a folder of that name).
        num_classes: number of classes, when a model prescribes it; otherwise counted in the masks, see
            `Dataset.from_arrays`.

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
    if str(path) == "synthetic":
        images, masks = generate()
        names = [f"section_{i:03d}" for i in range(len(images))]
        return Dataset.from_arrays(images, masks, names=names, num_classes=num_classes, layout="synthetic")
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
    images, masks, names = _read_pairs(pairs)
    try:
        layout = "isbi" if is_isbi else "folder"
        return Dataset.from_arrays(images, masks, names=names, num_classes=num_classes, layout=layout)
    except UserError as error:
        raise UserError(f"{root}: {error}") from error


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
    """`{stem: file}` of a folder's TIFF and PNG files, sorted by stem."""
    if not folder.is_dir():
        raise UserError(f"{folder}: missing; expected {_LAYOUTS}")
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot read it ({error.strerror}); check its permissions") from error
    files = {}
    for file in entries:
        if file.suffix.lower() not in _TIFF + _PNG:
            raise UserError(f"{file}: expected only TIFF and PNG files in this folder; convert it or move it away")
        if file.stem in files:
            raise UserError(f"{file}: {files[file.stem].name} has the same name but for its suffix; keep one of them")
        files[file.stem] = file
    if not files:
        raise UserError(f"{folder}: the folder is empty; expected TIFF or PNG files in it")
    return dict(sorted(files.items()))


def _read(file, *, indexed):
    """A file's images: `[N, H, W]` or `[N, H, W, 3]`."""
    return read_tiff(file) if file.suffix.lower() in _TIFF else read_png(file, indexed=indexed)[None]


def _read_pairs(pairs):
    """Arrays `[N, H, W]` or `[N, H, W, 3]` and `[N, H, W]` (or None) of all pairs, and N names."""
    images, masks, names = [], [], []
    for image_file, mask_file in pairs:
        image = _read(image_file, indexed=False)
        if images and (image.shape[1:] != images[0].shape[1:] or image.dtype != images[0].dtype):
            raise UserError(
                f"{image_file}: {_describe(image)}, but {pairs[0][0].name} is {_describe(images[0])}; expected images "
                "of one size, type and number of channels, crop or convert them"
            )
        images.append(image)
        names += (
            [image_file.stem] if len(image) == 1 else [f"{image_file.stem}_{page:03d}" for page in range(len(image))]
        )
        if mask_file is None:
            continue
        mask = _read(mask_file, indexed=True)
        if mask.ndim != 3 or mask.dtype == np.float32:
            raise UserError(
                f"{mask_file}: expected a mask of one whole number a pixel, got {_describe(mask)}; save it as grey of "
                "8 or 16 bits"
            )
        if mask.shape != image.shape[:3]:
            raise UserError(
                f"{mask_file}: {_describe(mask)}, but its image {image_file.name} is {_describe(image)}; expected the "
                "same size and number of pages"
            )
        masks.append(mask)
    # Masks of 8 and of 16 bits may be mixed: concatenation widens them.
    return np.concatenate(images), np.concatenate(masks) if masks else None, names


def _describe(stack):
    """Size for an error: '512x512 uint8, 30 pages'."""
    colour = " RGB" if stack.ndim == 4 else ""
    pages = f", {len(stack)} pages" if len(stack) > 1 else ""
    return f"{stack.shape[1]}x{stack.shape[2]}{colour} {stack.dtype}{pages}"
