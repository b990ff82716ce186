"""Trains FusedUNet on the fused ops and as its stock Keras twin by UNet_Medical's recipe, and compares their accuracy.

    python benchmarks/accuracy.py --data ISBI2012 --json FILE [--plot FILE] [--seeds 0 1] [--backends fused stock]

Each run is `unet-fast train` of its own - fold 0 of NVIDIA's split, mixed_float16, batch 8, 6400 steps - one after the
other. The JSON has, a run: backend, seed, metrics of its best checkpoint (soft Dice as UNet_Medical counts it, cross
entropy, hard Dice of both classes), its history, and images a second. Runs that the file has already are kept, and
what is new is added, if the card and the sources are the same. Without runs to do, --plot draws what the file has.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys
import tempfile

import record

FIELDS = ("soft_dice", "cross_entropy", "dice_per_class")
COLUMNS = {"val_soft_dice": "soft Dice", "val_cross_entropy": "cross entropy"}


def train(data, backend, seed, steps, folder):
    """One run of `unet-fast train`.

    Args:
        data: folder of the images.
        backend: "fused" or "stock".
        seed: of weights, order and augmentation.
        steps: of training.
        folder: pathlib.Path that the run is written to.

    Returns:
        dict: backend, seed, steps, soft_dice, cross_entropy, dice_per_class, images_per_second, and `history`, a list
        of dicts a validation.

    Raises:
        subprocess.CalledProcessError: the training failed.
    """
    command = [sys.executable, "-m", "unet_fast", "train", "--data", data, "--out", str(folder), "--backend", backend]
    command += ["--split", "nvidia", "--fold", "0", "--precision", "mixed_float16", "--batch", "8", "--seed", str(seed)]
    command += ["--steps", str(steps), "--eval-every", str(max(1, steps // 10))]
    subprocess.run(command, check=True, stdout=sys.stderr)
    with (folder / "history.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    metrics = json.loads((folder / "metrics.json").read_text())
    history = [{key: row[key] for key in ("step", "loss", *COLUMNS)} for row in rows]
    rates = sorted(row["images_per_second"] for row in rows)
    run = {"backend": backend, "seed": seed, "steps": steps} | {key: metrics[key] for key in FIELDS}
    return run | {"images_per_second": round(rates[len(rates) // 2], 1), "history": history}


def plot(result, path):
    """Draws the validation curves of all runs of a result.

    Args:
        result: dict as this writes it.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(10, 4), layout="constrained")
    colours = {"fused": "tab:blue", "stock": "tab:orange"}
    for axis, (column, title) in zip(axes, COLUMNS.items(), strict=True):
        for i, run in enumerate(sorted(result["runs"], key=lambda run: (run["backend"], run["seed"]))):
            steps, values = zip(*((row["step"], row[column]) for row in run["history"]), strict=True)
            style = "-" if i % 2 == 0 else "--"
            label = f"{run['backend']}, seed {run['seed']}"
            axis.plot(steps, values, style, color=colours[run["backend"]], marker=".", label=label)
        axis.set(xlabel="step", title=f"{title}, validation")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"ISBI-2012, fold 0 of NVIDIA's split, mixed_float16, {result['card']}")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of ISBI-2012, as unet-fast train takes it")
    parser.add_argument("--backends", nargs="*", choices=("fused", "stock"), default=["fused", "stock"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=6400)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="file to write, or to add to")
    parser.add_argument("--plot", type=pathlib.Path, help="PNG of the validation curves")
    parser.add_argument(
        "--beside", type=pathlib.Path, metavar="FILE", help="for --plot: another result, whose runs are drawn too"
    )
    arguments = parser.parse_args()
    result = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"card": None, "runs": []}
    done = {(run["backend"], run["seed"], run["steps"]) for run in result["runs"]}
    wanted = [(backend, seed) for backend in arguments.backends for seed in arguments.seeds]
    wanted = [pair for pair in wanted if (*pair, arguments.steps) not in done]
    if wanted and arguments.data:
        import tensorflow as tf

        devices = tf.config.list_physical_devices("GPU")
        card = tf.config.experimental.get_device_details(devices[0])["device_name"] if devices else "CPU"
        of = {"card": card, "driver": record.driver(), "fingerprint": record.sources_fingerprint()}
        of |= {"versions": record.versions("tensorflow", "keras")}
        if result["runs"] and any(result[key] != value for key, value in of.items()):
            parser.error(f"{arguments.json} is of another card, driver, version or of other sources; name another file")
        result |= of
        for backend, seed in wanted:
            with tempfile.TemporaryDirectory() as folder:
                run = train(arguments.data, backend, seed, arguments.steps, pathlib.Path(folder) / "run")
            result["runs"].append(run)
            record.save(arguments.json, result)
    elif wanted and not arguments.plot:
        parser.error("expected --data to train on, or --plot to draw what the file has")
    for run in result["runs"]:
        membrane, cell = run["dice_per_class"]
        print(
            f"{run['backend']:>5}, seed {run['seed']}: soft Dice {run['soft_dice']:.4f}, CE {run['cross_entropy']:.4f}, "
            f"membrane {membrane:.4f}, cell {cell:.4f}, {run['images_per_second']:.0f} images/s"
        )
    if arguments.plot:
        others = json.loads(arguments.beside.read_text())["runs"] if arguments.beside else []
        plot(result | {"runs": result["runs"] + others}, arguments.plot)


if __name__ == "__main__":
    main()
