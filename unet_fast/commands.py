"""What the commands of `unet-fast` do, each with the arguments that `unet_fast.cli` has parsed."""

from unet_fast.config import TrainConfig, read_options
from unet_fast.errors import UserError

TUNED = ("size", "filters", "depth", "padding", "upsampling")  # of TrainConfig: what a network's products depend on


def train(options):
    from unet_fast import checkpoints, distribution, training

    given, out = _given(options, "train", "RUN")
    hosts, index = given.pop("hosts", None), given.pop("host_index", None)
    join_seconds = given.pop("join_timeout", distribution.JOIN_SECONDS)
    cluster = distribution.Cluster.of(hosts and hosts.split(","), index, join_seconds=join_seconds)
    config = checkpoints.load_config(out)[0].resumed(given) if options.resume else TrainConfig(**given)
    scores = training.train(config, out, resume=options.resume, cluster=cluster)
    if scores is None:  # the first host has them
        return
    _print_scores(scores, f"{out}/{checkpoints.MODEL}, of step {scores['step']}, on validation fold {scores['fold']}")


def crossval(options):
    import rich.console

    from unet_fast import crossval_runs

    given, out = _given(options, "crossval", "OUT")
    given.pop("fold", None)  # of a run's own config
    config = crossval_runs.load_options(out).resumed(given) if options.resume else TrainConfig(**given)
    result = crossval_runs.cross_validate(config, out, resume=options.resume)
    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
    crossval_runs.show(result, f"{out}, {config.folds} folds: mean ± standard deviation", console)


def _given(options, command, metavar):
    """The options of a training from the config file and the command line, and the folder to write."""
    given = read_options(options.config, extra=("out",)) if options.config else {}
    given |= {key: value for key, value in vars(options).items() if key not in ("command", "config", "resume")}
    out = given.pop("out", None)
    if not isinstance(out, str):
        raise UserError(f"{command}: expected --out {metavar}, the folder to write; give it")
    if "data" not in given and not options.resume:
        raise UserError(f"{command}: expected --data, a data folder or the word synthetic; give it")
    return given, out


def evaluate(options):
    from unet_fast import evaluation

    scores = evaluation.evaluate_run(options.run, options.data, tolerance=options.tolerance)
    if options.json:
        _print_json(scores)
    else:
        what = options.data or f"validation fold {scores['fold']}"
        _print_scores(scores, f"{options.run}, {what}, {scores['samples']} images", each=True)


def _print_scores(scores, title, each=False):
    """Prints a table of the classes and, with `each`, one of the images."""
    import rich.console
    import rich.table

    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)

    def show(headings, rows, last=None):
        table = rich.table.Table()
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i else "left", overflow="fold")  # a name is not cut
        for row in rows:
            table.add_row(*row)
        if last:
            table.add_section()
            table.add_row(*last)
        console.print(table)

    def numbers(values):
        return ["-" if value is None else f"{value:.4f}" for value in values]

    def mean(values):
        return sum(values) / len(values)

    images = scores["images"]
    units = {image["unit"] for image in images}
    unit = f" ({units.pop()})" if len(units) == 1 else ""
    measures = ("dice", "iou", "hd95", "nsd")
    columns = list(zip(*(scores[f"{name}_per_class"] for name in measures), strict=True))
    console.print(title)
    show(
        ("class", "Dice", "IoU", f"HD95{unit}", "NSD"),
        [[str(k), *numbers(values)] for k, values in enumerate(columns)],
        ["mean", *numbers(scores[name] for name in measures)],
    )
    objects = ("adapted_rand_error", "voi_split", "voi_merge")
    error, split, merge = numbers(scores[name] for name in objects)
    console.print(f"cross-entropy {scores['cross_entropy']:.4f}, soft Dice {scores['soft_dice']:.4f}")
    console.print(f"adapted Rand error {error}, VOI split {split}, VOI merge {merge}")
    if each:
        show(
            ("image", "Dice", "IoU", f"HD95{unit}", "NSD", "Rand error", "VOI split", "VOI merge"),
            [
                [
                    image["name"],
                    *numbers([mean(image[f"{name}_per_class"]) for name in measures]),
                    *numbers([image[name] for name in objects]),
                ]
                for image in images
            ],
        )


def _print_json(content):
    import json

    print(json.dumps(content, indent=1, allow_nan=False))


