"""Stock Keras models onto fused layers and back: `unet_fast.fuse` and `unet_fast.unfuse`.

A functional model is a graph of calls (Keras' nodes). Both functions walk through it in order and call every layer again
on new tensors; `fuse` passes over the calls that a fused convolution takes into itself, `unfuse` spells them out. Which
calls those are is decided beforehand, in `unet_fast.fusion_plan`, so that the walk has nothing to decide.
"""

import dataclasses
from typing import NamedTuple

import keras

from unet_fast.errors import UserError
from unet_fast.fusion_plan import STOCK, Left, Plan, calls_of, is_graph, structure
from unet_fast.layers import (
    CenterCrop,
    FusedConv2D,
    FusedConv2DTranspose,
    check_backend,
    fused_faster_on_cpu,
    weights_cast_together,
)


class Fused(NamedTuple):
    """A layer that `fuse` replaced."""

    name: str  # of the layer, within nested models "model/layer"
    kind: str  # "FusedConv2D" or "FusedConv2DTranspose"
    absorbed: tuple[str, ...]  # what it computes besides the convolution, such as "MaxPooling2D 'pool1'"


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """What `fuse` did; `print` it.

    Attributes:
        fused: tuple of `Fused`.
        left: tuple of `Left`: convolutions, and ReLUs, poolings, crops and concatenations next to one, with the reason.
        others: dict of the other layers' types, such as "BatchNormalization", and how many there are.
        note: what else the caller should know, or "".
    """

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]
    others: dict[str, int]
    note: str = ""

    def __str__(self):
        def counted(number, noun):
            return f"{number} {noun}" + ("" if number == 1 else "s")

        absorbed = sum(len(entry.absorbed) for entry in self.fused)
        lines = [f"fused {counted(len(self.fused), 'convolution')}, with {counted(absorbed, 'layer')} around them"]
        for entry in self.fused:
            lines.append(f"  {entry.name}: " + " + ".join((entry.kind, *entry.absorbed)))
        if self.left:
            lines.append(f"left {counted(len(self.left), 'layer')} that might have been fused")
            lines += [f"  {entry.name}: {entry.kind}, {entry.reason}" for entry in self.left]
        if self.others:
            lines.append("not looked at: " + ", ".join(f"{n} {kind}" for kind, n in sorted(self.others.items())))
        return "\n".join([*lines, self.note] if self.note else lines)


@keras.saving.register_keras_serializable(package="unet_fast")
class FusedModel(keras.Model):
    """A functional Keras model with fused layers, as `fuse` returns it.

    It is a `keras.Model` in every respect. What it adds: in mixed precision its weights are cast in one kernel, and with
    backend="auto" its layers take the fused ops on a CPU only where they are the faster ones, as `FusedUNet` does.

    Args:
        inputs, outputs, name: as `keras.Model`.
    """

    fusion_report = None  # of the model that `fuse` returned; a model that was loaded from a file has none

    def call(self, inputs, training=None, mask=None, **kwargs):
        layers = [layer for layer in self._flatten_layers() if isinstance(layer, FusedConv2D | FusedConv2DTranspose)]
        hidden = [layer.filters for layer in layers if layer.activation is keras.activations.relu]
        faster = bool(self.jit_compile) or all(fused_faster_on_cpu(filters) for filters in hidden)
        for layer in layers:
            layer.fused_on_cpu = faster
        with weights_cast_together(layers):
            return super().call(inputs, training=training, mask=mask, **kwargs)


