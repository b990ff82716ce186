"""What can fail while a network is trained: at any write, in any thread, on a device that is too small.

A kill leaves the files of that moment behind, and so does a copy that is made at that moment; that real kills do the same,
test_resume.py and test_cli.py show. What a damaged file does, test_fuzz_files.py has.
"""

import errno
import hashlib
import os
import re
import shutil

import nibabel
import numpy as np
import pytest
import rich.console
import tensorflow as tf
from test_resume import assert_same_run
from writes import watched

from unet_fast import _library, checkpoints, training
from unet_fast.cli import main
from unet_fast.config import TrainConfig
from unet_fast.data import folder as data_folder
from unet_fast.data import generate, open_stack, write_tiff
from unet_fast.data.formats import stack_writer
from unet_fast.layers import use_fused
from unet_fast.memory import too_large
from unet_fast.step_loop import StepLoop

SMALL = {"filters": 2, "depth": 1, "padding": "same", "size": 16, "batch": 1, "lr": 3e-3, "steps": 2, "eval_every": 1}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    images, masks = generate(6, size=(20, 20))
    write_tiff(folder / "train-volume.tif", images[..., 0])
    write_tiff(folder / "train-labels.tif", masks * 255)
    return folder


def train(out, data):
    """Trains into a folder, or goes on where something is there already."""
    console = rich.console.Console(quiet=True)
    if (out / checkpoints.CONFIG).exists():
        training.train(checkpoints.load_config(out)[0], out, resume=True, console=console)
    else:
        training.train(TrainConfig(data=str(data), **SMALL), out, console=console)


