"""Scoring a trained network."""

import keras
import numpy as np
import tensorflow as tf

from unet_fast import checkpoints, crossval
from unet_fast.data import evaluation_dataset, load_dataset
from unet_fast.errors import UserError
from unet_fast.losses import DiceCrossEntropy
from unet_fast.metrics import Dice


class Evaluator:
    """Scores of a model on one set of batches, compiled once for any number of evaluations.

    Args:
        model: FusedUNet.
        batches: tf.data.Dataset of (images [N, H, W, C], class indices [N, Ho, Wo]), as of
            `unet_fast.data.evaluation_dataset`.

    Calling it returns a dict: `samples`, their number; `cross_entropy`, the mean over them; `soft_dice` as UNet_Medical
    counts it, the mean over samples and classes; `loss`, cross-entropy and soft Dice loss; `dice` and `iou`, hard, over
    all pixels together, the mean over the classes; and `dice_per_class` and `iou_per_class`, lists.

    >>> from unet_fast import FusedUNet
    >>> from unet_fast.data import Dataset, generate
    >>> from unet_fast.evaluation import Evaluator, batches_of
    >>> model = FusedUNet((64, 64, 1), filters=2, depth=1, padding="same")
    >>> data = Dataset.from_arrays(*generate(3, size=(64, 64)))
    >>> Evaluator(model, batches_of(model, data, range(3), batch_size=2))()["samples"]
    3
    """

    def __init__(self, model, batches):
        classes = model.num_classes
        cross_entropy = DiceCrossEntropy(dice_weight=0.0, reduction=None, backend=model.backend)
        self._batches = batches
        self._cross_entropy = keras.metrics.Mean()
        self._soft_dice = Dice(classes, soft=True)
        self._dice = [Dice(classes, class_id=k) for k in range(classes)]

        @tf.function(jit_compile=model.jit_compile, reduce_retracing=True, autograph=False)
        def update(images, labels):
            logits = model(images, training=False)
            self._cross_entropy.update_state(cross_entropy(labels, logits))
            for metric in (self._soft_dice, *self._dice):
                metric.update_state(labels, logits)

        self._update = update

    def __call__(self):
        for metric in (self._cross_entropy, self._soft_dice, *self._dice):
            metric.reset_state()
        samples = 0
        for images, labels in self._batches:
            self._update(images, labels)
            samples += images.shape[0]
        cross_entropy, soft_dice = float(self._cross_entropy.result()), float(self._soft_dice.result())
        dice = [float(metric.result()) for metric in self._dice]
        iou = [d / (2 - d) for d in dice]  # |P and T| / |P or T|, of D = 2 |P and T| / (|P| + |T|)
        return {
            "samples": samples,
            "loss": cross_entropy + 1 - soft_dice,
            "cross_entropy": cross_entropy,
            "soft_dice": soft_dice,
            "dice": float(np.mean(dice)),
            "iou": float(np.mean(iou)),
            "dice_per_class": dice,
            "iou_per_class": iou,
        }


def evaluate_run(path, data=None):
    """Score a run's model, and record the scores in its metrics.json where they are those of its own validation fold.

    Args:
        path: folder of the run.
        data: another data folder, all of whose images are scored; None for the run's validation fold.

    Returns:
        dict, as `Evaluator`.

    Raises:
        UserError: no run there, or data that do not suit its model.

    Example: see `unet_fast.training.train`.
    """
    run = checkpoints.load_run(path)
    source = data or run.config.data
    dataset = load_labelled(source, num_classes=run.facts.num_classes)
    run.facts.check(dataset.images, source)
    if dataset.images.shape[1:3] != run.facts.image_shape[:2]:
        got, trained = ("x".join(map(str, s)) for s in (dataset.images.shape[1:3], run.facts.image_shape[:2]))
        raise UserError(
            f"{source}: expected images of {trained} pixels like the training's, got {got}; "
            "crop them, or use `unet-fast predict`"
        )
    dataset = dataset.with_value_range(run.facts.value_range)
    if data is None:
        indices = crossval.load_split(run.path / checkpoints.SPLIT, dataset.names)[run.config.fold][1]
    else:
        indices = np.arange(len(dataset.images))
    scores = Evaluator(run.model, batches_of(run.model, dataset, indices, run.config.batch))()
    if data is None:
        history = checkpoints.read_history(run.path)
        step = {"step": checkpoints.best_row(history)["step"]} if history else {}
        scores = {"fold": run.config.fold, **step, **scores}
        checkpoints.write_json(run.path / checkpoints.METRICS, scores)
    return scores


def load_labelled(data, num_classes=None):
    """`unet_fast.data.load_dataset`, with a UserError where there are no masks."""
    dataset = load_dataset(data, num_classes=num_classes)
    if dataset.masks is None:
        raise UserError(f"{data}: holds images but no masks; training and evaluation need them, add a folder masks/")
    return dataset


def batches_of(model, dataset, indices, batch_size):
    """`unet_fast.data.evaluation_dataset` of a model's own sizes."""
    return evaluation_dataset(
        dataset,
        indices,
        input_size=model.input_shape[1:3],
        output_size=model.output_shape[1:3],
        batch_size=batch_size,
    )
