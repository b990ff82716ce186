"""Training step and prediction on the CPU: FusedUNet on the fused ops against its stock Keras twin.

    python benchmarks/cpu_step.py [--json FILE] [--steps 5] [--rounds 2] [--case NAME ...]

Every system runs in a process of its own, so that its peak memory is its own, and the systems take turns, so that a slow
minute of the machine hits all of them. Figures are medians over all timed steps; the ratio is the stock twin's time over
ours, so above 1 ours is the faster. Data are random and new in every step; the first steps (tracing, compilation) count
in `first_step_s` only.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

CASES = {  # the reference net, and what a small machine would rather train
    "572 valid, 64 filters, batch 1": {"size": 572, "padding": "valid", "filters": 64, "batch": 1},
    "256 same, 32 filters, batch 2": {"size": 256, "padding": "same", "filters": 32, "batch": 2},
    "256 same, 16 filters, batch 4": {"size": 256, "padding": "same", "filters": 16, "batch": 4},
}
MODES = ("graph", "xla")
BACKENDS = ("stock", "fused")


def worker(case, backend, mode, steps):
    """Times one system; prints a JSON line."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["UNET_FAST_REQUIRE_KERNELS"] = "1"
    import keras
    import numpy as np

    from unet_fast import FusedUNet, losses

    keras.utils.set_random_seed(0)
    shape = (case["size"], case["size"], 1)
    model = FusedUNet(shape, filters=case["filters"], padding=case["padding"], backend=backend)
    model.compile(keras.optimizers.Adam(1e-4), losses.DiceCrossEntropy(backend=backend), jit_compile=mode == "xla")
    generator = np.random.default_rng(0)
    seconds = {"train": [], "infer": []}
    for _ in range(steps + 2):
        x = generator.normal(size=(case["batch"], *shape)).astype("float32")
        y = generator.integers(0, 2, (case["batch"], *model.output_shape[1:3])).astype("int32")
        start = time.perf_counter()
        model.train_on_batch(x, y)
        seconds["train"].append(time.perf_counter() - start)
    for _ in range(steps + 2):
        x = generator.normal(size=(case["batch"], *shape)).astype("float32")
        start = time.perf_counter()
        model.predict_on_batch(x)
        seconds["infer"].append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    timed = {phase: values[2:] for phase, values in seconds.items()}
    print(json.dumps({"seconds": timed, "first_step_s": seconds["train"][0], "peak_mib": peak}))


def measure(name, steps, rounds):
    """Rows of one case: a system and a phase each."""
    collected = {}
    for _ in range(rounds):
        for mode in MODES:
            for backend in BACKENDS:
                command = [sys.executable, __file__, "--worker", name, backend, mode, "--steps", str(steps)]
                output = subprocess.run(command, capture_output=True, text=True, check=False)
                if output.returncode:
                    sys.exit(f"{name}, {backend}, {mode} failed:\n{output.stderr[-2000:]}")
                collected.setdefault((mode, backend), []).append(json.loads(output.stdout.splitlines()[-1]))
    rows = []
    for phase in ("train", "infer"):
        for mode in MODES:
            median = {}
            for backend in BACKENDS:
                runs = collected[mode, backend]
                median[backend] = statistics.median(s for run in runs for s in run["seconds"][phase])
                rows.append(
                    {
                        "case": name,
                        "phase": phase,
                        "mode": mode,
                        "system": backend,
                        "ms": round(1000 * median[backend], 1),
                        "ratio": round(median["stock"] / median[backend], 3),
                        "peak_mib": round(statistics.median(run["peak_mib"] for run in runs)),
                        "first_step_s": round(statistics.median(run["first_step_s"] for run in runs), 1),
                    }
                )
    return rows


def processor():
    """The processor's name and what the kernels run on."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to FILE too")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round and phase (default 5)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each system (default 2)")
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES), help="which cases (default all)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        case, backend, mode = arguments.worker
        return worker(CASES[case], backend, mode, arguments.steps)

    from unet_fast import _native

    rows = []
    print(f"{processor()}, {len(os.sched_getaffinity(0))} cores, kernels {_native.cpu_isa()}")
    print(f"{'case':32} {'phase':6} {'mode':6} {'system':7} {'ms':>9} {'ratio':>6} {'peak MiB':>9} {'first s':>8}")
    for name in arguments.case:
        for row in measure(name, arguments.steps, arguments.rounds):
            rows.append(row)
            print(
                f"{row['case']:32} {row['phase']:6} {row['mode']:6} {row['system']:7} {row['ms']:9.1f} {row['ratio']:6.3f} "
                f"{row['peak_mib']:9d} {row['first_step_s']:8.1f}",
                flush=True,
            )
    if arguments.json:
        result = {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "isa": _native.cpu_isa()}
        result |= {"fingerprint": _native.fingerprint, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
