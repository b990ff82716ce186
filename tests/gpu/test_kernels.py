"""The GPU kernels against float64, with PyTorch's 16-bit ops on the same card as the measure of what is good enough."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)
kernels = pytest.importorskip("kernels")

pytestmark = pytest.mark.gpu
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
both = pytest.mark.parametrize("dtype", kernels.DTYPES.values(), ids=kernels.DTYPES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def normal(*shape, dtype, scale=1.0):
    return (scale * torch.randn(shape, device="cuda")).to(dtype)


def error(value, expected):
    value, expected = value.double(), expected.double()
    assert value.shape == expected.shape
    if value.numel() == 0:
        return 0.0
    assert value.isfinite().all()
    norm = expected.norm()
    return ((value - expected).norm() / norm if norm > 0 else value.abs().max()).item()


def check(got, exact, stock):
    """The error is at most twice that of PyTorch's own op, or one rounding of the result."""
    for value, expected, peer in zip(got, exact, stock, strict=True):
        if value is None:
            assert expected is None
            continue
        limit = max(2 * error(peer, expected), ROUNDING[value.dtype])
        assert error(value, expected) <= limit


def double(values):
    return [None if v is None else v.double() for v in values]


def listed(value):
    return list(value) if isinstance(value, list | tuple) else [value]


def check_conv2d(x, kernel, bias, skip, choices=None, pool=False, input_is_relu=False, window=None, **flags):
    got = listed(kernels.conv2d_bias_relu(x, kernel, bias, skip, choices=choices, pool=pool, **flags))
    args = [x, kernel, bias, skip]
    exact = listed(kernels.reference_conv2d(*double(args), pool=pool, **flags))
    check(got, exact, listed(kernels.reference_conv2d(*args, pool=pool, **flags)))
    if pool:
        torch.testing.assert_close(got[1], kernels.max_pool2d(got[0]), rtol=0, atol=0)

    y = got[0]
    dy, dpooled = torch.randn_like(y), torch.randn_like(got[1]) if pool else None
    if window is not None:
        dy = dy[:, : window[0], : window[1]].contiguous()
    args = [dy, y, x, kernel, skip, dpooled]
    flags["input_is_relu"] = input_is_relu
    got = kernels.conv2d_bias_relu_grad(*args, choices=choices, **flags)
    exact = kernels.reference_conv2d_grad(*double(args), **flags)
    check(got, exact, kernels.reference_conv2d_grad(*args, **flags))


def check_transpose_gradients(y, x, kernel, *, relu=True, choices=None):
    args = [torch.randn_like(y), y, x, kernel]
    got = kernels.conv2d_transpose_bias_relu_grad(*args, relu=relu, choices=choices)
    exact = kernels.reference_conv2d_transpose_grad(*double(args), relu=relu)
    check(got, exact, kernels.reference_conv2d_transpose_grad(*args, relu=relu))


