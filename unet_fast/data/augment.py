"""Preprocessing and augmentation of batches, as TensorFlow functions that run anywhere: in `tf.data`, in a step, under XLA.

They follow NVIDIA's UNet_Medical: normalise to [-1, 1], resize bilinearly to the network's output size, pad with zeros
to its input size; then flip, cut a random box of the padded image and resize it back, shift the brightness, clip. Rotation,
elastic deformation, gamma, contrast and noise can be added. Whatever moves pixels is one resampling.
Randomness is stateless: a seed gives the same result on any machine, whatever runs beside it. The draws are apart from
their use, so that they can be made on the CPU, where each sample's seed gives the same numbers on any device and in any batch.
"""

import math
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from scipy.interpolate import CubicSpline

from unet_fast.data.resample import box_positions, resample, resample_at, resize_positions

_MAX_CROP = 0.3  # each edge of the box moves inwards by up to this share of the side
_MAX_BRIGHTNESS = 0.2  # of the normalised values, whose range is 2
_BASIC = 7  # random numbers of flips, crop and brightness
_ROTATION, _GAMMA, _CONTRAST, _NOISE, _NOISE_SEED, _ELASTIC, _ALL = 7, 8, 9, 10, 11, 13, 31  # where the others begin
_POINTS = 3  # a side of the grid of displacements


@dataclass(frozen=True)
class Augmentation:
    """Which random changes images see in training, and how large they may be; those of UNet_Medical by default.

    Attributes:
        basic: flips, each with probability 1/2; a box whose edges each moved inwards by U(0, 0.3) of the side, resized
            back; brightness shifted by U(-0.2, 0.2), where values span -1..1.
        rotation: degrees; turned about the centre by U(-rotation, rotation).
        elastic: pixels of the network's input. The points of a 3 x 3 grid over the image are moved by normal random
            numbers of this standard deviation, and what lies between by a cubic spline (Ronneberger et al., 2015).
        gamma: values, as 0..1, to the power of g, with log g of U(-log(1 + gamma), log(1 + gamma)).
        contrast: difference from the mean over the network's output multiplied by 1 + U(-contrast, contrast).
        noise: normal noise of standard deviation U(0, noise), where values span -1..1.

    Where a moved pixel comes from outside the image, that is mirrored there. Values are clipped to -1..1 at the end.

    >>> from unet_fast.data import Augmentation
    >>> Augmentation(rotation=15).draws((0, 1)).shape
    TensorShape([31])
    """

    basic: bool = True
    rotation: float = 0.0
    elastic: float = 0.0
    gamma: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0

    @property
    def warps(self):
        """Whether pixels move in other ways than by flips and boxes."""
        return self.rotation > 0 or self.elastic > 0

    @property
    def num_draws(self):
        """How many random numbers a sample takes: D."""
        return _ALL if self.warps or self.gamma > 0 or self.contrast > 0 or self.noise > 0 else _BASIC

    def draws(self, seed):
        """The random numbers that augment a sample.

        Args:
            seed: two integers, the first below 2^32; equal seeds give equal numbers.

        Returns:
            float32 `[D]`. The first 7 are those of `augmentation_draws`, whatever else is on.
        """
        basic = augmentation_draws(seed)
        if self.num_draws == _BASIC:
            return basic
        seed = tf.cast(seed, tf.int64)
        numbers = tf.random.stateless_uniform([_ELASTIC - _BASIC], seed + tf.constant([2**32, 0], tf.int64))
        moves = tf.random.stateless_normal([_ALL - _ELASTIC], seed + tf.constant([2**33, 0], tf.int64))
        return tf.concat([basic, numbers, moves], 0)


def normalize(image, value_range):
    """Scale pixel values so that `value_range` becomes [-1, 1]: x / 127.5 - 1 for uint8, x / 32767.5 - 1 for uint16.

    Args:
        image: tensor of any shape and of type uint8, uint16 or float32.
        value_range: `(low, high)`, as `DatasetSpec.value_range`.

    Returns:
        float32 tensor of the same shape.

    Example:

    >>> import numpy as np
    >>> from unet_fast.data import normalize
    >>> normalize(np.array([0, 255], np.uint8), (0, 255)).numpy().tolist()
    [-1.0, 1.0]
    """
    low, high = value_range
    return (tf.cast(image, tf.float32) - low) / ((high - low) / 2) - 1


