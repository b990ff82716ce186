"""Segmenting images of any size with a trained network, by overlapping tiles.

Scale. Training resizes every image to the network's output size, say 512 pixels to 388, so the network knows structures
at that scale alone. A new image is therefore resized by the same factor a side, whatever its own size; its probabilities
are resized back, and only then is the likeliest class taken, which keeps borders smooth.

Tiles. The rescaled image is cut into the network's input size. What a tile sees beyond the image is the image mirrored
(Ronneberger et al., U-Net, 2015, section 2). An unpadded network ("valid") gives the middle of each tile, so tiles abut
unless an overlap is asked for. They begin a multiple of 2^depth pixels apart, so that the poolings of all fall on the same
pixels: the result is that of one pass over the whole image, but that 3x3 transposed convolutions lack one neighbour at a
tile's first row and column, which is felt 2^depth - 1 pixels deep. A padded network ("same") knows less all along a tile's
edge: its tiles overlap by half. Where tiles overlap they are averaged with Gaussian weights (Isensee et al., nnU-Net, 2021).

Memory. The network sees `batch_size` tiles at a time; beside them there are the rescaled image and, for each pixel, a
float32 a class and one more.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from unet_fast.data import normalize, read_png, read_tiff, write_png, write_tiff
from unet_fast.errors import UserError
from unet_fast.models import FusedUNet

_TIFF, _PNG = (".tif", ".tiff"), (".png",)
_BLEND = 1 / 8  # standard deviation of the Gaussian as a share of the tile, as in nnU-Net


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
        model: FusedUNet of a fixed input size, which is the tiles'; `with_input_size` gives one of another.
        image: uint8, uint16 or float32 [H, W, C], or [H, W] for C = 1.
        value_range: (low, high), the pixel values that training took for -1 and 1.
        scale: (y, x), by how much training resized its images.
        overlap: share of a tile's output that the next one covers again, in [0, 1). None: 0 for padding "valid", 0.5
            for "same".
        tta: average over the four flips of each tile (test-time augmentation).
        batch_size: most tiles that the network sees at a time.
        on_progress: called with (tiles done, tiles in all) after each batch.

    Returns:
        float32 [H, W, num_classes]; a pixel's sum to 1.

    Raises:
        UserError: channels that are not the model's, an overlap out of range, or a model of variable input size.

    >>> import numpy as np
    >>> from unet_fast import FusedUNet
    >>> from unet_fast.inference import predict_image
    >>> model = FusedUNet((32, 32, 1), filters=2, depth=2, padding="same")
    >>> predict_image(model, np.zeros((50, 70), np.uint8), value_range=(0, 255)).shape
    (50, 70, 2)
    """
    image = np.asarray(image)
    image = image[..., None] if image.ndim == 2 else image
    tile, out = model.input_shape[1:3], model.output_shape[1:3]
    if None in tile:
        raise UserError("expected a model of a fixed input size, got a variable one; use with_input_size")
    if image.ndim != 3 or image.shape[2] != model.input_shape[3]:
        raise UserError(f"expected an image [H, W, {model.input_shape[3]}], got shape {list(image.shape)}; convert it")
    if overlap is None:
        overlap = 0.0 if model.padding == "valid" else 0.5
    if not 0 <= overlap < 1:
        raise UserError(f"expected overlap in [0, 1), got {overlap}; give such a share")

    size = image.shape[:2]
    scaled = tuple(max(1, round(side * factor)) for side, factor in zip(size, scale, strict=True))
    with tf.device("CPU:0"):  # an image that needs tiles may not fit a GPU
        # As in training: `unet_fast.data.prepare_image`.
        pixels = tf.image.resize(normalize(image, value_range), scaled).numpy()
    grid = [_starts(s, o, overlap, 2**model.depth) for s, o in zip(scaled, out, strict=True)]
    flips = [(1, 1), (-1, 1), (1, -1), (-1, -1)] if tta else [(1, 1)]
    jobs = [(y, x, flip) for y in grid[0] for x in grid[1] for flip in flips]
    margin = [(t - o) // 2 for t, o in zip(tile, out, strict=True)]
    weight = _gaussian(out[0])[:, None] * _gaussian(out[1])

    total = np.zeros((*scaled, model.output_shape[3]), np.float32)
    weights = np.zeros(scaled, np.float32)
    done = 0
    for batch in _batches(jobs, batch_size):
        tiles = np.stack([_cut(pixels, y - margin[0], x - margin[1], tile)[:: f[0], :: f[1]] for y, x, f in batch])
        probabilities = tf.nn.softmax(tf.cast(model.predict_on_batch(tiles), tf.float32)).numpy()
        for (y, x, flip), tile_probabilities in zip(batch[: len(jobs) - done], probabilities, strict=False):
            rows, columns = (slice(max(b, 0), b + o) for b, o in zip((y, x), out, strict=True))
            inside = (slice(max(-y, 0), scaled[0] - y), slice(max(-x, 0), scaled[1] - x))
            total[rows, columns] += (tile_probabilities[:: flip[0], :: flip[1]] * weight[..., None])[inside]
            weights[rows, columns] += weight[inside]
        done = min(done + len(batch), len(jobs))
        if on_progress:
            on_progress(done, len(jobs))
    total /= weights[..., None]
    if scaled == size:
        return total
    with tf.device("CPU:0"):
        return tf.image.resize(total, size).numpy()


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
    run, source, target, *, tile=None, overlap=None, tta=False, probabilities=False, on_start=None, on_progress=None
):
    """Segment a TIFF or PNG file, or every one in a folder.

    Labels are written in the input's file type as uint8: class indices, or 0 and 255 where there are two classes, as in
    ISBI-2012's labels. Probabilities are float32 TIFFs [pages, H, W, classes], whose classes ImageJ shows as channels.

    Args:
        run: `unet_fast.checkpoints.Run`.
        source: TIFF (of any number of pages) or PNG file, or a folder of those.
        target: file or folder to write. A folder gets files of the same names, and is made if need be.
        tile: side of the network's input in pixels; None as in training.
        overlap, tta: as `predict_image`.
        probabilities: write probabilities instead of labels.
        on_start: called with the number of files.
        on_progress: called with the part of the files done, a float.

    Returns:
        list of pathlib.Path, the files written.

    Raises:
        UserError: nothing to read, a file that is there already, or images unlike the training's.

    Example:
        run = unet_fast.checkpoints.load_run("runs/membranes")
        predict_files(run, "new.tif", "labels.tif", tta=True)
    """
    model = run.model if tile is None else with_input_size(run.model, tile)
    jobs = _plan(Path(source), Path(target), probabilities)
    if on_start:
        on_start(len(jobs))
    for number, (file, output) in enumerate(jobs):
        stack = read_tiff(file) if _is(file, _TIFF) else read_png(file)[None]
        stack = stack[..., None] if stack.ndim == 3 else stack
        run.facts.check(stack, file)
        results = []
        for page, image in enumerate(stack):
            result = predict_image(
                model,
                image,
                value_range=run.facts.value_range,
                scale=training_scale(run),
                overlap=overlap,
                tta=tta,
                on_progress=on_progress and _Part(on_progress, number + page / len(stack), 1 / len(stack)),
            )
            results.append(result if probabilities else _labels(result))
        if _is(output, _PNG):
            write_png(output, results[0])
        else:
            write_tiff(output, np.stack(results))
    return [output for _, output in jobs]


