"""Data folders: both layouts load, and every mistake gets one line that names the file."""

import os
from pathlib import Path

import numpy as np
import pytest
import tifffile

from unet_fast.data import load_dataset, write_png, write_tiff
from unet_fast.errors import UserError

ISBI = Path(os.environ.get("UNET_FAST_ISBI", Path(__file__).parents[2] / "shared" / "data" / "isbi2012"))
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (8, 10), np.uint8)
MASK = RNG.integers(0, 2, (8, 10), np.uint8) * 255


@pytest.fixture
def folder(tmp_path):
    """Two pairs, `a` and `b`."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for stem in "ba":
        write_png(tmp_path / "images" / f"{stem}.png", IMAGE)
        write_png(tmp_path / "masks" / f"{stem}.png", MASK)
    return tmp_path


def refused(path, *words, **options):
    with pytest.raises(UserError) as caught:
        load_dataset(path, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


def test_folder_of_png_files(folder):
    write_png(folder / "images" / "c.png", 255 - IMAGE)
    write_png(folder / "masks" / "c.png", 255 - MASK)
    (folder / "images" / ".hidden").write_text("")
    data = load_dataset(folder)
    assert data.names == ("a", "b", "c")
    np.testing.assert_array_equal(data.images[..., 0], [IMAGE, IMAGE, 255 - IMAGE])
    np.testing.assert_array_equal(data.masks, [MASK // 255, MASK // 255, 1 - MASK // 255])
    assert (data.spec.layout, data.spec.num_classes, data.spec.value_range) == ("folder", 2, (0, 255))


def test_folder_of_mixed_types_and_stacks(folder):
    for file in folder.glob("*/*"):
        file.unlink()
    colour = RNG.integers(0, 255, (3, 8, 10, 3), np.uint8)
    tifffile.imwrite(folder / "images" / "stack.tif", colour[:2], photometric="rgb")
    write_tiff(folder / "masks" / "stack.TIFF", np.stack([MASK // 255, 2 * (MASK // 255)]).astype(np.uint16))
    write_png(folder / "images" / "one.png", colour[2])
    write_png(folder / "masks" / "one.png", MASK // 255)
    data = load_dataset(str(folder))
    assert data.names == ("one", "stack_000", "stack_001")
    np.testing.assert_array_equal(data.images, colour[[2, 0, 1]])
    np.testing.assert_array_equal(data.masks, np.stack([MASK // 255, MASK // 255, 2 * (MASK // 255)]))
    assert data.spec.num_classes == 3


def test_folder_without_masks(folder):
    for file in (folder / "masks").iterdir():
        file.unlink()
    (folder / "masks").rmdir()
    data = load_dataset(folder)
    assert data.masks is None and data.spec.num_classes is None and len(data.images) == 2


def test_isbi_layout(tmp_path):
    write_tiff(tmp_path / "train-volume.tif", np.stack([IMAGE, 255 - IMAGE]))
    write_tiff(tmp_path / "train-labels.tif", np.stack([MASK, 255 - MASK]))
    data = load_dataset(tmp_path)
    assert data.spec.layout == "isbi" and data.names == ("train-volume_000", "train-volume_001")
    np.testing.assert_array_equal(data.masks, np.stack([MASK, 255 - MASK]) // 255)


@pytest.mark.skipif(not ISBI.is_dir(), reason="ISBI 2012 is not there; set UNET_FAST_ISBI to its folder")
def test_the_real_isbi_data():
    data = load_dataset(ISBI)
    assert data.images.shape == (30, 512, 512, 1) and data.images.dtype == np.uint8
    assert data.masks.shape == (30, 512, 512) and data.spec.num_classes == 2
    membrane = data.images[..., 0][data.masks == 0].mean()
    assert membrane < data.images[..., 0][data.masks == 1].mean() - 40, "class 0 is the dark membrane"


def test_synthetic():
    data = load_dataset("synthetic")
    assert data.images.shape == (30, 512, 512, 1) and data.masks.shape == (30, 512, 512)
    assert data.spec.layout == "synthetic" and len(set(data.names)) == 30


def test_num_classes_is_passed_on(folder):
    assert load_dataset(folder, num_classes=2).spec.num_classes == 2
    refused(folder, folder, "0..2", num_classes=3)


def test_no_known_layout(tmp_path):
    refused(tmp_path / "absent", "expected a data folder", "found nothing")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "found a file")
    refused(tmp_path, "no data found", "train-volume.tif", "images/ and masks/")


def test_both_layouts_or_half_of_one(folder):
    write_tiff(folder / "train-volume.tif", IMAGE[None])
    refused(folder, "both layouts")
    (folder / "images").rename(folder / "i")
    (folder / "masks").rename(folder / "m")
    refused(folder, "train-labels.tif is missing")
    (folder / "train-volume.tif").rename(folder / "train-labels.tif")
    refused(folder, "train-volume.tif is missing")


def test_files_without_partner(folder):
    (folder / "masks" / "b.png").unlink()
    refused(folder, folder / "images" / "b.png", folder / "masks", "2 images, 1 masks")
    write_png(folder / "masks" / "b.png", MASK)
    write_png(folder / "masks" / "c.png", MASK)
    write_png(folder / "masks" / "d.png", MASK)
    refused(folder, folder / "masks" / "c.png", "and 1 more", folder / "images")
    (folder / "images").rename(folder / "pictures")
    refused(folder, folder / "images", "missing")


def test_empty_folders(folder):
    for file in (folder / "masks").iterdir():
        file.unlink()
    refused(folder, folder / "masks", "empty")
    for file in (folder / "images").iterdir():
        file.unlink()
    refused(folder, folder / "images", "empty")


def test_other_files_in_the_folder(folder):
    (folder / "images" / "c.jpg").write_bytes(b"")
    refused(folder, folder / "images" / "c.jpg", "only TIFF, PNG or NIfTI")
    (folder / "images" / "c.jpg").unlink()
    write_tiff(folder / "images" / "a.tif", IMAGE[None])
    refused(folder, folder / "images" / "a.tif", "a.png has the same name")


def test_sizes_that_differ(folder):
    write_png(folder / "masks" / "b.png", MASK[:7], overwrite=True)
    refused(folder, folder / "masks" / "b.png", "7x10", "b.png is 8x10")
    write_png(folder / "masks" / "b.png", MASK, overwrite=True)
    write_png(folder / "images" / "b.png", IMAGE[:7], overwrite=True)
    refused(folder, folder / "images" / "b.png", "7x10", "a.png is 8x10")
    write_png(folder / "images" / "b.png", IMAGE.astype(np.uint16), overwrite=True)
    refused(folder, folder / "images" / "b.png", "8x10 uint16", "a.png is 8x10 uint8")
    write_png(folder / "images" / "b.png", np.stack([IMAGE] * 3, -1), overwrite=True)
    refused(folder, folder / "images" / "b.png", "RGB")


def test_pages_that_differ(tmp_path):
    write_tiff(tmp_path / "train-volume.tif", np.stack([IMAGE] * 3))
    write_tiff(tmp_path / "train-labels.tif", np.stack([MASK] * 2))
    refused(tmp_path, "train-labels.tif: 8x10 uint8, 2 pages", "train-volume.tif is 8x10 uint8, 3 pages")


def test_masks_that_are_none(folder):
    write_png(folder / "masks" / "b.png", np.stack([MASK] * 3, -1), overwrite=True)
    refused(folder, folder / "masks" / "b.png", "RGB", "one whole number a pixel")
    write_png(folder / "masks" / "b.png", MASK // 2, overwrite=True)
    refused(folder, folder, "0, 127, 255", "127, in b", num_classes=2)


def test_images_of_one_pixel(tmp_path):
    write_tiff(tmp_path / "train-volume.tif", IMAGE[None, :1, :1])
    write_tiff(tmp_path / "train-labels.tif", MASK[None, :1, :1])
    refused(tmp_path, tmp_path, "at least 2x2 pixels, got 1x1")


def test_damaged_files_are_named(folder):
    (folder / "images" / "a.png").write_bytes(b"nothing")
    refused(folder, folder / "images" / "a.png", "not a PNG file")
