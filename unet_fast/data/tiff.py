"""Multi-page TIFF: one page an image, as microscopes, ImageJ and the ISBI-2012 challenge write them."""

import logging
import math
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile

from unet_fast.data.files import RawPlanes, atomic_path
from unet_fast.data.stack import IMAGE_DTYPES, Spacing, Stack, check_claim, check_finite, one_line
from unet_fast.errors import UserError

# tifffile also logs the damage that it raises for; without a handler Python would print those lines to stderr.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_CLASSIC_LIMIT = 2**32 - 2**25  # bytes: what a TIFF with 32-bit offsets holds, less room for its tags
_JPEG = (6, 7, 34892, 33007)  # compressions whose segments share tables
_NONE, _INCH, _CENTIMETRE = 1, 2, 3  # values of the tag ResolutionUnit
_MICROMETRE = ("um", "µm", "μm", "micron", "microns", "\\u00b5m")


def read_tiff(path):
    """Read every page of a TIFF file.

    Values are as stored: a palette gives its indices, min-is-white is not inverted, and one-bit pages give 0 and 255.

    Args:
        path: file to read. Pages must agree in size and type; grey or RGB; uint8, uint16 or float32 (or one bit).

    Returns:
        numpy array `[N, H, W]`, or `[N, H, W, 3]` for RGB, of the file's own type in native byte order.

    Raises:
        UserError: the file is missing, damaged or cut short; pages differ; the type or the layout is not one of the
            above; a float page holds NaN or infinity.

    Example:

    >>> import tempfile, numpy as np
    >>> from unet_fast.data import read_tiff, write_tiff
    >>> path = tempfile.mkdtemp() + "/stack.tif"
    >>> write_tiff(path, np.arange(24, dtype=np.uint16).reshape(2, 3, 4))
    >>> read_tiff(path).shape
    (2, 3, 4)
    """
    stack = open_tiff(path)
    pages = np.stack([stack.page(number) for number in range(stack.shape[0])])
    return pages[..., 0] if stack.shape[3] == 1 else pages


def open_tiff(path):
    """Open a TIFF file, whose pages are read when they are asked for.

    Args, errors: as `read_tiff`; what the pixels themselves hold shows when they are read.

    Returns:
        Stack. Its spacing is that of ImageJ's or OME's metadata, or of the resolution tags where these have a unit, then
        in mm.
    """
    path = Path(path)
    with _errors(path), tifffile.TiffFile(path, _multifile=False) as tiff:
        _check_complete(tiff, path)
        pages, first = [], None
        for series in tiff.series:
            shape = _page_shape(series, path)
            dtype = np.dtype(np.uint8) if series.dtype == bool else series.dtype.newbyteorder("=")
            first = first or (shape, dtype)
            if (shape, dtype) != first:
                described, other = (
                    f"{'x'.join(map(str, s if s[2] > 1 else s[:2]))} {d}" for s, d in (first, (shape, dtype))
                )
                raise UserError(
                    f"{path}: expected pages of one size and type, got {described} and, at page {len(pages)}, {other}; "
                    "save them as separate files"
                )
            pages += _places(series, shape, path, tiff.filehandle.size)
        if not pages:
            raise UserError(f"{path}: expected at least one page, got none; save it again")
        shape, dtype = first
        if dtype not in IMAGE_DTYPES:
            raise UserError(f"{path}: expected uint8, uint16 or float32 pixels, got {dtype}; convert the file")
        check_claim(path, len(pages) * math.prod(shape) * dtype.itemsize, tiff.filehandle.size)
        spacing, resolution = _resolution(tiff)
        return TiffStack(path, (len(pages), *shape), dtype, spacing, tuple(pages), resolution)


class _Place(NamedTuple):
    """Where a page lies: from `offset` on as it is, or where `offset` is None in segments (strips or tiles) to decode."""

    keyframe: tifffile.TiffPage
    offset: int | None
    offsets: np.ndarray | None = None
    counts: np.ndarray | None = None
    jpegtables: bytes | None = None


