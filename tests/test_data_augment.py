"""Preprocessing and augmentation: UNet_Medical's numbers, stateless, image and mask moved alike."""

import numpy as np
import pytest
import tensorflow as tf

from unet_fast.data import augment_sample, center_crop, generate, normalize, prepare_image, prepare_mask

SIZES = {"input_size": (572, 572), "output_size": (388, 388)}
SMALL = {"input_size": (120, 104), "output_size": (80, 72)}


@pytest.fixture(scope="module")
def section():
    images, masks = generate(1, size=(160, 150), seed=5)
    return images[0], masks[0]


def test_normalize():
    np.testing.assert_array_equal(
        normalize(np.arange(256, dtype=np.uint8), (0, 255)), np.arange(256, dtype=np.float32) / np.float32(127.5) - 1
    )
    wide = np.array([0, 30000, 65535], np.uint16)
    np.testing.assert_allclose(normalize(wide, (0, 65535)), wide / 32767.5 - 1, atol=1e-6)
    np.testing.assert_allclose(normalize(np.array([-2, 0, 4], np.float32), (-2, 4)), [-1, -1 / 3, 1], atol=1e-6)


def test_prepare_image_resizes_to_the_output_and_pads_to_the_input():
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 1), np.uint8)
    prepared = prepare_image(image, value_range=(0, 255), **SIZES).numpy()
    assert prepared.shape == (572, 572, 1) and prepared.dtype == np.float32
    # Bilinear with pixel centres at halves, written out.
    position = (np.arange(388) + 0.5) * 512 / 388 - 0.5
    low = position.astype(int)
    weight = (position - low)[:, None]
    grey = image[..., 0] / 127.5 - 1
    rows = (1 - weight) * grey[low] + weight * grey[np.minimum(low + 1, 511)]
    expected = (1 - weight.T) * rows[:, low] + weight.T * rows[:, np.minimum(low + 1, 511)]
    np.testing.assert_allclose(prepared[92:480, 92:480, 0], expected, atol=2e-4)
    prepared[92:480, 92:480] = 0
    assert not prepared.any()


def test_prepare_without_padding(section):
    image, mask = section
    same = {"input_size": image.shape[:2], "output_size": image.shape[:2]}
    prepared = prepare_image(image, value_range=(0, 255), **same)
    np.testing.assert_array_equal(prepared, normalize(image, (0, 255)))
    np.testing.assert_array_equal(prepare_mask(mask, num_classes=2, **same), mask)


def test_prepare_mask_of_two_classes_cuts_the_bilinear_mask_at_half(section):
    mask = section[1]
    prepared = prepare_mask(mask, num_classes=2, **SMALL).numpy()
    assert prepared.shape == SMALL["input_size"] and prepared.dtype == np.uint8
    grey = tf.image.resize(mask[..., None].astype(np.float32), SMALL["output_size"]).numpy()[..., 0]
    np.testing.assert_array_equal(prepared[20:100, 16:88], grey >= 0.5)
    prepared[20:100, 16:88] = 0
    assert not prepared.any(), "the padding is class 0"


def test_prepare_mask_of_more_classes_invents_no_class():
    mask = np.zeros((60, 60), np.uint8)
    mask[:, 30:] = 200  # between 0 and 200 lie 199 classes that a blend would name
    prepared = prepare_mask(mask, num_classes=201, input_size=(47, 47), output_size=(47, 47)).numpy()
    assert set(np.unique(prepared)) == {0, 200}


def test_center_crop():
    mask = np.arange(8 * 9).reshape(8, 9)
    np.testing.assert_array_equal(center_crop(mask, (4, 3)), mask[2:6, 3:6])
    np.testing.assert_array_equal(center_crop(mask, (8, 9)), mask)


def reference(image, mask, draws, output_size):
    """UNet_Medical's augmentation one step after another, for two classes."""
    top, left, bottom, right, vertical, horizontal, brightness = draws
    mask = mask[..., None].astype(np.float32)
    if horizontal > 0.5:
        image, mask = tf.image.flip_left_right(image), tf.image.flip_left_right(mask)
    if vertical > 0.5:
        image, mask = tf.image.flip_up_down(image), tf.image.flip_up_down(mask)
    box = [[0.3 * top, 0.3 * left, 1 - 0.3 * bottom, 1 - 0.3 * right]]
    image = tf.image.crop_and_resize(image[None], box, [0], image.shape[:2])[0]
    mask = tf.image.crop_and_resize(mask[None], box, [0], mask.shape[:2])[0]
    image = tf.clip_by_value(tf.image.adjust_brightness(image, 0.4 * brightness - 0.2), -1, 1)
    return image.numpy(), tf.image.resize_with_crop_or_pad(mask, *output_size).numpy()[..., 0]


