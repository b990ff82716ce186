"""Scores of contours and of objects: what Dice does not see.

Surfaces. `hd95` and `nsd` compare the outlines of two masks. An outline is the pixels of a mask that touch, along a row or
a column, a pixel outside it or the image's edge; distances are from pixel centre to pixel centre, in units of the spacing.

Objects. `adapted_rand_error` and `variation_of_information` compare partitions, as the ISBI-2012 and CREMI challenges do
for neurons: `instances` makes one object of each connected region of a class other than 0, the background or membrane.
Only pixels that belong to an object of the truth count; background of the prediction counts there as one object.

Empty masks. Where neither truth nor prediction has a pixel nothing is wrong: distance 0, NSD 1, error 0, VOI 0. Where one
of them alone is empty, HD95 is the image's diagonal, the greatest distance that there can be, and NSD is 0. A truth
without objects beside a prediction with some has an adapted Rand error of 1, and its VOI is not defined: NaN. A
prediction without objects needs no rule: it is one object.
"""

import numpy as np
import skimage.measure
import skimage.metrics
from scipy import ndimage

from unet_fast.errors import UserError


def surface_distances(truth, prediction, spacing=(1.0, 1.0)):
    """How far the outline of each of two masks is from that of the other.

    Args:
        truth, prediction: bool [H, W], or numbers, where what is not 0 belongs to the mask.
        spacing: (height, width) of a pixel.

    Returns:
        (from_truth, from_prediction): float64 [.], the distance of each pixel of the truth's outline to the prediction's
        outline, and the other way round; empty for an empty mask. Where the other mask alone is empty, all are the
        image's diagonal.

    Raises:
        UserError: masks of different shapes or not of two axes, or a spacing that is not positive.

    >>> import numpy as np
    >>> from unet_fast.surface_metrics import surface_distances
    >>> truth, prediction = np.eye(3, 4, dtype=bool), np.eye(3, 4, 1, dtype=bool)
    >>> surface_distances(truth, prediction, spacing=(5.0, 2.0))[0].tolist()
    [2.0, 2.0, 2.0]
    """
    truth, prediction = (np.asarray(mask) != 0 for mask in (truth, prediction))
    if truth.shape != prediction.shape or truth.ndim != 2:
        raise UserError(
            f"expected two masks [H, W] of one shape, got {list(truth.shape)} and {list(prediction.shape)}; crop them alike"
        )
    if len(spacing) != 2 or not all(np.isfinite(side) and side > 0 for side in spacing):
        raise UserError(f"expected a spacing of two positive numbers, got {spacing}; give a pixel's height and width")
    diagonal = float(np.hypot(*(side * count for side, count in zip(spacing, truth.shape, strict=True))))
    outlines = [mask & ~ndimage.binary_erosion(mask) for mask in (truth, prediction)]
    rows, columns = (np.flatnonzero((outlines[0] | outlines[1]).any(axis)) for axis in (1, 0))
    if rows.size:  # nothing is nearest to an outline outside the box of both
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        outlines = [outline[box] for outline in outlines]
    return tuple(
        ndimage.distance_transform_edt(~other, sampling=spacing)[own] if other.any() else np.full(own.sum(), diagonal)
        for own, other in (outlines, outlines[::-1])
    )


def hd95(truth, prediction, spacing=(1.0, 1.0)):
    """95 % Hausdorff distance of two masks: the greater of the two 95th percentiles of `surface_distances`.

    As in MONAI and recommended by Maier-Hein et al., Metrics reloaded, 2024 (Huttenlocher et al., 1993, for the distance).

    Args, errors: as `surface_distances`.

    Returns:
        float, in units of the spacing, at least 0; the module says what it is for empty masks.

    >>> import numpy as np
    >>> from unet_fast.surface_metrics import hd95
    >>> truth, prediction = np.zeros((9, 9)), np.zeros((9, 9))
    >>> truth[2:5, 2:5] = prediction[2:5, 4:7] = 1
    >>> hd95(truth, prediction, spacing=(1.0, 0.25))
    0.5
    """
    return hd95_of(surface_distances(truth, prediction, spacing))


def nsd(truth, prediction, spacing=(1.0, 1.0), tolerance=None):
    """Normalised surface Dice of two masks: the share of both outlines that is within a tolerance of the other one.

    Nikolov et al., Clinically applicable segmentation of head and neck anatomy, 2021 (arXiv:1809.04430), with outlines
    counted in pixels as MONAI counts them.

    Args, errors: as `surface_distances`.
        tolerance: greatest distance that is no error, at least 0, in units of the spacing; None for one pixel, the
            longer of its sides.

    Returns:
        float from 0 to 1; the module says what it is for empty masks.

    Raises:
        UserError: also a negative tolerance.

    >>> import numpy as np
    >>> from unet_fast.surface_metrics import nsd
    >>> truth, prediction = np.zeros((9, 9)), np.zeros((9, 9))
    >>> truth[2:5, 2:5] = prediction[2:5, 4:7] = 1
    >>> nsd(truth, prediction, tolerance=2), nsd(truth, prediction, tolerance=1)
    (1.0, 0.625)
    """
    return nsd_of(surface_distances(truth, prediction, spacing), one_pixel(spacing) if tolerance is None else tolerance)