def prepare_image(image, *, value_range, input_size, output_size):
    """Bring images to the network's input: normalised, resized to the output size, padded with zeros.

    Args:
        image: uint8, uint16 or float32 `[H, W, C]`, or a batch `[N, H, W, C]`.
        value_range: as `normalize`.
        input_size, output_size: `(height, width)` of the network's input and output in pixels, the output no larger.

    Returns:
        float32 `[*input_size, C]` or `[N, *input_size, C]`; values -1..1, and 0 in the padding.

    Example:

    >>> import numpy as np
    >>> from unet_fast.data import prepare_image
    >>> image = np.zeros((512, 512, 1), np.uint8)
    >>> prepare_image(image, value_range=(0, 255), input_size=(572, 572), output_size=(388, 388)).shape
    TensorShape([572, 572, 1])
    """
    if len(image.shape) == 3:
        sizes = {"input_size": input_size, "output_size": output_size}
        return prepare_image(image[None], value_range=value_range, **sizes)[0]
    resized = _resized(normalize(image, value_range), output_size, nearest=False)
    return _padded(resized, input_size)


def prepare_mask(mask, *, num_classes, input_size, output_size):
    """Bring masks to the network's input geometry, with class 0 in the padding.

    Two classes are interpolated bilinearly and cut at 0.5, which follows an edge more finely than the nearest pixel;
    more than two have no order to interpolate in and take the nearest.

    Args:
        mask: uint8 class indices `[H, W]`, or a batch `[N, H, W]`.
        num_classes: number of classes.
        input_size, output_size: as `prepare_image`.

    Returns:
        uint8 class indices `[*input_size]` or `[N, *input_size]`.

    Example:

    >>> import numpy as np
    >>> from unet_fast.data import prepare_mask
    >>> mask = np.ones((512, 512), np.uint8)
    >>> prepare_mask(mask, num_classes=2, input_size=(572, 572), output_size=(388, 388)).numpy().sum() == 388**2
    np.True_
    """
    if len(mask.shape) == 2:
        sizes = {"input_size": input_size, "output_size": output_size}
        return prepare_mask(mask[None], num_classes=num_classes, **sizes)[0]
    resized = _resized(_mask_values(mask, num_classes), output_size, nearest=num_classes > 2)
    return _padded(_to_classes(resized, num_classes), input_size)[..., 0]


def center_crop(mask, output_size):
    """Cut the middle out of masks, where the network's output lies.

    Args:
        mask: `[..., H, W]`.
        output_size: `(height, width)`, at most the mask's.

    Returns:
        `[..., *output_size]`, of the mask's type.

    Example:

    >>> import numpy as np
    >>> from unet_fast.data import center_crop
    >>> center_crop(np.arange(16).reshape(4, 4), (2, 2)).tolist()
    [[5, 6], [9, 10]]
    """
    top, left = (_offset(size, wanted) for size, wanted in zip(mask.shape[-2:], output_size, strict=True))
    return mask[..., top : top + output_size[0], left : left + output_size[1]]


def augmentation_draws(seed):
    """The random numbers of a sample's flips, crop and brightness.

    Args:
        seed: two integers; equal seeds give equal numbers.

    Returns:
        float32 `[7]` in [0, 1): how far the box's top, left, bottom and right move inwards, whether to flip vertically and
        horizontally (above 1/2), and the brightness.

    Example:

    >>> from unet_fast.data import augmentation_draws
    >>> augmentation_draws((0, 1)).shape
    TensorShape([7])
    """
    return tf.random.stateless_uniform([_BASIC], seed)


