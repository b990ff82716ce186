"""The generator: equal seeds give equal bytes, and its sections look to a network like those of ISBI 2012."""

import numpy as np
import pytest

from unet_fast.data import generate
from unet_fast.errors import UserError


@pytest.fixture(scope="module")
def sections():
    return generate(4, seed=3)


def test_shapes_and_types(sections):
    images, masks = sections
    assert images.shape == (4, 512, 512, 1) and images.dtype == np.uint8
    assert masks.shape == (4, 512, 512) and masks.dtype == np.uint8
    assert set(np.unique(masks)) == {0, 1}


def test_an_image_depends_on_the_seed_and_its_number_alone(sections):
    images, masks = generate(2, seed=3)
    np.testing.assert_array_equal(images, sections[0][:2])
    np.testing.assert_array_equal(masks, sections[1][:2])
    assert (images[0] != images[1]).mean() > 0.9
    assert (generate(1, seed=4)[0] != images[:1]).mean() > 0.9


def test_statistics_are_those_of_sections(sections):
    images, masks = sections
    for image, mask in zip(images[..., 0].astype(float), masks, strict=True):
        assert 0.15 < 1 - mask.mean() < 0.3
        assert 60 < image[mask == 0].mean() < 105
        assert 120 < image[mask == 1].mean() < 165
        assert 25 < image[mask == 1].std() < 45


def test_grey_alone_does_not_solve_it(sections):
    """The best threshold leaves errors enough for context to mend: a network has something to learn."""
    images, masks = sections
    image, cell = images[..., 0], masks == 1
    best = 0
    for threshold in range(60, 160, 4):
        dark = image < threshold
        best = max(best, 2 * (dark & ~cell).sum() / (dark.sum() + (~cell).sum()))
    assert 0.55 < best < 0.85, "Dice of membrane by threshold"


def test_membranes_close_cells(sections):
    """Cells are separate regions: no region holds most of the plane, as it would if membranes had holes everywhere."""
    from scipy import ndimage

    for mask in sections[1]:
        regions, count = ndimage.label(mask)
        sizes = np.bincount(regions.ravel())[1:]
        assert count > 60 and sizes.max() < 0.2 * mask.size


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (33, 64), (100, 31)])
def test_any_size(size):
    images, masks = generate(1, size=size, seed=1)
    assert images.shape == (1, *size, 1) and masks.shape == (1, *size)


@pytest.mark.parametrize("arguments", [(0, (8, 8), 0), (1, (1, 8), 0), (1, (8, 8), -1)])
def test_impossible_arguments(arguments):
    with pytest.raises(UserError, match="expected at least 1 image"):
        generate(*arguments)
