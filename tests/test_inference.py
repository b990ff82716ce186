"""Prediction: tiles put together as if there were none, training's preprocessing, and files in and out."""

import dataclasses
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import keras
import nibabel
import numpy as np
import pytest
import tensorflow as tf
import tifffile
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unet_fast import checkpoints, inference, tiling
from unet_fast.config import TrainConfig
from unet_fast.data import evaluation_dataset, open_stack, read_png, read_tiff, write_png, write_tiff
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
        self.padding, self.depth, self.margin, self.upsampling = padding, depth, margin, "transpose2x2"
        self.batches = []

    def for_prediction(self):
        return self

    def predict_on_batch(self, x):
        self.batches.append(x)
        m = self.margin
        x = x[:, m : x.shape[1] - m, m : x.shape[2] - m, 0]
        return np.stack([np.zeros_like(x), x], -1)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    tile=st.tuples(st.integers(16, 40), st.integers(16, 40)),
    margin=st.integers(0, 5),
    depth=st.integers(1, 4),
    overlap=st.sampled_from([None, 0.0, 0.3, 0.5, 0.9]),
    tta=st.booleans(),
    batch_size=st.integers(1, 5),
)
def test_tiles_cover_every_pixel_at_its_place(size, tile, margin, depth, overlap, tta, batch_size):
    assume(min(tile) - 2 * margin >= 2**depth)
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
@pytest.mark.parametrize(("padding", "shape"), [("valid", (100, 100)), ("valid", (63, 85)), ("valid", (1, 97))])
def test_valid_tiles_are_one_pass(upsampling, padding, shape):
    """To rounding: also where a 3x3 transposed convolution lacks a neighbour at a tile's first row and column."""
    large = FusedUNet((140, 140, 1), filters=4, depth=2, upsampling=upsampling)
    image = rng.integers(0, 256, shape).astype(np.uint8)
    whole = predict_image(large, image, value_range=(0, 255))
    for size in (60, 72, 92):
        tiled = predict_image(with_input_size(large, size), image, value_range=(0, 255))
        np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-6)


def test_valid_tiles_are_one_pass_for_flips_too():
    large = FusedUNet((140, 140, 1), filters=4, depth=2)
    image = rng.integers(0, 256, (90, 90)).astype(np.uint8)
    whole, tiled = (
        predict_image(m, image, value_range=(0, 255), tta=True, overlap=overlap)
        for m, overlap in ((large, 0), (with_input_size(large, 72), 0.3))
    )
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-6)


def test_tiles_too_small_to_be_put_together():
    small = FusedUNet((44, 44, 1), filters=2, depth=2)  # gives 4 pixels, of which 3 lack a neighbour
    image = np.zeros((9, 9), np.uint8)
    with pytest.raises(UserError, match="an output of at least 7 pixels, got 4; use larger tiles"):
        predict_image(small, image, value_range=(0, 255))
    assert predict_image(small, image[:4, :4], value_range=(0, 255)).shape == (4, 4, 2)
    grown = inference._tiled(small, None)
    assert grown.input_shape[1] == 48
    ours, theirs = (predict_image(m, image, value_range=(0, 255)) for m in (grown, with_input_size(small, 60)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (2, 3), (41, 67)])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.37, 1.6)])
def test_sizes_from_one_pixel_up(padding, shape, scale):
    model = FusedUNet((60, 60, 1) if padding == "valid" else (16, 16, 1), filters=2, depth=2, padding=padding)
    image = rng.integers(0, 256, shape).astype(np.uint8)
    probabilities = predict_image(model, image, value_range=(0, 255), scale=scale, tta=True)
    assert probabilities.shape == (*shape, 2)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.37, 0.8), (1.9, 0.61), (3.0, 3.0)])
def test_rows_come_in_order_as_if_all_were_there(scale):
    """Rescaled there and back a few rows at a time: as `tf.image.resize` does it with the whole image."""
    model = Identity((16, 24), 0, 2, "same")
    image = rng.normal(size=(61, 47)).astype(np.float32)
    scaled = [round(s * f) for s, f in zip(image.shape, scale, strict=True)]
    expected = tf.sigmoid(tf.image.resize(image[..., None], scaled))
    expected = tf.image.resize(expected, image.shape)[..., 0]
    actual = predict_image(model, image, value_range=(-1, 1), scale=scale, overlap=0)
    np.testing.assert_allclose(actual[..., 1], expected, atol=1e-5)


def test_an_ensemble_is_the_mean():
    one, other = (FusedUNet((16, 16, 1), filters=f, depth=d, padding="same") for f, d in ((4, 1), (2, 2)))
    image = rng.integers(0, 256, (16, 16)).astype(np.uint8)
    each = [predict_image(model, image, value_range=(0, 255)) for model in (one, other)]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    mean = predict_image([one, other], image, value_range=(0, 255))
    np.testing.assert_allclose(mean, np.mean(each, 0), atol=1e-6)
    with pytest.raises(UserError, match="model 1: expected a network with classes 2 like that of model 0, got 3"):
        predict_image(
            [one, FusedUNet((16, 16, 1), num_classes=3, depth=1, filters=2, padding="same")], image, value_range=(0, 1)
        )


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


