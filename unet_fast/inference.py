"""Segmenting images of any size with trained networks; how they are cut into tiles is `unet_fast.tiling`."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unet_fast.data import open_stack
from unet_fast.data.formats import NAMES, NIFTI, PNG, SUFFIXES, TIFF, stack_writer
from unet_fast.data.stack import stem_of, suffix_of
from unet_fast.errors import UserError
from unet_fast.models import FusedUNet
from unet_fast.models.geometry import input_size_for_output
from unet_fast.tiling import check_alike, predicted_rows, smallest_output


def predict_image(
    model,
    image,
    *,
    value_range,
    scale=(1.0, 1.0),
    overlap=None,
    tta=False,
    batch_size=4,
    on_progress=None,
):
    """Class probabilities of an image of any size.

    Args:
        model: FusedUNet of a fixed input size, which is the tiles'; `with_input_size` gives one of another. Or a list of
            them, whose probabilities are averaged.
        image: uint8, uint16 or float32 [H, W, C], or [H, W] for C = 1.
        value_range: (low, high), the pixel values that training took for -1 and 1.
        scale: (y, x), by how much training resized its images.
        overlap: with padding "same" the share of a tile that the next one covers again, in [0, 1); None for 0.5. Tiles of
            padding "valid" need none: they give what one tile as large as the image would.
        tta: average over the four flips of each tile (test-time augmentation).
        batch_size: most tiles that a network sees at a time.
        on_progress: called with (tiles done, tiles in all) after each batch.

    Returns:
        float32 [H, W, num_classes]; a pixel's sum to 1.

    Raises:
        UserError: channels that are not the model's, an overlap out of range, a model of variable input size, models of
            different sizes, or tiles too small to be put together.

    >>> import numpy as np
    >>> from unet_fast import FusedUNet
    >>> from unet_fast.inference import predict_image
    >>> model = FusedUNet((32, 32, 1), filters=2, depth=2, padding="same")
    >>> predict_image(model, np.zeros((50, 70), np.uint8), value_range=(0, 255)).shape
    (50, 70, 2)
    """
    models = model if isinstance(model, (list, tuple)) else [model]
    check_alike(models, [f"model {i}" for i in range(len(models))])
    image = np.asarray(image)
    image = image[..., None] if image.ndim == 2 else image
    channels = models[0].input_shape[3]
    if image.ndim != 3 or image.shape[2] != channels:
        raise UserError(f"expected an image [H, W, {channels}], got shape {list(image.shape)}; convert it")
    rows = predicted_rows(
        models,
        lambda start, stop: image[start:stop],
        image.shape[:2],
        value_range=value_range,
        scale=scale,
        overlap=overlap,
        tta=tta,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    return np.concatenate([part for _, part in rows])


def with_input_size(model, size):
    """The same network for another input size.

    Args:
        model: FusedUNet.
        size: side of the input in pixels.

    Returns:
        FusedUNet of input [size, size], with the weights of `model`; `model` itself where that is its size.

    Raises:
        UserError: a size that the network does not take, with the nearest ones that it does.

    >>> from unet_fast import FusedUNet
    >>> from unet_fast.inference import with_input_size
    >>> with_input_size(FusedUNet((None, None, 1), filters=2, depth=2), 124).output_shape
    (None, 84, 84, 2)
    """
    if model.input_shape[1:3] == (size, size):
        return model
    other = FusedUNet.from_config({**model.get_config(), "input_shape": (size, size, model.input_shape[3])})
    other.set_weights(model.get_weights())
    return other


def training_scale(run):
    """(y, x), by how much training resized its images, of a `unet_fast.checkpoints.Run`."""
    return tuple(out / side for out, side in zip(run.model.output_shape[1:3], run.facts.image_shape[:2], strict=True))


def predict_files(
    runs, source, target, *, tile=None, overlap=None, tta=False, probabilities=False, on_start=None, on_progress=None
):
    """Segment an image file, or every one in a folder.

    Images are read, and results written, a few rows at a time: but for PNG, which is read and written whole, neither has to
    fit the memory. Labels are written in the input's file type, as the training's masks hold them, say 0 and 255: uint8, or
    uint16 where a class has a value above 255. Probabilities are float32: NIfTI volumes [X, Y, Z, classes], or TIFFs
    [pages, classes, H, W], whose classes ImageJ shows as channels. A NIfTI file gets its input's affine and zooms, a TIFF
    its resolution.

    Args:
        runs: `unet_fast.checkpoints.Run`, or a list of runs of one geometry and on alike data, whose probabilities are
            averaged.
        source: TIFF, PNG or NIfTI file, or a folder of those. Pages and slices are segmented one by one.
        target: file or folder to write. A folder gets files of the same names, and is made if need be.
        tile: side of the network's input in pixels; None as in training.
        overlap, tta: as `predict_image`.
        probabilities: write probabilities instead of labels.
        on_start: called with the number of files.
        on_progress: called with the part of the files done, a float.

    Returns:
        list of pathlib.Path, the files written.

    Raises:
        UserError: nothing to read, a file that is there already, images unlike the training's, or runs unlike each other.

    Example:
        run = unet_fast.checkpoints.load_run("runs/membranes")
        predict_files(run, "new.tif", "labels.tif", tta=True)
    """
    runs = runs if isinstance(runs, (list, tuple)) else [runs]
    models = [_tiled(run.model, tile).for_prediction() for run in runs]
    check_alike(models, [str(run.path) for run in runs])
    _check_same_data(runs)
    facts = runs[0].facts
    jobs = _plan(Path(source), Path(target), probabilities)
    for file, _ in jobs:  # one that does not suit is told before hours of work, not after
        facts.check(open_stack(file), file)
    if on_start:
        on_start(len(jobs))
    values = np.array(facts.mask_values, np.uint8 if max(facts.mask_values) < 256 else np.uint16)
    for number, (file, output) in enumerate(jobs):
        stack = open_stack(file)
        pages, height, width, _ = stack.shape
        shape = (pages, height, width, *([len(values)] if probabilities else []))
        with stack_writer(output, shape, np.float32 if probabilities else values.dtype, like=stack) as writer:
            for page in range(pages):
                for start, rows in predicted_rows(
                    models,
                    lambda start, stop, stack=stack, page=page: stack.rows(page, start, stop),
                    (height, width),
                    value_range=facts.value_range,
                    scale=training_scale(runs[0]),
                    overlap=overlap,
                    tta=tta,
                    batch_size=4,
                    on_progress=on_progress and _Part(on_progress, number + page / pages, 1 / pages),
                ):
                    writer.write(page, start, rows if probabilities else values[rows.argmax(-1)])
    return [output for _, output in jobs]


def _tiled(model, tile):
    """The model with tiles of the size asked for; or as it is, but that tiles too small to be put together grow."""
    if tile is not None:
        return with_input_size(model, tile)
    if min(model.output_shape[1:3]) >= smallest_output(model):
        return model
    return with_input_size(model, input_size_for_output(smallest_output(model), model.depth, model.padding))


def _check_same_data(runs):
    """Raises UserError unless runs saw images alike: their probabilities would not be of the same classes and scale."""
    for run in runs[1:]:
        for name in ("mask_values", "image_dtype", "value_range"):
            ours, first = getattr(run.facts, name), getattr(runs[0].facts, name)
            if ours != first:
                raise UserError(
                    f"{run.path}: expected a run on data like that of {runs[0].path}, with {name} {first}, got {ours}; "
                    "predict with each of them alone"
                )
        if training_scale(run) != training_scale(runs[0]):
            raise UserError(
                f"{run.path}: expected a run that rescales its images like {runs[0].path}, by {training_scale(runs[0])}, "
                f"got {training_scale(run)}; predict with each of them alone"
            )


class _Part(NamedTuple):
    """Turns (tiles done, tiles in all) of one image into the part of all files done."""

    report: Callable
    before: float
    share: float

    def __call__(self, done, total):
        self.report(self.before + self.share * done / total)


def _plan(source, target, probabilities):
    """[(input file, output file)], checked before anything is computed: nothing there is overwritten."""
    if not source.exists():
        raise UserError(f"{source}: expected an image file or a folder of them, found nothing there; check the path")
    if not source.is_dir():
        suffix = suffix_of(source)
        if suffix not in SUFFIXES:
            raise UserError(f"{source}: expected a {NAMES} file, got {suffix or 'no suffix'}; convert it")
        wanted = NIFTI if suffix in NIFTI else TIFF if probabilities or suffix in TIFF else PNG
        if target.is_dir() or suffix_of(target) not in wanted:
            raise UserError(f"{target}: expected an output file named *{wanted[0]}; give such a name")
        jobs, folder = [(source, target)], target.parent
        if not folder.is_dir():
            raise UserError(f"{target}: its folder does not exist; make it, or choose another")
    else:
        files = sorted(f for f in source.iterdir() if suffix_of(f) in SUFFIXES and not f.name.startswith("."))
        if not files:
            raise UserError(f"{source}: expected {NAMES} files in the folder, found none; check the path")
        if target.exists() and not target.is_dir():
            raise UserError(f"{target}: expected a folder to write to, found a file; choose another name")
        jobs = [(f, target / (stem_of(f) + ".tif" if probabilities and suffix_of(f) in PNG else f.name)) for f in files]
        if len({output for _, output in jobs}) < len(jobs):
            raise UserError(f"{source}: two files differ only in their suffix; predict them one by one")
        with contextlib.suppress(OSError):  # what went wrong shows in the next check
            target.mkdir(parents=True, exist_ok=True)
        folder = target
    for _, output in jobs:
        if output.exists():
            raise UserError(f"{output}: is there already and would be overwritten; move it away or choose another name")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot write there; choose another folder")
    return jobs
