"""The U-Net's loss: softmax cross-entropy and soft Dice, read from the logits in one pass."""

import numbers

import keras
import tensorflow as tf

from unet_fast import ops, reference
from unet_fast.errors import UserError
from unet_fast.layers import check_backend, use_fused


@keras.saving.register_keras_serializable(package="unet_fast")
class DiceCrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy plus soft Dice loss, from logits, in float32 whatever the model computes in.

    `unet_fast.reference.dice_cross_entropy` has the formulas. Both terms are taken over one sample at a time, then the
    samples are reduced; UNet_Medical's loss, but for its weight decay, is this one with the default arguments.

    Args:
        dice_weight, ce_weight: the two terms' weights, not negative.
        class_weights: a weight for each class in the cross-entropy, or None.
        ignore_class: the label of pixels left out, such as 255 or -1, or None.
        include_background: whether class 0 counts in the Dice term.
        smooth: added above and below the fraction bar of Dice, positive.
        squared: squared (V-Net; Milletari et al., 2016) or plain sums in Dice's denominator.
        label_smoothing: in [0, 1); of the cross-entropy alone.
        reduction: over the samples: "sum_over_batch_size", "mean", "mean_with_sample_weight", "sum" or None.
        name: of the loss.
        backend: "auto" takes the fused op where it is available, "fused" insists on it, "stock" uses stock TensorFlow.

    Call:
        y_true: labels [N, H, W] or [N, H, W, 1] of any integer dtype, or of a float dtype with whole values.
        y_pred: logits [N, H, W, K] of any float dtype, K >= 2. A Keras mask on them, [N, H, W], leaves out the pixels
            where it is False.
        sample_weight: [N] or [N, 1], or None.

    Returns:
        float32, a scalar, or [N] with reduction=None.

    Raises:
        UserError: an argument out of range, no class left for Dice, or shapes that do not fit (one-hot labels do not).

    >>> import numpy as np
    >>> from unet_fast.losses import DiceCrossEntropy
    >>> labels = np.array([[[0, 1], [1, 255]]], np.uint8)
    >>> logits = 30.0 * (labels[..., None] == np.arange(2))
    >>> abs(float(DiceCrossEntropy(ignore_class=255)(labels, logits))) < 1e-6
    True
    """

    def __init__(
        self,
        dice_weight=1.0,
        ce_weight=1.0,
        class_weights=None,
        ignore_class=None,
        include_background=True,
        smooth=1e-6,
        squared=True,
        label_smoothing=0.0,
        reduction="sum_over_batch_size",
        name="dice_cross_entropy",
        backend="auto",
    ):
        super().__init__(name=name, reduction=reduction, dtype="float32")
        for argument, value, ok, expected in (
            ("dice_weight", dice_weight, dice_weight >= 0, "not to be negative"),
            ("ce_weight", ce_weight, ce_weight >= 0, "not to be negative"),
            ("smooth", smooth, smooth > 0, "to be positive"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "to lie in [0, 1)"),
            (
                "class_weights",
                class_weights,
                _are_weights(class_weights),
                "to be a list of weights, none negative, or None",
            ),
            ("ignore_class", ignore_class, ignore_class is None or _is_int(ignore_class), "to be an integer or None"),
        ):
            if not ok:
                raise UserError(f"expected {argument} {expected}, got {value!r}; give such a value")
        check_backend(backend)
        self.dice_weight = dice_weight
        self.ce_weight = ce_weight
        self.class_weights = None if class_weights is None else [float(w) for w in class_weights]
        self.ignore_class = ignore_class
        self.include_background = include_background
        self.smooth = smooth
        self.squared = squared
        self.label_smoothing = label_smoothing
        self.backend = backend
        self._reduce = _Reduce(name="reduce", reduction=reduction, dtype="float32")

    def __call__(self, y_true, y_pred, sample_weight=None):
        # Keras' own __call__ casts the logits to float32 first, which in half precision would write them out once more.
        losses = self.call(y_true, y_pred)
        if sample_weight is not None:
            sample_weight = as_sample_weights(sample_weight, losses.shape[0])
        return self._reduce(losses, losses, sample_weight)

    def call(self, y_true, y_pred):
        mask = getattr(y_pred, "_keras_mask", None)
        labels, logits = as_labels_and_logits(y_true, y_pred)
        classes = logits.shape[-1]
        reference.counted_classes(classes, self.include_background, self.ignore_class)
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise UserError(
                f"expected class_weights for the {classes} classes of the logits, got {len(self.class_weights)}; "
                "give one a class"
            )
        ignore_class = self.ignore_class
        if mask is not None:
            # -1 is no class, so ignoring it takes none out of the Dice term.
            ignore_class = -1 if ignore_class is None else ignore_class
            labels = tf.where(_pixel_mask(mask, labels), labels, ignore_class)
        # On a CPU the op takes every dtype and computes in float32, to which stock TensorFlow would have to cast first.
        dtype = logits.dtype.name if tf.config.list_physical_devices("GPU") else "float32"
        op = ops if use_fused(self.backend, dtype) else reference
        return op.dice_cross_entropy(
            labels,
            logits,
            dice_weight=self.dice_weight,
            ce_weight=self.ce_weight,
            class_weights=self.class_weights,
            ignore_class=ignore_class,
            include_background=self.include_background,
            smooth=self.smooth,
            squared=self.squared,
            label_smoothing=self.label_smoothing,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "dice_weight": self.dice_weight,
            "ce_weight": self.ce_weight,
            "class_weights": self.class_weights,
            "ignore_class": self.ignore_class,
            "include_background": self.include_background,
            "smooth": self.smooth,
            "squared": self.squared,
            "label_smoothing": self.label_smoothing,
            "backend": self.backend,
        }


def as_labels_and_logits(y_true, y_pred):
    """Labels and logits as the ops take them, from what a Keras data pipeline hands over.

    Args:
        y_true: [N, ...spatial] or [N, ...spatial, 1] of any integer or float dtype; floats are rounded, since
            augmentation and tf.data often make masks floats.
        y_pred: [N, ...spatial, K], K >= 2.

    Returns:
        labels int32 [N, ...spatial]; logits float32, float16 or bfloat16 [N, ...spatial, K].

    Raises:
        UserError: shapes that do not fit, one-hot labels among them, or a single class.

    >>> import numpy as np
    >>> from unet_fast.losses import as_labels_and_logits
    >>> labels, logits = as_labels_and_logits(np.ones((2, 8, 8, 1), np.float32), np.zeros((2, 8, 8, 3), np.float16))
    >>> labels.shape, labels.dtype.name, logits.dtype.name
    (TensorShape([2, 8, 8]), 'int32', 'float16')
    """
    labels, logits = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
    if not logits.dtype.is_floating or logits.dtype == tf.float64:
        logits = tf.cast(logits, tf.float32)
    classes = logits.shape[-1]
    if classes == 1:
        raise UserError(
            f"expected logits of at least 2 classes, got shape {_shape(logits)}; give the background its own class"
        )
    if labels.shape.rank == logits.shape.rank and labels.shape[-1] == 1:
        labels = tf.squeeze(labels, -1)
    if not labels.shape.is_compatible_with(logits.shape[:-1]):
        hint = (
            "take np.argmax(y_true, -1) of one-hot labels"
            if labels.shape[-1] == classes
            else "crop or resize one of them"
        )
        raise UserError(
            f"expected class indices of shape {_shape(logits)[:-1]} for logits of shape {_shape(logits)}, "
            f"got labels of shape {_shape(labels)}; {hint}"
        )
    if labels.dtype.is_floating:
        labels = tf.round(labels)
    return tf.cast(labels, tf.int32), logits


def as_sample_weights(sample_weight, n):
    """One weight a sample, float32 [N].

    Args:
        sample_weight: [N] or [N, 1].
        n: N, or None where it is not known yet.

    Raises:
        UserError: any other shape.

    >>> from unet_fast.losses import as_sample_weights
    >>> as_sample_weights([[1], [3]], 2).numpy().tolist()
    [1.0, 3.0]
    """
    weights = tf.cast(sample_weight, tf.float32)
    if weights.shape.rank == 2 and weights.shape[1] == 1:
        weights = tf.squeeze(weights, 1)
    if weights.shape.rank != 1 or not weights.shape.is_compatible_with([n]):
        raise UserError(
            f"expected sample_weight of shape ({n},), one weight a sample, got {_shape(weights)}; "
            "weigh classes with class_weights, or leave pixels out with ignore_class"
        )
    return weights


class _Reduce(keras.losses.Loss):
    """Keras' own weighting and reduction, with its scaling under tf.distribute, of losses that are computed already."""

    def call(self, y_true, y_pred):
        return y_pred


def _pixel_mask(mask, labels):
    if not mask.shape.is_compatible_with(labels.shape):
        raise UserError(
            f"expected the logits' Keras mask to have the labels' shape {_shape(labels)}, got {_shape(mask)}; "
            "mark the pixels to leave out with ignore_class"
        )
    return tf.cast(mask, tf.bool)


def _shape(tensor):
    return tuple(tensor.shape)


def _are_weights(value):
    return value is None or (isinstance(value, (list, tuple)) and len(value) > 0 and all(w >= 0 for w in value))


def _is_int(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