@both
@pytest.mark.parametrize(
    ("size", "channels", "skip", "filters", "k", "flags"),
    [
        ((2, 20, 24), 64, None, 64, 3, {}),
        ((1, 17, 13), 64, None, 128, 3, {"pool": True, "input_is_relu": True}),
        ((3, 16, 18), 8, None, 16, 3, {"same": True, "pool": True}),
        ((2, 11, 9), 40, None, 136, 3, {"same": True, "relu": False}),
        ((2, 12, 14), 64, (2, 17, 20, 32), 64, 3, {"input_is_relu": True}),
        ((2, 12, 14), 24, (2, 12, 14, 40), 72, 3, {"same": True, "pool": True}),
        ((2, 12, 14), 0, (2, 14, 14, 40), 72, 3, {"input_is_relu": True}),  # of two inputs one is empty
        ((40, 3, 3), 16, None, 32, 3, {}),
        ((2, 9, 10), 128, None, 264, 1, {}),
        ((2, 9, 10), 16, (2, 11, 13, 8), 24, 1, {"pool": True}),
        # dy of y's centre alone
        ((2, 20, 24), 64, None, 64, 3, {"pool": True, "window": (12, 10)}),
        ((3, 17, 13), 24, None, 64, 3, {"pool": True, "same": True, "window": (10, 13)}),
        ((2, 12, 14), 24, (2, 17, 19, 40), 72, 3, {"input_is_relu": True, "window": (5, 7)}),
        ((2, 12, 14), 16, None, 24, 3, {"relu": False, "window": (10, 1)}),
        ((2, 10, 9), 9, (2, 13, 12, 5), 11, 3, {"pool": True, "input_is_relu": True, "window": (3, 4)}),
        ((2, 21, 19), 3, None, 64, 3, {"window": (8, 9)}),
        ((2, 9, 11), 16, None, 2, 1, {"window": (4, 5)}),
        ((1, 33, 31), 1024, None, 512, 3, {}),
        # edges: channel counts that are no multiple of 8
        ((2, 10, 9), 12, None, 20, 3, {"same": True, "pool": True, "input_is_relu": True}),
        ((2, 10, 9), 9, (2, 13, 12, 5), 11, 3, {"input_is_relu": True}),
        ((2, 10, 9), 8, (2, 13, 12, 3), 16, 1, {}),
        # few input channels
        ((2, 40, 42), 1, None, 64, 3, {}),
        ((2, 21, 19), 3, None, 64, 3, {"same": True, "pool": True}),
        ((2, 10, 12), 7, None, 70, 3, {"relu": False, "pool": True}),
        ((2, 10, 12), 5, None, 24, 1, {}),
        ((2, 37, 45), 4, None, 72, 3, {"same": True, "relu": False}),
        ((2, 18, 20), 2, None, 20, 3, {"relu": False}),
        ((4, 280, 280), 1, None, 16, 3, {"same": True, "relu": False}),  # more tiles than any card runs at once
        # few filters
        ((2, 30, 31), 64, None, 2, 1, {"relu": False, "input_is_relu": True}),
        ((2, 9, 11), 72, None, 5, 1, {}),
        ((2, 9, 11), 13, None, 8, 1, {"same": True}),
        ((1, 9, 11), 1, None, 1, 1, {"relu": False}),
        # Up to 128 channels and 64 filters, or the other way round, have kernels of their own on some cards.
        ((2, 13, 98), 64, None, 64, 3, {"input_is_relu": True}),
        ((2, 38, 58), 64, None, 64, 3, {"pool": True}),
        ((2, 9, 41), 40, None, 56, 3, {"same": True, "pool": True, "input_is_relu": True}),
        ((2, 20, 66), 64, None, 128, 3, {"input_is_relu": True}),
        ((2, 21, 50), 128, None, 48, 3, {"input_is_relu": True}),
        ((1, 21, 23), 48, (1, 29, 32, 64), 64, 3, {"input_is_relu": True}),
        ((1, 20, 22), 64, (1, 20, 22, 64), 64, 3, {"same": True, "input_is_relu": True}),
        ((2, 300, 302), 64, None, 64, 3, {"pool": True, "input_is_relu": True}),
        ((1, 1, 1), 8, None, 8, 3, {"same": True, "input_is_relu": True}),
        ((2, 9, 11), 200, None, 3, 1, {"relu": False, "input_is_relu": True}),
        ((4, 280, 280), 16, None, 2, 1, {"relu": False, "input_is_relu": True}),
        ((1, 9, 11), 16, None, 2, 1, {"pool": True}),
        ((2, 9, 11), 16, None, 2, 3, {}),
    ],
)
def test_conv2d_bias_relu(dtype, size, channels, skip, filters, k, flags):
    total = channels + (skip[3] if skip else 0)
    x = normal(*size, channels, dtype=dtype)
    kernel = normal(k, k, total, filters, dtype=dtype, scale=(k * k * total) ** -0.5)
    check_conv2d(
        x, kernel, normal(filters, dtype=dtype), normal(*skip, dtype=dtype) if skip else None,
        **flags,
    )  # fmt: skip


