"""Data sets that stay in their files: the same samples, read when they are used, and never all at once."""

import nibabel
import numpy as np
import pytest
import tensorflow as tf

from unet_fast.data import (
    TrainingBatches,
    evaluation_dataset,
    folder,
    generate,
    load_dataset,
    pipeline,
    training_dataset,
    write_png,
    write_tiff,
)
from unet_fast.data.png import PngStack
from unet_fast.data.stack import Pages
from unet_fast.errors import UserError

SIZES = {"input_size": 32, "output_size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two PNGs, a TIFF of two pages and a NIfTI of three slices, with masks of 0, 128 and 255."""
    root = tmp_path_factory.mktemp("data")
    images, masks = generate(7, size=(40, 48))
    images, masks = images[..., 0], np.array([0, 128, 255], np.uint8)[masks + (images[..., 0] > 170)]
    for name, stack in (("images", images), ("masks", masks)):
        (root / name).mkdir()
        write_png(root / name / "a.png", stack[0])
        write_png(root / name / "b.png", stack[1])
        write_tiff(root / name / "c.tif", stack[2:4])
        nibabel.save(
            nibabel.Nifti1Image(stack[4:].transpose(2, 1, 0), np.diag([0.5, 2, 1, 1])), root / name / "d.nii.gz"
        )
    return root


@pytest.fixture
def both(data, monkeypatch):
    """The data set in memory, and in its files."""
    loaded = load_dataset(data)
    monkeypatch.setattr(folder, "IN_MEMORY_BYTES", 0)
    lazy = load_dataset(data)
    assert isinstance(loaded.images, np.ndarray) and isinstance(lazy.images, Pages) and isinstance(lazy.masks, Pages)
    return loaded, lazy


def equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_same_data_set(both):
    loaded, lazy = both
    assert lazy.names == loaded.names == ("a", "b", "c_000", "c_001", "d_000", "d_001", "d_002")
    assert lazy.spec == loaded.spec and loaded.spec.mask_values == (0, 128, 255)
    assert lazy.spacings == loaded.spacings and loaded.spacings[4][:2] == (2, 0.5)
    assert lazy.images.shape == loaded.images.shape and lazy.images.dtype == loaded.images.dtype
    np.testing.assert_array_equal(lazy.images[:], loaded.images)
    np.testing.assert_array_equal(lazy.masks[[6, 2]], loaded.masks[[6, 2]])
    assert set(np.unique(loaded.masks)) == {0, 1, 2}


def test_the_same_batches(both):
    evaluated = [evaluation_dataset(d, [5, 0, 3, 6], batch_size=3, **SIZES).as_numpy_iterator() for d in both]
    equal(*evaluated)
    options = {"batch_size": 3, "seed": 1, **SIZES}
    equal(*(training_dataset(d, range(6), **options).take(4).as_numpy_iterator() for d in both))


@pytest.mark.parametrize("resident", [2**30, 0])
def test_the_same_blocks(both, monkeypatch, resident):
    monkeypatch.setattr(pipeline, "RESIDENT_BYTES", resident)

    def batches(dataset):
        made = TrainingBatches(dataset, range(6), batch_size=2, seed=1, **SIZES)
        images, masks, rows, draws = next(made.blocks(3, "CPU:0"))
        return [(tf.gather(images, rows[i]), tf.gather(masks, rows[i]), draws[i]) for i in range(5)]

    equal(*map(batches, both))


def test_only_what_is_used_is_read(both, monkeypatch):
    _, lazy = both
    read = []
    decode = PngStack._decode
    monkeypatch.setattr(PngStack, "_decode", lambda self: read.append(self.path.name) or decode(self))
    list(evaluation_dataset(lazy, [1, 4], batch_size=1, **SIZES))
    assert read == ["b.png", "b.png"]  # image and mask


def test_float_images_have_the_range_of_all(tmp_path, monkeypatch):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    values = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    write_tiff(tmp_path / "images" / "a.tif", values)
    write_tiff(tmp_path / "masks" / "a.tif", (values > 0).astype(np.uint8))
    monkeypatch.setattr(folder, "IN_MEMORY_BYTES", 0)
    assert load_dataset(tmp_path).spec.value_range == (values.min(), values.max())
    values[2, 3, 4] = np.nan
    write_tiff(tmp_path / "images" / "a.tif", values, overwrite=True)
    with pytest.raises(UserError, match=r"a.tif: page 2 holds NaN"):
        load_dataset(tmp_path)


def test_a_damaged_image_is_named_when_it_is_met(tmp_path, data, monkeypatch):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for file in "ab":
            (tmp_path / name / f"{file}.png").write_bytes((data / name / f"{file}.png").read_bytes())
    monkeypatch.setattr(folder, "IN_MEMORY_BYTES", 0)
    lazy = load_dataset(tmp_path)
    path = tmp_path / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"UserError: {path}: "):
        list(evaluation_dataset(lazy, [0, 1], batch_size=1, **SIZES))
