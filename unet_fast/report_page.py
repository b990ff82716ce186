"""A run, or a cross-validation, as one HTML page that needs nothing beside it.

Curves, tables and pictures are all within the page; it asks no other file or host for anything, and its policy (CSP)
has the browser hold it to that. All texts that come from outside, such as files' names, are escaped by jinja2.
"""

import base64
import dataclasses
import hashlib
import importlib.resources
import io
import statistics
from pathlib import Path

import jinja2
import markupsafe
import numpy as np
from PIL import Image

from unet_fast import __version__, checkpoints, crossval, crossval_runs
from unet_fast.chart import chart
from unet_fast.config import TrainConfig, flag
from unet_fast.data.files import atomic_path
from unet_fast.errors import UserError
from unet_fast.evaluation import load_labelled
from unet_fast.inference import predict_image, training_scale
from unet_fast.report import CLASS_COLOURS, TRAINING_COLOUR, VALIDATION_COLOUR

REPORT = "report.html"
_MOST_PIXELS = 512  # a side of a picture in the page
_MOST_ROWS = 100  # of the table behind the curves
_OVERALL = {
    "dice": "Dice, mean of classes",
    "soft_dice": "soft Dice",
    "iou": "IoU, mean of classes",
    "hd95": "HD95",
    "nsd": "NSD",
    "adapted_rand_error": "adapted Rand error",
    "voi_split": "VOI split",
    "voi_merge": "VOI merge",
    "cross_entropy": "cross-entropy",
}


def write_report(path, output=None, *, data=None, images=3):
    """Write the page of a run.

    Args:
        path: folder of a run, or of a cross-validation.
        output: file to write, which must not be there yet; None for report.html in the folder, which is renewed.
        data: the run's data, if they are no longer where they were; None for there.
        images: how many of the best and how many of the worst images to show, by the mean of the classes' Dice.

    Returns:
        pathlib.Path of the file.

    Raises:
        UserError: no run there or none with results yet, or a file that cannot be written. Where only the data cannot be
            read, the page says why it has no images.

    Example:
        write_report("runs/demo")
    """
    path = Path(path)
    if images < 0:
        raise UserError(f"expected --images to be at least 0, got {images}; give such a number")
    content_of = _crossval_content if (path / checkpoints.CROSSVAL).is_file() else _run_content
    page = _render(content_of(path, data, images))
    target = Path(output) if output else path / REPORT
    with atomic_path(target, overwrite=output is None) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _render(content):
    def script_hash(script):
        digest = base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
        return f"sha256-{digest}"

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _template("report.js")
    return environment.get_template(REPORT).render(
        **content, version=__version__, script=markupsafe.Markup(script), script_hash=script_hash(script)
    )


def _template(name):
    return importlib.resources.files("unet_fast").joinpath("templates", name).read_text(encoding="utf-8")


def _run_content(path, data, images):
    config, facts = checkpoints.load_config(path)
    history, scores = checkpoints.read_history(path), _scores(path)
    if not history and not scores:
        raise UserError(f"{path}: has no results yet; train until the first evaluation")
    gallery, missing = _gallery([path], data, images)
    best = checkpoints.best_row(history)["step"] if history else (scores or {}).get("step")
    return {
        "title": path.resolve().name,
        "kind": f"fold {config.fold} of {config.folds}",
        "notes": _notes(history, scores, config) + missing,
        "tiles": _tiles({} if scores is None else scores, facts, _plain)
        + ([("best step", f"{best:,} of {config.steps:,}")] if best else []),
        "classes": _class_rows(scores, facts, _plain),
        "unit": _unit([] if scores is None else scores.get("images", [])),
        "charts": _charts(history),
        "history": _history_table(history),
        "folds": [],
        "gallery": gallery,
        "legend": _legend(facts),
        "images": _image_rows([(None, scores)]),
        "settings": _settings(config),
        "about": _about(path, facts, [history]),
    }


