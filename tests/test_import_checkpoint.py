"""import-checkpoint: what the other side wrote, in a process of its own, gives the other side's logits here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from unet_fast import FusedUNet, checkpoints, migration
from unet_fast.cli import main
from unet_fast.data import generate, read_png, write_png
from unet_fast.errors import UserError
from unet_fast.migration import import_checkpoint


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    script = Path(__file__).with_name("foreign_checkpoints.py")
    subprocess.run([sys.executable, script, folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("path", "logits", "kind", "skipped"),
    [
        ("tf1", "tf1", "TensorFlow 1 checkpoint", 47),  # 46 slots of Momentum and global_step
        ("tf1-prefix/model.ckpt-1.index", "tf1-prefix", "TensorFlow 1 checkpoint", 95),
        ("tf2", "tf2", "TensorFlow 2 checkpoint", 96),
        ("keras.keras", "keras", "Keras model", 0),
        ("keras.h5", "keras", "Keras model", 0),
        ("keras.weights.h5", "keras", "Keras weights file", 0),
        ("keras2.h5", "keras", "Keras weights file", 0),
    ],
)
def test_logits_are_those_of_the_source(path, logits, kind, skipped, foreign, tmp_path):
    done = import_checkpoint(foreign / path, tmp_path / "run", size=188)
    assert (done.kind, done.variables, done.skipped) == (kind, 46, skipped)
    expected = np.load(foreign / f"{logits}.npy")
    assert expected.std() > 0.05
    np.testing.assert_allclose(done.model(np.load(foreign / "image.npy")), expected, atol=1e-5)
    config, _ = checkpoints.load_config(tmp_path / "run")
    assert (config.filters, config.depth, config.padding) == (2, 4, "valid")


def test_a_checkpoint_is_named_by_its_folder_its_prefix_or_one_of_its_files(foreign):
    prefix = str(foreign / "tf1" / "model.ckpt-1")
    for suffix in ("", ".index", ".meta", ".data-00000-of-00001"):
        assert migration._checkpoint_prefix(Path(prefix + suffix)) == prefix
    assert migration._checkpoint_prefix(foreign / "tf1") == prefix


def test_a_keras_model_tells_its_geometry_and_is_compared(foreign, tmp_path, capsys):
    assert main(["import-checkpoint", str(foreign / "same.keras"), "--out", str(tmp_path / "run")]) == 0
    assert "largest difference from the file's own model" in capsys.readouterr().out
    run = checkpoints.load_run(tmp_path / "run")
    assert run.model.input_shape == (None, 64, 64, 1) and run.config.padding == "same"
    probabilities = keras.ops.softmax(run.model(np.load(foreign / "image.npy")[:, :64, :64]))
    np.testing.assert_allclose(probabilities, np.load(foreign / "same.npy"), atol=1e-5)


def test_another_network_of_the_same_shapes_is_refused(foreign, tmp_path):
    with pytest.raises(UserError, match="its variables fit the U-Net but its outputs differ by"):
        import_checkpoint(foreign / "other.keras", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_run_is_used_like_any_other(foreign, tmp_path, capsys):
    """Of two classes by default 0 and 255; here three, whose values in the masks are given."""
    images, masks = generate(2, size=(64, 64))
    for name, pages in (("images", images[..., 0]), ("masks", masks * 120)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, page in enumerate(pages):
            page[0, 0] = 240 if name == "masks" else 0
            write_png(tmp_path / "data" / name / f"{i}.png", page)
    run, data = str(tmp_path / "run"), str(tmp_path / "data")
    options = ["--size", "188", "--image-size", "64", "64", "--mask-values", "0,120,240"]
    assert main(["import-checkpoint", str(foreign / "tf1"), "--out", run, *options]) == 0
    assert "took 46 variables, left 47" in capsys.readouterr().out
    target = str(tmp_path / "out.png")
    assert main(["predict", "--run", run, "--input", f"{data}/images/0.png", "--output", target]) == 0
    assert set(np.unique(read_png(target))) <= {0, 120, 240}
    assert main(["evaluate", "--run", run, "--data", data, "--json"]) == 0
    assert main(["export", "--run", run, "--format", "savedmodel", "--output", str(tmp_path / "served")]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--run", run]) == 2
    assert "was imported and knows no data of its own; give some with --data" in capsys.readouterr().err
    assert main(["train", "--out", run, "--resume", "--data", data]) == 2
    assert "an imported model, which has no training to go on with" in capsys.readouterr().err


def test_data_tell_facts_and_folds(foreign, tmp_path, capsys):
    images, masks = generate(6, size=(48, 48))
    masks[:, 0, 0] = 2
    for name, pages in (("images", images[..., 0]), ("masks", masks)):
        (tmp_path / name).mkdir()
        for i, page in enumerate(pages):
            write_png(tmp_path / name / f"{i}.png", page)
    run = str(tmp_path / "run")
    arguments = ["--data", str(tmp_path), "--fold", "1", "--size", "188"]
    assert main(["import-checkpoint", str(foreign / "tf2"), "--out", run, *arguments]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--run", run, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["fold"], scores["samples"]) == (1, 2)
    assert checkpoints.load_run(run).facts.image_shape == (48, 48, 1)


def changed(foreign, target, change):
    """A TensorFlow 1 checkpoint whose variables, a dict, were changed."""
    reader = tf.train.load_checkpoint(str(foreign / "tf1"))
    variables = change({name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})
    tf.raw_ops.SaveV2(
        prefix=str(target),
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=list(variables.values()),
    )
    return target


def without(*names):
    return lambda variables: {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("conv2d_18/bias", "conv2d_transpose_1/kernel"),
            "2 are missing: conv2d_18/bias, conv2d_transpose_1/kernel; none is unexpected",
        ),
        (
            lambda variables: {**variables, "batch_normalization/gamma": np.ones(2)},
            "none is missing; 1 are unexpected: batch_normalization/gamma",
        ),
        (
            lambda _: {"resnet/conv1/weights": np.ones(2)},
            "46 are missing: conv2d/kernel, .* and 34 more; 1 are unexpected",
        ),
        (
            lambda variables: {**variables, "conv2d_3/kernel": np.ones((3, 3, 4, 5), np.float32)},
            r"conv2d_3/kernel is \[3, 3, 4, 5\] where \[3, 3, 4, 4\] fits",
        ),
    ],
    ids=["partial", "more", "unknown", "shape"],
)
def test_variables_that_do_not_fit_are_named(change, message, foreign, tmp_path):
    path = changed(foreign, tmp_path / "changed", change)
    with pytest.raises(UserError, match=message):
        import_checkpoint(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_missing_from_other_kinds_of_files_are_named(foreign, tmp_path):
    shutil.copy(foreign / "keras.weights.h5", tmp_path / "part.weights.h5")
    with h5py.File(tmp_path / "part.weights.h5", "a") as file:
        del file["layers/conv2d_7"]
    with pytest.raises(UserError, match=r"2 are missing: conv2d_7/0, conv2d_7/1"):
        import_checkpoint(tmp_path / "part.weights.h5", tmp_path / "run")
    x = keras.Input((32, 32, 1))
    keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.Conv2D(2, 3, name="only")(x))).save(
        tmp_path / "small.keras"
    )
    with pytest.raises(
        UserError, match=r"14 are missing: down1_conv2/kernel, .*2 are unexpected: head/bias, head/kernel"
    ):
        import_checkpoint(tmp_path / "small.keras", tmp_path / "run")
    model = tf.Module()
    model.input_block = tf.Module()
    model.input_block.conv1 = tf.Variable(1.0)
    prefix = tf.train.Checkpoint(model=model).save(str(tmp_path / "objects"))
    with pytest.raises(UserError, match=r"46 are missing: model/output_block/conv3/kernel/.ATTRIBUTES"):
        import_checkpoint(prefix, tmp_path / "run")


def test_our_own_models_are_taken_too(tmp_path):
    model = FusedUNet((44, 44, 1), filters=2, depth=1, upsampling="transpose2x2", dropout=0.25)
    model.save(tmp_path / "model.keras")
    done = import_checkpoint(tmp_path / "model.keras", tmp_path / "run")
    assert (done.model.upsampling, done.model.dropout, done.difference) == ("transpose2x2", 0.25, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: expected a TensorFlow checkpoint .* found nothing there"),
        (["nothing.keras"], "expected a Keras file, found nothing there"),
        (["{tmp}/empty"], "expected a folder with a checkpoint, found none"),
        (["{tmp}/text.h5"], "not an HDF5 file, or damaged"),
        (["{tmp}/text.keras"], "Keras cannot load it"),
        (["{tmp}/text.txt"], "not a TensorFlow checkpoint, or damaged"),
        (["{tf1}", "--mask-values", "a,b"], "whole numbers with commas between, got 'a,b'"),
        (["{tf1}", "--mask-values", "0,255"], r"expected --mask-values to be 3 ascending numbers, .* got \(0, 255\)"),
        (["{tf1}", "--image-dtype", "float32"], "expected --value-range LOW HIGH with --image-dtype float32"),
        (["{tf1}", "--value-range", "5", "1"], "LOW less than HIGH"),
        (["{tf1}", "--value-range", "0", "inf"], "--value-range .* of images that can be, got others"),
        (["{tf1}", "--image-size", "-5", "5"], "expected --image-size, .* of images that can be, got others"),
        (["{tf1}", "--data", "{tmp}/data"], r"expected images of 1 channel\(s\) and masks of 3 classes .* got 1 and 2"),
        (["{tf1}", "--size", "187"], "input size 187 does not fit"),
        (["{keras}", "--padding", "same"], "its convolutions have padding 'valid', not 'same'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, foreign, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_png(tmp_path / "data" / name / "0.png", np.arange(16, dtype=np.uint8).reshape(4, 4) // 8)
    for name in ("text.h5", "text.keras", "text.txt"):
        (tmp_path / name).write_text("no checkpoint")
    places = {"tmp": tmp_path, "tf1": foreign / "tf1", "keras": foreign / "keras.keras"}
    arguments = [argument.format(**places) for argument in arguments]
    assert main(["import-checkpoint", *arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(foreign, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        import_checkpoint(foreign / "tf1", tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