@both
@pytest.mark.parametrize("splits", [1, 3, 1000])
@pytest.mark.parametrize(
    ("engine", "gemm", "wgrad"),
    [
        (engine, tile % gemms, tile % wgrads)
        for engine, (gemms, wgrads) in kernels.native.engines.items()
        for tile in range(max(gemms, wgrads))
    ],
)
@pytest.mark.parametrize("pool", [False, True])
def test_every_tile_of_every_engine_gives_the_result(pool, engine, gemm, wgrad, splits, dtype):
    """With a skip, and without one but with a pool: no tile serves both."""
    x, kernel = normal(2, 22, 18, 200, dtype=dtype), normal(3, 3, 200 if pool else 264, 136, dtype=dtype, scale=0.02)
    skip = None if pool else normal(2, 30, 24, 64, dtype=dtype)
    choices = kernels.tuning(engine=engine, gemm=gemm, wgrad=wgrad, splits=splits)
    check_conv2d(x, kernel, normal(136, dtype=dtype), skip, choices, same=not pool, pool=pool, input_is_relu=True)


@both
@pytest.mark.parametrize("gemm", range(kernels.native.engines.get("sm90", (0, 0))[0]))
@pytest.mark.parametrize("pool", [False, True])
def test_every_tile_of_more_than_a_gpu_runs_at_once(pool, gemm, dtype):
    x, kernel = normal(3, 122, 124, 72, dtype=dtype), normal(3, 3, 72, 136, dtype=dtype, scale=0.04)
    check_conv2d(x, kernel, normal(136, dtype=dtype), None, kernels.tuning(engine="sm90", gemm=gemm), pool=pool)


@both
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("splits", [0, 5])
@pytest.mark.parametrize("wgrad", range(kernels.native.engines.get("sm90", (0, 0))[1]))
def test_weight_gradients_of_wide_images(wgrad, splits, same, dtype):
    """Wider than the 64 positions that a block takes at a time, which end in the midst of an image."""
    x, kernel = normal(3, 11, 150, 72, dtype=dtype), normal(3, 3, 72, 80, dtype=dtype, scale=0.04)
    choices = kernels.tuning(engine="sm90", wgrad=wgrad, splits=splits)
    check_conv2d(x, kernel, normal(80, dtype=dtype), None, choices, same=same)


@both
@pytest.mark.parametrize(
    ("size", "channels", "filters", "k", "relu"),
    [
        ((2, 9, 11), 64, 32, 3, True),
        ((2, 9, 11), 128, 64, 2, True),
        ((1, 28, 28), 256, 136, 3, False),
        ((2, 9, 58), 128, 64, 3, True),
        ((1, 30, 49), 96, 40, 3, False),
        ((2, 150, 130), 72, 64, 3, True),
        ((3, 5, 4), 12, 7, 3, True),
        ((3, 5, 4), 5, 8, 2, False),
        ((1, 1, 1), 8, 8, 3, True),
    ],
)
def test_conv2d_transpose_bias_relu(dtype, size, channels, filters, k, relu):
    x = normal(*size, channels, dtype=dtype)
    kernel = normal(k, k, filters, channels, dtype=dtype, scale=(2 * channels) ** -0.5)
    args = [x, kernel, normal(filters, dtype=dtype)]
    y = kernels.conv2d_transpose_bias_relu(*args, relu=relu)
    check(
        [y],
        [kernels.reference_conv2d_transpose(*double(args), relu=relu)],
        [kernels.reference_conv2d_transpose(*args, relu=relu)],
    )
    check_transpose_gradients(y, x, kernel, relu=relu)


@both
@pytest.mark.parametrize("splits", [0, 5])
@pytest.mark.parametrize("wgrad", range(kernels.native.engines.get("sm90", (0, 0))[1]))
@pytest.mark.parametrize("filters", [80, 128])
def test_weight_gradients_of_wide_images_of_transposed_convolutions(filters, wgrad, splits, dtype):
    x, kernel = normal(3, 7, 90, 72, dtype=dtype), normal(3, 3, filters, 72, dtype=dtype, scale=0.08)
    y = kernels.conv2d_transpose_bias_relu(x, kernel, normal(filters, dtype=dtype))
    check_transpose_gradients(y, x, kernel, choices=kernels.tuning(engine="sm90", wgrad=wgrad, splits=splits))


