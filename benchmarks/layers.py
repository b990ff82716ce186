"""Every convolution of the reference U-Net, layer by layer, beside cuDNN's best through PyTorch, on one GPU.

    python3 benchmarks/layers.py [--json FILE] [--batch 8] [--dtype float16] [--engines auto ...] [--tiles]

Ours is with all that is fused into it: skip input, crop, bias, ReLU, pooling in fprop; the masks of a ReLU input in
dgrad; the bias gradient in wgrad. cuDNN's is convolution + bias + ReLU in one call in fprop, on an input that is
concatenated already, and the bare product in dgrad, wgrad and the transposed convolutions, where PyTorch has no fused
one. `ratio` is cuDNN's time over ours, so above 1 ours is the faster; `peak` is our share of the fastest 8192^3 matrix
product of the same run. `rest` is what a layer's gradient takes beside the two products: the mask and pool gradient
before them, ms.

`fused` is the time of the fastest of cuDNN's plans with the same fusion, by cudnn_frontend, over ours as the rules choose, both
timed as `unet-fast tune` does, on numbers as sparse as ReLU leaves them; `tuned` the same over the fastest of all engines and
tiles, which is what runs once `unet-fast tune` has recorded it.

A time is device time: calls are captured into a CUDA graph, which is replayed between two events, ours and cuDNN's in
turn; the median of the turns counts. Our dgrad is what asking for it adds to the gradient call. An engine that does not
serve a problem leaves it to another. Needs no TensorFlow: the kernels are those of tests/gpu/build_native.sh where they
are on PYTHONPATH, else the installed unet_fast's.
"""

import argparse
import math
import statistics
from pathlib import Path

import record  # finds the next one
import torch
from kernels import DTYPES, conv2d_problem, crop_like, engine_tiles, loss_problem, native, transpose_problem, tuning

DEVICE = "cuda"
TURNS = 7
GRAPH_MS = 4.0  # that a replay takes at least

# (side of the input, channels, skip channels, filters, and where the output is pooled too: the side of the centre that
# the expanding path takes of it, which is all that has a gradient beside the pool's)
LAYERS = [
    (570, 64, 0, 64, 392),
    (284, 64, 0, 128, 0),
    (282, 128, 0, 128, 200),
    (140, 128, 0, 256, 0),
    (138, 256, 0, 256, 104),
    (68, 256, 0, 512, 0),
    (66, 512, 0, 512, 56),
    (32, 512, 0, 1024, 0),
    (30, 1024, 0, 1024, 0),
    (56, 512, 512, 512, 0),
    (54, 512, 0, 512, 0),
    (104, 256, 256, 256, 0),
    (102, 256, 0, 256, 0),
    (200, 128, 128, 128, 0),
    (198, 128, 0, 128, 0),
    (392, 64, 64, 64, 0),
    (390, 64, 0, 64, 0),
]
TRANSPOSED = [(28, 1024, 512), (52, 512, 256), (100, 256, 128), (196, 128, 64)]
PRODUCTS = ("fprop", "dgrad", "wgrad")


def random(*shape, dtype):
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).mul_(0.1).to(dtype)


