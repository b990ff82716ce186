"""Prints the scores of cross-validations on ISBI-2012 as a Markdown table, beside UNet_Medical's published ones.

    python benchmarks/crossval_table.py runs/nvidia [runs/partition ...]

Each argument is a folder that `unet-fast crossval` wrote. A score is the mean of the folds ± their standard deviation.
UNet_Medical published means alone: soft Dice of five overlapping folds, after 6400 steps of batch 8, in mixed precision
and in TF32 on an A100 (the table of training accuracy in its README).
"""

import argparse
import json
import pathlib

COLUMNS = {
    "soft_dice": "soft Dice",
    "dice_per_class 0": "Dice, membrane",
    "dice_per_class 1": "Dice, cell",
    "cross_entropy": "cross entropy",
    "adapted_rand_error": "adapted Rand error",
    "nsd": "NSD",
}
PUBLISHED = (("UNet_Medical, AMP", "nvidia", 0.8902), ("UNet_Medical, TF32", "nvidia", 0.8900))


def rows(folder):
    """Lines of the table for one cross-validation: its mean, and each of its folds.

    Args:
        folder: pathlib.Path that `unet-fast crossval` wrote.

    Returns:
        list of lists of texts: what, split, and a text a column of `COLUMNS`.
    """
    options = json.loads((folder / "crossval.json").read_text())
    result = json.loads((folder / "metrics.json").read_text())

    def value(name, part, fold=None):
        key, _, k = name.partition(" ")
        found = result["scores"][key][part]
        found = found if fold is None else found[fold]
        return found[int(k)] if k else found

    name = f"unet_fast, {options['precision']}"
    folds = range(len(result["samples"]))
    means = ["{:.4f} ± {:.4f}".format(value(column, "mean"), value(column, "sd")) for column in COLUMNS]
    lines = [[f"**{name}, mean**", options["split"], *means]]
    for fold in folds:
        each = [f"{value(column, 'per_fold', fold):.4f}" for column in COLUMNS]
        lines.append([f"fold {fold}, step {result['step'][fold]}", options["split"], *each])
    return lines


def table(folders):
    """The whole table, as Markdown."""
    head = ["", "folds", *COLUMNS.values()]
    lines = [line for folder in folders for line in rows(folder)]
    lines += [[what, split, f"{score:.4f}", *[""] * (len(COLUMNS) - 1)] for what, split, score in PUBLISHED]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=pathlib.Path, help="folders that `unet-fast crossval` wrote")
    print(table(parser.parse_args().folders))


if __name__ == "__main__":
    main()
