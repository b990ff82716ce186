"""Files that anything may have written: read rightly or refused in one line, within bounds of memory, executing nothing.

UNET_FAST_FUZZ_EXAMPLES=5000 damages that many files of each kind, in place of 40.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import fuzz_seeds
import h5py
import keras
import nibabel
import numpy as np
import pytest
import rich.console
import tifffile

from unet_fast import checkpoints, crossval_runs, migration
from unet_fast.cli import main
from unet_fast.config import TrainConfig
from unet_fast.data import open_stack
from unet_fast.data.sample_weights import read_sample_weights
from unet_fast.errors import UserError

HERE = Path(__file__).parent
EXAMPLES = int(os.environ.get("UNET_FAST_FUZZ_EXAMPLES", "40"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    process = subprocess.run(
        [sys.executable, HERE / "fuzz_files.py", tmp_path_factory.mktemp("fuzz"), str(EXAMPLES)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE))), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("kind", fuzz_seeds.SEEDS)
def test_damaged_files_are_read_rightly_or_refused_in_one_line(outcomes, kind):
    found = outcomes[kind]
    assert found["failures"] == []
    assert found["read"] + found["refused"] == EXAMPLES
    assert found["refused"] or kind == "card.tsv", "a file of choices is ignored; any other damage has to show"


@contextlib.contextmanager
def memory_left(amount):
    """Within it, this process can allocate so many bytes more."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + amount, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(read, path, *words):
    """Asserts that reading raises UserError: one line with the file and these words, and next to no memory taken."""
    with memory_left(2**29), pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line, line
    assert all(word in line for word in words), line


def read_pages(path):
    stack = open_stack(path)
    for page in range(stack.shape[0]):
        stack.page(page)


@pytest.mark.parametrize("tile", [False, True])
def test_a_tiff_that_claims_gigabytes(tmp_path, tile):
    """As a page, and as a tile of which the page needs a corner alone: it is decoded as a whole."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, np.zeros((64, 64), np.uint8), compression="zlib", metadata=None, tile=(64, 64) if tile else None
    )
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for code in (322, 323) if tile else (256, 257, 278):  # the tile's sides; the page's, and its rows a strip
            tiff.pages[0].tags[code].overwrite(60_000)
    refused(read_pages, path, "claims 3.4 GiB in ", "save it again, uncompressed")


def test_a_png_that_claims_gigabytes(tmp_path):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    data = zlib.compress(bytes(10**6))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    refused(read_pages, path, "claims 10.1 GiB in ")


def test_a_nifti_volume_that_claims_gigabytes(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 4, 2), np.uint8), np.eye(4))
    content = bytearray(image.to_bytes())
    content[40:56] = struct.pack("<8h", 3, 32_000, 32_000, 100, 1, 1, 1, 1)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content))
    refused(read_pages, path, "claims 95.4 GiB in ")


def test_an_extension_of_a_nifti_header_that_inflates_to_gigabytes(tmp_path):
    """None is read: 4 GiB of zeros that lie between the header and the pixels take no memory."""
    pixels = np.arange(32, dtype=np.uint8).reshape(4, 4, 2)
    content = bytearray(nibabel.Nifti1Image(pixels, np.eye(4)).to_bytes())
    content[108:112] = struct.pack("<f", 2**32)  # where the pixels begin
    content[348:360] = struct.pack("<4Bii", 1, 0, 0, 0, 2**31 - 16, 4)
    path = tmp_path / "a.nii.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(content[:360])
        for _ in range(4):
            file.write(bytes(2**20))
    with memory_left(2**29):
        stack = open_stack(path)
        assert stack.shape == (2, 4, 4, 1)
        with pytest.raises(UserError, match="cut short"):
            stack.page(0)


@pytest.fixture
def run(tmp_path):
    return fuzz_seeds.run(tmp_path)


def load_state(path):
    return checkpoints.load_state(path.parent.parent, *fuzz_seeds.network())


def load_run(path):
    return checkpoints.load_run(path.parent)


def rewritten(path, changes, compression=zipfile.ZIP_STORED):
    """Writes a zip again, with other bytes for the members that `changes` names."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (members | changes).items():
            archive.writestr(name, content)


def test_a_state_that_claims_gigabytes(run):
    path, array = run / "last" / "state.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (2**32,)})
    rewritten(path, {"model_0.npy": array.getvalue()})
    refused(load_state, path, "model_0.npy claims 17,179,869,184 bytes of float32, has 0")
    rewritten(path, {"model_0.npy": bytes(2**28)}, zipfile.ZIP_DEFLATED)
    refused(load_state, path, "claims 268,", "bytes in a file of ", "written unpacked")


def config_of(path, **changes):
    """config.json within a model.keras, with other options of the network."""
    with zipfile.ZipFile(path) as archive:
        content = json.loads(archive.read("config.json"))
    content["config"] |= changes
    return json.dumps(content)


