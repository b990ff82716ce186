"""Runs tests/gpu on this machine's GPU and records the outcome: `python -m unet_fast.gpu_check [--sanitize [TOOL ...]]`

Builds nothing. Writes tests/gpu/report.json in the source folder: the card, its driver, the fingerprint of the native
sources that the tested library was built from, and every test with its outcome and its seconds. With --sanitize the
tools of compute-sanitizer, or those that are named, also go over one small pass of every kernel; what an earlier report
has of the others stays where it is of the same sources.
"""

import argparse
import ast
import collections
import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "gpu"
REPORT = TESTS / "report.json"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Arrays lie so close that what is beyond the end of one would be another; this much between them belongs to none.
_SANITIZER_OPTIONS = {"memcheck": ("--padding", "4096")}
# Two fail on what they do not see: cuDNN's kernels end in racecheck's own "failed to handle a hardware exception", and
# neither what they write nor what TMA writes, on which sm90 rests, is initialised for initcheck before CUDA 13.1.
_PASS_OPTIONS = {"racecheck": ("--engines", "sm90", "wmma"), "initcheck": ("--engines", "wmma")}
_SANITIZER_SECONDS = 600  # that a tool may take
_SANITIZER_PARTS = 4  # processes that share a tool's pass, each of which keeps a core busy and the GPU hardly at all
# The last line of small_pass.py. Some versions of compute-sanitizer report no errors of a program that never started.
_PASS_ENDED = re.compile(r"^\d+ cases in \d+ dtypes: none failed$", re.MULTILINE)


