"""Choices measured on this GPU: every one of them computes the same, and a process that starts later takes them."""

import os
import shutil
import subprocess
import sys

import pytest

tf = pytest.importorskip("tensorflow")
if not tf.config.list_physical_devices("GPU"):
    pytest.skip("needs a GPU that TensorFlow sees", allow_module_level=True)

pytestmark = pytest.mark.gpu

# A network of two levels, to be measured in seconds.
SIZES = ["--size", "64", "--filters", "64", "--depth", "2", "--padding", "same"]

STEP = """
import sys, keras, numpy as np, tensorflow as tf
from unet_fast import FusedUNet, losses
file, backend, dtype = sys.argv[1:]
tf.config.experimental.enable_tensor_float_32_execution(False)
model = FusedUNet((64, 64, 1), filters=64, depth=2, padding="same", dropout=0.0, backend=backend, dtype=dtype)
random = np.random.default_rng(0)
for variable in model.trainable_variables:
    inputs = np.prod(variable.shape[:-1])
    variable.assign(random.standard_normal(variable.shape) * (2 / inputs) ** 0.5)
x = random.standard_normal((2, 64, 64, 1)).astype(np.float32)
y = random.integers(0, 2, (2, 64, 64)).astype(np.uint8)
loss = losses.DiceCrossEntropy(backend=backend)
@tf.function(jit_compile=True)
def gradients(x, y):
    with tf.GradientTape() as tape:
        value = 2**12 * loss(y, model(x, training=True))  # float16's small numbers would lose digits
    return tape.gradient(value, model.trainable_variables)
first, second = ([g.numpy() for g in gradients(x, y)] for _ in range(2))
assert backend == "stock" or all((a == b).all() for a, b in zip(first, second))
np.savez(file, *first)
"""


def run(command, cache, **variables):
    environment = {**os.environ, "UNET_FAST_CACHE": str(cache), **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A cache with this GPU's choices for the network, and what the command that measured them printed."""
    cache = tmp_path_factory.mktemp("tuned")
    return cache, run(["-m", "unet_fast", "tune", *SIZES, "--batch", "2"], cache)


def test_tune_writes_choices_that_later_processes_take(tuned, tmp_path):
    import numpy as np

    cache = tmp_path / "cache"
    gradients = {}

    def step(name, backend="fused", dtype="mixed_float16"):
        run(["-c", STEP, tmp_path / f"{name}.npz", backend, dtype], cache)
        with np.load(tmp_path / f"{name}.npz") as found:
            gradients[name] = [found[key] for key in found.files]

    def error(name):
        pairs = zip(gradients[name], gradients["exact"], strict=True)
        return np.sqrt(np.mean([(np.linalg.norm(a - b) / np.linalg.norm(b)) ** 2 for a, b in pairs]))

    step("exact", "stock", "float32")
    step("rules")
    assert 0 < error("rules") < 0.05
    measured, out = tuned
    assert "as chosen" in out
    shutil.copytree(measured, cache, dirs_exist_ok=True)
    (file,) = cache.glob("*.tsv")
    products = file.read_text().splitlines()[1:]
    assert products and all(len(line.split("\t")) == 4 for line in products)
    # Whatever was the fastest: one engine for all of them, so that what is computed is surely not what the rules give.
    for engine in ("cudnn", "wmma"):
        lines = ["\t".join((line.split("\t")[0], engine, "0", "0")) for line in products]
        file.write_text("\n".join(["unet_fast tuning 1", *lines]) + "\n")
        step(engine)
        assert any((a != b).any() for a, b in zip(gradients["rules"], gradients[engine], strict=True))
        assert error(engine) <= 2 * error("rules")


def test_a_file_that_is_damaged_or_of_another_build_is_not_taken(tuned, tmp_path):
    cache = shutil.copytree(tuned[0], tmp_path / "cache")
    (file,) = cache.glob("*.tsv")
    assert "not measured" not in run(["-m", "unet_fast", "info"], cache)
    file.write_bytes(b"unet_fast tuning 1\n\xff\tsm90\n")
    out = run(["-m", "unet_fast", "info"], cache)
    assert "not measured" in out
