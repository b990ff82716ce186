"""Bilinear and nearest resampling of batches, in a form that is exact and quick on every device.

Sampling on a grid of rows and columns is done an axis at a time, as a gather of whole rows and a blend of neighbours; at
positions that differ from pixel to pixel, as a gather of the four pixels around.
Why not TensorFlow's own: `tf.image.crop_and_resize` does not compile under XLA; `tf.image.resize` does, to a matrix product a
pixel, which a GPU rounds to TF32's ten bits. Gathers and blends are float32 anywhere, and XLA fuses them with what is
around them.
"""

import numpy as np
import tensorflow as tf


def resize_positions(size, wanted):
    """Where the `wanted` pixels of a resized axis lie in its `size` pixels, centres at halves as in `tf.image.resize`.

    Args:
        size, wanted: pixels before and after.

    Returns:
        float64 array `[wanted]`; the first and last may lie half a pixel outside.

    >>> from unet_fast.data.resample import resize_positions
    >>> resize_positions(8, 4).tolist()
    [0.5, 2.5, 4.5, 6.5]
    """
    # The product in float32, as TensorFlow's kernels round it: a position near a half must fall on the same side of it.
    product = (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) * (np.float32(size) / np.float32(wanted))
    return product.astype(np.float64) - 0.5


def box_positions(first, last, wanted):
    """`wanted` positions from `first` to `last`, evenly; their middle for one.

    Args:
        first, last: float64 tensors `[N]` of pixels; `last` may be the smaller, which flips.
        wanted: number of positions.

    Returns:
        float64 tensor `[N, wanted]`.

    >>> import tensorflow as tf
    >>> from unet_fast.data.resample import box_positions
    >>> box_positions(tf.constant([6.0], tf.float64), tf.constant([0.0], tf.float64), 4).numpy().tolist()
    [[6.0, 4.0, 2.0, 0.0]]
    """
    share = np.arange(wanted) / (wanted - 1) if wanted > 1 else np.array([0.5])
    return first[:, None] + (last - first)[:, None] * share


def resample(images, rows, columns, *, nearest=False):
    """Sample a batch on a grid.

    Args:
        images: tensor `[N, H, W, C]`: float32, or any type with `nearest`.
        rows, columns: float64 positions `[h]` and `[w]`, or `[N, h]` and `[N, w]` for each image its own; outside the
            image its edge goes on. In float64, so that compilers which contract products and sums find the same pixels.
        nearest: take the nearest pixel; otherwise blend the two neighbours on each axis linearly.

    Returns:
        tensor `[N, h, w, C]` of the images' type.

    >>> import numpy as np
    >>> from unet_fast.data.resample import resample
    >>> image = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)
    >>> resample(image, np.array([0.5]), np.array([0.0, 0.25])).numpy().ravel().tolist()
    [1.5, 1.75]
    """
    # Rows are gathered whole, columns as rows of the transposed image: on a CPU a third faster than gathering pixels.
    images = _resample_rows(images, rows, nearest)
    images = _resample_rows(tf.transpose(images, (0, 2, 1, 3)), columns, nearest)
    return tf.transpose(images, (0, 2, 1, 3))


def resample_at(images, y, x, *, nearest=False):
    """Sample a batch at any positions.

    Args:
        images: tensor `[N, H, W, C]`: float32, or any type with `nearest`.
        y, x: float64 positions `[N, h, w]`; outside the image its mirror image goes on.
        nearest: take the nearest pixel; otherwise blend the four around linearly.

    Returns:
        tensor `[N, h, w, C]` of the images' type.

    >>> import numpy as np
    >>> from unet_fast.data.resample import resample_at
    >>> image = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)
    >>> y, x = np.array([[[0.5, 0.0, 1.5]]]), np.array([[[0.25, -1.0, 0.0]]])
    >>> resample_at(image, y, x).numpy().ravel().tolist()
    [1.75, 1.0, 1.5]
    """
    images = tf.convert_to_tensor(images)
    height, width, channels = images.shape[1:]
    pixels = tf.reshape(images, (-1, height * width, channels))
    y, x = _mirrored(y, height), _mirrored(x, width)

    def at(rows, columns):
        return tf.gather(pixels, rows * width + columns, axis=1, batch_dims=1)

    if nearest:
        return at(*(tf.cast(tf.floor(p + 0.5), tf.int32) for p in (y, x)))
    (top, bottom, down), (left, right, across) = _neighbours(y, height), _neighbours(x, width)
    above, below = (at(row, left) + (at(row, right) - at(row, left)) * across[..., None] for row in (top, bottom))
    return above + (below - above) * down[..., None]


def _mirrored(positions, size):
    """Positions folded back into `[0, size - 1]` at the centres of the pixels at the edges, which are not repeated."""
    last = float(size - 1)
    return last - tf.abs(tf.math.floormod(tf.convert_to_tensor(positions), 2 * last) - last)


def _neighbours(positions, size):
    """The pixel before each position, the one after it, and how far from the one to the other it is."""
    low = tf.floor(positions)
    index = tf.cast(low, tf.int32)
    return index, tf.minimum(index + 1, size - 1), tf.cast(positions - low, tf.float32)


def _resample_rows(images, positions, nearest):
    last = images.shape[1] - 1
    positions = tf.clip_by_value(tf.convert_to_tensor(positions), 0.0, float(last))
    batch_dims = positions.shape.rank - 1
    if nearest:
        index = tf.cast(tf.floor(positions + 0.5), tf.int32)
        return tf.gather(images, index, axis=1, batch_dims=batch_dims)
    low = tf.floor(positions)
    weight = tf.cast(positions - low, tf.float32)[..., None, None]
    index = tf.cast(low, tf.int32)
    above = tf.gather(images, index, axis=1, batch_dims=batch_dims)
    below = tf.gather(images, tf.minimum(index + 1, last), axis=1, batch_dims=batch_dims)
    return above + (below - above) * weight
