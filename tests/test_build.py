"""The build's variables, as far as CMake's configuration goes; needs what a build needs."""

import importlib.metadata
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _configure(folder, *options, **variables):
    """CMake's return code and everything it says, on one line."""
    cmake = pytest.importorskip("cmake")
    pytest.importorskip("pybind11")
    unset = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CMAKE_CUDA_ARCHITECTURES", "UNET_FAST_CUDA_ARCHS", "CUDAARCHS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    command = [pathlib.Path(cmake.CMAKE_BIN_DIR) / "cmake", "-S", ROOT, "-B", folder, *options]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DUNET_FAST_OUTPUT_DIR={folder}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return run.returncode, re.sub(r"\s+", " ", run.stdout + run.stderr)


def test_cuda_is_switched_off(tmp_path):
    code, output = _configure(tmp_path, "-DUNET_FAST_CUDA=OFF")
    assert code == 0, output
    assert "CUDA off: UNET_FAST_CUDA=0" in output


def test_a_cuda_compiler_that_does_not_work_stops_the_build(tmp_path):
    code, output = _configure(tmp_path, CUDACXX="/nonexistent/nvcc")
    assert code != 0
    assert "CUDACXX is /nonexistent/nvcc, which is no working CUDA compiler" in output


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.parametrize(
    ("variables", "architectures"),
    [
        ({"UNET_FAST_CUDA_ARCHS": "80,86"}, "80;86"),
        ({"UNET_FAST_CUDA_ARCHS": "75", "CMAKE_CUDA_ARCHITECTURES": "80;90a"}, "80;90a"),
    ],
    ids=["comma", "cmake"],
)
def test_the_cuda_compiler_and_architectures_are_those_asked_for(tmp_path, variables, architectures):
    """A toolkit named by CUDA_HOME goes before PATH's nvcc."""
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec {NVCC} "$@"\n')
    nvcc.chmod(0o755)
    code, output = _configure(tmp_path / "build", CUDA_HOME=str(toolkit), **variables)
    assert code == 0, output
    assert re.search(rf"CUDA on: {re.escape(str(nvcc))} \S+, architectures {architectures} ", output), output


def _requirements(monkeypatch, release):
    """What setup.py requires beside that release of TensorFlow, or beside none."""
    setuptools, asked = pytest.importorskip("setuptools"), {}

    def version(name):
        if release is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(setuptools, "setup", lambda **arguments: asked.update(arguments))
    monkeypatch.setattr(importlib.metadata, "version", version)
    runpy.run_path(str(ROOT / "setup.py"))
    return asked["install_requires"]


@pytest.mark.parametrize(("release", "required"), [("2.20.1", "2.20.*"), ("2.21.0", "2.21.*"), (None, "2.21.*")])
def test_the_tensorflow_of_the_build_is_required(monkeypatch, release, required):
    requirements = _requirements(monkeypatch, release)
    assert requirements[0] == f"tensorflow=={required}" and "numpy" in requirements


def test_another_tensorflow_stops_the_build(monkeypatch):
    with pytest.raises(SystemExit, match=r"expected TensorFlow 2.20 or 2.21, found 2.19; install one of those"):
        _requirements(monkeypatch, "2.19.1")
