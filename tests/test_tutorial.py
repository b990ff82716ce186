"""docs/tutorial.md: its commands, one after the other, and what it says they leave behind."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from unet_fast.cli import main
from unet_fast.data import read_png

ROOT = Path(__file__).parent.parent
# The tutorial's networks take a minute each on two cores; these take seconds, and everything else is as it is written.
SMALLER = {"--filters 8 --depth 3": "--filters 2 --depth 1", "--steps 300": "--steps 2", "--folds 3": "--folds 2"}


def commands():
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    for long, short in SMALLER.items():
        assert any(long in line for line in lines), long
        lines = [line.replace(long, short) for line in lines]
    return lines


def run(line, monkeypatch):
    """A line as a shell would run it, but within this process, where TensorFlow is there already."""
    program, *arguments = shlex.split(line)
    if program == "python":
        monkeypatch.setattr("sys.argv", arguments)
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    else:
        assert program == "unet-fast", line
        assert main(arguments) == 0, line


def test_the_commands_work_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = commands()
    assert [line.split()[1] for line in lines if line.startswith("unet-fast")] == [
        "train",
        "evaluate",
        "report",
        "predict",
        "crossval",
        "report",
        "predict",
    ]
    for line in lines:
        run(line, monkeypatch)
    folder = tmp_path / "tutorial"
    assert [len(list((folder / "data" / name).iterdir())) for name in ("images", "masks", "new")] == [20, 20, 4]
    assert (folder / "run" / "report.html").stat().st_size > 100_000
    assert "Fold 1: classes and curves" in (folder / "crossval" / "report.html").read_text(encoding="utf-8")
    for name in ("segmented", "ensemble"):
        labels = {file.name: read_png(file) for file in (folder / name).iterdir()}
        assert sorted(labels) == [f"section_0{i}.png" for i in range(4)]
        assert all(page.shape == (300, 400) and set(page.flat) <= {0, 255} for page in labels.values())
    printed = capsys.readouterr().out
    assert "16 training and 4 validation images" in printed and "mean ± standard deviation" in printed


@pytest.mark.parametrize("page", ["tutorial.md"])
def test_its_links_lead_somewhere(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (ROOT / "docs" / target).is_file(), target
