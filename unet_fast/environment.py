"""What a run is computed by and on, for the record."""

import platform
from pathlib import Path

import keras
import tensorflow as tf


def environment():
    """Versions and hardware of this process.

    Returns:
        dict of texts: `python`, `tensorflow`, `keras`; `device`, the first GPU that TensorFlow sees, with their number
        where there are more, or else the processor.

    >>> from unet_fast.environment import environment
    >>> sorted(environment())
    ['device', 'keras', 'python', 'tensorflow']
    """
    gpus = tf.config.list_physical_devices("GPU")
    device = _processor()
    if gpus:
        device = tf.config.experimental.get_device_details(gpus[0]).get("device_name", gpus[0].name)
        device += f" (1 of {len(gpus)})" if len(gpus) > 1 else ""
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "device": device,
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU: {names[0] if names else platform.machine()}"
