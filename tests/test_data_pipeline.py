"""Pipelines: reproducible and resumable training, ordered evaluation."""

import numpy as np
import pytest
import tensorflow as tf

from unet_fast.data import (
    Dataset,
    center_crop,
    evaluation_dataset,
    generate,
    prepare_image,
    prepare_mask,
    training_dataset,
)
from unet_fast.errors import UserError

SIZES = {"input_size": 76, "output_size": 36}


@pytest.fixture(scope="module")
def data():
    return Dataset.from_arrays(*generate(7, size=(48, 56), seed=2))


@pytest.fixture(scope="module")
def flat():
    """Sample i is i everywhere, so that a batch tells its indices."""
    images = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    return Dataset.from_arrays(images, np.zeros_like(images), num_classes=2)


def take(dataset, count):
    return list(dataset.take(count).as_numpy_iterator())


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)


def indices_of(batches):
    return np.rint((np.concatenate([x[:, 2, 2, 0] for x, _ in batches]) + 1) * 127.5).astype(int)


def train(data, indices=range(7), **options):
    return training_dataset(data, indices, **{**SIZES, "batch_size": 3, "seed": 5, **options})


def order(flat, steps, **options):
    options = {"input_size": 8, "output_size": 8, "augment": False, **options}
    return indices_of(take(train(flat, **options), steps))


def test_shapes_types_and_ranges(data):
    batches = train(data)
    x, y = batches.element_spec
    assert x == tf.TensorSpec([3, 76, 76, 1], tf.float32) and y == tf.TensorSpec([3, 36, 36], tf.uint8)
    for x, y in take(batches, 4):
        assert x.min() >= -1 and x.max() <= 1 and set(np.unique(y)) <= {0, 1}
    oblong = train(data, input_size=(60, 76), output_size=(20, 36)).element_spec
    assert oblong[0].shape == [3, 60, 76, 1] and oblong[1].shape == [3, 20, 36]


def test_training_goes_on_for_ever(data):
    assert train(data).cardinality() == tf.data.INFINITE_CARDINALITY
    assert len(take(train(data, [4]), 5)) == 5


@pytest.mark.parametrize("augment", [True, False])
def test_equal_arguments_give_equal_batches(data, augment):
    first = take(train(data, augment=augment), 6)
    tf.random.set_seed(1)
    assert_equal(first, take(train(data, augment=augment), 6))
    other = take(train(data, augment=augment, seed=6), 6)
    assert any(not np.array_equal(x, other_x) for (x, _), (other_x, _) in zip(first, other, strict=True))


@pytest.mark.parametrize("start_step", [1, 2, 7, 11])
def test_resuming_gives_the_batches_of_an_uninterrupted_run(data, start_step):
    whole = take(train(data), 14)
    assert_equal(take(train(data, start_step=start_step), 14 - start_step), whole[start_step:])


def test_the_number_of_threads_changes_nothing(data):
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    assert_equal(take(train(data).with_options(options), 8), take(train(data), 8))


def test_every_epoch_is_a_new_permutation(flat):
    got = order(flat, 14, batch_size=4).reshape(8, 7)  # 8 epochs of 7, in batches of 4 that run across them
    for epoch in got:
        assert sorted(epoch) == list(range(7))
    assert len({tuple(epoch) for epoch in got}) >= 7


def test_only_the_given_indices(flat):
    assert set(order(flat, 5, indices=np.array([6, 2]))) == {2, 6}


def test_a_sample_is_augmented_anew_each_time(data):
    (x, _), (again, _) = take(train(data, [0], batch_size=1), 2)
    assert not np.array_equal(x, again)
    (x, _), (again, _) = take(train(data, [0], batch_size=1, augment=False), 2)
    np.testing.assert_array_equal(x, again)


def test_evaluation_goes_once_in_order(data):
    indices = [5, 0, 3, 1, 6]
    batches = evaluation_dataset(data, indices, **SIZES, batch_size=2)
    assert len(batches) == 3
    got = list(batches.as_numpy_iterator())
    assert [len(x) for x, _ in got] == [2, 2, 1]
    sizes = {"input_size": (76, 76), "output_size": (36, 36)}
    for position, index in enumerate(indices):
        x, y = got[position // 2]
        image = prepare_image(data.images[index], value_range=(0, 255), **sizes)
        mask = center_crop(prepare_mask(data.masks[index], num_classes=2, **sizes), (36, 36))
        np.testing.assert_allclose(x[position % 2], image, atol=1e-6)
        np.testing.assert_array_equal(y[position % 2], mask)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_every_type_is_normalised_by_its_range(dtype):
    images = np.linspace(0, 1, 3 * 64).reshape(3, 8, 8)
    images = images.astype(dtype) if dtype == np.float32 else (images * np.iinfo(dtype).max).astype(dtype)
    masks = np.indices(images.shape)[2].astype(np.uint8) % 3
    data = Dataset.from_arrays(images, masks)
    (x, y), *_ = evaluation_dataset(data, range(3), input_size=8, output_size=8, batch_size=3)
    assert float(tf.reduce_min(x)) == -1 and float(tf.reduce_max(x)) == pytest.approx(1)
    np.testing.assert_array_equal(y, masks)
    shifted = data.with_value_range((0, 2 * data.spec.value_range[1]))
    (x, _), *_ = evaluation_dataset(shifted, range(3), input_size=8, output_size=8, batch_size=3)
    assert float(tf.reduce_max(x)) == pytest.approx(0, abs=1e-3)


def test_no_masks_is_said(data):
    without = Dataset.from_arrays(data.images)
    for make in (train, lambda data: evaluation_dataset(data, [0], **SIZES, batch_size=1)):
        with pytest.raises(UserError, match="has no masks"):
            make(without)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"indices": []}, "at least one sample index"),
        ({"indices": [0, 7]}, "from 0 to 6"),
        ({"indices": [-1]}, "from 0 to 6"),
        ({"batch_size": 0}, "batch of at least 1"),
        ({"start_step": -1}, "first step"),
        ({"output_size": 77}, "output no larger"),
        ({"output_size": (36, 80)}, "output no larger"),
        ({"input_size": 1, "output_size": 1}, "at least 2 pixels"),
    ],
)
def test_impossible_arguments(data, options, words):
    with pytest.raises(UserError, match=words):
        train(data, **options)