@both
@pytest.mark.parametrize("gemm", range(kernels.native.engines.get("sm90", (0, 0))[0]))
@pytest.mark.parametrize(
    ("size", "channels", "filters"),
    [
        ((2, 9, 21), 264, 80),
        ((2, 9, 21), 264, 128),
        ((1, 5, 7), 64, 64),
        ((4, 70, 70), 64, 64),  # more tiles than a GPU runs at once
    ],
)
def test_every_tile_gives_a_transposed_convolution(size, channels, filters, gemm, dtype):
    x, kernel = normal(*size, channels, dtype=dtype), normal(3, 3, filters, channels, dtype=dtype, scale=0.04)
    choices = kernels.tuning(engine="sm90", gemm=gemm)
    args = [x, kernel, normal(filters, dtype=dtype)]
    y = kernels.conv2d_transpose_bias_relu(*args, choices=choices)
    check([y], [kernels.reference_conv2d_transpose(*double(args))], [kernels.reference_conv2d_transpose(*args)])
    check_transpose_gradients(y, x, kernel, choices=choices)


def test_gradients_that_are_not_asked_for_are_left_out():
    dtype = torch.float16
    x, skip = normal(2, 12, 14, 24, dtype=dtype), normal(2, 18, 18, 40, dtype=dtype)
    kernel, y = normal(3, 3, 64, 48, dtype=dtype), normal(2, 10, 12, 48, dtype=dtype)
    args = [torch.randn_like(y), y, x, kernel, skip]
    exact = kernels.reference_conv2d_grad(*double(args), input_is_relu=True)
    stock = kernels.reference_conv2d_grad(*args, input_is_relu=True)
    for unwanted in [(0,), (1,), (0, 1)]:
        want = {name: index not in unwanted for index, name in enumerate(("dx", "dskip"))}
        got = kernels.conv2d_bias_relu_grad(*args, input_is_relu=True, **want)
        check(got, [None if index in unwanted else value for index, value in enumerate(exact)], stock)


def test_a_masked_dy_needs_no_mask():
    dtype = torch.float16
    x, kernel = normal(2, 12, 14, 64, dtype=dtype), normal(3, 3, 64, 64, dtype=dtype)
    y = normal(2, 10, 12, 64, dtype=dtype).relu()
    dy = torch.where(y > 0, torch.randn_like(y), 0)
    for value, expected in zip(
        kernels.conv2d_bias_relu_grad(dy, y, x, kernel, dy_is_masked=True)[:-1],
        kernels.conv2d_bias_relu_grad(dy, y, x, kernel)[:-1],
        strict=True,
    ):
        assert value is None or torch.equal(value, expected)
    # The bias gradient is summed elsewhere, and so in another order.
    dbias = kernels.conv2d_bias_relu_grad(dy, y, x, kernel, dy_is_masked=True)[-1]
    assert error(dbias, dy.double().sum((0, 1, 2))) < 1e-3


@both
@pytest.mark.parametrize("channels", [64, 11])
@pytest.mark.parametrize("flags", [{}, {"pool": True}, {"relu": False, "pool": True}, {"dy_is_masked": True}], ids=str)
@pytest.mark.parametrize("window", [(10, 12), (9, 11), (4, 5), (1, 1), (3, 12)], ids=str)
def test_a_window_of_dy_gives_what_dy_with_zeros_around_it_gives(window, flags, channels, dtype):
    x, kernel = normal(2, 12, 14, 24, dtype=dtype), normal(3, 3, 24, channels, dtype=dtype, scale=0.1)
    y = normal(2, 10, 12, channels, dtype=dtype).relu()
    dy = normal(2, *window, channels, dtype=dtype)
    if "dy_is_masked" in flags:
        dy = torch.where(kernels.crop_like(y, dy) > 0, dy, 0)
    flags = dict(flags)
    args = [y, x, kernel, None, normal(2, 5, 6, channels, dtype=dtype) if flags.pop("pool", False) else None]
    got = kernels.conv2d_bias_relu_grad(dy, *args, **flags)
    whole = kernels.conv2d_bias_relu_grad(kernels.padded_like(dy, y), *args, **flags)
    for value, expected in zip(got[:-1], whole[:-1], strict=True):
        assert value is None or torch.equal(value, expected)
    # Of a whole dy that needs no mask, the bias gradient is summed elsewhere, and so in another order.
    assert error(got[-1], whole[-1]) <= (1e-2 if "dy_is_masked" in flags else 0)


