"""Builds the native libraries with CMake, and requires the TensorFlow they are built for; the rest is in pyproject.toml.

Environment variables, all optional:
  UNET_FAST_CUDA=0               (or off) build for the CPU only, even where there is an nvcc
  UNET_FAST_CUDA_ARCHS=90a       CUDA architectures, comma-separated (CMAKE_CUDA_ARCHITECTURES, semicolons, does too)
  CUDACXX, CUDA_HOME             which nvcc
  MAX_JOBS=4                     parallel compilations (default: the number of processors)

and for a source distribution SOURCE_DATE_EPOCH, the time of all its files in seconds since 1970 (default: 1980).
"""

import gzip
import importlib
import importlib.metadata
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import tarfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

# That CMake reads once, when it configures.
VARIABLES = ("UNET_FAST_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "PATH")
ROOT = pathlib.Path(__file__).parent.resolve()
TENSORFLOW = ("2.20", "2.21")  # releases whose interfaces csrc/ is written for, the newest last
REQUIREMENTS = [  # beside TensorFlow
    "numpy",
    "tifffile<=2026.3.3",  # later ones lack TiffPageSeries.get_axes, which data/tiff.py reads axes of length 1 by
    "imagecodecs",
    "pillow",
    "nibabel",
    "indexed_gzip",  # which nibabel reads slices of a .nii.gz by
    "scipy",
    "scikit-image",
    "matplotlib",
    "rich",
    "jinja2",
]


def _tensorflow():
    """The requirement of the release that is here, since a library is good for one; of the newest where none is."""
    try:
        release = ".".join(importlib.metadata.version("tensorflow").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        release = TENSORFLOW[-1]
    if release not in TENSORFLOW:
        sys.exit(
            f"unet_fast: expected TensorFlow {' or '.join(TENSORFLOW)}, found {release}; install one of those, or build "
            "with `pip install .`, which brings its own"
        )
    return f"tensorflow=={release}.*"


def _program(name, folder):
    """A build tool's path: that of its PyPI package in this Python, whether or not PATH leads there, else PATH's."""
    try:
        return str(pathlib.Path(getattr(importlib.import_module(name), folder)) / name)
    except ImportError:
        return shutil.which(name)


def _switched_off(variable):
    return os.environ.get(variable, "").lower() in ("0", "off", "false", "no")


class CMakeBuild(build_ext):
    def run(self):
        target = ROOT / "unet_fast" if self.inplace else pathlib.Path(self.build_lib).resolve() / "unet_fast"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        fingerprint = runpy.run_path(str(ROOT / "unet_fast" / "_fingerprint.py"))["source_fingerprint"](ROOT)
        cmake = _program("cmake", "CMAKE_BIN_DIR") or sys.exit("unet_fast needs cmake 3.24 or newer: pip install cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DUNET_FAST_OUTPUT_DIR={target}",
            f"-DUNET_FAST_CUDA={'OFF' if _switched_off('UNET_FAST_CUDA') else 'ON'}",
        ]
        if ninja := _program("ninja", "BIN_DIR"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        # A build environment is a new folder each time, and what CMake found in the last one is gone: with other tools
        # than last time everything is looked for and compiled again, with the same ones only what has changed.
        record = build / "configured.json"
        chosen = json.dumps([configure, {name: os.environ.get(name) for name in VARIABLES}], indent=1)
        same = record.exists() and record.read_text() == chosen
        record.unlink(missing_ok=True)
        fresh = [] if same else ["--fresh"]
        subprocess.run([*configure, f"-DUNET_FAST_FINGERPRINT={fingerprint}", *fresh], check=True)
        record.write_text(chosen)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)

    def get_source_files(self):
        return ["CMakeLists.txt", *(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file())]


class ReproducibleSdist(sdist):
    """The same bytes from the same sources, whoever packs them, when and where."""

    def make_distribution(self):
        super().make_distribution()
        for path in self.archive_files:
            if path.endswith(".tar.gz"):
                self._normalise(pathlib.Path(path))

    def _normalise(self, path):
        time = int(os.environ.get("SOURCE_DATE_EPOCH", 315532800))
        rewritten = path.with_suffix(".tmp")
        with (
            tarfile.open(path) as packed,
            rewritten.open("wb") as raw,
            gzip.GzipFile("", "wb", mtime=time, fileobj=raw) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for entry in sorted(packed.getmembers(), key=lambda entry: entry.name):
                content = packed.extractfile(entry)
                entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.pax_headers = time, 0, 0, "", "", {}
                entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
                archive.addfile(entry, content)
        rewritten.replace(path)


setup(
    # The extension itself is CMake's; naming it makes the wheel one for this platform and this Python.
    ext_modules=[Extension("unet_fast._native", sources=[])],
    install_requires=[_tensorflow(), *REQUIREMENTS],
    cmdclass={"build_ext": CMakeBuild, "sdist": ReproducibleSdist},
)
