"""What to lower when a training does not fit the memory."""

import re

from unet_fast.errors import UserError
from unet_fast.models.geometry import nearest_input_sizes


def too_large(config, error):
    """The UserError of a training whose step found no memory.

    Args:
        config: TrainConfig of the run, its size filled in.
        error: tf.errors.ResourceExhaustedError, or whatever says what could not be allocated.

    Returns:
        UserError that names smaller options: half the batch, in twice the parts, which trains alike; of a batch of one the
        next smaller precision, and a size of half the pixels.

    >>> from unet_fast.config import TrainConfig
    >>> print(too_large(TrainConfig(data="synthetic", size=572), "OOM when allocating tensor"))
    out of memory in a step of --batch 8, --size 572 and --filters 64: try --batch 4 --accumulate 2, which trains alike in \
half the memory of the images, or --precision mixed_float16
    """
    text = str(error)
    asked = re.search(r"allocat\w* (?:tensor with shape ?(\[[\d,]*\])|(\d[\d.,]* ?(?:bytes|[KMGT]?i?B)\b))", text)
    found_no_room = f"; no room for {asked[1] or asked[2]}" if asked else ""
    mends = []
    if config.batch > 1:
        # Of an odd batch there are no two halves: the number of parts is the least that gives equal ones.
        parts = next(n for n in range(2, config.batch + 1) if config.batch % n == 0)
        rest = f"--batch {config.batch // parts} --accumulate {config.accumulate * parts}"
        share = "half" if parts == 2 else f"1/{parts}"
        mends.append(f"{rest}, which trains alike in {share} the memory of the images")
    if config.precision == "float32":
        mends.append("--precision mixed_float16")
    smaller = nearest_input_sizes(round(config.size / 2**0.5), config.depth, config.padding)[0]
    if config.batch == 1 and smaller:
        mends.append(f"--size {smaller}, for half the pixels")
    if config.batch == 1 and config.filters > 1:
        mends.append(f"--filters {config.filters // 2}")
    return UserError(
        f"out of memory in a step of --batch {config.batch}, --size {config.size} and --filters {config.filters}"
        f"{found_no_room}: try {', or '.join(mends) or 'a smaller --depth'}"
    )
