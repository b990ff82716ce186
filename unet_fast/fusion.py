"""Stock Keras models onto fused layers and back: `unet_fast.fuse` and `unet_fast.unfuse`.

A functional model is a graph of calls (Keras' nodes). Both functions walk through it in order and call every layer again
on new tensors; `fuse` passes over the calls that a fused convolution takes into itself, `unfuse` spells them out. Which
calls those are is decided beforehand, in `_Plan`, so that the walk has nothing to decide.
"""

import dataclasses
from typing import NamedTuple

import keras

from unet_fast.errors import UserError
from unet_fast.layers import (
    CenterCrop,
    FusedConv2D,
    FusedConv2DTranspose,
    check_backend,
    fused_faster_on_cpu,
    weights_cast_together,
)

_SPATIAL = (1, 2)
# What keeps zeros and positive numbers as they are, or drops some: a ReLU's output stays one for `input_is_relu`.
_KEEPS_RELU = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout2D,
    keras.layers.MaxPooling2D,
    keras.layers.Cropping2D,
    keras.layers.CenterCrop,
    keras.layers.Concatenate,
    CenterCrop,
)
_OTHER_CONVOLUTIONS = (
    keras.layers.SeparableConv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Conv1D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv3DTranspose,
)


class Fused(NamedTuple):
    """A layer that `fuse` replaced."""

    name: str  # of the layer, within nested models "model/layer"
    kind: str  # "FusedConv2D" or "FusedConv2DTranspose"
    absorbed: tuple[str, ...]  # what it computes besides the convolution, such as "MaxPooling2D 'pool1'"


class Left(NamedTuple):
    """A layer that `fuse` left as it was, though it is of a kind that can be fused."""

    name: str
    kind: str
    reason: str


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

    def __init__(self, inputs, outputs, name=None, **kwargs):
        super().__init__(inputs=inputs, outputs=outputs, name=name, **kwargs)

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


def _is_graph(operation):
    return isinstance(operation, keras.Model) and bool(getattr(operation, "inputs", None))


def _structure(model):
    """(inputs, outputs) with the lists and dicts that the model takes and gives."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0], model.outputs[0]
    return model.input, model.output


def _calls(model):
    """The nodes of a model's graph in an order in which they can be computed, without those of the inputs."""
    graph = model if hasattr(model, "_nodes_by_depth") else model._functional
    known, calls = {id(tensor) for tensor in graph.inputs}, []
    for _, nodes in sorted(graph._nodes_by_depth.items(), reverse=True):
        for node in nodes:
            # As Keras does: a functional model may hold nodes that lead to one of its inputs.
            if node.operation and not node.is_input and all(id(tensor) in known for tensor in node.input_tensors):
                calls.append(node)
                known |= {id(tensor) for tensor in node.outputs}
    return calls


def _times_called(model):
    """How often each layer is called in the graphs of a model and of those within it, by the layer's id."""
    graphs, found, times = [model], {id(model)}, {}
    for graph in graphs:
        for operation in (node.operation for node in _calls(graph)):
            times[id(operation)] = times.get(id(operation), 0) + 1
            if _is_graph(operation) and id(operation) not in found:
                found.add(id(operation))
                graphs.append(operation)
    return times


def _rebuilt(model, call, model_class):
    """A model of the same inputs and outputs, each of whose calls is computed by call(node, tensors).

    Args:
        call: stores the new tensors of a node under the ids of the old ones in the dict `tensors`.
    """
    inputs, outputs = _structure(model)
    tensors = {id(tensor): tensor for tensor in keras.tree.flatten(inputs)}
    for node in _calls(model):
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


@dataclasses.dataclass
class _Site:
    """A call of a convolution that is fused, and the calls that it takes into itself."""

    inputs: list  # one tensor of the old graph, or two: [x, skip]
    output: object  # tensor: the convolution's, or that of the ReLU behind it
    relu: bool = False  # whether a ReLU behind it is absorbed
    input_is_relu: bool = False
    pooled: list = dataclasses.field(default_factory=list)  # tensors: outputs of the absorbed poolings
    absorbed: list = dataclasses.field(default_factory=list)  # nodes