def run_file(path):
    """Run one file of tests in a process of its own, since PyTorch and TensorFlow bring CUDA libraries of their own.

    Without conftest.py, which imports Keras and so TensorFlow.

    Args:
        path: pathlib.Path of the file.

    Returns:
        dict from a test's name to its `outcome` (passed, failed, skipped) and `seconds`, and the `reason` why it was
        skipped; a file that does not even run counts as one failed test.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        options = ["-q", "-p", "no:cacheprovider", "--noconftest", f"--junitxml={results}"]
        subprocess.run([sys.executable, "-m", "pytest", str(path), *options], cwd=ROOT, env=_environment(), check=False)
        cases = xml.etree.ElementTree.parse(results).iter("testcase") if results.exists() else ()
        tests = {}
        for case in cases:
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            test = {"outcome": outcome, "seconds": float(case.get("time"))}
            if outcome == "skipped":
                test["reason"] = _reason(case.find("skipped"))
            tests[f"{path.name}::{case.get('name')}"] = test
    return tests or {f"{path.name}": {"outcome": "failed", "seconds": 0.0}}


def _reason(skipped):
    """Why a test was skipped, from its element in the results."""
    if skipped.get("message") != "collection skipped":
        return skipped.get("message")
    # A whole file: the reason is in the text, at the end of what Python shows of (path, line, "Skipped: reason").
    return ast.literal_eval(skipped.text)[-1].removeprefix("Skipped: ")


def _environment():
    """Variables for a process that runs what is in tests/gpu."""
    search = [str(ROOT), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    # cuDNN's choice by trial takes a second a shape, and here no stock op's speed matters.
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "TF_CUDNN_USE_AUTOTUNE": "0",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }


def find_sanitizer():
    """Path of compute-sanitizer, from PATH or a CUDA toolkit in CUDA_HOME or /usr/local/cuda; None without one."""
    folders = [
        os.environ.get("PATH", ""),
        *(f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda")),
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def count_errors(output):
    """How many errors a tool of compute-sanitizer found, hazards of any severity included.

    Args:
        output: all that it printed.

    Returns:
        int, or None where there is no summary: the tool did not get to its end.

    >>> from unet_fast.gpu_check import count_errors
    >>> count_errors("========= ERROR SUMMARY: 3 errors")
    3
    >>> count_errors("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)")
    2
    """
    found = re.findall(
        r"^=+ (?:ERROR SUMMARY: (\d+) errors?\s*$|RACECHECK SUMMARY: (\d+) hazard)", output, re.MULTILINE
    )
    return sum(int(errors or hazards) for errors, hazards in found) if found else None


def _run_in_time(command):
    """Exit status, None if it ran out of time, and output of a command."""
    # In a process group of its own, so that the program under the sanitizer ends with it and frees the GPU.
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=_SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0] + "\nran out of time"
        except BaseException:  # Ctrl-C, which does not reach another group
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, output


def sanitize(sanitizer, command, tools=SANITIZER_TOOLS, parts=1, ended=lambda results: None):
    """Run small_pass.py under tools of compute-sanitizer, all of them at once.

    Args:
        sanitizer: path of compute-sanitizer; None where there is none.
        command: list, the program and its arguments; it gets the options of small_pass.py besides.
        tools: names of tools.
        parts: how many processes share a tool's pass.
        ended: called with what there is to return whenever a tool has ended.

    Returns:
        dict from a tool's name to its `outcome` (passed, failed, not available), number of `errors` (None if a part did
        not get to its end) and `seconds` of its longest part. It has failed where it found an error, and where the
        command failed or never ran.
    """
    if sanitizer is None:
        results = {tool: {"outcome": "not available", "errors": None, "seconds": 0.0} for tool in tools}
        ended(results)
        return results

    def run(tool, part):
        # Of our kernels alone, not cuDNN's: their names have the namespace in them.
        options = ["--tool", tool, "--kernel-name", "kernel_substring=unet_fast", *_SANITIZER_OPTIONS.get(tool, ())]
        start = time.monotonic()
        status, output = _run_in_time(
            [sanitizer, *options, *command, *_PASS_OPTIONS.get(tool, ()), "--part", f"{part}/{parts}"]
        )
        errors = count_errors(output)
        passed = status == 0 and errors == 0 and _PASS_ENDED.search(output)
        seconds = time.monotonic() - start
        print(f"{tool}, part {part} of {parts}: {'passed' if passed else 'failed'}, {seconds:.0f} s", flush=True)
        if not passed:
            shown = output if len(output) < 8000 else f"{output[:4000]}\n...\n{output[-4000:]}"
            print(shown, file=sys.stderr)
        return bool(passed), errors, seconds

    def collect(tool, found):
        passed, errors, seconds = zip(*found, strict=True)
        outcome = "passed" if all(passed) else "failed"
        total = None if None in errors else sum(errors)
        print(f"{tool}: {outcome}, {total} errors, {max(seconds):.1f} s", flush=True)
        return {"outcome": outcome, "errors": total, "seconds": round(max(seconds), 1)}

    with concurrent.futures.ThreadPoolExecutor(max(len(tools) * parts, 1)) as pool:
        futures = {pool.submit(run, tool, i + 1): tool for tool in tools for i in range(parts)}
        found, results = collections.defaultdict(list), {}
        for future in concurrent.futures.as_completed(futures):
            tool = futures[future]
            found[tool].append(future.result())
            if len(found[tool]) == parts:
                results[tool] = collect(tool, found[tool])
                ended(dict(results))
    return {tool: results[tool] for tool in tools}


def previous_sanitizer(path, fingerprint):
    """What an earlier report says of the sanitizer, if it is of the same sources; else None.

    Args:
        path: pathlib.Path of the report; it need not exist.
        fingerprint: of the sources that the library at hand was built from.
    """
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    return report.get("sanitizer") if report.get("fingerprint") == fingerprint else None


def merge_sanitizer(previous, results):
    """What to record: the results, and what an earlier report has of tools that did not run now.

    Args:
        previous: of previous_sanitizer.
        results: of `sanitize`; empty where it was not asked for.

    Returns:
        dict like `results`, in the order of SANITIZER_TOOLS.
    """
    ran = {tool: result for tool, result in results.items() if result["outcome"] != "not available"}
    merged = {**results, **(previous or {}), **ran}
    return {tool: merged[tool] for tool in SANITIZER_TOOLS if tool in merged}


def parse_arguments(arguments=None):
    """Namespace whose `sanitize` is a list of tools, each once, empty where --sanitize is not given.

    Args:
        arguments: list of command-line arguments, None for those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m unet_fast.gpu_check", description="Tests the kernels on the GPU.")
    parser.add_argument(
        "--sanitize",
        nargs="*",
        choices=SANITIZER_TOOLS,
        metavar="TOOL",
        help=f"also run tools of compute-sanitizer; takes minutes; without a name all: {', '.join(SANITIZER_TOOLS)}",
    )
    asked = parser.parse_args(arguments)
    # None: the option is not there; empty: it names no tool.
    asked.sanitize = list(SANITIZER_TOOLS) if asked.sanitize == [] else list(dict.fromkeys(asked.sanitize or ()))
    return asked


