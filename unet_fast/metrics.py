"""Dice and intersection over union of a segmentation, from logits and class indices.

Counts are kept in float64, which holds every whole number up to 2^53; float32 would stop counting pixels at 2^24.
"""

import keras
import tensorflow as tf

from unet_fast.errors import UserError
from unet_fast.losses import as_labels_and_logits, as_sample_weights
from unet_fast.reference import counted_classes


class _ClassScore(keras.metrics.Metric):
    """A ratio a class, of statistics that are summed over all samples seen; the mean of the counted classes."""

    def __init__(self, rows, num_classes, class_id, include_background, ignore_class, name, dtype):
        super().__init__(name=name, dtype=dtype)
        if class_id is None:
            counted = counted_classes(num_classes, include_background, ignore_class)
        elif class_id in range(num_classes) and class_id != ignore_class:
            counted = [class_id]
        else:
            raise UserError(
                f"expected class_id to be one of {num_classes} classes and not ignore_class={ignore_class}, "
                f"got {class_id}; give one of those, or None for their mean"
            )
        self.num_classes = num_classes
        self.class_id = class_id
        self.include_background = include_background
        self.ignore_class = ignore_class
        self._counted = counted
        self._totals = self.add_variable((rows, num_classes), "zeros", dtype="float64", name="totals")

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch.

        Args:
            y_true: labels [N, H, W] or [N, H, W, 1] of any integer dtype, or of a float dtype with whole values.
            y_pred: logits [N, H, W, num_classes] of any float dtype.
            sample_weight: [N] or [N, 1], or None.

        Raises:
            UserError: shapes that do not fit, one-hot labels among them.
        """
        labels, logits = as_labels_and_logits(y_true, y_pred)
        if logits.shape[-1] != self.num_classes:
            raise UserError(
                f"expected logits of num_classes={self.num_classes} classes, got shape {tuple(logits.shape)}; "
                "make them agree"
            )
        n = logits.shape[0] or tf.shape(logits)[0]
        labels, logits = tf.reshape(labels, [n, -1]), tf.reshape(logits, [n, -1, self.num_classes])
        valid = tf.ones_like(labels, tf.bool) if self.ignore_class is None else labels != self.ignore_class
        statistics = self._statistics(labels, logits, valid)
        if sample_weight is not None:
            weights = as_sample_weights(sample_weight, labels.shape[0])
            statistics *= tf.cast(weights, tf.float64)[:, None, None]
        # Compiled code cannot raise: a label out of range makes the score NaN, rather than being left out in silence.
        out_of_range = tf.reduce_any(valid & ((labels < 0) | (labels >= self.num_classes)))
        poison = tf.where(out_of_range, tf.constant(float("nan"), tf.float64), 0.0)
        self._totals.assign_add(tf.reduce_sum(statistics, 0) + poison)

    def result(self):
        """The score, a scalar of the metric's dtype."""
        numerator, denominator = self._ratio(*tf.unstack(tf.convert_to_tensor(self._totals)))
        scores = tf.where(denominator == 0, tf.ones_like(numerator), tf.math.divide_no_nan(numerator, denominator))
        return tf.cast(tf.reduce_mean(tf.gather(scores, self._counted)), self.dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "class_id": self.class_id,
            "include_background": self.include_background,
            "ignore_class": self.ignore_class,
        }


