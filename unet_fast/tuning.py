"""Measuring on which engine and tile each product of a network's convolutions is the fastest on this machine's GPU.

What is found goes to a file a card, driver, cuDNN and build, which the kernels read once a process, when they meet their
first product (csrc/kernels/conv/tuning.h); where there is none they keep to their own rules.
"""

from pathlib import Path

import rich.console
import rich.progress
import rich.table

from unet_fast.choices import convolutions
from unet_fast.data.files import atomic_path
from unet_fast.errors import UserError

_FORMAT = "unet_fast tuning 1"
ENGINES = ("auto", "wmma", "sm90", "cudnn")  # what the kernels know
_WORTH = 0.98  # of the time by the rules: what is not faster than that may be noise, and is not chosen


def measure(model, batches, dtype, on_progress=None):
    """Time every product of a model's convolutions, forward and backward, on all engines and tiles that serve it.

    The process must not have used the GPU for anything else: TensorFlow leaves no memory for this.

    Args:
        model: Keras model with fused layers and inputs of known size; its own policy does not matter.
        batches: list of the images a step.
        dtype: "float16" or "bfloat16".
        on_progress: called with (products done, of so many layers in all).

    Returns:
        list of dict, a product each: `layer`, `product`, `batch`, `key`, as the file names it, `us` by the rules, `by_engine`,
        a dict from each engine that serves it to the `us` of its fastest tile or plan, `engine`, `config`, `splits` and
        `best_us` of the fastest - those of the rules where it gains less than 2 % - and `timings`, a list of
        (engine, config, splits, us), of the rules first.

    Raises:
        UserError: there is no GPU, the build has no CUDA, or the measurement failed.

    >>> from unet_fast import FusedUNet, _native, tuning
    >>> tuning.measure(FusedUNet((32, 32, 1), filters=8, depth=1, padding="same"), [], "float16") if _native.cuda else []
    []
    """
    gpu = _require_cuda()
    problems = [(batch, *found) for batch in batches for found in convolutions(model, batch, dtype)]
    rows = {}
    for done, (batch, layer, _, problem, transposed) in enumerate(problems):
        try:
            products = (gpu.measure_conv2d_transpose if transposed else gpu.measure_conv2d)(problem)
        except RuntimeError as error:
            raise UserError(
                f"tune: {layer.name} at batch {batch} could not be measured ({error}); use a smaller --batch, and "
                "nothing else on the GPU meanwhile"
            ) from error
        for product in products:
            timings = [(t.engine, t.config, t.splits, t.microseconds) for t in product.timings]
            names = {"layer": layer.name, "product": product.product, "batch": batch, "key": product.key}
            rows[product.key] = names | fastest(timings)
        if on_progress:
            on_progress(done + 1, len(problems))
    return list(rows.values())


def fastest(timings):
    """What follows from a product's timings.

    Args:
        timings: list of (engine, config, splits, us), of the rules first.

    Returns:
        dict of `us`, `by_engine`, `timings`, `engine`, `config`, `splits` and `best_us`, as `measure` has them.

    >>> from unet_fast import tuning
    >>> row = tuning.fastest([("sm90", 1, 0, 2.0), ("cudnn", 0, 0, 1.8)])
    >>> row["us"], row["engine"], row["best_us"]
    (2.0, 'cudnn', 1.8)
    """
    ours = timings[0]
    best = min(timings, key=lambda timing: timing[-1])
    engine, config, splits, best_us = best if best[-1] <= _WORTH * ours[-1] else ours
    return {
        "us": ours[-1],
        "by_engine": {engine: min(us for e, *_, us in timings if e == engine) for engine, *_ in timings},
        "timings": timings,
        "engine": engine,
        "config": config,
        "splits": splits,
        "best_us": best_us,
    }


