"""Runs tests/gpu on this machine's GPU and records the outcome: `python -m unet_fast.gpu_check`.

Builds nothing. Writes tests/gpu/report.json in the source folder: the card, its driver, the fingerprint of the native
sources that the tested library was built from, and every test with its outcome and its seconds.
"""

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "gpu"
REPORT = TESTS / "report.json"


def run_file(path):
    """Run one file of tests in a process of its own, since PyTorch and TensorFlow bring CUDA libraries of their own.

    Without conftest.py, which imports Keras and so TensorFlow.

    Args:
        path: pathlib.Path of the file.

    Returns:
        dict from a test's name to its `outcome` (passed, failed, skipped) and `seconds`; a file that does not even run
        counts as one failed test.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        options = ["-q", "-p", "no:cacheprovider", "--noconftest", f"--junitxml={results}"]
        search = [str(ROOT), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        # cuDNN's choice by trial takes a second a shape, and here no stock op's speed matters.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "TF_CUDNN_USE_AUTOTUNE": "0"}
        subprocess.run([sys.executable, "-m", "pytest", str(path), *options], cwd=ROOT, env=environment, check=False)
        cases = xml.etree.ElementTree.parse(results).iter("testcase") if results.exists() else ()
        tests = {}
        for case in cases:
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            tests[f"{path.name}::{case.get('name')}"] = {"outcome": outcome, "seconds": float(case.get("time"))}
    return tests or {f"{path.name}": {"outcome": "failed", "seconds": 0.0}}


def main():
    """Run the tests and write the report.

    Returns:
        exit status: 0; 1 if a test failed; 2 where there is no source folder or no GPU, in one line.
    """
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
    tests = {}
    for path in sorted(TESTS.glob("test_*.py")):
        tests |= run_file(path)
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
    temporary = REPORT.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, REPORT)
    print(
        f"{REPORT.relative_to(ROOT)}: {report['passed']} passed, {report['failed']} failed, {report['skipped']} skipped"
    )
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
