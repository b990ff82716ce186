"""Weights of a data set's images, from a file."""

import csv
import math
from pathlib import Path

import numpy as np

from unet_fast.errors import UserError


def read_sample_weights(path, names):
    """Read a CSV file with the columns `name` and `weight`.

    Args:
        path: file to read.
        names: names of the images, `Dataset.names`.

    Returns:
        float32 array `[N]`, 1 for images that the file does not name.

    Raises:
        UserError: no such file or no such columns, an image that there is not or twice, or a weight that is no number
            of at least 0.

    >>> import tempfile
    >>> from unet_fast.data.sample_weights import read_sample_weights
    >>> path = Path(tempfile.mkdtemp()) / "weights.csv"
    >>> _ = path.write_text("name,weight\\ncell1,0.5\\n")
    >>> read_sample_weights(path, ["cell0", "cell1"]).tolist()
    [1.0, 0.5]
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark at the beginning
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = [(row.get("name"), row.get("weight")) for row in reader]
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file, got something else ({error}); save it as CSV") from error
    if not {"name", "weight"} <= set(columns):
        raise UserError(
            f"{path}: expected the columns name and weight, got {str(columns)[:80]}; name them in the first line"
        )
    weights, known = {}, set(names)
    for name, cell in rows:
        try:
            weight = float(cell)
        except (TypeError, ValueError):
            weight = math.nan
        if name not in known:
            raise UserError(
                f"{path}: no image is called {str(name)[:80]!r}; names are such as {names[0]!r}, correct it"
            )
        if name in weights:
            raise UserError(f"{path}: {name!r} is there twice; keep one")
        if not 0 <= weight < math.inf:
            raise UserError(f"{path}: expected a weight of at least 0 for {name!r}, got {str(cell)[:80]!r}; give one")
        weights[name] = weight
    return np.array([weights.get(name, 1.0) for name in names], np.float32)
