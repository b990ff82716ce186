"""Every GPU kernel once, small, for compute-sanitizer: see docs/testing.md.

    PYTHONPATH=. python3 tests/gpu/small_pass.py [--only NAME] [--once] [--engines NAME ...] [--part I/N]

Goes over every engine and tile, the slow paths of odd channel counts, first and last layer, transposed convolutions,
pooling and loss, forward and gradient, in float16 and, from compute capability 8.0, bfloat16. Results must be finite
and the same to the bit in two runs, of which one finds NaN in outputs and workspace and the other ones: what is read before
it is written, or not written at all, shows. Whether results are right is tested in test_kernels.py.

It uses neither PyTorch nor TensorFlow: their start takes minutes under a sanitizer, and their allocators hand out parts of
large blocks, beyond whose ends nothing is noticed. Every array is an allocation of its own. With --once outputs and
workspace are left as they come, so that initcheck sees for itself what is read before it is written, and an output that is
not written in full when it is copied back.
"""

import argparse
import ctypes
import hashlib
import math
import os
import sys

import native
import numpy as np

_COMPUTE_CAPABILITY_MAJOR = 75  # of the driver's CUdevice_attribute
FILLINGS = (0xFF, 0x3F)  # NaN in every type; 1.8 in float16, 0.75 in bfloat16 and float32


