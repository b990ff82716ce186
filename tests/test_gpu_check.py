"""What gpu_check makes of what it runs; needs no GPU."""

import json
import stat
import sys
import time
import types

import pytest

from unet_fast import _native, gpu_check

CLEAN = """========= COMPUTE-SANITIZER
64 cases in 2 dtypes: none failed
========= ERROR SUMMARY: 0 errors
"""
INVALID_READ = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at ForwardKernel+0x5d0
=========     Address 0x7f0c62000204 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at Kernel+0x200 and Read access at Kernel+0x2a0 [512 hazards]
=========
========= Warning: Race reported between Write access at Kernel+0x300 and Write access at Kernel+0x310 [32 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        (CLEAN, 0),
        (INVALID_READ, 1),
        (INVALID_READ.replace("1 error", "1234 errors"), 1234),
        (
            INVALID_READ.replace("1 error", "234 errors") + "========= ERROR SUMMARY: 134 errors were not printed.\n",
            234,
        ),
        (RACES, 2),
        (RACES.replace("2 hazards displayed (1 error, 1 warning)", "0 hazards displayed (0 errors, 0 warnings)"), 0),
        (
            "========= COMPUTE-SANITIZER\n========= Error: Target application terminated before first instrumented API",
            None,
        ),
        ("", None),
    ],
)
def test_errors_are_counted(output, errors):
    assert gpu_check.count_errors(output) == errors


@pytest.fixture
def sanitizer(tmp_path):
    """A stand-in: prints what it is told to for a tool, and gives the status of the command."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        f"output = {{'memcheck': {CLEAN!r}, 'racecheck': {RACES!r}, 'initcheck': {CLEAN!r}, 'synccheck': ''}}\n"
        "status = subprocess.run(sys.argv[sys.argv.index(sys.executable):]).returncode\n"
        "print(output[sys.argv[2]])\n"
        "sys.exit(status)\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_every_tool_is_run_and_recorded(sanitizer, capsys):
    results = gpu_check.sanitize(sanitizer, [sys.executable, "-c", ""])
    assert [(tool, r["outcome"], r["errors"]) for tool, r in results.items()] == [
        ("memcheck", "passed", 0),
        ("racecheck", "failed", 2),
        ("initcheck", "passed", 0),
        ("synccheck", "failed", None),
    ]
    assert "Race reported" in capsys.readouterr().err


def test_a_pass_that_fails_is_no_clean_one(sanitizer):
    results = gpu_check.sanitize(sanitizer, [sys.executable, "-c", "raise SystemExit(1)"])
    assert results["memcheck"]["outcome"] == "failed" and results["memcheck"]["errors"] == 0


def test_a_pass_that_never_ran_is_no_clean_one(tmp_path):
    path = tmp_path / "compute-sanitizer"
    path.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (result,) = gpu_check.sanitize(str(path), ["a", "command"], ["initcheck"]).values()
    assert result["outcome"] == "failed" and result["errors"] == 0


def test_our_kernels_alone_are_looked_at_and_only_memcheck_spaces_the_arrays(monkeypatch):
    commands = []
    monkeypatch.setattr(gpu_check, "_run_in_time", lambda command: commands.append(command) or (0, CLEAN))
    gpu_check.sanitize("sanitizer", ["python", "pass.py"], parts=2)
    ours = ["--kernel-name", "kernel_substring=unet_fast"]
    options = {"memcheck": ["--padding", "4096"], "racecheck": [], "initcheck": [], "synccheck": []}
    engines = {"racecheck": ["--engines", "sm90", "wmma"], "initcheck": ["--engines", "wmma"]}
    assert sorted(commands) == sorted(
        ["sanitizer", "--tool", tool, *ours, *own, "python", "pass.py", *engines.get(tool, []), "--part", part]
        for tool, own in options.items()
        for part in ("1/2", "2/2")
    )


def test_a_tool_has_failed_where_one_of_its_parts_has(monkeypatch):
    found = {"1/2": (0, CLEAN), "2/2": (0, RACES)}
    monkeypatch.setattr(gpu_check, "_run_in_time", lambda command: found[command[-1]])
    (result,) = gpu_check.sanitize("sanitizer", ["pass.py"], ["racecheck"], parts=2).values()
    assert (result["outcome"], result["errors"]) == ("failed", 2)
    found["2/2"] = (1, "it ended early")
    (result,) = gpu_check.sanitize("sanitizer", ["pass.py"], ["racecheck"], parts=2).values()
    assert (result["outcome"], result["errors"]) == ("failed", None)


@pytest.mark.parametrize(
    ("arguments", "tools"),
    [
        ([], []),
        (["--sanitize"], ["memcheck", "racecheck", "initcheck", "synccheck"]),
        (["--sanitize", "synccheck", "memcheck", "synccheck"], ["synccheck", "memcheck"]),
    ],
)
def test_tools_are_chosen(arguments, tools):
    assert gpu_check.parse_arguments(arguments).sanitize == tools


def test_a_mistyped_tool_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.parse_arguments(["--sanitize", "memchek"])
    assert "memcheck" in capsys.readouterr().err


def test_a_tool_that_did_not_run_leaves_its_entry():
    old = {"racecheck": {"outcome": "failed", "errors": 2}, "initcheck": {"outcome": "passed", "errors": 0}}
    new = {"racecheck": {"outcome": "passed", "errors": 0}, "memcheck": {"outcome": "passed", "errors": 0}}
    merged = gpu_check.merge_sanitizer(old, new)
    assert list(merged) == ["memcheck", "racecheck", "initcheck"]
    assert merged == {**old, **new}
    missing = gpu_check.sanitize(None, [], ["memcheck", "initcheck"])
    assert gpu_check.merge_sanitizer(old, missing) == {"memcheck": missing["memcheck"], **old}
    assert gpu_check.merge_sanitizer(None, {}) == {}


def test_a_tool_that_hangs_has_failed(sanitizer, monkeypatch):
    monkeypatch.setattr(gpu_check, "_SANITIZER_SECONDS", 1)
    start = time.monotonic()
    results = gpu_check.sanitize(sanitizer, [sys.executable, "-c", "import time; time.sleep(60)"], ["memcheck"])
    assert time.monotonic() - start < 30  # the command has not outlived the tool, or its output would be waited for
    assert results["memcheck"]["outcome"] == "failed" and results["memcheck"]["errors"] is None


def test_only_an_entry_of_the_same_sources_stays(tmp_path):
    path = tmp_path / "report.json"
    assert gpu_check.previous_sanitizer(path, "f") is None
    entry = {"memcheck": {"outcome": "passed", "errors": 0, "seconds": 1.0}}
    path.write_text(json.dumps({"fingerprint": "f", "sanitizer": entry}))
    assert gpu_check.previous_sanitizer(path, "f") == entry
    assert gpu_check.previous_sanitizer(path, "another") is None
    path.write_text(json.dumps({"fingerprint": "f"}))
    assert gpu_check.previous_sanitizer(path, "f") is None


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with two tests for gpu_check to run, and a GPU that is not there."""
    tests = tmp_path / "tests" / "gpu"
    tests.mkdir(parents=True)
    (tests / "test_something.py").write_text(
        "import pytest\ndef test_passes(): pass\ndef test_skipped(): pytest.skip('no second GPU')\n"
    )
    (tests / "test_peer.py").write_text("import pytest\npytest.importorskip('not_a_module_at_all')\n")
    (tests / "small_pass.py").write_text("")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "TESTS", tests)
    monkeypatch.setattr(gpu_check, "REPORT", tests / "report.json")
    devices = [{"name": "a card", "compute_capability": 90, "memory_bytes": 1}]
    fake = {name: getattr(_native, name) for name in dir(_native) if not name.startswith("__")}
    fake |= {"gpu_devices": lambda: (devices, ""), "cuda_driver_version": lambda: 13000, "fingerprint": "f"}
    import unet_fast

    monkeypatch.setattr(unet_fast, "_native", types.SimpleNamespace(**fake))
    return tests


