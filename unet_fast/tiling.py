"""An image in overlapping tiles, row of tiles by row of tiles, so that neither it nor its result need to be in memory.

Scale. Training resizes every image to the network's output size, say 512 pixels to 388, so the network knows structures
at that scale alone. A new image is therefore resized by the same factor a side, whatever its own size; its probabilities
are resized back, and only then is the likeliest class taken, which keeps borders smooth.

Tiles. The rescaled image is cut into the network's input size. What a tile sees beyond the image is the image mirrored
(Ronneberger et al., U-Net, 2015, section 2). Tiles begin a multiple of 2^depth pixels apart, so that the poolings of all
fall on the same pixels.

An unpadded network ("valid") gives the middle of each tile, and what it gives is that of one pass over the whole image, but
that 3x3 transposed convolutions lack one neighbour at a tile's first row and column, which is felt 2^depth - 1 pixels
deep. Those pixels are taken from the tile before, whose end they are: so tiles abut and give exactly what one tile as
large as the image would. A flipped tile begins at its other end.

A padded network ("same") knows less all along a tile's edge: its tiles overlap by half and are averaged with Gaussian
weights (Isensee et al., nnU-Net, 2021).

Memory. The networks see `batch_size` tiles at a time; beside them there are one row of tiles, rescaled, as wide as the
image, and for each of its pixels a float32 a class and one more.
"""

import math

import numpy as np
import tensorflow as tf

from unet_fast.data import normalize
from unet_fast.data.resample import resample, resize_positions
from unet_fast.errors import UserError

_BLEND = 1 / 8  # standard deviation of the Gaussian as a share of the tile, as in nnU-Net
_CHUNK = 2**22  # numbers that are resized back at a time
_FLIPS = ((1, 1), (-1, 1), (1, -1), (-1, -1))


