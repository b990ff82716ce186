"""The command line: what it prints, its exit status, and that a user's mistake is one line and nothing else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tifffile

from unet_fast import training
from unet_fast.cli import main
from unet_fast.data import folder, generate, read_png, read_tiff, write_png, write_tiff
from unet_fast.step_loop import StepLoop

SIZES = ["--filters", "4", "--depth", "2", "--padding", "same", "--size", "32", "--batch", "2", "--lr", "1e-3"]
SMALL = [*SIZES, "--steps", "8", "--eval-every", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder of images/ and masks/: ten sections of 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("data")
    images, masks = generate(10, size=(64, 64))
    for i, (image, mask) in enumerate(zip(images[..., 0], masks, strict=True)):
        for name, page in (("images", image), ("masks", mask * 255)):
            (folder / name).mkdir(exist_ok=True)
            write_png(folder / name / f"{i}.png", page)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(data), "--out", str(out), *SMALL]) == 0
    return out


def command(*arguments, **kwargs):
    """`unet-fast` in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent), **kwargs.pop("environment", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "unet_fast", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **kwargs,
    )


def mistake(capsys, *arguments):
    """The one line that a mistake costs."""
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("unet-fast: error: ")
    return line.removeprefix("unet-fast: error: ")


def test_train_prints_a_line_an_evaluation_and_a_table(data, tmp_path, capsys):
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("8 training and 2 validation images, fold 0 of 5; 8,202 parameters")
    assert [line.split("  ")[0] for line in lines[1:3]] == ["step 4/8", "step 8/8"]
    assert "of step" in lines[3] and "mean" in captured.out
    assert captured.err == ""
    assert "\x1b" not in captured.out


