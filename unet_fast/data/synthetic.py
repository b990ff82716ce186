"""Synthetic electron-microscopy sections with exact labels, so that everything runs without a download.

A section is a power diagram of cells of very different sizes whose plane is warped by smooth noise. Pixels near a
border are membrane: dark where it is cut across, wide and faint where it is cut obliquely. Mitochondria and vesicles
are as dark and are no membrane: they are what a network has to learn to tell apart. Intensities follow the ISBI-2012
sections: membrane about 80, cells about 140 of 255, a fifth of the pixels membrane.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from unet_fast.errors import UserError

_RADII = ((62.0, 6), (40.0, 24), (25.0, 160), (14.0, 900))  # cell radius in pixels, darts thrown per 512 x 512 pixels
_MARGIN = 64  # cells are also placed this far outside the section, so that its edge looks like its middle
_NEIGHBOURS = 4  # cells nearest a pixel; the nearest border is almost always with one of these
_MEMBRANE = 2.3  # half the thickness of a membrane cut across, in pixels


def generate(num_images=30, size=(512, 512), seed=0):
    """Draw sections and their masks; image `i` depends on `seed`, `size` and `i` alone.

    Args:
        num_images: how many sections, at least 1.
        size: `(height, width)` in pixels, each at least 2.
        seed: non-negative integer; equal seeds give equal bytes.

    Returns:
        `(images, masks)`: uint8 `[N, H, W, 1]`, and uint8 `[N, H, W]` with 0 for membrane and 1 for cell.

    Raises:
        UserError: an argument is out of range.

    Example:

    >>> from unet_fast.data import generate
    >>> images, masks = generate(2, size=(64, 96), seed=7)
    >>> images.shape, images.dtype, masks.shape, sorted(set(masks.ravel().tolist()))
    ((2, 64, 96, 1), dtype('uint8'), (2, 64, 96), [0, 1])
    """
    height, width = size
    if num_images < 1 or height < 2 or width < 2 or seed < 0:
        raise UserError(
            f"expected at least 1 image of at least 2 x 2 pixels and a seed of at least 0, got {num_images} images of "
            f"{height} x {width} and seed {seed}"
        )
    images = np.empty((num_images, height, width, 1), np.uint8)
    masks = np.empty((num_images, height, width), np.uint8)
    for i in range(num_images):
        # Not default_rng: NumPy freezes the streams of RandomState alone, so that a seed names the same data for good.
        rng = np.random.RandomState([seed, i])
        images[i, ..., 0], masks[i] = _section(rng, height, width)
    return images, masks


def _section(rng, height, width):
    """One section: uint8 `[H, W]` image and mask."""
    sites, radii = _scatter_cells(rng, height, width)
    cell, distance = _tessellate(rng, sites, radii, height, width)

    # Rare peaks of `spread` stand for membranes cut obliquely and for synapses: several times as thick, and fuzzy.
    spread = np.exp(1.1 * np.clip(_smooth_noise(rng, height, width, 45) - 1.1, 0, 1.3))
    thickness = _MEMBRANE * spread * (1 + 0.12 * _smooth_noise(rng, height, width, 12))
    mask = (distance > thickness).astype(np.uint8)

    image = 153 + rng.normal(0, 9, len(sites))[cell]  # each cell has its own grey
    image += 5 * _smooth_noise(rng, height, width, 60)
    image += 17 * _grain(rng, height, width, 1.6) + 11 * _grain(rng, height, width, 4.5)
    faint = 1 - 0.28 * np.clip(_smooth_noise(rng, height, width, 30), 0, 2)
    depth = 94 * faint * np.exp(-((distance / (1.35 * thickness)) ** 4))
    _add_vesicles(rng, image, distance)
    _add_mitochondria(rng, image, distance, sites, radii)
    image -= depth

    image = ndimage.gaussian_filter(image, 0.9) + rng.normal(0, 25, image.shape)
    image = ndimage.gaussian_filter(image, 0.5)
    contrast, brightness = rng.uniform(0.9, 1.1), rng.uniform(-8, 8)  # sections differ in both
    image = (image - 128) * contrast + 128 + brightness
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), mask


def _smooth_noise(rng, height, width, scale):
    """Smooth noise `[H, W]` of about unit variance whose features are `scale` pixels wide: a random cubic B-spline."""
    grid = rng.normal(0, 2.1, (int(height / scale) + 4, int(width / scale) + 4))
    return _interpolate(_interpolate(grid, height, scale).T, width, scale).T


def _interpolate(knots, length, scale):
    """Cubic B-spline through `knots [K, M]`, `scale` pixels apart, at `length` pixels along axis 0: `[length, M]`."""
    position = np.arange(length)[:, None] / scale
    first = position.astype(int)
    t = position - first
    weights = (1 - t) ** 3 / 6, 2 / 3 - t**2 + t**3 / 2, 2 / 3 - (1 - t) ** 2 + (1 - t) ** 3 / 2, t**3 / 6
    # A sum of four products a pixel rather than a matrix product, whose bits depend on the BLAS and its threads.
    return sum(weight * knots[first[:, 0] + k] for k, weight in enumerate(weights))


def _grain(rng, height, width, sigma):
    """Granular noise `[H, W]` of unit variance: white noise blurred by `sigma` pixels."""
    return 2 * np.sqrt(np.pi) * sigma * ndimage.gaussian_filter(rng.normal(0, 1, (height, width)), sigma, mode="wrap")


def _scatter_cells(rng, height, width):
    """Throw darts, large cells first; a dart that would overlap an earlier cell is lost.

    Returns float64 `sites [M, 2]` as (y, x) in pixels and `radii [M]`.
    """
    area = (height + 2 * _MARGIN) * (width + 2 * _MARGIN)
    sites, radii = np.empty((0, 2)), np.empty(0)
    for radius, darts in _RADII:
        darts = max(1, round(darts * area / 512**2))
        for site in rng.uniform(-_MARGIN, [height + _MARGIN, width + _MARGIN], (darts, 2)):
            gap = 0.82 * (radius + radii)
            if (((sites - site) ** 2).sum(1) >= gap**2).all():
                sites, radii = np.vstack([sites, site]), np.append(radii, radius)
    return sites, radii


def _tessellate(rng, sites, radii, height, width):
    """Cell index int `[H, W]` and distance to the nearest border float64 `[H, W]`, in pixels.

    A power diagram is a Voronoi diagram one dimension up: lifting each site by sqrt(R^2 - r^2) makes the squared
    distance d^2 - r^2 up to a constant, so a k-d tree answers it. Distances are found at half resolution: they are
    smooth enough.
    """
    lifted = np.column_stack([sites, np.sqrt(radii.max() ** 2 - radii**2)])
    rows, columns = (height + 3) // 2, (width + 3) // 2
    points = np.zeros((rows, columns, 3))
    points[..., :2] = np.moveaxis(np.indices((rows, columns)) * 2.0, 0, -1)
    for axis in range(2):
        points[..., axis] += 11 * _smooth_noise(rng, rows, columns, 20) + 1.8 * _smooth_noise(rng, rows, columns, 5)
    squared, nearest = cKDTree(lifted).query(points.reshape(-1, 3), k=min(_NEIGHBOURS, len(sites)))
    squared **= 2
    own, others = sites[nearest[:, :1]], sites[nearest[:, 1:]]
    to_bisector = (squared[:, 1:] - squared[:, :1]) / (2 * np.linalg.norm(others - own, axis=2))
    distance = to_bisector.min(1).reshape(rows, columns)
    # The warp stretches the plane; dividing by the slope makes the distance one in pixels of the section again.
    distance /= np.clip(np.hypot(_slope(distance, 0), _slope(distance, 1)) / 2, 0.5, 2)
    cell = nearest[:, 0].reshape(rows, columns).repeat(2, 0).repeat(2, 1)[:height, :width]
    return cell, _double(_double(distance, 0), 1)[:height, :width]


def _slope(field, axis):
    """The steeper of the one-sided slopes along `axis`; at a border, where a distance has a crease, their mean is 0."""
    step = np.abs(np.diff(field, axis=axis))
    first, last = np.take(step, [0], axis), np.take(step, [-1], axis)
    return np.maximum(np.concatenate([first, step], axis), np.concatenate([step, last], axis))


def _double(field, axis):
    """Twice the samples along `axis`, linearly between: 2n - 1 of them."""
    field = np.moveaxis(field, axis, 0)
    out = np.empty((2 * len(field) - 1, *field.shape[1:]))
    out[::2] = field
    out[1::2] = (field[1:] + field[:-1]) / 2
    return np.moveaxis(out, 0, axis)


def _window(shape, centre, reach):
    """Slices of the square of half-width `reach` round `centre`, and the pixels' offsets from it; None if outside."""
    low = np.maximum(np.floor(centre - reach).astype(int), 0)
    high = np.minimum(np.ceil(centre + reach).astype(int) + 1, shape)
    if (low >= high).any():
        return None
    y, x = np.ogrid[low[0] : high[0], low[1] : high[1]]
    return (slice(low[0], high[0]), slice(low[1], high[1])), y - centre[0], x - centre[1]


