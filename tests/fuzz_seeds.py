"""Small whole files of every kind that is read, to be damaged by fuzz_files.py."""

import functools
from pathlib import Path

import keras
import nibabel
import numpy as np
import tifffile
from PIL import Image

from unet_fast import checkpoints, crossval, tuning
from unet_fast.config import TrainConfig
from unet_fast.data import Dataset
from unet_fast.models import FusedUNet
from unet_fast.training import AdamL2

NAMES = [f"cell{i}" for i in range(6)]
IMAGE = np.random.default_rng(0).integers(0, 255, (3, 24, 20), np.uint8)


@functools.cache
def network():
    """(model, optimizer) of the run whose files are damaged."""
    model = FusedUNet((16, 16, 1), filters=2, depth=1, padding="same")
    optimizer = keras.optimizers.LossScaleOptimizer(AdamL2())
    optimizer.build(model.trainable_variables)
    return model, optimizer


def history_row(step, dice):
    numbers = {"loss": 0.5, "val_loss": 0.4, "val_dice": dice, "val_soft_dice": dice, "val_dice_0": dice}
    return {"step": step, **numbers, "loss_scale": None, "images_per_second": 10.0, "seconds": 1.5}


def run(folder):
    """The folder of a run as training leaves it behind, but for what training it would take."""
    folder = Path(folder) / "run"
    folder.mkdir()
    model, optimizer = network()
    data = Dataset.from_arrays(np.zeros((6, 16, 16), np.uint8), np.tile(np.arange(2, dtype=np.uint8), (6, 16, 8)))
    config = TrainConfig(data="synthetic", filters=2, depth=1, padding="same", size=16, steps=4, batch=1, eval_every=2)
    checkpoints.save_config(folder, config, checkpoints.DataFacts.of(data), "0")
    crossval.save_split(folder / checkpoints.SPLIT, crossval.folds(6, num_folds=3), NAMES)
    checkpoints.write_history(folder, [history_row(2, 0.25), history_row(4, 0.75)])
    progress = {"step": 4, "seconds": 1.5, "losses": [0.5], "replicas": 1}
    checkpoints.save_state(folder, checkpoints.snapshot(model, optimizer), progress)
    checkpoints.ModelWriter(model)(folder, [v.value for v in model.variables])
    (folder / "weights.csv").write_text("name,weight\ncell0,0.5\ncell3,2\n")
    row = {"key": "float16 product 8x570x570x64/1 > 568x568x64, 9 taps", "engine": "cudnn", "config": 1, "splits": 0}
    tuning.record([row, {**row, "key": "another", "engine": "sm90", "splits": 4}], folder / "card.tsv")
    return folder


def _run_file(name):
    return lambda folder: run(folder) / name


def _tiff(**options):
    def write(folder):
        rgb = options.get("photometric") == "rgb"
        stack = np.stack([IMAGE] * 3, -1) if rgb else IMAGE
        tifffile.imwrite(folder / "a.tif", stack, **{"photometric": "minisblack", **options})
        return folder / "a.tif"

    return write


def _pages(folder):
    with tifffile.TiffWriter(folder / "a.tif") as file:
        for page in IMAGE:
            file.write(page, photometric="minisblack", metadata=None, compression="lzw", rowsperstrip=7)
    return folder / "a.tif"


def _png(mode):
    def write(folder):
        image = Image.fromarray(IMAGE[0])
        {"grey": image, "bits": image.convert("1"), "palette": image.quantize(8), "rgb": image.convert("RGB")}[
            mode
        ].save(folder / "a.png")
        return folder / "a.png"

    return write


def _nifti(suffix, dtype="uint8", scale=None):
    def write(folder):
        image = nibabel.Nifti1Image(IMAGE.T.astype(dtype), np.diag([0.5, 0.25, 2, 1]))
        if scale:
            image.header.set_slope_inter(*scale)
        nibabel.save(image, folder / f"a{suffix}")
        return folder / f"a{suffix}"

    return write


SEEDS = {
    "plain:a.tif": _tiff(),
    "imagej:a.tif": _tiff(imagej=True, metadata={"axes": "ZYX"}),
    "ome:a.tif": _tiff(ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}),
    "bigtiff:a.tif": _tiff(bigtiff=True, byteorder=">"),
    "deflate:a.tif": _tiff(compression="zlib", predictor=True),
    "tiles:a.tif": _tiff(compression="zstd", tile=(16, 16)),
    "jpeg:a.tif": _tiff(compression="jpeg", photometric="rgb"),
    "pages:a.tif": _pages,
    "grey:a.png": _png("grey"),
    "bits:a.png": _png("bits"),
    "palette:a.png": _png("palette"),
    "rgb:a.png": _png("rgb"),
    "uint8:a.nii": _nifti(".nii"),
    "scaled:a.nii": _nifti(".nii", "int16", (2.0, 1.0)),
    "float64:a.nii": _nifti(".nii", "float64"),
    "uint8:a.nii.gz": _nifti(".nii.gz"),
    "scaled:a.nii.gz": _nifti(".nii.gz", "int16", (2.0, 1.0)),
    **{
        name: _run_file(name)
        for name in (
            "config.json",
            "split.json",
            "history.csv",
            "last/state.npz",
            "model.keras",
            "weights.csv",
            "card.tsv",
        )
    },
}