def augment_batch(images, masks, draws, *, num_classes, output_size, augmentation=Augmentation()):
    """Augment prepared samples; image and mask are moved alike, each sample by its own draws alone.

    The padding is part of the image, as in UNet_Medical.

    Args:
        images: float32 `[N, H, W, C]` from `prepare_image`, values -1..1.
        masks: uint8 class indices `[N, H, W]` from `prepare_mask`.
        draws: float32 `[N, D]` from `augmentation.draws`.
        num_classes: number of classes; two are interpolated, more take the nearest, as in `prepare_mask`.
        output_size: `(height, width)` of the masks' middle that is wanted.
        augmentation: `Augmentation`.

    Returns:
        `(images, masks)`: float32 `[N, H, W, C]`, and uint8 `[N, *output_size]`.

    Example:

    >>> import numpy as np, tensorflow as tf
    >>> from unet_fast.data import augment_batch, augmentation_draws
    >>> images, masks = np.zeros((2, 64, 64, 1), np.float32), np.ones((2, 64, 64), np.uint8)
    >>> draws = tf.stack([augmentation_draws((0, k)) for k in range(2)])
    >>> images, masks = augment_batch(images, masks, draws, num_classes=2, output_size=(48, 48))
    >>> images.shape, masks.shape, masks.dtype
    (TensorShape([2, 64, 64, 1]), TensorShape([2, 48, 48]), tf.uint8)
    """
    exact = tf.cast(draws, tf.float64)  # see `resample`
    starts = [_offset(side, wanted) for side, wanted in zip(masks.shape[1:], output_size, strict=True)]
    rows, columns = (slice(start, start + wanted) for start, wanted in zip(starts, output_size, strict=True))
    nearest = num_classes > 2
    if augmentation.warps:
        y, x = _warped(exact, images.shape[1:3], augmentation)
        images = resample_at(images, y, x)
        window = slice(None), rows, columns
        masks = resample_at(_mask_values(masks, num_classes), y[window], x[window], nearest=nearest)
    elif augmentation.basic:
        # Swapped ends flip for nothing, and the mask is sampled at its final size only: what flipping, resizing and
        # cropping in turn give, for a quarter less work.
        grid = [
            box_positions(first * (side - 1), last * (side - 1), side)
            for first, last, side in zip(*_box(exact), images.shape[1:3], strict=True)
        ]
        images = resample(images, *grid)
        middle = grid[0][:, rows], grid[1][:, columns]
        masks = resample(_mask_values(masks, num_classes), *middle, nearest=nearest)
    else:
        masks = _mask_values(masks[:, rows, columns], num_classes)
    images = _intensities(images, draws, (slice(None), rows, columns), augmentation)
    return images, _to_classes(masks, num_classes)[..., 0]


def _box(draws):
    """The box's first and last row and column as shares of the sides, swapped where they flip: two pairs of `[N]`."""
    first, last = draws[:, :2] * _MAX_CROP, 1 - draws[:, 2:4] * _MAX_CROP
    flip = draws[:, 4:6] > 0.5
    return tf.unstack(tf.where(flip, 1 - first, first), axis=1), tf.unstack(tf.where(flip, 1 - last, last), axis=1)


def _warped(draws, sides, augmentation):
    """Where the pixels of warped images come from: rows and columns, float64 `[N, H, W]`.

    The box is cut and resized first, and that image turned and bent: its corners then mostly come from around the box.
    """
    y, x = (np.arange(side) - (side - 1) / 2 for side in sides)
    y, x = y[None, :, None], x[None, None, :]
    if augmentation.rotation > 0:
        angle = (2 * draws[:, _ROTATION, None, None] - 1) * math.radians(augmentation.rotation)
        sine, cosine = tf.sin(angle), tf.cos(angle)
        y, x = cosine * y - sine * x, sine * y + cosine * x
    if augmentation.elastic > 0:
        moves = augmentation.elastic * tf.reshape(draws[:, _ELASTIC:_ALL], (-1, 2, _POINTS, _POINTS))
        y, x = y + _spline(moves[:, 0], sides), x + _spline(moves[:, 1], sides)
    positions = []
    ends = _box(draws) if augmentation.basic else ((0.0, 0.0), (1.0, 1.0))
    for position, first, last, side in zip((y, x), *ends, sides, strict=True):
        first, last = (tf.reshape(tf.cast(end, tf.float64), (-1, 1, 1)) * (side - 1) for end in (first, last))
        positions.append(first + (last - first) * (position / (side - 1) + 0.5))
    return positions


