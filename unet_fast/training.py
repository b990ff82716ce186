"""Training a network into the folder of a run.

The recipe is that of NVIDIA's UNet_Medical: cross-entropy plus soft Dice plus 5e-4 times half the squared norm of all
weights and biases, Adam with 1e-4, batches of 8 for 6400 steps. The loop is explicit rather than `Model.fit`, which can go
on at epochs only and knows no way to stop within a launch of many steps; the steps themselves are `unet_fast.step_loop`.
"""

import contextlib
import dataclasses
import math
import signal
import time
from pathlib import Path

import keras
import numpy as np
import rich.console
import tensorflow as tf

from unet_fast import __version__, checkpoints, crossval, progress, report
from unet_fast.background import Background
from unet_fast.data import Augmentation, TrainingBatches
from unet_fast.data.files import atomic_path
from unet_fast.data.sample_weights import read_sample_weights
from unet_fast.distribution import Distribution
from unet_fast.errors import UserError
from unet_fast.evaluation import Evaluator, batches_of, load_labelled, record
from unet_fast.interrupts import Interrupted, signals
from unet_fast.losses import DiceCrossEntropy
from unet_fast.memory import too_large
from unet_fast.models import FusedUNet
from unet_fast.models.geometry import nearest_input_sizes
from unet_fast.schedules import Schedule, reductions, since_best
from unet_fast.tensorboard import TensorBoard

_REFERENCE_SIZE = 572  # of the paper's and UNet_Medical's input, which unpadded networks of depth 1 to 5 all take
_PLATEAU_PATIENCE, _PLATEAU_FACTOR = 3, 0.5
_CACHED_BYTES = 2**28  # prepared validation images up to this size are kept from one evaluation to the next
_OVERLAYS = 4  # validation images in overlays.png
# Between checkpoints, which are of evaluations and half a gigabyte each for the reference network: a disk may take longer for
# one than the GPU from one evaluation to the next.
_CHECKPOINT_SECONDS = 30.0


@keras.saving.register_keras_serializable(package="unet_fast")
class AdamL2(keras.optimizers.Adam):
    """Adam on a loss that has the term l2 / 2 * (sum of the squares of all variables), biases too.

    The term enters by its gradient, l2 * variable, so that it costs no pass of its own, and neither the model nor its
    loss know of it. It is not `weight_decay`, which bypasses Adam's moments (Loshchilov & Hutter, 2019).

    Args:
        learning_rate, **kwargs: as `keras.optimizers.Adam`.
        l2: weight of the term.

    >>> import keras
    >>> from unet_fast.training import AdamL2
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(AdamL2(1e-3, l2=5e-4), "mse")
    """

    def __init__(self, learning_rate=1e-4, l2=5e-4, name="adam_l2", **kwargs):
        super().__init__(learning_rate, name=name, **kwargs)
        self.l2 = l2
        self.schedule = learning_rate if isinstance(learning_rate, Schedule) else None

    def build(self, variables):
        built = self.built
        super().build(variables)
        if (
            self.use_ema and not built
        ):  # the first steps may be left out by a loss scale, and leave the averages as they are
            for average, variable in zip(self._model_variables_moving_average, variables, strict=True):
                average.assign(variable)

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(keras.ops.cast(gradient, variable.dtype) + self.l2 * variable, variable, learning_rate)

    def get_config(self):
        return {**super().get_config(), "l2": self.l2}


