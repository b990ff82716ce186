"""Prediction: tiles put together as if there were none, training's preprocessing, and files in and out."""

import numpy as np
import pytest
import tensorflow as tf
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_fast import checkpoints, inference
from unet_fast.config import TrainConfig
from unet_fast.data import evaluation_dataset, read_png, read_tiff, write_png, write_tiff
from unet_fast.data.dataset import Dataset
from unet_fast.errors import UserError
from unet_fast.inference import predict_image, with_input_size
from unet_fast.models import FusedUNet

rng = np.random.default_rng(0)


class Identity:
    """Stands for a network: the logit of class 1 is the pixel itself, in the middle of the tile as far as there is output."""

    def __init__(self, tile, margin, depth, padding):
        self.input_shape = (None, *tile, 1)
        self.output_shape = (None, *(side - 2 * margin for side in tile), 2)
        self.padding, self.depth, self.margin = padding, depth, margin
        self.batches = []

    def predict_on_batch(self, x):
        self.batches.append(x)
        m = self.margin
        x = x[:, m : x.shape[1] - m, m : x.shape[2] - m, 0]
        return np.stack([np.zeros_like(x), x], -1)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    tile=st.tuples(st.integers(12, 40), st.integers(12, 40)),
    margin=st.integers(0, 5),
    depth=st.integers(1, 4),
    overlap=st.sampled_from([None, 0.0, 0.3, 0.5, 0.9]),
    tta=st.booleans(),
    batch_size=st.integers(1, 5),
)
def test_tiles_cover_every_pixel_at_its_place(size, tile, margin, depth, overlap, tta, batch_size):
    model = Identity(tile, margin, depth, "valid" if margin else "same")
    image = rng.normal(size=size).astype(np.float32)
    progress = []
    probabilities = predict_image(
        model,
        image,
        value_range=(-1, 1),
        overlap=overlap,
        tta=tta,
        batch_size=batch_size,
        on_progress=lambda *done: progress.append(done),
    )
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities[..., 1], 1 / (1 + np.exp(-image)), atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    assert len({len(batch) for batch in model.batches}) == 1, "batches of several sizes are traced several times"
    assert len(model.batches[0]) <= batch_size
    assert progress[-1][0] == progress[-1][1] and len(progress) == len(model.batches)


def test_beyond_the_image_it_is_mirrored():
    model = Identity((24, 24), 8, 1, "valid")
    image = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    predict_image(model, image, value_range=(-1, 1))
    np.testing.assert_allclose(model.batches[0][0, ..., 0], np.pad(image, 8, mode="reflect"), atol=1e-5)


@pytest.mark.parametrize("upsampling", ["transpose2x2", "transpose3x3"])
def test_valid_tiles_are_one_pass(upsampling):
    large = FusedUNet((140, 140, 1), filters=4, depth=2, upsampling=upsampling)
    small = with_input_size(large, 72)
    image = rng.integers(0, 256, large.output_shape[1:3]).astype(np.uint8)
    whole, tiled = (predict_image(model, image, value_range=(0, 255)) for model in (large, small))
    different = np.abs(whole - tiled).max(-1) > 1e-5
    if upsampling == "transpose2x2":
        assert not different.any()
    else:
        # Felt three pixels deep where a tile begins: the large one at 0, the small ones at -12, 20, 52 and 84.
        rows = np.array([row < 3 or (row + 12) % 32 < 3 for row in range(100)])
        assert different.any() and not different[~rows][:, ~rows].any()