class _Recorder:
    """Writes the report once the tests are through, and again with each tool that ends: it may all be cut off."""

    def __init__(self, previous):
        self._previous, self._sanitized, self._report = previous, {}, None
        self._lock = threading.Lock()

    def tested(self, report):
        with self._lock:
            self._report = report
            self._write()

    def sanitized(self, results):
        with self._lock:
            self._sanitized = results
            if self._report is not None:
                self._write()

    def _write(self):
        sanitized = merge_sanitizer(self._previous, self._sanitized)
        temporary = REPORT.with_suffix(".tmp")
        report = {**self._report, "sanitizer": sanitized} if sanitized else self._report
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(temporary, REPORT)


def main(arguments=None):
    """Run the tests and write the report.

    Args:
        arguments: list of command-line arguments, None for those of the process.

    Returns:
        exit status: 0; 1 if a test failed, or a tool of the sanitizer that was asked for failed or is not there; 2
        where there is no source folder or no GPU, in one line.
    """
    asked = parse_arguments(arguments)
    if not TESTS.is_dir():
        print(
            f"unet_fast.gpu_check: expected a source folder with tests/gpu, got {ROOT}; run it there", file=sys.stderr
        )
        return 2
    from unet_fast import _native
    from unet_fast._fingerprint import source_fingerprint

    devices, missing = _native.gpu_devices()
    if not devices:
        print(f"unet_fast.gpu_check: expected a GPU, got none ({missing}); see `unet-fast info`", file=sys.stderr)
        return 2
    sanitizer = find_sanitizer() if asked.sanitize else None
    if asked.sanitize and sanitizer is None:
        print(
            "unet_fast.gpu_check: expected compute-sanitizer in PATH or a CUDA toolkit, found none; set CUDA_HOME",
            file=sys.stderr,
        )
    files = sorted(TESTS.glob("test_*.py"))
    small_pass = [sys.executable, str(TESTS / "small_pass.py"), "--once"]
    recorder = _Recorder(previous_sanitizer(REPORT, _native.fingerprint))
    # All at once: each keeps a core busy, and leaves most of the GPU and of its memory to others.
    with concurrent.futures.ThreadPoolExecutor(len(files) + 1) as pool:
        sanitizing = pool.submit(sanitize, sanitizer, small_pass, asked.sanitize, _SANITIZER_PARTS, recorder.sanitized)
        tests = {name: test for found in pool.map(run_file, files) for name, test in found.items()}
        outcomes = [test["outcome"] for test in tests.values()]
        report = {
            "card": devices[0]["name"],
            "compute_capability": devices[0]["compute_capability"],
            "cuda_driver": _native.cuda_driver_version(),
            "cuda_build": _native.cuda_version,
            "cuda_architectures": _native.cuda_architectures,
            "tensorflow": _native.tensorflow_version,
            "fingerprint": _native.fingerprint,
            "fingerprint_of_sources": source_fingerprint(ROOT),
            "passed": outcomes.count("passed"),
            "failed": outcomes.count("failed"),
            "skipped": outcomes.count("skipped"),
            "tests": tests,
        }
        recorder.tested(report)
        sanitized = sanitizing.result()
    print(
        f"{REPORT.relative_to(ROOT)}: {report['passed']} passed, {report['failed']} failed, {report['skipped']} skipped"
    )
    return 1 if report["failed"] or any(tool["outcome"] != "passed" for tool in sanitized.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
