"""Reading a JSON file that anything may have written. Imports nothing heavy."""

import json
from pathlib import Path


def load(path):
    """The content of a JSON file.

    Args:
        path: file to read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, holds NaN or infinity, which JSON does not have, or is nested too deeply.

    >>> import tempfile
    >>> from unet_fast import json_file
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> _ = path.write_text('{"steps": 300}')
    >>> json_file.load(path)
    {'steps': 300}
    """
    return parse(Path(path).read_bytes())


def parse(content):
    """What JSON of bytes in UTF-8 says; errors as `load`.

    >>> from unet_fast import json_file
    >>> json_file.parse(b"[1, 2]")
    [1, 2]
    """
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(name):
    raise ValueError(f"{name} is no number of JSON")
