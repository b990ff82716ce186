"""A segmentation data set in memory, checked once so that nothing later has to."""

from dataclasses import dataclass, replace

import numpy as np

from unet_fast.data.tiff import IMAGE_DTYPES
from unet_fast.errors import UserError


@dataclass(frozen=True)
class DatasetSpec:
    """What a model must know about its data, small enough for a config file.

    Attributes:
        layout: where the data came from: `"isbi"`, `"folder"`, `"synthetic"` or `"arrays"`.
        num_classes: number of classes in the masks; None without masks.
        value_range: `(low, high)` pixel values that become -1 and 1: the type's range for uint8 and uint16, the data
            set's own for float32. A trained model keeps the range that it was trained with.
    """

    layout: str
    num_classes: int | None
    value_range: tuple[float, float]


@dataclass(frozen=True)
class Dataset:
    """Images, their masks and their names; make one with `from_arrays` or `load_dataset`.

    Attributes:
        images: uint8, uint16 or float32 `[N, H, W, C]`.
        masks: uint8 class indices `[N, H, W]`, or None.
        names: N strings, one an image.
        spec: `DatasetSpec`.
    """

    images: np.ndarray
    masks: np.ndarray | None
    names: tuple[str, ...]
    spec: DatasetSpec

    @classmethod
    def from_arrays(cls, images, masks=None, *, names=None, num_classes=None, layout="arrays"):
        """Check arrays and make a data set of them.

        Args:
            images: uint8, uint16 or float32 `[N, H, W]` or `[N, H, W, C]`, at least 2 x 2 pixels.
            masks: uint8, uint16 or bool `[N, H, W]`, or None. Values are class indices 0..K-1 with K at most 256, or 0
                and 255 for the classes 0 and 1.
            names: N strings; numbers if None.
            num_classes: K, when it is known; otherwise every class must occur, and K is counted.
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
        >>> data.images.shape, data.masks.max(), data.spec.num_classes, data.spec.value_range
        ((1, 4, 4, 1), np.uint8(1), 2, (0.0, 255.0))
        """
        images = np.asarray(images)
        images = images[..., None] if images.ndim == 3 else images
        if images.ndim != 4 or images.dtype not in IMAGE_DTYPES or images.size == 0:
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
            masks = np.asarray(masks)
            if masks.shape != images.shape[:3]:
                raise UserError(
                    f"expected masks of the images' shape {list(images.shape[:3])}, got {list(masks.shape)}; give a "
                    "mask [H, W] an image"
                )
            masks, num_classes = _class_indices(masks, names, num_classes)
        else:
            num_classes = None
        return cls(images, masks, names, DatasetSpec(layout, num_classes, _value_range(images)))

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
    if images.dtype != np.float32:
        return 0.0, float(np.iinfo(images.dtype).max)
    low, high = float(images.min()), float(images.max())
    if not np.isfinite([low, high]).all():
        raise UserError("the float images hold NaN or infinity; expected finite values, replace them")
    if low == high:
        raise UserError(
            f"every pixel of the float images is {low}; expected at least two values, check how they were saved"
        )
    return low, high


def _class_indices(masks, names, num_classes):
    """uint8 class indices of `masks`, and the number of classes."""
    if num_classes is not None and not 2 <= num_classes <= 256:
        raise UserError(f"expected 2 to 256 classes, got {num_classes}")
    if masks.dtype == bool:
        masks = masks.astype(np.uint8)
    if masks.dtype not in (np.uint8, np.uint16):
        raise UserError(f"expected masks of type uint8 or uint16 (class indices), got {masks.dtype}; convert them")
    present = np.zeros(np.iinfo(masks.dtype).max + 1, bool)
    for mask in masks:
        present |= np.bincount(mask.ravel(), minlength=len(present)) > 0
    values = np.flatnonzero(present)
    if num_classes is None and len(values) == 1:
        raise UserError(
            f"every pixel of the masks is {values[0]}; expected at least two classes, check how they were saved"
        )
    if num_classes in (None, 2) and values[-1] == 255 and len(values) == 1 + present[0]:
        masks, values = masks // 255, values // 255
    if num_classes is None:
        num_classes = min(len(values), 256)
        expected, bad = "0..K-1 with K at most 256 and every class used, or 0 and 255", values != np.arange(len(values))
    else:
        expected, bad = f"0..{num_classes - 1}" + (", or 0 and 255" if num_classes == 2 else ""), values >= num_classes
    bad |= values > 255
    if bad.any():
        first = values[bad][0]
        listed = ", ".join(map(str, values[:8])) + (f", ... ({len(values)} values)" if len(values) > 8 else "")
        holder = next(name for name, mask in zip(names, masks, strict=True) if (mask == first).any())
        raise UserError(
            f"expected mask values {expected}; got {listed} (the first that does not fit, {first}, in {holder}); "
            "renumber the classes"
        )
    return masks.astype(np.uint8), num_classes
