"""A run that is killed at any moment, or meets a full disk, loses nothing and goes on to the very same weights."""

import csv
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from unet_fast import FusedUNet, checkpoints, evaluation
from unet_fast.cli import main
from unet_fast.data import files, generate, write_tiff

HERE = Path(__file__).parent
SMALL = {"filters": 2, "depth": 1, "padding": "same", "size": 32, "batch": 1, "lr": 3e-3}
EVERYTHING = {
    **SMALL,
    "steps": 6,
    "eval_every": 2,
    "accumulate": 2,
    "precision": "mixed_float16",
    "schedule": "plateau",
    "plateau_patience": 1,
    "warmup": 3,
    "patience": 5,
    "ema": 0.5,
    "clip_norm": 1.0,
    "class_weights": [1.0, 2.0],
    "rotation": 20.0,
    "elastic": 2.0,
    "noise": 0.1,
}
TIMES = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    images, masks = generate(6, size=(40, 40))
    write_tiff(folder / "train-volume.tif", images[..., 0])
    write_tiff(folder / "train-labels.tif", masks * 255)
    return folder


def history(run):
    with (run / "history.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    as_json = [
        {k: v for k, v in row.items() if k not in TIMES} for row in json.loads((run / "history.json").read_text())
    ]
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in as_json] == rows
    return rows


def state(run):
    with np.load(run / "last" / "state.npz") as arrays:
        content = dict(arrays)
    progress = json.loads(str(content.pop("progress")))
    progress.pop("seconds")
    return content, progress


def assert_same_run(ours, theirs):
    assert history(ours) == history(theirs)
    (arrays, progress), (expected, expected_progress) = state(ours), state(theirs)
    assert progress == expected_progress
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    weights = [keras.models.load_model(run / "model.keras").get_weights() for run in (ours, theirs)]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (ours / "metrics.json").read_text() == (theirs / "metrics.json").read_text()


def test_killed_at_any_write(data, tmp_path):
    """SIGKILL at each kind of write, one after the other, with all that has a state of its own."""
    (tmp_path / "weights.csv").write_text("name,weight\ntrain-volume_001,2.5\n")
    options = EVERYTHING | {"data": str(data), "sample_weights": str(tmp_path / "weights.csv")}
    (tmp_path / "config.json").write_text(json.dumps(options))
    # Of the copy of the weights; of history.csv, when model.keras is there already; of the first state; and, after that, of
    # the second evaluation.
    kills = "5,7,11,14,0"
    process = subprocess.run(
        [sys.executable, HERE / "killed_training.py", tmp_path / "config.json"]
        + [f"{tmp_path / name}={kills}" for name, kills in (("whole", "0"), ("killed", kills))],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.stdout.split() == ["0", *["-9"] * 4, "0"], process.stderr
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert [row["step"] for row in history(whole)] == ["2", "4", "6"]
    assert len({row["lr"] for row in history(whole)}) > 1
    assert_same_run(killed, whole)
    names = {entry.name for entry in killed.iterdir()}
    assert names == {entry.name for entry in whole.iterdir()}, "something is left of the killed ones"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main(command(data, out)) == 0
    return out


def command(data, out):
    options = [f"--{name}={value}" for name, value in (SMALL | {"steps": 4, "eval-every": 2}).items()]
    return ["train", "--data", str(data), "--out", str(out), *options]


@pytest.mark.parametrize("failing", ["model.keras", "last/state.npz"])
def test_a_disk_that_fills_up(data, whole, tmp_path, capsys, monkeypatch, failing):
    """At the second evaluation: one line, all of the first is there, and with more room it goes on."""
    out, replace, times = tmp_path / "run", Path.replace, []

    def full(temporary, path):
        if Path(path) == out / failing:
            times.append(path)
            if len(times) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return replace(temporary, path)

    if failing == "model.keras":  # else it is written at new bests only
        monkeypatch.setattr(checkpoints, "best_row", lambda history: history[-1])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert main(command(data, out)) == 2
    assert capsys.readouterr().err == f"unet-fast: error: {out / failing}: No space left on device\n"
    assert state(out)[1]["step"] == 2
    assert history_steps(out)[0] == 2
    assert evaluation.evaluate_run(out)["samples"] == 2
    assert not list(out.rglob(".*-*")), "half a file is left"
    assert main(["train", "--out", str(out), "--resume"]) == 0
    if failing != "model.keras":
        assert_same_run(out, whole)


def history_steps(run):
    return [row["step"] for row in checkpoints.read_history(run)]


def test_files_that_may_not_grow(data, tmp_path, capsys):
    """A limit of the system that the largest files meet as they are written, as on a disk that is really full."""
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        assert main(command(data, out)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("File too large")
    assert {entry.name for entry in out.iterdir()} == {".lock", "config.json", "split.json"}


def test_a_folder_that_may_not_be_written_to(data, tmp_path, capsys, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "mkstemp", denied)
    assert main(command(data, tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("run/config.json: cannot write there (Permission denied); make the folder or choose another")


def test_losses_that_are_not_finite_are_kept_as_such(tmp_path):
    """A loss scale leaves out steps whose loss is not finite; a run that is stopped after one goes on."""
    model = FusedUNet((16, 16, 1), filters=2, depth=1, padding="same")
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    progress = {"step": 3, "seconds": 1.5, "losses": [0.5, float("nan"), float("inf")], "replicas": 1}
    checkpoints.save_state(tmp_path, checkpoints.snapshot(model, optimizer), progress)
    losses = checkpoints.load_state(tmp_path, model, optimizer)["losses"]
    assert losses[0] == 0.5 and len(losses) == 3 and not np.isfinite(losses[1:]).any()