def test_augmentation_is_the_reference(section):
    image = prepare_image(section[0], value_range=(0, 255), **SMALL).numpy()
    mask = prepare_mask(section[1], num_classes=2, **SMALL).numpy()
    flips = set()
    for number in range(24):
        seed = (11, number)
        draws = tf.random.stateless_uniform([7], seed).numpy()
        flips.add(tuple(draws[4:6] > 0.5))
        expected_image, grey = reference(image, mask, draws, SMALL["output_size"])
        got_image, got_mask = augment_sample(image, mask, num_classes=2, output_size=SMALL["output_size"], seed=seed)
        assert got_image.dtype == tf.float32 and got_mask.dtype == tf.uint8
        np.testing.assert_allclose(got_image, expected_image, atol=2e-4)
        clear = np.abs(grey - 0.5) > 1e-3  # elsewhere rounding decides
        assert clear.mean() > 0.98
        np.testing.assert_array_equal(got_mask.numpy()[clear], (grey >= 0.5)[clear])
    assert len(flips) == 4, "every combination of flips has been compared"


@pytest.mark.parametrize("num_classes", [2, 3])
def test_image_and_mask_stay_aligned(num_classes):
    """An image painted from its mask must match the mask after any augmentation."""
    y, x = np.ogrid[:160, :150]
    shape = (np.hypot(y - 60, x - 95) < 40) | (y > 3 * x + 70)  # no symmetry that would hide a flip
    mask = shape * np.uint8(num_classes - 1)
    painted = (shape * np.uint8(255))[..., None]
    image = prepare_image(painted, value_range=(0, 255), **SMALL)
    prepared = prepare_mask(mask, num_classes=num_classes, **SMALL)
    image = tf.where(image == 0, -1.0, image)  # padding is class 0
    for number in range(12):
        moved, moved_mask = augment_sample(
            image, prepared, num_classes=num_classes, output_size=SMALL["output_size"], seed=(0, number)
        )
        middle = center_crop(moved.numpy()[..., 0], SMALL["output_size"])
        assert ((middle > 0) == (moved_mask.numpy() > 0)).mean() > 0.985
        assert set(np.unique(moved_mask)) <= {0, num_classes - 1}


def test_augmentation_is_stateless(section):
    image = prepare_image(section[0], value_range=(0, 255), **SMALL)
    mask = prepare_mask(section[1], num_classes=2, **SMALL)

    def run(seed):
        return augment_sample(image, mask, num_classes=2, output_size=SMALL["output_size"], seed=seed)

    first = run((3, 8))
    run((3, 9))
    tf.random.set_seed(99)
    again = run((3, 8))
    in_graph = tf.function(run)((3, 8))
    for got in (again, in_graph):
        np.testing.assert_array_equal(got[1], first[1])
        np.testing.assert_allclose(got[0], first[0], atol=1e-6)
    np.testing.assert_array_equal(again[0], first[0])
    for other in ((3, 9), (4, 8)):
        assert not np.array_equal(run(other)[0], first[0])


def test_ranges_of_the_draws():
    """Brightness spans +-0.2 and is clipped; the box keeps 40 to 100 % of each side."""
    flat = np.full((40, 40, 1), 0.9, np.float32)
    ramp = np.linspace(-0.7, 0.7, 101, dtype=np.float32)[:, None, None] * np.ones((1, 101, 1), np.float32)
    mask, ramp_mask = np.zeros((40, 40), np.uint8), np.zeros((101, 101), np.uint8)
    levels, spans = [], []
    for number in range(200):
        shifted, _ = augment_sample(flat, mask, num_classes=2, output_size=(40, 40), seed=(1, number))
        levels.append(shifted.numpy().max())
        assert shifted.numpy().max() <= 1
        stretched, _ = augment_sample(ramp, ramp_mask, num_classes=2, output_size=(101, 101), seed=(1, number))
        spans.append(abs(stretched[-1, 0, 0] - stretched[0, 0, 0]) / 1.4)
    assert 0.69 < min(levels) < 0.72 and max(levels) == 1
    assert 0.39 < min(spans) < 0.5 and 0.9 < max(spans) <= 1.001