def predicted_rows(models, read, size, *, value_range, scale, overlap, tta, batch_size, on_progress=None):
    """Class probabilities of an image, from its first row to its last.

    Args:
        models: networks of one geometry, `check_alike`, whose probabilities are averaged.
        read: function of a first and a last row (exclusive) that gives these rows of the image, [rows, W, C].
        size: (H, W) of the image.
        value_range, scale, overlap, tta, batch_size, on_progress: as `unet_fast.inference.predict_image`.

    Yields:
        (start, float32 [rows, W, num_classes]): the probabilities of rows from `start` on, each row once and in order.

    Raises:
        UserError: an overlap out of range, or tiles too small to be put together.

    >>> import numpy as np
    >>> from unet_fast import FusedUNet
    >>> from unet_fast.tiling import predicted_rows
    >>> image, model = np.zeros((50, 20, 1), np.uint8), FusedUNet((32, 32, 1), filters=2, depth=2, padding="same")
    >>> options = {"value_range": (0, 255), "scale": (1, 1), "overlap": 0, "tta": False, "batch_size": 4}
    >>> rows = predicted_rows([model], lambda start, stop: image[start:stop], (50, 20), **options)
    >>> sum(len(part) for _, part in rows)
    50
    """
    model = models[0]
    scaled = tuple(max(1, round(side * factor)) for side, factor in zip(size, scale, strict=True))
    tile, out = model.input_shape[1:3], model.output_shape[1:3]
    margin = [(t - o) // 2 for t, o in zip(tile, out, strict=True)]
    axes = [_Axis(models, s, o, overlap) for s, o in zip(scaled, out, strict=True)]
    flips = _FLIPS if tta else _FLIPS[:1]
    counts = len(axes[0].starts), len(axes[1].starts), len(flips)
    source = _Source(read, size, scaled, value_range)
    canvas = _Canvas(scaled, model.output_shape[3])
    restored = _Restored(size, scaled)
    done, total = 0, math.prod(counts)
    for numbers in _batches(total, batch_size):
        batch = [(i, k, flips[f]) for i, k, f in zip(*np.unravel_index(numbers, counts), strict=True)]
        tiles = np.stack(
            [
                source.tile(axes[0].starts[i] - margin[0], axes[1].starts[k] - margin[1], tile)[:: f[0], :: f[1]]
                for i, k, f in batch
            ]
        )
        each = (tf.nn.softmax(tf.cast(m.predict_on_batch(tiles), tf.float32)).numpy() for m in models)
        probabilities = sum(each) / len(models)
        for (i, k, flip), part in zip(batch[: total - done], probabilities, strict=False):
            weight = axes[0].weight(i, flip[0])[:, None] * axes[1].weight(k, flip[1])
            canvas.add(axes[0].starts[i], axes[1].starts[k], part[:: flip[0], :: flip[1]], weight)
        done = min(done + len(batch), total)
        finished = axes[0].starts[done // math.prod(counts[1:])] if done < total else scaled[0]
        yield from restored.rows(canvas.take(finished))
        if on_progress:
            on_progress(done, total)


def check_alike(models, names):
    """Raises UserError unless networks can be given the same tiles: input and output sizes, channels, classes, padding.

    Args:
        models: list of FusedUNet.
        names: what to call each of them in an error.
    """
    first = _geometry(models[0])
    if None in models[0].input_shape[1:3]:
        raise UserError("expected a model of a fixed input size, got a variable one; use with_input_size")
    for model, name in zip(models, names, strict=True):
        for what, ours in _geometry(model).items():
            if ours != first[what]:
                raise UserError(
                    f"{name}: expected a network with {what} {first[what]} like that of {names[0]}, got {ours}; "
                    "predict with each of them alone"
                )


def _geometry(model):
    (_, *inner, channels), (_, *outer, classes) = model.input_shape, model.output_shape
    return {
        "padding": model.padding,
        "input size": "x".join(map(str, inner)),
        "output size": "x".join(map(str, outer)),
        "channels": channels,
        "classes": classes,
    }


def smallest_output(model):
    """Pixels a side of output that a network's tiles need to be put together; see the module."""
    return 2**model.depth + _lead(model)


def _lead(model):
    """How many pixels of a tile's output, from its first on, are not those of one pass over the whole image."""
    return 2**model.depth - 1 if model.padding == "valid" and model.upsampling == "transpose3x3" else 0


class _Axis:
    """Where tiles begin along an axis, and how much each of their pixels counts.

    Attributes:
        starts: first pixel of each tile's output; together the outputs cover [0, size).
    """

    def __init__(self, models, size, out, overlap):
        if overlap is not None and not 0 <= overlap < 1:
            raise UserError(f"expected overlap in [0, 1), got {overlap}; give such a share")
        self._valid = models[0].padding == "valid"
        multiple, lead = max(2**m.depth for m in models), max(map(_lead, models))
        if size > out and out - lead < multiple:
            raise UserError(
                f"expected tiles of an output of at least {multiple + lead} pixels, got {out}; use larger tiles"
            )
        share = 0.0 if self._valid else 0.5 if overlap is None else overlap
        step = max(int((out - lead) * (1 - share)) // multiple, 1) * multiple
        count = max(0, -(-(size - out) // step)) + 1
        # Padded tiles hang over on both sides alike. Unpadded ones begin where the one over the whole image would.
        first = 0 if self._valid else -(((count - 1) * step + out - size) // 2 // multiple * multiple)
        self.starts = [first + i * step for i in range(count)]
        self._out, self._step = out, step

    def weight(self, i, flip):
        """float32 [out] of tile number `i`, not flipped (1) or flipped (-1)."""
        if not self._valid:
            return _gaussian(self._out)
        # One tile counts at each pixel: where two do, the one that does not begin there.
        weight = np.ones(self._out, np.float32)
        if flip == 1 and i > 0:
            weight[: self._out - self._step] = 0
        elif flip == -1 and i < len(self.starts) - 1:
            weight[self._step :] = 0
        return weight


def _gaussian(length):
    position = (np.arange(length) - (length - 1) / 2) / (_BLEND * length)
    return np.exp(-0.5 * position**2).astype(np.float32)


class _Source:
    """Tiles of a rescaled image, of which only a row of tiles is held."""

    def __init__(self, read, size, scaled, value_range):
        self._read, self._size, self._scaled, self._value_range = read, size, scaled, value_range
        self._positions = [resize_positions(s, w) for s, w in zip(size, scaled, strict=True)]
        self._held = (0, 0)  # rows of the image that are at hand
        self._rows = None
        self._band_top, self._band = None, None

    def tile(self, top, left, shape):
        """float32 [*shape, C] of the rescaled image, which goes on as if mirrored at its first and last row and column."""
        if top != self._band_top:
            self._band_top, self._band = top, self._make_band(_mirrored(top + np.arange(shape[0]), self._scaled[0]))
        return self._band[:, _mirrored(left + np.arange(shape[1]), self._scaled[1])]

    def _make_band(self, wanted):
        is_scaled = self._scaled != self._size
        rows = self._positions[0][wanted] if is_scaled else wanted
        first, last = max(int(np.floor(rows.min())), 0), min(int(np.floor(rows.max())) + is_scaled, self._size[0] - 1)
        with tf.device("CPU:0"):  # an image that needs tiles may not fit a GPU
            pixels = normalize(self._image_rows(first, last + 1), self._value_range)
            if not is_scaled:
                return pixels.numpy()[wanted - first]
            return resample(pixels[None], rows - first, self._positions[1])[0].numpy()

    def _image_rows(self, start, stop):
        """Rows of the image; those that the last call gave, too, are not read again."""
        held_start, held_stop = self._held
        if held_start <= start < held_stop <= stop:
            parts = [self._rows[start - held_start :]] + ([self._read(held_stop, stop)] if stop > held_stop else [])
            self._rows = np.concatenate(parts)
        else:
            self._rows = self._read(start, stop)
        self._held = start, stop
        return self._rows


def _mirrored(index, size):
    period = max(2 * (size - 1), 1)
    index = index % period
    return np.minimum(index, period - index) if size > 1 else np.zeros_like(index)


class _Canvas:
    """Weighted sums of the tiles' probabilities, of those rows that are not finished."""

    def __init__(self, size, classes):
        self._size, self._base = size, 0
        self._total = np.zeros((0, size[1], classes), np.float32)
        self._weights = np.zeros((0, size[1]), np.float32)

    def add(self, top, left, probabilities, weight):
        """Add probabilities [h, w, K] with weights [h, w], whose first pixel is (top, left) of the image or outside it."""
        bottom, right = (min(b + s, end) for b, s, end in zip((top, left), weight.shape, self._size, strict=True))
        missing = bottom - self._base - len(self._total)
        if missing > 0:
            self._total, self._weights = (
                np.concatenate([a, np.zeros((missing, *a.shape[1:]), np.float32)]) for a in (self._total, self._weights)
            )
        first, start = max(top, self._base), max(left, 0)
        inside = slice(first - top, bottom - top), slice(start - left, right - left)
        where = slice(first - self._base, bottom - self._base), slice(start, right)
        self._total[where] += probabilities[inside] * weight[inside][..., None]
        self._weights[where] += weight[inside]

    def take(self, stop):
        """The averages of all rows before `stop` that were not taken yet, float32 [rows, w, K]."""
        count = max(stop - self._base, 0)
        if not count:
            return self._total[:0]
        taken = self._total[:count] / self._weights[:count, :, None]
        self._total, self._weights = self._total[count:].copy(), self._weights[count:].copy()
        self._base += count
        return taken


class _Restored:
    """Resizes back rows that come one after the other."""

    def __init__(self, size, scaled):
        self._is_scaled = size != scaled
        self._height = scaled[0]
        self._rows, self._columns = (resize_positions(s, w) for s, w in zip(scaled, size, strict=True))
        self._done = 0  # rows given
        self._base, self._held = 0, None  # rescaled rows that are still needed

    def rows(self, more):
        """Yields (start, rows) of the image's own size for what can be said with `more` rescaled rows, if any."""
        if not len(more):
            return
        if not self._is_scaled:
            yield self._done, more
            self._done += len(more)
            return
        self._held = more if self._held is None else np.concatenate([self._held, more])
        stop = self._base + len(self._held)
        # A row lies between two rescaled ones, the second of which has to be there unless there is no more.
        ready = len(self._rows) if stop == self._height else int(np.searchsorted(self._rows, stop - 1))
        chunk = max(_CHUNK // (len(self._columns) * more.shape[2]), 1)
        while self._done < ready:
            positions = self._rows[self._done : min(self._done + chunk, ready)]
            first, last = max(int(np.floor(positions[0])), 0), int(np.floor(positions[-1])) + 2
            held = self._held[first - self._base : last - self._base]
            with tf.device("CPU:0"):
                yield self._done, resample(held[None], positions - first, self._columns)[0].numpy()
            self._done += len(positions)
        if ready < len(self._rows):
            needed = min(max(int(np.floor(self._rows[ready])), self._base), stop)
            self._held, self._base = self._held[needed - self._base :].copy(), needed


def _batches(total, batch_size):
    """The numbers from 0 to `total` in batches of one size, as few as there can be; the last repeats the last number."""
    count = -(-total // batch_size)
    size = -(-total // count)
    for start in range(0, count * size, size):
        yield np.minimum(np.arange(start, start + size), total - 1)
