"""The source distribution holds everything that git has, but what only a repository needs."""

import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OF_THE_REPOSITORY = (".ci/", ".gitignore")
GENERATED = ("PKG-INFO", "setup.cfg", "unet_fast.egg-info/")


def test_sdist_is_complete(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository: nothing to compare with")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(source / "dist" / done.stdout.split()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert {name for name in tracked - packed if not name.startswith(OF_THE_REPOSITORY)} == set()
    assert {name for name in packed - tracked if not name.startswith(GENERATED)} == set()
