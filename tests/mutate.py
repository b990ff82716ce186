"""Mutation testing: does a test fail when a line of the code is wrong?

    pip install cosmic-ray
    PYTHONPATH=. python tests/mutate.py unet_fast/losses.py tests/test_losses.py [more tests ...] [--json FILE] [--jobs 2]

Changes one operator, number, condition or decorator of the file at a time, as cosmic-ray's operators do, and runs the tests
that come by that line, the quickest first, until one fails. Each mutant is a process forked off one that has imported
TensorFlow and started nothing, so that it costs the tests' time alone, and finds the changed module in place of the file,
which stays as it is. Prints the mutants that survive, with the line before and after, and records all of them in FILE;
--resume leaves out what FILE has.
"""

import argparse
import collections
import importlib.abc
import importlib.util
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import xml.etree.ElementTree

SECONDS = 600  # that the tests may take of one mutant; an endless loop counts as found
# One replacement a kind of operator, and of comparisons the opposite and the neighbour: others are found by the same tests.
OPERATORS = {
    "AddNot", "ExceptionReplacer", "NumberReplacer", "RemoveDecorator", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub",
    "ZeroIterationForLoop",
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Add", "Pow_Mul"
    )),
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_GtE", "Gt_LtE", "LtE_Gt",
        "GtE_Lt",
    )),
}  # fmt: skip


def mutants(path):
    """Every mutant of a file: (what was done, line number, the line before and after, the whole source)."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source, tree = path.read_text(), get_ast_from_path(path)
    for name in operator_names():
        kind = name.rpartition("/")[2]
        if kind not in OPERATORS:
            continue
        operator = get_operator(name)()
        places = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        for occurrence, ((line, _), _) in enumerate(places):
            changed = mutate_code(source, operator, occurrence)
            before, after = source.splitlines(), changed.splitlines()
            at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), line - 1)
            yield kind, at + 1, before[at].strip(), after[at].strip() if at < len(after) else "", changed


class Finder(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Gives one module another source.

    By a path where nothing is: AutoGraph compiles functions anew from the source that their file has, if there is one.
    """

    def __init__(self, name, path, source):
        self._name, self._path, self._source = name, str(path.with_suffix(".mutant.py")), source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self._path, loader=self) if name == self._name else None

    def get_filename(self, name):
        return self._path

    def get_data(self, path):
        if path != self._path:
            raise OSError(path)  # there is no bytecode of it
        return self._source.encode()


def fork_pytest(arguments, before, seconds):
    """A process that runs pytest after a call of `before`, for so many seconds at most, 0 for any; its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    signal.alarm(seconds)
    import pytest

    before()
    status = pytest.main(["-q", "-p", "no:cacheprovider", *arguments])
    os._exit(0 if status == 0 else 1)


def tests_by_line(path, tests):
    """What the tests do on the file as it is: (dict from a line to the tests that come by, all tests), the quickest first."""
    import coverage

    with tempfile.TemporaryDirectory() as folder:
        data, report = pathlib.Path(folder) / "coverage", pathlib.Path(folder) / "junit.xml"
        options = [
            "--cov=unet_fast",
            "--cov-context=test",
            "--cov-report=",
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
        ]
        child = fork_pytest([*options, *tests], lambda: os.environ.update(COVERAGE_FILE=str(data)), 0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit("tests/mutate.py: the tests fail on the file as it is; run them by themselves")
        cases = xml.etree.ElementTree.parse(report).iter("testcase")
        seconds = {f"{case.get('file')}::{case.get('name')}": float(case.get("time")) for case in cases}
        found = coverage.CoverageData(str(data))
        found.read()
        contexts = found.contexts_by_lineno(str(path))
    quick = sorted(seconds, key=seconds.get)
    by_line = collections.defaultdict(list)
    for line, names in contexts.items():
        came = {name.partition("|")[0] for name in names}
        by_line[line] = [test for test in quick if test in came]
    return by_line, quick


def start(name, path, source, tests):
    """A process that runs the tests on a module of another source; its number."""
    return fork_pytest(["-x", *tests], lambda: sys.meta_path.insert(0, Finder(name, path, source)), SECONDS)


def run(path, tests, known, jobs, say):
    """Yields a record of each mutant that is not among the known, as its tests end."""
    name = ".".join(path.with_suffix("").parts)
    running = {}
    todo = [m for m in mutants(path) if [str(path), *m[:4]] not in known]
    by_line, all_tests = tests_by_line(path.resolve(), tests)
    total = len(todo)
    while todo or running:
        while todo and len(running) < jobs:
            mutant = todo.pop(0)
            # A line that runs on import, or goes on from the one above, is not by a test.
            chosen = by_line[mutant[1]] or all_tests
            running[start(name, path.resolve(), mutant[4], chosen)] = mutant, time.monotonic()
        child, status = os.wait()
        mutant, begin = running.pop(child)
        record = dict(zip(("operator", "line", "before", "after"), mutant[:4], strict=True))
        record |= {"file": str(path), "survived": status == 0, "seconds": round(time.monotonic() - begin, 1)}
        outcome = "SURVIVED" if status == 0 else "found"
        say(f"{total - len(todo) - len(running)}/{total} {outcome} {path}:{record['line']} {record['after']}")
        yield record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="of the package, from the source folder")
    parser.add_argument("tests", nargs="+", help="files of tests, those first that are likely to fail")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="record the mutants in FILE")
    parser.add_argument("--resume", action="store_true", help="leave out the mutants that FILE has")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="mutants at a time (default: 2)")
    asked = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import tensorflow  # what every mutant would import

    assert keras.backend.backend() == "tensorflow" and tensorflow.__version__
    records = json.loads(asked.json.read_text()) if asked.resume and asked.json and asked.json.exists() else []
    known = [[r[key] for key in ("file", "operator", "line", "before", "after")] for r in records]
    for record in run(asked.file, asked.tests, known, asked.jobs, lambda text: print(text, flush=True)):
        records.append(record)
        if asked.json:
            asked.json.write_text(json.dumps(records, indent=1) + "\n")
    here = [record for record in records if record["file"] == str(asked.file)]
    survived = [record for record in here if record["survived"]]
    print(f"{asked.file}: {len(here)} mutants, {len(survived)} survived")
    for record in survived:
        print(f"  line {record['line']}: {record['before']}\n      -> {record['after']}")


if __name__ == "__main__":
    main()
