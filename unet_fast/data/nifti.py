"""NIfTI volumes (.nii, .nii.gz) as stacks of 2-D slices.

A slice is a plane of the file's first two axes, x and y: its rows are y, its columns x, and the third axis counts the
slices. That is how the file stores them, so a slice is read alone. A compressed file is read alike, by an index of
its bytes that is made in passing (indexed_gzip).
"""

import errno
import gzip
import logging
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from unet_fast.data.files import RawPlanes, atomic_path
from unet_fast.data.stack import IMAGE_DTYPES, Spacing, Stack, check_claim, check_finite, one_line, suffix_of
from unet_fast.errors import UserError

_UNITS = {"mm": "mm", "micron": "um", "meter": "m"}
_HEADERS = (nibabel.Nifti1Header, nibabel.Nifti2Header)
# nibabel's own logger writes to the terminal what it finds wrong with a header, beside raising for it.
_QUIET = logging.getLogger("unet_fast.nifti")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False


def open_nifti(path, *, labels=False):
    """Open a NIfTI file, whose slices are read when they are asked for.

    Args:
        path: .nii or .nii.gz file: one slice or a volume of slices, [X, Y] or [X, Y, Z], grey or RGB.
        labels: the file holds a mask: whole numbers, of whatever type.

    Returns:
        Stack of Z pages of Y rows and X columns. uint8 and uint16 stay, unless the file scales them; other types become
        float32, or uint16 with `labels`. Spacing is the zooms of y and x.

    Raises:
        UserError: the file is missing, damaged or cut short, or of more axes or another type.

    >>> import tempfile, nibabel, numpy as np
    >>> from unet_fast.data import open_stack
    >>> path = tempfile.mkdtemp() + "/scan.nii.gz"
    >>> nibabel.save(nibabel.Nifti1Image(np.zeros((5, 4, 3), np.int16), np.diag([0.5, 0.25, 2, 1])), path)
    >>> stack = open_stack(path)
    >>> stack.shape, stack.dtype, stack.spacing.y
    ((3, 4, 5, 1), dtype('float32'), 0.25)
    """
    path = Path(path)
    with _errors(path):
        header = _header(path)
        proxy = nibabel.arrayproxy.ArrayProxy(str(path), header, mmap=False)
        shape, stored = proxy.shape, proxy.dtype
        if len(shape) < 2 or any(side < 1 for side in shape) or any(side > 1 for side in shape[3:]):
            raise UserError(
                f"{path}: expected a slice [X, Y] or a volume [X, Y, Z], got sizes {'x'.join(map(str, shape))}; save one "
                "volume a file"
            )
        size, claimed = path.stat().st_size, math.prod(shape) * stored.itemsize
        if suffix_of(path) == ".nii" and size < proxy.offset + claimed:
            raise UserError(f"{path}: cut short; save the file again")
        check_claim(path, claimed, size)
        dtype, channels = _dtype(stored, (proxy.slope, proxy.inter) != (1, 0), labels, path)
        sides = header.get_zooms()[:2]
        known = all(np.isfinite(side) and side > 0 for side in sides)
        unit = _UNITS.get(header.get_xyzt_units()[0], "unit")
        spacing = Spacing(float(sides[1]), float(sides[0]), unit) if known else Spacing()
    depth = shape[2] if len(shape) > 2 else 1
    return NiftiStack(path, (depth, shape[1], shape[0], channels), dtype, spacing, header, proxy, labels)


def _header(path):
    """The header without its extensions, which nothing here needs and whose lengths may be anything."""
    with nibabel.openers.ImageOpener(str(path)) as file:
        start = file.read(max(kind.sizeof_hdr for kind in _HEADERS))
    for kind in _HEADERS:
        if kind.may_contain_header(start):
            header = kind(start[: kind.sizeof_hdr], check=False)
            header.check_fix(logger=_QUIET)
            return header
    raise UserError(f"{path}: not a NIfTI file; save it again as NIfTI")