@keras.saving.register_keras_serializable(package="unet_fast")
class Dice(_ClassScore):
    """Dice score from logits: hard over all pixels seen, or UNet_Medical's soft one.

    Hard, for each class, over all pixels of all samples together: 2 |P and T| / (|P| + |T|), P where the argmax of the
    logits is the class and T where the label is. A class that was neither there nor predicted scores 1: nothing was
    missed or made up.

    Soft, with p = softmax(logits) and t the one-hot labels: (2 sum(p t) + 1e-6) / (sum(p^2) + sum(t^2) + 1e-6) over the
    pixels of one sample, in float32, then the mean over the samples.

    Args:
        num_classes: K.
        class_id: the one class to score, or None for the mean over the classes.
        include_background: whether class 0 counts in that mean.
        ignore_class: the label of pixels left out, in [0, K) or not, or None. It never counts in the mean.
        soft: see above.
        name: by default "dice" or "soft_dice", and "_" with the class_id.
        dtype: of the result, float32 by default.

    A label that is neither in [0, K) nor `ignore_class` makes the result NaN. A sample weight multiplies its sample's
    counts, or with `soft` its share of the mean.

    Raises:
        UserError: no class left to score.

    >>> import numpy as np
    >>> from unet_fast.metrics import Dice
    >>> metric = Dice(num_classes=2, class_id=1)
    >>> metric.update_state(np.array([[[0, 1, 1]]]), np.array([[[[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]]]]))
    >>> round(float(metric.result()), 4)
    0.6667
    """

    def __init__(
        self,
        num_classes,
        class_id=None,
        include_background=True,
        ignore_class=None,
        soft=False,
        name=None,
        dtype=None,
    ):
        name = name or _default_name("soft_dice" if soft else "dice", class_id)
        super().__init__(2 if soft else 3, num_classes, class_id, include_background, ignore_class, name, dtype)
        self.soft = soft

    def _statistics(self, labels, logits, valid):
        return _soft_dice(labels, logits, valid) if self.soft else _counts(labels, logits, valid)

    def _ratio(self, *totals):
        if self.soft:
            return totals
        both, truth, predicted = totals
        return 2 * both, truth + predicted

    def get_config(self):
        return {**super().get_config(), "soft": self.soft}


@keras.saving.register_keras_serializable(package="unet_fast")
class IoU(_ClassScore):
    """Intersection over union from logits, hard, over all pixels seen: |P and T| / |P or T| for each class.

    P is where the argmax of the logits is the class, T where the label is. A class that was neither there nor predicted
    scores 1: nothing was missed or made up.

    Args:
        num_classes: K.
        class_id: the one class to score, or None for the mean over the classes.
        include_background: whether class 0 counts in that mean.
        ignore_class: the label of pixels left out, in [0, K) or not, or None. It never counts in the mean.
        name: by default "iou", and "_" with the class_id.
        dtype: of the result, float32 by default.

    A label that is neither in [0, K) nor `ignore_class` makes the result NaN. A sample weight multiplies its sample's
    counts.

    Raises:
        UserError: no class left to score.

    >>> import numpy as np
    >>> from unet_fast.metrics import IoU
    >>> metric = IoU(num_classes=2, class_id=1)
    >>> metric.update_state(np.array([[[0, 1, 1]]]), np.array([[[[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]]]]))
    >>> float(metric.result())
    0.5
    """

    def __init__(self, num_classes, class_id=None, include_background=True, ignore_class=None, name=None, dtype=None):
        name = name or _default_name("iou", class_id)
        super().__init__(3, num_classes, class_id, include_background, ignore_class, name, dtype)

    def _statistics(self, labels, logits, valid):
        return _counts(labels, logits, valid)

    def _ratio(self, both, truth, predicted):
        return both, truth + predicted - both


def _counts(labels, logits, valid):
    """Pixels of each class in prediction and truth, in truth, in prediction: float64 [N, 3, K]."""
    predicted = tf.argmax(logits, -1, output_type=tf.int32)
    columns = []
    # One class at a time: a one-hot [N, P, K] of 64-bit integers would dwarf the logits.
    for c in range(logits.shape[-1]):
        in_truth, in_prediction = valid & (labels == c), valid & (predicted == c)
        masks = (in_truth & in_prediction, in_truth, in_prediction)
        columns.append(tf.stack([tf.reduce_sum(tf.cast(mask, tf.int64), 1) for mask in masks], -1))
    return tf.cast(tf.stack(columns, -1), tf.float64)


def _soft_dice(labels, logits, valid):
    """Each sample's soft Dice of each class, and 1 for the sample: float64 [N, 2, K]."""
    p = tf.nn.softmax(tf.cast(logits, tf.float32)) * tf.cast(valid, tf.float32)[:, :, None]
    t = tf.one_hot(tf.where(valid, labels, -1), logits.shape[-1])
    sums = tf.reduce_sum(tf.square(p) + t, 1)
    dice = (2.0 * tf.reduce_sum(p * t, 1) + 1e-6) / (sums + 1e-6)
    return tf.cast(tf.stack([dice, tf.ones_like(dice)], 1), tf.float64)


def _default_name(name, class_id):
    return name if class_id is None else f"{name}_{class_id}"
