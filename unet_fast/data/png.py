"""PNG: one image a file, grey (8 or 16 bits), RGB or palette."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from unet_fast.data.files import atomic_path
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
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = file.read(26)
            if len(header) < 26 or not header.startswith(_SIGNATURE):
                raise UserError(f"{path}: not a PNG file; save it again as PNG or TIFF")
            depth, colour = struct.unpack("BB", header[24:26])
            if colour not in (_GREY, _RGB, _PALETTE):
                raise UserError(
                    f"{path}: expected grey or RGB, got an image with transparency; remove its alpha channel"
                )
            if colour == _RGB and depth == 16:
                # Pillow would drop the lower byte without a word.
                raise UserError(f"{path}: expected RGB of 8 bits, got 16; save it as TIFF")
            with Image.open(file, formats=["PNG"]) as image:
                if colour == _PALETTE and not indexed:
                    image = image.convert("RGB")
                array = np.asarray(image)
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{path}: cannot read it ({reason}); check the path, or save it again") from error
    except Exception as error:  # on damaged bytes Pillow raises anything, SyntaxError included
        raise UserError(f"{path}: damaged PNG file ({' '.join(str(error).split())[:120]}); save it again") from error
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    return array.astype(np.uint16) if depth == 16 else array


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