def test_a_model_that_claims_gigabytes(run):
    path = run / "model.keras"
    whole = path.read_bytes()
    rewritten(path, {"config.json": config_of(path, filters=2**16)})
    refused(load_run, path, "claims a network of 309,23", "holds ")
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        weights = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(weights, "r+") as file:  # an array that was never written takes no room
        del file["layers/fused_conv2d/vars/0"]
        file.create_dataset("layers/fused_conv2d/vars/0", (3, 3, 1, 2**28), np.float32, chunks=(3, 3, 1, 2**10))
    rewritten(path, {"model.weights.h5": weights.getvalue()})
    refused(load_run, path, "claims weights of 9,663,", "holds ")
    path.write_bytes(whole)
    rewritten(path, {}, zipfile.ZIP_DEFLATED)
    refused(load_run, path, "written unpacked")


def test_a_flipped_bit_in_a_models_weights_is_not_computed_with(run):
    path = run / "model.keras"
    content = bytearray(path.read_bytes())
    weights = fuzz_seeds.network()[0].get_weights()[0].tobytes()
    content[content.index(weights) + 3] ^= 1
    path.write_bytes(content)
    refused(load_run, path, "model.weights.h5 is damaged")


def test_a_model_of_another_network_than_the_runs(run):
    load_run(run / "model.keras")  # as it is, it fits
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"filters": 4}))
    refused(load_run, run / "model.keras", "expected a network like that of config.json, with filters 4, got 2")


class Executed:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_no_pickle_is_read(run, tmp_path):
    path, array, marker = run / "last" / "state.npz", io.BytesIO(), tmp_path / "executed"
    np.lib.format.write_array(array, np.array([Executed(marker)], object), allow_pickle=True)
    rewritten(path, {"model_0.npy": array.getvalue()})
    refused(load_state, path, "state.npz: damaged (model_0.npy claims")
    path.write_bytes(pickle.dumps(Executed(marker)))
    refused(load_state, path, "state.npz: damaged")
    assert not marker.exists()


def lambda_model(marker):
    inputs = keras.Input((16, 16, 1))
    return keras.Model(inputs, keras.layers.Lambda(lambda x: (Path(marker).touch(), x)[1])(inputs))


def test_no_code_of_a_keras_file_runs(run, tmp_path):
    marker = tmp_path / "executed"
    model = lambda_model(str(marker))
    model.save(run / "model.keras")
    marker.unlink()  # building it ran it
    refused(
        load_run, run / "model.keras", "expected a FusedUNet, got a model of class 'Functional', whose code is not run"
    )

    def read(path):
        migration.import_checkpoint(path, tmp_path / "imported")

    refused(read, run / "model.keras", "holds Python code (a Lambda layer), which is not run")
    model.save(tmp_path / "a.h5")
    refused(read, tmp_path / "a.h5")
    assert not marker.exists()


def test_no_module_that_a_keras_file_names_is_imported(run, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('executed').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = run / "model.keras"
    with zipfile.ZipFile(path) as archive:
        content = json.loads(archive.read("config.json"))
    evil = {**content, "module": "evil", "class_name": "Evil", "registered_name": "evil>Evil"}
    rewritten(path, {"config.json": json.dumps(evil)})
    refused(load_run, path, "got a model of class 'evil>Evil', whose code is not run")
    refused(lambda path: migration.import_checkpoint(path, tmp_path / "imported"), path, "Keras cannot load it")
    assert not (tmp_path / "executed").exists() and "evil" not in sys.modules


@pytest.mark.parametrize("name", [".lock", "last", "tensorboard"])
def test_a_run_writes_through_no_link_out_of_it(run, tmp_path, name):
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("somebody's")
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).symlink_to(outside / ("file" if name == ".lock" else "folder"))
    with pytest.raises(UserError, match=f"{run / name}: is a link"), checkpoints.locked(run):
        pass
    assert (outside / "file").read_text() == "somebody's" and not any((outside / "folder").iterdir())


def test_a_file_that_is_a_link_is_replaced_and_what_it_leads_to_kept(run, tmp_path):
    (tmp_path / "outside").write_text("somebody's")
    (run / "history.csv").unlink()
    (run / "history.csv").symlink_to(tmp_path / "outside")
    checkpoints.write_history(run, [fuzz_seeds.history_row(2, 0.5)])
    assert (tmp_path / "outside").read_text() == "somebody's"
    assert len(checkpoints.read_history(run)) == 1 and not (run / "history.csv").is_symlink()


def test_a_fold_that_is_a_link_is_not_trained_into(tmp_path):
    outside, options = tmp_path / "outside", TrainConfig(data="no such folder", folds=2)
    outside.mkdir()
    (tmp_path / "fold0").symlink_to(outside)
    with pytest.raises(UserError, match="fold0: is a link"):
        crossval_runs._train_fold(options, tmp_path, 0, None, rich.console.Console(quiet=True))
    assert not any(outside.iterdir())


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"dataset": NaN}', b'{"data": "\\ud800"}', b'{"lr": 1e999}', b"\xff"]
)
def test_json_that_python_alone_would_take(tmp_path, capsys, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"unet-fast: error: {path}: expected ")


def test_a_file_of_weights_without_a_line(tmp_path):
    (tmp_path / "weights.csv").write_text("")
    refused(
        lambda path: read_sample_weights(path, ["a"]), tmp_path / "weights.csv", "expected the columns name and weight"
    )