class _Plan:
    """Which calls of a model's graph are fused: `sites` by the id of the convolution's node, and `absorbed` node ids."""

    def __init__(self, model, prefix, left, times):
        self.calls = _calls(model)
        self.prefix, self.left, self.times = prefix, left, times
        self.producers = {id(tensor): node for node in self.calls for tensor in node.outputs}
        self.consumers = {}
        for node in self.calls:
            for tensor in node.input_tensors:
                self.consumers.setdefault(id(tensor), []).append(node)
        self.results = {id(tensor) for tensor in keras.tree.flatten(_structure(model)[1])}
        self.reasons = {}  # of the calls beside a convolution that are left, by the node's id
        self.sites, self.absorbed = {}, set()
        for node in self.calls:
            if type(node.operation) in _STOCK and self._obstacle(node.operation) is None:
                self._add_site(node)
        for node, site in ((node, self.sites[id(node)]) for node in self.calls if id(node) in self.sites):
            once = times[id(node.operation)] == 1
            site.input_is_relu = once and all(self._is_relu_output(tensor) for tensor in site.inputs)
        for node in self.calls:
            self._note_left(node)

    def _obstacle(self, layer):
        """Why a Conv2D or Conv2DTranspose is left, or None."""
        if layer.activity_regularizer is not None:
            return "it has an activity regularizer"
        if getattr(layer, "lora_enabled", False):
            return "it has LoRA weights"
        return _STOCK[type(layer)].from_config(layer.get_config())._obstacle

    def _add_site(self, node):
        layer = node.operation
        site = _Site(list(node.input_tensors), node.outputs[0])
        self.sites[id(node)] = site
        if self.times[id(layer)] > 1:
            return
        if layer.activation is keras.activations.linear:
            self._absorb_relu(site, layer)
        if type(layer) is keras.layers.Conv2D:
            for pool in self._readers(site.output):
                reason = _pool_obstacle(pool, layer)
                if reason is None:
                    site.pooled.append(pool.outputs[0])
                    site.absorbed.append(pool)
                elif _is_pool(pool.operation):
                    self.reasons[id(pool)] = reason
            self._absorb_concatenation(site, layer)
        self.absorbed |= {id(absorbed) for absorbed in site.absorbed}

    def _readers(self, tensor):
        return self.consumers.get(id(tensor), [])

    def _only_reader(self, tensor):
        """The only call that uses a tensor, or None."""
        readers = self._readers(tensor)
        return readers[0] if len(readers) == 1 and id(tensor) not in self.results else None

    def _absorb_relu(self, site, layer):
        reader = self._only_reader(site.output)
        if reader is not None and _is_relu(reader.operation) and _computes_in(reader, layer):
            site.relu = True
            site.output = reader.outputs[0]
            site.absorbed.append(reader)

    def _absorb_concatenation(self, site, layer):
        node = self.producers.get(id(site.inputs[0]))
        if node is None or not _is_concatenation(node):
            return
        reason = None
        if len(node.input_tensors) != 2:
            reason = f"it joins {len(node.input_tensors)} inputs, and the op takes two"
        elif self._only_reader(node.outputs[0]) is None:
            reason = "more than one layer uses its output"
        elif not _computes_in(node, layer):
            reason = f"its dtype is not that of {layer.name!r}"
        if reason is not None:
            self.reasons[id(node)] = reason
            return
        x, skip = node.input_tensors
        site.absorbed.append(node)
        crop = self.producers.get(id(skip))
        source = None if crop is None else _cropped_from(crop, x)
        if source is not None and self._only_reader(skip) is node and _computes_in(crop, layer):
            skip = source
            site.absorbed.append(crop)
        site.inputs = [x, skip]

    def _is_relu_output(self, tensor):
        """Whether every number in a tensor of the old graph is, for all that a gradient can tell, a ReLU's output."""
        node = self.producers.get(id(tensor))
        if node is None:
            return False
        operation = node.operation
        if type(operation) in _KEEPS_RELU or _is_concatenation(node) or type(operation).__name__ == "GetItem":
            sources = node.input_tensors[:1] if isinstance(operation, CenterCrop) else node.input_tensors
            return all(self._is_relu_output(source) for source in sources)
        return _is_relu(operation) or getattr(operation, "activation", None) is keras.activations.relu

    def _note_left(self, node):
        """Adds to the report a call that was not fused, once a layer."""
        layer = node.operation
        if id(node) in self.sites or id(node) in self.absorbed:
            return
        kind, reason = type(layer).__name__, self.reasons.get(id(node))
        if type(layer) in _STOCK:
            reason = self._obstacle(layer)
        elif isinstance(layer, _OTHER_CONVOLUTIONS):
            reason = "there is no fused op of this kind"
        elif isinstance(layer, tuple(_STOCK)) and not isinstance(layer, FusedConv2D | FusedConv2DTranspose):
            reason = f"it is a subclass of {type(layer).__mro__[1].__name__}"
        elif reason is None and _is_relu(layer):
            reason = self._reason_of_relu(node)
        elif reason is None and (_is_pool(layer) or _is_concatenation(node)):
            reason = "it is not next to a convolution that is fused with what is around it"
        entry = Left(self.prefix + layer.name, kind, reason)
        if reason is not None and entry not in self.left:
            self.left.append(entry)

    def _reason_of_relu(self, node):
        producer = self.producers.get(id(node.input_tensors[0]))
        if producer is None or id(producer) not in self.sites:
            name = (
                "an input" if producer is None else f"{type(producer.operation).__name__} {producer.operation.name!r}"
            )
            return f"it follows {name}, which is not fused"
        if self._only_reader(node.input_tensors[0]) is None:
            return "its input is used elsewhere too"
        return "the convolution before it is called several times, has an activation, or is of another dtype"