@pytest.mark.parametrize(
    ("size", "upsampling", "stays"),
    [((60, 60), "transpose3x3", True), ((18, 18), "transpose2x2", True), ((18, 18), "transpose3x3", False),
     ((18, 60), "transpose3x3", False), ((60, 18), "transpose3x3", False)],
)  # fmt: skip
def test_tiles_are_those_of_training_unless_they_cannot_be_put_together(size, upsampling, stays):
    model = FusedUNet((*size, 1), filters=2, depth=1, padding="valid", upsampling=upsampling)
    tiles = inference._tiled(model, None)
    assert (tiles is model) == stays
    assert min(tiles.output_shape[1:3]) >= tiling.smallest_output(model)


def test_options_are_given_by_name(tmp_path):
    model = FusedUNet((16, 16, 1), filters=2, depth=1, padding="same")
    with pytest.raises(TypeError, match="positional"):
        predict_image(model, np.zeros((16, 16), np.uint8), (0, 255))
    with pytest.raises(TypeError, match="positional"):
        inference.predict_files([], tmp_path, tmp_path, 60)


def test_another_input_size_is_another_model_with_the_same_weights():
    model = FusedUNet((44, 60, 1), filters=2, depth=1, padding="valid")
    other = with_input_size(model, 44)
    assert other is not model and other.input_shape == (None, 44, 44, 1)
    for ours, theirs in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert with_input_size(other, 44) is other  # nothing is built again
    assert with_input_size(other, 60).input_shape == (None, 60, 60, 1)


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


def a_run(values=(0, 255), channels=1, dtype="uint8", seed=4):
    """A run as it is loaded, trained on images of 32 x 32 pixels at half their size."""
    facts = checkpoints.DataFacts("folder", len(values), (0.0, 255.0), (32, 32, channels), dtype, values)
    keras.utils.set_random_seed(seed)  # by default one where no class is the likeliest everywhere
    model = FusedUNet((16, 16, channels), num_classes=len(values), filters=4, depth=1, padding="same")
    return checkpoints.Run(Path("a run"), model, TrainConfig(data="unused"), facts)


@pytest.fixture
def stack():
    return rng.integers(0, 256, (3, 40, 24)).astype(np.uint8)


