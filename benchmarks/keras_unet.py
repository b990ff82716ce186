"""FusedUNet, on the fused ops or as its stock Keras twin, as a system that timing.py can time."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["UNET_FAST_REQUIRE_KERNELS"] = "1"  # what would quietly run on something else fails

import keras
import tensorflow as tf
from timing import INPUTS

from unet_fast import FusedUNet, losses
from unet_fast.training import AdamL2


class System:
    """The training step or the prediction of UNet_Medical's network on the first GPU.

    Args:
        phase: "train" or "infer".
        batch: images a step.
        backend: "fused" or "stock".
        policy: Keras dtype policy.
        xla: whether XLA compiles the step.
        tf32: whether float32 products may run as TF32.
    """

    def __init__(self, phase, batch, *, backend, policy, xla, tf32=True):
        gpus = tf.config.list_physical_devices("GPU")
        if not gpus:
            raise RuntimeError("expected a GPU that TensorFlow sees, got none")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        tf.config.experimental.enable_tensor_float_32_execution(tf32)
        keras.utils.set_random_seed(0)
        model = FusedUNet(backend=backend, dtype=policy)
        model.compile(AdamL2(1e-4, 5e-4), losses.DiceCrossEntropy(backend=backend), jit_compile=xla)
        size, logits_size = model.input_shape[1], model.output_shape[1]
        images = [tf.random.normal((batch, size, size, 1), seed=i) for i in range(INPUTS)]
        if phase == "train":
            shape = (batch, logits_size, logits_size)
            self._data = [(x, tf.random.uniform(shape, 0, 2, tf.int32, seed=i)) for i, x in enumerate(images)]
            self._step = tf.function(model.train_step, jit_compile=xla)
        else:
            self._data = images
            self._step = tf.function(lambda x: model(x, training=False), jit_compile=xla)

    def step(self, i):
        self._step(self._data[i])

    def wait(self):
        tf.test.experimental.sync_devices()

    def reset_peak(self):
        tf.config.experimental.reset_memory_stats("GPU:0")

    def peak_bytes(self):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