def fuse(model, *, backend="auto", verbose=True):
    """A functional Keras model on fused layers: the same function of the same weights, computed faster.

    Each `Conv2D` and `Conv2DTranspose` that the ops serve becomes a `FusedConv2D` or `FusedConv2DTranspose`, which also
    computes the calls around it that nothing else needs to see: a ReLU behind it (a layer or `keras.ops.relu`), 2x2 max
    pooling of its output, and before it a concatenation of two inputs, the second possibly cropped about its centre.
    Everything else stays as it is: other kernels, strides, dilations, groups and activations, layers without bias, with
    an activity regularizer or LoRA, subclasses of the layers, and whatever has another dtype. A layer that is called
    several times is replaced by one that is called several times and takes nothing around it. Models within the model
    are treated alike.

    The weights are shared: fused layers hold the very `Variable` objects of the layers they replace, with their names,
    regularizers, constraints and trainable flags, and the other layers are the very same. To train one of the two models
    is to train both.

    Gradients with respect to activations within the network, which no training uses, are zero where a ReLU gave zero.

    Args:
        model: functional or `Sequential` keras.Model, built; NHWC. `FusedUNet` is one.
        backend: of the fused layers: "auto", "fused" or "stock".
        verbose: print the report.

    Returns:
        FusedModel, not compiled, with the names of the model and its layers and the structure of its inputs and outputs;
        `fusion_report` says what was fused and what was left and why. Saved, it needs `import unet_fast` to be loaded.

    Raises:
        UserError: not a functional model, or an unknown backend.

    >>> import keras
    >>> from unet_fast import fuse
    >>> x = keras.Input((32, 32, 1))
    >>> y = keras.layers.Conv2D(4, 3, activation="relu", name="a")(x)
    >>> y = keras.layers.MaxPooling2D(name="pool")(y)
    >>> model = fuse(keras.Model(x, keras.layers.Conv2D(2, 1, name="logits")(y)))
    fused 2 convolutions, with 1 layer around them
      a: FusedConv2D + MaxPooling2D 'pool'
      logits: FusedConv2D
    """
    check_backend(backend)
    _check_functional(model, "fuse")
    fused, left, others = [], [], {}
    new = _fused_model(model, backend, "", fused, left, others, {}, _times_called(model), outer=FusedModel)
    note = ""
    if type(model).__module__.split(".")[0] not in ("keras", "unet_fast"):
        note = f"the result is a plain functional model: what {type(model).__name__} adds, such as train_step, it lacks"
    new.fusion_report = FusionReport(tuple(fused), tuple(left), others, note)
    if verbose:
        print(new.fusion_report)
    return new


def unfuse(model):
    """A model with fused layers, as stock Keras layers; what `fuse` undoes, and works on a `FusedUNet` as well.

    Skip inputs become `Cropping2D` and `Concatenate` (`unet_fast.layers.CenterCrop` where sizes are not known), pooled
    outputs `MaxPooling2D`, a fused ReLU the activation of its `Conv2D`. The weights are shared, as by `fuse`. Unless
    it has a `CenterCrop`, the result can be saved and loaded where there is no unet_fast.

    Args:
        model: functional keras.Model with fused layers.

    Returns:
        keras.Model, not compiled.

    Raises:
        UserError: not a functional model.

    >>> from unet_fast import FusedUNet, unfuse
    >>> model = unfuse(FusedUNet((32, 32, 1), filters=2, depth=1, padding="same"))
    >>> [layer.name for layer in model.layers][:4]
    ['image', 'down1_conv1', 'down1_conv2', 'down1_conv2_pool']
    """
    _check_functional(model, "unfuse")
    return _unfused_model(model, {})


# --- Walking through a graph


def _check_functional(model, function):
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None) or not model.built:
        raise UserError(
            f"{function}: expected a functional keras.Model, or a Sequential one that is built, got "
            f"{type(model).__name__}; give a model made of layers called on keras.Input"
        )


def _times_called(model):
    """How often each layer is called in the graphs of a model and of those within it, by the layer's id."""
    graphs, found, times = [model], {id(model)}, {}
    for graph in graphs:
        for operation in (node.operation for node in calls_of(graph)):
            times[id(operation)] = times.get(id(operation), 0) + 1
            if is_graph(operation) and id(operation) not in found:
                found.add(id(operation))
                graphs.append(operation)
    return times


def _rebuilt(model, call, model_class):
    """A model of the same inputs and outputs, each of whose calls is computed by call(node, tensors).

    Args:
        call: stores the new tensors of a node under the ids of the old ones in the dict `tensors`.
    """
    inputs, outputs = structure(model)
    tensors = {id(tensor): tensor for tensor in keras.tree.flatten(inputs)}
    for node in calls_of(model):
        call(node, tensors)
    new_outputs = keras.tree.map_structure(lambda x: tensors[id(x)], outputs)
    return model_class(inputs=inputs, outputs=new_outputs, name=model.name)


def _call_as_before(node, tensors, operation=None):
    arguments, options = node.arguments.fill_in(tensors)
    outputs = (operation or node.operation)(*arguments, **options)
    for old, new in zip(node.outputs, keras.tree.flatten(outputs), strict=True):
        tensors[id(old)] = new


def _with_variables_of(layer, new_class, input_shape, **overrides):
    """A built layer of `new_class` with the config and the variables of `layer`."""
    own = ("pool", "input_is_relu", "backend")  # of fused layers alone
    config = {key: value for key, value in layer.get_config().items() if key not in own}
    new = new_class.from_config({**config, **overrides})
    variables = {"kernel": layer.kernel, "bias": layer.bias}  # without LoRA `kernel` is the variable itself
    flags = {name: variable.trainable for name, variable in variables.items() if variable is not None}
    new.add_weight = lambda name, **_: variables[name]
    for name in flags:
        variables[name].trainable = True  # by which a layer files it: a frozen one could not be thawed otherwise
    try:
        new.build(input_shape)
    finally:
        for name, flag in flags.items():
            variables[name].trainable = flag
        del new.add_weight
    return new


