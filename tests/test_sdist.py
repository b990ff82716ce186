"""The source distribution holds everything that git has, but what only a repository needs, and is always the same."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OF_THE_REPOSITORY = (".ci/", ".gitignore")
GENERATED = ("PKG-INFO", "setup.cfg", "unet_fast.egg-info/")


def pack(folder, tracked, **variables):
    """Bytes of the source distribution of a copy of the sources, in a new folder."""
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository: nothing to compare with")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def test_sdist_is_complete(tracked, tmp_path):
    with tarfile.open(pack(tmp_path / "source", tracked)) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert {name for name in tracked - packed if not name.startswith(OF_THE_REPOSITORY)} == set()
    assert {name for name in packed - tracked if not name.startswith(GENERATED)} == set()


def test_sdist_is_reproducible(tracked, tmp_path):
    """Elsewhere, later, by someone whose files have other modes: the same bytes."""
    first = pack(tmp_path / "source", tracked)
    other = tmp_path / "other" / "place"
    mask = os.umask(0o077)
    try:
        second = pack(other, tracked, TZ="Asia/Tokyo")
    finally:
        os.umask(mask)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    later = pack(tmp_path / "later", tracked, SOURCE_DATE_EPOCH="1700000000")
    with tarfile.open(later) as archive:
        assert {entry.mtime for entry in archive.getmembers()} == {1700000000}
