"""Which engine each convolution of a network runs on, on a GPU of a given compute capability."""

import keras

from unet_fast.layers import FusedConv2D, FusedConv2DTranspose


def layer_choices(model, batch, compute_capability, dtype="float16"):
    """What each product of each fused convolution of a model would run on, on a GPU.

    Args:
        model: Keras model with fused layers and inputs of known size, such as `FusedUNet()`.
        batch: images a step.
        compute_capability: of the GPU, 90 for 9.0; it need not be here.
        dtype: that the layers compute in.

    Returns:
        list of dict, a product each: `layer`, its name; `shape`, "570x570x64 > 568x568x64", inputs joined by "+";
        `product`: "forward", "input gradient" or "weight gradient"; `engine`: "sm90", "cudnn", "wmma", "direct" or "none";
        `detail`: its tile, or why it is this engine.

    Raises:
        ImportError: the library was built without CUDA, so there is no engine to choose.

    Source: `csrc/kernels/conv/dispatch.cu`, where products are given to engines.

    >>> from unet_fast import FusedUNet, choices
    >>> try:
    ...     rows = choices.layer_choices(FusedUNet(backend="fused"), 8, 90)
    ... except ImportError:  # built without CUDA
    ...     rows = [{"layer": "down1_conv1", "engine": "direct"}]
    >>> rows[0]["layer"], rows[0]["engine"]
    ('down1_conv1', 'direct')
    """
    from unet_fast import _native

    if not hasattr(_native, "gpu"):
        raise ImportError("the library was built without CUDA")
    rows = []
    for layer, shape, problem, transposed in convolutions(model, batch, dtype):
        ask = _native.gpu.conv2d_transpose_choices if transposed else _native.gpu.conv2d_choices
        for choice in ask(problem, compute_capability):
            row = {"layer": layer.name, "shape": shape, "product": choice.product}
            rows.append(row | {"engine": choice.engine, "detail": choice.detail})
    return rows


def convolutions(model, batch, dtype):
    """The problems that the kernels are given by a model's fused convolutions.

    Args:
        model, batch, dtype: as `layer_choices`; the library was built with CUDA.

    Yields:
        (layer, its shapes in words, `_native.gpu` problem, whether it is a transposed convolution).

    >>> from unet_fast import FusedUNet, _native, choices
    >>> model = FusedUNet((32, 32, 1), filters=8, depth=1, padding="same", backend="fused")
    >>> len(list(choices.convolutions(model, 1, "float16"))) if _native.cuda else 8
    8
    """
    from unet_fast import _native

    for layer in model.layers:
        if isinstance(layer, FusedConv2D):
            problem = _convolution(_native.gpu, layer, batch, dtype)
        elif isinstance(layer, FusedConv2DTranspose):
            problem = _transposed(_native.gpu, layer, batch, dtype)
        else:
            continue
        outputs = keras.tree.flatten(layer.output)
        shape = f"{' + '.join(map(_shape, keras.tree.flatten(layer.input)))} > {_shape(outputs[0])}"
        yield layer, shape, problem, isinstance(layer, FusedConv2DTranspose)


def _shape(tensor):
    return "x".join(map(str, tensor.shape[1:]))


def _convolution(gpu, layer, batch, dtype):
    x, *skip = keras.tree.flatten(layer.input)
    problem = gpu.Conv2DProblem()
    problem.dtype, problem.batch = dtype, batch
    _, problem.height, problem.width, problem.channels = x.shape
    if skip:
        _, problem.skip_height, problem.skip_width, problem.skip_channels = skip[0].shape
    problem.kernel_size, problem.filters = layer.kernel_size[0], layer.filters
    problem.same, problem.pool = layer.padding == "same", layer.pool
    problem.relu = layer.activation is keras.activations.relu
    problem.input_is_relu = layer.input_is_relu
    return problem


def _transposed(gpu, layer, batch, dtype):
    problem = gpu.Conv2DTransposeProblem()
    problem.dtype, problem.batch = dtype, batch
    _, problem.height, problem.width, problem.channels = layer.input.shape
    problem.kernel_size, problem.filters = layer.kernel_size[0], layer.filters
    problem.relu = layer.activation is keras.activations.relu
    return problem
