"""What this installation is, what this machine has, what will run on it and why, and whether it works."""

import platform
from pathlib import Path

import keras
import numpy as np
import rich.console
import rich.table
import tensorflow as tf

from unet_fast import __version__, _library, choices, ops, reference, tuning
from unet_fast._fingerprint import source_fingerprint
from unet_fast.errors import UserError
from unet_fast.layers import GPU_DTYPES, use_fused
from unet_fast.models import FusedUNet

_ROUNDING = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # float32: sums of 200 terms in another order
_DTYPES = tuple(_ROUNDING)


def collect(layers_batch=None):
    """All that `unet-fast info` says, as JSON takes it.

    Args:
        layers_batch: images a step, to have `layers` as well; None for no.

    Returns:
        dict: `versions` of unet_fast, tensorflow, keras, numpy and python; `library`: available, reason (why not), cuda;
        `build`: what `unet_fast._native` says of itself, or None; `source`: `fingerprint` of the native sources beside
        the package, or None where it is installed without them, and `matches_build`; `gpus` that TensorFlow sees;
        `tuning`: `path` of this GPU's file of measured choices and how many `products` it has, or None without a GPU;
        `engines`: what backend "auto" takes for each dtype here, and why; `self_test`: see there; `self_test_passed`;
        `layers`, if asked for: `compute_capability` of the first GPU, or of the first architecture built for, `present`,
        whether it is a GPU's, `batch`, `dtype`, `reason` why there are none or None, and `rows`, what
        `unet_fast.choices.layer_choices` says of the reference network.

    >>> from unet_fast import info
    >>> sorted(info.collect())
    ['build', 'engines', 'gpus', 'library', 'self_test', 'self_test_passed', 'source', 'tuning', 'versions']
    """
    library, build = _library.status(), _build()
    fingerprint = source_fingerprint(Path(__file__).parent.parent)
    tests = self_test()
    collected = {
        "versions": {
            "unet_fast": __version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "library": library._asdict(),
        "build": build,
        "source": {
            "fingerprint": fingerprint,
            "matches_build": None if fingerprint is None or build is None else fingerprint == build["fingerprint"],
        },
        "gpus": [_gpu(device) for device in tf.config.list_physical_devices("GPU")],
        "tuning": _tuning(),
        "engines": {dtype: _engine(dtype) for dtype in _DTYPES},
        "self_test": tests,
        "self_test_passed": all(test["passed"] for test in tests),
    }
    if layers_batch is not None:
        collected["layers"] = _layers(collected, layers_batch)
    return collected


def _layers(collected, batch):
    present = next((gpu["compute_capability"] for gpu in collected["gpus"] if gpu["compute_capability"]), None)
    built = (collected["build"] or {}).get("cuda_architectures") or []
    digits = "".join(filter(str.isdigit, built[0].split("-")[0])) if built else ""
    capability = present or (f"{digits[:-1]}.{digits[-1]}" if digits else None)
    layers = {"compute_capability": capability, "present": present is not None, "batch": batch, "dtype": "float16"}
    if not built:
        return layers | {"reason": "the library was built without CUDA", "rows": []}
    network = FusedUNet(backend="fused", dtype="mixed_float16")
    rows = choices.layer_choices(network, batch, int(capability.replace(".", "")), "float16")
    return layers | {"reason": None, "rows": rows}


def _build():
    try:
        from unet_fast import _native
    except ImportError:
        return None
    gpus, gpus_missing = _native.gpu_devices()
    return {
        "tensorflow": _native.tensorflow_version,
        "compiler": _native.compiler,
        "cuda": _native.cuda,
        "cuda_version": _native.cuda_version or None,
        "cuda_architectures": [a for a in _native.cuda_architectures.replace(",", ";").split(";") if a],
        "cpu_isa": _native.cpu_isa(),
        "gpu_devices": gpus,
        "gpu_devices_missing": gpus_missing or None,
        "fingerprint": _native.fingerprint,
    }


def _tuning():
    file = tuning.path() if _library.status().cuda else None
    return None if file is None else {"path": str(file), "products": len(tuning.read(file))}


def _gpu(device):
    details = tf.config.experimental.get_device_details(device)
    capability = details.get("compute_capability")
    return {
        "name": details.get("device_name", device.name),
        "compute_capability": None if capability is None else ".".join(map(str, capability)),
    }


def _engine(dtype):
    """What backend "auto" takes for a dtype, and why: the reasons of `unet_fast.layers.use_fused` in words."""
    library, gpu = _library.status(), bool(tf.config.list_physical_devices("GPU"))
    try:
        fused = use_fused("auto", dtype)
    except UserError as error:  # UNET_FAST_REQUIRE_KERNELS=1
        return {"engine": None, "why": str(error)}
    if fused:
        why = (
            "a GPU and a build with CUDA"
            if gpu
            else "no GPU; on a CPU the fused ops are the faster under XLA, and from 64 filters on in multiples of 16"
        )
    elif not library.available:
        why = library.reason
    elif gpu and not library.cuda:
        why = "this machine has a GPU and the library was built without CUDA"
    elif gpu:
        why = f"on a GPU the fused ops take {' and '.join(GPU_DTYPES)}"
    else:
        why = "no GPU; on a CPU stock TensorFlow is the faster in half precision"
    return {"engine": "fused" if fused else "stock", "why": why}


def self_test():
    """Run every op, forward and backward, on a small example in every dtype, and compare it with `unet_fast.reference`.

    An op passes if it is at most twice as far from the float32 reference as stock TensorFlow in the op's own dtype is,
    and a rounding of the largest value more.

    Returns:
        list of dict: `op`, `dtype`, `device`, `passed`, and `detail`, the error or what it raised.

    >>> from unet_fast import info
    >>> sorted({test["op"] for test in info.self_test()})
    ['conv2d_bias_relu', 'conv2d_transpose_bias_relu', 'dice_cross_entropy', 'max_pool2d']
    """
    library = _library.status()
    device = "GPU:0" if library.cuda and tf.config.list_physical_devices("GPU") else "CPU:0"
    tests = []
    for op, (inputs, call) in _examples().items():
        for dtype in _DTYPES:
            if library.available:
                passed, detail = _compare(inputs, call, dtype, device)
            else:
                passed, detail = False, f"not available: {library.reason}"
            tests.append({"op": op, "dtype": dtype, "device": device, "passed": passed, "detail": detail})
    return tests


def _examples():
    """Of each op, float32 inputs to differentiate by, and a call of it in a module: ops or reference."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    # Labels and pixels far apart: the classes' order and a pool's maximum must not hang on a rounding.
    labels = rng.integers(0, 3, (2, 12, 12)).astype(np.uint8)
    pixels = rng.permutation(2 * 12 * 12 * 8).reshape(2, 12, 12, 8).astype(np.float32) % 251 / 16
    return {
        "conv2d_bias_relu": (
            (normal(2, 12, 12, 8), normal(3, 3, 16, 16), normal(16), normal(2, 16, 16, 8)),
            lambda module, x, kernel, bias, skip: module.conv2d_bias_relu(x, kernel, bias, skip, pool=True),
        ),
        "conv2d_transpose_bias_relu": (
            (normal(2, 6, 6, 16), normal(3, 3, 8, 16), normal(8)),
            lambda module, x, kernel, bias: module.conv2d_transpose_bias_relu(x, kernel, bias),
        ),
        "max_pool2d": ((pixels,), lambda module, x: module.max_pool2d(x)),
        "dice_cross_entropy": (
            (normal(2, 12, 12, 3),),
            lambda module, logits: module.dice_cross_entropy(labels, logits),
        ),
    }


def _compare(inputs, call, dtype, device):
    """(whether an op is right, its error in words)."""
    try:
        with tf.device("CPU:0"):  # where no TF32 makes float32 less than that
            # Rounded to the dtype first, so that all three see the same inputs.
            inputs = [tf.cast(tf.cast(value, dtype), tf.float32) for value in inputs]
            exact = _values(reference, call, inputs, "float32")
        with tf.device(device):
            stock = _values(reference, call, inputs, dtype)
            fused = _values(ops, call, inputs, dtype)
    except (tf.errors.OpError, UserError, ImportError) as error:
        return False, " ".join(str(error).split())[:200]
    worst = 0.0
    for e, s, f in zip(exact, stock, fused, strict=True):
        allowed = 2 * np.abs(s - e).max() + np.abs(e).max() * _ROUNDING[dtype]
        if f.shape != e.shape or not np.isfinite(f).all():
            return False, f"a result is not finite, or of shape {f.shape} instead of {e.shape}"
        worst = max(worst, float(np.abs(f - e).max() / allowed))
    return worst <= 1, f"error {worst:.2f} of what is allowed"


def _values(module, call, inputs, dtype):
    """Outputs and gradients of a call in a dtype, as float32 arrays."""
    inputs = [tf.cast(value, dtype) for value in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = tf.nest.flatten(call(module, *inputs))
        total = tf.add_n([tf.reduce_sum(tf.cast(output, tf.float32)) for output in outputs])
    return [tf.cast(value, tf.float32).numpy() for value in (*outputs, *tape.gradient(total, inputs))]


def show(collected):
    """Print what `collect` returned."""
    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
    versions, library, build, source = (collected[key] for key in ("versions", "library", "build", "source"))
    lines = [
        ("unet_fast", f"{versions['unet_fast']}, Python {versions['python']}, NumPy {versions['numpy']}"),
        ("TensorFlow", f"{versions['tensorflow']}, Keras {versions['keras']}"),
        ("fused ops", "available" if library["available"] else f"not available: {library['reason']}"),
    ]
    if build:
        lines += _build_lines(build, source)
    gpus = [f"{gpu['name']}, compute capability {gpu['compute_capability']}" for gpu in collected["gpus"]]
    lines.append(("TensorFlow sees", "; ".join(gpus) or "no GPU"))
    if measured := collected["tuning"]:
        choices_of = f"{measured['products']} products chosen by {measured['path']}"
        lines.append(("tuning", choices_of if measured["products"] else "not measured; `unet-fast tune` does it"))
    for dtype, engine in collected["engines"].items():
        lines.append((f"auto, {dtype}", f"{engine['engine'] or 'error'}: {engine['why']}"))
    for name, text in lines:
        console.print(f"{name:<17}{text}")

    if "layers" in collected:
        _show_layers(console, collected["layers"])

    table = rich.table.Table("self-test", *_ROUNDING)
    cells = {}
    for test in collected["self_test"]:
        cells.setdefault(test["op"], []).append("ok" if test["passed"] else "FAILED")
    for op, results in cells.items():
        table.add_row(op, *results)
    console.print(table)
    for test in collected["self_test"]:
        if not test["passed"]:
            console.print(f"{test['op']}, {test['dtype']}, {test['device']}: {test['detail']}")
    outcome = "passed" if collected["self_test_passed"] else "FAILED"
    console.print(f"self-test on {collected['self_test'][0]['device']}: {outcome}")


def _show_layers(console, layers):
    if layers["reason"]:
        console.print(f"no layers: {layers['reason']}")
        return
    on = "this GPU" if layers["present"] else "no GPU here; as it would be"
    console.print(
        f"reference network, {layers['dtype']}, batch {layers['batch']}, compute capability "
        f"{layers['compute_capability']} ({on}):"
    )
    table = rich.table.Table("layer", "product", "engine", "how, or why")
    last = None
    for row in layers["rows"]:
        name = "" if row["layer"] == last else f"{row['layer']} {row['shape']}"
        table.add_row(name, row["product"], row["engine"], row["detail"])
        last = row["layer"]
    console.print(table)


def _build_lines(build, source):
    cuda = f"CUDA {build['cuda_version']} for {', '.join(build['cuda_architectures'])}" if build["cuda"] else "no CUDA"
    yield "built", f"by {build['compiler']} for TensorFlow {build['tensorflow']}, {cuda}"
    here = {None: "", True: ", as in this folder", False: f", but this folder holds {str(source['fingerprint'])[:16]}"}
    yield "sources", build["fingerprint"][:16] + here[source["matches_build"]]
    yield "CPU kernels", build["cpu_isa"]
    for gpu in build["gpu_devices"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        yield "CUDA device", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {memory}"
    if build["gpu_devices_missing"]:
        yield "CUDA device", f"none: {build['gpu_devices_missing']}"
