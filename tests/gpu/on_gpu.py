"""What tests of TensorFlow on a GPU begin with: which GPUs there are, and why tests are skipped without."""

import pytest
import tensorflow as tf

from unet_fast import _library

GPUS = tf.config.list_physical_devices("GPU")
for _gpu in GPUS:
    tf.config.experimental.set_memory_growth(_gpu, True)

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="no GPU that TensorFlow sees"),
    pytest.mark.skipif(not _library.status().cuda, reason="the library was built without CUDA"),
]
