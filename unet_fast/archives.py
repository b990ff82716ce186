"""Files of models and of training states, read without trust in them.

Nothing in them is executed, they are compared with their checksums, and none makes this process allocate more than it
holds itself: Keras and NumPy write such files unpacked, so whatever claims to be larger than its file is refused.
"""

import math
import zipfile

import h5py
import numpy as np

from unet_fast import json_file
from unet_fast.errors import UserError

_MODEL_MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}


def read_arrays(path):
    """The arrays of an .npz file that `np.savez` wrote.

    Args:
        path: pathlib.Path of the file.

    Returns:
        dict of read-only arrays by their names.

    Raises:
        ValueError, OSError, zipfile.BadZipFile, ...: the file is damaged, packed, holds Python objects, or claims more than
            it has.

    >>> import pathlib, tempfile
    >>> from unet_fast.archives import read_arrays
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.npz"
    >>> np.savez(path, a=np.arange(3))
    >>> read_arrays(path)["a"].tolist()
    [0, 1, 2]
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        _check_members(archive, path)
        for info in archive.infolist():
            with archive.open(info) as file:
                np.lib.format.read_magic(file)
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
                left, claimed = info.file_size - file.tell(), math.prod(shape) * dtype.itemsize
                if dtype.hasobject or claimed != left:
                    raise ValueError(f"{info.filename} claims {claimed:,} bytes of {dtype}, has {left:,}")
                array = np.frombuffer(file.read(), dtype)  # reading to the end compares the checksum
            arrays[info.filename.removesuffix(".npy")] = array.reshape(shape, order="F" if is_fortran else "C")
    return arrays


def check_model(path):
    """Look at a run's model.keras before Keras does: a `FusedUNet` and nothing else, undamaged, of its own size.

    Args:
        path: pathlib.Path of the file.

    Raises:
        UserError: it is a model of another class, whose code is not run.
        ValueError, OSError, zipfile.BadZipFile, ...: the file is damaged, packed, or claims more than it has.
    """
    with zipfile.ZipFile(path) as archive:
        _check_members(archive, path)
        others = set(archive.namelist()) ^ _MODEL_MEMBERS
        damaged = archive.testzip()
        if others or damaged:
            raise ValueError(f"{damaged or min(others)} is damaged, missing or not of a model")
        model, size = json_file.parse(archive.read("config.json")), archive.getinfo("model.weights.h5").file_size
        name = model.get("registered_name")
        if name != "unet_fast>FusedUNet":
            found = str(name or model.get("class_name"))[:80]
            raise UserError(
                f"{path}: expected a FusedUNet, got a model of class {found!r}, whose code is not run; restore the file that "
                "training wrote"
            )
        needed = _least_bytes(**model["config"])
        if needed > size:
            raise ValueError(f"claims a network of {needed:,} bytes or more, holds {size:,}")
        with archive.open("model.weights.h5") as file, h5py.File(file) as weights:
            claimed = claimed_bytes(weights)
        if claimed > size:
            raise ValueError(f"claims weights of {claimed:,} bytes, holds {size:,}")


def check_layers(path):
    """Raises UserError if a .keras file holds Python code, which Keras would have to run to load it.

    Args:
        path: pathlib.Path of a file of any Keras model.

    Raises:
        UserError: see above.
        ValueError, OSError, zipfile.BadZipFile, ...: the file is damaged, packed, or claims more than it has.
    """
    with zipfile.ZipFile(path) as archive:
        _check_members(archive, path)
        parts = [json_file.parse(archive.read("config.json"))]
    while parts:
        part = parts.pop()
        if isinstance(part, dict) and part.get("class_name") in ("Lambda", "__lambda__"):
            raise UserError(
                f"{path}: holds Python code (a Lambda layer), which is not run; make the model of Keras' own layers"
            )
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def claimed_bytes(file):
    """Of an open HDF5 file: how many bytes its arrays say that they have, were they read.

    >>> import io
    >>> from unet_fast.archives import claimed_bytes
    >>> with h5py.File(io.BytesIO(), "w") as file:
    ...     _ = file.create_dataset("a", data=np.zeros(3, np.float32))
    ...     claimed_bytes(file)
    12
    """
    sizes = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            sizes.append(math.prod(item.shape or ()) * item.dtype.itemsize)

    file.visititems(visit)
    return sum(sizes)


def _check_members(archive, path):
    claimed, size = sum(info.file_size for info in archive.infolist()), path.stat().st_size
    if claimed > size:
        raise ValueError(f"claims {claimed:,} bytes in a file of {size:,}; such files are written unpacked")


def _least_bytes(*, input_shape, filters, depth, num_classes, **_):
    """Of the weights of a FusedUNet, the first, the widest and the last layer's, in half precision."""
    if not all(isinstance(number, int) for number in (input_shape[2], filters, depth, num_classes)) or depth > 6:
        raise ValueError("not the numbers of a network")
    return 2 * (9 * input_shape[2] * filters + 9 * (filters * 2**depth) ** 2 + filters * num_classes)
