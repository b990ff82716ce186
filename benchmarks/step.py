"""Training step and prediction of the reference U-Net on one GPU: unet_fast against Keras and PyTorch.

    python benchmarks/step.py [--json FILE [--resume]] [--batch 8 1 16] [--systems NAME ...] [--phases train infer]
                              [--minutes M]
    python benchmarks/step.py --json FILE [--table] [--plot FILE.png]

The network, loss and optimizer are UNet_Medical's: 572x572x1 to 388x388x2, cross entropy and Dice, L2 5e-4, Adam 1e-4,
dropout 0.5, dynamic loss scale in mixed precision; keras_unet.py and torch_unet.py have them. The systems named float16
predict with weights in float16 too, cast once (`FusedUNet.for_prediction`). Data are random and lie on the GPU. timing.py
says what is timed, and does so the same way for all.

Each figure comes from a process of its own. The next process imports its framework while the one before compiles; while
one is timed, no other does anything. The most telling rows come first, and FILE is written after each. With --resume, rows
that FILE has of the same card and the same native sources stay and are not measured again, so that further calls fetch
what failed or what a time limit cut off. `run` in a row counts the calls; `runs` has each one's driver, versions and the
engine that UNET_FAST_ENGINE forced.

The second form measures nothing: it prints or draws what FILE has.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import record
import step_report
import timing

SYSTEMS = {  # name: (module, its System's options)
    "unet_fast": ("keras_unet", {"backend": "fused", "policy": "mixed_float16", "xla": True}),
    "unet_fast graph": ("keras_unet", {"backend": "fused", "policy": "mixed_float16", "xla": False}),
    "torch amp compile": ("torch_unet", {"compiled": True}),
    "torch amp eager": ("torch_unet", {"compiled": False}),
    "keras mixed_float16 xla": ("keras_unet", {"backend": "stock", "policy": "mixed_float16", "xla": True}),
    "keras mixed_float16 graph": ("keras_unet", {"backend": "stock", "policy": "mixed_float16", "xla": False}),
    "unet_fast float16": ("keras_unet", {"backend": "fused", "policy": "float16", "xla": True}),
    "keras float16 xla": ("keras_unet", {"backend": "stock", "policy": "float16", "xla": True}),
    "keras tf32 xla": ("keras_unet", {"backend": "stock", "policy": "float32", "xla": True}),
    "keras float32 graph": ("keras_unet", {"backend": "stock", "policy": "float32", "xla": False, "tf32": False}),
}
PREDICT_ONLY = ("unet_fast float16", "keras float16 xla")  # weights in float16 too: `FusedUNet.for_prediction`
# Measured before the others.
FIRST = ("unet_fast", "keras mixed_float16 xla", "torch amp compile", "unet_fast float16", "keras float16 xla")
MARK = "step.py worker: "  # begins a worker's lines to the one who started it; frameworks print as they like
WORKER_SECONDS = 300  # that a worker may take to its next line
COLUMNS = ("ms", "img_s", "p50", "p90", "p95", "p99", "mean", "peak_mib", "first_step_s")


class WorkerError(Exception):
    """A system could not be timed; the message is one line."""


class OutOfTime(Exception):
    """The time that was given is over."""


def headline(error):
    r"""An exception as one line; of one that TensorFlow or Keras wrapped in a trace, what it is about.

    >>> headline(ValueError("expected a GPU\nand more"))
    'ValueError: expected a GPU'
    >>> headline(ValueError('in user code:\n\n  File "a.py", line 1\n    f(x)\n  too large\n\n  Arguments received by f:\n'))
    'ValueError: too large'
    """
    first, *rest = str(error).splitlines() or [""]
    if first.endswith(":"):
        entry = re.compile(r"File .*|Detected at node.*|Hint:.*|\[.*|\^.*|")  # of a trace, or a remark, or nothing
        is_code = False
        for line in (re.sub(r"\x1b\[\d*m", "", line).strip() for line in rest):
            if line.startswith("Arguments received"):
                break
            if not is_code and not entry.fullmatch(line):
                first = line
            is_code = line.startswith("File ")
    return f"{type(error).__name__}: {first.removeprefix(f'{type(error).__name__}: ')}"


def worker(name, phase, batch):
    """Times one system in this process, taking each of its steps when told to by a line on standard input."""

    def turn(state):
        print(f"{MARK}{state}", flush=True)
        sys.stdin.readline()

    module, options = SYSTEMS[name]
    try:
        module = importlib.import_module(module)
        turn("imported")
        system = module.System(phase, batch, **options)
        print(f"{MARK}row {json.dumps(timing.measure(system, batch, lambda: turn('warm')))}", flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"{MARK}failed {headline(error)}", flush=True)
        return 1
    return 0


class Worker:
    """A process that times one system; it waits for `go` before it touches the GPU, and again before it times.

    Args:
        name, phase, batch: what to time.
        command: the program and its first arguments.
    """

    def __init__(self, name, phase, batch, command=(sys.executable, __file__, "--worker")):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, name, phase, str(batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._seen = set()

    def go(self):
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the next line that is waited for will tell
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def wait_for(self, state, deadline=None):
        """Waits until the worker says that it is in a state, and gives what it adds to that.

        Args:
            state: "imported", "warm" or "row".
            deadline: time.monotonic() at which to give up, or None.

        Raises:
            WorkerError: it failed, ended or kept silent.
            OutOfTime: the deadline came.
        """
        if state in self._seen:
            return ""
        left = WORKER_SECONDS if deadline is None else min(WORKER_SECONDS, deadline - time.monotonic())
        late = threading.Event()

        def end():
            late.set()
            self._process.kill()

        alarm = threading.Timer(max(left, 0), end)
        alarm.start()
        try:
            for line in self._process.stdout:
                said, _, rest = line.removeprefix(MARK).strip().partition(" ")
                if line.startswith(MARK) and said == state:
                    self._seen.add(state)
                    return rest
                if line.startswith(MARK) and said == "failed":
                    raise WorkerError(rest)
        finally:
            alarm.cancel()
        if not late.is_set():
            raise WorkerError(next(iter(self.last_errors(1)), f"ended with status {self._process.wait()}"))
        if left < WORKER_SECONDS:
            raise OutOfTime
        raise WorkerError(f"no answer within {WORKER_SECONDS} s")

    def last_errors(self, count):
        """The last lines of its standard error, blank ones left out."""
        self._errors.seek(0)
        return [line.rstrip() for line in self._errors if line.strip()][-count:]

    def close(self):
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()  # not read to its end: what the process has started may hold it open for longer
        self._errors.close()


def measured(jobs, deadline=None, start=Worker):
    """Times one job after the other.

    Args:
        jobs: list of (system, phase, batch).
        deadline: time.monotonic() at which to stop, or None.
        start: makes a Worker of a job's three parts.

    Yields:
        (job, dict of its figures), or (job, WorkerError) with the last lines of standard error as its second argument.
        Ends early when the deadline comes.
    """
    ahead = os.cpu_count() >= 4  # else an import would slow the compilation beside it
    current = following = None
    try:
        for job, next_job in itertools.zip_longest(jobs, jobs[1:]):
            current, following = following or start(*job), None
            try:
                current.wait_for("imported", deadline)
                current.go()
                if next_job and ahead:
                    following = start(*next_job)
                current.wait_for("warm", deadline)
                if following:
                    with contextlib.suppress(WorkerError):  # raised again when it is its turn
                        following.wait_for("imported", deadline)
                current.go()
                yield job, json.loads(current.wait_for("row", deadline))
            except WorkerError as error:
                yield job, WorkerError(str(error), current.last_errors(20))
            current.close()
            current = None
    except OutOfTime:
        return
    finally:
        for process in (current, following):
            if process:
                process.close()


def ordered(systems, phases, batches):
    """Jobs, the most telling ones first.

    >>> ordered(["unet_fast graph", "unet_fast"], ["train"], [1, 8])[:3]
    [('unet_fast', 'train', 8), ('unet_fast', 'train', 1), ('unet_fast graph', 'train', 8)]
    """
    batches = sorted(batches, key=lambda batch: batch != 8)
    groups = ([s for s in FIRST if s in systems], [s for s in systems if s not in FIRST])
    jobs = [(s, phase, batch) for group in groups for batch in batches for phase in phases for s in group]
    return [job for job in jobs if job[1] == "infer" or job[0] not in PREDICT_ONLY]


def previous(path, facts):
    """What an earlier call has left that may stand beside new rows, which is what has the same facts.

    Args:
        path: pathlib.Path of its file.
        facts: dict of the card and the fingerprint.

    Returns:
        (its rows, the driver and versions of its runs), both empty lists if there is none.
    """
    if not path.exists():
        return [], []
    result = json.loads(path.read_text())
    changed = ", ".join(key for key in facts if result.get(key) != facts[key])
    if not changed:
        return result["rows"], result["runs"]
    print(f"{path}: {len(result['rows'])} rows of another {changed} are dropped", file=sys.stderr)
    return [], []


def sort_key(row):
    return list(step_report.PHASES).index(row["phase"]), row["batch"], list(SYSTEMS).index(row["system"])


def run(arguments):
    """Measures and records; whether every row that was asked for is there."""
    built = record.native.load_from_package("_native")
    devices, missing = built.gpu_devices()
    if not devices:
        sys.exit(f"benchmarks/step.py: expected a GPU, got none ({missing}); see `unet-fast info`")
    facts = {"card": devices[0]["name"], "fingerprint": built.fingerprint}
    rows, runs = previous(arguments.json, facts) if arguments.resume else ([], [])
    rows = {(row["system"], row["phase"], row["batch"]): row for row in rows}
    engine = os.environ.get("UNET_FAST_ENGINE", "auto")
    versions = record.versions("tensorflow", "keras", "torch")
    runs = [*runs, {"driver": record.driver(), "versions": versions, "engine": engine}]
    left = [job for job in ordered(arguments.systems, arguments.phases, arguments.batch) if job not in rows]
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    missed, failures = set(left), []
    print(f"{facts['card']}, {step_report.environment(runs[-1])}")
    print(f"{'system':26} {'phase':6} {'batch':>5} " + " ".join(f"{column:>12}" for column in COLUMNS), flush=True)
    for job, figures in measured(left, deadline):
        system, phase, batch = job
        if isinstance(figures, WorkerError):
            print(f"{system:26} {phase:6} {batch:5} FAILED: {figures.args[0]}", flush=True)
            failures.append((job, figures.args[1]))
            continue
        missed.discard(job)
        rows[job] = {"system": system, "phase": phase, "batch": batch, **figures, "run": len(runs)}
        print(f"{system:26} {phase:6} {batch:5} " + " ".join(f"{figures[c]:12}" for c in COLUMNS), flush=True)
        if arguments.json:
            record.save(arguments.json, facts | {"runs": runs, "rows": sorted(rows.values(), key=sort_key)})
    for job, lines in failures:
        print(f"\n{job} failed; its last lines:", *lines, sep="\n", file=sys.stderr)
    if len(missed) > len(failures):
        print(f"{len(missed) - len(failures)} rows are left for a further call with --resume", file=sys.stderr)
    return not missed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows in FILE")
    parser.add_argument("--resume", action="store_true", help="measure only what FILE has not")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes (default: when done)")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1, 16], metavar="N", help="default 8 1 16")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="default all")
    parser.add_argument(
        "--phases", nargs="+", choices=list(step_report.PHASES), default=list(step_report.PHASES), help="default both"
    )
    parser.add_argument("--table", action="store_true", help="only print what FILE has, as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="only draw what --json has to FILE, a PNG")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, phase, batch = arguments.worker
        return worker(name, phase, int(batch))
    report = arguments.table or arguments.plot
    if (arguments.resume or report) and arguments.json is None:
        parser.error("--resume, --table and --plot need --json FILE")
    if not report:
        return 0 if run(arguments) else 1
    if not arguments.json.exists():
        parser.error(f"expected the rows of an earlier call in {arguments.json}, found no such file")
    result = json.loads(arguments.json.read_text())
    if arguments.table:
        print(step_report.markdown(result))
    if arguments.plot:
        step_report.plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
