"""A whole model trained on a GPU, in a graph and under XLA."""

import keras
import numpy as np
import pytest
from on_gpu import NEEDS_GPU

from unet_fast import FusedUNet, losses

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("jit", [True, False])
def test_a_model_trains_as_its_stock_twin_does(jit):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 64, 64, 1)).astype("float32")
    masks = (images[..., 0] > 0.3).astype("int32")
    history = {}
    for backend in ("stock", "fused"):
        keras.utils.set_random_seed(1)
        model = FusedUNet(
            (64, 64, 1), filters=16, depth=2, padding="same", dropout=0.0, backend=backend, dtype="mixed_float16"
        )
        model.compile(keras.optimizers.Adam(1e-3), losses.DiceCrossEntropy(backend=backend), jit_compile=jit)
        history[backend] = model.fit(images, masks, batch_size=8, epochs=8, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(history["fused"], history["stock"], rtol=0.05)
    assert history["fused"][-1] < 0.8 * history["fused"][0]