def test_a_transposed_convolution_masks_the_gradient_of_a_relu_and_leaves_a_masked_one():
    dtype = torch.float16
    x, kernel = normal(2, 9, 11, 64, dtype=dtype).relu(), normal(3, 3, 32, 64, dtype=dtype)
    y = kernels.conv2d_transpose_bias_relu(x, kernel, normal(32, dtype=dtype))
    dy = torch.where(y > 0, torch.randn_like(y), 0)
    dx, *rest = kernels.conv2d_transpose_bias_relu_grad(dy, y, x, kernel)
    masked, *others = kernels.conv2d_transpose_bias_relu_grad(dy, y, x, kernel, dy_is_masked=True, input_is_relu=True)
    assert torch.equal(masked, torch.where(x > 0, dx, 0))
    assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))


def test_ties_go_to_the_first_maximum():
    y = torch.randint(0, 3, (2, 12, 10, 16), device="cuda").half()
    dpooled = torch.randint(1, 4, (2, 6, 5, 16), device="cuda").half()
    expected = kernels.reference_dz(torch.zeros_like(y).float(), y.float(), dpooled.float(), relu=False)
    assert torch.equal(kernels.max_pool2d_grad(y, dpooled).float(), expected)
    x, kernel = torch.ones(2, 12, 10, 16, device="cuda").half(), torch.eye(16, device="cuda").half().view(1, 1, 16, 16)
    dx, _, _, dbias = kernels.conv2d_bias_relu_grad(torch.zeros_like(y), y, x, kernel, dpooled=dpooled)
    expected = torch.where(y > 0, expected, 0)
    assert torch.equal(dx.float(), expected)
    assert torch.equal(dbias.float(), expected.sum((0, 1, 2)))


@pytest.mark.skipif("cudnn" not in kernels.native.engines, reason="built without the cudnn engine")
def test_cudnn_plans_what_a_unet_consists_of():
    # Its filters are reordered in the workspace, which no other engine needs in a forward pass.
    choices, x = kernels.tuning(engine="cudnn"), torch.empty(2, 30, 30, 64, device="cuda", dtype=torch.float16)
    skip, kernel = torch.empty(2, 34, 34, 64, device="cuda", dtype=torch.float16), torch.empty(3, 3, 128, 64)
    for pool in (False, True):
        p = kernels.conv2d_problem(x, kernel, skip, pool=pool)
        assert kernels.native.conv2d_bias_relu_workspace_bytes(p, choices) > 2 * kernel.numel()
    p = kernels.transpose_problem(x, torch.empty(2, 2, 32, 64), relu=True)
    assert kernels.native.conv2d_transpose_bias_relu_workspace_bytes(p, choices) > 0


@both
def test_cast_is_torchs(dtype):
    # More arrays than a launch takes; none, one and many blocks of them, ends of every kind; what overflows float16.
    sizes = [0, 1, 7, 8, 9, 64, 8191, 8192, 8193, 100000] + [3] * 150
    tensors = [torch.randn(n, device="cuda") * 10.0 ** (i % 7 - 2) for i, n in enumerate(sizes)]
    tensors[5][:3] = torch.tensor([float("inf"), float("nan"), 1e6], device="cuda")
    for got, x in zip(kernels.cast(tensors, dtype), tensors, strict=True):
        torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@both
@pytest.mark.parametrize("shape", [(2, 8, 10, 64), (3, 7, 9, 8), (2, 5, 6, 3), (1, 1, 4, 8)])
def test_max_pool2d(dtype, shape):
    x = normal(*shape, dtype=dtype)
    pooled = torch.nn.functional.max_pool2d(x.permute(0, 3, 1, 2), 2) if shape[1] > 1 else None
    y = kernels.max_pool2d(x)
    if pooled is not None:
        assert torch.equal(y, pooled.permute(0, 2, 3, 1))
    dy = torch.randn_like(y)
    expected = torch.zeros_like(x) if pooled is None else kernels.reference_dz(torch.zeros_like(x), x, dy, relu=False)
    assert torch.equal(kernels.max_pool2d_grad(x, dy), expected)