_STOCK = {keras.layers.Conv2D: FusedConv2D, keras.layers.Conv2DTranspose: FusedConv2DTranspose}


def _fused_model(model, backend, prefix, fused, left, others, made, times, *, outer=keras.Model):
    """The model on fused layers; appends to `fused`, `left` and `others`.

    Args:
        made: dict of the new layers and models by the old ones' ids, for those that are called several times.
        times: how often a layer is called in all the graphs, by its id.
    """
    plan = _Plan(model, prefix, left, times)

    def call(node, tensors):
        operation, key = node.operation, id(node.operation)
        site = plan.sites.get(id(node))
        if id(node) in plan.absorbed:
            return
        if _is_graph(operation):
            if key not in made:
                inner = f"{prefix}{operation.name}/"
                made[key] = _fused_model(operation, backend, inner, fused, left, others, made, times)
            _call_as_before(node, tensors, made[key])
            return
        if site is None:
            _call_as_before(node, tensors)
            return
        kind = _STOCK[type(operation)]
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
        if prefix + operation.name not in named and not _is_graph(operation):
            kind = type(operation).__name__
            others[kind] = others.get(kind, 0) + 1
    return new


def _computes_in(node, layer):
    """Whether a call beside a convolution has its dtype, so that casts stay where they were."""
    operation = node.operation
    dtypes = {keras.backend.standardize_dtype(tensor.dtype) for tensor in node.outputs}
    dtypes.add(getattr(operation, "compute_dtype", layer.compute_dtype))
    return dtypes == {layer.compute_dtype}


def _is_relu(operation):
    """Whether an operation is max(x, 0): a layer, or what `keras.ops.relu` or `keras.activations.relu` leave in a graph."""
    if isinstance(operation, keras.layers.Activation):
        return type(operation) is keras.layers.Activation and operation.activation is keras.activations.relu
    plain = not isinstance(operation, keras.layers.Layer) and type(operation).__name__ in ("Relu", "ReLU")
    if not plain and type(operation) is not keras.layers.ReLU:
        return False
    slope, threshold = getattr(operation, "negative_slope", 0), getattr(operation, "threshold", 0)
    return not slope and not threshold and getattr(operation, "max_value", None) is None