def _dtype(stored, is_scaled, labels, path):
    """(dtype, channels) of a stack of a file's type."""
    if stored.names is not None:
        if stored.names != ("R", "G", "B"):
            raise UserError(f"{path}: expected grey or RGB, got values of {', '.join(stored.names)}; convert it")
        return np.dtype(np.uint8), 3
    if stored.kind not in "uif":
        raise UserError(f"{path}: expected real numbers, got {stored}; convert it")
    if stored.newbyteorder("=") in IMAGE_DTYPES[:2] and not is_scaled:
        return stored.newbyteorder("="), 1
    return np.dtype(np.uint16 if labels else np.float32), 1


@dataclass(frozen=True)
class NiftiStack(Stack):
    """A NIfTI file; see `Stack`.

    Attributes:
        header: nibabel's, of NIfTI-1 or -2.
        proxy: nibabel's array of the data, which are still in the file.
        labels: as given to `open_nifti`.
    """

    header: nibabel.Nifti1Header
    proxy: nibabel.arrayproxy.ArrayProxy
    labels: bool

    def rows(self, page, start, stop):
        axes = len(self.proxy.shape)
        where = (slice(None), slice(start, stop), page, *(0,) * (axes - 3))
        with _errors(self.path):
            pixels = np.asarray(self.proxy[where[:axes]]).T
        fields = pixels.dtype.names
        pixels = np.stack([pixels[name] for name in fields], -1) if fields else pixels[..., None]
        if self.labels and self.dtype == np.uint16:
            self._check_whole(pixels, page)
        with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, which is told
            return check_finite(np.ascontiguousarray(pixels, self.dtype), self.path, page)

    def _check_whole(self, pixels, page):
        if not ((pixels == np.rint(pixels)) & (pixels >= 0) & (pixels < 2**16)).all():
            raise UserError(
                f"{self.path}: expected a mask of whole numbers from 0 to 65535, got {pixels.min():g} to "
                f"{pixels.max():g} in slice {page}; save class numbers"
            )


@contextmanager
def nifti_writer(path, shape, dtype, *, like):
    """A NIfTI file that is filled in rows at a time; it appears when the block ends, whole or not at all.

    Args:
        path: .nii or .nii.gz file, which must not be there yet.
        shape: (N, H, W), or (N, H, W, K) for K channels, which become the fourth axis.
        dtype: uint8, uint16 or float32.
        like: NiftiStack, whose affine, zooms and other particulars it gets.

    Yields:
        `unet_fast.data.files.RawPlanes`.
    """
    pages, height, width, *channels = shape
    header = like.header.copy()
    header.set_data_dtype(dtype)
    header.set_data_shape(
        (width, height) if len(like.proxy.shape) == 2 and not channels else (width, height, pages, *channels)
    )
    if channels:
        header["pixdim"][4] = 1
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["vox_offset"] = offset = header.single_vox_offset
    dtype = np.dtype(dtype).newbyteorder(header.endianness)

    with atomic_path(path, overwrite=False) as temporary:
        compressed = suffix_of(path) == ".nii.gz"
        with tempfile.TemporaryFile(dir=temporary.parent) if compressed else temporary.open("wb+") as file:
            header.write_to(file)
            file.truncate(offset + int(np.prod(shape)) * dtype.itemsize)
            yield RawPlanes(file, offset, (height, width), dtype, lambda page, channel: channel * pages + page)
            if compressed:
                file.seek(0)
                with gzip.GzipFile(temporary, "wb", compresslevel=6, mtime=0) as packed:
                    shutil.copyfileobj(file, packed, 2**20)


@contextmanager
def _errors(path):
    """Makes a UserError of whatever nibabel and the decompression raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError)
        if is_missing or (
            isinstance(error, OSError) and error.strerror
        ):  # the system's own; those of damage have no number
            reason = error.strerror or os.strerror(errno.ENOENT)  # nibabel's of a missing file has none either
            raise UserError(f"{path}: cannot read it ({reason}); check the path") from error
        raise UserError(
            f"{path}: not a NIfTI file, or damaged or cut short ({one_line(error)}); save it again"
        ) from error
