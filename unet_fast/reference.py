"""Every op of `unet_fast.ops` in stock TensorFlow: the same names, the same signatures, the same values.

This is what the fused ops are tested against, what runs where the compiled library does not, and what an exported
model is made of. It is differentiable by TensorFlow's own gradients and runs eagerly, in graphs and under XLA.
"""

import tensorflow as tf

from unet_fast.errors import UserError


def conv2d_bias_relu(
    x, kernel, bias, skip=None, *, padding="valid", activation="relu", pool=False, input_is_relu=False
):
    """2-D convolution of stride 1 with bias, activation, a second input and 2x2 max pooling.

    Args:
        x: [N, H, W, Cx] float32, float16 or bfloat16.
        kernel: [kh, kw, Cx + Cs, Co], HWIO, of x's dtype.
        bias: [Co], of x's dtype.
        skip: [N, Hs, Ws, Cs] with Hs >= H and Ws >= W, or None (Cs = 0). Its centre, H x W from the offset
            ((Hs - H) // 2, (Ws - W) // 2), is concatenated after x's channels.
        padding: "valid" or "same".
        activation: "relu", or None or "linear".
        pool: also return y after 2x2 max pooling with stride 2; an odd last row or column is left out.
        input_is_relu: promise that x and skip are ReLU outputs. Their gradients are then zero wherever they are zero,
            which their producer's own gradient makes them anyway.

    Returns:
        y [N, Ho, Wo, Co] of x's dtype; with `pool` the pair (y, pooled), pooled [N, Ho // 2, Wo // 2, Co].

    Raises:
        UserError: an unknown activation.

    >>> import tensorflow as tf
    >>> from unet_fast import reference
    >>> x, skip = tf.ones((1, 6, 6, 2)), tf.ones((1, 8, 8, 1))
    >>> y, pooled = reference.conv2d_bias_relu(x, tf.ones((3, 3, 3, 4)), tf.zeros(4), skip, pool=True)
    >>> y.shape, pooled.shape, float(y[0, 0, 0, 0])
    (TensorShape([1, 4, 4, 4]), TensorShape([1, 2, 2, 4]), 27.0)
    """
    if skip is not None:
        x = tf.concat([x, center_crop(skip, x)], axis=-1)
    if input_is_relu:
        # The value is x; only the gradient sees the mask.
        x = tf.where(x > 0, x, tf.stop_gradient(x))
    y = tf.nn.conv2d(x, kernel, strides=1, padding=padding.upper())
    y = _activate(tf.nn.bias_add(y, bias), activation)
    return (y, max_pool2d(y)) if pool else y


def conv2d_transpose_bias_relu(x, kernel, bias, *, activation="relu"):
    """2-D transposed convolution of stride 2 and "same" padding with bias and activation.

    Args:
        x: [N, H, W, Ci] float32, float16 or bfloat16.
        kernel: [kh, kw, Co, Ci] as in `keras.layers.Conv2DTranspose`, of x's dtype.
        bias: [Co], of x's dtype.
        activation: "relu", or None or "linear".

    Returns:
        [N, 2H, 2W, Co] of x's dtype.

    Raises:
        UserError: an unknown activation.

    >>> import tensorflow as tf
    >>> from unet_fast import reference
    >>> reference.conv2d_transpose_bias_relu(tf.ones((1, 3, 3, 8)), tf.ones((2, 2, 4, 8)), tf.zeros(4)).shape
    TensorShape([1, 6, 6, 4])
    """
    n, h, w, _ = _dims(x)
    y = tf.nn.conv2d_transpose(x, kernel, [n, 2 * h, 2 * w, kernel.shape[2]], strides=2, padding="SAME")
    return _activate(tf.nn.bias_add(y, bias), activation)


def cast(tensors, dtype):
    """float32 tensors to a 16-bit type.

    Args:
        tensors: list of float32 tensors of any shapes.
        dtype: float16 or bfloat16.

    Returns:
        list of tensors of that type, rounded to the nearest.

    >>> import tensorflow as tf
    >>> from unet_fast import reference
    >>> [y.dtype.name for y in reference.cast([tf.ones(3)], "bfloat16")]
    ['bfloat16']
    """
    return [tf.cast(tensor, dtype) for tensor in tensors]


