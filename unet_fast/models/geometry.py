"""Which input sizes a U-Net of a given depth takes, and what size comes out.

Every level halves the size, so it must be even there. With padding 'same' that is all: sizes are multiples of 2^depth.
With 'valid' each of the 2 * depth + 1 pairs of 3x3 convolutions takes 4 pixels: a bottom of b pixels needs an input of
2^depth (b + 4) + 4 (2^depth - 1) and gives 2^depth b - 4 (2^depth - 1), where b is the size after the bottom's pair.
Depth 4 and b = 28 are the paper's 572 -> 388 (Ronneberger et al., 2015, figure 1).
"""

from unet_fast.errors import UserError


def output_size(input_size, depth, padding):
    """Pixels a side that come out of the network.

    Args:
        input_size: pixels a side that go in.
        depth: number of poolings, at least 1.
        padding: `"valid"` or `"same"`, of every 3x3 convolution.

    Returns:
        int, the output size; equal to `input_size` for `"same"`.

    Raises:
        UserError: no network of that depth takes this size (the nearest ones that fit are named), or the depth or the
            padding is not one of the above.

    Example:

    >>> from unet_fast.models.geometry import output_size
    >>> output_size(572, depth=4, padding="valid")
    388
    """
    if not fits(input_size, depth, padding):
        below, above = nearest_input_sizes(input_size, depth, padding)
        nearest = f"{above}" if below is None else f"{below} or {above}"
        raise UserError(
            f"input size {input_size} does not fit a U-Net of depth {depth} with padding '{padding}'; use {nearest}"
        )
    return input_size - _margin(depth, padding)


def fits(input_size, depth, padding):
    """Whether a network takes this input size: every pooling sees an even size and something is left at the end.

    Args, errors: as `output_size`.

    >>> from unet_fast.models.geometry import fits
    >>> fits(572, 4, "valid"), fits(512, 4, "valid"), fits(512, 4, "same")
    (True, False, True)
    """
    smallest = _smallest_input(depth, padding)
    return input_size >= smallest and (input_size - smallest) % 2**depth == 0


def nearest_input_sizes(size, depth, padding):
    """The nearest input sizes that fit: `(largest at most size or None, smallest at least size)`.

    Args, errors: as `output_size`, but any integer `size` is taken.

    >>> from unet_fast.models.geometry import nearest_input_sizes
    >>> nearest_input_sizes(512, 4, "valid")
    (508, 524)
    """
    smallest, step = _smallest_input(depth, padding), 2**depth
    if size < smallest:
        return None, smallest
    below = size - (size - smallest) % step
    return below, below if below == size else below + step


def input_size_for_output(output, depth, padding):
    """The smallest input size whose output is at least `output` pixels a side.

    Args:
        output: pixels a side wanted, at least 1.
        depth, padding: as `output_size`.

    Returns:
        int, an input size that fits.

    Raises:
        UserError: as `output_size`, or `output` is less than 1.

    Example:

    >>> from unet_fast.models.geometry import input_size_for_output
    >>> input_size_for_output(388, 4, "valid"), input_size_for_output(512, 4, "valid")
    (572, 700)
    """
    if output < 1:
        raise UserError(f"expected an output of at least 1 pixel, got {output}")
    return nearest_input_sizes(output + _margin(depth, padding), depth, padding)[1]


def _margin(depth, padding):
    """Input size less output size."""
    return 0 if padding == "same" else 12 * 2**depth - 8


def _smallest_input(depth, padding):
    """The smallest input size that fits; every other one is a multiple of 2^depth larger."""
    if not isinstance(depth, int) or depth < 1:
        raise UserError(f"expected a depth of at least 1 pooling, got {depth!r}")
    if padding == "same":
        return 2**depth
    if padding != "valid":
        raise UserError(f"expected padding 'valid' or 'same', got {padding!r}")
    # A bottom of b < 4 pixels shrinks on the way up; only at depth 1 does one of 3 leave anything (2 pixels).
    bottom = 3 if depth == 1 else 4
    return 2**depth * (bottom + 4) + 4 * (2**depth - 1)
