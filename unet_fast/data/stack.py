"""Files as stacks of images, whatever their format: pages of one size and type, of which any rows can be read alone."""

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unet_fast.errors import UserError

_BELIEVED, _MOST_PACKED = 2**28, 2000  # see `check_claim`
IMAGE_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))


class Spacing(NamedTuple):
    """Size of a pixel.

    Attributes:
        y, x: height and width, positive, in `unit`.
        unit: such as "um" or "mm"; "pixel" where the file says nothing, and y and x are 1.

    >>> from unet_fast.data import Spacing
    >>> Spacing()
    Spacing(y=1.0, x=1.0, unit='pixel')
    """

    y: float = 1.0
    x: float = 1.0
    unit: str = "pixel"


@dataclass(frozen=True)
class Stack(abc.ABC):
    """An open file: what its head says. `unet_fast.data.open_stack` makes one; nothing stays open in between.

    Attributes:
        path: pathlib.Path of the file.
        shape: (N, H, W, C): pages, rows, columns, and 1 channel for grey or 3 for RGB.
        dtype: uint8, uint16 or float32, what `rows` gives.
        spacing: Spacing of all pages.
    """

    path: Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    spacing: Spacing

    @abc.abstractmethod
    def rows(self, page, start, stop):
        """Rows `start` to `stop` of a page: array [stop - start, W, C] of `dtype`, of the computer's own byte order.

        Raises:
            UserError: the file cannot be read any more, is damaged, or holds NaN or infinity there.
        """

    def page(self, number):
        """A whole page, [H, W, C]; errors as `rows`."""
        return self.rows(number, 0, self.shape[1])

    def described(self):
        """Size and type for an error: '512x512 RGB uint8, 30 pages'."""
        pages, height, width, channels = self.shape
        colour = " RGB" if channels == 3 else ""
        return f"{height}x{width}{colour} {self.dtype}" + (f", {pages} pages" if pages > 1 else "")


class Pages:
    """The pages of many stacks as one array that is read from the files whenever it is indexed.

    Args:
        stacks: list of `Stack`, alike in height, width and channels.
        table: uint8 [65536], what a whole number becomes, for masks; None gives pixels as they are.

    Attributes:
        shape: (N, H, W, C), or (N, H, W) with a table.
        dtype: the stacks' own; uint8 with a table.

    Indexed by an integer it gives a page, by a sequence of integers or a slice an array of pages.

    >>> import tempfile, numpy as np
    >>> from unet_fast.data import open_stack, write_tiff
    >>> from unet_fast.data.stack import Pages
    >>> path = tempfile.mkdtemp() + "/a.tif"
    >>> write_tiff(path, np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    >>> pages = Pages([open_stack(path), open_stack(path)])
    >>> pages.shape, pages[3, 0, 0], pages[[0, 2]].shape
    ((4, 3, 4, 1), array([12], dtype=uint8), (2, 3, 4, 1))
    """

    def __init__(self, stacks, table=None):
        self._stacks, self._table = list(stacks), table
        self._places = [(stack, page) for stack in self._stacks for page in range(stack.shape[0])]
        inner = self._stacks[0].shape[1:]
        self.shape = (len(self._places), *(inner if table is None else inner[:2]))
        self.dtype = np.result_type(*(stack.dtype for stack in self._stacks)) if table is None else np.dtype(np.uint8)

    def __len__(self):
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, tuple):
            return self[index[0]][index[1:]]
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        elif np.ndim(index) == 0:
            stack, page = self._places[index]
            pixels = stack.page(page)
            return pixels.astype(self.dtype, copy=False) if self._table is None else self._table[pixels[..., 0]]
        pages = np.empty((len(index), *self.shape[1:]), self.dtype)
        for out, i in zip(pages, index, strict=True):
            out[...] = self[int(i)]
        return pages

    def with_table(self, table):
        """The same pages as masks, each value looked up in a uint8 table [65536]."""
        return Pages(self._stacks, table)


def suffix_of(path):
    """A file's suffix in small letters, ".nii.gz" as one.

    >>> from unet_fast.data.stack import suffix_of
    >>> suffix_of("brain.NII.gz"), suffix_of("a.b.TIF")
    ('.nii.gz', '.tif')
    """
    path = Path(path)
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def stem_of(path):
    """A file's name less its suffix.

    >>> from unet_fast.data.stack import stem_of
    >>> stem_of("scans/brain.nii.gz")
    'brain'
    """
    name = Path(path).name
    return name[: len(name) - len(suffix_of(path))]


def check_finite(pixels, path, page):
    """The pixels; raises UserError if they are floats that are not all finite."""
    if pixels.dtype == np.float32 and not np.isfinite(pixels).all():
        raise UserError(f"{path}: page {page} holds NaN or infinity; expected finite values, replace them")
    return pixels


def check_claim(path, claimed, stored):
    """Raises UserError if a file claims to hold more than its size can, before memory is taken for it.

    Up to 256 MiB are believed of any file. Deflate packs a thousand bytes into one at best, and blank images are packed as
    well as that by other methods, too.

    Args:
        path: of the file.
        claimed: bytes that would have to be allocated.
        stored: bytes that they are to come from.
    """
    if claimed > max(_BELIEVED, _MOST_PACKED * stored):
        raise UserError(
            f"{path}: claims {claimed / 2**30:,.1f} GiB in {stored:,} bytes; expected at most {_MOST_PACKED:,} times as "
            "much as is stored, save it again, uncompressed"
        )


def one_line(error):
    """What an exception says, short enough for a part of a line."""
    return " ".join(str(error).split())[:120] or type(error).__name__