def train(config, out, *, resume=False, folds=None, console=None, devices=None, cluster=None):
    """Train a network into a folder, or go on with it.

    Sets the global random seed. A first SIGINT or SIGTERM stops after the steps under way, half a second or so, and
    saves; a second one does not save. On several machines the first one alone evaluates and writes files.

    Args:
        config: TrainConfig; to go on, the run's own from `TrainConfig.resumed`.
        out: folder of the run, see `unet_fast.checkpoints`; new or empty, or to go on one that holds a run.
        resume: go on with the run in `out`: same batches, same dropout, same weights as if it had never stopped.
        folds: those of a new run, as `unet_fast.crossval.folds` gives them; None to draw them as the options say.
        console: rich.console.Console to report to; None for standard output.
        devices: logical devices to train on in place of `config.gpus`, such as ["CPU:0", "CPU:1"].
        cluster: `unet_fast.distribution.Cluster` of the workers to train with, all of which call this; or None.

    Returns:
        dict of the best model's scores, as in metrics.json; None to all workers but the first.

    Raises:
        UserError: data, sizes, devices or a folder that do not suit; another process at work there; training that
            diverged; `unet_fast.distribution.WorkerLost`, another worker that ended.
        Interrupted: a signal came.

    >>> import os, tempfile
    >>> from unet_fast.config import TrainConfig
    >>> from unet_fast.evaluation import evaluate_run
    >>> from unet_fast.training import train
    >>> out = tempfile.mkdtemp()
    >>> config = TrainConfig(data="synthetic", filters=2, depth=1, padding="same", size=32, steps=2, batch=1)
    >>> scores = train(config, out, console=rich.console.Console(quiet=True))
    >>> " ".join(sorted(os.listdir(out))[1:])
    'config.json curves.png history.csv history.json last metrics.json model.keras overlays.png split.json'
    >>> evaluate_run(out) == scores
    True
    """
    out = Path(out)
    if resume:
        checkpoints.check_trained_here(out)
    elif cluster is None or cluster.index == 0:
        checkpoints.check_new(out)
    with Distribution(config.gpus, devices, cluster) as distribution:
        return _train(config, out, resume, folds, console or rich.console.Console(), distribution)


def _train(config, out, resume, folds, console, distribution):
    dataset = load_labelled(config.data, ignore_value=config.ignore_class)
    facts = checkpoints.DataFacts.of(dataset)
    config = _completed(config, facts)
    if folds is None:
        folds = crossval.draw(dataset, num_folds=config.folds, split=config.split, group=config.group)
    trainer = _Trainer(config, dataset, out, console, distribution)
    with checkpoints.locked(out) if distribution.is_chief else contextlib.nullcontext():
        if not resume and distribution.is_chief:
            checkpoints.check_new(out)  # again, now that nobody else can fill it
        elif resume and checkpoints.load_config(out)[1] != facts:
            raise UserError(f"{config.data}: not the data that {out} was trained on; say with --data where they are")
        has_folds = resume and ((out / checkpoints.STATE).exists() or (out / checkpoints.SPLIT).exists())
        if has_folds:  # else new, or killed before anything depended on the folds
            folds = crossval.load_split(out / checkpoints.SPLIT, dataset.names)
        training, validation = folds[config.fold]
        weights = _sample_weights(config, out, dataset.names, resume)
        options = dataclasses.asdict(dataclasses.replace(config, data="", sample_weights=None))
        own = [
            options,
            resume,
            str(facts),
            [*map(int, training)],
            weights is not None and weights.tolist(),
            __version__,
        ]
        distribution.check_same(own, "options and data")
        if distribution.is_chief:
            checkpoints.save_config(out, config, facts, __version__)
            if not has_folds:
                crossval.save_split(out / checkpoints.SPLIT, folds, dataset.names)
            _copy_sample_weights(config, out)
        return trainer.run(training, validation, resume=resume, sample_weights=weights)


def _sample_weights(config, out, names, resume):
    """The images' weights, or None. A run has its own copy of the file, so that it goes on with the same."""
    if config.sample_weights is None:
        return None
    copy = out / checkpoints.SAMPLE_WEIGHTS
    return read_sample_weights(copy if resume and copy.exists() else config.sample_weights, names)


def _copy_sample_weights(config, out):
    copy = out / checkpoints.SAMPLE_WEIGHTS
    if config.sample_weights is not None and not copy.exists():
        with atomic_path(copy, overwrite=True) as temporary:
            temporary.write_bytes(Path(config.sample_weights).read_bytes())