def _crossval_content(path, data, images):
    config = crossval_runs.load_options(path)
    if not (path / checkpoints.METRICS).is_file():
        raise UserError(
            f"{path}: this cross-validation is not finished; go on with `unet-fast crossval --out {path} --resume`, or name "
            "one of the runs in it"
        )
    result = checkpoints.read_json(path / checkpoints.METRICS)
    folders = [crossval_runs.fold_folder(path, fold) for fold in range(config.folds)]
    config, facts = checkpoints.load_config(folders[0])  # the options with all defaults filled in
    histories, scores = [checkpoints.read_history(f) for f in folders], [_scores(f) for f in folders]
    gallery, missing = _gallery(folders, data, images)
    folds = [
        {
            "number": fold,
            "samples": result["samples"][fold],
            "step": result["step"][fold],
            "scores": [_number(scores[fold].get(name)) for name in _OVERALL],
            "classes": _class_rows(scores[fold], facts, _plain),
            "charts": _charts(histories[fold]),
        }
        for fold in range(config.folds)
    ]
    return {
        "title": path.resolve().name,
        "kind": f"cross-validation, {config.folds} folds; scores are mean ± standard deviation of the folds",
        "notes": missing,
        "tiles": _tiles(result["scores"], facts, _over_folds),
        "classes": _class_rows(result["scores"], facts, _over_folds),
        "unit": "" if result["unit"] is None else result["unit"],
        "charts": _fold_charts(histories),
        "history": None,
        "folds": folds,
        "fold_columns": list(_OVERALL.values()),
        "gallery": gallery,
        "legend": _legend(facts),
        "images": _image_rows(list(enumerate(scores))),
        "settings": [(g, [row for row in rows if row["name"] != "--fold"]) for g, rows in _settings(config)],
        "about": _about(folders[-1], facts, histories),
    }


def _scores(path):
    file = path / checkpoints.METRICS
    return checkpoints.read_json(file) if file.is_file() else None


def _notes(history, scores, config):
    """What a reader has to know of a run that is not finished."""
    if scores is not None and "images" in scores:
        return []
    done = f"step {history[-1]['step']:,} of {config.steps:,}" if history else "no evaluation"
    return [f"Training has not finished: {done}. HD95, NSD and the other scores of each image follow at its end."]


def _number(value):
    return "–" if value is None else f"{value:.4f}"


def _plain(scores, name, k=None):
    """The text of a score of a run, or of its class `k`."""
    value = scores.get(name)
    return _number(value if k is None or value is None else value[k])


def _over_folds(scores, name, k=None):
    """The text of a score over folds, or of its class `k`."""
    if name not in scores:
        return _number(None)
    mean, sd = scores[name]["mean"], scores[name]["sd"]
    return crossval_runs.mean_text(mean, sd) if k is None else crossval_runs.mean_text(mean[k], sd[k])


def _tiles(scores, facts, text):
    return [(label, text(scores, name)) for name, label in _OVERALL.items() if name in scores]


def _class_rows(scores, facts, text):
    if scores is None:
        return []
    return [
        {
            "number": k,
            "value": value,
            "colour": _colour(k),
            "scores": [text(scores, f"{name}_per_class", k) for name in ("dice", "iou", "hd95", "nsd")],
        }
        for k, value in enumerate(facts.mask_values)
    ]


def _unit(images):
    units = {image["unit"] for image in images}
    return units.pop() if len(units) == 1 else ""


def _colour(k):
    return CLASS_COLOURS[k % len(CLASS_COLOURS)]


def _legend(facts):
    return [{"number": k, "value": value, "colour": _colour(k)} for k, value in enumerate(facts.mask_values)]


def _line(history, key, label, colour, dash=""):
    points = [(row["step"], row.get(key)) for row in history]
    return {"label": label, "colour": colour, "dash": dash, "points": points}


