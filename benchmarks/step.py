"""Training step and inference of the reference U-Net on one GPU: unet_fast against Keras.

    python benchmarks/step.py [--json FILE] [--batch 1 8 16] [--systems NAME ...] [--phases train infer]

The network, loss and optimizer are UNet_Medical's: 572x572x1 to 388x388x2, cross entropy and Dice, L2 5e-4, Adam 1e-4,
dropout 0.5, dynamic loss scale in mixed precision. Data are random and lie on the GPU. Each system runs in a process of
its own. `ms` is the median of three runs of 20 steps that are waited for at their end; p50 to p99 are of steps waited for
one by one. UNET_FAST_REQUIRE_KERNELS=1 is set: a system that would quietly run on something else fails.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SYSTEMS = {  # name: (backend, dtype policy, XLA, TF32)
    "unet_fast": ("fused", "mixed_float16", True, True),
    "unet_fast graph": ("fused", "mixed_float16", False, True),
    "keras mixed_float16 graph": ("stock", "mixed_float16", False, True),
    "keras mixed_float16 xla": ("stock", "mixed_float16", True, True),
    "keras tf32 xla": ("stock", "float32", True, True),
    "keras float32 graph": ("stock", "float32", False, False),
}
RUNS, STEPS, LATENCY_STEPS = 3, 20, 60


def worker(name, phase, batch):
    """Times one system; prints a JSON row."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["UNET_FAST_REQUIRE_KERNELS"] = "1"
    import keras
    import tensorflow as tf

    from unet_fast import FusedUNet, losses
    from unet_fast.training import AdamL2

    backend, policy, jit, tf32 = SYSTEMS[name]
    gpu = tf.config.list_physical_devices("GPU")[0]
    tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    keras.utils.set_random_seed(0)
    model = FusedUNet(backend=backend, dtype=policy)
    model.compile(AdamL2(1e-4, 5e-4), losses.DiceCrossEntropy(backend=backend), jit_compile=jit)
    if phase == "train":
        step = tf.function(model.train_step, jit_compile=jit)
        data = [
            (
                tf.random.normal((batch, 572, 572, 1), seed=i),
                tf.random.uniform((batch, 388, 388), 0, 2, tf.int32, seed=i),
            )
            for i in range(4)
        ]
    else:
        step = tf.function(lambda x: model(x, training=False), jit_compile=jit)
        data = [tf.random.normal((batch, 572, 572, 1), seed=i) for i in range(4)]

    def wait(result):
        tf.nest.map_structure(lambda t: tf.reshape(t, -1)[0].numpy(), result)

    start = time.perf_counter()
    wait(step(data[0]))
    first_step_s = time.perf_counter() - start
    for i in range(5):
        wait(step(data[i % 4]))
    runs, single = [], []
    for _ in range(RUNS):
        start = time.perf_counter()
        for i in range(STEPS):
            result = step(data[i % 4])
        wait(result)
        runs.append((time.perf_counter() - start) / STEPS * 1e3)
    for i in range(LATENCY_STEPS):
        start = time.perf_counter()
        wait(step(data[i % 4]))
        single.append((time.perf_counter() - start) * 1e3)
    single.sort()
    ms = statistics.median(runs)
    row = {"system": name, "phase": phase, "batch": batch, "ms": round(ms, 3), "img_s": round(1e3 * batch / ms, 1)}
    row |= {f"p{p}": round(single[min(len(single) - 1, len(single) * p // 100)], 3) for p in (50, 90, 95, 99)}
    row["peak_mib"] = round(tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20)
    row["first_step_s"] = round(first_step_s, 1)
    row["card"] = tf.config.experimental.get_device_details(gpu)["device_name"]
    print(json.dumps(row))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16], metavar="N", help="default 1 8 16")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="default all")
    parser.add_argument(
        "--phases", nargs="+", choices=["train", "infer"], default=["train", "infer"], help="default both"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, phase, batch = arguments.worker
        return worker(name, phase, int(batch))
    rows = []
    print(
        f"{'system':27} {'phase':6} {'batch':>5} {'ms':>9} {'img/s':>8} {'p50':>8} {'p99':>8} {'peak MiB':>9} {'first s':>8}"
    )
    for batch in arguments.batch:
        for phase in arguments.phases:
            for name in arguments.systems:
                command = [sys.executable, __file__, "--worker", name, phase, str(batch)]
                output = subprocess.run(command, capture_output=True, text=True, check=False)
                if output.returncode:
                    print(f"{name}, {phase}, batch {batch} failed:\n{output.stderr[-1500:]}", flush=True)
                    continue
                row = json.loads(output.stdout.splitlines()[-1])
                rows.append(row)
                print(
                    f"{name:27} {phase:6} {batch:5} {row['ms']:9.2f} {row['img_s']:8.1f} {row['p50']:8.2f} {row['p99']:8.2f} "
                    f"{row['peak_mib']:9} {row['first_step_s']:8.1f}",
                    flush=True,
                )
    if arguments.json:
        from unet_fast import _native

        result = {"card": rows[0]["card"], "fingerprint": _native.fingerprint, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if len(rows) == len(arguments.batch) * len(arguments.phases) * len(arguments.systems) else 1


if __name__ == "__main__":
    sys.exit(main())
