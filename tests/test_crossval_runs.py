"""`unet-fast crossval`: runs as train makes them, their scores together, and going on after an interruption."""

import json
import re
import runpy
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tifffile

from unet_fast import crossval_runs, training
from unet_fast.cli import main
from unet_fast.data import write_tiff
from unet_fast.errors import UserError


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def mistake(capsys, *arguments):
    """The one line that a mistake costs."""
    assert main(list(map(str, arguments))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("unet-fast: error: ")


def same_weights(one, other):
    with np.load(one / "last" / "state.npz") as ours, np.load(other / "last" / "state.npz") as theirs:
        assert set(ours.files) == set(theirs.files)
        for name in set(ours.files) - {"progress"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_fold_is_what_train_makes(crossval_folder, crossval_options, tmp_path):
    """The second one, too, which was interrupted and resumed after the first: nothing of all that is left in it."""
    assert main(["train", "--fold", "1", "--out", str(tmp_path / "run"), *crossval_options]) == 0
    files = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"config.json", "history.csv", "last", "metrics.json", "model.keras", "overlays.png", "split.json"} <= files
    for fold in (0, 1):
        assert {file.name for file in (crossval_folder / f"fold{fold}").iterdir()} == files
    same_weights(crossval_folder / "fold1", tmp_path / "run")
    for name in ("config.json", "split.json"):
        assert read(crossval_folder / "fold1" / name) == read(tmp_path / "run" / name)
    assert read(crossval_folder / "split.json") == read(tmp_path / "run" / "split.json")


def test_folds_keep_files_apart(crossval_folder):
    """Four TIFFs of two pages, two folds: each validates two files, whole."""
    split = read(crossval_folder / "split.json")
    for fold in split["folds"]:
        validated = [split["names"][i].rsplit("_", 1) for i in fold["validation"]]
        assert [page for _, page in validated] == ["000", "001"] * 2
        assert len({stem for stem, _ in validated}) == 2


def test_scores_of_all_folds(crossval_folder):
    result = read(crossval_folder / "metrics.json")
    folds = [read(crossval_folder / f"fold{fold}" / "metrics.json") for fold in (0, 1)]
    assert result["samples"] == [4, 4] and result["unit"] == "pixel"
    assert result["step"] == [fold["step"] for fold in folds]
    assert set(result["scores"]) == set(folds[0]) - {"fold", "step", "samples", "images"}
    for name in ("soft_dice", "dice", "hd95", "dice_per_class", "iou_per_class", "nsd_per_class"):
        values = np.array([fold[name] for fold in folds])
        score = result["scores"][name]
        np.testing.assert_allclose(score["mean"], values.mean(0))
        np.testing.assert_allclose(score["sd"], values.std(0, ddof=1), atol=1e-12)
        np.testing.assert_array_equal(score["per_fold"], values)


def test_what_a_fold_has_not_is_left_out_of_the_mean(crossval_folder, tmp_path):
    out = shutil.copytree(crossval_folder, tmp_path / "copy")
    for fold, value in ((0, None), (1, 0.25)):
        file = out / f"fold{fold}" / "metrics.json"
        file.write_text(json.dumps(read(file) | {"voi_merge": value}))
    assert crossval_runs.aggregate(out)["scores"]["voi_merge"] == {"mean": 0.25, "sd": None, "per_fold": [None, 0.25]}
    (out / "fold1" / "metrics.json").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        crossval_runs.aggregate(out)


def test_what_is_printed(crossval_folder, capsys):
    """By a resumed one, all whose folds are finished: they are kept, and scored together again."""
    models = {fold: (crossval_folder / fold / "model.keras").stat().st_mtime_ns for fold in ("fold0", "fold1")}
    before = (crossval_folder / "metrics.json").read_text()
    assert main(["crossval", "--out", str(crossval_folder), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "fold 0 is finished\nfold 1 is finished\n" in printed and "step 2/6" not in printed
    scores = read(crossval_folder / "metrics.json")["scores"]
    assert f"{scores['soft_dice']['mean']:.4f} ± {scores['soft_dice']['sd']:.4f}" in printed
    assert f"{scores['dice_per_class']['mean'][1]:.4f} ± {scores['dice_per_class']['sd'][1]:.4f}" in printed
    for fold in (0, 1):
        row = next(line for line in printed.splitlines() if re.match(rf"│ {fold} +│ +4 │", line))
        assert f"{scores['dice']['per_fold'][fold]:.4f}" in row
    assert {fold: (crossval_folder / fold / "model.keras").stat().st_mtime_ns for fold in models} == models
    assert (crossval_folder / "metrics.json").read_text() == before


def test_interrupted(interrupted_crossval):
    out, status, said = interrupted_crossval
    assert status == 128 + signal.SIGTERM
    stopped, *refused = said.splitlines()
    assert re.fullmatch(
        rf"unet-fast: fold 1: stopped at step \d of 6; go on with `unet-fast crossval --out {out} --resume`", stopped
    )
    assert len(refused) == 2 and all("this cross-validation is not finished; go on with" in line for line in refused)


def test_the_folder_is_an_ensemble(crossval_folder, stacks, tmp_path):
    write_tiff(tmp_path / "in.tif", tifffile.imread(stacks / "images" / "d.tif"))

    def predicted(name, run):
        target = tmp_path / f"{name}.tif"
        files = ["--input", str(tmp_path / "in.tif"), "--output", str(target)]
        assert main(["predict", "--run", str(run), *files, "--probabilities"]) == 0
        return tifffile.imread(target)

    each = [predicted(fold, crossval_folder / fold) for fold in ("fold0", "fold1")]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    np.testing.assert_allclose(predicted("all", crossval_folder), np.mean(each, 0), atol=1e-6)


def test_mistakes(crossval_folder, crossval_options, stacks, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, message in (
        (["--out", out, "--resume"], "expected the folder of a cross-validation, found no such folder"),
        (["--out", out], "expected --data"),
        (["--data", stacks], "expected --out OUT"),
        (["--data", stacks, "--out", out, "--fold", "1"], "unrecognized arguments: --fold 1"),
        (["--data", stacks, "--out", out, "--folds", "5", "--group", "file"], "at least 5 files for 5 folds, got 4"),
        (["--data", stacks, "--out", out, "--split", "nvidia", "--group", "file"], "one of images, not of files"),
        (["--data", stacks, "--out", out, "--size", "33", "--padding", "same"], "fold 0: input size 33 does not fit"),
        (["--data", stacks, "--out", crossval_folder], "go on with --resume"),
        (["--out", crossval_folder / "fold0", "--resume"], "found no crossval.json in it"),
        (["--out", crossval_folder, "--resume", "--lr", "1"], "--lr is 1.0 but the run to resume has 0.01"),
    ):
        assert message in mistake(capsys, "crossval", *arguments), arguments
        assert not out.exists() or not [file for file in out.iterdir() if file.name != ".lock"]
    for command in ("train --out {} --resume", "evaluate --run {}"):
        line = mistake(capsys, *command.format(crossval_folder).split())
        assert line.startswith(
            f"{crossval_folder}: is a cross-validation's folder; give one of the runs in it, such as "
        )


def test_a_mistake_found_by_the_first_run_leaves_the_folder_as_new(crossval_options, tmp_path, capsys):
    weights, out = tmp_path / "weights.csv", tmp_path / "out"
    weights.write_text("name,weight\nnobody,1\n")
    arguments = ["--out", out, *crossval_options, "--sample-weights", weights]
    for _ in range(2):  # the second time it is no cross-validation to go on with
        assert "nobody" in mistake(capsys, "crossval", *arguments)


def test_images_of_a_file_on_both_sides_are_told(crossval_options, tmp_path, capsys, monkeypatch):
    def enough():
        raise UserError("enough")

    monkeypatch.setattr(training, "signals", enough)
    assert main(["train", "--out", str(tmp_path / "run"), *crossval_options, "--group", "image"]) == 2
    printed = capsys.readouterr().out
    assert re.search(r"note: \d of 4 files have images in training and validation both", printed)
    assert "--group file and --folds 2 keeps files together" in printed


def test_a_run_of_an_earlier_version_is_refused_in_one_line(crossval_folder, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    config = read(crossval_folder / "fold0" / "config.json")
    del config["dataset"]["mask_values"]
    (run / "config.json").write_text(json.dumps(config))
    assert mistake(capsys, "evaluate", "--run", run) == (
        f"{run / 'config.json'}: written by an earlier version, which did not record the values of the masks; train again, "
        'or add them to "dataset", such as "mask_values": [0, 255]'
    )


def test_markdown(crossval_folder):
    script = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "crossval_table.py"))
    lines = script["table"]([crossval_folder]).splitlines()
    scores = read(crossval_folder / "metrics.json")["scores"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {2 + len(script["COLUMNS"])}
    soft, membrane = scores["soft_dice"], scores["dice_per_class"]
    assert cells[2][:4] == [
        "**unet_fast, float32, mean**",
        "partition",
        f"{soft['mean']:.4f} ± {soft['sd']:.4f}",
        f"{membrane['mean'][0]:.4f} ± {membrane['sd'][0]:.4f}",
    ]
    assert cells[4][2] == f"{soft['per_fold'][1]:.4f}"
    assert [row[2] for row in cells[-2:]] == ["0.8902", "0.8900"]
