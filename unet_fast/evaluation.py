"""Scoring a trained network."""

import math

import keras
import numpy as np
import tensorflow as tf

from unet_fast import checkpoints, crossval, surface_metrics
from unet_fast.data import evaluation_dataset, load_dataset
from unet_fast.errors import UserError
from unet_fast.inference import predict_image, training_scale
from unet_fast.losses import DiceCrossEntropy
from unet_fast.metrics import Dice


class Evaluator:
    """Scores of a model on one set of batches, compiled once for any number of evaluations.

    Args:
        model: FusedUNet.
        batches: tf.data.Dataset of (images [N, H, W, C], class indices [N, Ho, Wo]), as of
            `unet_fast.data.evaluation_dataset`.
        ignore_class: the label of pixels that do not count, or None.

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

    def __init__(self, model, batches, ignore_class=None):
        classes, ignore = model.num_classes, {"ignore_class": ignore_class}
        cross_entropy = DiceCrossEntropy(dice_weight=0.0, reduction=None, backend=model.backend, **ignore)
        self._batches = batches
        self._cross_entropy = keras.metrics.Mean()
        self._soft_dice = Dice(classes, soft=True, **ignore)
        self._dice = [Dice(classes, class_id=k, **ignore) for k in range(classes)]

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


def evaluate_run(path, data=None, *, tolerance=None):
    """Score a run's model, and record the scores in its metrics.json where they are those of its own validation fold.

    Args:
        path: folder of the run.
        data: another data folder, all of whose images are scored; None for the run's validation fold.
        tolerance: of the normalised surface Dice, in units of the images' spacing; None for one pixel.

    Returns:
        dict, as `score`; with `fold` and `step`, the run's best, where data is None.

    Raises:
        UserError: no run there, data that do not suit its model, or a negative tolerance.

    Example: see `unet_fast.training.train`.
    """
    run = checkpoints.load_run(path)
    source = data or run.config.data
    if data is None and run.facts.layout == "imported":
        raise UserError(f"{path}: was imported and knows no data of its own; give some with --data")
    dataset = load_labelled(source, mask_values=run.facts.mask_values, ignore_value=run.facts.ignore_value)
    run.facts.check(dataset.images, source)
    if dataset.images.shape[1:3] != run.facts.image_shape[:2]:
        got, trained = ("x".join(map(str, s)) for s in (dataset.images.shape[1:3], run.facts.image_shape[:2]))
        raise UserError(
            f"{source}: expected images of {trained} pixels like the training's, got {got}; "
            "crop them, or use `unet-fast predict`"
        )
    dataset = dataset.with_value_range(run.facts.value_range)
    if data is not None:
        return score(run, dataset, np.arange(len(dataset.images)), tolerance=tolerance)
    indices = crossval.load_split(run.path / checkpoints.SPLIT, dataset.names)[run.config.fold][1]
    return record(run, dataset, indices, tolerance=tolerance)


def record(run, dataset, indices, *, tolerance=None):
    """`score` of a run's own validation fold, written to its metrics.json with `fold` and `step`, the model's own."""
    history = checkpoints.read_history(run.path)
    step = {"step": checkpoints.best_row(history)["step"]} if history else {}
    scores = {"fold": run.config.fold, **step, **score(run, dataset, indices, tolerance=tolerance)}
    checkpoints.write_json(run.path / checkpoints.METRICS, scores)
    return scores


def score(run, dataset, indices, *, tolerance=None):
    """All scores of a run's model.

    Args:
        run: `unet_fast.checkpoints.Run`.
        dataset: labelled `unet_fast.data.Dataset` of images like the training's.
        indices: the images to score.
        tolerance: as `evaluate_run`.

    Returns:
        dict that JSON can take, None for what is not defined: the scores of `Evaluator`, of all pixels together at the
        network's output size; `images`, a list of `image_scores` with each image's `name`, `spacing` (y, x) and `unit`;
        and the means over the images of what these hold beside Dice and IoU, `hd95_per_class` and so on, with `hd95` and
        `nsd` the means over the classes.

    Raises:
        UserError: a tolerance that is negative or not finite.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(
            f"expected --tolerance to be a number of at least 0, got {tolerance}; give one in units of the spacing"
        )
    ignore = dataset.spec.ignore_index
    scores = Evaluator(run.model, batches_of(run.model, dataset, indices, run.config.batch), ignore)()
    images = []
    for index in map(int, indices):
        probabilities = predict_image(
            run.model, dataset.images[index], value_range=run.facts.value_range, scale=training_scale(run)
        )
        spacing = dataset.spacings[index]
        about = {"name": dataset.names[index], "spacing": list(spacing[:2]), "unit": spacing.unit}
        truth, prediction, classes = dataset.masks[index], probabilities.argmax(-1), run.facts.num_classes
        images.append(about | image_scores(truth, prediction, classes, spacing[:2], tolerance, ignore))
    for name in ("hd95", "nsd"):
        each = [_mean(column) for column in zip(*(image[f"{name}_per_class"] for image in images), strict=True)]
        scores |= {name: _mean(each), f"{name}_per_class": each}
    for name in ("adapted_rand_error", "voi_split", "voi_merge"):
        scores[name] = _mean([image[name] for image in images])
    return {**scores, "images": images}


