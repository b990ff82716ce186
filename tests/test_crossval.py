"""Folds: a true partition, the published overlapping ones, and a split file that cannot lie."""

import json
from collections import deque

import numpy as np
import pytest

from unet_fast.crossval import draw, folds, load_split, save_split, shared_files
from unet_fast.data import Dataset
from unet_fast.errors import UserError

NAMES = [f"s{i}" for i in range(12)]


@pytest.mark.parametrize(("num_samples", "num_folds"), [(30, 5), (31, 4), (5, 5), (2, 2), (100, 7)])
def test_partition_validates_every_sample_once(num_samples, num_folds):
    made = folds(num_samples, num_folds=num_folds)
    assert len(made) == num_folds
    assert sorted(np.concatenate([validation for _, validation in made])) == list(range(num_samples))
    sizes = [len(validation) for _, validation in made]
    assert max(sizes) - min(sizes) <= 1
    for train, validation in made:
        assert len(train)
        assert sorted([*train, *validation]) == list(range(num_samples))


@pytest.mark.parametrize("num_samples", [6, 30, 57])
def test_nvidia_is_the_published_recipe(num_samples):
    """Shuffle with seed 0, rotate to the right, cut at 80 %."""
    shuffled = np.random.RandomState(0).permutation(num_samples)
    made = folds(num_samples, split="nvidia")
    assert len(made) == 5
    for number, (train, validation) in enumerate(made):
        rotated = deque(shuffled)
        rotated.rotate(number * int((1 - 0.8) * num_samples))
        rotated = list(rotated)
        first = int(0.8 * num_samples)
        assert train.tolist() == sorted(rotated[:first])
        assert validation.tolist() == sorted(rotated[first:])


def test_nvidia_folds_of_isbi():
    made = folds(30, split="nvidia")
    assert made[0][1].tolist() == [0, 3, 12, 15, 21, 25]
    assert made[1][1].tolist() == [4, 7, 9, 18, 19, 25]
    assert [len(train) for train, _ in made] == [24] * 5
    assert len(set(np.concatenate([validation for _, validation in made]))) < 30, "they overlap, as published"


@pytest.mark.parametrize("num_folds", [2, 3, 4])
def test_files_stay_together(num_folds):
    files = [0, 0, 0, 7, 2, 2, 2, 2, 3, 3, 5]
    made = folds(len(files), num_folds=num_folds, files=files)
    assert sorted(np.concatenate([validation for _, validation in made])) == list(range(len(files)))
    counts = []
    for train, validation in made:
        here, there = ({files[i] for i in part} for part in (train, validation))
        assert here | there == set(files) and not here & there
        assert train.tolist() == sorted(train) and validation.tolist() == sorted(validation)
        counts.append(len(there))
    assert max(counts) - min(counts) <= 1


def test_files_of_one_image_are_dealt_as_images_are():
    for ours, theirs in zip(folds(12, files=range(12)), folds(12), strict=True):
        for part, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(part, other)


def a_dataset(files):
    images = np.zeros((len(files), 2, 2), np.uint8)
    images[:, 0] = 1
    return Dataset.from_arrays(images, images, files=files)


def test_files_are_dealt_out_where_there_are_enough():
    def shared(files, **options):
        dataset = a_dataset(files)
        return [shared_files(dataset, fold) for fold in draw(dataset, **options)]

    three = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert shared(three, num_folds=3) == shared(three, num_folds=3, group="file") == [(0, 3)] * 3
    assert any(both for both, _ in shared(three, num_folds=3, group="image"))
    assert any(both for both, _ in shared(three, num_folds=4)), "fewer files than folds: by image"
    with pytest.raises(UserError, match=r"at least 4 files for 4 folds, got 3; use fewer folds, or .* --group image"):
        draw(a_dataset(three), num_folds=4, group="file")


def test_the_nvidia_split_and_one_stack_stay_by_image():
    stack = a_dataset([0] * 30)
    for options in ({"split": "nvidia"}, {"split": "partition"}):
        for ours, theirs in zip(draw(stack, **options), folds(30, **options), strict=True):
            np.testing.assert_array_equal(ours[1], theirs[1])
    volumes = a_dataset([i // 5 for i in range(30)])
    np.testing.assert_array_equal(draw(volumes, split="nvidia")[2][1], folds(30, split="nvidia")[2][1])
    with pytest.raises(UserError, match="one of images, not of files"):
        draw(volumes, split="nvidia", group="file")


def test_seeds():
    def flat(**options):
        return np.concatenate([validation for _, validation in folds(30, **options)]).tolist()

    for split in ("partition", "nvidia"):
        assert flat(split=split, seed=3) == flat(split=split, seed=3)
        assert flat(split=split, seed=3) != flat(split=split, seed=4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_samples": 4}, "at least 5 samples"),
        ({"num_samples": 5, "split": "nvidia"}, "at least 6 samples"),
        ({"num_samples": 9, "num_folds": 1}, "at least 2 folds"),
        ({"num_samples": 9, "split": "random"}, "partition or nvidia, got 'random'"),
        ({"num_samples": 9, "seed": -1}, "seed from 0"),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(UserError, match=words):
        folds(**arguments)


@pytest.mark.parametrize("split", ["partition", "nvidia"])
def test_a_split_comes_back(tmp_path, split):
    made = folds(12, split=split)
    (tmp_path / "split.json").write_text("old")
    save_split(tmp_path / "split.json", made, NAMES)
    loaded = load_split(tmp_path / "split.json", tuple(NAMES))
    for ours, theirs in zip(loaded, made, strict=True):
        for part, original in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(part, original)
            assert part.dtype == np.int64
    assert [file.name for file in tmp_path.iterdir()] == ["split.json"]


def test_a_split_of_other_data_is_refused(tmp_path):
    save_split(tmp_path / "split.json", folds(12), NAMES)
    for names in (NAMES[:-1], [*NAMES[:-1], "other"], NAMES[::-1]):
        with pytest.raises(UserError, match="made for other data"):
            load_split(tmp_path / "split.json", names)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c["folds"][1]["train"].append(c["folds"][1]["train"][0]), "fold 1 names a sample twice"),
        (lambda c: c["folds"][0]["train"].append(c["folds"][0]["validation"][0]), "fold 0 names a sample twice"),
        (lambda c: c["folds"][0]["train"].append(12), "one that is not there"),
        (lambda c: c["folds"][0]["train"].append(-1), "one that is not there"),
        (lambda c: c["folds"][0]["train"].append(True), "two lists of sample numbers"),
        (lambda c: c["folds"][0]["train"].append("1"), "two lists of sample numbers"),
        (lambda c: c["folds"][2]["validation"].clear(), "fold 2 is not two lists"),
        (lambda c: c["folds"][0].update(train=3), "fold 0 is not two lists"),
        (lambda c: c["folds"].clear(), "at least one fold"),
        (lambda c: c["folds"][0].pop("train"), "not a split file"),
        (lambda c: c.update(folds=3), "not a split file"),
        (lambda c: c.pop("names"), "not a split file"),
        (lambda c: c.update(names=None), "made for other data"),
    ],
)
def test_a_damaged_split_is_refused(tmp_path, damage, words):
    path = tmp_path / "split.json"
    save_split(path, folds(12), NAMES)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        load_split(path, NAMES)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff"])
def test_what_is_no_split_file(tmp_path, text):
    path = tmp_path / "split.json"
    with pytest.raises(UserError, match="cannot read"):
        load_split(path, NAMES)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="not a split file"):
        load_split(path, NAMES)