def event_ms(function):
    """Device time of what a function launches, ms."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


class Repeated:
    """A function captured into a CUDA graph as often as makes a replay long enough to be timed."""

    def __init__(self, function):
        for _ in range(3):  # cuDNN's choice by trial, and what is loaded on first use, come before the capture
            function()
        torch.cuda.synchronize()
        self.count = max(2, min(200, math.ceil(GRAPH_MS / event_ms(function))))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(self.count):
                function()
        self._graph.replay()

    def ms(self):
        return event_ms(self._graph.replay) / self.count


def times_in_turn(functions):
    """Median milliseconds of each function, all of them taking turns.

    Args:
        functions: dict from a name to a function.

    Returns:
        dict from the names to ms.
    """
    repeated = {name: Repeated(function) for name, function in functions.items()}
    turns = [{name: graph.ms() for name, graph in repeated.items()} for _ in range(TURNS)]
    return {name: statistics.median(turn[name] for turn in turns) for name in repeated}


def gemm_tflops(dtype):
    """The ceiling: what the vendor's matrix product reaches."""
    a, b = (random(8192, 8192, dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / times_in_turn({"gemm": lambda: a @ b})["gemm"] / 1e9


class Layer:
    """A layer's arrays, its calls on our kernels, and cuDNN's.

    Its subclasses give `forward(choices)`, `backward(choices, *, dx, fused)` and `cudnn()`.
    """

    def __init__(self):
        self._spaces = {}

    def functions(self, choices):
        """Our calls: fprop; the gradient as the network calls it; with and without dx where no mask is needed."""
        return {
            "fprop": lambda: self.forward(choices),
            "gradient": lambda: self.backward(choices, dx=True, fused=True),
            "dgrad + wgrad": lambda: self.backward(choices, dx=True, fused=False),
            "wgrad": lambda: self.backward(choices, dx=False, fused=False),
        }

    def measured(self):
        """Timings of each product on every engine and tile that serves it, by the rules first."""
        is_transposed = isinstance(self, Transposed)
        found = (native.measure_conv2d_transpose if is_transposed else native.measure_conv2d)(self.problem)
        names = {"forward": "fprop", "input gradient": "dgrad", "weight gradient": "wgrad"}
        return {names[product.product]: product.timings for product in found}

    def addresses(self, *names):
        return [0 if (t := getattr(self, name)) is None else t.data_ptr() for name in names]

    def workspace(self, size):
        """Address of that many bytes, the same in every call: a captured one goes on using them."""
        if size not in self._spaces:
            self._spaces[size] = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        return self._spaces[size].data_ptr()


class Convolution(Layer):
    """Stride 1, as csrc/kernels/conv/problem.h has it; 3x3 unless `kernel_size` says otherwise."""

    def __init__(self, batch, side, channels, skip, filters, centre, dtype, kernel_size=3, relu=True, first=False):
        super().__init__()
        self.x = random(batch, side, side, channels, dtype=dtype)
        self.skip = random(batch, side + 8, side + 8, skip, dtype=dtype) if skip else None
        self.kernel = random(kernel_size, kernel_size, channels + skip, filters, dtype=dtype)
        self.bias = random(filters, dtype=dtype)
        out = side + 1 - kernel_size
        self.y = random(batch, out, out, filters, dtype=dtype)
        self.dy, self.dkernel, self.dbias = torch.randn_like(self.y), self.kernel.clone(), self.bias.clone()
        self.pooled = random(batch, out // 2, out // 2, filters, dtype=dtype) if centre else None
        self.dx, self.dskip = self.x.clone(), random(batch, side, side, skip, dtype=dtype) if skip else None
        flags = {"relu": relu, "input_is_relu": not first}
        self.problem = conv2d_problem(self.x, self.kernel, self.skip, pool=centre > 0, **flags)
        self.unpooled = conv2d_problem(self.x, self.kernel, self.skip, **flags)
        # In the network a consumer has masked dy, unless a pool stands between.
        self.problem.dy_is_masked, self.unpooled.dy_is_masked = not centre, True
        self.problem.dy_height = self.problem.dy_width = centre or out
        self.unpooled.dy_height = self.unpooled.dy_width = out
        self.name = f"{side} {channels + skip}>{filters}"
        self.flops = 2 * kernel_size**2 * (channels + skip) * self.y.numel()

    def forward(self, choices):
        space = self.workspace(native.conv2d_bias_relu_workspace_bytes(self.problem, choices))
        native.conv2d_bias_relu(
            torch.cuda.current_stream().cuda_stream, self.problem,
            *self.addresses("x", "skip", "kernel", "bias", "y", "pooled"), space, choices,
        )  # fmt: skip

    def backward(self, choices, *, dx, fused):
        problem = self.problem if fused else self.unpooled
        names = ["dy", "pooled", "y", "x", "skip", "kernel", "dx", "dskip", "dkernel", "dbias"]
        addresses = dict(zip(names, self.addresses(*names), strict=True))
        if not fused:
            addresses["pooled"] = 0
        if not dx:
            addresses["dx"] = addresses["dskip"] = 0
        space = self.workspace(native.conv2d_bias_relu_grad_workspace_bytes(problem, choices))
        native.conv2d_bias_relu_grad(
            torch.cuda.current_stream().cuda_stream, problem, *addresses.values(), space, choices
        )  # fmt: skip

    def cudnn(self):
        x = self.x if self.skip is None else torch.cat([self.x, crop_like(self.skip, self.x)], -1)
        x, w, dy = x.permute(0, 3, 1, 2), self.kernel.permute(3, 2, 0, 1), self.dy.permute(0, 3, 1, 2)
        w = w.contiguous(memory_format=torch.channels_last)
        fused, grad = torch.ops.aten.cudnn_convolution_relu, torch.ops.aten.convolution_backward
        common = (dy, x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        return {
            "fprop": lambda: fused(x, w, self.bias, [1, 1], [0, 0], [1, 1], 1),
            "dgrad": lambda: grad(*common, [True, False, False]),
            "wgrad": lambda: grad(*common, [False, True, False]),
        }


class Transposed(Layer):
    """Transposed convolution, 3x3, stride 2."""

    def __init__(self, batch, side, channels, filters, dtype):
        super().__init__()
        self.x, self.kernel = (
            random(batch, side, side, channels, dtype=dtype),
            random(3, 3, filters, channels, dtype=dtype),
        )
        self.bias, self.y = random(filters, dtype=dtype), random(batch, 2 * side, 2 * side, filters, dtype=dtype)
        self.dy, self.dx = torch.randn_like(self.y), self.x.clone()
        self.dkernel, self.dbias = self.kernel.clone(), self.bias.clone()
        self.problem = transpose_problem(self.x, self.kernel, relu=True)
        # In the network a convolution consumes y, and has masked dy.
        self.problem.dy_is_masked = self.problem.input_is_relu = True
        self.name = f"{side} {channels}>{filters} up"
        self.flops = 2 * 9 * channels * filters * batch * side * side

    def forward(self, choices):
        space = self.workspace(native.conv2d_transpose_bias_relu_workspace_bytes(self.problem, choices))
        native.conv2d_transpose_bias_relu(
            torch.cuda.current_stream().cuda_stream, self.problem, *self.addresses("x", "kernel", "bias", "y"), space,
            choices,
        )  # fmt: skip

    def backward(self, choices, *, dx, fused):
        space = self.workspace(native.conv2d_transpose_bias_relu_grad_workspace_bytes(self.problem, choices))
        dy, y, x, kernel, dx_, dkernel, dbias = self.addresses("dy", "y", "x", "kernel", "dx", "dkernel", "dbias")
        native.conv2d_transpose_bias_relu_grad(
            torch.cuda.current_stream().cuda_stream, self.problem, dy, y, x, kernel, dx_ if dx else 0, dkernel, dbias,
            space, choices,
        )  # fmt: skip

    def cudnn(self):
        x, w, dy = self.x.permute(0, 3, 1, 2), self.kernel.permute(3, 2, 0, 1), self.dy.permute(0, 3, 1, 2)
        w = w.contiguous(memory_format=torch.channels_last)
        grad = torch.ops.aten.convolution_backward
        common = (dy, x, w, None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1)
        return {
            "fprop": lambda: torch.conv_transpose2d(x, w, None, 2, 1, 1),
            "dgrad": lambda: grad(*common, [True, False, False]),
            "wgrad": lambda: grad(*common, [False, True, False]),
        }


def whole_ops(batch, dtype, choices):
    """Functions of the ops that are no large matrix product, by name: first and last layer, pooling, loss."""
    stream = torch.cuda.current_stream
    first = Convolution(batch, 572, 1, 0, 64, 0, dtype, first=True)
    last = Convolution(batch, 388, 64, 0, 2, 0, dtype, kernel_size=1, relu=False)
    for name, layer in (("first layer", first), ("last layer", last)):
        yield name, lambda layer=layer: layer.forward(choices)
        yield f"{name}, gradient", lambda layer=layer: layer.backward(choices, dx=layer is last, fused=False)

    x, pooled = random(batch, 388, 388, 64, dtype=dtype), random(batch, 194, 194, 64, dtype=dtype)
    dx, (n, h, w, c), kind = x.clone(), x.shape, str(dtype).removeprefix("torch.")
    yield (
        "max pool, 388 64 channels",
        lambda: native.max_pool2d(stream().cuda_stream, kind, n, h, w, c, x.data_ptr(), pooled.data_ptr()),
    )
    arrays = [t.data_ptr() for t in (x, pooled, dx)]
    yield "max pool, gradient", lambda: native.max_pool2d_grad(stream().cuda_stream, kind, n, h, w, c, *arrays)

    logits = last.y
    labels = torch.randint(0, 2, logits.shape[:3], device=DEVICE, dtype=torch.uint8)
    weights, loss, dloss = (torch.ones(count, device=DEVICE) for count in (2, batch, batch))
    sums, ce, dlogits = torch.ones(batch, 3, 2, device=DEVICE), torch.ones(batch, 2, device=DEVICE), logits.clone()
    problem = loss_problem(labels, logits, {})
    space = torch.empty(native.dice_cross_entropy_workspace_bytes(problem), dtype=torch.uint8, device=DEVICE)
    inputs = [t.data_ptr() for t in (labels, logits, weights)]
    outputs = [t.data_ptr() for t in (loss, sums, ce)]
    yield (
        "loss",
        lambda: native.dice_cross_entropy(stream().cuda_stream, problem, *inputs, *outputs, space.data_ptr()),
    )
    yield (
        "loss, gradient",
        lambda: native.dice_cross_entropy_grad(
            stream().cuda_stream, problem, dloss.data_ptr(), *inputs, *outputs[1:], dlogits.data_ptr()
        ),
    )


def layers(batch, dtype):
    """The layers in the order in which they run forward, made one at a time."""
    down, up = LAYERS[:9], LAYERS[9:]
    for shape in down:
        yield Convolution(batch, *shape, dtype)
    for i, shape in enumerate(TRANSPOSED):
        yield Transposed(batch, *shape, dtype)
        for pair in up[2 * i : 2 * i + 2]:
            yield Convolution(batch, *pair, dtype)


def measure(layer, engines, peak):
    """Rows of a layer: each product on each engine, and "rest", what its gradient takes beside the two products."""
    functions = {("cudnn", name): function for name, function in layer.cudnn().items()}
    for engine in engines:
        ours = layer.functions(tuning(engine=engine))
        functions |= {(engine, name): function for name, function in ours.items()}
    ms, measured = times_in_turn(functions), layer.measured()
    rows = []
    for engine in engines:
        both = ms[engine, "dgrad + wgrad"]
        ours = {"fprop": ms[engine, "fprop"], "dgrad": both - ms[engine, "wgrad"], "wgrad": ms[engine, "wgrad"]}
        for product in PRODUCTS:
            tflops, cudnn = layer.flops / ours[product] / 1e9, ms["cudnn", product]
            row = {"layer": layer.name, "product": product, "engine": engine, "ms": round(ours[product], 4)}
            row |= {"tflops": round(tflops, 1), "peak": round(tflops / peak, 3)}
            row |= {"cudnn_ms": round(cudnn, 4), "ratio": round(cudnn / ours[product], 3)}
            rows.append(row | against_fused(measured[product], engine))
        rest = max(ms[engine, "gradient"] - both, 0)
        rows.append({"layer": layer.name, "product": "rest", "engine": engine, "ms": round(rest, 4)})
    return rows


def against_fused(timings, engine):
    """What a row says of cuDNN's plans with the same fusion; nothing in a build without the cudnn engine."""
    fastest = {}
    for timing in timings:
        fastest[timing.engine] = min(timing.microseconds, fastest.get(timing.engine, math.inf))
    if "cudnn" not in fastest or engine not in {"auto", *fastest}:
        return {}
    ours = timings[0].microseconds if engine == "auto" else fastest[engine]
    fused, tuned = fastest["cudnn"], min(fastest.values())
    return {"fused_cudnn_ms": round(fused / 1e3, 4), "fused": round(fused / ours, 3), "tuned": round(fused / tuned, 3)}


def line(rows, engine):
    """A line of the table from the rows of a layer: three products, then the rest."""
    *products, rest = (row for row in rows if row["engine"] == engine)
    ratios = [f"{r['ratio']:5.2f} {r.get('fused', math.nan):5.2f} {r.get('tuned', math.nan):5.2f}" for r in products]
    cells = [f"{r['ms']:7.3f} {r['tflops']:4.0f} {x} {r['peak']:4.0%}" for r, x in zip(products, ratios, strict=True)]
    return f"{rows[0]['layer']:>16} {engine:>6} | {' | '.join(cells)} | {rest['ms']:.3f}"


def sums(rows, engine, peak):
    """Rows like those of a layer, of the sums over all layers."""
    summed = []
    for product in PRODUCTS:
        chosen = [row for row in rows if (row["engine"], row["product"]) == (engine, product)]
        ms, cudnn = (sum(row[key] for row in chosen) for key in ("ms", "cudnn_ms"))
        tflops = sum(row["ms"] * row["tflops"] for row in chosen) / ms
        row = {"layer": "sum", "product": product, "engine": engine, "ms": ms, "tflops": tflops}
        row |= {"peak": tflops / peak, "cudnn_ms": cudnn, "ratio": cudnn / ms}
        if all("fused" in each for each in chosen):
            fused = sum(each["fused_cudnn_ms"] for each in chosen)
            row |= {
                key: fused / sum(each["fused_cudnn_ms"] / each[key] for each in chosen) for key in ("fused", "tuned")
            }
        summed.append(row)
    rest = sum(row["ms"] for row in rows if (row["engine"], row["product"]) == (engine, "rest"))
    return [*summed, {"layer": "sum", "product": "rest", "engine": engine, "ms": rest}]


def print_tiles(layer):
    """Times of a layer on every tile of every engine, those of one product side by side."""
    for engine, counts in engine_tiles().items():
        for kind, wanted in (("gemm", ("fprop", "dgrad + wgrad")), ("wgrad", ("wgrad",))):
            functions = {
                (tile, name): layer.functions(tuning(engine=engine, **{kind: tile}))[name]
                for tile in range(counts[kind])
                for name in wanted
            }
            ms = times_in_turn(functions)
            for name in wanted:
                listed = " ".join(f"{ms[tile, name]:7.3f}" for tile in range(counts[kind]))
                print(f"{'':>16} | {engine} {kind} tiles, {name}: {listed}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE too")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument(
        "--engines", nargs="+", choices=["auto", *engine_tiles()], default=["auto"], help="default auto"
    )
    parser.add_argument("--tiles", action="store_true", help="also time every tile")
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    facts = {"card": torch.cuda.get_device_name(), "driver": record.driver(), "versions": record.versions("torch")}
    facts |= {"cudnn": torch.backends.cudnn.version(), "fingerprint": record.sources_fingerprint()}
    facts |= {"batch": arguments.batch, "dtype": arguments.dtype, "gemm_tflops": round(gemm_tflops(dtype), 1)}
    peak = facts["gemm_tflops"]
    print(f"{facts['card']}, batch {arguments.batch}, {arguments.dtype}, matrix product {peak:.0f} TFLOP/s")
    head = "     ms TF/s ratio fused tuned peak"
    print(f"{'':>16} {'':>6} | " + " | ".join(f"{product:>{len(head)}}" for product in PRODUCTS) + " |")
    print(f"{'layer':>16} {'engine':>6} | " + " | ".join([head] * 3) + " | rest, ms")
    rows = []
    for layer in layers(arguments.batch, dtype):
        measured = measure(layer, arguments.engines, peak)
        rows += measured
        for engine in arguments.engines:
            print(line(measured, engine), flush=True)
        if arguments.tiles:
            print_tiles(layer)
    for engine in arguments.engines:
        print(line(sums(rows, engine, peak), engine))
    ops = [(name, times_in_turn({name: call})[name]) for name, call in whole_ops(arguments.batch, dtype, tuning())]
    for name, ms in ops:
        print(f"{name:>25} | {ms:.4f} ms")
    if arguments.json:
        others = [{"op": name, "ms": round(ms, 4)} for name, ms in ops]
        record.save(arguments.json, facts | {"rows": rows, "others": others})


if __name__ == "__main__":
    main()