def _is_pool(operation):
    return isinstance(operation, keras.layers.MaxPooling2D | keras.layers.AveragePooling2D)


def _pool_obstacle(node, layer):
    """Why a call behind a convolution is no pooling that it can take into itself, or None."""
    pool = node.operation
    if type(pool) is not keras.layers.MaxPooling2D:
        return "it is no MaxPooling2D"
    if (tuple(pool.pool_size), tuple(pool.strides)) != ((2, 2), (2, 2)):
        return f"pool_size={tuple(pool.pool_size)} and strides={tuple(pool.strides)} are not 2"
    even = all(size is not None and size % 2 == 0 for size in (node.input_tensors[0].shape[axis] for axis in _SPATIAL))
    if pool.padding != "valid" and not even:
        return "padding='same' of a size that is odd or not known"
    if pool.data_format != "channels_last":
        return "data_format='channels_first'"
    return None if _computes_in(node, layer) else f"its dtype is not that of {layer.name!r}"


def _is_concatenation(node):
    """Whether a call joins images by their channels."""
    operation = node.operation
    if isinstance(operation, keras.layers.Layer):
        named = type(operation) is keras.layers.Concatenate
    else:
        named = type(operation).__name__ == "Concatenate"
    tensors = node.input_tensors
    return named and all(len(tensor.shape) == 4 for tensor in tensors) and operation.axis in (-1, 3)


def _cropped_from(node, x):
    """What a call crops about the centre to the size of tensor x, as the op does; None for any other call."""
    operation, source = node.operation, node.input_tensors[0]
    if type(operation) is CenterCrop:
        like = node.input_tensors[1]
        sizes = [tensor.shape[1:3] for tensor in (like, x)]
        return source if like is x or (sizes[0] == sizes[1] and None not in sizes[0]) else None
    before, after = source.shape[1:3], node.outputs[0].shape[1:3]
    if type(operation) is keras.layers.Cropping2D and operation.data_format == "channels_last":
        margins = operation.cropping
    elif type(operation) is keras.layers.CenterCrop and operation.data_format == "channels_last":
        if None in before or any(outer < inner for outer, inner in zip(before, after, strict=True)):
            return None  # where an image is too small, Keras scales it
        margins = [((outer - inner) // 2, -((inner - outer) // 2)) for outer, inner in zip(before, after, strict=True)]
    elif type(operation).__name__ == "GetItem":
        margins = _sliced_margins(node)
    else:
        return None
    return source if margins and all(first == (first + last) // 2 for first, last in margins) else None


def _sliced_margins(node):
    """((top, bottom), (left, right)) of x[:, top:-bottom, left:-right] or the like; None for other slices."""
    keys = [*node.arguments.args[1:], *node.arguments.kwargs.values()]
    key = keys[0] if keys and isinstance(keys[0], (tuple, list)) else ()
    if not 3 <= len(key) <= 4 or not all(isinstance(part, slice) and part.step in (None, 1) for part in key):
        return None
    if any((part.start or 0, part.stop) != (0, None) for part in (key[0], *key[3:])):
        return None
    margins = []
    for part, size in zip(key[1:3], node.input_tensors[0].shape[1:3], strict=True):
        first, stop = part.start or 0, part.stop
        if stop is not None and stop > 0:
            stop = None if size is None else min(stop - size, 0)
            if stop is None:
                return None
        if first < 0:
            return None
        margins.append((first, -(stop or 0)))
    return margins


# --- Undoing it


def _unfused_model(model, made):
    names = {node.operation.name for node in _calls(model)}

    def named(base):
        name, number = base, 1
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.add(name)
        return name

    def call(node, tensors):
        layer, key = node.operation, id(node.operation)
        if _is_graph(layer):
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
