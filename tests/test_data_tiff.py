"""TIFF: what is written comes back, and nothing damaged passes for data."""

import importlib.util
import logging
import os

import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_fast.data import read_tiff, write_tiff
from unet_fast.errors import UserError


def stack_of(dtype, shape=(4, 20, 24)):
    values = np.random.default_rng(0).integers(1, 255, shape)
    return values.astype(dtype) / 7 if dtype == "float32" else values.astype(dtype)


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        read_tiff(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(3, 20, 24), (1, 20, 24), (1, 1, 1)])
def test_what_is_written_comes_back(tmp_path, dtype, shape):
    stack = stack_of(dtype, shape).astype(dtype)
    write_tiff(tmp_path / "a.tif", stack)
    back = read_tiff(tmp_path / "a.tif")
    assert back.dtype == dtype and back.dtype.isnative
    np.testing.assert_array_equal(back, stack)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True},
        {"tile": (16, 16)},
        {"rowsperstrip": 7},
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"ome": True, "metadata": {"axes": "ZYX"}},
    ],
    ids=str,
)
def test_stacks_of_other_programs(tmp_path, options):
    stack = stack_of("uint16")
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **options)
    np.testing.assert_array_equal(read_tiff(tmp_path / "a.tif"), stack)


def test_pages_written_one_by_one(tmp_path):
    stack = stack_of("uint8")
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page in stack:
            writer.write(page, contiguous=False)
    np.testing.assert_array_equal(read_tiff(tmp_path / "a.tif"), stack)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_rgb(tmp_path, planar):
    stack = stack_of("uint8", (2, 20, 24, 3))
    stored = stack if planar == "contig" else np.moveaxis(stack, -1, 1)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar)
    np.testing.assert_array_equal(read_tiff(tmp_path / "a.tif"), stack)


def test_one_bit_pages_give_0_and_255(tmp_path):
    bits = stack_of("uint8", (20, 24)) > 100
    Image.fromarray(bits).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_tiff(tmp_path / "a.tif"), bits[None].astype(np.uint8) * 255)


@pytest.mark.parametrize("writer", ["contiguous", "compressed", "imagej", "pillow"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, writer):
    stack = stack_of("uint8")
    if writer == "pillow":
        first, *others = map(Image.fromarray, stack)
        first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    else:
        options = {"compressed": {"compression": "zlib"}, "imagej": {"imagej": True}}.get(writer, {})
        tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **options)
    whole = (tmp_path / "a.tif").read_bytes()
    cut = tmp_path / "cut.tif"
    outcomes = set()
    for length in range(0, len(whole), 23):
        cut.write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(read_tiff(cut), stack)  # only padding at the end may be missing
            outcomes.add("whole")
        except UserError as error:
            assert str(cut) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_flipped_bytes_never_give_another_error(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack_of("uint8"), photometric="minisblack", compression="zlib")
    whole = (tmp_path / "a.tif").read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(whole)
        for position in rng.integers(0, 500, 4):
            damaged[position] = rng.integers(256)
        (tmp_path / "b.tif").write_bytes(damaged)
        try:
            read_tiff(tmp_path / "b.tif")
        except UserError as error:
            assert "\n" not in str(error)


def test_a_chain_of_pages_that_bites_its_tail_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack_of("uint8", (1, 8, 8)), byteorder="<", metadata=None)
    whole = bytearray((tmp_path / "a.tif").read_bytes())
    first = int.from_bytes(whole[4:8], "little")
    link = first + 2 + 12 * int.from_bytes(whole[first : first + 2], "little")
    whole[link : link + 4] = whole[4:8]
    (tmp_path / "a.tif").write_bytes(whole)
    refused(tmp_path / "a.tif", "chain of pages")


@pytest.mark.parametrize(("tag", "value"), [(273, 10**6), (279, 10**6), (279, 0)])
def test_strips_that_are_not_in_the_file_are_refused(tmp_path, tag, value):
    """Tag 273 says where a strip begins, 279 how long it is; tifffile reads a strip of length 0 as zeros."""
    image = stack_of("uint8", (1, 20, 24))
    tifffile.imwrite(tmp_path / "a.tif", image, compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        tiff.pages[0].tags[tag].overwrite(value)
    refused(tmp_path / "a.tif", "page 0 is cut short")


def test_what_is_no_tiff(tmp_path):
    refused(tmp_path / "absent.tif", "cannot read")
    refused(tmp_path, "cannot read")
    (tmp_path / "a.tif").write_text("hello")
    refused(tmp_path / "a.tif", "not a TIFF file")


def test_damage_writes_nothing_to_the_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own would catch what a terminal gets
    tifffile.imwrite(tmp_path / "a.tif", stack_of("uint8"), photometric="minisblack", compression="zlib")
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "a.tif")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_page(tmp_path, value):
    stack = stack_of("float32").astype("float32")
    stack[1, 2, 3] = value
    write_tiff(tmp_path / "a.tif", stack)
    refused(tmp_path / "a.tif", "page 1", "NaN or infinity")


