"""A wheel, built here, in another environment: everything that runs is in it."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # compiles everything, if for the CPU alone

PROGRAM = """
import pathlib, keras, numpy as np, unet_fast
from unet_fast import FusedUNet, losses, ops
assert pathlib.Path(unet_fast.__file__).is_relative_to({environment!r}), unet_fast.__file__
model = FusedUNet((32, 32, 1), filters=2, depth=1, padding="same", backend="fused")
model.compile("adam", losses.DiceCrossEntropy())
x, y = np.zeros((2, 32, 32, 1), np.float32), np.zeros((2, 32, 32), np.uint8)
print("loss", model.fit(x, y, verbose=0).history["loss"])
"""


def run(command, folder, **variables):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_a_wheel_works_in_another_environment(tmp_path):
    sources = tmp_path / "sources"
    run(["git", "clone", "--quiet", ROOT, sources], tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    run(build, sources, UNET_FAST_CUDA="0", PATH=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    (wheel,) = tmp_path.glob("unet_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/", "docs/"))]

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], tmp_path)
    # What it needs is that of this environment, as files alone: what is installed editable there stays there.
    (installed,) = environment.glob("lib/python*/site-packages")
    (installed / "needs.pth").write_text(sysconfig.get_path("purelib"))
    assert "self-test on CPU:0: passed" in run([environment / "bin" / "unet-fast", "info"], tmp_path)
    assert "loss" in run([python, "-c", PROGRAM.format(environment=str(environment))], tmp_path)
    page = ["report", "--run", "run"]
    train = "train --data synthetic --out run --filters 2 --depth 1 --padding same --size 64 --steps 2 --batch 1"
    for arguments in (train.split(), page):
        run([environment / "bin" / "unet-fast", *arguments], tmp_path)
    assert (tmp_path / "run" / "report.html").exists()
