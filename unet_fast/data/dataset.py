"""A segmentation data set, in memory or in its files, checked once so that nothing later has to."""

from dataclasses import dataclass, replace

import numpy as np

from unet_fast.data.stack import IMAGE_DTYPES, Pages, Spacing
from unet_fast.errors import UserError

_MOST_MAPPED = 32  # values of masks that are not 0..K-1; more are a sign that they are a picture and no classes


@dataclass(frozen=True)
class DatasetSpec:
    """What a model must know about its data, small enough for a config file.

    Attributes:
        layout: where the data came from: `"isbi"`, `"folder"`, `"synthetic"` or `"arrays"`.
        num_classes: number of classes in the masks; None without masks.
        value_range: `(low, high)` pixel values that become -1 and 1: 0 to 255 for uint8, 0 to 2^bits - 1 for uint16 of as
            many bits as the data set uses, such as 12, and the data set's own range for float32. A trained model keeps the
            range that it was trained with.
        mask_values: what the masks hold for each class, such as (0, 128, 255); None without masks.
        ignore_value: what the files hold where no class is known, or None. It is no class: `Dataset.masks` have
            `num_classes` there.
    """

    layout: str
    num_classes: int | None
    value_range: tuple[float, float]
    mask_values: tuple[int, ...] | None
    ignore_value: int | None = None

    @property
    def ignore_index(self):
        """What `Dataset.masks` hold in pixels to leave out; None if there are none."""
        return None if self.ignore_value is None else self.num_classes

    @property
    def num_labels(self):
        """How many values `Dataset.masks` may hold: the classes, and one more for pixels to leave out."""
        return self.num_classes + (self.ignore_value is not None)


@dataclass(frozen=True)
class Dataset:
    """Images, their masks and their names; make one with `from_arrays` or `load_dataset`.

    Attributes:
        images: uint8, uint16 or float32 `[N, H, W, C]`: a numpy array, or `Pages` that are read when they are indexed.
        masks: uint8 class indices `[N, H, W]`, likewise, or None. Pixels to leave out are `spec.ignore_index`.
        names: N strings, one an image.
        spec: `DatasetSpec`.
        spacings: N `Spacing`, the size of a pixel of each image.
        files: N numbers, equal for images of one file: the pages of a TIFF, or the slices of a volume.
    """

    images: np.ndarray | Pages
    masks: np.ndarray | Pages | None
    names: tuple[str, ...]
    spec: DatasetSpec
    spacings: tuple[Spacing, ...]
    files: tuple[int, ...]

    @classmethod
    def from_arrays(
        cls,
        images,
        masks=None,
        *,
        names=None,
        num_classes=None,
        mask_values=None,
        ignore_value=None,
        spacings=None,
        files=None,
        layout="arrays",
    ):
        """Check arrays and make a data set of them.

        Args:
            images: uint8, uint16 or float32 `[N, H, W]` or `[N, H, W, C]`, at least 2 x 2 pixels; or `Pages`.
            masks: uint8, uint16 or bool `[N, H, W]`, or None; or `Pages`. Each value stands for a class, in ascending
                order: 0..K-1 with K at most 256, or up to 32 others such as 0, 128 and 255.
            names: N strings; numbers if None.
            num_classes: K, when it is known, and values are then 0..K-1, or for two classes 0 and 255; otherwise every
                class must occur, and the values are counted.
            mask_values: K values in ascending order, one a class, when a model prescribes them; for (0, 1) and (0, 255)
                the other is taken, too.
            ignore_value: what masks hold in pixels to leave out, which is then no class; None for nothing. It must occur,
                unless a model prescribes the classes.
            spacings: N `Spacing`; 1 pixel if None.
            files: N numbers, equal for images of one file; if None, each image stands for itself.
            layout: recorded in `spec`.

        Returns:
            Dataset with C made explicit and masks as uint8.

        Raises:
            UserError: arrays are empty, of another type or rank, do not match, hold NaN or infinity, are constant
                (float images only), or the masks hold other values.

        Example:

        >>> import numpy as np
        >>> from unet_fast.data import Dataset
        >>> mask = np.zeros((1, 4, 4), np.uint8)
        >>> mask[:, 2:] = 255
        >>> data = Dataset.from_arrays(np.zeros((1, 4, 4), np.uint8), mask)
        >>> data.images.shape, data.masks.max(), data.spec.num_classes, data.spec.mask_values
        ((1, 4, 4, 1), np.uint8(1), 2, (0, 255))
        """
        if not isinstance(images, Pages):
            images = np.asarray(images)
            images = images[..., None] if images.ndim == 3 else images
        if len(images.shape) != 4 or images.dtype not in IMAGE_DTYPES or 0 in images.shape:
            raise UserError(
                "expected uint8, uint16 or float32 images [N, H, W] or [N, H, W, C] and at least one, got "
                f"{images.dtype} {list(images.shape)}; convert them"
            )
        count, height, width, _ = images.shape
        names = tuple(map(str, range(count) if names is None else names))
        if len(names) != count:
            raise UserError(f"expected a name an image, got {len(names)} names for {count} images; give one each")
        if height < 2 or width < 2:
            raise UserError(
                f"expected images of at least 2x2 pixels, got {height}x{width} ({names[0]}); use larger images"
            )
        if masks is not None:
            masks = masks if isinstance(masks, Pages) else np.asarray(masks)
            if masks.shape[:3] != images.shape[:3]:
                raise UserError(
                    f"expected masks of the images' shape {list(images.shape[:3])}, got {list(masks.shape)}; give a "
                    "mask [H, W] an image"
                )
            masks, mask_values = _class_indices(masks, names, num_classes, mask_values, ignore_value)
        else:
            mask_values = ignore_value = None
        spec = DatasetSpec(layout, mask_values and len(mask_values), _value_range(images), mask_values, ignore_value)
        spacings, files = tuple(spacings or [Spacing()] * count), tuple(range(count) if files is None else files)
        return cls(images, masks, names, spec, spacings, files)

    def with_value_range(self, value_range):
        """The same data, normalised by another range: that of the model that shall see it.

        >>> import numpy as np
        >>> from unet_fast.data import Dataset
        >>> Dataset.from_arrays(np.zeros((1, 4, 4), np.uint8)).with_value_range((0, 65535)).spec.value_range
        (0.0, 65535.0)
        """
        low, high = map(float, value_range)
        if not low < high:
            raise UserError(f"expected a value range (low, high) with low below high, got ({low}, {high})")
        return replace(self, spec=replace(self.spec, value_range=(low, high)))