def max_pool2d(x):
    """2x2 max pooling with stride 2; an odd last row or column is left out.

    Args:
        x: [N, H, W, C] float32, float16 or bfloat16.

    Returns:
        [N, H // 2, W // 2, C] of x's dtype.

    >>> import tensorflow as tf
    >>> from unet_fast import reference
    >>> reference.max_pool2d(tf.reshape(tf.range(16.0), (1, 4, 4, 1)))[0, :, :, 0].numpy().tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    if x.shape.rank and any(size in (0, 1) for size in x.shape[1:3]):
        _, h, w, _ = _dims(x)
        return x[:, : h // 2, : w // 2]  # the gradient of TensorFlow's pool without outputs is memory never written
    return tf.nn.max_pool2d(x, ksize=2, strides=2, padding="VALID")


def dice_cross_entropy(
    labels,
    logits,
    *,
    dice_weight=1.0,
    ce_weight=1.0,
    class_weights=None,
    ignore_class=None,
    include_background=True,
    smooth=1e-6,
    squared=True,
    label_smoothing=0.0,
):
    """Weighted sum of softmax cross-entropy and soft Dice loss, one value a sample.

    Over the valid pixels of a sample, those whose label is not `ignore_class`, with p = softmax(logits) and t the
    one-hot labels:

        loss = ce_weight * CE + dice_weight * mean over the counted classes of (1 - Dice)
        CE   = sum(w[label] * ce) / sum(w[label])            0 if nothing is valid; w = class_weights, else 1
        ce   = -sum over classes of ((1 - label_smoothing) * t + label_smoothing / K) * log p
        Dice = (2 * sum(p t) + smooth) / (sum(p^2) + sum(t^2) + smooth)    `squared`, as in V-Net (arXiv:1606.04797)
        Dice = (2 * sum(p t) + smooth) / (sum(p) + sum(t) + smooth)        otherwise

    All classes are counted but class 0 without `include_background`, and but `ignore_class` where that is one of the
    K. Everything is computed in float32 whatever the logits' dtype (float64 stays float64).

    Args:
        labels: integers [N, ...spatial] in [0, K), or `ignore_class`.
        logits: [N, ...spatial, K] float.
        dice_weight, ce_weight: the two terms' weights.
        class_weights: K weights of the cross-entropy alone, or None.
        ignore_class: the label of pixels left out, in [0, K) or not, or None.
        include_background: whether class 0 counts in the Dice term.
        smooth: added above and below the fraction bar of Dice.
        squared: squared or plain sums in Dice's denominator.
        label_smoothing: in [0, 1); the cross-entropy alone.

    Returns:
        float32 [N] (float64 for float64 logits).

    Raises:
        UserError: no class is left to count in Dice.
        tf.errors.InvalidArgumentError: a label that is neither in [0, K) nor `ignore_class`. Only eager
            calls can say so; compiled, the loss of that sample is NaN.

    >>> import tensorflow as tf
    >>> from unet_fast import reference
    >>> labels = tf.constant([[0, 1], [1, 1]])
    >>> reference.dice_cross_entropy(labels, 50.0 * tf.one_hot(labels, 2)).numpy().round(6).tolist()
    [0.0, 0.0]
    """
    classes = logits.shape[-1]
    counted = counted_classes(classes, include_background, ignore_class)
    dtype = tf.float64 if logits.dtype == tf.float64 else tf.float32  # float64: what tests measure errors against
    logits = tf.cast(logits, dtype)
    # int32, because the class to ignore may lie outside the labels' own type, as -1 does of uint8.
    labels = tf.cast(labels, tf.int32)
    valid = tf.ones_like(labels, tf.bool) if ignore_class is None else labels != ignore_class
    bad = valid & ((labels < 0) | (labels >= classes))
    if tf.executing_eagerly():
        tf.debugging.assert_equal(
            tf.reduce_any(bad), False, f"labels must lie in [0, {classes}) or equal ignore_class={ignore_class}"
        )

    def total(x):
        """Sums over the spatial axes one by one: rounding errors grow with an image's side, not its area."""
        for axis in reversed(range(1, labels.shape.rank)):
            x = tf.reduce_sum(x, axis)
        return x

    mask = tf.cast(valid, dtype)
    target = tf.one_hot(tf.where(valid, labels, -1), classes, dtype=dtype)  # [N, ..., K], all 0 where not valid
    log_p = tf.nn.log_softmax(logits)
    p = tf.exp(log_p) * mask[..., None]

    weight = mask if class_weights is None else tf.linalg.matvec(target, tf.cast(class_weights, dtype))
    ce = -(1.0 - label_smoothing) * tf.reduce_sum(target * log_p, -1)
    if label_smoothing:
        ce -= label_smoothing * tf.reduce_mean(log_p, -1)
    ce = tf.math.divide_no_nan(total(weight * ce), total(weight))

    intersection = total(p * target)  # [N, K], and so are the sums below
    sums = total((tf.square(p) if squared else p) + target)
    dice = tf.gather((2.0 * intersection + smooth) / (sums + smooth), counted, axis=1)
    loss = ce_weight * ce + dice_weight * tf.reduce_mean(1.0 - dice, 1)
    return loss * tf.where(tf.reduce_any(tf.reshape(bad, [_dims(bad)[0], -1]), 1), tf.cast(float("nan"), dtype), 1.0)


def counted_classes(classes, include_background=True, ignore_class=None):
    """The classes that a mean over classes counts: all but class 0 without `include_background`, and `ignore_class`.

    Raises:
        UserError: none is left.

    >>> from unet_fast.reference import counted_classes
    >>> counted_classes(4, include_background=False, ignore_class=2)
    [1, 3]
    """
    counted = [c for c in range(classes) if (include_background or c != 0) and c != ignore_class]
    if not counted:
        raise UserError(
            f"expected a class to count, got {classes} class(es), include_background={include_background} and "
            f"ignore_class={ignore_class}; leave one class in"
        )
    return counted


def center_crop(x, like):
    """The centre of x [N, Hx, Wx, C], as high and as wide as `like` [N, H, W, ...]; odd margins are smaller before.

    >>> import tensorflow as tf
    >>> from unet_fast import reference
    >>> crop = reference.center_crop(tf.reshape(tf.range(16), (1, 4, 4, 1)), tf.zeros((1, 2, 2, 1)))
    >>> crop[0, :, :, 0].numpy().tolist()
    [[5, 6], [9, 10]]
    """
    _, height, width, _ = _dims(x)
    _, h, w, _ = _dims(like)
    top, left = (height - h) // 2, (width - w) // 2
    return x[:, top : top + h, left : left + w, :]


def _dims(x):
    """x's sizes: integers where they are known, scalar tensors where they are not."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


def _activate(y, activation):
    if activation == "relu":
        return tf.nn.relu(y)
    if activation in (None, "linear"):
        return y
    raise UserError(f"expected activation 'relu' or None, got {activation!r}; apply any other one to the output")