@pytest.mark.parametrize("dtype", ["int16", "uint32", "float64", "float16", "complex64"])
def test_other_types_are_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((2, 8, 8), dtype))
    refused(tmp_path / "a.tif", "uint8, uint16 or float32", dtype)


def test_other_layouts_are_refused(tmp_path):
    tifffile.imwrite(
        tmp_path / "rgba.tif", np.ones((2, 8, 8, 4), np.uint8), photometric="rgb", extrasamples=["unassalpha"]
    )
    refused(tmp_path / "rgba.tif", "got 4 samples")
    tifffile.imwrite(tmp_path / "channels.tif", np.ones((2, 3, 8, 8), np.uint8), imagej=True, metadata={"axes": "ZCYX"})
    refused(tmp_path / "channels.tif", "got channels")
    tifffile.imwrite(tmp_path / "time.tif", np.ones((2, 3, 8, 8), np.uint8), imagej=True, metadata={"axes": "TZYX"})
    refused(tmp_path / "time.tif", "stack of pages", "2x3x1x8x8")
    with tifffile.TiffWriter(tmp_path / "sizes.tif") as writer:
        for side in (8, 8, 9):
            writer.write(np.ones((side, 8), np.uint8), contiguous=False)
    refused(tmp_path / "sizes.tif", "8x8", "page 2", "9x8")


def test_a_compression_that_needs_imagecodecs(tmp_path):
    image = stack_of("uint8", (20, 24))
    Image.fromarray(image).save(tmp_path / "a.tif", compression="tiff_lzw")
    if importlib.util.find_spec("imagecodecs"):
        np.testing.assert_array_equal(read_tiff(tmp_path / "a.tif"), image[None])
    else:
        refused(tmp_path / "a.tif", "LZW", "pip install imagecodecs")


def test_probabilities_are_channels_in_imagej(tmp_path):
    probabilities = stack_of("float32", (2, 8, 9, 3)).astype("float32")
    write_tiff(tmp_path / "a.tif", probabilities)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.is_imagej and tiff.series[0].axes == "ZCYX"
        np.testing.assert_array_equal(tiff.asarray(), np.moveaxis(probabilities, -1, 1))


def test_writing_replaces_only_when_asked_and_leaves_nothing_behind(tmp_path, monkeypatch):
    target = tmp_path / "a.tif"
    old, new = stack_of("uint8"), stack_of("uint8") + 1
    write_tiff(target, old)
    with pytest.raises(UserError, match="exists already"):
        write_tiff(target, new)
    np.testing.assert_array_equal(read_tiff(target), old)

    def full_disk(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(tifffile, "imwrite", full_disk)
        write_tiff(target, new, overwrite=True)
    np.testing.assert_array_equal(read_tiff(target), old)

    os.link(target, tmp_path / "link")
    write_tiff(target, new, overwrite=True)
    np.testing.assert_array_equal(read_tiff(target), new)
    np.testing.assert_array_equal(
        read_tiff(tmp_path / "link"), old
    )  # a new file took the name; the old was not written to
    (tmp_path / "link").unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["a.tif"]


def test_what_cannot_be_written(tmp_path):
    for stack in (
        np.ones((2, 8, 8)),
        np.ones((8, 8), np.uint8),
        np.ones((0, 8, 8), np.uint8),
        np.ones((1, 8, 8), np.int64),
    ):
        with pytest.raises(UserError, match="to write"):
            write_tiff(tmp_path / "a.tif", stack)
    with pytest.raises(UserError, match="cannot write there"):
        write_tiff(tmp_path / "absent" / "a.tif", stack_of("uint8"))
    with pytest.raises(UserError, match="got a folder"):
        write_tiff(tmp_path, stack_of("uint8"))
    assert not list(tmp_path.iterdir())