# --- Fusing


def _fused_model(model, backend, prefix, fused, left, others, made, times, *, outer=keras.Model):
    """The model on fused layers; appends to `fused`, `left` and `others`.

    Args:
        made: dict of the new layers and models by the old ones' ids, for those that are called several times.
        times: how often a layer is called in all the graphs, by its id.
    """
    plan = Plan(model, prefix, left, times)

    def call(node, tensors):
        operation, key = node.operation, id(node.operation)
        site = plan.sites.get(id(node))
        if id(node) in plan.absorbed:
            return
        if is_graph(operation):
            if key not in made:
                inner = f"{prefix}{operation.name}/"
                made[key] = _fused_model(operation, backend, inner, fused, left, others, made, times)
            _call_as_before(node, tensors, made[key])
            return
        if site is None:
            _call_as_before(node, tensors)
            return
        kind = STOCK[type(operation)]
        inputs = [tensors[id(tensor)] for tensor in site.inputs]
        if key not in made:
            overrides = {"activation": "relu"} if site.relu else {}
            if kind is FusedConv2D:
                overrides |= {"pool": bool(site.pooled), "input_is_relu": site.input_is_relu}
            shape = inputs[0].shape if len(inputs) == 1 else [tensor.shape for tensor in inputs]
            made[key] = _with_variables_of(operation, kind, shape, backend=backend, **overrides)
            absorbed = tuple(f"{type(n.operation).__name__} {n.operation.name!r}" for n in site.absorbed)
            fused.append(Fused(prefix + operation.name, kind.__name__, absorbed))
        outputs = made[key](inputs[0] if len(inputs) == 1 else inputs)
        y, *pooled = outputs if site.pooled else [outputs]
        tensors[id(site.output)] = y
        for tensor in site.pooled:
            tensors[id(tensor)] = pooled[0]

    new = _rebuilt(model, call, outer)
    absorbed = {prefix + node.operation.name for node in plan.calls if id(node) in plan.absorbed}
    named = absorbed | {entry.name for entry in (*fused, *left)}
    for operation in {id(node.operation): node.operation for node in plan.calls}.values():
        if prefix + operation.name not in named and not is_graph(operation):
            kind = type(operation).__name__
            others[kind] = others.get(kind, 0) + 1
    return new


# --- Undoing it


def _unfused_model(model, made):
    names = {node.operation.name for node in calls_of(model)}

    def named(base):
        name, number = base, 1
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.add(name)
        return name

    def call(node, tensors):
        layer, key = node.operation, id(node.operation)
        if is_graph(layer):
            if key not in made:
                made[key] = _unfused_model(layer, made)
            _call_as_before(node, tensors, made[key])
            return
        if not isinstance(layer, FusedConv2D | FusedConv2DTranspose):
            _call_as_before(node, tensors)
            return
        x, *skip = [tensors[id(tensor)] for tensor in node.input_tensors]
        if skip:
            skip = _cropped(skip[0], x, named(f"{layer.name}_crop"), layer.dtype_policy)
            joined = keras.layers.Concatenate(name=named(f"{layer.name}_concat"), dtype=layer.dtype_policy)
            x = joined([x, skip])
        if key not in made:
            stock = keras.layers.Conv2D if isinstance(layer, FusedConv2D) else keras.layers.Conv2DTranspose
            made[key] = _with_variables_of(layer, stock, x.shape)
        y = made[key](x)
        tensors[id(node.outputs[0])] = y
        if len(node.outputs) == 2:
            pool = keras.layers.MaxPooling2D(
                2, data_format="channels_last", name=named(f"{layer.name}_pool"), dtype=layer.dtype_policy
            )
            tensors[id(node.outputs[1])] = pool(y)

    return _rebuilt(model, call, keras.Model)


def _cropped(skip, x, name, dtype):
    outer, inner = skip.shape[1:3], x.shape[1:3]
    if None in outer or None in inner:
        return CenterCrop(name=name, dtype=dtype)([skip, x])
    if outer == inner:
        return skip
    margins = [((o - i) // 2, -((i - o) // 2)) for o, i in zip(outer, inner, strict=True)]
    return keras.layers.Cropping2D(margins, data_format="channels_last", name=name, dtype=dtype)(skip)
