"""Every write of this process into a folder, seen as it begins: to be copied around, made to fail, or to kill at."""

import contextlib
import os
import sys
from pathlib import Path

_watchers = []
_CHANGES = {
    "os.rename": 1,
    "os.mkdir": 0,
    "os.remove": 0,
    "os.truncate": 0,
    "os.chmod": 0,
}  # and which argument is the path


def _heard(event, arguments):
    if not _watchers or not (event == "open" or event in _CHANGES):
        return
    if event == "open" and not (
        isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        return
    path = arguments[_CHANGES.get(event, 0)]
    for watcher in tuple(_watchers):
        watcher(path)


sys.addaudithook(_heard)


@contextlib.contextmanager
def watched(folder, on_write):
    """Within it, `on_write(number, path)` is called before each write that Python code begins below a folder.

    Writes are opening a file for writing, fsync, renaming, removing and the like, numbered from 0. What `on_write` raises,
    the write raises.
    """
    folder, count, fsync = Path(folder), 0, os.fsync

    def watcher(path):
        nonlocal count
        if isinstance(path, str | os.PathLike) and folder in (Path(path), *Path(path).parents):
            number, count = count, count + 1
            on_write(number, Path(path))

    def watched_fsync(file):
        watcher(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    _watchers.append(watcher)
    os.fsync = watched_fsync
    try:
        yield
    finally:
        os.fsync = fsync
        _watchers.remove(watcher)
