"""TIFF: what is written comes back, and nothing damaged passes for data."""

import logging
import os

import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_fast.data import open_stack, read_tiff, tiff, write_tiff
from unet_fast.data.formats import stack_writer
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


@pytest.mark.parametrize("compression", ["lzw", "zstd", "packbits"])
@pytest.mark.parametrize("layout", [{}, {"tile": (16, 32)}, {"rowsperstrip": 7}], ids=str)
@pytest.mark.parametrize("colour", [(), (3,)])
def test_rows_of_any_layout(tmp_path, compression, layout, colour):
    """Strips and tiles that end beyond the page, decoded only where they are asked for."""
    stack = stack_of("uint16", (2, 53, 40, *colour))
    photometric = "rgb" if colour else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", stack, compression=compression, photometric=photometric, **layout)
    opened = open_stack(tmp_path / "a.tif")
    for page, start, stop in ((0, 0, 53), (1, 13, 14), (1, 5, 40), (0, 52, 53)):
        np.testing.assert_array_equal(opened.rows(page, start, stop).squeeze(), stack[page, start:stop].squeeze())


@pytest.mark.parametrize("colour", [(), (3,)])
def test_jpeg(tmp_path, colour):
    """What is in its strips is looked at when the file is opened, and not when it is read, then closed."""
    stack = stack_of("uint8", (2, 40, 32, *colour))
    photometric = "rgb" if colour else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", stack, compression="jpeg", photometric=photometric, rowsperstrip=16)
    expected = tifffile.imread(tmp_path / "a.tif")
    np.testing.assert_array_equal(open_stack(tmp_path / "a.tif").rows(1, 13, 40).squeeze(), expected[1, 13:40])


def test_a_few_rows_read_a_few_strips(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", stack_of("uint8", (1, 640, 24)), compression="zlib", rowsperstrip=10)
    opened = open_stack(tmp_path / "a.tif")
    decode, decoded = opened.pages[0].keyframe.decode, []
    monkeypatch.setattr(opened.pages[0].keyframe, "decode", lambda *a, **k: decoded.append(a[1]) or decode(*a, **k))
    opened.rows(0, 100, 131)
    assert decoded == [10, 11, 12, 13]


def test_a_file_that_is_cut_after_it_was_opened(tmp_path):
    write_tiff(tmp_path / "a.tif", stack_of("uint8"))
    opened = open_stack(tmp_path / "a.tif")
    os.truncate(tmp_path / "a.tif", 900)
    with pytest.raises(UserError, match=r"a.tif: .*cut short"):
        opened.page(3)


@pytest.mark.parametrize(
    ("options", "spacing"),
    [
        ({}, (1, 1, "pixel")),
        ({"resolution": (2, 4)}, (25.4 / 4, 25.4 / 2, "mm")),
        ({"resolution": (20000, 40000), "resolutionunit": "CENTIMETER"}, (10 / 40000, 10 / 20000, "mm")),
        ({"resolution": (2, 4), "resolutionunit": "NONE"}, (1, 1, "pixel")),
        ({"resolution": (2, 4), "imagej": True, "metadata": {"unit": "um"}}, (0.25, 0.5, "um")),
        ({"resolution": (2, 4), "imagej": True, "metadata": {"unit": "\\u00B5m"}}, (0.25, 0.5, "um")),
        ({"resolution": (72, 72), "imagej": True}, (1, 1, "pixel")),
        ({"resolution": (0, 4)}, (1, 1, "pixel")),
        (
            {"ome": True, "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeY": 250, "PhysicalSizeYUnit": "nm"}},
            (0.25, 0.5, "um"),
        ),
    ],
    ids=str,
)
def test_spacing_is_read_and_kept(tmp_path, options, spacing):
    stack = stack_of("uint8")
    options = {**options, "metadata": {"axes": "ZYX", **options.get("metadata", {})}}
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **options)
    opened = open_stack(tmp_path / "a.tif")
    assert opened.spacing[:2] == pytest.approx(spacing[:2], rel=1e-6) and opened.spacing.unit == spacing[2]
    with stack_writer(tmp_path / "b.tif", stack.shape, np.uint8, like=opened) as writer:
        for page, image in enumerate(stack):
            writer.write(page, 0, image[:9])
            writer.write(page, 9, image[9:])
    assert open_stack(tmp_path / "b.tif").spacing == opened.spacing
    np.testing.assert_array_equal(read_tiff(tmp_path / "b.tif"), stack)
    if "resolution" in options and "imagej" not in options and 0 not in options["resolution"]:
        with tifffile.TiffFile(tmp_path / "a.tif") as a, tifffile.TiffFile(tmp_path / "b.tif") as b:
            for tag in ("XResolution", "YResolution", "ResolutionUnit"):
                assert a.pages[0].tags[tag].value == b.pages[0].tags[tag].value


def test_probabilities_are_channels_in_imagej(tmp_path):
    probabilities = stack_of("float32", (2, 8, 9, 3)).astype("float32")
    write_tiff(tmp_path / "a.tif", probabilities)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.is_imagej and tiff.series[0].axes == "ZCYX"
        np.testing.assert_array_equal(tiff.asarray(), np.moveaxis(probabilities, -1, 1))


def test_spacing_in_a_file_too_large_for_imagej(tmp_path, monkeypatch):
    stack = stack_of("uint8")
    metadata = {"axes": "ZYX", "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, resolution=(4, 2), metadata=metadata)
    monkeypatch.setattr(tiff, "_CLASSIC_LIMIT", 100)
    with stack_writer(tmp_path / "b.tif", stack.shape, np.uint8, like=open_stack(tmp_path / "a.tif")) as writer:
        writer.write(1, 0, stack[1])
    opened = open_stack(tmp_path / "b.tif")
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        assert file.is_bigtiff
    assert opened.spacing[:2] == pytest.approx((0.5e-3, 0.25e-3)) and opened.spacing.unit == "mm"
    np.testing.assert_array_equal(opened.page(1)[..., 0], stack[1])


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