def content(folder):
    """A digest of a folder's files, whose temporary names are all one."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = re.sub(r"^(\.\w+)-\w+", r"\1", file.name)
        digest.update(f"{file.parent.relative_to(folder)}/{name}\0".encode())
        if file.is_file() and file.name != ".lock":
            digest.update(file.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def moments(data, tmp_path_factory):
    """(a whole run, copies of it as it was when each of its writes began, but those that are equal)."""
    folder = tmp_path_factory.mktemp("moments")
    whole, seen = folder / "whole", {}

    def copy(number, path):
        if whole.exists():
            shutil.copytree(whole, folder / str(number), symlinks=True)
            if seen.setdefault(content(folder / str(number)), number) != number:
                shutil.rmtree(folder / str(number))

    with watched(whole, copy):
        train(whole, data)
    return whole, [folder / str(number) for number in sorted(seen.values())]


def goes_on(moment, whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(moment, out)
    train(out, data)
    assert_same_run(out, whole)
    assert {file.name for file in out.rglob("*")} == {file.name for file in whole.rglob("*")}, "something is left"
    shutil.rmtree(out)


def test_a_run_that_was_killed_at_some_writes_goes_on(moments, data, tmp_path):
    whole, copies = moments
    assert len(copies) > 20
    for moment in copies[len(copies) // 4 :: len(copies) // 3]:
        goes_on(moment, whole, data, tmp_path)


@pytest.mark.slow
def test_a_run_that_was_killed_at_any_write_goes_on(moments, data, tmp_path):
    whole, copies = moments
    for moment in copies:
        goes_on(moment, whole, data, tmp_path)


def fails_and_goes_on(out, number, data, capsys):
    """Trains with a disk that is full from a write on; returns whether there was such a write."""
    full = []

    def on_write(this, path):
        if this >= number and not path.name.startswith(".lock"):
            full.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with watched(out, on_write):
        status = main(["train", "--data", str(data), "--out", str(out), *OPTIONS])
    if not full:
        assert status == 0
        return False
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith(f"unet-fast: error: {out}") and "No space left on device" in line, line
    return True


def test_a_disk_that_is_full_from_some_write_on(moments, data, tmp_path, capsys):
    for number in (4, 30):
        assert fails_and_goes_on(tmp_path / str(number), number, data, capsys)
        train(tmp_path / str(number), data)
        assert_same_run(tmp_path / str(number), moments[0])


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_write_on(moments, data, tmp_path, capsys):
    number = 0
    while fails_and_goes_on(tmp_path / "run", number, data, capsys):
        if (tmp_path / "run").exists():
            train(tmp_path / "run", data)
            assert_same_run(tmp_path / "run", moments[0])
            shutil.rmtree(tmp_path / "run")
        number += 1
    assert number > 40


def test_a_run_on_a_disk_that_may_only_be_read(moments, tmp_path, capsys):
    """Is not gone on with, and says so; its model is there to be used."""
    out = tmp_path / "run"
    shutil.copytree(moments[0], out)
    before = content(out)

    def on_write(number, path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with watched(out, on_write):
        assert main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 2
        assert checkpoints.load_run(out).model.filters == 2
    assert capsys.readouterr().err == (
        f"unet-fast: error: {out}: cannot write there (Read-only file system); choose another folder\n"
    )
    assert content(out) == before


@pytest.mark.parametrize(
    ("suffix", "fault"), [(".tif", "gone"), (".png", "gone"), (".nii.gz", "gone"), (".tif", "loop")]
)
def test_a_thread_that_cannot_read_an_image_says_why(tmp_path, capsys, monkeypatch, suffix, fault):
    """A data set that stays in its files, which vanish or cannot be reached any more once training has begun."""
    monkeypatch.setattr(data_folder, "IN_MEMORY_BYTES", 0)
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2), np.uint8), None), tmp_path / "like.nii")
    for name, stack in zip(("images", "masks"), generate(6, size=(32, 32)), strict=True):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, page in enumerate(stack):
            file = tmp_path / "data" / name / f"{i}{suffix}"
            with stack_writer(file, (1, 32, 32), page.dtype, like=open_stack(tmp_path / "like.nii")) as writer:
                writer.write(0, 0, page.squeeze())
    load = training.load_labelled

    def failing(path, **options):
        dataset = load(path, **options)
        for file in (tmp_path / "data" / "images").iterdir():
            file.unlink()
            if fault == "loop":
                file.symlink_to(file)
        return dataset

    monkeypatch.setattr(training, "load_labelled", failing)
    assert main(["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *OPTIONS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    reason = os.strerror(errno.ENOENT if fault == "gone" else errno.ELOOP)
    assert re.match(
        f"unet-fast: error: {tmp_path}/data/images/\\d{re.escape(suffix)}: cannot read it \\({reason}\\)", line
    )


OOM = (
    "OOM when allocating tensor with shape[8,568,568,64] and type float on /job:localhost/device:GPU:0 by allocator BFC"
)
XLA = "Out of memory while trying to allocate 17179869184 bytes."


def test_a_step_that_finds_no_memory_says_what_to_lower(data, tmp_path, capsys, monkeypatch):
    advance, times = StepLoop.advance, []

    def without_memory(self, most):
        times.append(most)
        if len(times) == 2:
            raise tf.errors.ResourceExhaustedError(None, None, OOM)
        return advance(self, most)

    monkeypatch.setattr(StepLoop, "advance", without_memory)
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *OPTIONS, "--batch=2"]) == 2
    assert capsys.readouterr().err == (
        "unet-fast: error: out of memory in a step of --batch 2, --size 16 and --filters 2; no room for [8,568,568,64]: try "
        "--batch 1 --accumulate 2, which trains alike in half the memory of the images, or --precision mixed_float16\n"
    )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch": 8}, XLA, "no room for 17179869184 bytes: try --batch 4 --accumulate 2,"),
        (
            {"batch": 9, "accumulate": 2},
            "",
            "--filters 64: try --batch 3 --accumulate 6, which trains alike in 1/3 the",
        ),
        ({"batch": 1}, OOM, "try --precision mixed_float16, or --size 396, for half the pixels, or --filters 32"),
        ({"batch": 1, "precision": "mixed_float16", "size": 188, "filters": 1}, "", "try a smaller --depth"),
    ],
)
def test_what_is_to_be_lowered_fits_the_options(options, error, words):
    config = TrainConfig(**{"data": "synthetic", "size": 572, **options})
    assert words in str(too_large(config, error))


def test_a_library_that_cannot_be_used_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(_library, "status", lambda: _library.Status(False, "it was not built", False))
    monkeypatch.delenv("UNET_FAST_REQUIRE_KERNELS", raising=False)
    _library.say_once.cache_clear()
    assert not any(use_fused("auto", "float32") for _ in range(3))
    said = "unet_fast: stock TensorFlow runs in place of the fused ops: it was not built; see `unet-fast info`\n"
    assert capsys.readouterr().err == said
    assert not use_fused("auto", "float32", on_cpu=False) and not use_fused("stock", "float32")
    assert capsys.readouterr().err == "", "nothing to say where they would not have run anyway"
