"""NIfTI: slices as stacks, whatever the type; what is written lies where its model lies in the world."""

import nibabel
import numpy as np
import pytest

from unet_fast.data import open_stack
from unet_fast.data.formats import stack_writer
from unet_fast.errors import UserError

AFFINE = np.array([[0.0, -0.5, 0, 10], [0.25, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 200, (5, 4, 3))  # X, Y, Z


def saved(path, array, affine=AFFINE, kind=nibabel.Nifti1Image, **fields):
    image = kind(array, affine)
    image.header.set_xyzt_units("mm")
    for name, value in fields.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def refused(path, *words, **options):
    with pytest.raises(UserError) as caught:
        stack = open_stack(path, **options)
        for page in range(stack.shape[0]):
            stack.page(page)
    assert "\n" not in str(caught.value)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ("uint8", "uint8"),
        ("uint16", "uint16"),
        (">u2", "uint16"),
        ("int16", "float32"),
        ("float32", "float32"),
        ("float64", "float32"),
    ],
)
def test_slices(tmp_path, suffix, stored, given):
    kind = nibabel.Nifti2Image if stored == "float64" else nibabel.Nifti1Image
    image = kind(VOLUME.astype(stored), AFFINE, dtype=np.dtype(stored).newbyteorder("="))
    if stored[0] == ">":
        image = kind(VOLUME.astype(stored), AFFINE, header=image.header.as_byteswapped(">"))
    nibabel.save(image, tmp_path / f"a{suffix}")
    stack = open_stack(tmp_path / f"a{suffix}")
    assert stack.shape == (3, 4, 5, 1) and stack.dtype == given and stack.dtype.isnative
    for z in range(3):
        page = stack.page(z)
        assert page.dtype == given and page.dtype.isnative
        np.testing.assert_array_equal(page[..., 0], VOLUME[:, :, z].T)
    np.testing.assert_array_equal(stack.rows(1, 2, 3)[..., 0], VOLUME[:, 2:3, 1].T)


def test_one_slice_more_axes_and_colour(tmp_path):
    flat = open_stack(saved(tmp_path / "flat.nii", VOLUME[..., 0].astype("uint8")))
    assert flat.shape == (1, 4, 5, 1)
    np.testing.assert_array_equal(flat.page(0)[..., 0], VOLUME[..., 0].T)
    long = open_stack(saved(tmp_path / "long.nii", VOLUME[..., None].astype("uint8")))
    np.testing.assert_array_equal(long.page(2)[..., 0], VOLUME[..., 2].T)
    colours = np.zeros(VOLUME.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["G"] = VOLUME
    colour = open_stack(saved(tmp_path / "colour.nii", colours))
    assert colour.shape == (3, 4, 5, 3) and colour.dtype == np.uint8
    np.testing.assert_array_equal(
        colour.page(1), np.stack([0 * VOLUME, VOLUME, 0 * VOLUME], -1)[:, :, 1].swapaxes(0, 1)
    )


def test_scaled_values_are_those_that_are_meant(tmp_path):
    image = nibabel.Nifti1Image(VOLUME.astype(np.uint8), AFFINE)
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "a.nii")
    stack = open_stack(tmp_path / "a.nii")
    assert stack.dtype == np.float32
    np.testing.assert_allclose(stack.page(0)[..., 0], nibabel.load(tmp_path / "a.nii").get_fdata()[..., 0].T, rtol=1e-6)
    assert stack.page(0).min() < 0


def test_spacing(tmp_path):
    assert open_stack(saved(tmp_path / "a.nii", VOLUME.astype("uint8"))).spacing == (0.5, 0.25, "mm")
    assert open_stack(saved(tmp_path / "b.nii", VOLUME.astype("uint8"), xyzt_units=0)).spacing == (0.5, 0.25, "unit")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
def test_masks_of_any_type(tmp_path, dtype):
    stack = open_stack(saved(tmp_path / "a.nii.gz", (VOLUME % 3).astype(dtype)), labels=True)
    assert stack.dtype == ("uint8" if dtype == "uint8" else "uint16")
    np.testing.assert_array_equal(stack.page(1)[..., 0], VOLUME[..., 1].T % 3)


