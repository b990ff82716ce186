"""export: what is written computes the run's probabilities in programs that have never heard of unet_fast."""

import json
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

from unet_fast import FusedUNet, checkpoints, export
from unet_fast.cli import main
from unet_fast.config import TrainConfig
from unet_fast.errors import UserError
from unet_fast.inference import with_input_size

rng = np.random.default_rng(0)
VALID = {"padding": "valid", "size": 44, "depth": 1, "upsampling": "transpose3x3", "precision": "float32"}
SAME = {"padding": "same", "size": 16, "depth": 2, "upsampling": "transpose2x2", "precision": "mixed_float16"}


def make_run(folder, *, channels=1, classes=3, logits=1.0, **options):
    """A run whose weights are such that probabilities spread over 0..1, on float images; logits are so many times as large."""
    config = TrainConfig(data="nowhere", filters=4, **options)
    network = {name: options[name] for name in ("depth", "padding", "upsampling")}
    shape = (config.size, config.size, channels)
    model = FusedUNet(shape, num_classes=classes, filters=4, dtype=config.precision, **network)
    for variable in model.weights:
        fan_in = np.prod(variable.shape[:-1])
        variable.assign(rng.normal(0, 1.6 / np.sqrt(fan_in) if variable.name == "kernel" else 0.3, variable.shape))
        if variable.path.startswith("logits"):
            variable.assign(logits * variable)
    folder.mkdir()
    side = 2 * model.output_shape[1]
    facts = checkpoints.DataFacts(
        "folder", classes, (10.0, 30.0), (side, side, channels), "float32", tuple(range(0, 10 * classes, 10))
    )
    checkpoints.save_config(folder, config, facts, "0")
    model.save(folder / checkpoints.MODEL)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {"valid": make_run(root / "valid", **VALID), "same": make_run(root / "same", channels=3, **SAME)}


def images(run, *shape):
    return rng.uniform(8, 32, (*shape, run.model.input_shape[3])).astype(np.float32)


def expected(run, image):
    """The run's own probabilities, by the definition of what is exported."""
    model = with_input_size(run.model, image.shape[1])
    return tf.nn.softmax(tf.cast(model((image - 10) / 10 - 1, training=False), tf.float32)).numpy()


def test_a_network_that_is_sure_of_itself_is_exported(tmp_path, monkeypatch):
    """Its logits are large, and so are their roundings."""
    monkeypatch.setattr(sys.modules[__name__], "rng", np.random.default_rng(1))
    run = make_run(tmp_path / "run", channels=3, logits=100.0, **SAME)
    done = [export.export_run(run, "savedmodel", tmp_path / name, precision=name) for name in ("float32", "bfloat16")]
    assert max(done[1].differences.values()) > 0.1  # at some pixel that cannot decide


CASES = [("valid", None), ("same", None), ("same", "float16")]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_onnx_in_onnxruntime(name, precision, runs, tmp_path):
    run = checkpoints.load_run(runs[name])
    done = export.export_run(run.path, "onnx", tmp_path / "new" / "model.onnx", precision=precision)
    session = onnxruntime.InferenceSession(str(done.path))
    (input_,), (output,) = session.get_inputs(), session.get_outputs()
    assert (input_.name, input_.type, output.name, output.type) == (
        "image",
        "tensor(float)",
        "probabilities",
        "tensor(float)",
    )
    assert input_.shape == ["batch", "height", "width", run.model.input_shape[3]] and output.shape[3] == 3
    side, step = run.model.input_shape[1], 2**run.model.depth
    half = precision == "float16" or run.model.compute_dtype == "float16"
    for shape in ((1, side, side), (3, side + step, side + step)):
        image = images(run, *shape)
        probabilities = session.run(None, {"image": image})[0]
        assert probabilities.std() > 0.1
        np.testing.assert_allclose(probabilities, expected(run, image), atol=2e-2 if half else 1e-5)
    wide = session.run(None, {"image": images(run, 1, side, side + 2 * step)})[0]
    assert wide.shape[2] - wide.shape[1] == 2 * step
    facts = json.loads(session.get_modelmeta().custom_metadata_map["unet_fast"])
    assert facts["value_range"] == [10, 30] and facts["mask_values"] == [0, 10, 20] and facts["scale"] == [0.5, 0.5]


def test_onnx_of_float16_holds_half_the_bytes(runs, tmp_path):
    sizes = []
    for precision in ("float32", "float16"):
        done = export.export_run(runs["valid"], "onnx", tmp_path / f"{precision}.onnx", precision=precision)
        sizes.append(done.path.stat().st_size)
    weights = 4 * sum(w.size for w in checkpoints.load_run(runs["valid"]).model.get_weights())
    assert sizes[0] - sizes[1] == pytest.approx(weights / 2, rel=0.05)


