"""Reads mutated files of every kind that the package reads, and says what became of them: a program for test_fuzz_files.py.

    python fuzz_files.py FOLDER EXAMPLES [KIND ...]

Each kind is a process of its own, forked off one that has imported everything, with 2 GiB more to allocate than it began
with. Example number k of a kind is a function of the two alone. Prints a JSON object {kind: {"read", "refused", "failures"}}.
What breaks a promise is a failure: another exception than UserError, a message that is not one line with the file's
name, anything written to the terminal, memory asked for that the file cannot fill, or a result that is not right.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
from fuzz_seeds import NAMES, SEEDS, network
from mutations import mutated

from unet_fast import checkpoints, crossval, tuning
from unet_fast.config import read_options
from unet_fast.data import open_stack
from unet_fast.data.sample_weights import read_sample_weights
from unet_fast.errors import UserError

MEMORY = 2**31
ALLOCATING = ("allocate", "memoryerror", "bad_alloc", "out of memory")


def read_image(path, number, whole):
    """Opens and reads pages as a mask or as an image; of a file that was only cut, pixels have to be the whole one's."""
    stack = open_stack(path, labels=number % 2 == 0)
    pages = range(min(stack.shape[0], 40))
    for page in pages:
        pixels = stack.page(page)
        assert pixels.shape == stack.shape[1:] and pixels.dtype == stack.dtype
        middle = stack.shape[1] // 2
        np.testing.assert_array_equal(stack.rows(page, middle, stack.shape[1]), pixels[middle:])
    if whole:
        original = open_stack(whole, labels=number % 2 == 0)
        assert stack.shape == original.shape
        for page in pages:
            np.testing.assert_array_equal(stack.page(page), original.page(page))


def read_config(path, number, whole):
    read_options(path)
    config, facts = checkpoints.load_config(path.parent)
    assert config.steps >= 1 and len(facts.mask_values) == facts.num_classes


def read_split(path, number, whole):
    for fold in crossval.load_split(path, NAMES):
        assert sorted(set(np.concatenate(fold))) and max(map(max, fold)) < len(NAMES)


def read_history(path, number, whole):
    rows = checkpoints.read_history(path.parent)
    if rows:
        checkpoints.best_row(rows)


def read_state(path, number, whole):
    progress = checkpoints.load_state(path.parent.parent, *network())
    assert progress["step"] >= 0 and sum(progress["losses"]) is not None


def read_model(path, number, whole):
    assert checkpoints.load_run(path.parent).model.filters == 2


def read_weights(path, number, whole):
    weights = read_sample_weights(path, NAMES)
    assert weights.shape == (len(NAMES),) and (weights >= 0).all()


def read_choices(path, number, whole):
    for engine, config, splits in tuning.read(path).values():
        assert engine in tuning.ENGINES and -1 <= config <= 2**10 and 0 <= splits <= 2**12


READERS = {
    "config.json": read_config,
    "split.json": read_split,
    "history.csv": read_history,
    "last/state.npz": read_state,
    "model.keras": read_model,
    "weights.csv": read_weights,
    "card.tsv": read_choices,
}


def outcome(read, path, number, whole):
    """("read" or "refused", what is wrong with that or None)."""
    try:
        read(path, number, whole)
        return "read", None
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > 1000 or str(path) not in text:
            return "refused", f"not one line that names the file: {text[:300]!r}"
        if any(word in text.lower() for word in ALLOCATING):
            return "refused", f"asked for memory first: {text[:300]!r}"
        return "refused", None
    except Exception:
        return "refused", traceback.format_exc()[-1500:]


def fuzz(kind, examples, folder):
    """What became of a kind's examples; called in a process of its own."""
    seed = SEEDS[kind](folder)
    place = Path(kind.split(":")[-1])
    shutil.copytree(seed.parents[len(place.parts) - 1], folder / "work")
    path, content = folder / "work" / place, seed.read_bytes()
    read = READERS.get(str(place), read_image)
    assert outcome(read, path, 0, seed) == ("read", None), "the file as it was"
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    terminal = folder / "terminal"
    counts, failures = {"read": 0, "refused": 0}, []
    with said_to(terminal):
        for number in range(examples):
            signal.alarm(300)  # what hangs is killed, and so told
            (folder / "number").write_text(str(number))
            changed, is_cut = mutated(content, str(place), kind, number)
            path.write_bytes(changed)
            what, wrong = outcome(read, path, number, seed if is_cut else None)
            if terminal.stat().st_size:
                wrong = wrong or f"wrote to the terminal: {terminal.read_text(errors='replace')[:300]!r}"
                os.truncate(terminal, 0)
            if number < 2 and what == "read" and place.suffix not in (".csv", ".tsv"):
                wrong = "nothing, or a half of it, was taken for the whole"
            counts[what] += 1
            if wrong:
                failures.append(f"{kind} {number}: {wrong}")
    return {**counts, "failures": failures}


@contextlib.contextmanager
def said_to(file):
    """Sends to a file what this process, C++ code too, writes to standard output and error."""
    with file.open("ab") as target:
        kept = os.dup(1), os.dup(2)
        for number in (1, 2):
            os.dup2(target.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, shown in zip((1, 2), kept, strict=True):
                os.dup2(shown, number)


def main(folder, examples, *kinds):
    results = {}
    for kind in kinds or SEEDS:
        own = Path(folder) / kind.replace("/", "-")
        own.mkdir()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                (own / "result.json").write_text(json.dumps(fuzz(kind, int(examples), own)))
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            number = (own / "number").read_text() if (own / "number").exists() else "before the first"
            results[kind] = {"read": 0, "refused": 0, "failures": [f"{kind} {number}: the process ended with {status}"]}
        else:
            results[kind] = json.loads((own / "result.json").read_text())
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