def path():
    """The file that this process's kernels read, whether or not it exists.

    Returns:
        pathlib.Path, or None without a GPU.

    >>> from unet_fast import tuning
    >>> tuning.path() is None or tuning.path().suffix == ".tsv"
    True
    """
    from unet_fast import _native

    name = _native.gpu.tuning_path() if hasattr(_native, "gpu") else ""
    return Path(name) if name else None


def read(file):
    """The choices in a file.

    Args:
        file: pathlib.Path; it need not exist.

    Returns:
        dict from a product's key to (engine, config, splits); empty where there is no file, or one that the kernels ignore:
            a single line that they cannot have written, and none counts.

    >>> import pathlib
    >>> from unet_fast import tuning
    >>> tuning.read(pathlib.Path("no such file"))
    {}
    """
    try:
        first, *lines = file.read_text(encoding="utf-8").splitlines() or [""]
        found = [line.split("\t") for line in lines]
        choices = {key: (engine, int(config), int(splits)) for key, engine, config, splits in found if first == _FORMAT}
    except (OSError, ValueError):
        return {}
    known = all(
        key and engine in ENGINES and -1 <= config <= 2**10 and 0 <= splits <= 2**12
        for key, (engine, config, splits) in choices.items()
    )
    return choices if known else {}


def record(rows, file):
    """Write the choices of `measure` to a file, beside those that it has of other products.

    Args:
        rows: as `measure` returns them.
        file: pathlib.Path to write; folders are made, and it is replaced at once.

    Raises:
        UserError: it cannot be written.

    >>> import pathlib, tempfile
    >>> from unet_fast import tuning
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "card.tsv"
    >>> tuning.record([{"key": "a product", "engine": "cudnn", "config": 1, "splits": 0}], file)
    >>> tuning.read(file)
    {'a product': ('cudnn', 1, 0)}
    """
    choices = read(file) | {row["key"]: (row["engine"], row["config"], row["splits"]) for row in rows}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{file.parent}: cannot be made ({error.strerror}); set UNET_FAST_CACHE to a folder that can"
        ) from error
    lines = [_FORMAT, *("\t".join(map(str, (key, *choice))) for key, choice in sorted(choices.items()))]
    with atomic_path(file, overwrite=True) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tune(model, batches, dtype, console=None):
    """Measure, record and show: what `unet-fast tune` does.

    Args:
        model, batches, dtype: as `measure`.
        console: rich.console.Console to report to; None for standard output.

    Returns:
        list of dict, as `measure`.

    Raises:
        UserError: as `measure` and `record`.
    """
    console = console or rich.console.Console(highlight=False, markup=False, soft_wrap=True)
    _require_cuda()
    file = path()
    if file is None:
        raise UserError("tune: expected an NVIDIA GPU, found none; see `unet-fast info`")
    with rich.progress.Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        rows = measure(
            model, batches, dtype, on_progress=lambda done, of: progress.update(task, completed=done, total=of)
        )
    record(rows, file)
    engines = [engine for engine in ENGINES if any(engine in row["by_engine"] for row in rows)]
    headings = ("by the rules", *engines, "chosen")
    table = rich.table.Table("layer", "product", "batch", *(f"{name}, us" for name in headings), "engine")
    for row in rows:
        numbers = (row["us"], *(row["by_engine"].get(engine) for engine in engines), row["best_us"])
        cells = ("" if us is None else f"{us:.1f}" for us in numbers)
        table.add_row(row["layer"], row["product"], str(row["batch"]), *cells, f"{row['engine']} {row['config']}")
    console.print(table)
    for batch in batches:
        before, after = (sum(row[key] for row in rows if row["batch"] == batch) / 1000 for key in ("us", "best_us"))
        console.print(f"batch {batch}: {before:.3f} ms by the rules, {after:.3f} ms as chosen")
    console.print(f"wrote {file}; programs that start from now on use it")
    return rows


def _require_cuda():
    from unet_fast import _native

    if not hasattr(_native, "gpu"):
        raise UserError("tune: the library was built without CUDA; see `unet-fast info`")
    return _native.gpu
