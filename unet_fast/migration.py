"""Checkpoints of NVIDIA's UNet_Medical, and stock Keras files of its network, as the folder of a run.

Every kind of file is brought to one form, {name in the file: array} and which of our layers each name belongs to:

    TensorFlow 1    conv2d/kernel, conv2d_1/bias, ..., conv2d_transpose/kernel, ..., also behind a prefix such as UNet/
    TensorFlow 2    model/input_block/conv1/kernel/.ATTRIBUTES/VARIABLE_VALUE and so on, by the names of its attributes
    Keras           .keras; .h5, of a whole model or of weights; .weights.h5

Kernels need no transposing, and convolutions come in the order in which the network was made. How wide, how deep and of how
many classes it is, shapes and names tell.
"""

import contextlib
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import numpy as np
import tensorflow as tf

from unet_fast import __version__, archives, checkpoints, crossval
from unet_fast.config import TrainConfig
from unet_fast.data.files import atomic_path
from unet_fast.data.stack import check_claim
from unet_fast.errors import UserError
from unet_fast.evaluation import load_labelled
from unet_fast.models import FusedUNet
from unet_fast.models.geometry import nearest_input_sizes

_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# Slots of optimizers, steps, loss scales and moving averages: what a checkpoint holds for training alone.
_TRAINING_STATE = re.compile(
    r"(^|/)(global_step|beta[12]_power|learning_rate|current_loss_scale|good_steps|cur_step|_CHECKPOINTABLE_OBJECT_GRAPH)$"
    r"|/(Momentum|Adam|Adam_1|ExponentialMovingAverage|m|v|RMSProp|RMSProp_1)$"
    r"|^(optimizer|save_counter|loss_scale|step|global_step)(/|$)|/\.OPTIMIZER_SLOT/|^loss_scale"
)
_NAMED = 12  # variables that an error names one by one
_REFERENCE_SIZE, _REFERENCE_DEPTH = 572, 4
_IMAGE_RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}


class _Source(NamedTuple):
    """A file's variables.

    Attributes:
        kind: what the file is, in words.
        variables: {name in the file: array}, without what is for training alone.
        names: {our name, such as "down1_conv1/kernel": name in the file}, of all that a network of this depth has.
        depth: of the network.
        skipped: number of variables for training alone.
        padding, input_shape, dropout: of the network, where the file tells; else None.
        model: keras.Model that the file holds, to compare with, or None.
    """

    kind: str
    variables: dict
    names: dict
    depth: int
    skipped: int = 0
    padding: str | None = None
    input_shape: tuple | None = None
    dropout: float | None = None
    model: keras.Model | None = None


class Imported(NamedTuple):
    """What `import_checkpoint` found: `kind` of file, numbers of variables taken and skipped, the model, and the largest
    difference of a logit from the file's own model on a random image, None where the file holds variables alone."""

    kind: str
    variables: int
    skipped: int
    model: FusedUNet
    difference: float | None


