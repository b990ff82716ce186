"""Sizes in and out of the network, against a walk through its layers."""

import pytest

from unet_fast.errors import UserError
from unet_fast.models.geometry import fits, input_size_for_output, nearest_input_sizes, output_size


def walk(size, depth, padding):
    """Size after every layer of the network in turn; None where a layer cannot take what it gets."""
    pair = 4 if padding == "valid" else 0
    smallest = 1 if padding == "valid" else 0

    def convolve(size):
        return size - pair if size - pair >= smallest else None

    skips = []
    for _ in range(depth):
        size = convolve(size)
        if size is None or size % 2 or size < 2:
            return None
        skips.append(size)
        size //= 2
    size = convolve(size)
    for skip in reversed(skips):
        if size is None or 2 * size > skip:
            return None
        size = convolve(2 * size)
    return size


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_against_a_walk_through_the_layers(depth, padding):
    limit = 900
    outputs = {size: walk(size, depth, padding) for size in range(limit)}
    fitting = [size for size, output in outputs.items() if output is not None]
    assert len(fitting) > 10
    for size, output in outputs.items():
        assert fits(size, depth, padding) == (output is not None)
        below, above = nearest_input_sizes(size, depth, padding)
        assert below == max((s for s in fitting if s <= size), default=None)
        assert above == min((s for s in fitting if s >= size), default=above)
        if output is None:
            with pytest.raises(UserError, match=f"use .*{above}$"):
                output_size(size, depth, padding)
        else:
            assert output_size(size, depth, padding) == output
    for wanted in range(1, outputs[fitting[-1]] + 1):
        assert input_size_for_output(wanted, depth, padding) == min(s for s in fitting if outputs[s] >= wanted)


def test_the_paper():
    assert output_size(572, 4, "valid") == 388


def test_the_error_names_both_neighbours():
    with pytest.raises(UserError) as caught:
        output_size(512, 4, "valid")
    assert str(caught.value) == "input size 512 does not fit a U-Net of depth 4 with padding 'valid'; use 508 or 524"


def test_impossible_arguments():
    for depth in (0, -1, 2.0):
        with pytest.raises(UserError, match="depth"):
            output_size(572, depth, "valid")
    with pytest.raises(UserError, match="'valid' or 'same', got 'full'"):
        output_size(572, 4, "full")
    with pytest.raises(UserError, match="at least 1 pixel"):
        input_size_for_output(0, 4, "valid")
