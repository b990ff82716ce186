"""FusedUNet as an ONNX graph, written out layer by layer.

The network is known, so nothing is converted: a graph of some 60 nodes of opset 17 says the same on every runtime,
whatever TensorFlow and its converters become. Inside, images are [N, C, H, W], ONNX's only layout; the input and output
are [N, H, W, C] as everywhere else.
"""

import dataclasses
import importlib.util
import json

import numpy as np

from unet_fast import __version__
from unet_fast.errors import UserError
from unet_fast.models.geometry import nearest_input_sizes

_OPSET, _IR = 17, 8  # of ONNX 1.12 (2022): runtimes older than that are rare, and nothing newer is needed
_LARGEST = 2**31 - 2**20  # bytes of a protobuf file, with room for the graph itself


def check_installed():
    """Raises UserError unless the packages for ONNX are there."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"export to ONNX expects the package {package}, which is not installed; "
                "`pip install 'unet_fast[export]'` brings it"
            )


def write(path, model, facts, input_name, output_name):
    """Write the network with its normalisation and softmax to an ONNX file.

    Args:
        path: file to write.
        model: FusedUNet, whose weights and geometry are taken; its input size is not.
        facts: `unet_fast.export.ExportFacts`.
        input_name, output_name: of float32 [batch, height, width, channels] and [batch, height', width', classes].

    Raises:
        UserError: more weights than an ONNX file holds.

    Example: see `unet_fast.export.export_run`.
    """
    import onnx

    graph = _Graph(np.float16 if facts.precision == "float16" else np.float32)
    size = sum(weight.size for weight in model.get_weights()) * np.dtype(graph.dtype).itemsize
    if size > _LARGEST:
        raise UserError(
            f"expected weights of less than 2 GiB, as an ONNX file holds, got {size / 2**30:.1f} GiB; "
            "use --precision float16, or --format savedmodel"
        )
    low, high = facts.value_range
    x = graph.add("Sub", input_name, graph.number(low))
    x = graph.add("Div", x, graph.number((high - low) / 2))
    x = graph.add("Sub", x, graph.number(1.0))
    x = graph.add("Transpose", x, perm=(0, 3, 1, 2))
    x = _logits(graph, graph.add("Cast", x, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(graph.dtype))), model)
    x = graph.add("Softmax", graph.add("Cast", x, to=onnx.TensorProto.FLOAT), axis=1)
    graph.add("Transpose", x, perm=(0, 2, 3, 1), output=output_name)

    def image(name, prefix, channels):
        shape = ["batch", f"{prefix}height", f"{prefix}width", channels]
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            model.name,
            [image(input_name, "", facts.channels)],
            [image(output_name, "output_", model.num_classes)],
            graph.weights,
        ),
        opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
        ir_version=_IR,
        producer_name="unet_fast",
        producer_version=__version__,
    )
    onnx.helper.set_model_props(proto, {"unet_fast": json.dumps(dataclasses.asdict(facts))})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, str(path))


def loaded(path, output_name):
    """The network of a file, as onnxruntime computes it on the CPU: a function of an image, float32 [N, H, W, C]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run([output_name], {name: image})[0]


class _Graph:
    """Nodes and weights as they are added; names of what they compute are made up on the way."""

    def __init__(self, dtype):
        self.dtype, self.nodes, self.weights = dtype, [], []

    def add(self, kind, *inputs, output=None, **attributes):
        import onnx

        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def array(self, value, name):
        import onnx

        self.weights.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def number(self, value):
        return self.array(np.float32(value), f"number_{len(self.weights)}")

    def numbers(self, *values):
        return self.array(np.array(values, np.int64), f"numbers_{len(self.weights)}")

    def layer(self, kind, x, layer, order, **attributes):
        """A convolution of a Keras layer with its activation; `order` brings its kernel into ONNX's."""
        kernel, bias = layer.get_weights()
        kernel = self.array(kernel.transpose(order).astype(self.dtype), f"{layer.name}/kernel")
        bias = self.array(bias.astype(self.dtype), f"{layer.name}/bias")
        x = self.add(kind, x, kernel, bias, **attributes)
        return x if layer.name == "logits" else self.add("Relu", x)


def _logits(graph, x, model):
    """The network itself; x and what is returned are [N, C, H, W]."""
    same = model.padding == "same"

    def conv(name, x):
        layer = model.get_layer(name)
        padded = same and layer.kernel_size == (3, 3)
        return graph.layer("Conv", x, layer, (3, 2, 0, 1), pads=(1,) * 4 if padded else (0,) * 4)

    def transpose(name, x):
        layer = model.get_layer(name)
        # TensorFlow's "same" at stride 2: of a 3x3 kernel's 2n + 1 rows and columns the last is left out.
        pads = (0, 0, 1, 1) if layer.kernel_size == (3, 3) else (0,) * 4
        return graph.layer("ConvTranspose", x, layer, (3, 2, 0, 1), strides=(2, 2), pads=pads)

    side = nearest_input_sizes(1, model.depth, model.padding)[
        1
    ]  # any that fits: what is cropped depends on the level alone
    lost = 0 if same else 4  # pixels that a pair of convolutions takes
    skips = []
    for level in range(1, model.depth + 1):
        x = conv(f"down{level}_conv2", conv(f"down{level}_conv1", x))
        side -= lost
        skips.append((x, side))
        x = graph.add("MaxPool", x, kernel_shape=(2, 2), strides=(2, 2))
        side //= 2
    x = conv("bottom_conv2", conv("bottom_conv1", x))
    side -= lost
    for level in range(model.depth, 0, -1):
        x = transpose(f"up{level}_transpose", x)
        side *= 2
        skip, skip_side = skips.pop()
        if margin := skip_side - side:
            first, last = margin // 2, margin - margin // 2
            skip = graph.add(
                "Slice", skip, graph.numbers(first, first), graph.numbers(-last, -last), graph.numbers(2, 3)
            )
        x = graph.add("Concat", x, skip, axis=1)
        x = conv(f"up{level}_conv2", conv(f"up{level}_conv1", x))
        side -= lost
    return conv("logits", x)