def import_checkpoint(
    path,
    out,
    *,
    data=None,
    split="nvidia",
    fold=0,
    padding=None,
    size=None,
    precision="float32",
    image_size=(512, 512),
    image_dtype="uint8",
    value_range=None,
    mask_values=None,
):
    """Make a run of a checkpoint, for `evaluate`, `predict` and `export`.

    A checkpoint holds weights and nothing about images. Without `data` the run is given what holds for ISBI 2012: 512 x 512
    pixels of 8 bits, masks of 0 and 255 (or 0, 1, 2 and so on for other numbers of classes).

    Args:
        path: a TensorFlow checkpoint: its folder, prefix or one of its files; or a Keras file.
        out: folder of the run to write; new or empty.
        data: data folder that the network was trained on. The facts about images are then its own, and the run gets its
            folds, so that `evaluate` knows a validation fold.
        split, fold: as `unet_fast.config.TrainConfig`, with `data`.
        padding: of the 3x3 convolutions; None for "valid", or what a Keras file says.
        size: side of the network's input; None for 572, or what a Keras file says, or for "same" the largest that fits
            `image_size`.
        precision: dtype policy of the run's model.
        image_size: (height, width) of an image before training resized it to the network's output.
        image_dtype: "uint8", "uint16" or "float32".
        value_range: (low, high), the pixel values that training took for -1 and 1; None for the dtype's range.
        mask_values: what masks hold for each class.

    Returns:
        Imported.

    Raises:
        UserError: no checkpoint there, variables that are missing, unexpected or of another shape, by name; a network
            that is not the U-Net; facts that do not fit it; or a folder that is in use.

    Example: see `docs/migration.md`.
    """
    checkpoints.check_new(out)
    source = _read(Path(path))
    _check_complete(path, source)
    arrays = {name: source.variables[theirs] for name, theirs in source.names.items()}
    first, logits = arrays["down1_conv1/kernel"], arrays["logits/kernel"]
    if padding and source.padding and padding != source.padding:
        raise UserError(
            f"{path}: its convolutions have padding {source.padding!r}, not {padding!r}; leave --padding out"
        )
    padding = padding or source.padding or "valid"
    config = {
        "num_classes": int(logits.shape[-1]),
        "filters": int(first.shape[-1]),
        "depth": source.depth,
        "padding": padding,
        "upsampling": "transpose2x2" if arrays["up1_transpose/kernel"].shape[:2] == (2, 2) else "transpose3x3",
        "dropout": 0.5 if source.dropout is None else source.dropout,
    }
    channels = int(first.shape[-2])
    facts, dataset = _data_facts(data, config, channels, image_size, image_dtype, value_range, mask_values)
    size = size or _size(source, config, facts)
    model = FusedUNet((size, size, channels), **config, dtype=precision)
    _assign(path, model, arrays, source.names)
    difference = None if source.model is None else _compare(path, source.model, model)
    _write(Path(out), model, facts, dataset, data, split, fold, precision)
    return Imported(source.kind, len(arrays), source.skipped, model, difference)


# --- Reading


def _read(path):
    if path.suffix == ".keras" or path.suffix in (".h5", ".hdf5"):
        if not path.is_file():
            raise UserError(f"{path}: expected a Keras file, found nothing there; check the path")
        return _read_keras(path)
    prefix = _checkpoint_prefix(path)
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes = reader.get_variable_to_shape_map()
        wanted = [name for name in shapes if not _TRAINING_STATE.search(name)]
        variables = {name: reader.get_tensor(name) for name in wanted}
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a TensorFlow checkpoint, or damaged ({_one_line(error)}); restore it") from error
    skipped = len(shapes) - len(wanted)
    if any(name.endswith(_VALUE) for name in variables):
        names, depth = _object_names(variables)
        return _Source("TensorFlow 2 checkpoint", variables, names, depth, skipped)
    names, depth = _flat_names(variables)
    return _Source("TensorFlow 1 checkpoint", variables, names, depth, skipped)


def _checkpoint_prefix(path):
    if path.is_dir():
        latest = tf.train.latest_checkpoint(str(path))
        indices = sorted(path.glob("*.index"))
        if latest is None and len(indices) != 1:
            found = "none" if not indices else ", ".join(index.stem for index in indices)
            raise UserError(f"{path}: expected a folder with a checkpoint, found {found}; name the checkpoint itself")
        return latest or str(indices[0].with_suffix(""))
    prefix = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", str(path))
    if not Path(prefix + ".index").is_file() and not path.is_file():
        raise UserError(
            f"{path}: expected a TensorFlow checkpoint (its folder, or PREFIX of PREFIX.index and PREFIX.data-*) or a "
            ".keras or .h5 file, found nothing there; check the path"
        )
    return prefix


def _layers(depth):
    """Our layers' names: (convolutions, transposed convolutions), each in the order in which UNet_Medical makes them."""
    levels = range(1, depth + 1)
    blocks = [*(f"down{level}" for level in levels), "bottom", *(f"up{level}" for level in reversed(levels))]
    convolutions = [f"{block}_conv{i}" for block in blocks for i in (1, 2)] + ["logits"]
    return convolutions, [f"up{level}_transpose" for level in reversed(levels)]


