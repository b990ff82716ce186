"""Evaluation of a run: each image as `predict` would segment it, in the units of its spacing, and the means of all."""

import json
import shutil

import nibabel
import numpy as np
import pytest

from unet_fast import checkpoints, evaluation, surface_metrics, training
from unet_fast.config import TrainConfig
from unet_fast.data import generate, open_stack
from unet_fast.errors import UserError
from unet_fast.inference import predict_files

VALUES = (0, 100, 200)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two NIfTI volumes of three slices of 48 x 40 pixels of 0.5 x 0.25 mm, with masks of 0, 100 and 200."""
    root = tmp_path_factory.mktemp("data")
    images, masks = generate(6, size=(48, 40))
    images, masks = images[..., 0], np.array(VALUES, np.int16)[masks + (images[..., 0] > 180)]
    for name, stack in (("images", images), ("masks", masks)):
        (root / name).mkdir()
        for part, pages in zip("ab", (stack[:3], stack[3:]), strict=True):
            image = nibabel.Nifti1Image(pages.transpose(2, 1, 0), np.diag([0.25, 0.5, 2, 1]))
            image.header.set_xyzt_units("mm")
            nibabel.save(image, root / name / f"{part}.nii.gz")
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    options = {"filters": 4, "depth": 1, "padding": "same", "size": 32, "batch": 2, "steps": 30, "lr": 1e-2, "folds": 3}
    training.train(TrainConfig(data=str(data), **options), out)
    return out


def test_each_image_is_scored_as_predict_segments_it(run, data, tmp_path):
    scores = evaluation.evaluate_run(run, str(data))
    assert [image["name"] for image in scores["images"]] == [f"{part}_00{i}" for part in "ab" for i in range(3)]
    predict_files(checkpoints.load_run(run), data / "images", tmp_path / "out")
    for part in "ab":
        ours, theirs = (
            open_stack(folder / f"{part}.nii.gz", labels=True) for folder in (data / "masks", tmp_path / "out")
        )
        for page in range(3):
            image = scores["images"][3 * "ab".index(part) + page]
            assert (image["spacing"], image["unit"], image["tolerance"]) == ([0.5, 0.25], "mm", 0.5)
            truth, predicted = (np.searchsorted(VALUES, stack.page(page)[..., 0]) for stack in (ours, theirs))
            for k in range(3):
                masks = truth == k, predicted == k
                assert image["hd95_per_class"][k] == pytest.approx(surface_metrics.hd95(*masks, (0.5, 0.25)))
                assert image["nsd_per_class"][k] == pytest.approx(surface_metrics.nsd(*masks, (0.5, 0.25)))
                dice = 2 * (masks[0] & masks[1]).sum() / max(sum(mask.sum() for mask in masks), 1)
                assert image["dice_per_class"][k] == pytest.approx(dice if masks[0].any() or masks[1].any() else 1)
            objects = [surface_metrics.instances(classes) for classes in (truth, predicted)]
            assert image["adapted_rand_error"] == pytest.approx(surface_metrics.adapted_rand_error(*objects))
            voi = surface_metrics.variation_of_information(*objects)
            assert (image["voi_split"], image["voi_merge"]) == pytest.approx(voi)


def test_means(run, data):
    scores = evaluation.evaluate_run(run, str(data))
    for name in ("hd95", "nsd"):
        each = np.array([image[f"{name}_per_class"] for image in scores["images"]])
        np.testing.assert_allclose(scores[f"{name}_per_class"], each.mean(0))
        assert scores[name] == pytest.approx(each.mean())
    for name in ("adapted_rand_error", "voi_split", "voi_merge"):
        assert scores[name] == pytest.approx(np.mean([image[name] for image in scores["images"]]))


def test_tolerance_is_in_units_of_the_spacing(run, data):
    exact, generous, none = (
        evaluation.evaluate_run(run, str(data), tolerance=tolerance)["nsd"] for tolerance in (0.0, 0.5, None)
    )
    assert exact < generous == none
    assert evaluation.evaluate_run(run, str(data), tolerance=100)["nsd"] > generous
    for wrong in (-1, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"--tolerance to be a number of at least 0, got {wrong}"):
            evaluation.evaluate_run(run, tolerance=wrong)


def test_what_is_not_defined_is_null(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(surface_metrics, "variation_of_information", lambda *objects: (float("nan"), float("nan")))
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    scores = evaluation.evaluate_run(copy)
    assert scores["voi_split"] is None and scores["images"][0]["voi_merge"] is None

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads((copy / "metrics.json").read_text(), parse_constant=refuse) == scores


def test_classes_that_are_not_there():
    nothing = np.zeros((30, 40), int)
    scores = evaluation.image_scores(nothing, nothing, 3)
    for name in ("dice", "iou", "nsd"):
        assert scores[f"{name}_per_class"] == [1, 1, 1]
    assert scores["hd95_per_class"] == [0, 0, 0]
    made_up = nothing.copy()
    made_up[5, 5] = 2
    scores = evaluation.image_scores(nothing, made_up, 3, spacing=(2.0, 2.0))
    assert scores["dice_per_class"][1:] == [1, 0] and scores["iou_per_class"][1:] == [1, 0]
    assert scores["hd95_per_class"][1:] == [0, 100] and scores["nsd_per_class"][1:] == [1, 0]
    assert (scores["adapted_rand_error"], scores["voi_split"], scores["voi_merge"]) == (1, None, None)


def test_masks_with_other_values_are_refused(run, data, tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        image = nibabel.load(data / name / "a.nii.gz")
        pixels = np.asarray(image.dataobj)
        pixels = np.where(pixels == 200, 255, pixels).astype(pixels.dtype) if name == "masks" else pixels
        nibabel.save(nibabel.Nifti1Image(pixels, image.affine), tmp_path / name / "a.nii.gz")
    with pytest.raises(UserError, match=r"mask values 0, 100, 200 like the training's; got 0, 100, 255"):
        evaluation.evaluate_run(run, str(tmp_path))


def test_the_values_of_the_masks_are_kept(run):
    facts = json.loads((run / "config.json").read_text())["dataset"]
    assert facts["mask_values"] == list(VALUES) and facts["num_classes"] == 3