def test_the_report_says_what_was_skipped_and_why(checkout):
    assert gpu_check.main([]) == 0
    report = json.loads((checkout / "report.json").read_text())
    assert (report["card"], report["passed"], report["failed"], report["skipped"]) == ("a card", 1, 0, 2)
    reasons = sorted(test["reason"] for test in report["tests"].values() if test["outcome"] == "skipped")
    assert reasons == ["could not import 'not_a_module_at_all': No module named 'not_a_module_at_all'", "no second GPU"]
    assert "sanitizer" not in report


def test_the_sanitizer_is_recorded_and_kept(checkout, sanitizer, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: sanitizer)
    assert gpu_check.main(["--sanitize"]) == 1  # the stand-in finds races
    entry = json.loads((checkout / "report.json").read_text())["sanitizer"]
    assert (
        list(entry) == list(gpu_check.SANITIZER_TOOLS)
        and entry["racecheck"]["errors"] == 2 * gpu_check._SANITIZER_PARTS
    )
    assert gpu_check.main([]) == 0
    assert json.loads((checkout / "report.json").read_text())["sanitizer"] == entry
    assert gpu_check.main(["--sanitize", "initcheck"]) == 0
    assert json.loads((checkout / "report.json").read_text())["sanitizer"]["racecheck"] == entry["racecheck"]


def test_what_has_ended_is_recorded_when_a_tool_is_cut_off(checkout, monkeypatch):
    ended = []

    def run(command):
        if command[command.index("--tool") + 1] != "initcheck":
            return 0, CLEAN
        while len(ended) < 3 or not (checkout / "report.json").exists():  # the others, and the tests
            time.sleep(0.01)
        raise KeyboardInterrupt

    recorded = gpu_check._Recorder.sanitized
    monkeypatch.setattr(
        gpu_check._Recorder, "sanitized", lambda self, results: recorded(self, results) or ended.append(results)
    )
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "sanitizer")
    monkeypatch.setattr(gpu_check, "_run_in_time", run)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--sanitize"])
    report = json.loads((checkout / "report.json").read_text())
    assert report["passed"] == 1
    assert {tool: entry["outcome"] for tool, entry in report["sanitizer"].items()} == dict.fromkeys(
        ("memcheck", "racecheck", "synccheck"), "passed"
    )


def test_a_missing_sanitizer_is_recorded(checkout, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    assert gpu_check.main(["--sanitize", "memcheck"]) == 1
    assert "expected compute-sanitizer" in capsys.readouterr().err
    entry = json.loads((checkout / "report.json").read_text())["sanitizer"]
    assert entry == {"memcheck": {"outcome": "not available", "errors": None, "seconds": 0.0}}
