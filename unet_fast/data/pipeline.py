"""`tf.data` pipelines: an endless, reproducible, resumable one for training; one pass in order for evaluation."""

import numpy as np
import tensorflow as tf

from unet_fast.data.augment import augment_sample, center_crop, prepare_image, prepare_mask
from unet_fast.errors import UserError


def training_dataset(dataset, indices, *, input_size, output_size, batch_size, seed, augment=True, start_step=0):
    """Endless batches of shuffled, augmented samples.

    Every epoch is a new permutation of `indices`, and batches run on across epochs. Batch number `s` depends on the
    arguments and `s` alone, whatever the number of threads: `start_step=s` resumes with the very batches that an
    uninterrupted run would have seen.

    Args:
        dataset: `Dataset` with masks.
        indices: samples to train on, integers in `[0, N)`.
        input_size, output_size: pixels of the network's input and output, an int or `(height, width)`.
        batch_size: samples a batch.
        seed: integer of the shuffling and the augmentation.
        augment: whether to augment; shuffled in any case.
        start_step: number of the first batch.

    Returns:
        tf.data.Dataset of `(x, y)`: float32 images `[B, *input_size, C]` in [-1, 1], and uint8 class indices
        `[B, *output_size]`.

    Raises:
        UserError: the data set has no masks; no or impossible indices; an output larger than the input; a batch below
            1; a negative step.

    Example:

    >>> from unet_fast.data import Dataset, generate, training_dataset
    >>> data = Dataset.from_arrays(*generate(5, size=(128, 128)))
    >>> batches = training_dataset(data, range(4), input_size=572, output_size=388, batch_size=8, seed=0)
    >>> batches.element_spec[1].shape
    TensorShape([8, 388, 388])
    """
    sample = _Samples(dataset, indices, input_size, output_size, batch_size)
    if start_step < 0:
        raise UserError(f"expected a first step of at least 0, got {start_step}")
    epoch, position = divmod(start_step * batch_size, len(sample.indices))

    def permutation(epoch):
        # Samples use the seeds (seed, k) with k at least 0, epochs those below.
        return tf.data.Dataset.from_tensor_slices(
            tf.random.experimental.stateless_shuffle(sample.indices, seed=[seed, -1 - epoch])
        )

    def load(k, index):
        image, mask = sample.image(index), sample.mask(index)
        if not augment:
            return image, center_crop(mask, sample.output_size)
        return augment_sample(
            image,
            mask,
            num_classes=dataset.spec.num_classes,
            output_size=sample.output_size,
            seed=tf.stack([tf.constant(seed, tf.int64), k]),
        )

    stream = tf.data.Dataset.range(epoch, tf.int64.max).flat_map(permutation).skip(position)
    stream = stream.enumerate(start=start_step * batch_size)
    stream = stream.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    stream = stream.batch(batch_size, drop_remainder=True)
    stream = stream.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return _finish(stream)


def evaluation_dataset(dataset, indices, *, input_size, output_size, batch_size):
    """One pass over `indices` in their order, not augmented; the last batch may be short.

    Args, errors: as `training_dataset`.

    Returns:
        tf.data.Dataset of `(x, y)`, as `training_dataset`'s, of known length.

    Example:

    >>> from unet_fast.data import Dataset, evaluation_dataset, generate
    >>> data = Dataset.from_arrays(*generate(5, size=(128, 128)))
    >>> len(evaluation_dataset(data, range(5), input_size=572, output_size=388, batch_size=4))
    2
    """
    sample = _Samples(dataset, indices, input_size, output_size, batch_size)

    def load(index):
        return sample.image(index), center_crop(sample.mask(index), sample.output_size)

    stream = tf.data.Dataset.from_tensor_slices(sample.indices)
    stream = stream.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return _finish(stream.batch(batch_size))


class _Samples:
    """Checked arguments, and the prepared image `[*input_size, C]` and mask `[*input_size]` of an index."""

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
        self.spec = dataset.spec
        with tf.device("CPU:0"):  # else they would go to the GPU, and every batch back
            self.images, self.masks = tf.constant(dataset.images), tf.constant(dataset.masks)

    def image(self, index):
        return prepare_image(
            tf.gather(self.images, index),
            value_range=self.spec.value_range,
            input_size=self.input_size,
            output_size=self.output_size,
        )

    def mask(self, index):
        return prepare_mask(
            tf.gather(self.masks, index),
            num_classes=self.spec.num_classes,
            input_size=self.input_size,
            output_size=self.output_size,
        )


def _pair(size):
    return (int(size), int(size)) if np.ndim(size) == 0 else tuple(map(int, size))


def _finish(stream):
    options = tf.data.Options()
    # Data is memory, not files: several workers take shares of the same stream.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return stream.with_options(options).prefetch(tf.data.AUTOTUNE)