def test_preprocessing_is_that_of_training():
    """An image of the training's size: rescaled, normalised and padded as the network saw it there."""
    images = rng.integers(0, 65536, (1, 64, 80, 1)).astype(np.uint16)
    dataset = Dataset.from_arrays(images, (images[..., 0] > 30000).astype(np.uint8))
    model = FusedUNet((32, 32, 1), filters=4, depth=2, padding="same")
    ((x, _),) = evaluation_dataset(dataset, [0], input_size=32, output_size=32, batch_size=1)
    expected = tf.image.resize(tf.nn.softmax(model(x)), (64, 80))[0]
    actual = predict_image(model, images[0], value_range=dataset.spec.value_range, scale=(32 / 64, 32 / 80))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_scale_is_a_factor_not_a_size():
    """An image of twice the size is twice as many pixels to the network."""
    model = Identity((32, 32), 0, 2, "same")
    y, x = np.mgrid[:128, :64]
    image = np.cos(y / 9).astype(np.float32) * np.cos(x / 9)
    probabilities = predict_image(model, image, value_range=(-1, 1), scale=(0.5, 0.5))
    assert probabilities.shape == (128, 64, 2)
    np.testing.assert_allclose(probabilities[2:-2, 2:-2, 1], (1 / (1 + np.exp(-image)))[2:-2, 2:-2], atol=0.01)


def test_tta_averages_flips():
    model = FusedUNet((16, 16, 1), filters=4, depth=1, padding="same")
    image = rng.integers(0, 256, (16, 16)).astype(np.uint8)
    flips = [(slice(None, None, a), slice(None, None, b)) for a in (1, -1) for b in (1, -1)]
    each = [predict_image(model, image[flip], value_range=(0, 255))[flip] for flip in flips]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    np.testing.assert_allclose(predict_image(model, image, value_range=(0, 255), tta=True), np.mean(each, 0), atol=1e-6)


def test_mixed_precision_sums_to_one():
    model = FusedUNet((16, 16, 3), num_classes=4, filters=4, depth=1, padding="same", dtype="mixed_bfloat16")
    probabilities = predict_image(model, rng.integers(0, 256, (20, 9, 3)).astype(np.uint8), value_range=(0, 255))
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)


def test_mistakes():
    model = FusedUNet((16, 16, 1), filters=2, depth=1, padding="same")
    image = np.zeros((16, 16), np.uint8)
    with pytest.raises(UserError, match=r"overlap in \[0, 1\), got 1"):
        predict_image(model, image, value_range=(0, 255), overlap=1)
    with pytest.raises(UserError, match=r"expected an image \[H, W, 1\], got shape \[16, 16, 3\]"):
        predict_image(model, np.zeros((16, 16, 3), np.uint8), value_range=(0, 255))
    with pytest.raises(UserError, match="fixed input size"):
        predict_image(FusedUNet((None, None, 1), filters=2, depth=1), image, value_range=(0, 255))
    with pytest.raises(UserError, match="input size 15 does not fit"):
        with_input_size(model, 15)


def a_run(classes=2, channels=1, dtype="uint8"):
    """A run as it is loaded, trained on images of 32 x 32 pixels at half their size."""
    facts = checkpoints.DataFacts("folder", classes, (0.0, 255.0), (32, 32, channels), dtype)
    model = FusedUNet((16, 16, channels), num_classes=classes, filters=4, depth=1, padding="same")
    return checkpoints.Run(None, model, TrainConfig(data="unused"), facts)


@pytest.fixture
def stack():
    return rng.integers(0, 256, (3, 40, 24)).astype(np.uint8)


@pytest.mark.parametrize(("classes", "values"), [(2, {0, 255}), (3, {0, 1, 2})])
def test_stack_of_labels(tmp_path, stack, classes, values):
    run = a_run(classes)
    write_tiff(tmp_path / "in.tif", stack)
    parts = []
    written = inference.predict_files(run, tmp_path / "in.tif", tmp_path / "out.tif", on_progress=parts.append)
    assert written == [tmp_path / "out.tif"]
    labels = read_tiff(tmp_path / "out.tif")
    assert labels.shape == stack.shape and labels.dtype == np.uint8
    assert set(np.unique(labels)) <= values
    scale = {"value_range": (0, 255), "scale": (0.5, 0.5)}
    expected = np.stack([predict_image(run.model, image, **scale).argmax(-1) for image in stack])
    np.testing.assert_array_equal(labels, expected * (255 if classes == 2 else 1))
    assert parts == sorted(parts) and parts[-1] == pytest.approx(1)


