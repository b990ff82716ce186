"""Quiet TensorFlow, and nothing of one test's global state in the next."""

import contextlib
import io
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _fresh_keras():
    yield
    keras.mixed_precision.set_dtype_policy("float32")
    # Without Python's collector, which takes seconds where hundreds of tests have left their graphs.
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(scope="session")
def stacks(tmp_path_factory):
    """A data folder of four TIFFs of two pages of 64 x 64 pixels each, with masks of 0 and 255, and names to be careful with."""
    from unet_fast.data import generate, write_tiff

    folder = tmp_path_factory.mktemp("stacks")
    images, masks = generate(8, size=(64, 64))
    for i, stem in enumerate(("<img src=x onerror=alert(1)>", "b&amp;b", "c 'c' \"c\"", "d")):
        for name, pages in (("images", images[..., 0]), ("masks", masks * np.uint8(255))):
            (folder / name).mkdir(exist_ok=True)
            write_tiff(folder / name / f"{stem}.tif", pages[2 * i : 2 * i + 2])
    return folder


@pytest.fixture(scope="session")
def crossval_options(stacks):
    """Arguments of a small cross-validation of two folds, less --out."""
    network = ["--filters", "4", "--depth", "1", "--padding", "same", "--size", "32"]
    training = ["--batch", "2", "--lr", "1e-2", "--steps", "6", "--eval-every", "2"]
    return ["--data", str(stacks), "--folds", "2", *network, *training]


@pytest.fixture(scope="session")
def interrupted_crossval(crossval_options, tmp_path_factory):
    """A cross-validation that got SIGTERM in its second fold, and what was then said: (folder, exit status, standard error)."""
    from unet_fast.cli import main
    from unet_fast.step_loop import StepLoop

    out, loops, advance = tmp_path_factory.mktemp("runs") / "crossval", set(), StepLoop.advance

    def interrupted(self, most):
        loops.add(id(self))
        if len(loops) == 2:
            signal.raise_signal(signal.SIGTERM)
        return advance(self, most)

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(StepLoop, "advance", interrupted)
        status = main(["crossval", "--out", str(out), *crossval_options])
        for arguments in (["predict", "--input", "x.tif", "--output", "y.tif"], ["report"]):
            assert main([*arguments, "--run", str(out)]) == 2
    return out, status, said.getvalue()


@pytest.fixture(scope="session")
def crossval_folder(interrupted_crossval):
    """That cross-validation, resumed and finished; not to be changed."""
    from unet_fast.cli import main

    out, *_ = interrupted_crossval
    first = (out / "fold0" / "model.keras").stat().st_mtime_ns
    assert main(["crossval", "--out", str(out), "--resume"]) == 0
    assert (out / "fold0" / "model.keras").stat().st_mtime_ns == first, "what is finished is kept"
    return out
