"""The raw GPU kernels on PyTorch tensors, NHWC, and references made of PyTorch's own ops.

Every output is allocated with a margin on both sides and filled with NaN, so that a store outside, or one that never came, is
seen.
"""

import native as _native
import torch
import torch.nn.functional as F

native = _native.load_kernels()

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.float32: "float32",
    torch.uint8: "uint8",
    torch.int32: "int32",
    torch.int64: "int64",
}
_MARGIN = 4096


class Output:
    """A tensor to be written in full, and nothing beside it."""

    def __init__(self, shape, dtype):
        size = torch.Size(shape).numel()
        self._storage = torch.full((size + 2 * _MARGIN,), float("nan"), dtype=dtype, device="cuda")
        self.tensor = self._storage[_MARGIN : _MARGIN + size].view(shape)

    def checked(self):
        assert self._storage[:_MARGIN].isnan().all() and self._storage[-_MARGIN:].isnan().all(), "stored out of bounds"
        return self.tensor


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _stream():
    return torch.cuda.current_stream().cuda_stream


def _workspace(size):
    return torch.full((size,), 255, dtype=torch.uint8, device="cuda") if size > 0 else None


def tuning(**fields):
    return _native.tuning(native, **fields)


def engine_tiles():
    return _native.tiles(native)


def conv2d_problem(x, kernel, skip=None, *, same=False, relu=True, pool=False, input_is_relu=False):
    p = native.Conv2DProblem()
    p.dtype = _NAMES[x.dtype]
    p.batch, p.height, p.width, p.channels = x.shape
    if skip is not None:
        _, p.skip_height, p.skip_width, p.skip_channels = skip.shape
    p.kernel_size, p.filters = kernel.shape[0], kernel.shape[3]
    p.same, p.relu, p.pool, p.input_is_relu = same, relu, pool, input_is_relu
    return p