def _charts(history):
    """Loss and Dice over the steps."""
    if not history:
        return []
    best, last = checkpoints.best_row(history), history[-1]
    classes = [key for key in history[0] if key.startswith("val_dice_")][: len(CLASS_COLOURS)]
    loss = [
        _line(history, "loss", "training", TRAINING_COLOUR, "5 3"),
        _line(history, "val_loss", "validation", VALIDATION_COLOUR),
    ]
    dice = [
        _line(history, "val_dice", "mean of classes", VALIDATION_COLOUR),
        _line(history, "val_soft_dice", "soft, mean of classes", VALIDATION_COLOUR, "2 3"),
        *(_line(history, key, f"class {k}", _colour(k), "6 2") for k, key in enumerate(classes)),
    ]
    mark = (best["step"], best["val_dice"], f"best: {best['val_dice']:.4f} at step {best['step']:,}")
    charts = [
        chart(
            "Loss: cross-entropy + soft Dice loss",
            loss,
            description=f"Validation loss {history[0]['val_loss']:.4f} at step {history[0]['step']}, "
            f"{last['val_loss']:.4f} at step {last['step']}.",
        ),
        chart(
            "Dice on the validation fold",
            dice,
            description=f"Mean Dice {history[0]['val_dice']:.4f} at step {history[0]['step']}, best "
            f"{best['val_dice']:.4f} at step {best['step']}, {last['val_dice']:.4f} at step {last['step']}.",
            marker=mark,
        ),
    ]
    return [drawn for drawn in charts if drawn]


def _fold_charts(histories):
    """Validation loss and Dice of all folds."""
    charts = []
    for key, title in (("val_loss", "Validation loss of each fold"), ("val_dice", "Validation Dice of each fold")):
        lines = [_line(history, key, f"fold {k}", _colour(k)) for k, history in enumerate(histories)]
        ends = [history[-1][key] for history in histories if history]
        description = f"At the last step, from {min(ends):.4f} to {max(ends):.4f}." if ends else ""
        charts.append(chart(title, lines, description=description))
    return [drawn for drawn in charts if drawn]