def _flat_names(variables, kernel="kernel", bias="bias"):
    """Names as TensorFlow 1 numbers them: ({our name: theirs}, depth)."""
    pattern = re.compile(r"^(.*/)?(conv2d|conv2d_transpose)(?:_(\d+))?/[^/]+$")
    found = [match for match in map(pattern.match, variables) if match]
    prefixes = [match[1] or "" for match in found]
    prefix = max(set(prefixes), key=prefixes.count, default="")
    numbers = {"conv2d": [-1], "conv2d_transpose": [-1]}
    for match in found:
        if (match[1] or "") == prefix:
            numbers[match[2]].append(int(match[3] or 0))
    # A network of depth d has 4 d + 3 convolutions and d transposed ones; of a part of one, the most that it hints at.
    hints = (max(numbers["conv2d_transpose"]) + 1, -(-(max(numbers["conv2d"]) - 2) // 4))
    depth = max(hints) if found else _REFERENCE_DEPTH
    names = {}
    for layers, stem in zip(_layers(max(1, depth)), ("conv2d", "conv2d_transpose"), strict=True):
        for number, layer in enumerate(layers):
            theirs = prefix + stem + (f"_{number}" if number else "")
            names |= {f"{layer}/kernel": f"{theirs}/{kernel}", f"{layer}/bias": f"{theirs}/{bias}"}
    return names, max(1, depth)


def _object_names(variables):
    """Names by the attributes of UNet_Medical's objects in TensorFlow 2: ({our name: theirs}, depth)."""
    pattern = re.compile(r"^(.*/)?(?:input_block|bottleneck|output_block|(?:down|up)_blocks/(\d+))/conv")
    found = [match for match in map(pattern.match, variables) if match]
    prefixes = [match[1] or "" for match in found]
    prefix = max(set(prefixes), key=prefixes.count, default="model/")
    numbers = [int(match[2]) for match in found if match[2]]
    depth = max(numbers) + 2 if numbers else _REFERENCE_DEPTH
    downs = ["input_block", *(f"down_blocks/{i}" for i in range(depth - 1))]
    ups = ["bottleneck", *(f"up_blocks/{i}" for i in range(depth - 1))]  # each ends in the next level's upsampling
    paths = {"logits": "output_block/conv3"}
    for i in (1, 2):
        paths |= {f"down{level}_conv{i}": f"{block}/conv{i}" for level, block in enumerate(downs, start=1)}
        paths |= {f"bottom_conv{i}": f"bottleneck/conv{i}", f"up1_conv{i}": f"output_block/conv{i}"}
        paths |= {f"up{depth - k}_conv{i}": f"{block}/conv{i}" for k, block in enumerate(ups[1:])}
    paths |= {f"up{depth - k}_transpose": f"{block}/conv_transpose" for k, block in enumerate(ups)}
    return {
        f"{layer}/{variable}": f"{prefix}{path}/{variable}{_VALUE}"
        for layer, path in paths.items()
        for variable in ("kernel", "bias")
    }, depth


def _read_keras(path):
    if path.name.endswith(".weights.h5"):
        with _opened(path) as file:
            variables = {}
            file.get("layers", {}) and file["layers"].visititems(lambda name, item: _collect(name, item, variables))
        variables = {name.replace("fused_conv2d", "conv2d"): value for name, value in variables.items()}
        names, depth = _flat_names(variables, kernel="0", bias="1")
        return _Source("Keras weights file", variables, names, depth)
    try:
        if path.suffix == ".keras":
            archives.check_layers(path)
        model = keras.models.load_model(path, compile=False)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        if path.suffix == ".keras":
            raise UserError(f"{path}: Keras cannot load it ({_one_line(error)}); load it with its own code") from error
        return _read_layer_weights(path)
    return _of_model(model)


@contextlib.contextmanager
def _opened(path):
    try:
        with h5py.File(path) as file:
            check_claim(path, archives.claimed_bytes(file), path.stat().st_size)
            yield file
    except OSError as error:
        raise UserError(f"{path}: not an HDF5 file, or damaged ({_one_line(error)}); restore it") from error


def _collect(name, item, variables):
    if isinstance(item, h5py.Dataset):
        variables[name.replace("/vars/", "/")] = item[()]


def _read_layer_weights(path):
    """An .h5 file of weights without a model, as Keras 2 wrote them: layers in the order of the network."""
    with _opened(path) as file:
        group, variables, kernels = file.get("model_weights", file), {}, []
        for layer in (_text(name) for name in group.attrs.get("layer_names", [])):
            for name in (_text(name) for name in group[layer].attrs["weight_names"]):
                variables[name] = group[layer][name][()]
                if variables[name].ndim == 4:
                    kernels.append(name)
    return _in_order("Keras weights file", variables, kernels)


def _of_model(model):
    """The source of a Keras model that was loaded whole."""
    layers = [layer for layer in model._flatten_layers(include_self=False, recursive=True) if layer.weights]
    layers = [layer for layer in layers if not isinstance(layer, keras.Model)]
    variables = {f"{layer.name}/{v.name}": np.asarray(v) for layer in layers for v in layer.weights}
    convolutions = [layer for layer in layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Conv2DTranspose)]
    source = _in_order("Keras model", variables, [f"{layer.name}/kernel" for layer in convolutions])
    spatial = {layer.padding for layer in convolutions if layer.kernel_size == (3, 3) and layer.strides == (1, 1)}
    dropouts = [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]
    return source._replace(
        padding=spatial.pop() if len(spatial) == 1 else None,
        input_shape=model.input_shape[1:],
        dropout=dropouts[0] if dropouts else None,
        model=model,
    )


def _in_order(kind, variables, kernels):
    """The source of layers that come in the order of the network."""
    depth = max(1, -(-(len(kernels) - 3) // 5)) if kernels else _REFERENCE_DEPTH
    convolutions, transposed = _layers(depth)
    order = convolutions[: 2 * depth + 2]
    for k, layer in enumerate(transposed):
        first = 2 * depth + 2 + 2 * k
        order += [layer, *convolutions[first : first + 2]]
    names = {}
    for layer, kernel in zip([*order, "logits"], [*kernels, *[None] * (5 * depth + 3 - len(kernels))], strict=True):
        kernel = kernel or f"{layer}/kernel"
        names |= {f"{layer}/kernel": kernel, f"{layer}/bias": re.sub(r"kernel(?=(:0)?$)", "bias", kernel)}
    return _Source(kind, variables, names, depth)


# --- Checking


def _check_complete(path, source):
    """Raises UserError unless the file has the variables of the network and no others."""
    expected = list(source.names.values())
    missing = [name for name in expected if name not in source.variables]
    unexpected = sorted(name for name in source.variables if name not in set(expected))
    if missing or unexpected:
        lacks = f"{len(missing)} are missing: {_listed(missing)}" if missing else "none is missing"
        more = f"{len(unexpected)} are unexpected: {_listed(unexpected)}" if unexpected else "none is unexpected"
        raise UserError(
            f"{path}: expected the {len(expected)} variables of a U-Net of depth {source.depth}, as UNet_Medical names them, "
            f"in this {source.kind}; {lacks}; {more}; give a whole checkpoint of that network"
        )


def _listed(names):
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _assign(path, model, arrays, names):
    """Puts the arrays into the model; UserError where shapes do not fit."""
    wrong = []
    for layer in model.layers:
        for variable in layer.weights:
            name = f"{layer.name}/{variable.name}"
            if tuple(arrays[name].shape) != tuple(variable.shape):
                got, wanted = list(arrays[name].shape), list(variable.shape)
                wrong.append(f"{names[name]} is {got} where {wanted} fits")
            else:
                variable.assign(arrays[name].astype(np.float32))
    if wrong:
        raise UserError(
            f"{path}: expected the shapes of a U-Net, got others: {_listed(wrong)}; give one of that network"
        )


def _compare(path, theirs, ours):
    """The largest difference of a logit (of a probability, where the file's model ends in a softmax) on a random image."""
    shape = ours.input_shape[1:] if None in theirs.input_shape[1:] else theirs.input_shape[1:]
    image = np.random.default_rng(0).uniform(-1, 1, (1, *shape)).astype(np.float32)
    plain = FusedUNet.from_config({**ours.get_config(), "input_shape": shape, "backend": "stock", "dtype": "float32"})
    plain.set_weights(ours.get_weights())
    logits, expected = plain(image, training=False), theirs(image, training=False)
    if not isinstance(expected, tf.Tensor) or expected.shape != logits.shape:
        got = getattr(expected, "shape", "several outputs")
        raise UserError(
            f"{path}: expected a U-Net with logits {tuple(logits.shape)}, its model gives {got}; it is another one"
        )
    expected = tf.cast(expected, tf.float32)
    allowed = (1e-4 if theirs.compute_dtype == "float32" else 2e-2) * max(1.0, float(tf.reduce_max(tf.abs(expected))))
    difference = min(
        float(tf.reduce_max(tf.abs(values - expected))) for values in (logits, tf.nn.softmax(logits))
    )  # a model may end in a softmax, which the run's does not
    if not difference <= allowed:
        raise UserError(
            f"{path}: its variables fit the U-Net but its outputs differ by {difference:g}; expected ReLU everywhere, "
            "upsampled features concatenated before the skip connection's, and logits or their softmax; it is another network"
        )
    return difference


# --- The run


def _data_facts(data, config, channels, image_size, image_dtype, value_range, mask_values):
    """(DataFacts, Dataset or None)."""
    classes = config["num_classes"]
    if data is not None:
        dataset = load_labelled(data, mask_values=mask_values)
        facts = checkpoints.DataFacts.of(dataset)
        if (facts.num_classes, facts.image_shape[2]) != (classes, channels):
            raise UserError(
                f"{data}: expected images of {channels} channel(s) and masks of {classes} classes like the network's, got "
                f"{facts.image_shape[2]} and {facts.num_classes}; give the data that it was trained on"
            )
        return facts, dataset
    if image_dtype not in (*_IMAGE_RANGES, "float32"):
        raise UserError(f"expected --image-dtype uint8, uint16 or float32, got {image_dtype!r}; give one of those")
    value_range = value_range or _IMAGE_RANGES.get(image_dtype)
    if value_range is None:
        raise UserError("expected --value-range LOW HIGH with --image-dtype float32; give what became -1 and 1")
    if not value_range[0] < value_range[1]:
        raise UserError(f"expected --value-range LOW HIGH with LOW less than HIGH, got {value_range}; give such values")
    mask_values = mask_values or ((0, 255) if classes == 2 else tuple(range(classes)))
    if len(mask_values) != classes or list(mask_values) != sorted(set(mask_values)) or not mask_values[0] >= 0:
        raise UserError(
            f"expected --mask-values to be {classes} ascending numbers, one a class, got {mask_values}; correct it"
        )
    shape = (*image_size, channels)
    try:
        facts = checkpoints.DataFacts("imported", classes, tuple(value_range), shape, image_dtype, tuple(mask_values))
    except ValueError as error:
        raise UserError(
            f"expected --image-size, --value-range and --mask-values of images that can be, got others: {error}; correct them"
        ) from error
    return facts, None


def _size(source, config, facts):
    if source.input_shape is not None and None not in source.input_shape:
        if source.input_shape[0] != source.input_shape[1]:
            raise UserError(f"expected a square input, the model's is {source.input_shape[:2]}; give one with --size")
        return source.input_shape[0]
    depth, padding = config["depth"], config["padding"]
    if padding == "valid":
        return nearest_input_sizes(_REFERENCE_SIZE, depth, padding)[1]
    return nearest_input_sizes(min(facts.image_shape[:2]), depth, padding)[0] or 2**depth


def _write(out, model, facts, dataset, data, split, fold, precision):
    config = TrainConfig(
        data="imported" if data is None else str(Path(data).resolve()) if data != "synthetic" else data,
        split=split,
        fold=fold,
        size=model.input_shape[1],
        filters=model.filters,
        depth=model.depth,
        padding=model.padding,
        upsampling=model.upsampling,
        dropout=model.dropout,
        precision=precision,
    )
    with checkpoints.locked(out):
        checkpoints.check_new(out)
        if dataset is not None:
            folds = crossval.folds(len(dataset.images), num_folds=config.folds, split=config.split)
            crossval.save_split(out / checkpoints.SPLIT, folds, dataset.names)
        checkpoints.save_config(out, config, facts, __version__, imported=True)
        with atomic_path(out / checkpoints.MODEL, overwrite=False) as temporary:
            model.save(temporary)


def _text(name):
    return name.decode() if isinstance(name, bytes) else str(name)


def _one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__
