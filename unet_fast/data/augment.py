"""Preprocessing and augmentation of one sample, as TensorFlow functions for a `tf.data` pipeline.

They follow NVIDIA's UNet_Medical: normalise to [-1, 1], resize bilinearly to the network's output size, pad with zeros
to its input size; then flip, cut a random box of the padded image and resize it back, shift the brightness, clip.
Randomness is stateless: a seed gives the same result on any machine, whatever runs beside it.
"""

import tensorflow as tf

_MAX_CROP = 0.3  # each edge of the box moves inwards by up to this share of the side
_MAX_BRIGHTNESS = 0.2  # of the normalised values, whose range is 2


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
    """Bring an image to the network's input: normalised, resized to the output size, padded with zeros.

    Args:
        image: uint8, uint16 or float32 `[H, W, C]`.
        value_range: as `normalize`.
        input_size, output_size: `(height, width)` of the network's input and output in pixels, the output no larger.

    Returns:
        float32 `[*input_size, C]`; values -1..1, and 0 in the padding.

    Example:

    >>> import numpy as np
    >>> from unet_fast.data import prepare_image
    >>> image = np.zeros((512, 512, 1), np.uint8)
    >>> prepare_image(image, value_range=(0, 255), input_size=(572, 572), output_size=(388, 388)).shape
    TensorShape([572, 572, 1])
    """
    image = tf.image.resize(normalize(image, value_range), output_size)
    return tf.image.resize_with_crop_or_pad(image, *input_size)


def prepare_mask(mask, *, num_classes, input_size, output_size):
    """Bring a mask to the network's input geometry, with class 0 in the padding.

    Two classes are interpolated bilinearly and cut at 0.5, which follows an edge more finely than the nearest pixel;
    more than two have no order to interpolate in and take the nearest.

    Args:
        mask: uint8 class indices `[H, W]`.
        num_classes: number of classes.
        input_size, output_size: as `prepare_image`.

    Returns:
        uint8 class indices `[*input_size]`.

    Example:

    >>> import numpy as np
    >>> from unet_fast.data import prepare_mask
    >>> mask = np.ones((512, 512), np.uint8)
    >>> prepare_mask(mask, num_classes=2, input_size=(572, 572), output_size=(388, 388)).numpy().sum() == 388**2
    np.True_
    """
    method = "bilinear" if num_classes == 2 else "nearest"
    resized = tf.image.resize(tf.cast(mask[..., None], tf.float32), output_size, method=method)
    classes = _to_classes(resized, num_classes)
    return tf.image.resize_with_crop_or_pad(classes, *input_size)[..., 0]


def center_crop(mask, output_size):
    """Cut the middle out of a mask, where the network's output lies.

    Args:
        mask: `[H, W]`.
        output_size: `(height, width)`, at most the mask's.

    Returns:
        `[*output_size]`, of the mask's type.

    Example:

    >>> import numpy as np
    >>> from unet_fast.data import center_crop
    >>> center_crop(np.arange(16).reshape(4, 4), (2, 2)).tolist()
    [[5, 6], [9, 10]]
    """
    top, left = (_offset(size, wanted) for size, wanted in zip(mask.shape, output_size, strict=True))
    return mask[top : top + output_size[0], left : left + output_size[1]]


def augment_sample(image, mask, *, num_classes, output_size, seed):
    """Augment a prepared sample; image and mask are moved alike.

    Each flip with probability 1/2; a box whose edges each moved inwards by U(0, 0.3) of the side, resized back;
    brightness shifted by U(-0.2, 0.2); clipped to [-1, 1]. The padding is part of the image, as in UNet_Medical.

    Args:
        image: float32 `[H, W, C]` from `prepare_image`, values -1..1.
        mask: uint8 class indices `[H, W]` from `prepare_mask`.
        num_classes: number of classes; two are interpolated, more take the nearest, as in `prepare_mask`.
        output_size: `(height, width)` of the mask's middle that is wanted.
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
    draws = tf.random.stateless_uniform([7], seed)
    size = image.shape[:2]
    # Relative coordinates of the box's first and last row and column. Swapped ends flip for nothing, and the mask is
    # sampled at its final size only: what flipping, resizing and cropping in turn give, for a quarter less work.
    first = draws[:2] * _MAX_CROP
    last = 1 - draws[2:4] * _MAX_CROP
    flip = draws[4:6] > 0.5
    first, last = tf.where(flip, 1 - first, first), tf.where(flip, 1 - last, last)
    boxes = tf.concat([first, last], 0)[None]
    image = tf.image.crop_and_resize(image[None], boxes, [0], size)[0]
    image = tf.clip_by_value(image + (2 * draws[6] - 1) * _MAX_BRIGHTNESS, -1, 1)

    span = [side - 1 for side in size]
    start = [_offset(side, wanted) for side, wanted in zip(size, output_size, strict=True)]
    begin = [s / n for s, n in zip(start, span, strict=True)]
    end = [(s + wanted - 1) / n for s, wanted, n in zip(start, output_size, span, strict=True)]
    boxes = tf.concat([first + (last - first) * begin, first + (last - first) * end], 0)[None]
    method = "bilinear" if num_classes == 2 else "nearest"
    mask = tf.image.crop_and_resize(mask[None, ..., None], boxes, [0], output_size, method=method)[0]
    return image, _to_classes(mask, num_classes)[..., 0]


def _offset(size, wanted):
    """Where a window of `wanted` pixels begins in the middle of `size`."""
    return (size - wanted) // 2


def _to_classes(resized, num_classes):
    """uint8 class indices from a resized mask, float32 or (nearest) uint8."""
    return tf.cast(resized >= 0.5 if num_classes == 2 else resized, tf.uint8)
