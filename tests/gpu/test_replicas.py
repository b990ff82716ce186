"""Two GPUs of one process train as one of them does with the doubled batch."""

import keras
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
if len(tf.config.list_physical_devices("GPU")) < 2:
    pytest.skip("fewer than two GPUs", allow_module_level=True)

from unet_fast import FusedUNet, losses  # noqa: E402
from unet_fast.data import Dataset, TrainingBatches, generate  # noqa: E402
from unet_fast.distribution import Distribution  # noqa: E402
from unet_fast.training import AdamL2  # noqa: E402

pytestmark = pytest.mark.gpu


def trained(devices, jit, steps=30):
    """Losses of so many steps on these devices, and the weights of each replica behind them."""
    keras.utils.set_random_seed(0)
    model = FusedUNet((64, 64, 1), filters=16, depth=2, padding="same", dropout=0.0, dtype="mixed_float16")
    model.jit_compile = jit
    optimizer = keras.optimizers.LossScaleOptimizer(AdamL2(1e-3, 5e-4), initial_scale=2.0**10)
    optimizer.build(model.trainable_variables)
    data = Dataset.from_arrays(*generate(8, size=(96, 96)))
    batches = TrainingBatches(data, range(8), input_size=64, output_size=(64, 64), batch_size=4, seed=0)
    loop = Distribution(devices=devices).loop(model, optimizer, losses.DiceCrossEntropy(), batches, 0)
    found = []
    while len(found) < steps:
        found += loop.advance(steps - len(found))
    models = [replica.model for replica in loop.replicas] if len(devices) > 1 else [model]
    return np.array(found), [[np.asarray(v) for v in each.trainable_variables] for each in models]


@pytest.mark.parametrize("jit", [True, False])
def test_two_gpus_are_one_with_the_doubled_batch(jit):
    two, (first, second) = trained(["GPU:0", "GPU:1"], jit)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    one, (alone,) = trained(["GPU:0"], jit)
    assert two[-5:].mean() < 0.9 * two[:5].mean()  # it learns
    np.testing.assert_allclose(two, one, rtol=0.02)  # float16, and sums in another order, over 30 steps
    again, (repeated, _) = trained(["GPU:0", "GPU:1"], jit)
    np.testing.assert_array_equal(again, two)
    for a, b in zip(first, repeated, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(v).all() for v in alone)
