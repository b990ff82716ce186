"""Multi-page TIFF: one page an image, as microscopes, ImageJ and the ISBI-2012 challenge write them."""

import logging
import math
import struct

import numpy as np
import tifffile

from unet_fast.data.files import atomic_path
from unet_fast.errors import UserError

IMAGE_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))

# tifffile also logs the damage that it raises for; without a handler Python would print those lines to stderr.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_CLASSIC_LIMIT = 2**32 - 2**25  # bytes: what a TIFF with 32-bit offsets holds, less room for its tags


def read_tiff(path):
    """Read every page of a TIFF file.

    Values are as stored: a palette gives its indices, min-is-white is not inverted, and one-bit pages give 0 and 255.

    Args:
        path: file to read. Pages must agree in size and type; grey or RGB; uint8, uint16 or float32 (or one bit).

    Returns:
        numpy array `[N, H, W]`, or `[N, H, W, 3]` for RGB, of the file's own type in native byte order.

    Raises:
        UserError: the file is missing, damaged or cut short; pages differ; the type or the layout is not one of the
            above; a float page holds NaN or infinity; a compression needs the `imagecodecs` package.

    Example:

    >>> import tempfile, numpy as np
    >>> from unet_fast.data import read_tiff, write_tiff
    >>> path = tempfile.mkdtemp() + "/stack.tif"
    >>> write_tiff(path, np.arange(24, dtype=np.uint16).reshape(2, 3, 4))
    >>> read_tiff(path).shape
    (2, 3, 4)
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            _check_complete(tiff, path)
            stacks = [_pages(series, path) for series in tiff.series]
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror or error}); check the path and its permissions"
        ) from error
    except (
        Exception
    ) as error:  # on damaged bytes tifffile and its decoders raise anything, from KeyError to MemoryError
        if "imagecodecs" in str(error):
            codec = str(error).split(" ", 1)[0].strip("<:")
            raise UserError(
                f"{path}: its compression ({codec}) needs the imagecodecs package; `pip install imagecodecs`, or save "
                "the file uncompressed"
            ) from error
        raise UserError(
            f"{path}: not a TIFF file, or damaged or cut short ({_one_line(error)}); save it again"
        ) from error
    if not stacks:
        raise UserError(f"{path}: expected at least one page, got none; save it again")
    return _checked(stacks, path)


def write_tiff(path, stack, *, overwrite=False):
    """Write labels or probabilities as a TIFF that ImageJ and tifffile open as a stack.

    The file appears whole or not at all.

    Args:
        path: file to write.
        stack: uint8, uint16 or float32 `[N, H, W]`, a page a slice; or `[N, H, W, K]`, stored as K channels of N
            slices each.
        overwrite: whether an existing file may be replaced.

    Raises:
        UserError: another type or rank, an empty stack, an existing file, or a folder that cannot be written to.

    Example:

    >>> import tempfile, numpy as np
    >>> from unet_fast.data import write_tiff
    >>> write_tiff(tempfile.mkdtemp() + "/probabilities.tif", np.zeros((2, 8, 8, 3), np.float32))
    """
    stack = np.asarray(stack)
    if stack.dtype not in IMAGE_DTYPES or stack.ndim not in (3, 4) or stack.size == 0:
        raise UserError(
            f"{path}: expected a uint8, uint16 or float32 stack [N, H, W] or [N, H, W, K] to write, got {stack.dtype} "
            f"{list(stack.shape)}; convert it"
        )
    if stack.ndim == 4:
        stack, axes = np.moveaxis(stack, -1, 1), "ZCYX"
    else:
        axes = "ZYX"
    # ImageJ's dialect keeps slices and channels apart but has 32-bit offsets; beyond them, BigTIFF.
    large = stack.nbytes > _CLASSIC_LIMIT
    with atomic_path(path, overwrite=overwrite) as temporary:
        tifffile.imwrite(
            temporary, stack, imagej=not large, bigtiff=large, photometric="minisblack", metadata={"axes": axes}
        )


def _one_line(error):
    return " ".join(str(error).split())[:120] or type(error).__name__


def _check_complete(tiff, path):
    """Raise UserError unless the file holds every page and every strip that it promises.

    A reader that follows a broken chain of pages sees fewer pages, and decoders fill missing ends with zeros: both
    would pass for data.
    """
    size = tiff.filehandle.size
    chain = _count_pages(tiff)
    if chain is None or chain != len(tiff.pages):
        raise UserError(f"{path}: the chain of pages breaks after page {len(tiff.pages) - 1}; save the file again")
    for index, page in enumerate(tiff.pages):
        strips = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        if not strips or any(count < 1 or offset + count > size for offset, count in strips):
            raise UserError(f"{path}: page {index} is cut short; save the file again")


def _count_pages(tiff):
    """Pages in the chain of image file directories, or None if a link leads outside the file or back.

    TIFF 6.0, section 2: a directory is a count of entries, the entries, and the offset of the next directory, 0 at the
    end.
    """
    form, file, size = tiff.tiff, tiff.filehandle, tiff.filehandle.size
    seen = set()
    file.seek(8 if form.is_bigtiff else 4)
    offset = struct.unpack(form.offsetformat, file.read(form.offsetsize))[0]
    while offset:
        if offset in seen or offset + form.tagnosize > size:
            return None
        seen.add(offset)
        file.seek(offset)
        entries = struct.unpack(form.tagnoformat, file.read(form.tagnosize))[0]
        link = offset + form.tagnosize + entries * form.tagsize
        if link + form.offsetsize > size:
            return None
        file.seek(link)
        offset = struct.unpack(form.offsetformat, file.read(form.offsetsize))[0]
    return len(seen)


def _pages(series, path):
    """One series of a file as `[N, H, W]` or `[N, H, W, 3]`."""
    axes, shape = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    described = f"axes {axes} of sizes {'x'.join(map(str, shape))}"
    counts = {}
    for axis, length in zip(axes, shape, strict=True):
        counts[axis] = counts.get(axis, 1) * length
    samples = counts.pop("S", 1)
    if samples not in (1, 3):
        raise UserError(f"{path}: expected grey or RGB pages, got {samples} samples a pixel; save it as grey or RGB")
    if counts.pop("C", 1) != 1:
        raise UserError(
            f"{path}: expected one grey or RGB image a page, got channels ({described}); save one channel, RGB, or "
            "slices (axes ZYX)"
        )
    height, width = counts.pop("Y", 0), counts.pop("X", 0)
    leading = [length for axis, length in zip(axes, shape, strict=True) if axis not in "SCYX" and length > 1]
    if not height or not width or len(leading) > 1:
        raise UserError(f"{path}: expected a stack of pages, got {described}; save it as one plain stack")
    array = series.asarray(squeeze=False)
    if "S" in axes:
        array = np.moveaxis(array, axes.index("S"), -1)
    array = array.reshape(math.prod(leading), height, width, samples)
    return array[..., 0] if samples == 1 else array


def _checked(stacks, path):
    """Join a file's series to one array of an allowed type, native byte order and finite values."""
    first, start = stacks[0], 0
    for stack in stacks:
        if stack.shape[1:] != first.shape[1:] or stack.dtype != first.dtype:
            size = "x".join(map(str, first.shape[1:]))
            other = "x".join(map(str, stack.shape[1:]))
            raise UserError(
                f"{path}: expected pages of one size and type, got {size} {first.dtype} and, at page {start}, {other} "
                f"{stack.dtype}; save them as separate files"
            )
        start += len(stack)
    array = first if len(stacks) == 1 else np.concatenate(stacks)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    if array.dtype not in IMAGE_DTYPES:
        raise UserError(f"{path}: expected uint8, uint16 or float32 pixels, got {array.dtype}; convert the file")
    if array.dtype == np.float32:
        for index, page in enumerate(array):
            if not np.isfinite(page).all():
                raise UserError(f"{path}: page {index} holds NaN or infinity; expected finite values, replace them")
    return array
