"""What the options of training do: schedules, accumulation, moving averages, clipping, weights, pixels to ignore, logs."""

import csv

import keras
import numpy as np
import pytest
import rich.console
import tensorflow as tf

from unet_fast import checkpoints, evaluation, training
from unet_fast.cli import main
from unet_fast.config import TrainConfig
from unet_fast.data import Dataset, TrainingBatches, generate, read_png, write_png
from unet_fast.data.sample_weights import read_sample_weights
from unet_fast.distribution import Distribution
from unet_fast.errors import UserError
from unet_fast.evaluation import Evaluator, image_scores
from unet_fast.losses import DiceCrossEntropy
from unet_fast.models import FusedUNet
from unet_fast.schedules import Schedule
from unet_fast.step_loop import StepLoop

SMALL = {"filters": 2, "depth": 1, "padding": "same", "size": 32, "batch": 2, "lr": 1e-2}
QUIET = rich.console.Console(quiet=True)


@pytest.fixture(scope="module")
def data():
    return Dataset.from_arrays(*generate(5, size=(40, 40)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images/ and masks/ of ten sections whose values are 0, 200 and, in a corner, 100."""
    path = tmp_path_factory.mktemp("data")
    images, masks = generate(10, size=(40, 40))
    masks = masks * np.uint8(200)
    masks[:, :12, :20] = 100
    for name, pages in (("images", images[..., 0]), ("masks", masks)):
        (path / name).mkdir()
        for i, page in enumerate(pages):
            write_png(path / name / f"{i}.png", page)
    return path


def small_model(precision="float32", jit=False):
    keras.utils.set_random_seed(0)
    model = FusedUNet((32, 32, 1), filters=2, depth=1, padding="same", dropout=0.0, dtype=precision)
    model.jit_compile = jit
    return model


def batches_of(data, batch_size, **options):
    sizes = {"input_size": 32, "output_size": 32, "batch_size": batch_size}
    return TrainingBatches(data, range(4), seed=1, augment=False, **sizes, **options)


def trained(data, steps, optimizer, *, batch=4, model=None, loss=None, each=lambda: None, options=None, **loop):
    """(weights, losses) of so many steps; `each` is called after each."""
    model = model or small_model()
    optimizer.build(model.trainable_variables)
    loop = StepLoop(model, optimizer, loss or DiceCrossEntropy(), batches_of(data, batch, **(options or {})), 0, **loop)
    losses = []
    for _ in range(steps):
        losses += loop.advance(1)
        each()
    return model.get_weights(), losses


def assert_close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("jit", [False, True])
def test_accumulated_batches_are_one_large_batch(data, jit):
    # SGD, as Adam magnifies what rounding makes of gradients near 0.
    whole, losses = trained(data, 3, keras.optimizers.SGD(0.1), model=small_model(jit=jit))
    parts, part_losses = trained(data, 3, keras.optimizers.SGD(0.1), model=small_model(jit=jit), accumulate=2)
    assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(part_losses, losses, rtol=1e-5)
    assert len(set(losses)) == 3


def test_an_accumulated_step_is_left_out_as_a_whole(data):
    """Gradients that overflow in one part, or in their sum: no weight moves, and the step is not counted as an update."""
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**30)
    model = small_model("mixed_float16")
    start = model.get_weights()
    weights, _ = trained(data, 1, optimizer, model=model, accumulate=2)
    assert_close(weights, start, rtol=0)
    assert (int(optimizer.iterations), float(optimizer.dynamic_scale)) == (0, 2.0**29)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_clipping_is_of_all_gradients_together_and_after_the_loss_scale(data, precision):
    inner = training.AdamL2(1e-3, l2=0.0, global_clipnorm=0.01)
    half = precision == "mixed_float16"
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=256.0) if half else inner
    trained(data, 1, optimizer, model=small_model(precision))
    first_moments = [np.asarray(v) for v in inner.variables if v.path.endswith("momentum")]
    norm = np.sqrt(sum((m**2).sum() for m in first_moments))
    assert norm == pytest.approx((1 - inner.beta_1) * 0.01, rel=1e-4)


def test_moving_average(data):
    """Keras' own average, from the weights after the first update on, once an update."""
    optimizer = training.AdamL2(1e-2, 0.0, use_ema=True, ema_momentum=0.5)
    model, expected = small_model(), []

    def each():
        now = model.get_weights()
        expected[:] = [0.5 * a + 0.5 * b for a, b in zip(expected, now, strict=True)] if expected else now

    trained(data, 4, optimizer, model=model, each=each, accumulate=2)
    averaged = small_model()
    optimizer.finalize_variable_values(averaged.trainable_variables)
    assert_close(averaged.get_weights(), expected, rtol=1e-5, atol=1e-7)


def test_averages_are_the_weights_while_no_step_counts(data):
    inner = training.AdamL2(1e-2, 0.0, use_ema=True, ema_momentum=0.5)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**40)
    model = small_model("mixed_float16")
    start, _ = trained(data, 1, optimizer, model=model)
    averaged = FusedUNet.from_config(model.get_config())
    optimizer.finalize_variable_values(averaged.trainable_variables)
    assert_close(averaged.get_weights(), start, rtol=0)


def test_the_average_is_scored_and_kept(folder, tmp_path):
    config = TrainConfig(data=str(folder), ema=0.9, steps=3, eval_every=3, **SMALL)
    trainer = training._Trainer(config, evaluation.load_labelled(folder), tmp_path, QUIET, Distribution())
    checkpoints.save_config(tmp_path, trainer.config, checkpoints.DataFacts.of(trainer.dataset), "test")
    scores = trainer.run(np.arange(8), np.arange(8, 10), resume=False)
    kept = checkpoints.load_run(tmp_path).model.get_weights()
    assert_close(kept, [np.asarray(v) for v in trainer.optimizer._model_variables_moving_average], rtol=0)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(kept, trainer.model.get_weights(), strict=True))
    assert scores["dice"] == pytest.approx(trainer.history[-1]["val_dice"])