def _value_range(images):
    """Pixel values that become -1 and 1."""
    if images.dtype == np.uint8:
        return 0.0, 255.0
    if images.dtype == np.uint16:
        # Of as many bits as are used: what a camera of 12 bits gives would be nearly black among 16.
        bits = max(int(image.max()) for image in images).bit_length()
        return 0.0, float(2 ** max(bits, 8) - 1)
    ends = np.array([(image.min(), image.max()) for image in images])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    if not np.isfinite([low, high]).all():
        raise UserError("the float images hold NaN or infinity; expected finite values, replace them")
    if low == high:
        raise UserError(
            f"every pixel of the float images is {low}; expected at least two values, check how they were saved"
        )
    return low, high


def _class_indices(masks, names, num_classes, mask_values, ignore_value):
    """Masks of uint8 class indices, and the value that stands for each class."""
    if num_classes is not None and not 2 <= num_classes <= 256:
        raise UserError(f"expected 2 to 256 classes, got {num_classes}")
    if masks.dtype == bool:
        masks = masks.astype(np.uint8)
    if masks.dtype not in (np.uint8, np.uint16):
        raise UserError(f"expected masks of type uint8 or uint16 (class indices), got {masks.dtype}; convert them")
    present = np.zeros(2**16, bool)
    for mask in masks:
        present |= np.bincount(mask.ravel(), minlength=2**16) > 0
    found = tuple(np.flatnonzero(present).tolist())
    if ignore_value is not None:
        if ignore_value not in found and mask_values is None:
            listed = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
            raise UserError(
                f"expected masks with pixels to ignore, of value {ignore_value}, found none; they hold {listed}, give "
                "one of those, or ignore nothing"
            )
        found = tuple(value for value in found if value != ignore_value)
        if not found:
            raise UserError(f"every pixel of the masks is to be ignored ({ignore_value}); label some")
    stored, expected = _stored_values(found, num_classes, mask_values)
    foreign = sorted(set(found) - set(stored))
    if foreign:
        listed = ", ".join(map(str, found[:8])) + (f", ... ({len(found)} values)" if len(found) > 8 else "")
        holder = next(name for name, mask in zip(names, masks, strict=True) if (mask == foreign[0]).any())
        raise UserError(
            f"expected mask values {expected}; got {listed} (the first that does not fit, {foreign[0]}, in {holder}); "
            "renumber the classes"
        )
    table = np.zeros(2**16, np.uint8)
    table[list(stored)] = range(len(stored))
    if ignore_value is not None:
        if len(stored) == 256:
            raise UserError("expected at most 255 classes beside the value to ignore, got 256; merge some")
        table[ignore_value] = len(stored)
    masks = masks.with_table(table) if isinstance(masks, Pages) else table[masks]
    return masks, tuple(mask_values) if mask_values else stored


def _stored_values(found, num_classes, mask_values):
    """The value of each class in masks that hold the values `found`, and what to say where others are found."""
    if mask_values is not None:
        binary = ((0, 1), (0, 255))
        choices = [tuple(mask_values), *(binary if tuple(mask_values) in binary else ())]
        return _first_fitting(choices, found), f"{', '.join(map(str, mask_values))} like the training's"
    if num_classes is not None:
        choices = [tuple(range(num_classes)), *([(0, 255)] if num_classes == 2 else [])]
        return _first_fitting(choices, found), f"0..{num_classes - 1}" + (", or 0 and 255" if num_classes == 2 else "")
    if len(found) == 1:
        raise UserError(
            f"every pixel of the masks is {found[0]}; expected at least two classes, check how they were saved"
        )
    expected = f"0..K-1 with K at most 256, or at most {_MOST_MAPPED} others"
    if len(found) <= _MOST_MAPPED:
        return found, expected
    return tuple(range(min(len(found), 256))), expected


def _first_fitting(choices, found):
    """The first of the choices that has all values found; the first of all where none has."""
    return next((choice for choice in choices if set(found) <= set(choice)), choices[0])
