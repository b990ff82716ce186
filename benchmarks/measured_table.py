"""Writes csrc/kernels/conv/measured.h, the choices that come with the package, from what was measured on H200s.

    unet-fast tune --batch 8 1 --json > benchmarks/results/h200-products.json    # on another card or day: -2.json, ...
    python benchmarks/measured_table.py

A line is a product of the reference network that another engine or tile than the rules' is faster at, by 2 % at least, in
the mean of all measurements: from one to the next some times differ by a tenth.
Prints how many times cuDNN's speed each product has, by the rules and, where that differs, as chosen, in Markdown.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from unet_fast.tuning import fastest

ROOT = Path(__file__).parent.parent
PRODUCTS = sorted((ROOT / "benchmarks" / "results").glob("h200-products*.json"))
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


def mean(measurements):
    """One measurement of several: each time the mean, each choice made anew from these.

    Args:
        measurements: what `unet-fast tune --json` printed, a list of dicts. Of one card's type, and with the same rules.

    Returns:
        dict as one of them; of a product it has what was timed in all of them.

    >>> row = {"key": "float16 product a > b", "timings": [["sm90", 1, 0, 2.0], ["cudnn", 0, 0, 1.8]]}
    >>> slower = row | {"timings": [["sm90", 1, 0, 2.2], ["cudnn", 0, 0, 2.6]]}
    >>> product = mean([{"card": "a card", "products": [row]}, {"card": "a card", "products": [slower]}])["products"][0]
    >>> product["engine"], product["us"], product["by_engine"]
    ('sm90', 2.1, {'sm90': 2.1, 'cudnn': 2.2})
    """
    rows = []
    for same in zip(*(each["products"] for each in measurements), strict=True):
        times = [{tuple(choice): us for *choice, us in row["timings"]} for row in same]
        in_all = [choice for choice in times[0] if all(choice in us for us in times)]
        rows.append(same[0] | fastest([(*choice, statistics.fmean(us[choice] for us in times)) for choice in in_all]))
    return {"card": measurements[0]["card"], "products": rows}


def table(measured):
    """The header.

    Args:
        measured: what `mean` returns.

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


def markdown(measured):
    """The table of docs/performance.md: a line a layer, a column a batch and product, cuDNN's fastest time over ours.

    Args:
        measured: what `mean` returns.

    >>> row = {"layer": "conv", "batch": 8, "product": "forward", "key": "float16 product 8x30x30x8+8/1 > 28x28x4, 9 taps"}
    >>> row |= {"us": 2.0, "best_us": 1.0, "by_engine": {"sm90": 1.0, "cudnn": 3.0}}
    >>> print(markdown({"products": [row]}).splitlines()[-1])
    | 30, 16 > 4 | 1.50 → 3.00 |
    """
    names, cells, columns = {}, {}, {}
    for row in measured["products"]:
        column = f"batch {row['batch']}, {row['product']}"
        columns[column] = None
        if row["product"] == "forward":
            size, channels, filters = re.search(r"x(\d+)x([\d+]+)/1 > \d+x\d+x(\d+)", row["key"]).groups()
            up = ", up" if "transpose" in row["layer"] else ""
            names[row["layer"]] = f"{size}, {sum(map(int, channels.split('+')))} > {filters}{up}"
        by_rules, chosen = (f"{row['by_engine']['cudnn'] / row[us]:.2f}" for us in ("us", "best_us"))
        cells[row["layer"], column] = by_rules if by_rules == chosen else f"{by_rules} → {chosen}"
    lines = [["layer", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(cells[layer, column] for column in columns)] for layer, name in names.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    products = mean([json.loads(path.read_text()) for path in PRODUCTS])
    TABLE.write_text(table(products))
    print(markdown(products))
    for batch in (8, 1):
        rows = [row for row in products["products"] if row["batch"] == batch]
        sums = [sum(row["us"] for row in rows), sum(row["best_us"] for row in rows)]
        sums.append(sum(row["by_engine"]["cudnn"] for row in rows))
        print(f"batch {batch}, ms: by the rules, as chosen, cuDNN alone:", *(f"{us / 1e3:.2f}" for us in sums))
