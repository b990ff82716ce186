"""What a recorded figure is of - card, driver, versions, sources - and the files that figures are kept in."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Last, so that an installed unet_fast comes before the one of this folder; `native` is found by it.
sys.path += [str(ROOT / "tests" / "gpu"), str(ROOT)]

import native  # noqa: E402


def driver():
    """Version of the NVIDIA driver, or "unknown" where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def versions(*packages):
    """Dict from each installed package to its version; None for one that is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def sources_fingerprint():
    """Fingerprint of the native sources in this folder, for a build that carries none."""
    return native.load_from_package("_fingerprint").source_fingerprint(ROOT)


def save(path, result):
    """Writes a result as JSON, whole or not at all.

    Args:
        path: pathlib.Path of the file.
        result: dict.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