def test_the_rate_of_a_compiled_step(data):
    """SGD's weights move by the schedule's rate, which a factor changes between steps."""
    schedule = Schedule(0.4, warmup=2, decay_steps=6)
    model, moved, last = small_model(jit=True), [], []
    bias = model.trainable_variables[-1]

    def loss(labels, logits):
        return tf.reduce_sum(tf.reduce_mean(tf.cast(logits, tf.float32), (0, 1, 2)))  # slope 1 in each last bias

    def each():
        now = np.asarray(bias)[0]
        moved.append(last[-1] - now)
        last.append(now)
        schedule.factor.assign(0.5 if len(moved) >= 3 else 1.0)

    last.append(np.asarray(bias)[0])
    trained(data, 5, keras.optimizers.SGD(schedule), model=model, loss=loss, each=each)
    cosine = [(1 + np.cos(np.pi * done)) / 2 for done in (0, 0.25, 0.5)]
    np.testing.assert_allclose(moved, [0.2, 0.4, 0.4, 0.2 * cosine[1], 0.2 * cosine[2]], rtol=1e-4)


def test_plateau_and_patience(folder, tmp_path, monkeypatch, capsys):
    dice = iter([0.5, 0.6, 0.6, 0.4, 0.7, 0.7, 0.7, 0.7, 0.7])
    call = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda self: {**call(self), "dice": next(dice)})
    out = tmp_path / "run"
    options = {"schedule": "plateau", "plateau_patience": 2, "patience": 3, "steps": 20, "eval_every": 1, **SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "_finish", lambda *args: None)
        training.train(TrainConfig(data=str(folder), **options), out)
    rows = checkpoints.read_history(out)
    assert [row["step"] for row in rows] == list(range(1, 9)), "three evaluations after the best, of step 5"
    assert [row["lr"] for row in rows] == pytest.approx([0.01] * 4 + [0.005] * 3 + [0.0025])
    assert "stopped early at step 8: no new best Dice in 3 evaluations" in capsys.readouterr().out


def test_sample_weights(data):
    weights = np.array([0.5, 2.0, 1.0, 4.0, 9.0])
    options = {"options": {"sample_weights": weights}, "loss": DiceCrossEntropy(reduction="sum")}
    _, (weighted,) = trained(data, 1, keras.optimizers.SGD(0.1), **options)
    raw = next(iter(batches_of(data, 4).raw()))
    x, y = batches_of(data, 4).prepare(*raw)
    each = DiceCrossEntropy(reduction=None)(y, small_model()(x)).numpy()
    row_of = [next(i for i in range(4) if np.array_equal(data.images[i], image)) for image in raw[0].numpy()]
    assert sorted(row_of) == [0, 1, 2, 3]
    assert weighted == pytest.approx((weights[row_of] * each).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,weight\na,1\n", "expected the columns name and weight, got"),
        ("name,weight\nc,1\n", "no image is called 'c'; names are such as 'a'"),
        ("name,weight\na,1\na,2\n", "'a' is there twice"),
        ("name,weight\na,heavy\n", "expected a weight of at least 0 for 'a', got 'heavy'"),
        ("name,weight\na,-1\n", "got '-1'"),
        (None, "cannot read the weights"),
    ],
)
def test_files_of_weights_that_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "w.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_sample_weights(tmp_path / "w.csv", ["a", "b"])