def run_elsewhere(code, folder):
    """Runs code in a process that sees no unet_fast unless it imports it."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


SERVE = """
import sys, numpy as np, tensorflow as tf
for name in ("valid", "same"):
    serve = tf.saved_model.load(name).signatures["serving_default"]
    for i in range(2):
        image = tf.constant(np.load(f"{name}{i}.npy"))
        np.save(f"{name}{i}-out.npy", serve(image)["probabilities"])
    try:
        serve(tf.zeros((1, 45, 47, image.shape[3])))
    except tf.errors.InvalidArgumentError as error:
        print("expects image sizes of" in str(error))
assert "unet_fast" not in sys.modules
"""


def test_savedmodel_in_a_process_without_unet_fast(runs, tmp_path):
    """With sizes and batches as the caller likes; one that does not fit is refused, not computed."""
    for name, precision in (("valid", None), ("same", "float16")):
        run = checkpoints.load_run(runs[name])
        export.export_run(run.path, "savedmodel", tmp_path / name, precision=precision)
        assert b"UnetFast" not in (tmp_path / name / "saved_model.pb").read_bytes()
        side = run.model.input_shape[1]
        for i, shape in enumerate(((1, side, side), (2, side + 8, side + 8))):
            np.save(tmp_path / f"{name}{i}.npy", images(run, *shape))
    assert run_elsewhere(SERVE, tmp_path).split() == ["True", "True"]
    for name, tolerance in (("valid", 1e-5), ("same", 2e-2)):
        run = checkpoints.load_run(runs[name])
        for i in range(2):
            image, got = (np.load(tmp_path / f"{name}{i}{part}.npy") for part in ("", "-out"))
            np.testing.assert_allclose(got, expected(run, image), atol=tolerance)
    assert json.loads((tmp_path / "same/assets.extra/unet_fast.json").read_text())["precision"] == "float16"


FUSED = """
import pathlib, sys, numpy as np, tensorflow as tf
try:
    tf.saved_model.load("model")
    print("loaded")
except RuntimeError as error:
    print("not registered" in str(error))
{load}
serve = tf.saved_model.load("model").signatures["serving_default"]
np.save("out.npy", serve(tf.constant(np.load("image.npy")))["probabilities"])
"""


@pytest.mark.parametrize("load", ["import unet_fast", "tf.load_op_library({library!r})"])
def test_savedmodel_of_fused_ops_needs_the_library_and_nothing_else(load, runs, tmp_path):
    run = checkpoints.load_run(runs["valid"])
    library = str(export.op_library())
    done = export.export_run(run.path, "savedmodel-fused", tmp_path / "model")
    assert done.facts.precision == "float32" and max(done.differences.values()) < 1e-5
    assert b"UnetFastConv2DBiasRelu" in (tmp_path / "model" / "saved_model.pb").read_bytes()
    np.save(tmp_path / "image.npy", images(run, 2, 44, 44))
    assert run_elsewhere(FUSED.format(load=load.format(library=library)), tmp_path).split() == ["True"]
    got = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(got, expected(run, np.load(tmp_path / "image.npy")), atol=1e-5)


def test_the_command_says_what_to_feed_and_what_comes_out(runs, tmp_path, capsys):
    command = ["export", "--run", str(runs["valid"]), "--format", "onnx", "--output", str(tmp_path / "model.onnx")]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "float32 [batch, height, width, 1], pixel values as in the training's float32 images (10 to 30)" in output
    assert "height and width multiples of 2, from 18 on" in output
    assert "resize images by 0.5 (height) and 0.5 (width) before" in output
    assert "8 pixels smaller on each side; the classes are 0, 10, 20" in output
    assert len(re.findall(r"largest difference from the run's model, .*: \d\.\de-0[6-9]", output)) == 2
    assert main(command) == 2
    assert "is there already and would be overwritten" in capsys.readouterr().err


def test_mistakes_leave_nothing_behind(runs, tmp_path, monkeypatch):
    def refused(message, *arguments, **options):
        with pytest.raises(UserError, match=message):
            export.export_run(runs["valid"], *arguments, **options)
        assert not list(tmp_path.iterdir())

    refused("expected a format of savedmodel, savedmodel-fused, onnx, got 'tflite'", "tflite", tmp_path / "model")
    refused(r"expected a file named \*\.onnx", "onnx", tmp_path / "model")
    refused("float32, float16 for onnx, got 'bfloat16'", "onnx", tmp_path / "model.onnx", precision="bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        refused(
            r"package onnx, which is not installed; `pip install 'unet_fast\[export\]'`", "onnx", tmp_path / "m.onnx"
        )
    with monkeypatch.context() as patch:
        patch.setattr("unet_fast.onnx_graph._LARGEST", 100)
        refused("less than 2 GiB.*--precision float16", "onnx", tmp_path / "model.onnx")
    monkeypatch.setattr(export, "_TOLERANCES", {"float32": 0.0, "float16": 0.0})
    for format, name in (("onnx", "model.onnx"), ("savedmodel", "model")):
        refused("got .* and .*; nothing was written", format, tmp_path / name, precision="float16")
