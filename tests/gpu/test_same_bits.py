"""Training on a GPU gives the same bits again, also where it was stopped in between."""

import signal

import pytest
from on_gpu import NEEDS_GPU
from test_resume import assert_same_run

from unet_fast.cli import main
from unet_fast.step_loop import StepLoop

pytestmark = NEEDS_GPU

OPTIONS = {
    "data": "synthetic",
    "filters": 16,
    "depth": 2,
    "padding": "same",
    "size": 64,
    "batch": 4,
    "steps": 12,
    "eval-every": 6,
    "precision": "mixed_float16",
    "noise": 0.1,
}


@pytest.mark.parametrize("jit", ["on", "off"])
def test_training_again_and_after_a_stop_gives_the_same_bits(jit, tmp_path, monkeypatch):
    """Weights, the optimizer's state, losses, scores and all else that a run keeps; dropout and augmentation are on."""
    options = [f"--{name}={value}" for name, value in (OPTIONS | {"jit": jit}).items()]
    for name in ("whole", "again"):
        assert main(["train", f"--out={tmp_path / name}", *options]) == 0
    assert_same_run(tmp_path / "again", tmp_path / "whole")

    advance, calls = StepLoop.advance, []

    def stopped(self, most):
        calls.append(most)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return advance(self, most)

    with monkeypatch.context() as patch:
        patch.setattr(StepLoop, "advance", stopped)
        assert main(["train", f"--out={tmp_path / 'stopped'}", *options]) == 128 + signal.SIGTERM
    assert main(["train", f"--out={tmp_path / 'stopped'}", "--resume"]) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