def conv2d_bias_relu(x, kernel, bias, skip=None, *, choices=None, **flags):
    """y, or [y, pooled]."""
    p = conv2d_problem(x, kernel, skip, **flags)
    shrink = 0 if p.same else p.kernel_size - 1
    y = Output((p.batch, p.height - shrink, p.width - shrink, p.filters), x.dtype)
    n, h, w, c = y.tensor.shape
    pooled = Output((n, h // 2, w // 2, c), x.dtype) if p.pool else None
    choices = choices or tuning()
    workspace = _workspace(native.conv2d_bias_relu_workspace_bytes(p, choices))
    native.conv2d_bias_relu(
        _stream(), p, _address(x), _address(skip), _address(kernel), _address(bias), _address(y.tensor),
        _address(pooled.tensor) if pooled else 0, _address(workspace), choices,
    )  # fmt: skip
    return [y.checked(), pooled.checked()] if pooled else y.checked()


def conv2d_bias_relu_grad(dy, y, x, kernel, skip=None, dpooled=None, *, dx=True, dskip=True, dy_is_masked=False,
                          choices=None, **flags):  # fmt: skip
    """[dx, dskip, dkernel, dbias], None where not asked for; dskip of the crop alone. dy may be of y's centre alone."""
    p = conv2d_problem(x, kernel, skip, pool=dpooled is not None, **flags)
    p.dy_is_masked = dy_is_masked
    _, p.dy_height, p.dy_width, _ = dy.shape
    choices = choices or tuning()
    outputs = [
        Output(x.shape, x.dtype) if dx else None,
        Output((*x.shape[:3], skip.shape[3]), x.dtype) if dskip and skip is not None else None,
        Output(kernel.shape, x.dtype),
        Output(kernel.shape[3:], x.dtype),
    ]
    workspace = _workspace(native.conv2d_bias_relu_grad_workspace_bytes(p, choices))
    native.conv2d_bias_relu_grad(
        _stream(), p, _address(dy), _address(dpooled), _address(y), _address(x), _address(skip), _address(kernel),
        *(_address(out.tensor) if out else 0 for out in outputs), _address(workspace), choices,
    )  # fmt: skip
    return [out.checked() if out else None for out in outputs]


def transpose_problem(x, kernel, relu):
    p = native.Conv2DTransposeProblem()
    p.dtype = _NAMES[x.dtype]
    p.batch, p.height, p.width, p.channels = x.shape
    p.kernel_size, p.filters, p.relu = kernel.shape[0], kernel.shape[2], relu
    return p


def conv2d_transpose_bias_relu(x, kernel, bias, *, relu=True, choices=None):
    p = transpose_problem(x, kernel, relu)
    y = Output((p.batch, 2 * p.height, 2 * p.width, p.filters), x.dtype)
    choices = choices or tuning()
    workspace = _workspace(native.conv2d_transpose_bias_relu_workspace_bytes(p, choices))
    native.conv2d_transpose_bias_relu(
        _stream(), p, _address(x), _address(kernel), _address(bias), _address(y.tensor), _address(workspace),
        choices,
    )  # fmt: skip
    return y.checked()


def conv2d_transpose_bias_relu_grad(dy, y, x, kernel, *, relu=True, dx=True, dy_is_masked=False, input_is_relu=False,
                                    choices=None):  # fmt: skip
    """[dx, dkernel, dbias]."""
    p = transpose_problem(x, kernel, relu)
    p.dy_is_masked, p.input_is_relu = dy_is_masked, input_is_relu
    choices = choices or tuning()
    outputs = [Output(x.shape, x.dtype) if dx else None, Output(kernel.shape, x.dtype), Output(dy.shape[3:], x.dtype)]
    workspace = _workspace(native.conv2d_transpose_bias_relu_grad_workspace_bytes(p, choices))
    native.conv2d_transpose_bias_relu_grad(
        _stream(), p, _address(dy), _address(y), _address(x), _address(kernel),
        *(_address(out.tensor) if out else 0 for out in outputs), _address(workspace), choices,
    )  # fmt: skip
    return [out.checked() if out else None for out in outputs]


def cast(tensors, dtype):
    outputs = [Output(t.shape, dtype) for t in tensors]
    arrays = [(_address(t), _address(y.tensor), t.numel()) for t, y in zip(tensors, outputs, strict=True)]
    native.cast(_stream(), _NAMES[dtype], arrays)
    return [y.checked() for y in outputs]


def max_pool2d(x):
    n, h, w, c = x.shape
    y = Output((n, h // 2, w // 2, c), x.dtype)
    native.max_pool2d(_stream(), _NAMES[x.dtype], n, h, w, c, _address(x), _address(y.tensor))
    return y.checked()


def max_pool2d_grad(x, dy):
    dx = Output(x.shape, x.dtype)
    native.max_pool2d_grad(_stream(), _NAMES[x.dtype], *x.shape, _address(x), _address(dy), _address(dx.tensor))
    return dx.checked()


def loss_problem(labels, logits, flags):
    p = native.DiceCrossEntropyProblem()
    p.dtype, p.label_type = _NAMES[logits.dtype], _NAMES[labels.dtype]
    p.batch, p.classes = logits.shape[0], logits.shape[-1]
    p.pixels = labels[0].numel()
    for name, value in flags.items():
        if name == "ignore_class":
            p.has_ignore_class = True
        setattr(p, name, value)
    return p


def dice_cross_entropy(labels, logits, class_weights, **flags):
    """loss [N], sums [N, 3, classes], ce [N, 2]."""
    p = loss_problem(labels, logits, flags)
    shapes = [(p.batch,), (p.batch, 3, p.classes), (p.batch, 2)]
    outputs = [Output(shape, torch.float32) for shape in shapes]
    workspace = _workspace(native.dice_cross_entropy_workspace_bytes(p))
    native.dice_cross_entropy(
        _stream(), p, _address(labels), _address(logits), _address(class_weights),
        *(_address(out.tensor) for out in outputs), _address(workspace),
    )  # fmt: skip
    return [out.checked() for out in outputs]


def dice_cross_entropy_grad(dloss, labels, logits, class_weights, sums, ce, **flags):
    dlogits = Output(logits.shape, logits.dtype)
    native.dice_cross_entropy_grad(
        _stream(), loss_problem(labels, logits, flags), _address(dloss), _address(labels), _address(logits),
        _address(class_weights), _address(sums), _address(ce), _address(dlogits.tensor),
    )  # fmt: skip
    return dlogits.checked()


# References, in the dtype of their arguments


def _nchw(x):
    return x.permute(0, 3, 1, 2)


def _nhwc(x):
    return x.permute(0, 2, 3, 1).contiguous()


def crop_like(skip, x):
    top, left = (skip.shape[1] - x.shape[1]) // 2, (skip.shape[2] - x.shape[2]) // 2
    return skip[:, top : top + x.shape[1], left : left + x.shape[2]]


def padded_like(window, y):
    """Zeros around it, up to y's size."""
    whole = torch.zeros((*y.shape[:3], window.shape[3]), dtype=window.dtype, device=window.device)
    crop_like(whole, window).copy_(window)
    return whole


def reference_conv2d(x, kernel, bias, skip=None, *, same=False, relu=True, pool=False):
    if skip is not None:
        x = torch.cat([x, crop_like(skip, x)], dim=-1)
    y = F.conv2d(_nchw(x), kernel.permute(3, 2, 0, 1), bias, padding=kernel.shape[0] // 2 if same else 0)
    y = F.relu(y) if relu else y
    return [_nhwc(y), _nhwc(F.max_pool2d(y, 2))] if pool else _nhwc(y)


def reference_conv2d_transpose(x, kernel, bias, *, relu=True):
    y = F.conv_transpose2d(_nchw(x), kernel.permute(3, 2, 0, 1), stride=2)
    y = y[:, :, : 2 * x.shape[1], : 2 * x.shape[2]] + bias.view(1, -1, 1, 1)
    return _nhwc(F.relu(y) if relu else y)


def reference_dz(dy, y, dpooled=None, relu=True):
    """What comes through activation and pooling; ties go to the first maximum, as PyTorch's do."""
    dz = padded_like(dy, y)
    if dpooled is not None:
        _, where = F.max_pool2d(_nchw(y), 2, return_indices=True)
        h, w = y.shape[1:3]
        plane = F.max_unpool2d(_nchw(dpooled), where, 2, output_size=(h, w))
        dz = dz + _nhwc(plane)
    return torch.where(y > 0, dz, 0) if relu else dz


def reference_conv2d_grad(dy, y, x, kernel, skip=None, dpooled=None, *, same=False, relu=True, input_is_relu=False):
    inputs = [t.detach().requires_grad_() for t in ([x] if skip is None else [x, skip])]
    weights = kernel.detach().requires_grad_()
    bias = torch.zeros_like(kernel[0, 0, 0]).requires_grad_()
    z = reference_conv2d(inputs[0], weights, bias, *inputs[1:], same=same, relu=False)
    grads = list(torch.autograd.grad(z, [*inputs, weights, bias], reference_dz(dy, y, dpooled, relu)))
    if input_is_relu:
        for i, value in enumerate(inputs):
            grads[i] = torch.where(value > 0, grads[i], 0)
    return [grads[0], crop_like(grads[1], x) if skip is not None else None, *grads[-2:]]


def reference_conv2d_transpose_grad(dy, y, x, kernel, *, relu=True):
    leaves = [x.detach().requires_grad_(), kernel.detach().requires_grad_()]
    leaves.append(torch.zeros_like(kernel[0, 0, :, 0]).requires_grad_())
    z = reference_conv2d_transpose(*leaves, relu=False)
    return torch.autograd.grad(z, leaves, reference_dz(dy, y, relu=relu))


def reference_dice_cross_entropy(labels, logits, class_weights, *, dice_weight=1.0, ce_weight=1.0, smooth=1e-6,
                                 label_smoothing=0.0, ignore_class=None, include_background=True, squared=True):  # fmt: skip
    classes = logits.shape[-1]
    labels, logits = labels.flatten(1).long(), logits.flatten(1, -2)
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_class is None else labels != ignore_class
    t = F.one_hot(labels.where(kept, 0), classes).to(logits.dtype) * kept[..., None]
    log_p = logits.log_softmax(-1)
    p = log_p.exp() * kept[..., None]
    w = (t * class_weights.to(logits.dtype)).sum(-1)
    q = (1 - label_smoothing) * t + label_smoothing / classes
    ce = (w * -(q * log_p).sum(-1)).sum(-1) / w.sum(-1)
    sizes = (p**2).sum(1) + t.sum(1) if squared else p.sum(1) + t.sum(1)
    dice = 1 - (2 * (p * t).sum(1) + smooth) / (sizes + smooth)
    counted = [k for k in range(classes) if k != ignore_class and (include_background or k != 0)]
    return ce_weight * ce + dice_weight * dice[:, counted].mean(-1)
