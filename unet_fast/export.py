"""A run's network in formats that others serve: SavedModel of stock or of fused ops, and ONNX.

What is exported takes pixel values as they are in the image files and gives probabilities, so that a caller needs to know
no more than the sizes that the network takes and by how much training rescaled its images:

    image          float32 [batch, height, width, channels], in the units of the training's images, such as 0..255
    probabilities  float32 [batch, height', width', classes], of each pixel they sum to 1

Batch, height and width are the caller's choice, see `ExportFacts.sizes`. Every file is loaded again, and what it computes
compared with what the run's own model does, before it takes its place.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from unet_fast import _library, checkpoints
from unet_fast.data import normalize
from unet_fast.data.files import atomic_path
from unet_fast.errors import UserError
from unet_fast.inference import training_scale, with_input_size
from unet_fast.models import FusedUNet
from unet_fast.models.geometry import nearest_input_sizes

FORMATS = ("savedmodel", "savedmodel-fused", "onnx")
PRECISIONS = ("float32", "float16", "bfloat16")
INPUT, OUTPUT = "image", "probabilities"
# Probabilities may differ by so much on average: a few roundings of each layer's results, in the coarser of the two
# precisions. At a pixel that is as many times as much as the logits are apart, which are rounded as what they are.
_TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclasses.dataclass(frozen=True)
class ExportFacts:
    """What a caller of an exported network has to know; it is written beside or into what is exported.

    Attributes:
        precision: what the network computes in; its input and output are float32.
        value_range: (low, high), the pixel values that training took for -1 and 1. The network does that itself.
        image_dtype, channels: of the images that it was trained on.
        mask_values: what the training's masks held for each class, such as (0, 255).
        scale: (y, x), by how much training resized its images: new ones are to be resized by the same.
        sizes: which heights and widths the network takes, in words.
        margin: pixels by which the output is smaller than the input, on each side.
    """

    precision: str
    value_range: tuple[float, float]
    image_dtype: str
    channels: int
    mask_values: tuple[int, ...]
    scale: tuple[float, float]
    sizes: str
    margin: int


class Exported(NamedTuple):
    """What `export_run` did: the path, the facts, and {size in words: largest difference of a probability}."""

    path: Path
    facts: ExportFacts
    differences: dict[str, float]


def export_run(path, format, output, *, precision=None):
    """Write a run's best model for other programs.

    Args:
        path: folder of the run.
        format: "savedmodel": a SavedModel of TensorFlow's own ops, which any TensorFlow 2 loads; "savedmodel-fused": one of
            the fused ops, which needs `import unet_fast` or `tf.load_op_library`; "onnx": opset 17.
        output: folder (SavedModel) or .onnx file to write; its parents are made if need be.
        precision: what to compute in, "float32", "float16" or, for SavedModels, "bfloat16". None: the run's own for
            "savedmodel-fused", else "float32", which every server and processor has.

    Returns:
        Exported.

    Raises:
        UserError: no run there, something at `output` already, a combination that does not exist, a missing package, fused
            ops that cannot run here, or outputs that differ.

    Example: see `docs/serving.md`.
    """
    if format not in FORMATS:
        raise UserError(f"expected a format of {', '.join(FORMATS)}, got {format!r}; give one of those")
    output = Path(output)
    _check_output(output, format)
    if format == "onnx":
        from unet_fast import onnx_graph

        onnx_graph.check_installed()
    run = checkpoints.load_run(path)
    precision = precision or (run.model.compute_dtype if format == "savedmodel-fused" else "float32")
    if precision not in PRECISIONS or (format == "onnx" and precision == "bfloat16"):
        allowed = PRECISIONS[: 2 if format == "onnx" else 3]
        raise UserError(
            f"expected a precision of {', '.join(allowed)} for {format}, got {precision!r}; give one of those"
        )
    facts = _facts(run, precision)
    with _in_place(output, format) as temporary:
        if format == "onnx":
            onnx_graph.write(temporary, run.model, facts, INPUT, OUTPUT)
            compute = onnx_graph.loaded(temporary, OUTPUT)
        else:
            _write_saved_model(temporary, run.model, facts, "fused" if format == "savedmodel-fused" else "stock")
            serve = tf.saved_model.load(str(temporary)).signatures["serving_default"]
            compute = lambda image: serve(tf.constant(image))[OUTPUT].numpy()  # noqa: E731
        with _without_tensor_float_32():  # which would round to ten bits on one side alone
            differences = _differences(run, facts, compute)
    return Exported(output, facts, differences)


def op_library():
    """The library to load before a SavedModel of fused ops, by `tf.load_op_library` or LD_PRELOAD: a pathlib.Path.

    >>> from unet_fast.export import op_library
    >>> op_library().name
    '_ops.so'
    """
    return Path(_library.__file__).with_name("_ops.so")


def _facts(run, precision):
    model, facts = run.model, run.facts
    multiple = 2**model.depth
    smallest = nearest_input_sizes(1, model.depth, model.padding)[1]
    shift = smallest % multiple
    sizes = f"multiples of {multiple}" + (f" plus {shift}" if shift else "") + f", from {smallest} on"
    channels, scale = model.input_shape[3], tuple(round(factor, 6) for factor in training_scale(run))
    margin = (model.input_shape[1] - model.output_shape[1]) // 2
    value_range = tuple(map(float, facts.value_range))
    return ExportFacts(precision, value_range, facts.image_dtype, channels, facts.mask_values, scale, sizes, margin)


def _check_output(output, format):
    if format == "onnx" and output.suffix != ".onnx":
        raise UserError(f"{output}: expected a file named *.onnx for the format onnx; give such a name")
    if output.exists():
        raise UserError(f"{output}: is there already and would be overwritten; move it away or choose another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot make its folder ({error.strerror}); choose another") from error


def _in_place(output, format):
    """A temporary path beside `output`, moved there when the block ends and removed when it raises."""
    return atomic_path(output, overwrite=False) if format == "onnx" else _AtomicFolder(output)


class _AtomicFolder:
    def __init__(self, path):
        self._path = path

    def __enter__(self):
        try:
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{self._path.name}-", dir=self._path.parent))
        except OSError as error:
            raise UserError(f"{self._path}: cannot write there ({error.strerror}); choose another folder") from error
        return self._temporary

    def __exit__(self, kind, error, traceback):
        if kind is None:
            mask = os.umask(0)
            os.umask(mask)
            self._temporary.chmod(0o777 & ~mask)  # mkdtemp makes folders that only their owner may read
            self._temporary.rename(self._path)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)


def _write_saved_model(path, model, facts, backend):
    dtype = facts.precision if facts.precision == "float32" else f"mixed_{facts.precision}"
    config = {"input_shape": (None, None, facts.channels), "backend": backend, "dtype": dtype}
    served = FusedUNet.from_config({**model.get_config(), **config})
    served.set_weights(model.get_weights())

    def serve(image):
        logits = served(normalize(image, facts.value_range), training=False)
        return {OUTPUT: tf.nn.softmax(tf.cast(logits, tf.float32))}

    module = tf.Module()
    module.weights = [variable.value for variable in served.variables]  # of Keras' layers nothing else is saved
    spec = tf.TensorSpec((None, None, None, facts.channels), tf.float32, name=INPUT)
    module.serve = tf.function(serve, input_signature=[spec], autograph=False)
    tf.saved_model.save(module, str(path), signatures=module.serve)
    extra = path / "assets.extra"
    extra.mkdir()
    (extra / "unet_fast.json").write_text(json.dumps(dataclasses.asdict(facts), indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _without_tensor_float_32():
    enabled = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(enabled)


def _differences(run, facts, compute):
    """{size in words: largest difference of a probability}, on random images of two sizes and batches.

    Raises:
        UserError: one is larger than roundings are.
    """
    rng = np.random.default_rng(0)
    side = run.model.input_shape[1]
    other = nearest_input_sizes(side + 1, run.model.depth, run.model.padding)[1]
    differences, averages, apart = {}, [], 1.0
    for batch, size in ((1, side), (2, other)):
        image = rng.uniform(*facts.value_range, (batch, size, size, facts.channels)).astype(np.float32)
        model = with_input_size(run.model, size)
        logits = model(normalize(image, facts.value_range), training=False)
        logits = tf.cast(logits, tf.float32).numpy()
        apart = max(apart, float(np.ptp(logits, axis=-1).max()))
        difference = np.abs(compute(image) - tf.nn.softmax(logits).numpy())
        differences[f"{batch} x {size} x {size}"] = float(difference.max())
        averages.append(float(difference.mean()))
    coarser = max((facts.precision, run.model.compute_dtype), key=_TOLERANCES.get)
    tolerance, worst, average = _TOLERANCES[coarser], max(differences.values()), max(averages)
    if not (average <= tolerance and worst <= tolerance * apart):
        raise UserError(
            f"expected the exported network to give the run's probabilities to within {tolerance:g} on average, and "
            f"{tolerance * apart:g} anywhere, in {coarser}, got {average:g} and {worst:g}; nothing was written, please report "
            "this"
        )
    return differences
