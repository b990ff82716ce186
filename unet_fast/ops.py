"""The fused ops: NHWC; float32, float16 or bfloat16, accumulated in float32; each with a gradient and an XLA lowering.

`unet_fast.reference` has the same functions made of stock TensorFlow ops; its results define what these compute.
Every op raises `UserError` for a wrong dtype, `tf.errors.InvalidArgumentError` (eagerly) or `ValueError` (while a graph
is built) that names the argument for a wrong shape, and `unet_fast._library.UnavailableError` where the native library
could not be loaded. A gradient of a gradient is refused with `tf.errors.UnimplementedError`.
"""

import tensorflow as tf

from unet_fast import _library
from unet_fast.errors import UserError
from unet_fast.reference import counted_classes

DTYPES = (tf.float32, tf.float16, tf.bfloat16)
LABEL_DTYPES = (tf.uint8, tf.int32, tf.int64)


def _same_dtype(op, **tensors):
    """Tensors of one supported dtype, in order."""
    tensors = {name: tf.convert_to_tensor(value) for name, value in tensors.items() if value is not None}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1 or next(iter(dtypes.values())) not in DTYPES:
        got = ", ".join(f"{name} {dtype.name}" for name, dtype in dtypes.items())
        raise UserError(
            f"{op}: expected one dtype of float32, float16 or bfloat16 for all inputs, got {got}; cast them"
        )
    return tensors


