"""Quiet TensorFlow, and nothing of one test's global state in the next."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _fresh_keras():
    yield
    keras.mixed_precision.set_dtype_policy("float32")
    keras.backend.clear_session()


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
def crossval_folder(crossval_options, tmp_path_factory):
    """What `unet-fast crossval` made of them; not to be changed."""
    from unet_fast.cli import main

    out = tmp_path_factory.mktemp("runs") / "crossval"
    assert main(["crossval", "--out", str(out), *crossval_options]) == 0
    return out