class _Part(NamedTuple):
    """Turns (tiles done, tiles in all) of one image into the part of all files done."""

    report: Callable
    before: float
    share: float

    def __call__(self, done, total):
        self.report(self.before + self.share * done / total)


def _labels(probabilities):
    classes = probabilities.shape[-1]
    return (probabilities.argmax(-1) * (255 if classes == 2 else 1)).astype(np.uint8)


def _plan(source, target, probabilities):
    """[(input file, output file)], checked before anything is computed: nothing there is overwritten."""
    if not source.exists():
        raise UserError(f"{source}: expected an image file or a folder of them, found nothing there; check the path")
    if not source.is_dir():
        if not _is(source, _TIFF + _PNG):
            raise UserError(f"{source}: expected a TIFF or PNG file, got {source.suffix or 'no suffix'}; convert it")
        wanted = _TIFF if probabilities or _is(source, _TIFF) else _PNG
        if target.is_dir() or not _is(target, wanted):
            raise UserError(f"{target}: expected an output file named *{wanted[0]}; give such a name")
        jobs, folder = [(source, target)], target.parent
        if not folder.is_dir():
            raise UserError(f"{target}: its folder does not exist; make it, or choose another")
    else:
        files = sorted(f for f in source.iterdir() if _is(f, _TIFF + _PNG) and not f.name.startswith("."))
        if not files:
            raise UserError(f"{source}: expected TIFF or PNG files in the folder, found none; check the path")
        if target.exists() and not target.is_dir():
            raise UserError(f"{target}: expected a folder to write to, found a file; choose another name")
        jobs = [(f, target / (f.stem + ".tif" if probabilities and _is(f, _PNG) else f.name)) for f in files]
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


def _is(path, suffixes):
    return path.suffix.lower() in suffixes


def _starts(size, out, overlap, multiple):
    """Where output tiles begin along an axis: they cover [0, size), and hang over on both sides alike."""
    wanted = max(int(out * (1 - overlap)), 1)
    step = wanted // multiple * multiple or wanted
    count = max(0, -(-(size - out) // step)) + 1
    overhang = (count - 1) * step + out - size
    first = -(overhang // 2 // multiple * multiple)
    return [first + i * step for i in range(count)]


def _gaussian(length):
    position = (np.arange(length) - (length - 1) / 2) / (_BLEND * length)
    return np.exp(-0.5 * position**2).astype(np.float32)


def _batches(jobs, batch_size):
    """Batches of one size, as equal sizes as there can be; the last is filled up with jobs of the first."""
    count = -(-len(jobs) // batch_size)
    size = -(-len(jobs) // count)
    filled = jobs + jobs[: count * size - len(jobs)]
    return [filled[i : i + size] for i in range(0, len(filled), size)]


def _cut(pixels, top, left, tile):
    """A tile [*tile, C] of pixels [H, W, C], which go on as if mirrored at their first and last rows and columns."""
    rows, columns = (
        _mirrored(first + np.arange(length), size)
        for first, length, size in zip((top, left), tile, pixels.shape[:2], strict=True)
    )
    return pixels[rows[:, None], columns]


def _mirrored(index, size):
    period = max(2 * (size - 1), 1)
    index = index % period
    return np.minimum(index, period - index) if size > 1 else np.zeros_like(index)