@pytest.mark.parametrize("value", [0.5, -1, 65536, np.nan])
def test_masks_that_are_none(tmp_path, value):
    array = np.zeros((4, 4, 2), np.float32)
    array[1, 2, 1] = value
    refused(saved(tmp_path / "a.nii", array), "whole numbers from 0 to 65535", "slice 1", labels=True)


def test_what_is_refused(tmp_path):
    refused(tmp_path / "absent.nii", "cannot read it")
    (tmp_path / "text.nii.gz").write_text("hello")
    refused(tmp_path / "text.nii.gz", "not a NIfTI file")
    refused(saved(tmp_path / "time.nii", np.zeros((4, 4, 2, 3), np.uint8)), "got sizes 4x4x2x3")
    refused(saved(tmp_path / "complex.nii", np.zeros((4, 4, 2), np.complex64)), "real numbers, got complex64")
    array = np.zeros((4, 4, 2), np.float32)
    array[0, 0, 1] = np.inf
    refused(saved(tmp_path / "inf.nii", array), "page 1 holds NaN or infinity")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, suffix):
    whole = saved(tmp_path / f"a{suffix}", RNG.integers(0, 255, (16, 16, 9)).astype(np.uint8)).read_bytes()
    for length in range(0, len(whole) - 16, 211):
        (tmp_path / f"cut{suffix}").write_bytes(whole[:length])
        refused(tmp_path / f"cut{suffix}")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("big_endian", [False, True])
def test_what_is_written_lies_where_its_model_lies(tmp_path, suffix, big_endian):
    header = nibabel.Nifti1Header(endianness=">" if big_endian else "<")
    header["descrip"] = b"a scan"
    image = nibabel.Nifti1Image(VOLUME.astype(np.int16), AFFINE, header)
    image.header.set_slope_inter(2, 1)
    image.set_sform(AFFINE, code=4)
    nibabel.save(image, tmp_path / f"a{suffix}")
    source = open_stack(tmp_path / f"a{suffix}")
    labels = RNG.integers(0, 300, (3, 4, 5))
    with stack_writer(tmp_path / f"b{suffix}", labels.shape, np.uint16, like=source) as writer:
        for z in range(3):
            writer.write(z, 0, labels[z, :1])
            writer.write(z, 1, labels[z, 1:])
        assert not (tmp_path / f"b{suffix}").exists(), "it appears whole or not at all"
    ours, theirs = nibabel.load(tmp_path / f"b{suffix}"), nibabel.load(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(ours.get_fdata(), labels.transpose(2, 1, 0))
    assert ours.get_data_dtype() == np.dtype(np.uint16).newbyteorder(header.endianness)
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert ours.header.get_zooms() == theirs.header.get_zooms()
    for field in ("qform_code", "sform_code", "xyzt_units", "descrip"):
        assert ours.header[field] == theirs.header[field]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a" + suffix, "b" + suffix])


def test_probabilities_are_a_fourth_axis(tmp_path):
    source = open_stack(saved(tmp_path / "a.nii.gz", VOLUME.astype(np.uint8)))
    values = RNG.random((3, 4, 5, 2)).astype(np.float32)
    with stack_writer(tmp_path / "b.nii.gz", values.shape, np.float32, like=source) as writer:
        for z in range(3):
            writer.write(z, 0, values[z])
    image = nibabel.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), values.transpose(2, 1, 0, 3))
    np.testing.assert_array_equal(image.affine, AFFINE)


def test_nothing_is_left_of_a_write_that_failed(tmp_path):
    source = open_stack(saved(tmp_path / "a.nii.gz", VOLUME.astype(np.uint8)))
    with pytest.raises(KeyError), stack_writer(tmp_path / "b.nii.gz", (3, 4, 5), np.uint8, like=source):
        raise KeyError
    writing = stack_writer(tmp_path / "a.nii.gz", (3, 4, 5), np.uint8, like=source)
    with pytest.raises(UserError, match="exists already"), writing:
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
