"""Training: the recipe, what a run leaves behind, stopping and going on, and what is refused."""

import csv
import fcntl
import json
import signal

import keras
import numpy as np
import pytest
from PIL import Image

from unet_fast import checkpoints, evaluation, report, step_loop, training
from unet_fast.config import TrainConfig
from unet_fast.data import Dataset, generate, pipeline, training_dataset, write_tiff
from unet_fast.distribution import Distribution
from unet_fast.errors import UserError
from unet_fast.losses import DiceCrossEntropy
from unet_fast.models import FusedUNet
from unet_fast.step_loop import StepLoop

SMALL = {"filters": 4, "depth": 2, "padding": "same", "size": 32, "batch": 2, "lr": 1e-3, "steps": 8, "eval_every": 3}
TIMES = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder of ISBI-2012's layout: ten sections of 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("data")
    images, masks = generate(10, size=(64, 64))
    write_tiff(folder / "train-volume.tif", images[..., 0])
    write_tiff(folder / "train-labels.tif", masks * 255)
    return str(folder)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """(folder, scores) of a run that was never stopped."""
    out = tmp_path_factory.mktemp("run") / "a"
    return out, training.train(TrainConfig(data=data, **SMALL), out)


def history(run):
    with (run / "history.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def state(run):
    with np.load(run / "last" / "state.npz") as arrays:
        return {name: array for name, array in arrays.items() if name != "progress"}


def stop_after(monkeypatch, steps, signum=signal.SIGINT):
    """Send this process a signal while the chunk that ends with step number `steps` of a training is under way."""
    advance, left = StepLoop.advance, [steps]

    def counting(self, most):
        losses = advance(self, min(most, left[0]))
        left[0] -= len(losses)
        if not left[0]:
            signal.raise_signal(signum)
        return losses

    monkeypatch.setattr(StepLoop, "advance", counting)


def test_adam_l2_is_adam_on_the_whole_loss():
    x, y = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)

    def fitted(optimizer, regularizer):
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(3, kernel_regularizer=regularizer, bias_regularizer=regularizer)]
        )
        model.set_weights([np.eye(3), np.ones(3)])
        model.compile(optimizer, "mse")
        model.fit(x, y, epochs=5, shuffle=False, verbose=0)
        return model.get_weights()

    ours = fitted(training.AdamL2(0.1, l2=0.3), None)
    for a, b in zip(ours, fitted(keras.optimizers.Adam(0.1), keras.regularizers.L2(0.15)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    plain = fitted(keras.optimizers.Adam(0.1), None)
    assert np.abs(ours[0] - plain[0]).max() > 0.01


def test_adam_l2_is_saved_with_a_model(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(training.AdamL2(0.01, l2=0.25), "mse")
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").optimizer.get_config()["l2"] == 0.25


def test_the_loop_is_keras_fit(data, tmp_path):
    """Four steps of the loop give the weights that compile and fit give, dropout included."""
    config = TrainConfig(data=data, **{**SMALL, "steps": 4, "eval_every": 4, "dropout": 0.5})
    training.train(config, tmp_path / "run")

    keras.utils.set_random_seed(0)
    model = FusedUNet((32, 32, 1), filters=4, depth=2, padding="same", dropout=0.5)
    dataset = evaluation.load_labelled(data)
    folds = checkpoints.read_json(tmp_path / "run" / "split.json")["folds"]
    batches = training_dataset(dataset, folds[0]["train"], input_size=32, output_size=32, batch_size=2, seed=0)
    model.compile(training.AdamL2(1e-3, 5e-4), DiceCrossEntropy())
    model.fit(batches, steps_per_epoch=4, verbose=0)
    # The best model is the only one that was evaluated.
    for a, b in zip(checkpoints.load_run(tmp_path / "run").model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("seconds", "resident", "lengths"), [(0.0, 2**30, [1] * 8), (1e9, 2**30, [1, 2, 3, 2]), (1e9, 0, [1, 2, 3, 2])]
)
def test_launches_change_nothing(trained, data, tmp_path, monkeypatch, seconds, resident, lengths):
    """Launches of any length end at evaluations; history and weights are those of single steps, resident or streamed."""
    whole, scores = trained
    advance, launches = StepLoop.advance, []

    def recorded(self, most):
        launches.append(advance(self, most))
        return launches[-1]

    monkeypatch.setattr(step_loop, "_CHUNK_SECONDS", seconds)
    monkeypatch.setattr(pipeline, "RESIDENT_BYTES", resident)
    monkeypatch.setattr(StepLoop, "advance", recorded)
    out = tmp_path / "run"
    assert training.train(TrainConfig(data=data, **SMALL), out) == scores
    assert [len(losses) for losses in launches] == lengths
    losses = np.concatenate(launches)
    for row, part in zip(history(out), (losses[:3], losses[3:6], losses[6:]), strict=True):
        assert float(row["loss"]) == pytest.approx(part.mean())
    assert history(out) == history(whole)
    for name, array in state(out).items():
        np.testing.assert_array_equal(array, state(whole)[name], err_msg=name)


def test_what_a_run_leaves_behind(trained, data):
    out, scores = trained
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    expected = (
        "model.keras config.json split.json history.csv history.json metrics.json curves.png overlays.png "
        "last/state.npz .lock"
    )
    assert files == set(expected.split())

    rows = history(out)
    assert [int(row["step"]) for row in rows] == [3, 6, 8]
    best = max(rows, key=lambda row: float(row["val_dice"]))
    assert json.loads((out / "metrics.json").read_text()) == scores
    assert scores["step"] == int(best["step"])
    assert (scores["fold"], scores["samples"]) == (0, 2)
    assert scores["dice"] == pytest.approx(float(best["val_dice"]))
    for row in rows:
        assert float(row["total_loss"]) == pytest.approx(float(row["loss"]) + float(row["l2_loss"]))
        assert float(row["val_loss"]) == pytest.approx(
            float(row["val_cross_entropy"]) + 1 - float(row["val_soft_dice"])
        )
        assert row["loss_scale"] == "" and row["skipped_steps"] == "0"

    for name in ("curves.png", "overlays.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 400 and len(picture.convert("L").getcolors()) > 50

    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in SMALL} == SMALL
    assert config["dataset"]["image_shape"] == [64, 64, 1]
    assert config["data"] == data


def test_the_model_loads_with_keras_alone_and_is_the_scored_one(trained):
    out, scores = trained
    model = keras.models.load_model(out / "model.keras")
    assert not model.compiled
    assert evaluation.evaluate_run(out) == scores


def test_l2_loss_is_of_all_variables(trained):
    out, _ = trained
    arrays = [array for name, array in state(out).items() if name.startswith("model_") and array.dtype == np.float32]
    assert len(arrays) == 2 * 13 + 0
    last = history(out)[-1]
    assert float(last["l2_loss"]) == pytest.approx(5e-4 / 2 * sum((a**2).sum() for a in arrays), rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_evaluator(precision):
    """Against the formulas in NumPy, with a last batch that is short."""
    rng = np.random.default_rng(0)
    dataset = Dataset.from_arrays(
        rng.integers(0, 256, (5, 16, 16, 1)).astype(np.uint8), rng.integers(0, 3, (5, 16, 16)).astype(np.uint8)
    )
    model = FusedUNet((16, 16, 1), num_classes=3, filters=2, depth=1, padding="same", dtype=precision)
    batches = evaluation.batches_of(model, dataset, range(5), 2)
    evaluator = evaluation.Evaluator(model, batches)
    first = evaluator()

    x, y = (np.concatenate(part) for part in zip(*batches.as_numpy_iterator(), strict=True))
    logits = model(x).numpy().astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    t = np.eye(3)[y]
    soft = (2 * (p * t).sum((1, 2)) + 1e-6) / ((p**2).sum((1, 2)) + t.sum((1, 2)) + 1e-6)
    hard = np.eye(3)[logits.argmax(-1)]
    both, either = (hard * t).sum((0, 1, 2)), np.maximum(hard, t).sum((0, 1, 2))
    assert first["samples"] == 5
    tolerance = {"rel": 1e-5 if precision == "float32" else 1e-3}
    assert first["cross_entropy"] == pytest.approx(-np.log((p * t).sum(-1)).mean(), **tolerance)
    assert first["soft_dice"] == pytest.approx(soft.mean(), **tolerance)
    assert first["dice_per_class"] == pytest.approx(2 * both / (hard + t).sum((0, 1, 2)), rel=1e-6)
    assert first["iou_per_class"] == pytest.approx(both / either, rel=1e-6)
    assert first["iou"] == pytest.approx((both / either).mean(), rel=1e-6)
    assert first["loss"] == pytest.approx(first["cross_entropy"] + 1 - first["soft_dice"])
    assert evaluator() == first, "scores of one evaluation leak into the next"


@pytest.mark.parametrize("stop", [2, 6])
def test_resume_is_exact(trained, data, tmp_path, monkeypatch, stop):
    """Stopped between or at evaluations: the weights, Adam, dropout and the history go on as if nothing had been."""
    whole, scores = trained
    out = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(training.Interrupted, match=f"step {stop} of 8.*--resume"):
        stop_after(patch, stop)
        training.train(TrainConfig(data=data, **SMALL), out)
    assert signal.getsignal(signal.SIGINT) is handler
    assert training.train(checkpoints.load_config(out)[0], out, resume=True) == scores
    assert history(out) == history(whole)
    ours, theirs = state(out), state(whole)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("kill", [1, 2])
def test_resume_after_a_kill_between_an_evaluation_and_its_checkpoint(trained, data, tmp_path, monkeypatch, kill):
    """What was written after the last checkpoint is written again; before the first one, training starts again."""
    whole, scores = trained
    out = tmp_path / "run"
    save_state, count = checkpoints.save_state, iter(range(1, 100))

    def save(*args):
        if next(count) == kill:
            raise MemoryError  # as good as a kill: nothing catches it
        save_state(*args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
        patch.setattr(checkpoints, "save_state", save)
        training.train(TrainConfig(data=data, **SMALL), out)
    assert [row["step"] for row in history(out)] == ["3", "6"][:kill]
    (out / ".model-abc.keras").write_text("half")
    assert training.train(checkpoints.load_config(out)[0], out, resume=True) == scores
    assert history(out) == history(whole)
    assert not list(out.glob(".model*"))


def test_checkpoints_of_the_first_evaluation_and_then_not_too_often(trained, data, tmp_path, monkeypatch):
    """What is left out in between is written with the next one; the end is always written."""
    whole, scores = trained
    save_state, steps = checkpoints.save_state, []

    def save(path, state, progress):
        steps.append(progress["step"])
        save_state(path, state, progress)

    monkeypatch.setattr(checkpoints, "save_state", save)
    out = tmp_path / "run"
    assert training.train(TrainConfig(data=data, **SMALL), out) == scores
    assert steps == [3, 8] and history(out) == history(whole)
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    training.train(TrainConfig(data=data, **SMALL), tmp_path / "each")
    assert steps == [3, 8, 3, 6, 8]


@pytest.mark.parametrize("end", ["diverged", "early"])
def test_the_best_model_is_kept_however_training_ends(data, tmp_path, monkeypatch, end):
    """The second evaluation is the best, and its checkpoint was not due yet."""
    monkeypatch.setattr(checkpoints, "best_row", lambda history: history[min(1, len(history) - 1)])
    advance, left = StepLoop.advance, [6]

    def diverging(self, most):
        losses = advance(self, most)
        left[0] -= len(losses)
        return losses if left[0] >= 0 else [np.nan] * len(losses)

    out, config = tmp_path / "run", TrainConfig(data=data, **{**SMALL, "steps": 60})
    if end == "diverged":
        monkeypatch.setattr(StepLoop, "advance", diverging)
        with pytest.raises(UserError, match=r"not finite; model\.keras is that of step 6"):
            training.train(config, out)
    else:
        monkeypatch.setattr(training, "since_best", lambda scores: len(scores) - 2)
        training.train(config.resumed({"patience": 1}), out)
    assert [row["step"] for row in history(out)] == ["3", "6", "9"][: 2 if end == "diverged" else 3]
    assert json.loads((out / "metrics.json").read_text())["step"] == 6
    with np.load(out / "last" / "state.npz") as saved:
        assert json.loads(str(saved["progress"]))["step"] == (3 if end == "diverged" else 9)


def test_train_longer(trained, data, tmp_path):
    """More steps can be asked for when a run is done; they begin where it ended."""
    whole, _ = trained
    out = tmp_path / "run"
    training.train(TrainConfig(data=data, **{**SMALL, "steps": 6}), out)
    training.train(checkpoints.load_config(out)[0].resumed({"steps": 8}), out, resume=True)
    for name, array in state(out).items():
        np.testing.assert_array_equal(array, state(whole)[name], err_msg=name)


@pytest.mark.parametrize("name", ["run$1_$2", "caf\udce9", "\u7d30\u80de"])
def test_a_file_s_name_is_no_formula(name, tmp_path):
    truth = np.array([[0, 1], [1, 0]])
    report.overlays([(name, np.zeros((2, 2, 1)), truth, truth)], tmp_path / "overlays.png")
    assert (tmp_path / "overlays.png").stat().st_size > 1000


def test_a_whole_number_is_a_rate():
    config = TrainConfig(data="synthetic", lr=1)
    assert config.lr == 1.0 and type(config.lr) is float


def test_divergence_stops(data, tmp_path):
    with pytest.raises(UserError, match=r"diverged by step \d+: the .*loss is not finite.*--lr"):
        training.train(TrainConfig(data=data, **{**SMALL, "lr": 1e30}), tmp_path / "run")
    assert not (tmp_path / "run" / "last" / "state.npz").exists()


def test_a_collapsed_loss_scale_stops(data, tmp_path):
    config = TrainConfig(data=data, precision="mixed_float16", **{**SMALL, "steps": 2})
    trainer = training._Trainer(
        config, evaluation.load_labelled(data), tmp_path, training.rich.console.Console(), Distribution()
    )
    trainer.optimizer.dynamic_scale.assign(0.5)
    with pytest.raises(UserError, match=r"the loss scale fell to 0.5.*--precision float32"):
        trainer.run(np.arange(4), np.arange(4, 6), resume=False)


def test_a_skipped_step_is_survived_and_counted(data, tmp_path):
    """A loss scale so high that the first gradients overflow: steps are left out until it has come down."""
    config = TrainConfig(data=data, precision="mixed_float16", **{**SMALL, "steps": 6, "eval_every": 6})
    trainer = training._Trainer(
        config, evaluation.load_labelled(data), tmp_path, training.rich.console.Console(), Distribution()
    )
    trainer.optimizer.dynamic_scale.assign(2.0**20)
    checkpoints.save_config(tmp_path, trainer.config, checkpoints.DataFacts.of(trainer.dataset), "test")
    trainer.run(np.arange(4), np.arange(4, 6), resume=False)
    (row,) = history(tmp_path)
    skipped = int(row["skipped_steps"])
    assert 0 < skipped < 6
    assert float(row["loss_scale"]) == 2.0 ** (20 - skipped)
    assert np.isfinite(float(row["loss"]))


def test_xla_gives_the_same_training(trained, data, tmp_path):
    whole, _ = trained
    training.train(TrainConfig(data=data, jit="on", **{**SMALL, "steps": 3}), tmp_path / "run")
    ours, theirs = history(tmp_path / "run")[0], history(whole)[0]
    assert ours.keys() == theirs.keys()
    for key in ("loss", "l2_loss", "val_loss"):
        assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-3), key


def test_default_sizes(data):
    facts = checkpoints.DataFacts.of(evaluation.load_labelled(data))
    assert training._completed(TrainConfig(data=data), facts).size == 572
    assert training._completed(TrainConfig(data=data, padding="same"), facts).size == 64
    assert training._completed(TrainConfig(data=data), facts).eval_every == 320


def test_a_folder_with_files_is_not_touched(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"new or empty folder.*choose another folder"):
        training.train(TrainConfig(data=data, **SMALL), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_mistake_leaves_no_folder_behind(data, tmp_path):
    with pytest.raises(UserError, match=r"input size 30 does not fit.*use 28 or 32"):
        training.train(TrainConfig(data=data, **{**SMALL, "size": 30}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lock(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4711")
        file.flush()
        with pytest.raises(UserError, match="in use by process 4711"), checkpoints.locked(out):
            pass
    # The holder is gone, its file is still there.
    with checkpoints.locked(out), pytest.raises(UserError, match="in use"), checkpoints.locked(out):
        pass


def test_resume_refuses_other_data(trained, data, tmp_path):
    out, _ = trained
    images, masks = generate(10, size=(48, 48))
    write_tiff(tmp_path / "train-volume.tif", images[..., 0])
    write_tiff(tmp_path / "train-labels.tif", masks)
    config = checkpoints.load_config(out)[0].resumed({"data": str(tmp_path)})
    with pytest.raises(UserError, match=r"not the data that .* was trained on"):
        training.train(config, out, resume=True)
    with pytest.raises(UserError, match="expected images of 64x64 pixels like the training's, got 48x48"):
        evaluation.evaluate_run(out, str(tmp_path))


def test_evaluate_other_data(trained, data, tmp_path):
    out, scores = trained
    assert evaluation.evaluate_run(out, data)["samples"] == 10
    assert json.loads((out / "metrics.json").read_text()) == scores, "another folder's scores were recorded"


def test_damaged_files(trained, data, tmp_path):
    out, _ = trained
    config = checkpoints.load_config(out)[0]
    copy = tmp_path / "run"
    (copy / "last").mkdir(parents=True)
    for name in ("config.json", "split.json", "history.csv", "model.keras", "last/state.npz"):
        (copy / name).write_bytes((out / name).read_bytes())
    whole = (copy / "last" / "state.npz").read_bytes()
    (copy / "last" / "state.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"state.npz: damaged"):
        training.train(config, copy, resume=True)
    (copy / "last" / "state.npz").write_bytes(whole)
    (copy / "history.csv").write_text("step,loss\n1,2,3\n")
    with pytest.raises(UserError, match=r"history.csv: not a history"):
        training.train(config, copy, resume=True)
    (copy / "model.keras").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"model.keras: damaged"):
        evaluation.evaluate_run(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json: not the config of a run"):
        evaluation.evaluate_run(copy)
