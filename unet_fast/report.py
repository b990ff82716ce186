"""Pictures of a run: the course of its training, and what its model sees."""

import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import numpy as np

from unet_fast.data.files import atomic_path

TRAINING_COLOUR, VALIDATION_COLOUR = "#6c757d", "#0b6e99"
CLASS_COLOURS = (
    "#d1495b",
    "#2a9d8f",
    "#edae49",
    "#5e60ce",
    "#8d6a9f",
    "#b56576",
    "#457b9d",
    "#bc6c25",
    "#606c38",
    "#3d405b",
)


def curves(history, path):
    """Draw loss and Dice over the steps.

    Args:
        history: rows of `unet_fast.checkpoints.read_history`, at least one.
        path: PNG file to write; one that is there is replaced.

    >>> import tempfile
    >>> from unet_fast.report import curves
    >>> row = {"step": 100, "loss": 0.9, "val_loss": 0.8, "val_dice": 0.7, "val_soft_dice": 0.6, "val_dice_0": 0.7}
    >>> curves([row, {**row, "step": 200}], tempfile.mkdtemp() + "/curves.png")
    """
    steps = [row["step"] for row in history]
    classes = [key for key in history[0] if key.startswith("val_dice_")]
    best = max(history, key=lambda row: row["val_dice"])
    figure = matplotlib.figure.Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    loss, dice = figure.subplots(1, 2)
    marker = {"marker": "o", "markersize": 3} if len(steps) < 50 else {}

    def line(axes, key, **style):
        axes.plot(steps, [np.nan if row[key] is None else row[key] for row in history], **marker, **style)

    line(loss, "loss", color=TRAINING_COLOUR, label="training")
    line(loss, "val_loss", color=VALIDATION_COLOUR, label="validation")
    loss.set(title="Cross-entropy + soft Dice loss", xlabel="step")
    line(dice, "val_dice", color=VALIDATION_COLOUR, linewidth=2, label="mean of classes")
    line(dice, "val_soft_dice", color=VALIDATION_COLOUR, linestyle=":", label="soft, mean of classes")
    for k, key in enumerate(classes):
        line(dice, key, color=CLASS_COLOURS[k % len(CLASS_COLOURS)], linewidth=1, label=f"class {k}")
    dice.plot(
        best["step"],
        best["val_dice"],
        "*",
        color=VALIDATION_COLOUR,
        markersize=13,
        label=f"best: {best['val_dice']:.4f}",
    )
    dice.set(title="Dice on the validation fold", xlabel="step", ylim=(None, 1))
    for axes in (loss, dice):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def overlays(samples, path):
    """Draw images beside their true and predicted classes, and where the two differ.

    Args:
        samples: list of (name, image, truth, prediction): float32 [Hi, Wi, C] in [-1, 1], the network's input, and class
            indices [H, W] of its middle. What is masked in truth, a numpy.ma.MaskedArray, is left out.
        path: PNG file to write; one that is there is replaced.

    >>> import tempfile
    >>> from unet_fast.report import overlays
    >>> truth = np.eye(8, dtype=int)
    >>> overlays([("cell", truth[..., None] - 0.5, truth, truth[::-1])], tempfile.mkdtemp() + "/overlays.png")
    """
    present = sorted(
        set().union(*(np.unique(np.ma.compressed(mask)).tolist() for _, _, *masks in samples for mask in masks))
    )
    # A class has the colour of its number, whatever others are there.
    colours = matplotlib.colors.ListedColormap([CLASS_COLOURS[k % len(CLASS_COLOURS)] for k in range(present[-1] + 1)])
    style = {"cmap": colours, "vmin": -0.5, "vmax": present[-1] + 0.5, "interpolation": "nearest"}
    figure = matplotlib.figure.Figure(figsize=(11, 2.75 * len(samples) + 0.6), dpi=120, layout="constrained")
    grid = figure.subplots(len(samples), 4, squeeze=False)
    for row, (name, image, truth, prediction) in zip(grid, samples, strict=True):
        shown = (np.clip(_middle(image, truth.shape), -1, 1) + 1) / 2
        shown = np.repeat(shown[..., :1], 3, -1) if shown.shape[-1] != 3 else shown
        wrong = np.ma.filled(truth != prediction, False)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].imshow(shown)
        # A file's name may hold anything, also what matplotlib takes for a formula, or bytes that are no text.
        row[0].set_ylabel(name.encode(errors="replace").decode(), fontsize=8, parse_math=False)
        row[1].imshow(truth, **style)
        row[2].imshow(prediction, **style)
        row[3].imshow(shown)
        row[3].imshow(np.ma.masked_where(~wrong, truth), alpha=0.8, **style)
        row[3].set_xlabel(f"{wrong.mean():.1%} of the pixels", fontsize=8)
    for axes, title in zip(grid[0], ("image", "truth", "prediction", "errors, coloured by the truth"), strict=True):
        axes.set_title(title, fontsize=10)
    handles = [matplotlib.patches.Patch(color=colours(k), label=f"class {k}") for k in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False, fontsize=9)
    _save(figure, path)


def _middle(image, shape):
    top, left = ((outer - inner) // 2 for outer, inner in zip(image.shape, shape, strict=False))
    return image[top : top + shape[0], left : left + shape[1]]


def _save(figure, path):
    with atomic_path(path, overwrite=True) as temporary:
        figure.savefig(temporary, format="png")
