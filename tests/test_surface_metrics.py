"""Contours and objects: against their definitions, and what empty masks are."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unet_fast.errors import UserError
from unet_fast.surface_metrics import (
    adapted_rand_error,
    hd95,
    instances,
    nsd,
    surface_distances,
    variation_of_information,
)

MASKS = hnp.arrays(bool, (7, 9))
SPACINGS = st.tuples(*[st.sampled_from([0.25, 1.0, 3.5])] * 2)


def outline(mask):
    """Pixels of a mask with a neighbour in row or column that is not in it, one by one."""
    padded = np.pad(mask, 1)
    return [
        (y, x)
        for y, x in np.argwhere(mask)
        if not all(padded[y + a, x + b] for a, b in ((0, 1), (2, 1), (1, 0), (1, 2)))
    ]


def nearest(points, others, spacing):
    return [
        min(math.hypot(*((a - b) * s for a, b, s in zip(p, o, spacing, strict=True))) for o in others) for p in points
    ]


@settings(max_examples=60, deadline=None)
@given(truth=MASKS, prediction=MASKS, spacing=SPACINGS, tolerance=st.sampled_from([0.0, 0.5, 1.0, 2.7, 4.0]))
def test_outlines_by_their_definition(truth, prediction, spacing, tolerance):
    points = outline(truth), outline(prediction)
    if not all(points):
        return
    expected = nearest(*points, spacing), nearest(*points[::-1], spacing)
    for ours, theirs in zip(surface_distances(truth, prediction, spacing), expected, strict=True):
        np.testing.assert_allclose(ours, theirs)
    assert hd95(truth, prediction, spacing) == pytest.approx(max(np.percentile(part, 95) for part in expected))
    both = [distance <= tolerance + 1e-6 for part in expected for distance in part]
    assert nsd(truth, prediction, spacing, tolerance) == pytest.approx(np.mean(both))
    assert hd95(truth, prediction, spacing) == hd95(prediction, truth, spacing)


def test_a_square_that_is_moved():
    truth, moved = np.zeros((40, 40)), np.zeros((40, 40))
    truth[10:20, 10:20] = moved[10:20, 13:23] = 1
    assert hd95(truth, truth) == 0 and nsd(truth, truth, tolerance=0) == 1
    assert hd95(truth, moved) == 3 and hd95(truth, moved, spacing=(9.0, 0.5)) == 1.5
    assert nsd(truth, moved, tolerance=3) == 1 and nsd(truth, moved, tolerance=2.9) < 0.7
    # One pixel is the default, of the longer side where the sides differ.
    shifted = np.roll(truth, 1, 0)
    assert nsd(truth, shifted) == 1 and nsd(truth, shifted, spacing=(0.1, 0.1)) == 1
    assert nsd(truth, shifted, spacing=(2.0, 1.0)) == 1 and nsd(truth, np.roll(truth, 2, 0), spacing=(1.0, 1.0)) < 1


def test_empty_masks():
    empty, mask = np.zeros((30, 40)), np.zeros((30, 40))
    mask[3:5, 3:5] = 1
    assert hd95(empty, empty) == 0 and nsd(empty, empty) == 1
    for pair in ((empty, mask), (mask, empty)):
        assert hd95(*pair) == 50 and hd95(*pair, spacing=(2.0, 2.0)) == 100
        assert nsd(*pair, tolerance=1000) == 0
    assert adapted_rand_error(empty.astype(int), empty.astype(int)) == 0
    assert variation_of_information(empty.astype(int), empty.astype(int)) == (0, 0)
    objects = instances(mask)
    assert adapted_rand_error(instances(empty), objects) == 1
    assert all(map(math.isnan, variation_of_information(instances(empty), objects)))
    # One object that was not found is one object that was: all of it is in the background.
    assert adapted_rand_error(objects, instances(empty)) == 0
    assert variation_of_information(objects, instances(empty)) == (0, 0)
    two = instances(mask + np.roll(mask, 9, 1))
    assert adapted_rand_error(two, instances(empty)) > 0.3
    assert variation_of_information(two, instances(empty)) == (0, 1)


@settings(max_examples=60, deadline=None)
@given(
    truth=hnp.arrays(np.int64, (4, 5), elements=st.integers(0, 3)),
    prediction=hnp.arrays(np.int64, (4, 5), elements=st.integers(0, 3)),
)
def test_partitions_by_their_definition(truth, prediction):
    """Every pair of pixels, and every pixel's two objects, of those that belong to an object of the truth."""
    counted = [(t, p) for t, p in zip(truth.ravel(), prediction.ravel(), strict=True) if t]
    if not counted:
        return
    same = [(a[0] == b[0], a[1] == b[1]) for a, b in itertools.combinations(counted, 2)]
    both, in_truth, predicted = (sum(map(rule, same)) for rule in (all, lambda s: s[0], lambda s: s[1]))
    expected = 1 - 2 * both / (in_truth + predicted) if in_truth + predicted else 0
    assert adapted_rand_error(truth, prediction) == pytest.approx(expected)

    def entropy(values):
        shares = np.unique(values, axis=0, return_counts=True)[1] / len(values)
        return -(shares * np.log2(shares)).sum()

    joint, t, p = entropy(counted), entropy([c[:1] for c in counted]), entropy([c[1:] for c in counted])
    assert variation_of_information(truth, prediction) == pytest.approx((joint - t, joint - p), abs=1e-9)


def test_a_cell_that_is_split_and_cells_that_are_merged():
    cells = np.zeros((20, 21), int)
    cells[:, :10] = cells[:, 11:] = 1
    split = cells.copy()
    split[10, :10] = 0
    merged = cells.copy()
    merged[10, 10] = 1
    truth = instances(cells)
    assert truth.max() == 2 and instances(split).max() == 3 and instances(merged).max() == 1
    assert adapted_rand_error(truth, truth) == 0 and variation_of_information(truth, truth) == (0, 0)
    split_error, merge_error = (variation_of_information(truth, instances(mask)) for mask in (split, merged))
    assert split_error[0] > 0.4 and split_error[1] < 0.2
    assert merge_error == pytest.approx((0, 1))
    assert adapted_rand_error(truth, instances(merged)) == pytest.approx(1 / 3, abs=0.01)


def test_membranes_of_one_pixel_part_cells_also_diagonally():
    assert instances(1 - np.eye(6, dtype=int)).max() == 2


def test_mistakes():
    mask = np.zeros((4, 4))
    with pytest.raises(UserError, match=r"of one shape, got \[4, 4\] and \[3, 4\]"):
        hd95(mask, mask[:3])
    with pytest.raises(UserError, match=r"two positive numbers, got \(0, 1\)"):
        hd95(mask, mask, spacing=(0, 1))
    with pytest.raises(UserError, match="tolerance of at least 0, got -1"):
        nsd(mask, mask, tolerance=-1)
    with pytest.raises(UserError, match="two partitions of one shape"):
        variation_of_information(mask.astype(int), mask[:3].astype(int))
