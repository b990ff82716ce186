"""`unet-fast info`: what it collects, and that its self-test finds what is broken."""

import json

import pytest
import tensorflow as tf

from unet_fast import FusedUNet, _library, choices, info, ops
from unet_fast.cli import main

OPS = {"conv2d_bias_relu", "conv2d_transpose_bias_relu", "max_pool2d", "dice_cross_entropy"}
NEEDS_LIBRARY = pytest.mark.skipif(not _library.status().available, reason="the library was not built")


@NEEDS_LIBRARY
def test_json(capsys):
    assert main(["info", "--json"]) == 0
    collected = json.loads(capsys.readouterr().out)
    assert collected["versions"]["tensorflow"] == tf.__version__
    assert collected["library"]["available"]
    assert collected["build"]["tensorflow"].split(".")[:2] == tf.__version__.split(".")[:2]
    assert len(collected["build"]["fingerprint"]) == 64 or collected["build"]["fingerprint"] == "unknown"
    assert len(collected["source"]["fingerprint"]) == 64
    same = collected["source"]["fingerprint"] == collected["build"]["fingerprint"]
    assert collected["source"]["matches_build"] is same
    assert len(collected["gpus"]) == len(tf.config.list_physical_devices("GPU"))
    assert set(collected["engines"]) == {"float32", "float16", "bfloat16"}
    tests = collected["self_test"]
    assert {(test["op"], test["dtype"]) for test in tests} == {
        (op, dtype) for op in OPS for dtype in collected["engines"]
    }
    assert collected["self_test_passed"] and all(test["passed"] for test in tests)


@NEEDS_LIBRARY
def test_table(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"TensorFlow       {tf.__version__}" in out
    assert "auto, float32    fused: " in out
    assert out.splitlines()[-1].endswith(": passed")
    assert all(op in out for op in OPS)


def broken_value(x):
    return tf.nn.max_pool2d(x, 2, 2, "VALID") * 1.05


@tf.custom_gradient
def broken_gradient(x):
    def gradient(dy):
        return tf.repeat(tf.repeat(dy, 2, 1), 2, 2) / 4  # an average pool's

    return tf.nn.max_pool2d(x, 2, 2, "VALID"), gradient


def broken_shape(x):
    return tf.nn.max_pool2d(x, 2, 2, "VALID")[:, 1:]


def raising(x):
    raise tf.errors.InternalError(None, None, "no kernel image is available\nfor this card")


@NEEDS_LIBRARY
@pytest.mark.parametrize("broken", [broken_value, broken_gradient, broken_shape, raising])
def test_the_self_test_finds_a_broken_op(monkeypatch, capsys, broken):
    monkeypatch.setattr(ops, "max_pool2d", broken)
    tests = info.self_test()
    assert {test["op"] for test in tests if not test["passed"]} == {"max_pool2d"}
    assert main(["info"]) == 1
    out = capsys.readouterr().out
    assert "max_pool2d, float32, CPU:0: " in out or "max_pool2d, float32, GPU:0: " in out
    assert out.splitlines()[-1].endswith(": FAILED")
    if broken is raising:
        assert "no kernel image is available for this card" in out


def test_a_library_that_does_not_load_is_said_and_fails(monkeypatch, capsys):
    reason = "built for TensorFlow 2.20, found 2.21.0; reinstall unet_fast"
    monkeypatch.setattr(_library, "status", lambda: _library.Status(False, reason, False))
    assert main(["info"]) == 1
    out = capsys.readouterr().out
    assert f"fused ops        not available: {reason}" in out
    assert f"auto, float32    stock: {reason}" in out


def test_a_gpu_without_kernels_for_it_is_said(monkeypatch):
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [gpu])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: {"compute_capability": (9, 0)})
    monkeypatch.setattr(_library, "status", lambda: _library.Status(True, None, False))
    collected = info.collect()
    assert collected["gpus"] == [{"name": "/physical_device:GPU:0", "compute_capability": "9.0"}]
    for engine in collected["engines"].values():
        assert engine == {"engine": "stock", "why": "this machine has a GPU and the library was built without CUDA"}