def image_scores(truth, prediction, num_classes, spacing=(1.0, 1.0), tolerance=None, ignore_class=None):
    """Scores of one segmented image.

    Args:
        truth, prediction: class indices [H, W].
        num_classes: K.
        spacing: (height, width) of a pixel.
        tolerance: of the normalised surface Dice, in units of the spacing; None for one pixel.
        ignore_class: what truth holds in pixels to leave out, or None. They do not count in Dice, IoU and the scores of
            objects; outlines are taken to run there as they were predicted.

    Returns:
        dict of lists of K floats, `dice_per_class`, `iou_per_class`, `hd95_per_class`, in units of the spacing, and
        `nsd_per_class`; and of `tolerance`, `adapted_rand_error`, `voi_split` and `voi_merge`, floats or None where they
        are not defined. `unet_fast.surface_metrics` says what they are and what holds for classes that are not there;
        a class that is neither there nor predicted has a Dice and an IoU of 1.

    >>> import numpy as np
    >>> from unet_fast.evaluation import image_scores
    >>> truth, prediction = np.array([[0, 1, 1, 0]]), np.array([[0, 0, 1, 0]])
    >>> scores = image_scores(truth, prediction, 2)
    >>> scores["iou_per_class"][1], scores["hd95_per_class"][1], scores["nsd_per_class"][1]
    (0.5, 0.95, 1.0)
    """
    tolerance = surface_metrics.one_pixel(spacing) if tolerance is None else float(tolerance)
    columns = {"dice_per_class": [], "iou_per_class": [], "hd95_per_class": [], "nsd_per_class": []}
    valid = np.ones(truth.shape, bool) if ignore_class is None else truth != ignore_class
    outlined = np.where(valid, truth, prediction)
    for k in range(num_classes):
        there, predicted = outlined == k, prediction == k
        both, either = int((there & predicted & valid).sum()), int(((there | predicted) & valid).sum())
        distances = surface_metrics.surface_distances(there, predicted, spacing)
        iou = both / either if either else 1.0
        values = (
            2 * iou / (1 + iou),
            iou,
            surface_metrics.hd95_of(distances),
            surface_metrics.nsd_of(distances, tolerance),
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    # Class 0 in the truth is no object, so these pixels count for nothing.
    objects = surface_metrics.instances(np.where(valid, truth, 0)), surface_metrics.instances(prediction)
    split, merge = (None if math.isnan(v) else v for v in surface_metrics.variation_of_information(*objects))
    error = surface_metrics.adapted_rand_error(*objects)
    return {**columns, "tolerance": tolerance, "adapted_rand_error": error, "voi_split": split, "voi_merge": merge}


def _mean(values):
    """The mean of those that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def load_labelled(data, mask_values=None, ignore_value=None):
    """`unet_fast.data.load_dataset`, with a UserError where there are no masks."""
    dataset = load_dataset(data, mask_values=mask_values, ignore_value=ignore_value)
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
