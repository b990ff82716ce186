"""Rotation, elastic deformation, gamma, contrast and noise: what they do, and that each sample's are its own."""

import numpy as np
import pytest
import tensorflow as tf

from unet_fast.data import Augmentation, Dataset, TrainingBatches, augment_batch, augmentation_draws

ALL = Augmentation(rotation=30, elastic=2, gamma=0.5, contrast=0.3, noise=0.1)
GEOMETRY = Augmentation(rotation=40, elastic=3)


def draws_of(augmentation, **values):
    """A sample's numbers, all at the middle of their range, but for those given: slices of them by name."""
    draws = np.full((1, augmentation.num_draws), 0.5, np.float32)
    draws[:, :4] = 0
    draws[:, 13:] = 0
    places = {"rotation": 7, "gamma": 8, "contrast": 9, "noise": 10, "seed": slice(11, 13), "elastic": slice(13, 31)}
    for name, value in values.items():
        draws[:, places[name]] = value
    return tf.constant(draws)


def applied(image, mask, augmentation, num_classes=2, output_size=None, **values):
    images, masks = tf.constant(image[None], tf.float32), tf.constant(mask[None], tf.uint8)
    options = {"num_classes": num_classes, "output_size": output_size or mask.shape, "augmentation": augmentation}
    image, mask = augment_batch(images, masks, draws_of(augmentation, **values), **options)
    return image[0].numpy(), mask[0].numpy()


@pytest.fixture(scope="module")
def picture():
    """A smooth image [33, 33, 1] in [-1, 1], and a mask of three classes."""
    y, x = np.indices((33, 33)) / 16 - 1
    return np.sin(3 * y + x * x)[..., None] * 0.8, (1 + np.sign(y + 2 * x * x - 0.3)).astype(np.uint8)


def test_the_first_numbers_are_those_without_the_rest():
    for seed in ((3, 8), (2**32 - 1, 2**40)):
        np.testing.assert_array_equal(ALL.draws(seed)[:7], augmentation_draws(seed))
        np.testing.assert_array_equal(Augmentation().draws(seed), augmentation_draws(seed))
    drawn = np.array([ALL.draws((5, k)) for k in range(300)])
    assert len(np.unique(drawn[:, 7:13])) > 0.99 * 300 * 6, "numbers repeat"
    assert abs(drawn[:, 7:13].mean() - 0.5) < 0.03 and abs(drawn[:, 13:].std() - 1) < 0.05


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_quarter_turn(picture, num_classes):
    image, mask = picture
    mask = np.minimum(mask, num_classes - 1)
    augmentation = Augmentation(basic=False, rotation=90)
    for draw, turns in ((0.0, 1), (1.0, -1), (0.5, 0)):
        turned, turned_mask = applied(image, mask, augmentation, num_classes, rotation=draw)
        options = [np.abs(turned - np.rot90(image, k)).max() for k in range(4)]
        assert options[turns % 4] < 1e-5
        np.testing.assert_array_equal(turned_mask, np.rot90(mask, turns))


def test_a_displacement(picture):
    """All points of the grid moved alike shift the image; one moved alone moves nothing at the others."""
    image, mask = picture
    augmentation = Augmentation(basic=False, elastic=4)
    down = np.repeat([0.5, 0.0], 9)  # two rows further down, of four that are one standard deviation
    moved, moved_mask = applied(image, mask, augmentation, 3, elastic=down)
    np.testing.assert_allclose(moved[:-2], image[2:], atol=1e-6)
    np.testing.assert_array_equal(moved_mask[:-2], mask[2:])
    np.testing.assert_allclose(moved[-2:], image[[31, 30]], atol=1e-6, err_msg="beyond the edge: mirrored")
    centre = np.zeros(18)
    centre[9 + 4] = 1.0  # across, at the middle
    bent, _ = applied(image, mask, augmentation, 3, elastic=centre)
    assert bent[16, 16] == pytest.approx(image[16, 20], abs=1e-6)
    for y in (0, 16, 32):
        for x in (0, 32):
            assert bent[y, x] == pytest.approx(image[y, x], abs=1e-6)


def test_gamma_contrast_and_noise(picture):
    image, mask = picture
    for draw, power in ((0.0, 1 / 1.5), (1.0, 1.5), (0.5, 1.0)):
        changed, same = applied(image, mask, Augmentation(basic=False, gamma=0.5), 3, gamma=draw)
        np.testing.assert_allclose(changed, 2 * ((image + 1) / 2) ** power - 1, atol=1e-5)
        np.testing.assert_array_equal(same, mask)
    framed = np.pad(image, ((8, 8), (8, 8), (0, 0)))
    changed, _ = applied(framed, np.pad(mask, 8), Augmentation(basic=False, contrast=0.4), 3, (33, 33), contrast=0.0)
    np.testing.assert_allclose(changed[8:-8, 8:-8], image.mean() + (image - image.mean()) * 0.6, atol=1e-5)
    grey, noise = np.zeros((200, 200, 1)), Augmentation(basic=False, noise=0.2)
    noisy = [
        applied(grey, grey[..., 0], noise, noise=0.5, seed=seed)[0] for seed in ((0.1, 0.2), (0.1, 0.3), (0.1, 0.2))
    ]
    assert noisy[0].std() == pytest.approx(0.1, rel=0.03) and abs(noisy[0].mean()) < 2e-3
    np.testing.assert_array_equal(noisy[0], noisy[2])
    assert abs(np.corrcoef(noisy[0].ravel(), noisy[1].ravel())[0, 1]) < 0.02
    loud, _ = applied(grey + 0.9, grey[..., 0], Augmentation(basic=False, noise=2.0), noise=1.0)
    assert loud.max() == 1 and loud.min() == -1, "values are clipped"


def dataset(num_classes):
    y, x = np.ogrid[:70, :64]
    masks = np.stack([(np.hypot(y - 30 - n, x - 40) < 20) | (y > 3 * x + 30 + n) for n in range(5)])
    masks = masks.astype(np.uint8) * (num_classes - 1)
    images = np.where(masks > 0, 255, 0).astype(np.uint8)
    return Dataset.from_arrays(images, masks, num_classes=num_classes)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_image_and_mask_stay_aligned_under_xla(num_classes):
    """Images painted from their masks match them after any warp, and no class appears that was not there."""
    made = TrainingBatches(
        dataset(num_classes), range(5), input_size=64, output_size=48, batch_size=4, seed=2, augment=GEOMETRY
    )
    for images, masks, draws in made.raw().take(6):
        x, y = (part.numpy() for part in made.prepare(images, masks, draws))
        window = x[:, 8:56, 8:56, 0]
        clear = np.abs(window) > 0.3  # neither an edge nor the padding, which is grey
        assert clear.mean() > 0.6
        assert ((window > 0) == (y > 0))[clear].mean() > 0.985
        assert set(np.unique(y)) <= {0, num_classes - 1}


def test_a_sample_is_the_same_in_any_batch():
    made = TrainingBatches(dataset(2), range(5), input_size=64, output_size=48, batch_size=4, seed=2, augment=ALL)
    ((images, masks, draws),) = made.raw().take(1)
    x, y = made.prepare(images, masks, draws)
    other_x, other_y = made.prepare(*(tf.gather(part, [3, 1, 3]) for part in (images, masks, draws)))
    np.testing.assert_allclose(other_x, tf.gather(x, [3, 1, 3]), atol=1e-6)
    np.testing.assert_array_equal(other_y, tf.gather(y, [3, 1, 3]))
    assert len({image.tobytes() for image in x.numpy()}) == 4