def _add_vesicles(rng, image, distance):
    """Small dark rings, well inside cells."""
    count = rng.poisson(max(1.0, 420 * image.size / 512**2))
    for centre in rng.uniform(0, image.shape, (count, 2)):
        radius, darkness = rng.uniform(2.5, 5), rng.uniform(30, 80)
        if distance[tuple(centre.astype(int))] < radius + 4:
            continue
        where, y, x = _window(image.shape, centre, radius + 3)
        image[where] -= darkness * np.exp(-(((np.hypot(y, x) - radius) / 1.1) ** 2))


def _add_mitochondria(rng, image, distance, sites, radii):
    """Dark ellipses with a darker rim and wavy cristae, in some of the larger cells."""
    for site, cell_radius in zip(sites, radii, strict=True):
        if cell_radius < 20 or rng.uniform() > 0.45:
            continue
        long = cell_radius * rng.uniform(0.35, 0.6)
        short = long * rng.uniform(0.5, 0.85)
        centre = site + rng.uniform(-0.25, 0.25, 2) * cell_radius
        angle, phase, darkness = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(40, 75)
        window = _window(image.shape, centre, 1.3 * long + 6)
        if window is None:
            continue
        where, y, x = window
        u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        inside = (1 - np.hypot(u / long, v / short)) * short  # about the distance to the rim in pixels, positive inside
        inside = np.minimum(inside, distance[where] - 5)  # the cell's membrane bounds it
        body = 1 / (1 + np.exp(-2 * inside))
        cristae = 0.5 + 0.5 * np.sin(1.15 * v + 2.2 * np.sin(0.13 * u + phase) + phase)
        rim = np.exp(-((inside / 1.5) ** 2))
        image[where] -= body * (darkness * 0.75 + 38 * cristae) + 28 * rim