def test_evaluate(run, data, capsys):
    assert main(["evaluate", "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "validation fold 0, 2 images" in printed
    for word in ("HD95 (pixel)", "NSD", "adapted Rand error", "VOI split", "VOI merge"):
        assert word in printed
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    captured = capsys.readouterr()
    scores = json.loads(captured.out, parse_constant=pytest.fail)
    assert scores == json.loads((run / "metrics.json").read_text())
    assert len(scores["hd95_per_class"]) == 2 and len(scores["images"]) == 2
    names = [image["name"] for image in scores["images"]]
    assert all(f"│ {name} " in printed for name in names), "each image has a row"
    assert main(["evaluate", "--run", str(run), "--data", str(data), "--json", "--tolerance", "3"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["samples"] == 10 and other["images"][0]["tolerance"] == 3
    assert json.loads((run / "metrics.json").read_text()) == scores


def test_predict(run, data, tmp_path, capsys):
    assert main(["predict", "--run", str(run), "--input", str(data / "images"), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"wrote 10 files to {tmp_path / 'out'}\n"
    labels = read_png(tmp_path / "out" / "0.png")
    assert labels.shape == (64, 64) and set(np.unique(labels)) <= {0, 255}

    write_tiff(tmp_path / "large.tif", generate(1, size=(90, 130))[0][..., 0])
    options = ["--tile", "40", "--overlap", "0.25", "--tta", "--probabilities"]
    files = ["--input", str(tmp_path / "large.tif"), "--output", str(tmp_path / "p.tif")]
    assert main(["predict", "--run", str(run), *files, *options]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'p.tif'}\n"
    assert (tmp_path / "p.tif").stat().st_size > 90 * 130 * 2 * 4
    assert main(["predict", "--run", str(run), *files[:3], str(tmp_path / "labels.tif")]) == 0
    assert read_tiff(tmp_path / "labels.tif").shape == (1, 90, 130)


def test_an_ensemble(run, data, tmp_path, capsys):
    """Runs named one by one, or the folder that holds them."""
    image = str(data / "images" / "0.png")
    folds = tmp_path / "folds"
    for fold in "01":
        assert main(["train", "--data", str(data), "--out", str(folds / fold), "--seed", fold, *SMALL]) == 0

    def predicted(name, *runs):
        options = [word for path in runs for word in ("--run", str(path))]
        target = tmp_path / f"{name}.tif"
        assert main(["predict", *options, "--input", image, "--output", str(target), "--probabilities"]) == 0
        return tifffile.imread(target)

    each = [predicted(fold, folds / fold) for fold in "01"]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    for name, runs in (("both", (folds / "0", folds / "1")), ("folder", (folds,))):
        np.testing.assert_allclose(predicted(name, *runs), np.mean(each, 0), atol=1e-6)
    capsys.readouterr()
    assert "no config.json in it" in mistake(
        capsys, "predict", "--run", tmp_path, "--input", image, "--output", "x.png"
    )


def test_a_damaged_file_met_in_training_is_one_line(data, tmp_path, capsys, monkeypatch):
    """Of a data set that is read while it is used."""
    monkeypatch.setattr(folder, "IN_MEMORY_BYTES", 0)
    shutil.copytree(data, tmp_path / "data")
    load = training.load_labelled

    def damaging(path, **options):
        dataset = load(path, **options)
        for file in (tmp_path / "data" / "images").iterdir():
            file.write_bytes(file.read_bytes()[:200])
        return dataset

    monkeypatch.setattr(training, "load_labelled", damaging)
    assert main(["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *SMALL]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"unet-fast: error: {tmp_path / 'data' / 'images'}") and "save it again" in line


def test_config_file(data, tmp_path, capsys):
    options = {"data": str(data), "out": str(tmp_path / "a"), "filters": 4, "depth": 1, "padding": "same", "size": 32}
    options |= {"steps": 1, "batch": 2, "augment": False, "lr": 1}
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert main(["train", "--config", str(tmp_path / "config.json"), "--lr", "1e-3"]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["lr"] == 1e-3, "the command line wins"
    assert (config["batch"], config["augment"], config["seed"]) == (2, False, 0)
    # A run's own config repeats it.
    repeated = ["train", "--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")]
    assert main(repeated) == 0
    one, other = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in "ab")
    assert one == other
    capsys.readouterr()
    (tmp_path / "config.json").write_text('{"stepz": 1}')
    assert "unknown option 'stepz'; expected data, " in mistake(capsys, "train", "--config", tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"steps": "many"}')
    line = mistake(capsys, "train", "--config", tmp_path / "config.json", "--data", data, "--out", tmp_path / "c")
    assert "expected --steps to be a whole number, got 'many'" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("train", "expected --out RUN"),
        ("train --out {new}", "expected --data"),
        ("train --out {new} --data {data} --stepz 3", "unrecognized arguments: --stepz 3"),
        ("train --out {new} --data {data} --step 3", "unrecognized arguments: --step 3"),
        ("train --out {new} --data {data} --steps x", "argument --steps: invalid int value: 'x'"),
        ("train --out {new} --data {data} --steps 0", "expected --steps to be at least 1, got 0"),
        ("train --out {new} --data {data} --lr nan", "expected --lr to be a number, got nan"),
        ("train --out {new} --data {data} --dropout 1", "expected --dropout to be in [0, 1), got 1.0"),
        ("train --out {new} --data {data} --fold 5", "expected --fold to be from 0 to 4 with --folds 5, got 5"),
        ("train --out {new} --data {data} --precision float16", "invalid choice: 'float16'"),
        ("train --out {new} --data {data} --folds 11", "expected at least 11 samples for 11 folds, got 10"),
        ("train --out {new} --data {data} --size 100", "input size 100 does not fit"),
        ("train --out {new} --data {data}/images", "no data found; expected either"),
        ("train --out {new} --data {new}", "expected a data folder or the word synthetic, found nothing there"),
        ("train --out {new} --config {new}", "cannot read the config file (No such file or directory)"),
        ("train --out {new} --config {data}/images/0.png", "expected JSON, got something else"),
        ("train --out {run} --data {data}", "expected a new or empty folder for the run, found files in it"),
        ("train --out {data}/images/0.png --data {data}", "expected a folder for the run, found a file"),
        ("train --out {data}/images/0.png/run --data {data} --padding same", "cannot write there (Not a directory)"),
        ("train --out {new} --resume", "expected the folder of a run, found no such folder"),
        ("train --out {data} --resume", "expected the folder of a run, found no config.json in it"),
        ("train --out {run} --resume --lr 1", "--lr is 1.0 but the run to resume has 0.001"),
        ("evaluate", "the following arguments are required: --run"),
        ("evaluate --run {new}", "expected the folder of a run, found no such folder"),
        ("evaluate --run {run} --data {data}/masks", "no data found"),
        ("evaluate --run {run} --tolerance -1", "expected --tolerance to be a number of at least 0, got -1"),
        ("predict --run {run} --input {new} --output {new}.tif", "found nothing there"),
        ("predict --run {run} --input {data}/images/0.png --output {data}/images/1.png", "is there already"),
        ("predict --run {run} --input {data}/images/0.png --output {new}.png --tile 33", "input size 33 does not fit"),
        (
            "predict --run {run} --input {data}/images/0.png --output {new}.png --overlap 1",
            "expected overlap in [0, 1)",
        ),
    ],
)
def test_mistakes(run, data, tmp_path, capsys, arguments, message):
    places = {"run": run, "data": data, "new": tmp_path / "new"}
    assert message in mistake(capsys, *(word.format(**places) for word in arguments.split()))
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(data, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "cannot write there" in mistake(capsys, "train", "--data", data, "--out", tmp_path / "run", *SMALL)


def test_a_full_disk_and_too_little_memory_are_one_line(data, tmp_path, capsys, monkeypatch):
    def fail(error):
        def train(*args, **kwargs):
            raise error

        monkeypatch.setattr(training, "train", train)
        return mistake(capsys, "train", "--data", data, "--out", tmp_path / "run")

    assert fail(OSError(28, "No space left on device", "run/model.keras")) == "run/model.keras: No space left on device"
    assert "use a smaller --batch" in fail(tf.errors.ResourceExhaustedError(None, None, "OOM when allocating"))
    with pytest.raises(RuntimeError, match="a bug"):
        fail(RuntimeError("a bug"))


def test_interrupt(data, tmp_path, capsys, monkeypatch):
    advance = StepLoop.advance

    def interrupted(self, most):
        signal.raise_signal(signal.SIGTERM)
        return advance(self, most)

    with monkeypatch.context() as patch:
        patch.setattr(StepLoop, "advance", interrupted)
        assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL]) == 128 + signal.SIGTERM
    captured = capsys.readouterr()
    stopped = f"unet-fast: stopped at step 1 of 8; go on with `unet-fast train --out {tmp_path / 'run'} --resume`\n"
    assert captured.err == stopped
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--steps", "4"]) == 0
    assert "resumed at step 1 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("command_name", ["", "train", "crossval", "evaluate", "predict", "report", "info"])
def test_help_needs_no_tensorflow(tmp_path, command_name):
    for name in ("tensorflow", "keras", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    process = command(*command_name.split(), "--help", environment={"PYTHONPATH": path})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith(f"usage: unet-fast {command_name}".rstrip())
    # A mistyped option is told at once, too.
    process = command(*command_name.split(), "--no-such-option", environment={"PYTHONPATH": path})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1)


def test_whoever_leaves_before_the_end_is_told_nothing():
    process = command("info", "--json")
    process.stdout.close()  # as `head` does
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_killed_and_resumed(run, data, tmp_path):
    """kill -9 between a checkpoint and the next, in another process; the run ends as if it had not been."""
    out = tmp_path / "run"
    train = ["train", "--data", data, *SIZES, "--eval-every", "4", "--out"]
    process = command(*train, out, "--steps", "100000")
    state = out / "last" / "state.npz"
    deadline = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    busy = command("train", "--out", out, "--resume")
    _, err = busy.communicate(timeout=60)
    assert busy.returncode == 2
    assert (
        err
        == f"unet-fast: error: {out}: in use by process {process.pid}; wait until it ends, or choose another folder\n"
    )
    process.kill()
    process.communicate()

    with np.load(state) as saved:
        step = json.loads(str(saved["progress"]))["step"]
    assert step % 4 == 0
    steps = step + 4
    process = command("train", "--out", out, "--resume", "--steps", steps)
    printed, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), err
    assert f"resumed at step {step} of {steps}" in printed
    whole = tmp_path / "whole"
    assert main([*map(str, [*train, whole, "--steps", steps])]) == 0
    with np.load(state) as ours, np.load(whole / "last" / "state.npz") as theirs:
        for name in set(theirs.files) - {"progress"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)
