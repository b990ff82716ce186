"""PNG: what is written comes back, and Pillow's silent conversions are refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unet_fast.data import open_stack, read_png, write_png
from unet_fast.errors import UserError


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        read_png(path)
    assert "\n" not in str(caught.value)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("uint8", (5, 7)), ("uint16", (5, 7)), ("uint8", (5, 7, 3)), ("uint8", (1, 1))]
)
def test_what_is_written_comes_back(tmp_path, dtype, shape):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)
    write_png(tmp_path / "a.png", image)
    back = read_png(tmp_path / "a.png")
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, image)


def test_a_large_image_is_no_attack(tmp_path, monkeypatch):
    image = np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)
    write_png(tmp_path / "a.png", image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    np.testing.assert_array_equal(read_png(tmp_path / "a.png"), image)
    np.testing.assert_array_equal(open_stack(tmp_path / "a.png").rows(0, 7, 9)[..., 0], image[7:9])


def test_one_bit_and_palette(tmp_path):
    bits = np.random.default_rng(0).random((5, 7)) > 0.5
    Image.fromarray(bits).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_png(tmp_path / "bits.png"), bits * np.uint8(255))

    indices = np.random.default_rng(0).integers(0, 3, (5, 7), np.uint8)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 9, 200]], np.uint8)
    palette = Image.fromarray(indices, mode=None).convert("P")
    palette.putdata(indices.ravel().tolist())
    palette.putpalette(colours.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_png(tmp_path / "palette.png", indexed=True), indices)
    np.testing.assert_array_equal(read_png(tmp_path / "palette.png"), colours[indices])


def test_transparency_and_rgb_of_16_bits_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "rgba.png")
    refused(tmp_path / "rgba.png", "alpha channel")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"\0" + bytes(6 * 2)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(2 * rows)) + chunk(b"IEND", b"")
    (tmp_path / "rgb16.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data)
    refused(tmp_path / "rgb16.png", "RGB of 8 bits")


def test_damaged_files_are_refused(tmp_path):
    refused(tmp_path / "absent.png", "cannot read")
    image = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)
    write_png(tmp_path / "a.png", image)
    whole = (tmp_path / "a.png").read_bytes()
    for length in range(0, len(whole) - 16, 37):  # the last chunk, IEND with its checksum, holds no pixels
        (tmp_path / "cut.png").write_bytes(whole[:length])
        refused(tmp_path / "cut.png")
    (tmp_path / "jpeg.png").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    refused(tmp_path / "jpeg.png", "not a PNG file")


def test_what_cannot_be_written(tmp_path):
    for image in (
        np.zeros((2, 2)),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros((2, 2, 3), np.uint16),
        np.zeros((0, 2), np.uint8),
    ):
        with pytest.raises(UserError, match="to write as PNG"):
            write_png(tmp_path / "a.png", image)
    write_png(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(UserError, match="exists already"):
        write_png(tmp_path / "a.png", np.ones((2, 2), np.uint8))
    assert not read_png(tmp_path / "a.png").any()