@dataclass(frozen=True)
class TiffStack(Stack):
    """A TIFF file; see `Stack`.

    Attributes:
        pages: a `_Place` a page.
        resolution: tifffile.imwrite's arguments that give another file the same resolution.
    """

    pages: tuple[_Place, ...]
    resolution: dict

    def rows(self, page, start, stop):
        place = self.pages[page]
        with _errors(self.path), self.path.open("rb") as file:
            read = _read_plain if place.offsets is None else _read_segments
            planes = read(place, file, start, stop)  # [1, rows, W, C] or, with a plane a colour, [C, rows, W, 1]
        pixels = planes[0] if planes.shape[0] == 1 else np.moveaxis(planes[..., 0], 0, -1)
        if pixels.dtype == bool:
            pixels = pixels.astype(np.uint8) * 255
        pixels = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))
        return check_finite(pixels, self.path, page)


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
    with tiff_writer(path, stack.shape, stack.dtype, overwrite=overwrite) as writer:
        for number, page in enumerate(stack):
            writer.write(number, 0, page)


@contextmanager
def tiff_writer(path, shape, dtype, *, resolution=None, overwrite=False):
    """A TIFF that is filled in rows at a time; it appears when the block ends, whole or not at all.

    Args:
        path, overwrite: as `write_tiff`.
        shape: (N, H, W), or (N, H, W, K) for K channels.
        dtype: uint8, uint16 or float32.
        resolution: `TiffStack.resolution` of a file whose resolution it shall have.

    Yields:
        `unet_fast.data.files.RawPlanes`.
    """
    resolution = dict(resolution or {})
    metadata = resolution.pop("metadata", {})
    channels = shape[3] if len(shape) == 4 else 1
    stored, axes = ((shape[0], channels, *shape[1:3]), "ZCYX") if len(shape) == 4 else (tuple(shape), "ZYX")
    # ImageJ's dialect keeps slices and channels apart but has 32-bit offsets; beyond them, BigTIFF.
    large = math.prod(stored) * np.dtype(dtype).itemsize > _CLASSIC_LIMIT
    if not large:  # one sample a pixel, said aloud: an image one pixel wide would be taken for its samples
        stored, axes = (*stored, 1), axes + "S"
    if large and str(metadata.get("unit")).lower() in _MICROMETRE:  # which only ImageJ's dialect can say
        resolution["resolution"] = [(10_000 * above, below) for above, below in resolution["resolution"]]
        resolution["resolutionunit"] = _CENTIMETRE
    with atomic_path(path, overwrite=overwrite) as temporary:
        offset, _ = tifffile.imwrite(
            temporary,
            shape=stored,
            dtype=dtype,
            imagej=not large,
            bigtiff=large,
            photometric="minisblack",
            metadata={**metadata, "axes": axes},
            returnoffset=True,
            **resolution,
        )
        with temporary.open("rb+") as file:
            yield RawPlanes(file, offset, shape[1:3], dtype, lambda page, channel: page * channels + channel)