def _completed(config, facts):
    """The options with those that depend on the data or on others filled in, and places made absolute."""
    classes = facts.num_classes
    if config.class_weights is not None and len(config.class_weights) != classes:
        raise UserError(
            f"expected --class-weights for {classes} classes, whose values in the masks are "
            f"{', '.join(map(str, facts.mask_values))}, got {len(config.class_weights)}; give one each"
        )
    size, eval_every = config.size, config.eval_every
    if size is None and config.padding == "valid":
        size = _REFERENCE_SIZE
    elif size is None:
        side = min(facts.image_shape[:2])
        size = nearest_input_sizes(side, config.depth, config.padding)[0]
        if size is None:
            raise UserError(f"images of {side} pixels are too small to halve {config.depth} times; lower --depth")
    if eval_every is None:
        eval_every = max(config.steps // 20, 1)
    data = config.data if config.data == "synthetic" else str(Path(config.data).resolve())
    weights = config.sample_weights and str(Path(config.sample_weights).resolve())
    filled = {"data": data, "sample_weights": weights, "size": size, "eval_every": eval_every}
    if config.schedule == "plateau":
        filled["plateau_patience"] = config.plateau_patience or _PLATEAU_PATIENCE
        filled["plateau_factor"] = config.plateau_factor or _PLATEAU_FACTOR
    return dataclasses.replace(config, **filled)


def network(config, dataset):
    """The network that `train` starts from: a FusedUNet of new weights, compiled by XLA or not as the options say.

    Args:
        config: TrainConfig with a `size`.
        dataset: labelled `unet_fast.data.Dataset`, which tells channels and classes.
    """
    model = FusedUNet(
        (config.size, config.size, dataset.images.shape[3]),
        num_classes=dataset.spec.num_classes,
        filters=config.filters,
        depth=config.depth,
        padding=config.padding,
        upsampling=config.upsampling,
        dropout=config.dropout,
        backend=config.backend,
        dtype=config.precision,
    )
    checkpoints.set_jit(model, config)
    return model


class _Trainer:
    """The model, the optimizer and the loop of one call of `train`."""

    def __init__(self, config, dataset, out, console, distribution):
        self.config, self.dataset, self.out, self.console = config, dataset, out, console
        self.distribution = distribution
        keras.utils.set_random_seed(config.seed)
        self.model = network(config, dataset)
        self.rate = config.lr
        if config.schedule != "constant" or config.warmup:
            self.rate = Schedule(config.lr, config.warmup, config.steps if config.schedule == "cosine" else None)
        ema = {} if config.ema is None else {"use_ema": True, "ema_momentum": config.ema}
        self.optimizer = AdamL2(self.rate, config.l2, global_clipnorm=config.clip_norm, **ema)
        if config.precision == "mixed_float16":
            self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
        self.optimizer.build(self.model.trainable_variables)
        self.scored = self.model  # what is evaluated and kept
        if config.ema is not None:
            self.scored = FusedUNet.from_config(self.model.get_config())
            checkpoints.set_jit(self.scored, config)
        self.write_model = checkpoints.ModelWriter(self.model)
        self.tensorboard = None
        self.step = 0
        self.seconds = 0.0
        self.losses = []  # of the steps since the last evaluation
        self.history = []
        self.unsaved = {}  # by what it is: a function that writes it, and its arguments

    def run(self, training, validation, *, resume, sample_weights=None):
        config, distribution = self.config, self.distribution
        if resume and distribution.is_chief:
            self._restore()
        self.step = distribution.gather(self.step)[0]
        batches = TrainingBatches(
            self.dataset,
            training,
            input_size=config.size,
            output_size=self.model.output_shape[1:3],
            batch_size=self._step_images,
            seed=config.seed,
            augment=Augmentation(
                basic=config.augment,
                rotation=config.rotation,
                elastic=config.elastic,
                gamma=config.gamma,
                contrast=config.contrast,
                noise=config.noise,
            ),
            sample_weights=sample_weights,
        )
        spec = self.dataset.spec
        loss = DiceCrossEntropy(
            class_weights=config.class_weights, ignore_class=spec.ignore_index, backend=config.backend
        )
        loop = distribution.loop(self.model, self.optimizer, loss, batches, self.step, config.accumulate)
        evaluated = batches_of(self.scored, self.dataset, validation, config.batch)
        if len(validation) * math.prod(self.scored.input_shape[1:]) * 4 <= _CACHED_BYTES:
            evaluated = evaluated.cache()
        if config.tensorboard and distribution.is_chief:
            self.tensorboard = TensorBoard(self.out / checkpoints.TENSORBOARD)
        evaluator = Evaluator(self.scored, evaluated, spec.ignore_index)
        ops = "fused" if self.model.uses_fused_ops else "stock"
        self._say(
            f"{len(training)} training and {len(validation)} validation images, fold {config.fold} of {config.folds}; "
            f"{self.model.count_params():,} parameters, input {config.size}, output {self.model.output_shape[1]}; "
            f"{config.precision}, {ops} ops, XLA {'on' if self.model.jit_compile else 'off'}; "
            f"classes 0 to {spec.num_classes - 1} are {', '.join(map(str, spec.mask_values))} in the masks"
            + ("" if spec.ignore_value is None else f", {spec.ignore_value} is ignored")
            + (f"; {distribution}" if distribution.replicas > 1 else "")
        )
        shared, files = crossval.shared_files(self.dataset, (training, validation))
        if shared and files > 1:
            self._say(
                f"note: {shared} of {files} files have images in training and validation both, which flatters the scores; "
                f"a partition with --group file and --folds {min(files, config.folds)} keeps files together"
            )
        bar = progress.bar(self.console, config.steps, self.step, hidden=not distribution.is_chief)
        with signals() as caught, bar as show, Background() as self.background:
            try:
                self._loop(loop, evaluator, caught, show)
            except tf.errors.ResourceExhaustedError as error:
                self.background.submit(_write, self._take_unsaved())
                raise too_large(config, error) from error
        return self._finish(validation) if distribution.is_chief else None

    @property
    def _step_images(self):
        return self.config.batch * self.config.accumulate * self.distribution.replicas

    def _loop(self, loop, evaluator, caught, show):
        config, is_chief = self.config, self.distribution.is_chief
        begin = time.monotonic() - self.seconds
        timed = None  # (time, step) from which on the speed is taken
        saved, next_save = self.step, 0.0  # the last step that was saved, and from when on others may be
        self._reduce_on_plateau(loop)
        while self.step < config.steps and not self._is_stalled():
            due = min((self.step // config.eval_every + 1) * config.eval_every, config.steps)
            losses = loop.advance(due - self.step)
            self.losses += losses
            self.step += len(losses)
            self.background.check()
            self._check_health()
            now = time.monotonic()
            timed = timed or (now, self.step)  # after the first step, which traces, compiles and tunes
            steps = self.step - timed[1]
            speed = steps * self._step_images / (now - timed[0]) if steps else None
            show(self.step, losses[-1], speed)
            if self.step == due:
                self.seconds = now - begin
                if is_chief:
                    self._evaluate(evaluator, speed)
                self.losses = []
                timed = time.monotonic(), self.step
            now = time.monotonic()
            is_time = caught or self.step == config.steps or (self.step == due and now >= next_save)
            if is_chief and is_time:  # before anything that a lost worker would end
                self._save(now - begin)
                saved, next_save = self.step, now + _CHECKPOINT_SECONDS
            if self.step == due:
                self._reduce_on_plateau(loop)
            if self.distribution.any(caught):
                if is_chief and saved < self.step:  # another worker caught the signal
                    self._save(time.monotonic() - begin)
                self.background.wait()
                mend = f"go on with `unet-fast train --out {self.out} --resume`"
                signum = caught[0] if caught else signal.SIGTERM  # which another worker got
                raise Interrupted(f"stopped at step {self.step} of {config.steps}; {mend}", signum)
        if is_chief and saved < self.step:  # stopped early
            self._save(time.monotonic() - begin)

    def _save(self, seconds):
        """Have a checkpoint written, beside what comes next: what evaluations have left, and the state to go on from.

        The state comes last, since what is before it is done again where it is missing.
        """
        self.seconds = seconds
        replicas = self.distribution.replicas
        facts = {"step": self.step, "seconds": seconds, "losses": list(self.losses), "replicas": replicas}
        state = checkpoints.save_state, self.out, checkpoints.snapshot(self.model, self.optimizer), facts
        self.background.submit(_write, [*self._take_unsaved(), state])

    def _take_unsaved(self):
        # The history tells which step's the best model is, and so comes behind it.
        taken = [self.unsaved[name] for name in ("model", "metrics", "history") if name in self.unsaved]
        self.unsaved = {}
        return taken

    def _is_stalled(self):
        scores, patience = [row["val_dice"] for row in self.history], self.config.patience
        if patience is None or not self.distribution.any(scores and since_best(scores) >= patience):
            return False
        self._say(f"stopped early at step {self.step}: no new best Dice in {patience} evaluations")
        return True

    def _reduce_on_plateau(self, loop):
        if self.config.schedule == "plateau":
            times = reductions([row["val_dice"] for row in self.history], self.config.plateau_patience)
            times = self.distribution.gather(times)[0]  # the chief alone has a history
            loop.set_rate_factor(self.config.plateau_factor**times)

    def _last_rate(self):
        """The learning rate of the last update."""
        if isinstance(self.rate, float):
            return self.rate
        return float(self.rate(max(int(self.optimizer.iterations) - 1, 0)))

    @property
    def _loss_scale(self):
        scale = getattr(self.optimizer, "dynamic_scale", None)
        return None if scale is None else float(scale)

    def _check_health(self):
        # With a loss scale, a step without finite gradients is left out and the scale halved; only without end is that bad.
        if self._loss_scale is None and not math.isfinite(sum(self.losses)):
            raise self._diverged("the loss is not finite")
        if self._loss_scale is not None and self._loss_scale < 1:
            raise self._diverged(f"the loss scale fell to {self._loss_scale:g}, no step has finite gradients any more")

    def _diverged(self, what):
        self.background.submit(_write, self._take_unsaved())
        best = "no model was saved"
        if self.history:
            best = f"{checkpoints.MODEL} is that of step {checkpoints.best_row(self.history)['step']}"
        elif not self.distribution.is_chief:
            best = "the first host has said which model it kept"
        return UserError(
            f"training diverged by step {self.step}: {what}; {best}; try a smaller --lr"
            + ("" if self.config.precision == "float32" else ", or --precision float32")
        )

    def _evaluate(self, evaluator, speed):
        """Score the model: a line of the history; leaves in `unsaved` what is to be written of it."""
        if self.scored is not self.model:
            self.optimizer.finalize_variable_values(self.scored.trainable_variables)
        scores = evaluator()
        if not math.isfinite(scores["loss"]):
            raise self._diverged("the validation loss is not finite")
        losses = [loss for loss in self.losses if math.isfinite(loss)]
        loss = float(np.mean(losses)) if losses else None
        l2_loss = self.config.l2 / 2 * sum(self._squares().numpy().tolist())
        row = {
            "step": self.step,
            "loss": loss,
            "l2_loss": l2_loss,
            "total_loss": None if loss is None else loss + l2_loss,
            **{f"val_{key}": value for key, value in scores.items() if isinstance(value, float)},
            **{f"val_dice_{k}": value for k, value in enumerate(scores["dice_per_class"])},
            **{f"val_iou_{k}": value for k, value in enumerate(scores["iou_per_class"])},
            "lr": self._last_rate(),
            "loss_scale": self._loss_scale,
            "skipped_steps": self.step - int(self.optimizer.iterations),
            "images_per_second": speed,
            "seconds": self.seconds,
        }
        self.history.append(row)
        is_best = checkpoints.best_row(self.history) is row
        self._say(progress.row_text(row, self.config.steps, is_best))
        if is_best:
            metrics = {"fold": self.config.fold, "step": self.step, **scores}
            weights = [tf.convert_to_tensor(v.value) for v in self.scored.variables]
            self.unsaved["model"] = self.write_model, self.out, weights
            self.unsaved["metrics"] = checkpoints.write_json, self.out / checkpoints.METRICS, metrics
        self.unsaved["history"] = checkpoints.write_history, self.out, list(self.history)
        if self.tensorboard is not None:
            self.tensorboard(row)

    @tf.function(autograph=False)
    def _squares(self):
        return tf.stack([tf.reduce_sum(tf.square(v)) for v in self.model.trainable_variables])

    def _restore(self):
        facts = checkpoints.load_state(self.out, self.model, self.optimizer)
        if facts is None:  # killed before the first checkpoint: the seed makes the start the same again
            return
        replicas = facts.get("replicas", 1)
        if replicas != self.distribution.replicas:
            raise UserError(
                f"{self.out}: was trained by {replicas} replicas, got {self.distribution.replicas}; resume it on as many, "
                "or start a new run"
            )
        self.step, self.seconds, self.losses = facts["step"], facts["seconds"], facts["losses"]
        # A kill between an evaluation and its checkpoint leaves a row that will be written again.
        self.history = [row for row in checkpoints.read_history(self.out) if row["step"] <= self.step]
        self._say(f"resumed at step {self.step} of {self.config.steps}")

    def _finish(self, validation):
        report.curves(self.history, self.out / checkpoints.CURVES)
        run, indices, samples = checkpoints.load_run(self.out), validation[:_OVERLAYS], []
        for index, (image, label) in zip(indices, batches_of(run.model, self.dataset, indices, 1), strict=True):
            predicted = run.model.predict_on_batch(image).argmax(-1)
            truth = np.ma.masked_equal(label[0].numpy(), self.dataset.spec.num_classes)  # what is ignored
            samples.append((self.dataset.names[index], image[0].numpy(), truth, predicted[0]))
        report.overlays(samples, self.out / checkpoints.OVERLAYS)
        return record(run, self.dataset, validation)

    def _say(self, text):
        if self.distribution.is_chief:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _write(files):
    for write, *arguments in files:
        write(*arguments)