def _history_table(history):
    """The numbers behind the curves."""
    if not history:
        return None
    columns = ["step", "loss", "val_loss", "val_dice", "val_soft_dice", "lr", "images_per_second"]
    columns = [name for name in columns if name in history[0]]
    stride = -(-len(history) // _MOST_ROWS)
    rows = history[::stride] + (history[-1:] if (len(history) - 1) % stride else [])

    def text(name, value):
        return "–" if value is None else f"{value:,}" if name == "step" else f"{value:.4g}"

    return {
        "columns": [name.replace("_", " ") for name in columns],
        "rows": [[text(name, row[name]) for name in columns] for row in rows],
        "total": len(history),
    }


def _image_rows(scores):
    """A row an image, the worst first: [(fold or None, scores)] of runs."""
    rows = [
        {
            "fold": fold,
            "name": image["name"],
            "dice": _image_dice(image),
            "scores": [_number(value) for value in _image_means(image)],
        }
        for fold, run in scores
        for image in (run or {}).get("images", [])
    ]
    return sorted(rows, key=lambda row: row["dice"])


def _image_dice(image):
    return statistics.fmean(image["dice_per_class"])


def _image_means(image):
    means = [statistics.fmean(image[f"{name}_per_class"]) for name in ("dice", "iou", "hd95", "nsd")]
    return means + [image[name] for name in ("adapted_rand_error", "voi_split", "voi_merge")]


def _settings(config):
    groups = {}
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        text = "yes" if value is True else "no" if value is False else "–" if value is None else f"{value}"
        row = {"name": flag(field), "value": text, "help": field.metadata["help"], "changed": value != field.default}
        groups.setdefault(field.metadata["group"], []).append(row)
    return list(groups.items())


def _about(path, facts, histories):
    """[(what, text)] of what runs were made with and on: the run in `path`, and the histories of all of them."""
    recorded = checkpoints.read_json(path / checkpoints.CONFIG)
    made = recorded.get("environment", {})
    height, width, channels = facts.image_shape
    rows = [
        ("device", made.get("device", "not recorded")),
        ("unet_fast", recorded.get("version", "not recorded")),
        ("TensorFlow", made.get("tensorflow", "not recorded")),
        ("Keras", made.get("keras", "not recorded")),
        ("Python", made.get("python", "not recorded")),
        ("images", f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}, {facts.image_dtype}"),
    ]
    seconds = sum(history[-1]["seconds"] for history in histories if history)
    speeds = [row["images_per_second"] for history in histories for row in history if row["images_per_second"]]
    if seconds:
        rows.append(("training took", _duration(seconds)))
    if speeds:
        rows.append(("training speed", f"{statistics.median(speeds):.1f} images/s"))
    return rows


def _duration(seconds):
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _gallery(folders, data, count):
    """The best and the worst validation images of runs, with pictures; and notes on why there are none.

    Returns:
        (list of (heading, list of dict an image), list of texts).
    """
    found = []
    for number, folder in enumerate(folders):
        for place, image in enumerate((_scores(folder) or {}).get("images", [])):
            found.append((_image_dice(image), number, place, image))
    found.sort(key=lambda entry: entry[0])
    if not found or not count:
        return [], []
    worst = found[: min(count, -(-len(found) // 2))]
    best = found[::-1][: min(count, len(found) - len(worst))]
    try:
        drawn = _drawn(folders, data, best + worst)
    except (UserError, OSError) as error:
        return [], [f"The images are left out: {error}"]
    groups = [("Best by Dice", best), ("Worst by Dice", worst)]
    return [(heading, [drawn[entry[1:3]] for entry in entries]) for heading, entries in groups if entries], []


def _drawn(folders, data, entries):
    """{(number of the run, place among its validation images): dict for the template}."""
    drawn, dataset, source = {}, None, None
    for number in sorted({entry[1] for entry in entries}):
        run = checkpoints.load_run(folders[number])
        if dataset is None or source != (data or run.config.data):
            source = data or run.config.data
            dataset = load_labelled(source, mask_values=run.facts.mask_values, ignore_value=run.facts.ignore_value)
            run.facts.check(dataset.images, source)
        fold = crossval.load_split(run.path / checkpoints.SPLIT, dataset.names)[run.config.fold][1]
        for _, which, place, image in entries:
            if which == number:
                drawn[number, place] = _pictures(run, dataset, int(fold[place]), image) | {
                    "fold": number if len(folders) > 1 else None
                }
    return drawn


def _pictures(run, dataset, index, image):
    pixels, truth = dataset.images[index], dataset.masks[index]
    probabilities = predict_image(run.model, pixels, value_range=run.facts.value_range, scale=training_scale(run))
    prediction = probabilities.argmax(-1)
    known = truth != run.facts.num_classes  # elsewhere pixels are ignored
    wrong = (truth != prediction) & known
    everywhere = np.ones_like(wrong)
    height, width = truth.shape
    shrink = min(1, _MOST_PIXELS / max(height, width))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    names = [f"class {k}" for k in range(run.facts.num_classes)]

    def shares(classes):
        parts = np.bincount(classes.ravel(), minlength=len(names)) / max(classes.size, 1)
        return ", ".join(f"{name} {part:.1%}" for name, part in zip(names, parts, strict=True))

    return {
        "name": dataset.names[index],
        "width": size[0],
        "height": size[1],
        "image": _jpeg(_visible(pixels), size),
        "layers": [
            ("truth", _overlay(truth, known, size), f"Truth: {shares(truth[known])} of the pixels"),
            ("prediction", _overlay(prediction, everywhere, size), f"Prediction: {shares(prediction)} of the pixels"),
            ("errors", _overlay(truth, wrong, size), f"Errors: {wrong.mean():.1%} of the pixels"),
        ],
        "wrong": f"{wrong.mean():.1%}",
        "dice": _number(_image_dice(image)),
        "dice_per_class": [_number(value) for value in image["dice_per_class"]],
    }


def _visible(pixels):
    """uint8 [H, W, C] of an image; of more than 8 bits what lies between its 0.5th and 99.5th percentile."""
    if pixels.dtype == np.uint8:
        return pixels
    low, high = np.percentile(pixels, (0.5, 99.5))
    return np.uint8(np.clip((pixels - low) / max(high - low, 1e-12), 0, 1) * 255)


def _jpeg(pixels, size):
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return _data_url(picture.resize(size, Image.Resampling.LANCZOS), "JPEG", "image/jpeg", quality=82, optimize=True)


def _overlay(classes, shown, size):
    """Class colours where `shown`, and nothing elsewhere, as a PNG with a palette."""
    colours = np.array(
        [[int(_colour(k)[i : i + 2], 16) for i in (1, 3, 5)] for k in range(classes.max() + 1)], np.uint8
    )
    rgba = np.dstack([colours[classes], np.uint8(shown) * 255])
    picture = Image.fromarray(rgba)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX)  # a thin error fades, but stays
    picture = picture.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    return _data_url(picture, "PNG", "image/png", optimize=True)


def _data_url(picture, format, kind, **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
