"""Writing a file so that a reader never sees half of it."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from unet_fast.errors import UserError


@contextmanager
def atomic_path(path, *, overwrite):
    """Give a temporary path beside `path`; move it there when the block ends, remove it when the block raises.

    The name a reader knows holds the old file or the whole new one, also after a kill or a full disk.

    Args:
        path: where the file shall be; its folder must exist.
        overwrite: whether a file that is there already may be replaced.

    Yields:
        pathlib.Path of the temporary file, with the same suffix.

    Raises:
        UserError: the folder is missing or not writable, `path` is a folder, or `path` exists and `overwrite` is false.

    Example:

    >>> import tempfile
    >>> from unet_fast.data.files import atomic_path
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_path(target, overwrite=False) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: expected a file name to write, got a folder; name a file in it")
    if not overwrite and path.exists():
        raise UserError(f"{path}: the file exists already; move it away or choose another name")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); make the folder or choose another") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, name):  # a full disk is told by the file that the user knows
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


class RawPlanes:
    """Planes of pixels in a file, one behind the other, that are filled in rows at a time.

    What is written goes to the file at once, so a file may be larger than the memory.

    Args:
        file: file open for reading and writing in binary, as long as its planes need.
        offset: where the first plane begins, in bytes.
        size: (height, width) of a plane.
        dtype: of the pixels in the file, with their byte order.
        plane: function of a page and a channel, the number of their plane.

    >>> import io, numpy as np
    >>> from unet_fast.data.files import RawPlanes
    >>> file = io.BytesIO(bytes(6))
    >>> RawPlanes(file, 0, (3, 2), np.uint8, lambda page, channel: page).write(0, 1, np.array([[7, 8]]))
    >>> list(file.getvalue())
    [0, 0, 7, 8, 0, 0]
    """

    def __init__(self, file, offset, size, dtype, plane):
        self._file, self._offset, self._size, self._dtype, self._plane = file, offset, size, np.dtype(dtype), plane

    def write(self, page, start, rows):
        """Write rows of a page from row `start` on: array [rows, W], or [rows, W, K] for K channels."""
        height, width = self._size
        for channel, part in enumerate(np.moveaxis(rows.reshape(*rows.shape[:2], -1), -1, 0)):
            first = self._plane(page, channel) * height + start
            self._file.seek(self._offset + first * width * self._dtype.itemsize)
            self._file.write(np.ascontiguousarray(part, self._dtype).data)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