def _choice(op, argument, value, allowed):
    if value not in allowed:
        raise UserError(f"{op}: expected {argument} to be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _activation(op, value):
    return _choice(op, "activation", "linear" if value is None else value, ("relu", "linear"))


def conv2d_bias_relu(
    x, kernel, bias, skip=None, *, padding="valid", activation="relu", pool=False, input_is_relu=False
):
    """Convolution, bias and ReLU in one pass; optionally of two inputs, and with its 2x2 max pool.

    Args:
        x: [batch, height, width, channels].
        kernel: [k, k, channels (+ skip's), filters], k 3 or 1, of x's dtype.
        bias: [filters], of x's dtype.
        skip: [batch, >= height, >= width, channels], of x's dtype: centre-cropped to x's size and taken as if
            concatenated behind x's channels, as in a U-Net's expanding path.
        padding: "valid" or "same".
        activation: "relu", or "linear" (or None) for none.
        pool: also return the 2x2 max pool with stride 2; a last odd row or column is left out of it.
        input_is_relu: says that x and skip are outputs of a ReLU. Their gradients are then masked where they are zero,
            which the ReLU's own gradient would do anyway, and saves it a pass.

    Returns:
        y [batch, height - k + 1, width - k + 1, filters] ("same": x's height and width), or (y, pooled).

    Source: Ronneberger et al., U-Net (2015), https://arxiv.org/abs/1505.04597.

    >>> import tensorflow as tf
    >>> from unet_fast import ops
    >>> y, pooled = ops.conv2d_bias_relu(tf.ones((1, 8, 8, 2)), tf.ones((3, 3, 2, 4)), tf.zeros(4), pool=True)
    >>> y.shape.as_list(), pooled.shape.as_list(), float(y[0, 0, 0, 0])
    ([1, 6, 6, 4], [1, 3, 3, 4], 18.0)
    """
    op = "conv2d_bias_relu"
    tensors = _same_dtype(op, x=x, kernel=kernel, bias=bias, skip=skip)
    y, pooled = _library.raw_ops().unet_fast_conv2d_bias_relu(
        x=tensors["x"],
        skip=[tensors["skip"]] if skip is not None else [],
        kernel=tensors["kernel"],
        bias=tensors["bias"],
        num_pooled=1 if pool else 0,
        padding=_choice(op, "padding", padding, ("valid", "same")),
        activation=_activation(op, activation),
        input_is_relu=input_is_relu,
    )
    return (y, pooled[0]) if pool else y


def conv2d_transpose_bias_relu(x, kernel, bias, *, activation="relu"):
    """Transposed convolution with stride 2 and padding "same", bias and ReLU in one pass.

    Args:
        x: [batch, height, width, channels].
        kernel: [k, k, filters, channels] as in `keras.layers.Conv2DTranspose`, k 3 or 2, of x's dtype.
        bias: [filters], of x's dtype.
        activation: "relu", or "linear" (or None) for none.

    Returns:
        y [batch, 2 height, 2 width, filters].

    >>> import tensorflow as tf
    >>> from unet_fast import ops
    >>> ops.conv2d_transpose_bias_relu(tf.ones((1, 4, 4, 2)), tf.ones((3, 3, 8, 2)), tf.zeros(8)).shape.as_list()
    [1, 8, 8, 8]
    """
    op = "conv2d_transpose_bias_relu"
    tensors = _same_dtype(op, x=x, kernel=kernel, bias=bias)
    return _library.raw_ops().unet_fast_conv2d_transpose_bias_relu(**tensors, activation=_activation(op, activation))


def cast(tensors, dtype):
    """float32 tensors to a 16-bit type, all in one kernel on a GPU.

    Args:
        tensors: list of float32 tensors of any shapes, such as the weights of a network.
        dtype: float16 or bfloat16.

    Returns:
        list of tensors of that type, rounded to the nearest.

    >>> import tensorflow as tf
    >>> from unet_fast import ops
    >>> [y.dtype.name for y in ops.cast([tf.ones(3), tf.ones((2, 2))], "float16")]
    ['float16', 'float16']
    """
    tensors, dtype = [tf.convert_to_tensor(tensor) for tensor in tensors], tf.as_dtype(dtype)
    if dtype not in DTYPES[1:] or any(tensor.dtype != tf.float32 for tensor in tensors):
        got = ", ".join(sorted({tensor.dtype.name for tensor in tensors}))
        raise UserError(
            f"cast: expected float32 tensors and float16 or bfloat16 to cast them to, got {got} and {dtype.name}"
        )
    return _library.raw_ops().unet_fast_cast(x=tensors, T=dtype) if tensors else []


def max_pool2d(x):
    """2x2 max pooling with stride 2; a last odd row or column is left out.

    Args:
        x: [batch, height, width, channels].

    Returns:
        [batch, height // 2, width // 2, channels]. The gradient goes to the first of equal maxima, row by row.

    >>> import tensorflow as tf
    >>> from unet_fast import ops
    >>> ops.max_pool2d(tf.reshape(tf.range(6.0), (1, 2, 3, 1))).numpy().ravel().tolist()
    [4.0]
    """
    return _library.raw_ops().unet_fast_max_pool2d(**_same_dtype("max_pool2d", x=x))


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
    """Soft Dice loss plus cross entropy of a softmax, a value a sample, from logits in their own dtype.

    With p the softmax of the logits, t the one-hot labels, and sums over a sample's pixels whose label is not ignored:

        ce   = sum w[label] * (-sum_k q_k log p_k) / sum w[label],  q = (1 - label_smoothing) t + label_smoothing / classes
        dice = (2 sum p t + smooth) / (sum p² + sum t² + smooth)  for each class
        loss = ce_weight * ce + dice_weight * mean over the counted classes of (1 - dice)

    All arithmetic is float32 or better, so float16 logits up to their limits give finite losses and gradients.

    Args:
        labels: classes [batch, ...], an integer dtype.
        logits: [batch, ..., classes].
        dice_weight, ce_weight: weights of the two terms.
        class_weights: a weight a class for the cross entropy (w above; Dice weighs classes equally). None: ones.
        ignore_class: pixels with this label count nowhere; may be a class or any other integer. If it is a class, Dice
            leaves it out.
        include_background: whether Dice counts class 0.
        smooth: added to Dice's numerator and denominator.
        squared: sums of squares in Dice's denominator (Milletari et al., V-Net, https://arxiv.org/abs/1606.04797); if
            false, plain sums p and t.
        label_smoothing: in [0, 1), for the cross entropy.

    Returns:
        float32 [batch].

    Raises:
        UserError: no class is left for Dice to count.
        tf.errors.InvalidArgumentError: a label is neither a class nor ignored, or shapes do not fit.

    >>> import tensorflow as tf
    >>> from unet_fast import ops
    >>> logits = tf.constant([[[9.0, -9.0], [-9.0, 9.0]]], tf.float16)
    >>> bool(ops.dice_cross_entropy([[0, 1]], logits) < 1e-3)
    True
    """
    op = "dice_cross_entropy"
    logits = _same_dtype(op, logits=logits)["logits"]
    labels = tf.convert_to_tensor(labels)
    if not labels.dtype.is_integer:
        raise UserError(f"{op}: expected integer labels (a class a pixel), got {labels.dtype.name}; cast them")
    if labels.dtype not in LABEL_DTYPES:
        labels = tf.cast(labels, tf.int64)
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"{op}: expected label_smoothing in [0, 1), got {label_smoothing}")
    if logits.shape.rank and logits.shape[-1] is not None:
        counted_classes(logits.shape[-1], include_background, ignore_class)
    if class_weights is None:
        class_weights = tf.ones(tf.shape(logits, tf.int64)[-1:], tf.float32)
    loss, _, _ = _library.raw_ops().unet_fast_dice_cross_entropy(
        labels=labels,
        logits=logits,
        class_weights=tf.cast(class_weights, tf.float32),
        dice_weight=dice_weight,
        ce_weight=ce_weight,
        smooth=smooth,
        label_smoothing=label_smoothing,
        has_ignore_class=ignore_class is not None,
        ignore_class=0 if ignore_class is None else ignore_class,
        include_background=include_background,
        squared=squared,
    )
    return loss