@both
@pytest.mark.parametrize("labels_dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("classes", "flags"),
    [
        (2, {}),
        (1, {}),
        (5, {"squared": False, "label_smoothing": 0.1}),
        (11, {"ignore_class": 3, "include_background": False}),
        (4, {"ignore_class": 255 - 255, "dice_weight": 0.3, "ce_weight": 2.0, "smooth": 1.0}),
    ],
)
def test_dice_cross_entropy(dtype, labels_dtype, classes, flags):
    logits = normal(3, 61, 83, classes, dtype=dtype, scale=2.0)
    labels = torch.randint(0, classes, logits.shape[:-1], device="cuda").to(labels_dtype)
    weights = torch.rand(classes, device="cuda") + 0.5

    def run(value):
        leaf = value.detach().requires_grad_()
        loss = kernels.reference_dice_cross_entropy(labels, leaf, weights, **flags)
        return loss.detach(), torch.autograd.grad(loss @ dloss.to(loss.dtype), leaf)[0]

    dloss = torch.rand(3, device="cuda") * 1000
    loss, sums, ce = kernels.dice_cross_entropy(labels, logits, weights, **flags)
    dlogits = kernels.dice_cross_entropy_grad(dloss, labels, logits, weights, sums, ce, **flags)
    exact, exact_gradient = run(logits.double())
    assert error(loss, exact) <= 1e-5
    stock, stock_gradient = run(logits.float())
    check([dlogits], [exact_gradient], [stock_gradient.to(dtype)])
    assert error(loss, exact) <= max(2 * error(stock, exact), 2e-6)


def test_dice_cross_entropy_survives_the_largest_logits():
    logits = torch.tensor([6e4, -6e4], device="cuda").half().expand(2, 100, 2).contiguous()
    labels = torch.tensor([0, 1], device="cuda", dtype=torch.uint8).view(2, 1).expand(2, 100).contiguous()
    weights = torch.ones(2, device="cuda")
    loss, sums, ce = kernels.dice_cross_entropy(labels, logits, weights)
    largest = 2 * 6e4
    assert loss[0].item() == 0 and abs(loss[1].item() - (largest + 1)) < 1e-3 * largest
    dlogits = kernels.dice_cross_entropy_grad(torch.ones(2, device="cuda"), labels, logits, weights, sums, ce)
    assert torch.equal(dlogits[1, 0].float(), torch.tensor([0.01, -0.01], device="cuda").half().float())


def test_a_bad_label_makes_its_sample_nan():
    logits = normal(3, 50, 2, dtype=torch.float16)
    labels = torch.randint(0, 2, (3, 50), device="cuda", dtype=torch.int32)
    labels[1, 7] = 2
    loss, _, _ = kernels.dice_cross_entropy(labels, logits, torch.ones(2, device="cuda"))
    assert loss.isnan().tolist() == [False, True, False]


def test_results_are_the_same_to_the_bit_and_in_a_captured_graph():
    dtype = torch.float16
    x, skip = normal(4, 60, 62, 64, dtype=dtype), normal(4, 70, 70, 64, dtype=dtype)
    kernel, y = normal(3, 3, 128, 64, dtype=dtype), normal(4, 58, 60, 64, dtype=dtype)
    args = [torch.randn_like(y), y, x, kernel, skip, normal(4, 29, 30, 64, dtype=dtype)]
    first = kernels.conv2d_bias_relu_grad(*args)
    for value, expected in zip(kernels.conv2d_bias_relu_grad(*args), first, strict=True):
        assert torch.equal(value, expected)
    p = kernels.conv2d_problem(x, kernel, skip, pool=True)
    _, p.dy_height, p.dy_width, _ = y.shape
    out = [torch.zeros_like(value) for value in first]
    space = torch.empty(
        kernels.native.conv2d_bias_relu_grad_workspace_bytes(p, kernels.tuning()), dtype=torch.uint8, device="cuda"
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dy, y, x, kernel, skip, dpooled = (a.data_ptr() for a in args)
        kernels.native.conv2d_bias_relu_grad(
            torch.cuda.current_stream().cuda_stream, p, dy, dpooled, y, x, skip, kernel,
            *(o.data_ptr() for o in out), space.data_ptr(), kernels.tuning(),
        )  # fmt: skip
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(value, expected) for value, expected in zip(out, first, strict=True))


def test_float32_is_refused():
    x, kernel = torch.ones(1, 8, 8, 8, device="cuda"), torch.ones(3, 3, 8, 8, device="cuda")
    with pytest.raises(RuntimeError, match="801"):  # cudaErrorNotSupported
        kernels.conv2d_bias_relu(x, kernel, torch.zeros(8, device="cuda"))
