"""PNG: one image a file, grey (8 or 16 bits), RGB or palette."""

import functools
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from unet_fast.data.files import atomic_path
from unet_fast.data.stack import Spacing, Stack, check_claim, one_line
from unet_fast.errors import UserError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types, PNG specification section 11.2.2


def read_png(path, *, indexed=False):
    """Read a PNG file.

    Args:
        path: file to read: grey of 1, 2, 4, 8 or 16 bits, RGB of 8 bits, or a palette.
        indexed: give a palette image's indices, as label images want, and not its colours.

    Returns:
        numpy array `[H, W]` or, for colour, `[H, W, 3]`; uint8, or uint16 for 16 bits. One-bit images give 0 and 255.

    Raises:
        UserError: the file is missing, damaged or cut short, has an alpha channel, or is RGB of 16 bits.

    Example:

    >>> import tempfile, numpy as np
    >>> from unet_fast.data import read_png, write_png
    >>> path = tempfile.mkdtemp() + "/labels.png"
    >>> write_png(path, np.eye(3, dtype=np.uint8))
    >>> read_png(path).tolist()
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    pixels = open_png(path, indexed=indexed).page(0)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def open_png(path, *, indexed=False):
    """Open a PNG file, whose pixels are read when they are asked for.

    Args, errors: as `read_png`; damage of the pixels shows when they are read.

    Returns:
        Stack of one page.
    """
    path = Path(path)
    with _errors(path), path.open("rb") as file:
        header = file.read(26)
        if len(header) < 26 or not header.startswith(_SIGNATURE):
            raise UserError(f"{path}: not a PNG file; save it again as PNG or TIFF")
        width, height, depth, colour = struct.unpack(">IIBB", header[16:26])
        if colour not in (_GREY, _RGB, _PALETTE):
            raise UserError(f"{path}: expected grey or RGB, got an image with transparency; remove its alpha channel")
        if colour == _RGB and depth == 16:
            # Pillow would drop the lower byte without a word.
            raise UserError(f"{path}: expected RGB of 8 bits, got 16; save it as TIFF")
    coloured = colour == _RGB or (colour == _PALETTE and not indexed)
    dtype = np.dtype(np.uint16 if depth == 16 else np.uint8)
    channels, size = 3 if coloured else 1, path.stat().st_size
    check_claim(path, height * width * channels * dtype.itemsize, size)
    if not _holds_chunks(path, size):
        raise UserError(f"{path}: damaged or cut short (a part is said to be larger than the file); save it again")
    return PngStack(path, (1, height, width, channels), dtype, Spacing())


def _holds_chunks(path, size):
    """Whether every chunk ends within the file; Pillow takes memory for as much as a chunk says that it has."""
    with _errors(path), path.open("rb") as file:
        offset = len(_SIGNATURE)
        while offset + 8 <= size:
            file.seek(offset)
            length, name = struct.unpack(">I4s", file.read(8))
            offset += length + 12
            if offset > size:
                return False
            if name == b"IEND":
                break
    return True


@dataclass(frozen=True)
class PngStack(Stack):
    """A PNG file; see `Stack`. It can be decoded as a whole only, and is kept in memory once a part was asked for."""

    def rows(self, page, start, stop):
        if (start, stop) == (0, self.shape[1]):
            return self._decode()
        return self._pixels[start:stop]

    @functools.cached_property
    def _pixels(self):
        return self._decode()

    def _decode(self):
        # Not Image.open, which takes a large image for an attack.
        with _errors(self.path), self.path.open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
            pixels = np.asarray(image.convert("RGB") if image.mode == "P" and self.shape[3] == 3 else image)
            if pixels.dtype == bool:
                pixels = pixels.astype(np.uint8) * 255
            return pixels.astype(self.dtype, copy=False).reshape(self.shape[1:])


def write_png(path, image, *, overwrite=False):
    """Write labels or a picture as PNG; the file appears whole or not at all.

    Args:
        path: file to write.
        image: uint8 or uint16 `[H, W]`, or uint8 `[H, W, 3]`.
        overwrite: whether an existing file may be replaced.

    Raises:
        UserError: another type or rank, an empty image, an existing file, or a folder that cannot be written to.

    Example:

    >>> import tempfile, numpy as np
    >>> from unet_fast.data import write_png
    >>> write_png(tempfile.mkdtemp() + "/picture.png", np.zeros((4, 4, 3), np.uint8))
    """
    image = np.asarray(image)
    grey = image.ndim == 2 and image.dtype in (np.uint8, np.uint16)
    colour = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if not (grey or colour) or image.size == 0:
        raise UserError(
            f"{path}: expected uint8 or uint16 [H, W] or uint8 [H, W, 3] to write as PNG, got {image.dtype} "
            f"{list(image.shape)}; convert it or write TIFF"
        )
    with atomic_path(path, overwrite=overwrite) as temporary:
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, format="PNG")


@contextmanager
def png_writer(path, shape, dtype):
    """A PNG that is filled in rows at a time, in memory; it appears when the block ends.

    Args:
        path: file to write, which must not be there yet.
        shape: (1, H, W).
        dtype: uint8 or uint16.

    Yields:
        an object with `write(page, start, rows)`, as `unet_fast.data.files.RawPlanes`.
    """
    canvas = _Canvas(np.zeros(shape[1:], dtype))
    yield canvas
    write_png(path, canvas.pixels)


@dataclass(frozen=True)
class _Canvas:
    pixels: np.ndarray

    def write(self, page, start, rows):
        self.pixels[start : start + len(rows)] = rows


@contextmanager
def _errors(path):
    """Makes a UserError of whatever Pillow raises on damaged bytes, SyntaxError included."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{path}: cannot read it ({reason}); check the path, or save it again") from error
    except Exception as error:
        raise UserError(f"{path}: damaged PNG file ({one_line(error)}); save it again") from error
