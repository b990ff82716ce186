"""Batches: endless, reproducible, resumable ones for training; one pass in order for evaluation.

Training batches come raw, as they lie in the data set, beside the random numbers of their augmentation; what makes the
network's input of them is one compiled function that runs wherever the step runs. A GPU so receives uint8 or nothing at
all, and does in a fraction of a millisecond what takes a CPU core milliseconds a sample.
"""

import math

import numpy as np
import tensorflow as tf

from unet_fast.data.augment import Augmentation, augment_batch, center_crop, prepare_image, prepare_mask
from unet_fast.data.stack import Pages
from unet_fast.errors import UserError

RESIDENT_BYTES = 2**30  # training images and masks up to this size are put on the device once, for good
_BLOCK_BYTES = 2**26  # of larger ones, what goes to the device at a time
BLOCK_STEPS = 256  # that are planned at a time, at most


class TrainingBatches:
    """Endless batches of shuffled samples, raw, and the function that prepares and augments them.

    Every epoch is a new permutation of `indices`, and batches run on across epochs. Batch number `s` depends on the
    arguments and `s` alone, sample number `k` on the seed and `k` alone, whatever the number of threads, the device or
    the batch around it.

    Args:
        dataset: `Dataset` with masks.
        indices: samples to train on, integers in `[0, N)`.
        input_size, output_size: pixels of the network's input and output, an int or `(height, width)`.
        batch_size: samples a batch.
        seed: integer of the shuffling and the augmentation.
        augment: whether to augment, or an `Augmentation` that says how; shuffled in any case.
        sample_weights: N weights of the data set's samples, or None.

    Attributes:
        batch_size: as given.
        prepare: tf.function of a raw batch `(images [B, H, W, C], masks [B, H, W], draws [B, D])`; returns `(x, y)`:
            float32 `[B, *input_size, C]` in [-1, 1], and uint8 class indices `[B, *output_size]`; and with
            `sample_weights` their float32 `[B]` as a third. Compiled by XLA, as an own program or as part of the one
            that calls it.

    Raises:
        UserError: the data set has no masks; no or impossible indices; an output larger than the input; a batch below
            1.

    Example, preparing within the step that Keras' `fit` compiles:

    >>> from unet_fast import FusedUNet, losses
    >>> from unet_fast.data import Dataset, TrainingBatches, generate
    >>> data = Dataset.from_arrays(*generate(5, size=(64, 64)))
    >>> batches = TrainingBatches(data, range(4), input_size=32, output_size=32, batch_size=2, seed=0)
    >>> class Network(FusedUNet):
    ...     def train_step(self, raw):
    ...         return super().train_step(batches.prepare(*raw))
    >>> model = Network((32, 32, 1), filters=2, depth=1, padding="same")
    >>> model.compile("adam", losses.DiceCrossEntropy(), steps_per_execution=2)
    >>> len(model.fit(batches.raw(), steps_per_epoch=4, verbose=0).history["loss"])
    1
    """

    def __init__(
        self,
        dataset,
        indices,
        *,
        input_size,
        output_size,
        batch_size,
        seed,
        augment=True,
        sample_weights=None,
    ):
        self._samples = samples = _Samples(dataset, indices, input_size, output_size, batch_size)
        self.batch_size, self._seed = batch_size, seed
        self._augmentation = augmentation = Augmentation(basic=augment) if isinstance(augment, bool) else augment
        self._weights = None if sample_weights is None else np.asarray(sample_weights, np.float32)[samples.indices]

        @tf.function(jit_compile=True, autograph=False)
        def prepare(images, masks, draws):
            images, masks = samples.image(images), samples.mask(masks)
            if augmentation == Augmentation(basic=False):
                masks = center_crop(masks, samples.output_size)
            else:
                options = {"num_classes": dataset.spec.num_labels, "output_size": samples.output_size}
                images, masks = augment_batch(images, masks, draws, augmentation=augmentation, **options)
            return (images, masks) if self._weights is None else (images, masks, draws[:, augmentation.num_draws])

        self.prepare = prepare

    def raw(self, start_step=0):
        """The batches from number `start_step` on.

        Returns:
            tf.data.Dataset of `(images, masks, draws)`: images `[B, H, W, C]` and uint8 masks `[B, H, W]` as in the data
            set, and float32 `[B, D]`, the random numbers of their augmentation, 7 by default, and last their weights,
            if there are any.

        Raises:
            UserError: a negative step.
        """
        stream = self._plan(start_step).batch(self.batch_size, drop_remainder=True)
        stream = stream.map(self._load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return _finish(_endless(stream))

    def blocks(self, start_step, device, part=(0, 1)):
        """The batches from number `start_step` on for a loop that runs many steps at a time, in blocks of equal size.

        A training set of up to `RESIDENT_BYTES` is put on the device, and a block is a plan of steps. Of a larger one a
        block holds the samples of a few steps, and the next blocks are on their way while one is used.

        Args:
            start_step: number of the first batch, at least 0.
            device: such as "GPU:0" or "CPU:0", where the blocks shall be.
            part: `(r, R)` for the r-th of R equal parts of each batch, from 0; R divides the batch.

        Yields:
            `(images [M, H, W, C], masks [M, H, W], rows [S, B / R], draws [S, B / R, D])`: a block of S steps. Step `i`
            takes the samples `rows[i]`, int64, of `images` and `masks`, and `draws[i]`.

        Raises:
            UserError: a negative step.
        """
        samples, size = self._samples, self.batch_size // part[1]
        dataset = samples.dataset
        sample_bytes = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in (dataset.images, dataset.masks))
        if sample_bytes * len(samples.indices) <= RESIDENT_BYTES:
            with tf.device(device):
                resident = [tf.constant(a[samples.indices]) for a in (dataset.images, dataset.masks)]
            stream = self._plan(start_step, part).batch(size, drop_remainder=True)
            stream = stream.batch(BLOCK_STEPS, drop_remainder=True)
            return ((*resident, *block) for block in _on_device(stream, device))
        steps = min(max(_BLOCK_BYTES // (sample_bytes * size), 1), BLOCK_STEPS)
        rows = tf.reshape(tf.range(steps * size, dtype=tf.int64), (steps, size))

        def load(position, draws):
            images, masks, draws = self._load(position, draws)
            return images, masks, rows, tf.reshape(draws, (steps, size, -1))

        stream = self._plan(start_step, part).batch(steps * size, drop_remainder=True)
        return iter(_on_device(stream.map(load, num_parallel_calls=2, deterministic=True), device))

    def _plan(self, start_step, part=(0, 1)):
        """Endless samples from batch number `start_step` on: `(position in the indices, random numbers [D])`.

        Of a part of each batch, the samples of the others are passed over before any numbers are drawn for them.
        """
        if start_step < 0:
            raise UserError(f"expected a first step of at least 0, got {start_step}")
        seed, count = self._seed, len(self._samples.indices)
        epoch, position = divmod(start_step * self.batch_size, count)

        def permutation(epoch):
            # Samples use the seeds (seed, k) with k at least 0, epochs those below.
            order = tf.random.experimental.stateless_shuffle(tf.range(count, dtype=tf.int64), seed=[seed, -1 - epoch])
            return tf.data.Dataset.from_tensor_slices(order)

        def draw(k, position):
            draws = self._augmentation.draws(tf.stack([tf.constant(seed, tf.int64), k]))
            if self._weights is not None:
                draws = tf.concat([draws, tf.gather(self._weights, [position])], 0)
            return position, draws

        stream = tf.data.Dataset.range(epoch, tf.int64.max).flat_map(permutation).skip(position)
        stream = stream.enumerate(start=start_step * self.batch_size)
        number, parts = part
        if parts > 1:
            stream = stream.batch(self.batch_size // parts, drop_remainder=True).shard(parts, number).unbatch()
        return stream.map(draw, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def _load(self, positions, draws):
        return *self._samples.load(tf.gather(self._samples.indices, positions)), draws


def training_dataset(dataset, indices, *, input_size, output_size, batch_size, seed, augment=True, start_step=0):
    """Endless batches of shuffled samples, prepared and augmented on the CPU, such as `Model.fit` takes them.

    `start_step=s` resumes with the very batches that an uninterrupted run would have seen. `TrainingBatches` has the
    same batches with the work left to the device.

    Args:
        dataset, indices, input_size, output_size, batch_size, seed, augment: as `TrainingBatches`.
        start_step: number of the first batch.

    Returns:
        tf.data.Dataset of `(x, y)`: float32 images `[B, *input_size, C]` in [-1, 1], and uint8 class indices
        `[B, *output_size]`.

    Raises:
        UserError: as `TrainingBatches`, or a negative step.

    Example:

    >>> from unet_fast.data import Dataset, generate, training_dataset
    >>> data = Dataset.from_arrays(*generate(5, size=(128, 128)))
    >>> batches = training_dataset(data, range(4), input_size=572, output_size=388, batch_size=8, seed=0)
    >>> batches.element_spec[1].shape
    TensorShape([8, 388, 388])
    """
    batches = TrainingBatches(
        dataset,
        indices,
        input_size=input_size,
        output_size=output_size,
        batch_size=batch_size,
        seed=seed,
        augment=augment,
    )
    prepared = batches.raw(start_step).map(batches.prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return prepared.prefetch(tf.data.AUTOTUNE)


def evaluation_dataset(dataset, indices, *, input_size, output_size, batch_size):
    """One pass over `indices` in their order, not augmented; the last batch may be short.

    Args, errors: as `TrainingBatches`.

    Returns:
        tf.data.Dataset of `(x, y)`, as `training_dataset`'s, of known length.

    Example:

    >>> from unet_fast.data import Dataset, evaluation_dataset, generate
    >>> data = Dataset.from_arrays(*generate(5, size=(128, 128)))
    >>> len(evaluation_dataset(data, range(5), input_size=572, output_size=388, batch_size=4))
    2
    """
    samples = _Samples(dataset, indices, input_size, output_size, batch_size)

    def load(index):
        image, mask = samples.load(index)
        return samples.image(image), center_crop(samples.mask(mask), samples.output_size)

    stream = tf.data.Dataset.from_tensor_slices(samples.indices)
    stream = stream.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return _finish(stream.batch(batch_size))


class _Samples:
    """Checked arguments, `load`, which gives samples as tensors, and what prepares them."""

    def __init__(self, dataset, indices, input_size, output_size, batch_size):
        if dataset.masks is None:
            raise UserError("the data set has no masks, but training and evaluation need them; add a folder masks/")
        self.indices = np.asarray(indices, np.int64)
        count = len(dataset.images)
        if self.indices.ndim != 1 or not self.indices.size or self.indices.min() < 0 or self.indices.max() >= count:
            raise UserError(f"expected at least one sample index, each from 0 to {count - 1}, got {list(indices)}")
        if batch_size < 1:
            raise UserError(f"expected a batch of at least 1 sample, got {batch_size}")
        self.input_size, self.output_size = _pair(input_size), _pair(output_size)
        too_large = any(o > i for o, i in zip(self.output_size, self.input_size, strict=True))
        if min(self.input_size) < 2 or min(self.output_size) < 1 or too_large:
            raise UserError(
                "expected an input of at least 2 pixels a side and an output no larger, got "
                f"{input_size} and {output_size}"
            )
        self.dataset = dataset
        if isinstance(dataset.images, Pages):
            self.load = self._read
        else:
            with tf.device("CPU:0"):  # else they would go to the GPU, and every batch back
                images, masks = tf.constant(dataset.images), tf.constant(dataset.masks)
            self.load = lambda index: (tf.gather(images, index), tf.gather(masks, index))

    def _read(self, index):
        """Images and masks of an index, or of several, from their files."""
        arrays = self.dataset.images, self.dataset.masks
        loaded = tf.numpy_function(
            lambda index: tuple(a[index] for a in arrays),
            [index],
            [tf.as_dtype(a.dtype) for a in arrays],
            stateful=False,
        )
        for tensor, array in zip(loaded, arrays, strict=True):
            tensor.set_shape([*index.shape, *array.shape[1:]])
        return tuple(loaded)

    def image(self, images):
        """`prepare_image` for these sizes."""
        return prepare_image(
            images,
            value_range=self.dataset.spec.value_range,
            input_size=self.input_size,
            output_size=self.output_size,
        )

    def mask(self, masks):
        """`prepare_mask` for these sizes."""
        return prepare_mask(
            masks,
            num_classes=self.dataset.spec.num_labels,
            input_size=self.input_size,
            output_size=self.output_size,
        )


def _pair(size):
    return (int(size), int(size)) if np.ndim(size) == 0 else tuple(map(int, size))


def _endless(stream):
    return stream.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))


def _finish(stream):
    options = tf.data.Options()
    # Data is memory, not files: several workers take shares of the same stream.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return stream.with_options(options).prefetch(tf.data.AUTOTUNE)


def _on_device(stream, device):
    """The stream's elements on a device, the next ones copied while one is used."""
    options = tf.data.Options()
    # An iterator that tunes itself has a thread, for whose end its own sometimes waits a minute.
    options.autotune.enabled = False
    stream = stream.with_options(options)
    if "CPU" in device:
        return stream.prefetch(1)
    return stream.apply(tf.data.experimental.prefetch_to_device(device, buffer_size=2))
