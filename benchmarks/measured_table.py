"""Writes csrc/kernels/conv/measured.h, the choices that come with the package, from what was measured on an H200.

    unet-fast tune --batch 8 1 --json > benchmarks/results/h200-products.json
    python benchmarks/measured_table.py

A line is a product of the reference network that another engine or tile than the rules' is faster at, by 2 % at least.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCTS = ROOT / "benchmarks" / "results" / "h200-products.json"
TABLE = ROOT / "csrc" / "kernels" / "conv" / "measured.h"
HEAD = """// What the products of UNet_Medical's network, a batch of 8 and of 1, were fastest on, on {card},
// where that is not what the rules say. In the format of a tuning file (tuning.cu), its type left out: bfloat16 takes
// the same time. Written by benchmarks/measured_table.py.
#pragma once

namespace unet_fast::gpu {{

constexpr char kMeasured[] = R"(unet_fast tuning 1
{lines}
)";

}}  // namespace unet_fast::gpu
"""


def table(measured):
    """The header.

    Args:
        measured: what `unet-fast tune --json` prints, a dict.

    >>> row = {"key": "float16 product a > b", "engine": "cudnn", "config": 1, "splits": 0, "us": 2.0, "best_us": 1.0}
    >>> "product a > b\\tcudnn\\t1\\t0" in table({"card": "a card", "products": [row]})
    True
    """
    rows = [row for row in measured["products"] if row["best_us"] < row["us"]]
    lines = "\n".join(
        f"{row['key'].partition(' ')[2]}\t{row['engine']}\t{row['config']}\t{row['splits']}"
        for row in sorted(rows, key=lambda row: row["key"])
    )
    return HEAD.format(card=f"an {measured['card']}", lines=lines)


if __name__ == "__main__":
    TABLE.write_text(table(json.loads(PRODUCTS.read_text())))