def _relu_output(tensor):
    """Whether a tensor of a graph is what a fused convolution's ReLU gave out."""
    producer = getattr(tensor, "op", None) if tf.is_symbolic_tensor(tensor) else None
    kinds = ("UnetFastConv2DBiasRelu", "UnetFastConv2DTransposeBiasRelu")
    return producer is not None and producer.type in kinds and producer.get_attr("activation") == b"relu"


def _padded(dskip, skip, x):
    """The gradient of skip from that of its crop to x's size: zeros around it."""
    margins = []
    for axis in (1, 2):
        outer, inner = (t.shape[axis] if t.shape.rank and t.shape[axis] else tf.shape(t)[axis] for t in (skip, x))
        margins.append(outer - inner)
    if all(isinstance(margin, int) and margin == 0 for margin in margins):
        return dskip
    return tf.pad(dskip, [(0, 0), *((margin // 2, margin - margin // 2) for margin in margins), (0, 0)])


def _window(dy):
    """What a Pad op in the graph has put zeros around to make dy, where dy has it in its centre; else dy itself.

    The gradient op takes dy's centre alone, and the Pad that nobody reads is pruned.
    """
    producer = dy.op if tf.is_symbolic_tensor(dy) else None
    if producer is None or producer.type not in ("Pad", "PadV2"):
        return dy
    centre, paddings, *value = (*producer.inputs[:1], *map(tf.get_static_value, producer.inputs[1:]))
    if paddings is None or any(v is None or v != 0 for v in value):
        return dy
    (rows, columns), rest = paddings[1:3], paddings[::3]
    centred = all(before == (before + after) // 2 for before, after in (rows, columns))
    return centre if centred and not rest.any() else dy


def _arrives_masked(dy, y):
    """Whether, by the graph that computes it, the gradient dy of y is zero wherever y is: its consumers masked it.

    Eagerly, and where a function's boundary hides it, the answer is no, which costs a pass and is always right.
    """
    if not tf.is_symbolic_tensor(dy):
        return False
    dy = _window(dy)
    producer = dy.op
    if producer.type in ("AddN", "AddV2", "Identity"):
        return all(_arrives_masked(term, y) for term in producer.inputs)
    if producer.type == "UnetFastConv2DBiasReluGrad":
        first = 2 + producer.get_attr("num_pooled")
        gradients = [0] * producer.get_attr("num_dx") + [1] * producer.get_attr("num_dskip")
        masks = [producer.get_attr("mask_dx"), producer.get_attr("mask_dskip")]
    elif producer.type == "UnetFastConv2DTransposeBiasReluGrad":
        first, gradients, masks = 2, [0] * producer.get_attr("num_dx"), [producer.get_attr("input_is_relu")]
    else:
        return False
    if dy.value_index >= len(gradients) or not masks[gradients[dy.value_index]]:
        return False
    masked_by = producer.inputs[first + gradients[dy.value_index]]
    return masked_by.graph is y.graph and masked_by.name == y.name


def _masks_anyway(tensor):
    """Whether a tensor of a graph comes from a convolution that also pools, whose gradient masks in any case."""
    producer = tensor.op if tf.is_symbolic_tensor(tensor) else None
    return producer is not None and producer.type == "UnetFastConv2DBiasRelu" and producer.get_attr("num_pooled") > 0


def _wanted(op, index):
    """Whether anyone asks for the gradient of input `index`; a tape knows, and an image needs none."""
    skipped = getattr(op, "skip_input_indices", None)
    return not skipped or index not in skipped


@tf.RegisterGradient("UnetFastConv2DBiasRelu")
def _conv2d_bias_relu_grad(op, dy, *dpooled):
    x, *skip, kernel, _ = op.inputs
    wanted = [_wanted(op, index) for index in range(1 + len(skip))]
    dx, dskip, dkernel, dbias = _library.raw_ops().unet_fast_conv2d_bias_relu_grad(
        dy=_window(dy),
        dpooled=list(dpooled),
        y=op.outputs[0],
        x=x,
        skip=skip,
        kernel=kernel,
        num_dx=int(wanted[0]),
        num_dskip=int(any(wanted[1:])),
        padding=op.get_attr("padding"),
        activation=op.get_attr("activation"),
        mask_dx=op.get_attr("input_is_relu") and not _masks_anyway(x),
        mask_dskip=bool(skip) and op.get_attr("input_is_relu") and not _masks_anyway(*skip),
        dy_is_masked=_arrives_masked(dy, op.outputs[0]),
    )
    gradients = [dx[0] if dx else None]
    if skip:
        gradients.append(_padded(dskip[0], skip[0], x) if dskip else None)
    return [*gradients, dkernel, dbias]


@tf.RegisterGradient("UnetFastConv2DTransposeBiasRelu")
def _conv2d_transpose_bias_relu_grad(op, dy):
    x, kernel, _ = op.inputs
    dx, dkernel, dbias = _library.raw_ops().unet_fast_conv2d_transpose_bias_relu_grad(
        dy=dy,
        y=op.outputs[0],
        x=x,
        kernel=kernel,
        num_dx=int(_wanted(op, 0)),
        activation=op.get_attr("activation"),
        input_is_relu=_relu_output(x),
        dy_is_masked=_arrives_masked(dy, op.outputs[0]),
    )
    return [dx[0] if dx else None, dkernel, dbias]


@tf.RegisterGradient("UnetFastMaxPool2D")
def _max_pool2d_grad(op, dy):
    return _library.raw_ops().unet_fast_max_pool2d_grad(x=op.inputs[0], dy=dy)


@tf.RegisterGradient("UnetFastCast")
def _cast_grad(op, *dy):
    del op
    # Stock casts: XLA fuses them into what reads them, the optimizer.
    return [tf.cast(gradient, tf.float32) for gradient in dy]


@tf.RegisterGradient("UnetFastDiceCrossEntropy")
def _dice_cross_entropy_grad(op, dloss, dsums, dce):
    del dsums, dce  # for the gradient only: nothing that a user can reach depends on them
    labels, logits, class_weights = op.inputs
    names = ("dice_weight", "ce_weight", "smooth", "label_smoothing")
    names += ("has_ignore_class", "ignore_class", "include_background", "squared")
    dlogits = _library.raw_ops().unet_fast_dice_cross_entropy_grad(
        dloss=dloss,
        labels=labels,
        logits=logits,
        class_weights=class_weights,
        sums=op.outputs[1],
        ce=op.outputs[2],
        **{name: op.get_attr(name) for name in names},
    )
    return [None, dlogits, None]


def _no_second_order(op, *gradients):
    del gradients
    raise tf.errors.UnimplementedError(
        None, None, f"{op.type}: a gradient of a gradient is not available; use unet_fast.reference, or backend='stock'"
    )


for _name in ("Conv2DBiasRelu", "Conv2DTransposeBiasRelu", "MaxPool2D", "DiceCrossEntropy"):
    tf.RegisterGradient(f"UnetFast{_name}Grad")(_no_second_order)
