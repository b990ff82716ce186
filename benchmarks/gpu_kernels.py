"""Times the convolution kernels of the reference U-Net, layer by layer, beside cuDNN's through PyTorch, on one GPU.

A row is a layer: milliseconds (and TFLOP/s) of forward pass, input gradient and weight gradient, each with all that is
fused into it; below them the sum. `cudnn` columns are bare convolutions: no bias, activation, pooling or bias gradient.

    PYTHONPATH=build/gpu:tests/gpu python3 benchmarks/gpu_kernels.py [--batch 8] [--dtype float16] [--sweep]
"""

import argparse
import re
import statistics

import kernels
import torch

# (side of the input, channels, skip channels, filters, pooled)
LAYERS = [
    (570, 64, 0, 64, True),
    (284, 64, 0, 128, False),
    (282, 128, 0, 128, True),
    (140, 128, 0, 256, False),
    (138, 256, 0, 256, True),
    (68, 256, 0, 512, False),
    (66, 512, 0, 512, True),
    (32, 512, 0, 1024, False),
    (30, 1024, 0, 1024, False),
    (56, 512, 512, 512, False),
    (54, 512, 0, 512, False),
    (104, 256, 256, 256, False),
    (102, 256, 0, 256, False),
    (200, 128, 128, 128, False),
    (198, 128, 0, 128, False),
    (392, 64, 64, 64, False),
    (390, 64, 0, 64, False),
]
TRANSPOSED = [(28, 1024, 512), (52, 512, 256), (100, 256, 128), (196, 128, 64)]


def random(*shape, dtype):
    return torch.randn(shape, device="cuda", dtype=torch.float32).mul_(0.1).to(dtype)


def median_ms(function, repeats=9):
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def kernel_ms(function, repeats=5):
    """Median milliseconds of each kind of kernel that `function` launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    times = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.search(r"(\w*?)(Kernel)?[<(]", event.name.replace("(anonymous namespace)", ""))
            times.setdefault(name[1] if name else event.name, []).append(event.device_time / 1000)
    return {name: statistics.median(t) * len(t) / repeats for name, t in times.items()}


class Layer:
    """Arrays of one layer and its three products as functions."""

    def __init__(self, batch, side, channels, skip, filters, pooled, dtype):
        self.x = random(batch, side, side, channels, dtype=dtype)
        self.skip = random(batch, side + 8, side + 8, skip, dtype=dtype) if skip else None
        self.kernel, self.bias = random(3, 3, channels + skip, filters, dtype=dtype), random(filters, dtype=dtype)
        self.y = random(batch, side - 2, side - 2, filters, dtype=dtype)
        self.dy, self.dkernel, self.dbias = random(*self.y.shape, dtype=dtype), self.kernel.clone(), self.bias.clone()
        half = (side - 2) // 2
        self.pooled = random(batch, half, half, filters, dtype=dtype) if pooled else None
        self.dx, self.dskip = self.x.clone(), self.skip.clone() if skip else None
        self.problem = kernels.conv2d_problem(self.x, self.kernel, self.skip, pool=pooled, input_is_relu=True)
        self.problem.dy_is_masked = not pooled
        self.flops = 2 * 9 * (channels + skip) * self.y.numel()

    def addresses(self, *names):
        return [0 if (t := getattr(self, name)) is None else t.data_ptr() for name in names]

    def forward(self, choices):
        kernels.native.conv2d_bias_relu(
            torch.cuda.current_stream().cuda_stream, self.problem,
            *self.addresses("x", "skip", "kernel", "bias", "y", "pooled"), 0, choices,
        )  # fmt: skip

    def backward(self, choices):
        size = kernels.native.conv2d_bias_relu_grad_workspace_bytes(self.problem, choices)
        space = torch.empty(size, dtype=torch.uint8, device="cuda")
        names = ["dy", "pooled", "y", "x", "skip", "kernel", "dx", "dskip", "dkernel", "dbias"]
        kernels.native.conv2d_bias_relu_grad(
            torch.cuda.current_stream().cuda_stream, self.problem, *self.addresses(*names), space.data_ptr(),
            choices,
        )  # fmt: skip

    def cudnn_ms(self):
        x = self.x if self.skip is None else torch.cat([self.x, kernels.crop_like(self.skip, self.x)], -1)
        x, w, dy = x.permute(0, 3, 1, 2), self.kernel.permute(3, 2, 0, 1), self.dy.permute(0, 3, 1, 2)
        w = w.contiguous(memory_format=torch.channels_last)
        grad = torch.ops.aten.convolution_backward
        common = (dy, x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        return [
            median_ms(lambda: torch.nn.functional.conv2d(x, w)),
            median_ms(lambda: grad(*common, [True, False, False])),
            median_ms(lambda: grad(*common, [False, True, False])),
        ]


def transposed(batch, side, channels, filters, dtype):
    """Milliseconds of forward pass and gradient, and FLOP of one product."""
    x, kernel = random(batch, side, side, channels, dtype=dtype), random(3, 3, filters, channels, dtype=dtype)
    bias = random(filters, dtype=dtype)
    y = kernels.conv2d_transpose_bias_relu(x, kernel, bias)
    dy = torch.randn_like(y)
    forward = kernel_ms(lambda: kernels.conv2d_transpose_bias_relu(x, kernel, bias))
    backward = kernel_ms(lambda: kernels.conv2d_transpose_bias_relu_grad(dy, y, x, kernel))
    return forward, backward, 2 * 9 * channels * filters * batch * side * side


def others(batch, dtype):
    """Milliseconds of the layers without matrix products and of the loss, by kernel."""
    x, kernel, bias = random(batch, 572, 572, 1, dtype=dtype), random(3, 3, 1, 64, dtype=dtype), random(64, dtype=dtype)
    y = kernels.conv2d_bias_relu(x, kernel, bias)
    yield "first 572 1>64", lambda: kernels.conv2d_bias_relu(x, kernel, bias)
    yield "  gradient", lambda: kernels.conv2d_bias_relu_grad(y, y, x, kernel, dx=False, dy_is_masked=True)
    h, last, two = random(batch, 388, 388, 64, dtype=dtype), random(1, 1, 64, 2, dtype=dtype), random(2, dtype=dtype)
    logits = kernels.conv2d_bias_relu(h, last, two, relu=False)
    yield "last 388 64>2", lambda: kernels.conv2d_bias_relu(h, last, two, relu=False)
    yield "  gradient", lambda: kernels.conv2d_bias_relu_grad(logits, logits, h, last, relu=False, input_is_relu=True)
    labels = torch.randint(0, 2, logits.shape[:3], device="cuda", dtype=torch.uint8)
    weights, dloss = torch.ones(2, device="cuda"), torch.ones(batch, device="cuda")
    _, sums, ce = kernels.dice_cross_entropy(labels, logits, weights)
    yield "loss", lambda: kernels.dice_cross_entropy(labels, logits, weights)
    yield "  gradient", lambda: kernels.dice_cross_entropy_grad(dloss, labels, logits, weights, sums, ce)
    yield "max pool 388 64", lambda: kernels.max_pool2d(h)


def row(name, layer, sums):
    """Prints a layer's row and adds its times to `sums`."""
    choices = kernels.tuning()
    forward, backward = kernel_ms(lambda: layer.forward(choices)), kernel_ms(lambda: layer.backward(choices))
    mine = [sum(forward.values()), backward.pop("ImplicitGemm"), backward.pop("Wgrad")]
    times = [t for pair in zip(mine, layer.cudnn_ms(), strict=True) for t in pair]
    cells = [f"{t:6.3f} ({layer.flops / t / 1e9:3.0f})" for t in times]
    rest = " ".join(f"{k} {t:.3f}" for k, t in backward.items())
    print(f"{name:>16} | " + " | ".join(cells) + f" | {rest}")
    for i, t in enumerate([*times, sum(backward.values())]):
        sums[i] += t