def test_stack_of_probabilities(tmp_path, stack):
    write_tiff(tmp_path / "in.tif", stack)
    inference.predict_files(a_run(3), tmp_path / "in.tif", tmp_path / "out.tif", probabilities=True)
    probabilities = tifffile.imread(tmp_path / "out.tif")  # [pages, classes, H, W], as ImageJ orders them
    assert probabilities.shape == (3, 3, 40, 24) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_folder(tmp_path, stack):
    source, target = tmp_path / "images", tmp_path / "new" / "labels"
    source.mkdir()
    write_png(source / "a.png", stack[0])
    write_png(source / "b.png", stack[1, :20])
    write_tiff(source / "c.tiff", stack)
    (source / ".hidden.png").write_text("")
    (source / "notes.txt").write_text("")
    inference.predict_files(a_run(), source, target)
    assert sorted(p.name for p in target.iterdir()) == ["a.png", "b.png", "c.tiff"]
    assert read_png(target / "b.png").shape == (20, 24)
    np.testing.assert_array_equal(read_png(target / "a.png"), read_tiff(target / "c.tiff")[0])
    with pytest.raises(UserError, match=r"a.png: is there already"):
        inference.predict_files(a_run(), source, target)
    inference.predict_files(a_run(), source, tmp_path / "probabilities", probabilities=True)
    assert sorted(p.name for p in (tmp_path / "probabilities").iterdir()) == ["a.tif", "b.tif", "c.tiff"]


def test_rgb(tmp_path):
    write_png(tmp_path / "in.png", rng.integers(0, 256, (16, 16, 3)).astype(np.uint8))
    inference.predict_files(a_run(channels=3), tmp_path / "in.png", tmp_path / "out.png", tile=32, tta=True)
    assert read_png(tmp_path / "out.png").shape == (16, 16)
    with pytest.raises(UserError, match=r"in.png: .*uint8 with 1 channel\(s\), got uint8 with 3"):
        inference.predict_files(a_run(), tmp_path / "in.png", tmp_path / "other.png")


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        ("no.tif", "out.tif", {}, "found nothing there"),
        ("in.txt", "out.txt", {}, "expected a TIFF or PNG file, got .txt"),
        ("in.tif", "out.png", {}, r"out.png: expected an output file named \*.tif"),
        ("in.png", "out.tif", {}, r"out.tif: expected an output file named \*.png"),
        ("in.png", "out.png", {"probabilities": True}, r"expected an output file named \*.tif"),
        ("in.tif", "in.tif", {}, "is there already and would be overwritten"),
        ("in.tif", "no/out.tif", {}, "its folder does not exist"),
        ("in.tif", "empty", {}, "expected an output file named"),
        ("empty", "out", {}, "expected TIFF or PNG files in the folder, found none"),
        (".", "in.tif", {}, "expected a folder to write to, found a file"),
        (".", "out", {"probabilities": True}, "two files differ only in their suffix"),
        ("in.tif", "out.tif", {"tile": 15}, "input size 15 does not fit"),
        ("deep.tif", "out.tif", {}, "uint8 with 1 channel"),
    ],
)
def test_file_mistakes(tmp_path, stack, source, target, options, message):
    write_tiff(tmp_path / "in.tif", stack)
    write_tiff(tmp_path / "deep.tif", stack.astype(np.uint16))
    write_png(tmp_path / "in.png", stack[0])
    (tmp_path / "in.txt").write_text("")
    (tmp_path / "empty").mkdir()
    before = (tmp_path / "in.tif").read_bytes()
    with pytest.raises(UserError, match=message):
        inference.predict_files(a_run(), tmp_path / source, tmp_path / target, **options)
    assert (tmp_path / "in.tif").read_bytes() == before
    assert not (tmp_path / "out.tif").exists() and not (tmp_path / "out").exists()
