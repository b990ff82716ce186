"""Resampling against float64 written out, and against TensorFlow's own resizing."""

import numpy as np
import pytest
import tensorflow as tf

from unet_fast.data.resample import box_positions, resample, resize_positions


def blend(image, rows, columns):
    """Bilinear interpolation of `[H, W, C]` in float64."""
    for axis, positions in enumerate((rows, columns)):
        last = image.shape[axis] - 1
        positions = np.clip(positions, 0, last)
        low = np.floor(positions).astype(int)
        weight = (positions - low).reshape(-1, *[1] * (2 - axis))
        image = (1 - weight) * image.take(low, axis) + weight * image.take(np.minimum(low + 1, last), axis)
    return image


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_on_its_own_grid(jit, channels):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 31, 23, channels)).astype(np.float32)
    rows, columns = rng.uniform(-2, 33, (4, 19)), rng.uniform(-2, 25, (4, 40))
    rows[0, :3], columns[0, :3] = (0, 30, 7), (0, 22, 21)
    sample = tf.function(resample, jit_compile=jit)
    got = sample(images, tf.constant(rows), tf.constant(columns))
    assert got.dtype == tf.float32 and got.shape == (4, 19, 40, channels)
    for i in range(4):
        np.testing.assert_allclose(got[i], blend(images[i].astype(np.float64), rows[i], columns[i]), atol=2e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_nearest_keeps_type_and_values(jit, dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 9, 7, 1)).astype(dtype)
    rows, columns = rng.uniform(-1, 10, (2, 12)), rng.uniform(-1, 8, (2, 5))
    rows[0, :2] = 2.5, 3.5  # a half goes up
    got = tf.function(lambda *a: resample(*a, nearest=True), jit_compile=jit)(images, rows, columns)
    for i in range(2):
        y, x = (np.floor(np.clip(p, 0, n - 1) + 0.5).astype(int) for p, n in ((rows[i], 9), (columns[i], 7)))
        np.testing.assert_array_equal(got[i], images[i][y][:, x])
    assert got.dtype == dtype


@pytest.mark.parametrize("size", [(388, 388), (512, 512), (700, 300), (1, 1), (2, 1023)])
def test_resizing_is_tensorflows(size):
    images = np.random.default_rng(0).normal(size=(1, 512, 97, 2)).astype(np.float32)
    grid = [resize_positions(side, wanted) for side, wanted in zip(images.shape[1:3], size, strict=True)]
    np.testing.assert_allclose(resample(images, *grid), tf.image.resize(images, size), atol=2e-6)
    np.testing.assert_array_equal(
        resample(images, *grid, nearest=True), tf.image.resize(images, size, method="nearest")
    )


def test_the_middle_of_a_box_for_one_position():
    ends = tf.constant([1.0, 8.0], tf.float64), tf.constant([4.0, 2.0], tf.float64)
    np.testing.assert_array_equal(box_positions(*ends, 1), [[2.5], [5]])
    np.testing.assert_array_equal(box_positions(*ends, 4), [[1, 2, 3, 4], [8, 6, 4, 2]])