def test_class_weights_and_pixels_to_ignore_are_the_loss_s(folder, tmp_path, monkeypatch):
    """What the first step's loss is, from the trainer's own first batch."""
    config = TrainConfig(
        data=str(folder), class_weights=[1, 5], ignore_class=100, dropout=0.0, steps=1, eval_every=1, **SMALL
    )
    monkeypatch.setattr(training._Trainer, "_finish", lambda *args: None)
    dataset = evaluation.load_labelled(folder, ignore_value=100)
    trainer = training._Trainer(config, dataset, tmp_path, QUIET, Distribution())
    weights = trainer.model.get_weights()
    trainer.run(np.arange(8), np.arange(8, 10), resume=False)
    sizes = {"input_size": 32, "output_size": 32}
    batches = TrainingBatches(dataset, range(8), **sizes, batch_size=2, seed=0)
    x, y = batches.prepare(*next(iter(batches.raw())))
    assert set(np.unique(y)) == {0, 1, 2}
    trainer.model.set_weights(weights)
    expected = DiceCrossEntropy(class_weights=[1, 5], ignore_class=2)(y, trainer.model(x))
    assert trainer.history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_run_with_pixels_to_ignore(folder, tmp_path, capsys):
    """Two classes, not three; ignored pixels count in no score, and are predicted as what they may be."""
    out = tmp_path / "run"
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["train", "--data", str(folder), "--out", str(out), "--ignore-class=100", "--steps=2", *options]) == 0
    assert "classes 0 to 1 are 0, 200 in the masks, 100 is ignored" in capsys.readouterr().out
    scores = evaluation.evaluate_run(out)
    assert len(scores["dice_per_class"]) == 2
    assert main(["predict", "--run", str(out), "--input", str(folder / "images"), "--output", str(tmp_path / "o")]) == 0
    assert set(np.unique(read_png(tmp_path / "o" / "0.png"))) <= {0, 200}

    model = checkpoints.load_run(out).model
    dataset = evaluation.load_labelled(folder, ignore_value=100)
    changed = np.where(dataset.masks == 2, 1, dataset.masks)
    wrong = Dataset.from_arrays(dataset.images, changed)
    ours, other = (
        Evaluator(model, evaluation.batches_of(model, d, range(3), 2), d.spec.ignore_index)() for d in (dataset, wrong)
    )
    assert ours["loss"] != other["loss"]
    truth = np.array([[0, 1, 2, 2], [0, 1, 2, 0]])
    for ignored in (0, 1):
        scores = image_scores(truth, np.where(truth == 2, ignored, truth), 2, ignore_class=2)
        assert scores["dice_per_class"] == scores["nsd_per_class"] == [1, 1]
        assert (scores["adapted_rand_error"], scores["voi_split"], scores["voi_merge"]) == (0, 0, 0)
    assert image_scores(truth, 1 - np.minimum(truth, 1), 2, ignore_class=2)["dice_per_class"] == [0, 0]


def test_data_with_pixels_to_ignore():
    images, masks = np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8)
    masks[0, 1], masks[0, 2] = 7, 3
    data = Dataset.from_arrays(images, masks, ignore_value=3)
    assert (data.spec.mask_values, data.spec.num_classes, data.spec.ignore_index) == ((0, 7), 2, 2)
    assert data.masks[0, :, 0].tolist() == [0, 1, 2, 0]
    with pytest.raises(
        UserError, match="expected masks with pixels to ignore, of value 9, found none; they hold 0, 3, 7"
    ):
        Dataset.from_arrays(images, masks, ignore_value=9)
    prescribed = Dataset.from_arrays(images, masks % 7, mask_values=(0, 3), ignore_value=9)
    assert prescribed.spec.num_classes == 2


def test_tensorboard(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training._Trainer, "_finish", lambda *args: None)
    config = TrainConfig(data=str(folder), tensorboard=True, steps=2, eval_every=1, **SMALL)
    training.train(config, tmp_path / "run", console=QUIET)
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    events = [tf.compat.v1.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(file))]
    curves = {}
    for event in events:
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars" or curves[value.tag]
            curves.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    with (tmp_path / "run" / "history.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for name in ("loss", "val_dice", "lr"):
        assert curves[name] == pytest.approx({int(row["step"]): float(row[name]) for row in rows}, rel=1e-6)
    assert "loss_scale" not in curves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plateau_factor": 0.1}, "with --schedule plateau alone, got constant"),
        ({"warmup": 3, "steps": 3}, "expected --warmup below the 3 --steps"),
        ({"class_weights": []}, "expected --class-weights to be a list of numbers"),
        ({"class_weights": [1, "x"]}, "expected --class-weights to be a list of numbers"),
        ({"class_weights": [0, 0]}, "not all 0"),
        ({"ema": 1.0}, "expected --ema to be between 0 and 1"),
        ({"clip_norm": 0.0}, "expected --clip-norm to be positive"),
        ({"accumulate": 0}, "expected --accumulate to be at least 1"),
        ({"rotation": 270.0}, "expected --rotation to be from 0 to 180"),
        ({"patience": 0}, "expected --patience to be at least 1"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(data="synthetic", **options)


def test_a_weight_a_class(folder, tmp_path, capsys):
    options = ["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--class-weights"]
    assert main([*options, "1,2"]) == 2
    assert "for 3 classes, whose values in the masks are 0, 100, 200, got 2; give one each" in capsys.readouterr().err
    assert main([*options, "1,x"]) == 2
    assert "argument --class-weights: invalid numbers value: '1,x'" in capsys.readouterr().err
