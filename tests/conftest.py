"""Quiet TensorFlow, and nothing of one test's global state in the next."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest


@pytest.fixture(autouse=True)
def _fresh_keras():
    yield
    keras.mixed_precision.set_dtype_policy("float32")
    keras.backend.clear_session()