def sweep(layer):
    """Prints the times of a layer on every tile."""
    times = {"fprop": [], "dgrad": [], "wgrad": []}
    for tile in range(kernels.native.engines["sm90"][0]):
        choices = kernels.tuning(gemm=tile)
        times["fprop"].append(kernel_ms(lambda c=choices: layer.forward(c), 3)["ImplicitGemm"])
        times["dgrad"].append(kernel_ms(lambda c=choices: layer.backward(c), 3)["ImplicitGemm"])
    for tile in range(kernels.native.wgrad_tiles):
        choices = kernels.tuning(wgrad=tile)
        times["wgrad"].append(kernel_ms(lambda c=choices: layer.backward(c), 3)["Wgrad"])
    print(f"{'by tile':>16} | " + " | ".join(f"{k} " + " ".join(f"{t:.3f}" for t in v) for k, v in times.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=kernels.DTYPES, default="float16")
    parser.add_argument("--sweep", action="store_true", help="also time every tile")
    args = parser.parse_args()
    dtype = kernels.DTYPES[args.dtype]
    torch.backends.cudnn.benchmark = True
    print(f"{torch.cuda.get_device_name()}, batch {args.batch}, {args.dtype}; ms (TFLOP/s)")
    columns = [f"{name:>12}" for product in ("fprop", "dgrad", "wgrad") for name in (product, "cudnn")]
    print(f"{'layer':>16} | " + " | ".join(columns) + " | other kernels of the gradient")
    sums = [0.0] * 7
    for side, channels, skip, filters, pooled in LAYERS:
        layer = Layer(args.batch, side, channels, skip, filters, pooled, dtype)
        row(f"{side} {channels + skip}>{filters}", layer, sums)
        if args.sweep:
            sweep(layer)
    print(f"{'sum':>16} | " + " | ".join(f"{t:12.3f}" for t in sums[:6]) + f" | {sums[6]:.3f}")
    for side, channels, filters in TRANSPOSED:
        forward, backward, flops = transposed(args.batch, side, channels, filters, dtype)
        times = {
            "fprop": forward["ImplicitGemm"],
            "dgrad": backward["ImplicitGemm"],
            "wgrad": backward["Wgrad"],
        }
        cells = [f"{name} {t:.3f} ({flops / t / 1e9:.0f})" for name, t in times.items()]
        print(f"transposed {side} {channels}>{filters}: " + ", ".join(cells))
    for name, function in others(args.batch, dtype):
        print(f"{name:>16} | " + " ".join(f"{k} {t:.4f}" for k, t in kernel_ms(function).items()))


if __name__ == "__main__":
    main()