class Device:
    """Memory of the first GPU, through the driver's own library: the CUDA runtime's has another name in every version."""

    def __init__(self):
        self._driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        # The primary context is the one that the kernels' own runtime uses.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        major = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
        self.dtypes = ("float16", "bfloat16") if major.value >= 8 else ("float16",)

    def _call(self, name, *arguments):
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} gave CUDA error {status}")

    def allocate(self, size):
        """Address of `size` bytes, not initialised."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def write(self, address, array):
        pointer = array.ctypes.data_as(ctypes.c_void_p)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), pointer, ctypes.c_size_t(array.nbytes))

    def read(self, address, array):
        """Fills a NumPy array; waits for the kernels before it."""
        pointer = array.ctypes.data_as(ctypes.c_void_p)
        self._call("cuMemcpyDtoH_v2", pointer, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def fill(self, address, size, byte):
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(byte), ctypes.c_size_t(size))

    def wait(self):
        self._call("cuCtxSynchronize")

    def free(self, address):
        self._call("cuMemFree_v2", ctypes.c_uint64(address))


class Arrays:
    """The arrays of one run of a case: inputs from a seed, outputs to be read at the end.

    Args:
        device: Device.
        dtype: "float16" or "bfloat16", that of `values` and `output` unless they are told another.
        filling: every byte of outputs and workspace before a kernel writes there; None to leave them as they come.
    """

    def __init__(self, device, dtype, filling=None):
        self.dtype = dtype
        self._filling = filling
        self._device = device
        self._random = np.random.default_rng(0)
        self._addresses = []
        self._outputs = []  # (address, shape, NumPy dtype)

    def _allocate(self, size):
        self._addresses.append(self._device.allocate(max(size, 1)))  # an empty array has an address too
        return self._addresses[-1]

    def array(self, array):
        """Address of a copy of a NumPy array."""
        address = self._allocate(array.nbytes)
        if array.nbytes:
            self._device.write(address, np.ascontiguousarray(array))
        return address

    def values(self, *shape, scale=1.0):
        """Address of normally distributed values."""
        values = (scale * self._random.standard_normal(shape)).astype(np.float32)
        if self.dtype == "float16":
            return self.array(values.astype(np.float16))
        return self.array((values.view(np.uint32) >> 16).astype(np.uint16))

    def labels(self, *shape, classes, dtype):
        return self.array(self._random.integers(0, classes, shape).astype(dtype))

    def output(self, *shape, dtype=None):
        """Address of an array for a kernel to write in full."""
        dtype = np.dtype(dtype or ("float16" if self.dtype == "float16" else "uint16"))
        address = self._filled(math.prod(shape) * dtype.itemsize)
        self._outputs.append((address, shape, dtype))
        return address

    def workspace(self, size):
        return self._filled(size) if size else 0

    def _filled(self, size):
        address = self._allocate(size)
        if size and self._filling is not None:
            self._device.fill(address, size, self._filling)
        return address

    def digest(self):
        """Hash of all outputs.

        Raises:
            AssertionError: one is not finite.
        """
        self._device.wait()
        digest = hashlib.sha256()
        for number, (address, shape, dtype) in enumerate(self._outputs):
            result = np.empty(shape, dtype)
            if result.nbytes:
                self._device.read(address, result)
            digest.update(result.tobytes())
            if dtype == np.uint16:
                result = (result.astype(np.uint32) << 16).view(np.float32)
            if not np.isfinite(result).all():
                raise AssertionError(f"output {number} of shape {shape} is not finite")
        return digest.hexdigest()

    def free(self):
        for address in self._addresses:
            self._device.free(address)


STREAM = 0  # the default one


def conv2d(kernels, size, channels, filters, k=3, skip=None, choices=None, left_out=(), window=None, **flags):
    """A case: forward pass and gradient of a convolution.

    `skip` is (height, width, channels), `left_out` has "dx" or "dskip" or both, `window` is dy's (height, width) where
    it is less than y's; the rest as in problem.h.
    """
    choices = choices or native.tuning(kernels)
    n, h, w = size
    sh, sw, sc = skip or (0, 0, 0)

    def run(arrays):
        p = kernels.Conv2DProblem()
        p.dtype, p.batch, p.height, p.width, p.channels = arrays.dtype, n, h, w, channels
        p.skip_height, p.skip_width, p.skip_channels, p.kernel_size, p.filters = sh, sw, sc, k, filters
        for name, value in flags.items():
            setattr(p, name, value)
        shrink = 0 if p.same else k - 1
        out = (n, h - shrink, w - shrink, filters)
        half = (n, out[1] // 2, out[2] // 2, filters)
        x, kernel_shape = arrays.values(n, h, w, channels), (k, k, channels + sc, filters)
        s = arrays.values(n, sh, sw, sc) if skip else 0
        kernel, bias = arrays.values(*kernel_shape, scale=(k * k * (channels + sc)) ** -0.5), arrays.values(filters)
        y, pooled = arrays.output(*out), arrays.output(*half) if p.pool else 0
        space = arrays.workspace(kernels.conv2d_bias_relu_workspace_bytes(p, choices))
        kernels.conv2d_bias_relu(STREAM, p, x, s, kernel, bias, y, pooled, space, choices)
        p.dy_height, p.dy_width = window or out[1:3]
        dy = arrays.values(n, p.dy_height, p.dy_width, filters)
        dpooled = arrays.values(*half) if p.pool else 0
        dx = 0 if "dx" in left_out else arrays.output(n, h, w, channels)
        dskip = arrays.output(n, h, w, sc) if skip and "dskip" not in left_out else 0
        dkernel, dbias = arrays.output(*kernel_shape), arrays.output(filters)
        space = arrays.workspace(kernels.conv2d_bias_relu_grad_workspace_bytes(p, choices))
        kernels.conv2d_bias_relu_grad(
            STREAM, p, dy, dpooled, y, x, s, kernel, dx, dskip, dkernel, dbias, space, choices
        )

    return run


def conv2d_transpose(kernels, size, channels, filters, k=3, choices=None, left_out=(), **flags):
    """A case: forward pass and gradient of a transposed convolution; arguments as of conv2d."""
    choices = choices or native.tuning(kernels)
    n, h, w = size

    def run(arrays):
        p = kernels.Conv2DTransposeProblem()
        p.dtype, p.batch, p.height, p.width, p.channels = arrays.dtype, n, h, w, channels
        p.kernel_size, p.filters = k, filters
        for name, value in flags.items():
            setattr(p, name, value)
        x, kernel = arrays.values(n, h, w, channels), arrays.values(k, k, filters, channels, scale=channels**-0.5)
        bias, y = arrays.values(filters), arrays.output(n, 2 * h, 2 * w, filters)
        space = arrays.workspace(kernels.conv2d_transpose_bias_relu_workspace_bytes(p, choices))
        kernels.conv2d_transpose_bias_relu(STREAM, p, x, kernel, bias, y, space, choices)
        dy, dx = arrays.values(n, 2 * h, 2 * w, filters), 0 if "dx" in left_out else arrays.output(n, h, w, channels)
        dkernel, dbias = arrays.output(k, k, filters, channels), arrays.output(filters)
        space = arrays.workspace(kernels.conv2d_transpose_bias_relu_grad_workspace_bytes(p, choices))
        kernels.conv2d_transpose_bias_relu_grad(STREAM, p, dy, y, x, kernel, dx, dkernel, dbias, space, choices)

    return run


def max_pool2d(kernels, n, h, w, c):
    """A case: max pooling and its gradient."""

    def run(arrays):
        x, y = arrays.values(n, h, w, c), arrays.output(n, h // 2, w // 2, c)
        kernels.max_pool2d(STREAM, arrays.dtype, n, h, w, c, x, y)
        dy, dx = arrays.values(n, h // 2, w // 2, c), arrays.output(n, h, w, c)
        kernels.max_pool2d_grad(STREAM, arrays.dtype, n, h, w, c, x, dy, dx)

    return run


def cast(kernels, *sizes):
    """A case: float32 arrays of these sizes to the 16-bit type."""

    def run(arrays):
        pairs = [(arrays.array(np.ones(n, np.float32)), arrays.output(n), n) for n in sizes]
        kernels.cast(STREAM, arrays.dtype, pairs)

    return run


def dice_cross_entropy(kernels, batch, pixels, classes, label_type, **flags):
    """A case: the loss and its gradient."""

    def run(arrays):
        p = kernels.DiceCrossEntropyProblem()
        p.dtype, p.label_type, p.batch, p.pixels, p.classes = arrays.dtype, label_type, batch, pixels, classes
        for name, value in flags.items():
            setattr(p, name, value)
        labels = arrays.labels(batch, pixels, classes=classes, dtype=label_type)
        logits, weights = arrays.values(batch, pixels, classes), arrays.array(np.ones(classes, np.float32))
        shapes = [(batch,), (batch, 3, classes), (batch, 2)]
        loss, sums, ce = (arrays.output(*shape, dtype="float32") for shape in shapes)
        space = arrays.workspace(kernels.dice_cross_entropy_workspace_bytes(p))
        kernels.dice_cross_entropy(STREAM, p, labels, logits, weights, loss, sums, ce, space)
        dloss, dlogits = arrays.array(np.ones(batch, np.float32)), arrays.output(batch, pixels, classes)
        kernels.dice_cross_entropy_grad(STREAM, p, dloss, labels, logits, weights, sums, ce, dlogits)

    return run


def cases(kernels, engines):
    """Dict from a case's name to a function of its Arrays that launches its kernels; `engines` are those to go over."""
    made = {}

    def add(name, make, *arguments, **options):
        made[f"{make.__name__}: {name}"] = make(kernels, *arguments, **options)

    for engine, counts in engines.items():
        # Of cuDNN's plans one: what is ours lies before and after it.
        for i in range(1 if engine == "cudnn" else max(counts.values())):
            forced = {kind: i for kind, count in counts.items() if i < count}
            for splits in (1, 3):
                choices = native.tuning(kernels, engine=engine, splits=splits, **forced)
                name = f"{engine}, tile {i}, splits {splits}"
                both = {"choices": choices, "input_is_relu": True}
                masked = {"same": True, "dy_is_masked": True, **both}
                add(f"{name}, skip", conv2d, (1, 9, 12), 72, 136, skip=(13, 15, 64), **masked)
                add(f"{name}, pool", conv2d, (1, 10, 12), 72, 136, pool=True, **both)
                for k in (2, 3):
                    add(f"{name}, {k}x{k}", conv2d_transpose, (1, 5, 7), 72, 136, k=k, **both)
        # More tiles than any card runs at once.
        choices = native.tuning(kernels, engine=engine)
        add(f"{engine}, larger than the card", conv2d, (1, 282, 282), 8, 8, pool=True, choices=choices)

    if "sm90" in engines:
        for i in range(engines["sm90"]["gemm"]):  # enough channels for four blocks to share a sum
            choices = native.tuning(kernels, engine="sm90", gemm=i)
            for pool in (False, True):
                name = f"sm90, tile {i}, many channels, {'pool' if pool else 'no pool'}"
                add(name, conv2d, (1, 9, 12), 200, 72, pool=pool, choices=choices)
    add("uneven", cast, 1, 64, 8193, 40000)
    both = {"input_is_relu": True, "dy_is_masked": True}
    add("narrow", conv2d, (2, 9, 50), 64, 64, **both)
    add("narrow, pool", conv2d, (1, 11, 58), 64, 40, same=True, pool=True, input_is_relu=True)
    add("narrow, two groups of filters", conv2d, (2, 8, 66), 64, 128, **both)
    add("narrow, two groups of channels", conv2d, (2, 8, 30), 128, 64, **both)
    add("narrow, skip", conv2d, (1, 9, 20), 64, 64, skip=(13, 25, 64), **both)
    add("narrow, larger than the card", conv2d, (2, 160, 130), 64, 64, pool=True, **both)
    for left_out in (("dx",), ("dskip",), ("dx", "dskip")):
        add(f"no {', no '.join(left_out)}", conv2d, (2, 9, 10), 24, 48, skip=(12, 13, 40), left_out=left_out)
    add("no dx", conv2d, (2, 9, 10), 24, 48, left_out=("dx",))
    add("dy masked, pool", conv2d, (2, 9, 10), 64, 64, pool=True, dy_is_masked=True)
    add("dy masked, valid", conv2d, (2, 9, 10), 64, 64, dy_is_masked=True)
    add("skip, pool", conv2d, (2, 9, 10), 64, 72, skip=(9, 13, 8), same=True, pool=True)
    add("dy of the centre, pool", conv2d, (2, 9, 10), 64, 64, pool=True, window=(4, 5), input_is_relu=True)
    add("dy of the centre, masked", conv2d, (2, 9, 10), 64, 64, window=(3, 8), dy_is_masked=True)
    add("dy of the centre, odd channels", conv2d, (2, 9, 10), 12, 11, window=(1, 2), pool=True)
    add("1x1", conv2d, (2, 9, 10), 64, 72, k=1)
    add("1x1, skip, pool", conv2d, (2, 9, 10), 16, 24, k=1, skip=(11, 13, 8), pool=True)
    add("no activation, dy as it comes", conv2d, (2, 7, 9), 40, 24, same=True, relu=False)
    add("empty batch", conv2d, (0, 9, 10), 16, 24)
    add("odd channels", conv2d, (2, 10, 9), 12, 20, same=True, pool=True, input_is_relu=True)
    add("odd channels, skip", conv2d, (2, 10, 9), 9, 11, skip=(13, 12, 5), input_is_relu=True)
    add("odd skip channels, 1x1", conv2d, (2, 10, 9), 8, 16, k=1, skip=(12, 12, 3))
    add("few channels", conv2d, (1, 60, 62), 1, 64)
    add("few channels, no dx, dy masked", conv2d, (2, 11, 9), 1, 64, left_out=("dx",), dy_is_masked=True)
    add("three channels, odd filters", conv2d, (2, 11, 9), 3, 10, same=True, input_is_relu=True)
    add("few channels, same, pool", conv2d, (2, 11, 9), 3, 64, same=True, pool=True)
    add("few channels, odd filters", conv2d, (2, 10, 12), 7, 70, relu=False, pool=True)
    add("few channels, 1x1", conv2d, (2, 10, 12), 5, 24, k=1)
    add("four channels, dy as it comes", conv2d, (2, 21, 19), 4, 72, same=True, relu=False)
    for channels, filters in ((64, 2), (72, 3), (72, 5), (13, 1), (13, 4), (13, 8)):
        add(f"few filters, {channels}>{filters}", conv2d, (2, 30, 31), channels, filters, k=1, input_is_relu=True)
    add("few filters, no dx, dy masked", conv2d, (2, 9, 10), 64, 2, k=1, left_out=("dx",), dy_is_masked=True)
    add("few filters, no activation", conv2d, (2, 9, 10), 64, 2, k=1, relu=False)
    add("2x2", conv2d_transpose, (2, 5, 6), 64, 40, k=2)
    add("narrow", conv2d_transpose, (2, 5, 58), 128, 64)
    add("narrow, larger than the card", conv2d_transpose, (1, 90, 100), 72, 40)
    add("no dx", conv2d_transpose, (2, 5, 6), 64, 40, left_out=("dx",))
    add("3x3, dy masked", conv2d_transpose, (2, 5, 6), 64, 40, dy_is_masked=True, input_is_relu=True)
    add("odd channels", conv2d_transpose, (3, 5, 4), 12, 7)
    add("odd channels, 2x2, no activation", conv2d_transpose, (3, 5, 4), 5, 8, k=2, relu=False)
    add("even", max_pool2d, 2, 8, 10, 64)
    add("odd", max_pool2d, 2, 7, 9, 3)
    add("odd size", max_pool2d, 2, 7, 9, 8)
    add("one row", max_pool2d, 1, 1, 4, 8)
    add("one class", dice_cross_entropy, 3, 61, 1, "int32")
    add("two classes", dice_cross_entropy, 2, 3000, 2, "uint8")
    add("plain sums, smoothed labels", dice_cross_entropy, 2, 500, 5, "int32", squared=False, label_smoothing=0.1)
    ignored = {"has_ignore_class": True, "ignore_class": 3, "include_background": False}
    add("an ignored class", dice_cross_entropy, 2, 500, 11, "int64", **ignored)
    return made


