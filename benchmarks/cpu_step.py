"""Training step and prediction on the CPU: FusedUNet on the fused ops against its stock Keras twin.

    python benchmarks/cpu_step.py [--json FILE] [--steps 10] [--case NAME ...]

Every system runs in a process of its own, so that its peak memory is its own. The twins of a mode run at the same time
and take turns step by step, one waiting while the other works, so that a slow moment of the machine hits both: `ms` is
the median of the timed steps, the ratio the median of a turn's ratios, the stock twin's time over ours; above 1 ours is
the faster. Data are random and new in every step; the first steps (tracing, compilation) count in `first_step_s` only.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

CASES = {  # the reference net, and what a small machine would rather train
    "572 valid, 64 filters, batch 1": {"size": 572, "padding": "valid", "filters": 64, "batch": 1},
    "256 same, 32 filters, batch 2": {"size": 256, "padding": "same", "filters": 32, "batch": 2},
    "256 same, 16 filters, batch 4": {"size": 256, "padding": "same", "filters": 16, "batch": 4},
}
MODES = ("graph", "xla")
BACKENDS = ("stock", "fused")
PHASES = ("train", "infer")


def worker(case, backend, mode):
    """Runs a step for every phase named on a line of its input; answers with a JSON line."""
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
    for line in sys.stdin:
        x = generator.normal(size=(case["batch"], *shape)).astype("float32")
        y = generator.integers(0, 2, (case["batch"], *model.output_shape[1:3])).astype("int32")
        start = time.perf_counter()
        if line.strip() == "train":
            model.train_on_batch(x, y)
        else:
            model.predict_on_batch(x)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mib": peak}), flush=True)


class System:
    """A worker process."""

    def __init__(self, name, backend, mode):
        self.label = f"{name}, {backend}, {mode}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads could fill)
        command = [sys.executable, __file__, "--worker", name, backend, mode]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def step(self, phase):
        """What the worker says of one step."""
        try:
            self.process.stdin.write(f"{phase}\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.close()
            self.errors.seek(0)
            sys.exit(f"{self.label} failed:\n{self.errors.read()[-2000:]}")

    def close(self):
        self.process.communicate()


def measure(name, steps):
    """Rows of one case: a system and a phase each."""
    rows = {}
    for mode in MODES:
        systems = {backend: System(name, backend, mode) for backend in BACKENDS}
        first = {backend: system.step("train")["seconds"] for backend, system in systems.items()}
        peak = {}
        for phase in PHASES:
            seconds = {backend: [] for backend in BACKENDS}
            for turn in range(-2, steps):
                for backend, system in systems.items():
                    answer = system.step(phase)
                    peak[backend] = answer["peak_mib"]
                    if turn >= 0:
                        seconds[backend].append(answer["seconds"])
            for backend in BACKENDS:
                ratios = [stock / own for stock, own in zip(seconds["stock"], seconds[backend], strict=True)]
                rows[phase, mode, backend] = {
                    "case": name,
                    "phase": phase,
                    "mode": mode,
                    "system": backend,
                    "ms": round(1000 * statistics.median(seconds[backend]), 1),
                    "ratio": round(statistics.median(ratios), 3),
                    "peak_mib": round(peak[backend]),
                    "first_step_s": round(first[backend], 1),
                }
        for system in systems.values():
            system.close()
    return [rows[phase, mode, backend] for phase in PHASES for mode in MODES for backend in BACKENDS]


def processor():
    """The processor's name and what the kernels run on."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to FILE too")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a phase (default 10)")
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES), help="which cases (default all)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        case, backend, mode = arguments.worker
        return worker(CASES[case], backend, mode)

    from unet_fast import _native

    rows = []
    print(f"{processor()}, {len(os.sched_getaffinity(0))} cores, kernels {_native.cpu_isa()}")
    print(f"{'case':32} {'phase':6} {'mode':6} {'system':7} {'ms':>9} {'ratio':>6} {'peak MiB':>9} {'first s':>8}")
    for name in arguments.case:
        for row in measure(name, arguments.steps):
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