def hd95_of(distances):
    """`hd95` of what `surface_distances` returned.

    >>> import numpy as np
    >>> from unet_fast.surface_metrics import hd95_of
    >>> hd95_of((np.array([3.0]), np.array([1.0, 2.0])))
    3.0
    """
    return max((float(np.percentile(part, 95)) for part in distances if part.size), default=0.0)


def nsd_of(distances, tolerance):
    """`nsd` of what `surface_distances` returned.

    >>> import numpy as np
    >>> from unet_fast.surface_metrics import nsd_of
    >>> nsd_of((np.array([3.0]), np.array([1.0, 2.0])), tolerance=2)
    0.6666666666666666
    """
    if not tolerance >= 0:
        raise UserError(f"expected a tolerance of at least 0, got {tolerance}; give one in units of the spacing")
    if not all(part.size for part in distances):
        return float(not any(part.size for part in distances))
    both = np.concatenate(distances)
    return float((both <= tolerance * (1 + 1e-9)).mean())  # a distance of one pixel is rounded, too


def one_pixel(spacing):
    """The longer side of a pixel.

    >>> from unet_fast.surface_metrics import one_pixel
    >>> one_pixel((0.5, 0.25))
    0.5
    """
    return float(max(spacing[:2]))


def instances(classes):
    """Objects of a segmentation: the 4-connected regions of each class but 0.

    Four neighbours, so that a membrane that is one pixel wide parts two cells also where it runs diagonally.

    Args:
        classes: class indices [H, W].

    Returns:
        int [H, W], 0 in the background, and objects from 1 on.

    >>> import numpy as np
    >>> from unet_fast.surface_metrics import instances
    >>> instances(np.array([[1, 0, 1], [2, 0, 1]])).tolist()
    [[1, 0, 2], [3, 0, 2]]
    """
    return skimage.measure.label(np.asarray(classes), background=0, connectivity=1)


def adapted_rand_error(truth, prediction):
    """Adapted Rand error of two partitions: 1 less the F-score of the pairs of pixels that are in one object.

    Arganda-Carreras et al., Crowdsourcing the creation of image segmentation algorithms for connectomics, 2015, by
    scikit-image.

    Args:
        truth, prediction: objects [H, W] of any integer type, 0 for background, as `instances` gives them.

    Returns:
        float from 0, the same objects, to 1; the module says what it is where there are none.

    Raises:
        UserError: partitions of different shapes.

    >>> import numpy as np
    >>> from unet_fast.surface_metrics import adapted_rand_error
    >>> round(adapted_rand_error(np.array([[1, 1, 0, 2, 2]]), np.array([[1, 1, 1, 1, 1]])), 4)
    0.5
    """
    truth, prediction = _objects(truth, prediction)
    if not truth.any():
        return float(prediction.any())
    if _pairs(truth) == _pairs(prediction, truth > 0) == 0:
        return 0.0  # every object is a single pixel
    with np.errstate(invalid="ignore"):  # of its precision and recall, where one of them has no pair
        return float(skimage.metrics.adapted_rand_error(truth, prediction, ignore_labels=(0,))[0])


def variation_of_information(truth, prediction):
    """Variation of information of two partitions, in bits, as the two terms that it is the sum of.

    Meila, Comparing clusterings, 2007; by scikit-image.

    Args, errors: as `adapted_rand_error`.

    Returns:
        (split, merge): H(prediction | truth), which objects that were cut in pieces cause, and H(truth | prediction),
        which objects that were taken for one cause; floats from 0, or NaN: see the module.

    >>> import numpy as np
    >>> from unet_fast.surface_metrics import variation_of_information
    >>> variation_of_information(np.array([[1, 1, 0, 2, 2]]), np.array([[1, 1, 1, 1, 1]]))
    (0.0, 1.0)
    """
    truth, prediction = _objects(truth, prediction)
    if not truth.any():
        return (float("nan"),) * 2 if prediction.any() else (0.0, 0.0)
    split, merge = skimage.metrics.variation_of_information(truth, prediction, ignore_labels=(0,))
    return max(float(split), 0.0), max(float(merge), 0.0)


def _objects(truth, prediction):
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape:
        raise UserError(
            f"expected two partitions of one shape, got {list(truth.shape)} and {list(prediction.shape)}; crop them alike"
        )
    return truth, prediction


def _pairs(objects, where=...):
    """How many pairs of pixels are in one object, among those that count."""
    counts = np.bincount(objects[where].ravel().astype(np.int64))
    counts = counts[1:] if where is ... else counts
    return int((counts * (counts - 1)).sum())
