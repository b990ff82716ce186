"""Chunks of steps: what they compute does not depend on their ends, nor on where the data are."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from unet_fast import checkpoints, step_loop
from unet_fast.data import Dataset, TrainingBatches, generate, pipeline
from unet_fast.losses import DiceCrossEntropy
from unet_fast.models import FusedUNet
from unet_fast.step_loop import StepLoop

STEPS = 7


@pytest.fixture(scope="module")
def data():
    return Dataset.from_arrays(*generate(5, size=(40, 40)))


def start(data, jit=False, precision="float32", start_step=0):
    """(model, optimizer, loop) of a small network."""
    keras.utils.set_random_seed(0)
    model = FusedUNet((32, 32, 1), filters=2, depth=1, padding="same", dtype=precision)
    model.jit_compile = jit
    optimizer = keras.optimizers.Adam(1e-2)
    if precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**20, dynamic_growth_steps=2)
    optimizer.build(model.trainable_variables)
    batches = TrainingBatches(data, range(4), input_size=32, output_size=32, batch_size=3, seed=1)
    return model, optimizer, StepLoop(model, optimizer, DiceCrossEntropy(), batches, start_step)


def result(data, chunks, **options):
    """Losses and final state after STEPS steps in chunks of at most so many."""
    model, optimizer, loop = start(data, **options)
    losses, chunks = [], iter(chunks)
    while len(losses) < STEPS:
        losses += loop.advance(min(next(chunks), STEPS - len(losses)))
    return [np.array(losses), *(np.asarray(v) for v in (*model.variables, *optimizer.variables))]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("jit", "precision"), [(False, "float32"), (True, "float32"), (False, "mixed_float16"), (True, "mixed_float16")]
)
def test_chunks_change_nothing(data, monkeypatch, jit, precision):
    """Weights, dropout's state, Adam, the loss scale and the losses, to the bit."""
    monkeypatch.setattr(step_loop, "_CHUNK_SECONDS", 1e9)
    whole = result(data, [STEPS] * STEPS, jit=jit, precision=precision)
    single = result(data, [1] * STEPS, jit=jit, precision=precision)
    assert_equal(single, whole)
    assert_equal(result(data, [1, 2, 1, 3], jit=jit, precision=precision), whole)
    assert len(set(whole[0])) == STEPS
    monkeypatch.setattr(pipeline, "BLOCK_STEPS", 2)
    assert_equal(result(data, [STEPS] * STEPS, jit=jit, precision=precision), whole)


@pytest.mark.parametrize("jit", [False, True])
def test_large_data_stream(data, monkeypatch, jit):
    whole = result(data, [STEPS] * STEPS, jit=jit)
    monkeypatch.setattr(pipeline, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(pipeline, "_BLOCK_BYTES", 3 * 3 * 2 * 40 * 40)  # three batches
    assert_equal(result(data, [STEPS] * STEPS, jit=jit), whole)


def test_a_loop_goes_on_from_any_step(data):
    model, optimizer, loop = start(data)
    losses = []
    while len(losses) < 4:
        losses += loop.advance(4 - len(losses))
    later, later_optimizer, rest = start(data, start_step=4)
    for ours, theirs in zip(
        (*later.variables, *later_optimizer.variables), (*model.variables, *optimizer.variables), strict=True
    ):
        ours.assign(theirs)
    while len(losses) < STEPS:
        losses += rest.advance(STEPS - len(losses))
    whole = result(data, [STEPS] * STEPS)
    assert_equal([np.array(losses), *map(np.asarray, (*later.variables, *later_optimizer.variables))], whole)


@pytest.mark.parametrize("jit", [False, True])
def test_a_snapshot_keeps_what_steps_change(data, jit):
    """It shares the variables' buffers, and no step, compiled or not, writes to them."""
    model, optimizer, loop = start(data, jit=jit)
    loop.advance(1)
    snapshot = checkpoints.snapshot(model, optimizer)
    then = {name: np.array(value) for name, value in snapshot.items()}
    assert len(then) == len(model.variables) + len(optimizer.variables)
    loop.advance(3)
    for name, value in snapshot.items():
        np.testing.assert_array_equal(value, then[name], err_msg=name)
    for name, value in checkpoints.snapshot(model, optimizer).items():
        assert value.shape == () or not np.array_equal(value, then[name]), name


def test_a_step_is_traced_once(data, monkeypatch):
    traced = []
    prepare = TrainingBatches.__init__

    def counting(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        own = self.prepare
        self.prepare = lambda *raw: traced.append(1) or own(*raw)

    monkeypatch.setattr(TrainingBatches, "__init__", counting)
    monkeypatch.setattr(step_loop, "_CHUNK_SECONDS", 1e9)
    result(data, [1, 2, 1, 3])
    assert len(traced) == 1


def test_the_length_of_chunks(data, monkeypatch):
    """By a clock on which a step takes 1/16 s: chunks double up to half a second, and shrink when steps take longer."""
    now, cost = [0.0], [0.0625]
    monkeypatch.setattr(step_loop.time, "monotonic", lambda: now[0])
    *_, loop = start(data)

    def step(images, masks, rows, draws):
        now[0] += cost[0]
        return tf.zeros([])

    loop._step = step
    assert [len(loop.advance(1000)) for _ in range(6)] == [1, 2, 4, 8, 8, 8]
    assert len(loop.advance(3)) == 3
    assert len(loop.advance(1000)) == 8, "an evaluation does not shorten what follows"
    cost[0] = 0.25
    assert [len(loop.advance(1000)) for _ in range(3)] == [8, 2, 2]
    cost[0] = 9.0
    assert [len(loop.advance(1000)) for _ in range(3)] == [2, 1, 1]