def test_required_kernels_that_are_missing(monkeypatch):
    monkeypatch.setenv("UNET_FAST_REQUIRE_KERNELS", "1")
    monkeypatch.setattr(_library, "status", lambda: _library.Status(False, "not built", False))
    engine = info.collect()["engines"]["float32"]
    assert engine["engine"] is None and "UNET_FAST_REQUIRE_KERNELS=1" in engine["why"]


needs_cuda_build = pytest.mark.skipif(not _library.status().cuda, reason="the library was built without CUDA")


@needs_cuda_build
@pytest.mark.parametrize(
    ("capability", "dtype", "engine", "detail"),
    [
        (90, "float16", "sm90", "weights in registers, 64 channels by 64"),
        (80, "bfloat16", "cudnn", "first working plan of its heuristic"),
        (75, "bfloat16", "none", "compute capability 8.0 or more is needed"),
        (90, "float32", "none", "float32 is left to stock TensorFlow"),
    ],
)
def test_choices_name_the_engine_of_a_layer_and_why(capability, dtype, engine, detail):
    from unet_fast import _native

    if engine == "sm90" and "sm90" not in _native.gpu.engines:
        engine, detail = "cudnn", "first working plan of its heuristic"
    if engine == "cudnn" and "cudnn" not in _native.gpu.engines:
        engine, detail = "wmma", "the build has no cuDNN"
    rows = choices.layer_choices(FusedUNet(backend="fused"), 8, capability, dtype)
    of = {(row["layer"], row["product"]): row for row in rows}
    row = of["down1_conv2", "forward"]
    assert (row["shape"], row["engine"], row["detail"]) == ("570x570x64 > 568x568x64", engine, detail)
    assert of["down1_conv1", "forward"]["engine"] == "direct"
    assert ("down1_conv1", "input gradient") not in of
    assert ("up1_transpose", "weight gradient") in of
    assert len(rows) == 2 + 21 * 3 + 3


@needs_cuda_build
def test_what_was_measured_on_an_h200_comes_before_the_rules():
    from unet_fast import _native

    if {"sm90", "cudnn"} - set(_native.gpu.engines):
        pytest.skip("the build lacks an engine")

    def detail(batch, layer, product, capability=90, dtype="bfloat16"):
        rows = choices.layer_choices(FusedUNet(backend="fused"), batch, capability, dtype)
        return next((r["engine"], r["detail"]) for r in rows if (r["layer"], r["product"]) == (layer, product))

    assert detail(8, "down4_conv2", "weight gradient") == ("cudnn", "plan 0 of its heuristic, measured")
    assert detail(1, "up2_conv2", "weight gradient") == ("sm90", "tiles of 192 by 128, 22 parts, measured")
    assert "measured" not in detail(2, "down4_conv2", "weight gradient")[1]
    assert "measured" not in detail(8, "down4_conv2", "weight gradient", capability=100)[1]


@needs_cuda_build
def test_an_empty_batch_has_a_plan_whatever_was_forced():
    from unet_fast import _native

    problem, tuning = _native.gpu.Conv2DProblem(), _native.gpu.Conv2DTuning()
    problem.dtype, problem.batch, problem.height, problem.width = "float16", 0, 8, 8
    problem.channels = problem.filters = 64
    problem.kernel_size = 3
    tuning.splits = 4
    assert _native.gpu.conv2d_bias_relu_grad_workspace_bytes(problem, tuning) >= 0


@needs_cuda_build
def test_results_beyond_what_offsets_reach_go_to_another_engine():
    from unet_fast import _native

    if "sm90" not in _native.gpu.engines:
        pytest.skip("the build lacks the engine")
    for batch, engine in ((1000, "sm90"), (5000, "wmma")):  # 2^35 elements of a result lie between them
        rows = choices.layer_choices(FusedUNet(backend="fused"), batch, 90, "float16")
        assert {r["engine"] for r in rows if (r["layer"], r["product"]) == ("down1_conv2", "forward")} == {engine}


@needs_cuda_build
def test_info_shows_the_layers(capsys):
    assert main(["info", "--layers", "--batch", "2"]) == 0
    assert "batch 2" in capsys.readouterr().out
    assert info.collect(layers_batch=1)["layers"]["rows"]


def test_info_wants_a_batch():
    assert main(["info", "--layers", "--batch", "0"]) == 2
