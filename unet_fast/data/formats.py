"""The image formats: which suffix is read and written by what."""

from unet_fast.data.nifti import nifti_writer, open_nifti
from unet_fast.data.png import open_png, png_writer
from unet_fast.data.stack import suffix_of
from unet_fast.data.tiff import open_tiff, tiff_writer
from unet_fast.errors import UserError

TIFF, PNG, NIFTI = (".tif", ".tiff"), (".png",), (".nii", ".nii.gz")
SUFFIXES = TIFF + PNG + NIFTI
NAMES = "TIFF, PNG or NIfTI"


def open_stack(path, *, labels=False):
    """Open an image file of any known format without reading its pixels.

    Args:
        path: TIFF (.tif, .tiff), PNG (.png) or NIfTI (.nii, .nii.gz) file; pages, or a volume's slices, are its images.
        labels: the file holds a mask: a palette gives its indices, and whole numbers of any type are taken.

    Returns:
        unet_fast.data.stack.Stack.

    Raises:
        UserError: the file is missing, of another format, damaged or cut short, or holds what is no image.

    >>> import tempfile, numpy as np
    >>> from unet_fast.data import open_stack, write_tiff
    >>> path = tempfile.mkdtemp() + "/stack.tif"
    >>> write_tiff(path, np.arange(24, dtype=np.uint16).reshape(2, 3, 4))
    >>> stack = open_stack(path)
    >>> stack.shape, stack.rows(1, 0, 2)[..., 0].tolist()
    ((2, 3, 4, 1), [[12, 13, 14, 15], [16, 17, 18, 19]])
    """
    suffix = suffix_of(path)
    if suffix in TIFF:
        return open_tiff(path)
    if suffix in PNG:
        return open_png(path, indexed=labels)
    if suffix in NIFTI:
        return open_nifti(path, labels=labels)
    raise UserError(f"{path}: expected a {NAMES} file, got {suffix or 'no suffix'}; convert it")


def stack_writer(path, shape, dtype, *, like):
    """A file that is filled in rows at a time, and appears when the block ends, whole or not at all.

    Args:
        path: file to write, which must not be there yet; its suffix says the format.
        shape: (N, H, W), or (N, H, W, K) for K channels, which PNG has not.
        dtype: uint8, uint16 or, but for PNG, float32.
        like: `Stack` whose place in the world the file gets: the affine and the zooms, or the resolution.

    Returns:
        context manager that gives an object with `write(page, start, rows)`: rows [n, W] or [n, W, K] from row `start`
        of a page on.

    >>> import tempfile, numpy as np
    >>> from unet_fast.data import open_stack, write_tiff
    >>> from unet_fast.data.formats import stack_writer
    >>> folder = tempfile.mkdtemp()
    >>> write_tiff(folder + "/a.tif", np.zeros((1, 3, 2), np.uint8))
    >>> with stack_writer(folder + "/b.tif", (1, 3, 2), np.uint8, like=open_stack(folder + "/a.tif")) as writer:
    ...     writer.write(0, 1, np.array([[5, 6], [7, 8]]))
    >>> open_stack(folder + "/b.tif").page(0)[..., 0].tolist()
    [[0, 0], [5, 6], [7, 8]]
    """
    suffix = suffix_of(path)
    if suffix in PNG:
        return png_writer(path, shape, dtype)
    if suffix in NIFTI:
        return nifti_writer(path, shape, dtype, like=like)
    return tiff_writer(path, shape, dtype, resolution=getattr(like, "resolution", None))