@contextmanager
def _errors(path):
    """Makes a UserError of whatever tifffile and its decoders raise on damaged bytes, from KeyError to MemoryError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror or error}); check the path and its permissions"
        ) from error
    except Exception as error:
        raise UserError(
            f"{path}: not a TIFF file, or damaged or cut short ({one_line(error)}); save it again"
        ) from error


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
            raise _cut_short(path, index)


def _cut_short(path, page):
    return UserError(f"{path}: page {page} is cut short; save the file again")


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


def _page_shape(series, path):
    """(H, W, C) of the pages of a series; UserError unless they are a plain stack of grey or RGB images."""
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
    return height, width, samples


def _places(series, shape, path, file_size):
    """Where the pages of a series lie, a `_Place` each."""
    keyframe, count = series.keyframe, math.prod(series.get_shape(squeeze=False)) // math.prod(shape)
    planes, depth, height, width, samples = keyframe.shaped
    if depth != 1 or (height, width, planes * samples) != shape:
        raise UserError(
            f"{path}: expected one image a page, got pages of sizes {keyframe.shape}; save it as a plain stack"
        )
    if series.dataoffset is not None:
        if series.dataoffset + count * keyframe.nbytes > file_size:
            raise _cut_short(path, count - 1)
        return [_Place(keyframe, series.dataoffset + page * keyframe.nbytes) for page in range(count)]
    if keyframe.planarconfig not in (1, 2):
        raise UserError(f"{path}: damaged, colours lie in it in no known way ({keyframe.planarconfig}); save it again")
    if not keyframe.is_final:
        _ = keyframe.decode  # makes the decoder, and keeps it, for which a JPEG's bytes are looked at in the open file
    pages = list(series.pages)
    if len(pages) != count or None in pages:
        raise UserError(f"{path}: expected {count} pages by its metadata, found {len(pages)}; save it again")
    places = []
    for number, page in enumerate(pages):
        if keyframe.is_final:
            if page.dataoffsets[0] + keyframe.nbytes > file_size:
                raise _cut_short(path, number)
            places.append(_Place(keyframe, page.dataoffsets[0]))
        else:
            if len(page.dataoffsets) < math.prod(keyframe.chunked):
                raise _cut_short(path, number)
            # A tile is decoded as a whole, however little of it lies within the image.
            check_claim(path, math.prod(keyframe.chunks) * keyframe.dtype.itemsize, file_size)
            offsets, counts = (np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
            places.append(_Place(keyframe, None, offsets, counts, page.jpegtables))
    return places


def _read_plain(place, file, start, stop):
    keyframe = place.keyframe
    planes, _, height, width, samples = keyframe.shaped
    dtype = np.dtype(keyframe.parent.byteorder + keyframe.dtype.char)
    out = np.empty((planes, stop - start, width, samples), dtype)
    row = width * samples * dtype.itemsize
    for number, plane in enumerate(out):
        file.seek(place.offset + (number * height + start) * row)
        if file.readinto(plane) != plane.nbytes:
            raise EOFError("the end of the file came too early")
    return out


def _read_segments(place, file, start, stop):
    keyframe = place.keyframe
    planes, _, height, width, samples = keyframe.shaped
    options = (
        {"jpegtables": place.jpegtables, "jpegheader": keyframe.jpegheader} if keyframe.compression in _JPEG else {}
    )
    tiled = keyframe.is_tiled
    length, across = (keyframe.tilelength, -(-width // keyframe.tilewidth)) if tiled else (keyframe.rowsperstrip, 1)
    down = -(-height // length)
    out = np.empty((planes, stop - start, width, samples), keyframe.dtype)
    for index in range(math.prod(keyframe.chunked)):
        top = index // across % down * length
        if top >= stop or top + length <= start:
            continue
        file.seek(place.offsets[index])
        segment, (plane, _, top, left, _), _ = keyframe.decode(file.read(place.counts[index]), index, **options)
        first, last = max(start - top, 0), min(stop - top, len(segment[0]))
        if last < min(stop, height, top + length) - top:
            raise EOFError("a strip ends too early")
        part = segment[0, first:last, : width - left]
        if part.shape[1] < min(width - left, keyframe.tilewidth if tiled else width):
            raise EOFError("a strip is too narrow")
        out[plane, top + first - start : top + last - start, left : left + part.shape[1]] = part
    return out


def _resolution(tiff):
    """Spacing, and the arguments of tifffile.imwrite that keep it."""
    page = tiff.pages.first
    tags = [page.tags.valueof(code) for code in (282, 283)]  # pixels a unit, of x and y
    unit = page.tags.valueof(296, default=_INCH)
    imagej = {key: value for key, value in (tiff.imagej_metadata or {}).items() if key in ("unit", "spacing")}
    sizes = _ome_sizes(tiff) if tiff.is_ome else None
    if sizes:
        kept = {
            "resolution": [(10**6, round(1e6 * size)) for size in sizes],
            "resolutionunit": _NONE,
            "metadata": {"unit": "um"},
        }
        return Spacing(sizes[1], sizes[0], "um"), kept
    if not all(isinstance(tag, tuple) and len(tag) == 2 and min(tag) > 0 for tag in tags):
        return Spacing(), {}
    kept = {"resolution": tags, "resolutionunit": int(unit), "metadata": imagej}
    x, y = (below / above for above, below in tags)
    name = str(imagej.get("unit", "")).strip()
    if name and name not in ("pixel", "pixels"):
        return Spacing(y, x, "um" if name.lower() in _MICROMETRE else name), kept
    if not imagej and unit in (_INCH, _CENTIMETRE):
        scale = 25.4 if unit == _INCH else 10.0
        return Spacing(y * scale, x * scale, "mm"), kept
    return Spacing(), kept


def _ome_sizes(tiff):
    """(x, y) of a pixel in micrometres by the OME metadata, or None."""
    pixels = tifffile.xml2dict(tiff.ome_metadata).get("OME", {}).get("Image", {})
    pixels = (pixels[0] if isinstance(pixels, list) else pixels).get("Pixels", {})
    sizes = []
    for axis in "XY":
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        scale = 1.0 if unit in _MICROMETRE else {"nm": 1e-3, "mm": 1e3}.get(unit)
        if not isinstance(size, (int, float)) or not size > 0 or scale is None:
            return None
        sizes.append(size * scale)
    return sizes