def predict(options):
    import rich.console
    import rich.progress

    from unet_fast import checkpoints, inference

    runs = checkpoints.load_runs(options.run)
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("predicting", total=None)
        written = inference.predict_files(
            runs,
            options.input,
            options.output,
            tile=options.tile,
            overlap=options.overlap,
            tta=options.tta,
            probabilities=options.probabilities,
            on_start=lambda files: progress.update(task, total=files),
            on_progress=lambda done: progress.update(task, completed=done),
        )
    print(f"wrote {written[0]}" if len(written) == 1 else f"wrote {len(written)} files to {options.output}")


def tune(options):
    import rich.console
    import tensorflow as tf

    from unet_fast import _native, checkpoints, tuning
    from unet_fast.models import FusedUNet

    tf.config.set_visible_devices([], "GPU")  # whose memory TensorFlow would take, all of it
    given = {name: getattr(options, name) for name in TUNED if getattr(options, name) is not None}
    if options.run and given:
        raise UserError(
            f"tune: expected --run or options of a network, got both (--{next(iter(given))}); leave one out"
        )
    if min(options.batch) < 1:
        raise UserError(f"tune: expected --batch of at least 1, got {min(options.batch)}")
    precision = options.precision
    if options.run:
        config = checkpoints.load_config(options.run)[0]
        if precision is None and config.precision == "float32":
            raise UserError(f"tune: {options.run} is in float32, which runs on stock TensorFlow; give --precision")
        precision = precision or config.precision
        given = {name: getattr(config, name) for name in TUNED}
    size = given.pop("size", 572)
    model = FusedUNet((size, size, 1), backend="fused", **given)
    dtype = (precision or "mixed_float16").removeprefix("mixed_")
    rows = tuning.tune(model, options.batch, dtype, rich.console.Console(quiet=True) if options.json else None)
    if options.json:
        card = _native.gpu_devices()[0][0]["name"]
        _print_json({"card": card, "fingerprint": _native.fingerprint, "dtype": dtype, "products": rows})


def report(options):
    from unet_fast import report_page

    written = report_page.write_report(options.run, options.output, data=options.data, images=options.images)
    print(f"wrote {written}")


def export(options):
    from unet_fast import export

    done = export.export_run(options.run, options.format, options.output, precision=options.precision)
    facts = done.facts
    low, high = (f"{value:g}" for value in facts.value_range)
    print(f"wrote {done.path}, which computes in {facts.precision}")
    print(
        f"input {export.INPUT}: float32 [batch, height, width, {facts.channels}], pixel values as in the training's "
        f"{facts.image_dtype} images ({low} to {high}); height and width {facts.sizes}"
    )
    if facts.scale != (1.0, 1.0):
        print(f"resize images by {facts.scale[0]:g} (height) and {facts.scale[1]:g} (width) before, as training did")
    smaller = f", {facts.margin} pixels smaller on each side" if facts.margin else ""
    values = ", ".join(map(str, facts.mask_values))
    print(
        f"output {export.OUTPUT}: float32 [batch, height, width, {len(facts.mask_values)}]{smaller}; the classes are "
        f"{values} in the training's masks"
    )
    for size, difference in done.differences.items():
        print(f"largest difference from the run's model, {size}: {difference:.1e}")


def import_checkpoint(options):
    from unet_fast import migration

    try:
        values = options.mask_values and tuple(map(int, options.mask_values.split(",")))
    except ValueError as error:
        raise UserError(
            f"expected --mask-values to be whole numbers with commas between, got {options.mask_values!r}; correct it"
        ) from error
    names = ("data", "split", "fold", "padding", "size", "precision", "image_dtype", "value_range")
    arguments = {name: getattr(options, name) for name in names}
    done = migration.import_checkpoint(
        options.path, options.out, image_size=tuple(options.image_size), mask_values=values, **arguments
    )
    model = done.model
    print(f"{done.kind}: took {done.variables} variables, left {done.skipped} of the optimizer and the like")
    print(
        f"{model.count_params():,} parameters: filters {model.filters}, depth {model.depth}, padding {model.padding}, "
        f"{model.upsampling}, {model.num_classes} classes; input {model.input_shape[1]}, output {model.output_shape[1]}"
    )
    if done.difference is not None:
        print(f"largest difference from the file's own model, on a random image: {done.difference:.1e}")
    print(f"wrote {options.out}")


def info(options):
    from unet_fast import info

    if options.batch < 1:
        raise UserError(f"expected --batch of at least 1, got {options.batch}")
    collected = info.collect(layers_batch=options.batch if options.layers else None)
    if options.json:
        _print_json(collected)
    else:
        info.show(collected)
    return 0 if collected["self_test_passed"] else 1
