"""Raw batches prepared where the step runs: equal to stock TensorFlow a sample at a time, and to it in any company."""

import numpy as np
import pytest
import tensorflow as tf

from unet_fast import FusedUNet, losses
from unet_fast.data import Dataset, TrainingBatches, augmentation_draws, center_crop, pipeline, training_dataset
from unet_fast.errors import UserError

GPU = pytest.param("GPU:0", marks=pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="no GPU"))
SIZES = {"input_size": (60, 76), "output_size": (36, 44)}


def smooth(shape, channels, dtype, count=5):
    """Images `[count, *shape, channels]` of slow waves, which positions that differ by rounding hardly change."""
    y, x = np.indices(shape) / 40
    waves = np.stack(
        [np.sin(y * (1 + c) + x + n) * np.cos(x - n * y) for n in range(count) for c in range(channels)], -1
    )
    waves = np.moveaxis(waves.reshape(*shape, count, channels), 2, 0)
    return waves.astype(np.float32) if dtype == np.float32 else ((waves + 1) / 2 * np.iinfo(dtype).max).astype(dtype)


def dataset(channels=1, num_classes=2, dtype=np.uint8, images=None):
    images = smooth((48, 56), channels, dtype) if images is None else images
    y, x = np.indices((48, 56))
    masks = np.stack([((y + 2 * x + 7 * n) // 19 % num_classes) for n in range(len(images))]).astype(np.uint8)
    return Dataset.from_arrays(images, masks, num_classes=num_classes)


def batches(data, indices=range(5), **options):
    return TrainingBatches(data, indices, **{**SIZES, "batch_size": 4, "seed": 5, **options})


def stock(data, image, mask, draws):
    """A sample in stock TensorFlow: (image, mask before it becomes classes)."""
    low, high = data.spec.value_range
    method = "bilinear" if data.spec.num_classes == 2 else "nearest"
    image = (image.astype(np.float32) - low) / ((high - low) / 2) - 1
    image = tf.image.resize_with_crop_or_pad(tf.image.resize(image, SIZES["output_size"]), *SIZES["input_size"])
    mask = tf.image.resize(mask[..., None].astype(np.float32), SIZES["output_size"], method=method)
    mask = tf.cast(mask >= 0.5, tf.float32) if method == "bilinear" else mask
    mask = tf.image.resize_with_crop_or_pad(mask, *SIZES["input_size"])
    if draws is None:
        return image.numpy(), center_crop(mask.numpy()[..., 0], SIZES["output_size"])
    top, left, bottom, right, vertical, horizontal, brightness = draws
    if vertical > 0.5:
        image, mask = tf.image.flip_up_down(image), tf.image.flip_up_down(mask)
    if horizontal > 0.5:
        image, mask = tf.image.flip_left_right(image), tf.image.flip_left_right(mask)
    box = [[0.3 * top, 0.3 * left, 1 - 0.3 * bottom, 1 - 0.3 * right]]
    image = tf.image.crop_and_resize(image[None], box, [0], SIZES["input_size"])[0]
    mask = tf.image.crop_and_resize(mask[None], box, [0], SIZES["input_size"], method=method)[0]
    image = tf.clip_by_value(tf.image.adjust_brightness(image, 0.4 * brightness - 0.2), -1, 1)
    return image.numpy(), center_crop(mask.numpy()[..., 0], SIZES["output_size"])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("channels", "num_classes", "dtype", "augment"),
    [
        (1, 2, np.uint8, True),
        (3, 2, np.uint8, True),
        (1, 3, np.uint8, True),
        (3, 5, np.uint16, True),
        (1, 2, np.uint16, True),
        (1, 2, np.float32, True),
        (1, 2, np.uint8, False),
        (3, 3, np.float32, False),
    ],
)
def test_against_stock_tensorflow(jit, channels, num_classes, dtype, augment):
    data = dataset(channels, num_classes, dtype)
    made = batches(data, augment=augment)
    prepare = made.prepare if jit else made.prepare.python_function
    flips = set()
    for images, masks, draws in made.raw().take(4):
        x, y = prepare(images, masks, draws)
        assert (x.dtype, y.dtype, images.dtype) == (tf.float32, tf.uint8, dtype)
        for b, numbers in enumerate(draws.numpy()):
            image, grey = stock(data, images[b].numpy(), masks[b].numpy(), numbers if augment else None)
            flips.add(tuple(numbers[4:6] > 0.5))
            np.testing.assert_allclose(x[b], image, atol=1e-5)
            if num_classes == 2:
                clear = np.abs(grey - 0.5) > 1e-3  # elsewhere rounding decides
                np.testing.assert_array_equal(y[b].numpy()[clear], (grey >= 0.5)[clear])
            else:
                clear = y[b].numpy() == grey
            assert clear.mean() > 0.98
    assert len(flips) == 4


def test_noise_against_stock_tensorflow():
    """Where neighbours differ most, TensorFlow's positions in float32 are felt."""
    data = dataset(images=np.random.default_rng(0).integers(0, 256, (5, 48, 56, 1)).astype(np.uint8))
    made = batches(data)
    ((images, masks, draws),) = made.raw().take(1)
    x, _ = made.prepare(images, masks, draws)
    for b in range(4):
        np.testing.assert_allclose(
            x[b], stock(data, images[b].numpy(), masks[b].numpy(), draws[b].numpy())[0], atol=1e-4
        )


def test_brightness_is_clipped():
    data = dataset(images=np.full((5, 48, 56, 1), 250, np.uint8))
    made = batches(data)
    for raw in made.raw().take(5):
        x, _ = made.prepare(*raw)
        assert float(tf.reduce_max(x)) <= 1


def test_a_sample_is_the_same_in_any_batch():
    made = batches(dataset())
    ((images, masks, draws),) = made.raw().take(1)
    x, y = made.prepare(images, masks, draws)
    for company in ([2], [3, 1], [2, 2, 0, 1, 3, 0, 0]):
        other_x, other_y = made.prepare(*(tf.gather(part, company) for part in (images, masks, draws)))
        np.testing.assert_array_equal(other_x, tf.gather(x, company))
        np.testing.assert_array_equal(other_y, tf.gather(y, company))


def test_sample_k_has_the_draws_of_seed_and_k():
    for size, start in ((4, 0), (3, 2)):
        draws = np.concatenate([d for *_, d in batches(dataset(), batch_size=size).raw(start).take(3)])
        expected = [augmentation_draws((5, k)) for k in range(start * size, start * size + 3 * size)]
        np.testing.assert_array_equal(draws, expected)


@pytest.mark.parametrize("device", ["CPU:0", GPU])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("start_step", [0, 3])
def test_blocks_hold_the_batches(monkeypatch, resident, start_step, device):
    data = dataset()
    monkeypatch.setattr(pipeline, "RESIDENT_BYTES", 4 * 48 * 56 * 2 if resident else 4 * 48 * 56 * 2 - 1)
    monkeypatch.setattr(pipeline, "BLOCK_STEPS", 5)
    monkeypatch.setattr(pipeline, "_BLOCK_BYTES", 2 * 4 * 48 * 56 * 2 + 1)  # two batches
    made = batches(data, [4, 0, 1, 3])
    expected = list(made.raw(start_step).take(10))
    got = []
    for block in made.blocks(start_step, device):
        assert all(part.device.endswith(device) for part in block)
        images, masks, rows, draws = (part.numpy() for part in block)
        assert len(rows) == len(draws) == (5 if resident else 2)
        assert len(images) == (4 if resident else 8)
        got += [(images[r], masks[r], d) for r, d in zip(rows, draws, strict=True)]
        if len(got) == 10:
            break
    for ours, theirs in zip(got, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_batch_larger_than_a_block(monkeypatch):
    monkeypatch.setattr(pipeline, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(pipeline, "_BLOCK_BYTES", 1)
    _, _, rows, _ = next(iter(batches(dataset()).blocks(0, "CPU:0")))
    assert rows.shape == (1, 4)


def test_the_dataset_for_fit_is_the_same(monkeypatch):
    data = dataset()
    made = batches(data)
    ours = [made.prepare(*raw) for raw in made.raw(2).take(3)]
    theirs = training_dataset(data, range(5), **SIZES, batch_size=4, seed=5, start_step=2).take(3)
    for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)


@pytest.mark.parametrize("jit", [False, True])
def test_fit_can_prepare_in_its_step(jit):
    """The recipe of the docs gives the losses of batches prepared beforehand."""
    data, sizes = dataset(), {"input_size": 32, "output_size": 32}
    made = batches(data, **sizes)

    class Network(FusedUNet):
        def train_step(self, raw):
            return super().train_step(made.prepare(*raw))

    def fitted(make, feed):
        tf.keras.utils.set_random_seed(0)
        model = make((32, 32, 1), filters=2, depth=1, padding="same", dropout=0.0)
        model.compile("adam", losses.DiceCrossEntropy(), steps_per_execution=2, jit_compile=jit)
        return model.fit(feed, steps_per_epoch=4, epochs=2, verbose=0).history["loss"]

    plain = training_dataset(data, range(5), **sizes, batch_size=4, seed=5)
    assert fitted(Network, made.raw()) == pytest.approx(fitted(FusedUNet, plain), rel=1e-5)


def test_a_negative_step():
    for start in (lambda b: b.raw(-1), lambda b: b.blocks(-1, "CPU:0")):
        with pytest.raises(UserError, match="first step"):
            start(batches(dataset()))