@pytest.mark.parametrize(("values", "dtype"), [((0, 255), "uint8"), ((0, 1), "uint8"), ((0, 128, 1000), "uint16")])
def test_stack_of_labels(tmp_path, stack, values, dtype):
    run = a_run(values)
    write_tiff(tmp_path / "in.tif", stack)
    parts = []
    written = inference.predict_files(run, tmp_path / "in.tif", tmp_path / "out.tif", on_progress=parts.append)
    assert written == [tmp_path / "out.tif"]
    labels = read_tiff(tmp_path / "out.tif")
    assert labels.shape == stack.shape and labels.dtype == dtype
    assert len(np.unique(labels)) > 1
    scale = {"value_range": (0, 255), "scale": (0.5, 0.5)}
    expected = np.stack([predict_image(run.model, image, **scale).argmax(-1) for image in stack])
    np.testing.assert_array_equal(labels, np.array(values)[expected])
    assert parts == sorted(parts) and parts[-1] == pytest.approx(1)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_volume(tmp_path, stack, suffix):
    """NIfTI in, NIfTI out: its slices, in its place."""
    affine = np.array([[0.0, -0.5, 0, 10], [0.25, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(stack.transpose(2, 1, 0), affine), tmp_path / f"in{suffix}")
    write_tiff(tmp_path / "in.tif", stack)
    run = a_run((0, 128, 255))
    for options in ({}, {"probabilities": True}):
        out = [tmp_path / f"{len(options)}{s}" for s in (suffix, ".tif")]
        for source, target in zip((f"in{suffix}", "in.tif"), out, strict=True):
            inference.predict_files(run, tmp_path / source, target, **options)
        volume = nibabel.load(out[0])
        assert volume.header.get_zooms()[:3] == (0.25, 0.5, 3)
        np.testing.assert_array_equal(volume.affine, affine)
        pages = tifffile.imread(out[1])  # [pages, H, W] or [pages, classes, H, W]
        expected = pages.transpose(3, 2, 0, 1) if options else pages.transpose(2, 1, 0)
        np.testing.assert_array_equal(np.asarray(volume.dataobj), expected)
        assert volume.get_data_dtype() == ("float32" if options else "uint8")


def test_resolution_is_kept(tmp_path, stack):
    resolution = {"resolution": (300, 600), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "in.tif", stack, photometric="minisblack", **resolution)
    for options in ({}, {"probabilities": True}):
        inference.predict_files(a_run(), tmp_path / "in.tif", tmp_path / f"{len(options)}.tif", **options)
        with tifffile.TiffFile(tmp_path / f"{len(options)}.tif") as file:
            assert file.pages[0].get_resolution("CENTIMETER") == (300, 600)


def test_runs_of_an_ensemble(tmp_path, stack):
    write_tiff(tmp_path / "in.tif", stack)
    runs = [a_run(), a_run(seed=2)]
    for name, which in (("a", runs[:1]), ("b", runs[1:]), ("both", runs)):
        inference.predict_files(which, tmp_path / "in.tif", tmp_path / f"{name}.tif", probabilities=True)
    a, b, both = (tifffile.imread(tmp_path / f"{name}.tif") for name in ("a", "b", "both"))
    np.testing.assert_allclose(both, (a + b) / 2, atol=1e-6)
    for changed, message in (
        (
            {"mask_values": (0, 1)},
            r"another: expected a run on data like that of a run, with mask_values \(0, 255\), got \(0, 1\)",
        ),
        ({"value_range": (0.0, 1.0)}, "with value_range"),
        (
            {"image_shape": (64, 64, 1)},
            r"another: expected a run that rescales its images like a run, by \(0\.5, 0\.5\), got \(0\.25, ",
        ),
    ):
        facts = dataclasses.replace(runs[1].facts, **changed)
        other = dataclasses.replace(runs[1], path=Path("another"), facts=facts)
        with pytest.raises(UserError, match=message):
            inference.predict_files([runs[0], other], tmp_path / "in.tif", tmp_path / "none.tif")
    assert not (tmp_path / "none.tif").exists()


class Forgetful(Identity):
    def predict_on_batch(self, x):
        self.batches.clear()
        return super().predict_on_batch(x)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_memory_is_that_of_a_row_of_tiles(tmp_path, compression):
    """What is held at a time grows neither with the image's height nor with that of its result."""
    run = dataclasses.replace(a_run(), model=Forgetful((32, 32), 0, 1, "same"))

    def peak(height):
        image = np.arange(height * 500, dtype=np.uint32).reshape(height, 500).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{height}.tif", image, compression=compression, rowsperstrip=16)
        tracemalloc.start()
        try:
            source, target = tmp_path / f"{height}.tif", tmp_path / f"{height}-out.tif"
            inference.predict_files(run, source, target, probabilities=True)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        expected = 1 / (1 + np.exp(-(image / 127.5 - 1)))
        np.testing.assert_allclose(tifffile.imread(target)[..., 1, :, :].squeeze(), expected, atol=1e-5)
        return peak

    run = dataclasses.replace(run, facts=dataclasses.replace(run.facts, image_shape=(32, 32, 1)))
    small, large = peak(150), peak(2400)
    assert large < 1.3 * small and large < 2400 * 500


@pytest.mark.slow
def test_an_image_of_20000_by_20000_pixels(tmp_path):
    """In a process of its own, on this machine's CPU: below 4 GiB of resident memory, all of TensorFlow included."""
    tifffile.imwrite(tmp_path / "in.tif", shape=(20000, 20000), dtype="uint8", photometric="minisblack")
    with (tmp_path / "in.tif").open("rb+") as file:  # some texture here and there
        file.seek(10**6)
        file.write(rng.integers(0, 256, 10**6).astype(np.uint8).tobytes())
    program = """
import json, resource, sys
from pathlib import Path
from unet_fast import FusedUNet, checkpoints, inference
from unet_fast.config import TrainConfig
facts = checkpoints.DataFacts("folder", 2, (0.0, 255.0), (640, 640, 1), "uint8", (0, 255))
model = FusedUNet((512, 512, 1), filters=2, depth=1, padding="same")
run = checkpoints.Run(Path("run"), model, TrainConfig(data="unused"), facts)
inference.predict_files(run, sys.argv[1], sys.argv[2], overlap=0)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""
    files = [str(tmp_path / name) for name in ("in.tif", "out.tif")]
    done = subprocess.run([sys.executable, "-c", program, *files], stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) < 4 * 2**30
    assert open_stack(tmp_path / "out.tif").shape == (1, 20000, 20000, 1)


def test_stack_of_probabilities(tmp_path, stack):
    write_tiff(tmp_path / "in.tif", stack)
    inference.predict_files(a_run((0, 1, 2)), tmp_path / "in.tif", tmp_path / "out.tif", probabilities=True)
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
        ("in.txt", "out.txt", {}, "expected a TIFF, PNG or NIfTI file, got .txt"),
        ("in.tif", "out.png", {}, r"out.png: expected an output file named \*.tif"),
        ("in.png", "out.tif", {}, r"out.tif: expected an output file named \*.png"),
        ("in.png", "out.png", {"probabilities": True}, r"expected an output file named \*.tif"),
        ("in.tif", "in.tif", {}, "is there already and would be overwritten"),
        ("in.tif", "no/out.tif", {}, "its folder does not exist"),
        ("in.tif", "empty", {}, "expected an output file named"),
        ("empty", "out", {}, "expected TIFF, PNG or NIfTI files in the folder, found none"),
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
