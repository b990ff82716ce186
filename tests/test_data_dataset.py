"""A data set is checked when it is made: types, shapes, values of masks, range of images."""

import numpy as np
import pytest

from unet_fast.data import Dataset
from unet_fast.errors import UserError

IMAGES = np.zeros((2, 4, 5), np.uint8)


def masks_of(*values, dtype=np.uint8):
    masks = np.full((2, 4, 5), values[0], dtype)
    masks[1].flat[: len(values)] = values
    return masks


def test_channels_names_and_masks_are_made_explicit():
    data = Dataset.from_arrays(IMAGES, masks_of(0, 1))
    assert data.images.shape == (2, 4, 5, 1)
    assert data.names == ("0", "1")
    assert data.masks.dtype == np.uint8
    assert data.spec.num_classes == 2
    colour = Dataset.from_arrays(np.zeros((2, 4, 5, 3), np.uint16), names=["a", "b"])
    assert colour.images.shape == (2, 4, 5, 3) and colour.masks is None and colour.spec.num_classes is None


@pytest.mark.parametrize(
    ("values", "given", "classes", "indices"),
    [
        ((0, 255), None, 2, (0, 1)),
        ((0, 255), 2, 2, (0, 1)),
        ((0, 1, 2, 3), None, 4, (0, 1, 2, 3)),
        ((0, 3), 4, 4, (0, 3)),
        ((1,), 2, 2, (1,)),
        ((255,), 2, 2, (1,)),
        ((0,), 2, 2, (0,)),
        ((0, 255), 256, 256, (0, 255)),
        (tuple(range(20)), None, 20, tuple(range(20))),
        ((0, 128, 255), None, 3, (0, 1, 2)),
        ((1, 2), None, 2, (0, 1)),
        ((0, 1, 255), None, 3, (0, 1, 2)),
        (tuple(range(1, 20)), None, 19, tuple(range(19))),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_mask_values_become_class_indices(values, given, classes, indices, dtype):
    masks = masks_of(*values, dtype=dtype)
    data = Dataset.from_arrays(IMAGES, masks, num_classes=given)
    assert data.spec.num_classes == classes
    assert data.masks.dtype == np.uint8
    np.testing.assert_array_equal(data.masks, np.array(indices)[np.searchsorted(values, masks)])


def test_bool_masks():
    data = Dataset.from_arrays(IMAGES, masks_of(0, 1).astype(bool))
    np.testing.assert_array_equal(data.masks, masks_of(0, 1))


@pytest.mark.parametrize(
    ("values", "given", "words"),
    [
        ((0, 2), 2, ("0, 2", "2, in second")),
        ((0, 255, 1), 2, ("0, 1, 255", "255, in second")),
        ((0, 1, 2), 2, ("0..1, or 0 and 255", "2, in second")),
        ((0, 255), 3, ("0..2", "255, in second")),
        ((0,), None, ("every pixel of the masks is 0",)),
        ((255,), None, ("every pixel of the masks is 255",)),
        (tuple(range(1, 20)), 5, ("... (19 values)", "the first that does not fit, 5")),
        ((0, 1), 1, ("2 to 256 classes",)),
    ],
)
def test_other_mask_values_are_named(values, given, words):
    with pytest.raises(UserError) as caught:
        Dataset.from_arrays(IMAGES, masks_of(*values, dtype=np.uint16), names=["first", "second"], num_classes=given)
    for word in words:
        assert word in str(caught.value)


def test_mask_values_that_a_model_prescribes():
    def data(*values, prescribed):
        return Dataset.from_arrays(IMAGES, masks_of(*values, dtype=np.uint16), names=["a", "b"], mask_values=prescribed)

    some = data(0, 300, prescribed=(0, 128, 300))
    assert (
        set(np.unique(some.masks)) == {0, 2} and some.spec.num_classes == 3 and some.spec.mask_values == (0, 128, 300)
    )
    for prescribed in ((0, 1), (0, 255)):  # two ways to write the same
        for values in ((0, 1), (0, 255), (0,)):
            assert data(*values, prescribed=prescribed).masks.max() == (len(values) > 1)
            assert data(*values, prescribed=prescribed).spec.mask_values == prescribed
    with pytest.raises(UserError, match=r"mask values 0, 128, 255 like the training's; got 0, 64 .* 64, in b"):
        data(0, 64, prescribed=(0, 128, 255))
    with pytest.raises(UserError, match=r"mask values 0, 128 like the training's; got 0, 1 "):
        data(0, 1, prescribed=(0, 128))


def test_a_grey_picture_is_no_mask():
    picture = np.arange(20, dtype=np.uint8).reshape(1, 4, 5) * 13
    assert Dataset.from_arrays(IMAGES[:1], picture).spec.mask_values == tuple(range(0, 260, 13))
    images = np.zeros((1, 8, 8), np.uint8)
    with pytest.raises(UserError, match=r"0..K-1 with K at most 256, or at most 32 others; got 0, 3, .* \(64 values\)"):
        Dataset.from_arrays(images, np.arange(64, dtype=np.uint8).reshape(1, 8, 8) * 3)


def test_more_than_256_classes_are_refused():
    masks = np.arange(400, dtype=np.uint16).reshape(1, 20, 20)
    with pytest.raises(UserError, match="K at most 256"):
        Dataset.from_arrays(np.zeros((1, 20, 20), np.uint8), masks)


@pytest.mark.parametrize(
    ("images", "masks", "names", "words"),
    [
        (np.zeros((4, 5), np.uint8), None, None, "images"),
        (np.zeros((0, 4, 5), np.uint8), None, None, "at least one"),
        (np.zeros((2, 4, 5), np.float64), None, None, "float64"),
        (np.zeros((2, 1, 5), np.uint8), None, None, "at least 2x2 pixels, got 1x5"),
        (IMAGES, masks_of(0, 1)[:, :3], None, "images' shape"),
        (IMAGES, masks_of(0, 1)[:1], None, "images' shape"),
        (IMAGES, masks_of(0, 1).astype(np.float32), None, "float32"),
        (IMAGES, None, ["a"], "1 names for 2 images"),
        (np.full((1, 4, 4), np.nan, np.float32), None, None, "NaN or infinity"),
        (np.full((1, 4, 4), 0.5, np.float32), None, None, "every pixel of the float images is 0.5"),
    ],
)
def test_what_does_not_fit_is_refused(images, masks, names, words):
    with pytest.raises(UserError, match=words):
        Dataset.from_arrays(images, masks, names=names)


def test_value_range():
    assert Dataset.from_arrays(IMAGES).spec.value_range == (0, 255)
    # Of 16 bits those that are used, but no less than a byte: what is nearly black to the eye is not to the network.
    for largest, bits in ((0, 8), (255, 8), (256, 9), (4000, 12), (65535, 16)):
        wide = np.full(IMAGES.shape, largest // 2, np.uint16)
        wide[1, 2, 3] = largest
        assert Dataset.from_arrays(wide).spec.value_range == (0, 2**bits - 1)
    data = Dataset.from_arrays(np.linspace(-3, 5, 40, dtype=np.float32).reshape(2, 4, 5))
    assert data.spec.value_range == (-3, 5)
    other = data.with_value_range((0, 1))
    assert other.spec.value_range == (0, 1) and other.images is data.images
    with pytest.raises(UserError, match="low below high"):
        data.with_value_range((1, 1))