def _spline(values, sides):
    """Natural cubic splines through values on a grid over the image: `[N, P, P]` becomes `[N, H, W]`.

    A sum of few products, not a matrix product, which a GPU would round to TF32.
    """
    points = values.shape[1]
    rows, columns = (
        CubicSpline(np.arange(points), np.eye(points), bc_type="natural")(np.linspace(0, points - 1, side))
        for side in sides
    )
    values = sum(rows[:, i, None] * values[:, i, None, :] for i in range(points))  # [N, H, P]
    return sum(values[:, :, j, None] * columns[:, j] for j in range(points))


def _intensities(images, draws, window, augmentation):
    """Gamma, contrast, brightness and noise, each image's by its own draws; `window` is where its contents lie."""

    def number(index, low, high):
        return (low + (high - low) * draws[:, index])[:, None, None, None]

    if augmentation.gamma > 0:
        most = math.log1p(augmentation.gamma)
        # Blending may end a rounding error below -1, of which there is no power.
        images = 2 * tf.maximum((images + 1) / 2, 0) ** tf.exp(number(_GAMMA, -most, most)) - 1
    if augmentation.contrast > 0:
        mean = tf.reduce_mean(images[window], (1, 2), keepdims=True)
        images = mean + (images - mean) * number(_CONTRAST, 1 - augmentation.contrast, 1 + augmentation.contrast)
    if augmentation.basic:
        brightness = ((2 * draws[:, 6] - 1) * _MAX_BRIGHTNESS)[:, None, None, None]
        images = images + brightness
    if augmentation.noise > 0:
        # TensorFlow has no op that draws for many seeds at once. A uniform number has 23 bits.
        seeds = tf.cast(draws[:, _NOISE_SEED : _NOISE_SEED + 2] * 2**23, tf.int32)
        noise = [tf.random.stateless_normal(images.shape[1:], seed, alg="philox") for seed in tf.unstack(seeds)]
        images += number(_NOISE, 0, augmentation.noise) * tf.stack(noise)
    return tf.clip_by_value(images, -1, 1)


def augment_sample(image, mask, *, num_classes, output_size, seed, augmentation=Augmentation()):
    """`augment_batch` of a single sample.

    Args:
        image: float32 `[H, W, C]` from `prepare_image`, values -1..1.
        mask: uint8 class indices `[H, W]` from `prepare_mask`.
        num_classes, output_size, augmentation: as `augment_batch`.
        seed: two integers; equal seeds give equal samples.

    Returns:
        `(image, mask)`: float32 `[H, W, C]`, and uint8 `[*output_size]`.

    Example:

    >>> import numpy as np
    >>> from unet_fast.data import augment_sample
    >>> image, mask = np.zeros((64, 64, 1), np.float32), np.ones((64, 64), np.uint8)
    >>> image, mask = augment_sample(image, mask, num_classes=2, output_size=(48, 48), seed=(0, 1))
    >>> image.shape, mask.shape, mask.dtype
    (TensorShape([64, 64, 1]), TensorShape([48, 48]), tf.uint8)
    """
    draws = augmentation.draws(seed)[None]
    options = {"num_classes": num_classes, "output_size": output_size, "augmentation": augmentation}
    images, masks = augment_batch(image[None], mask[None], draws, **options)
    return images[0], masks[0]


def _offset(size, wanted):
    """Where a window of `wanted` pixels begins in the middle of `size`."""
    return (size - wanted) // 2


def _resized(images, size, *, nearest):
    rows, columns = (resize_positions(side, wanted) for side, wanted in zip(images.shape[1:3], size, strict=True))
    return resample(images, rows, columns, nearest=nearest)


def _padded(images, size):
    """`[N, H, W, C]` in the middle of zeros `[N, *size, C]`."""
    before = [_offset(wanted, side) for side, wanted in zip(images.shape[1:3], size, strict=True)]
    after = [wanted - side - b for side, wanted, b in zip(images.shape[1:3], size, before, strict=True)]
    return tf.pad(images, ((0, 0), *zip(before, after, strict=True), (0, 0)))


def _mask_values(masks, num_classes):
    """`[N, H, W, 1]` to resample: float32 of two classes, which are blended, or the indices themselves."""
    return tf.cast(masks, tf.float32 if num_classes == 2 else tf.uint8)[..., None]


def _to_classes(resampled, num_classes):
    """uint8 class indices from resampled `_mask_values`."""
    return tf.cast(resampled >= 0.5, tf.uint8) if num_classes == 2 else resampled
