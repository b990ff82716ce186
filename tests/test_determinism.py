"""Training twice, each time in a process of its own, gives the same bits."""

import os
import subprocess
import sys

import pytest

TRAINING = """
import hashlib, os, sys
import keras
import numpy as np
import tensorflow as tf
from unet_fast import FusedUNet, losses

jit, policy, deterministic = sys.argv[1:]
keras.utils.set_random_seed(7)
if deterministic == "True":
    tf.config.experimental.enable_op_determinism()
model = FusedUNet((32, 32, 1), filters=4, depth=2, padding="same", backend="fused", dtype=policy)
loss = losses.DiceCrossEntropy(backend="fused")
model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=jit == "True", metrics=[])
generator = np.random.default_rng(0)
images = generator.normal(size=(12, 32, 32, 1)).astype("float32")
masks = (images[..., 0] > 0).astype("int32")
history = model.fit(images, masks, batch_size=4, epochs=3, verbose=0).history["loss"]
assert len(set(history)) == 3, history
digest = hashlib.sha256()
for value in (*model.variables, *model.optimizer.variables):
    digest.update(np.asarray(value).tobytes())
digest.update(model.predict(images, verbose=0).tobytes())
print(digest.hexdigest(), history)
"""


def trained(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("jit", "policy", "deterministic"),
    [
        (False, "float32", False),
        (True, "float32", False),
        (False, "mixed_float16", False),
        (False, "float32", True),
        (True, "mixed_bfloat16", True),
    ],
)
def test_training_twice_gives_the_same_bits(jit, policy, deterministic):
    """Weights, Adam's state, losses and predictions; with TensorFlow's own switch for determinism, which refuses nothing."""
    assert trained(jit, policy, deterministic) == trained(jit, policy, deterministic)