def digest(device, dtype, run, filling):
    """Runs a case on memory of its own; the hash of its outputs."""
    arrays = Arrays(device, dtype, filling)
    try:
        run(arrays)
        return arrays.digest()
    finally:
        arrays.free()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help="only the cases whose names contain NAME")
    parser.add_argument("--once", action="store_true", help="run a case once, not twice to compare")
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="only these, as far as the build has them")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only each N-th case, from the I-th on")
    asked = parser.parse_args()
    part, parts = map(int, asked.part.split("/"))
    kernels = native.load_kernels()
    engines = native.tiles(kernels)
    if asked.engines:
        engines = {name: counts for name, counts in engines.items() if name in asked.engines}
        if not engines:
            parser.error(f"expected engines of {', '.join(native.tiles(kernels))}, got {', '.join(asked.engines)}")
        # Where a case asks for none, too; what it does not serve runs on wmma. Read when the first kernel is launched.
        os.environ["UNET_FAST_ENGINE"] = next(name for name in asked.engines if name in engines)
    device, failed = Device(), 0
    chosen = [(name, run) for name, run in cases(kernels, engines).items() if asked.only in name]
    chosen = dict(chosen[part - 1 :: parts])
    for name, run in chosen.items():
        for dtype in device.dtypes:
            try:
                first, *others = [digest(device, dtype, run, byte) for byte in ((None,) if asked.once else FILLINGS)]
                outcome = "two runs differ" if any(other != first for other in others) else ""
            except (AssertionError, RuntimeError) as error:
                outcome = str(error)
            if outcome:
                failed += 1
                print(f"{name}, {dtype}: {outcome}", file=sys.stderr)
    print(f"{len(chosen)} cases in {len(device.dtypes)} dtypes: {failed or 'none'} failed")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
