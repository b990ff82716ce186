"""Which calls in the graph of a Keras model a fused convolution takes into itself; `unet_fast.fusion` acts on it."""

import dataclasses
from typing import NamedTuple

import keras

from unet_fast.layers import CenterCrop, FusedConv2D, FusedConv2DTranspose

STOCK = {keras.layers.Conv2D: FusedConv2D, keras.layers.Conv2DTranspose: FusedConv2DTranspose}
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
# Whose output is what the activation gives; another layer may do more to it, or less.
_ENDS_IN_ACTIVATION = (
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
    keras.layers.SeparableConv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Dense,
    FusedConv2D,
    FusedConv2DTranspose,
)
_OTHER_CONVOLUTIONS = (
    keras.layers.SeparableConv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Conv1D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv3DTranspose,
)


class Left(NamedTuple):
    """A layer that `fuse` left as it was, though it is of a kind that can be fused."""

    name: str
    kind: str
    reason: str


def is_graph(operation):
    return isinstance(operation, keras.Model) and bool(getattr(operation, "inputs", None))


def structure(model):
    """(inputs, outputs) with the lists and dicts that the model takes and gives."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0], model.outputs[0]
    return model.input, model.output


def calls_of(model):
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


@dataclasses.dataclass
class Site:
    """A call of a convolution that is fused, and the calls that it takes into itself."""

    inputs: list  # one tensor of the old graph, or two: [x, skip]
    output: object  # tensor: the convolution's, or that of the ReLU behind it
    relu: bool = False  # whether a ReLU behind it is absorbed
    input_is_relu: bool = False
    pooled: list = dataclasses.field(default_factory=list)  # tensors: outputs of the absorbed poolings
    absorbed: list = dataclasses.field(default_factory=list)  # nodes


class Plan:
    """Which calls of a model's graph are fused: `sites` by the id of the convolution's node, and `absorbed` node ids."""

    def __init__(self, model, prefix, left, times):
        self.calls = calls_of(model)
        self.prefix, self.left, self.times = prefix, left, times
        self.producers = {id(tensor): node for node in self.calls for tensor in node.outputs}
        self.consumers = {}
        for node in self.calls:
            for tensor in node.input_tensors:
                self.consumers.setdefault(id(tensor), []).append(node)
        self.results = {id(tensor) for tensor in keras.tree.flatten(structure(model)[1])}
        self.reasons = {}  # of the calls beside a convolution that are left, by the node's id
        self.sites, self.absorbed = {}, set()
        for node in self.calls:
            if type(node.operation) in STOCK and self._obstacle(node.operation) is None:
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
        if getattr(layer, "output_padding", None) is not None:  # which Keras 3.12's config does not tell
            return f"output_padding={layer.output_padding} is not None"
        return STOCK[type(layer)].from_config(layer.get_config())._obstacle

    def _add_site(self, node):
        layer = node.operation
        site = Site(list(node.input_tensors), node.outputs[0])
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
        ends_in_activation = type(operation) in _ENDS_IN_ACTIVATION
        return _is_relu(operation) or (ends_in_activation and operation.activation is keras.activations.relu)

    def _note_left(self, node):
        """Adds to the report a call that was not fused, once a layer."""
        layer = node.operation
        if id(node) in self.sites or id(node) in self.absorbed:
            return
        kind, reason = type(layer).__name__, self.reasons.get(id(node))
        if type(layer) in STOCK:
            reason = self._obstacle(layer)
        elif isinstance(layer, _OTHER_CONVOLUTIONS):
            reason = "there is no fused op of this kind"
        elif isinstance(layer, tuple(STOCK)) and not isinstance(layer, FusedConv2D | FusedConv2DTranspose):
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
