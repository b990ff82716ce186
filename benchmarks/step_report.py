"""The rows of step.py as Markdown tables and as a picture."""

PHASES = {"train": "training", "infer": "prediction"}
OURS = "unet_fast"
_COLUMNS = {  # title: (key of the row, format)
    "ms": ("ms", ".2f"),
    "images/s": ("img_s", ".0f"),
    "mean": ("mean", ".2f"),
    "p50": ("p50", ".2f"),
    "p90": ("p90", ".2f"),
    "p95": ("p95", ".2f"),
    "p99": ("p99", ".2f"),
    "peak MiB": ("peak_mib", "d"),
    "first step, s": ("first_step_s", ".1f"),
}


def _ratio(row, ours):
    """How many times as fast ours is, as text."""
    return "" if ours is None else f"{row['ms'] / ours['ms']:.2f}"


def _of(rows, phase, batch):
    """The rows of a phase and a batch, and ours among them or None."""
    chosen = [row for row in rows if (row["phase"], row["batch"]) == (phase, batch)]
    return chosen, next((row for row in chosen if row["system"] == OURS), None)


def _batches(rows):
    return sorted({row["batch"] for row in rows})


def environment(run):
    """Driver and versions of a run as text; packages that it lacked are left out.

    >>> environment({"driver": "570.1", "versions": {"keras": "3.15", "torch": None}})
    'driver 570.1, keras 3.15'
    """
    used = (f"{name} {version}" for name, version in run["versions"].items() if version)
    return ", ".join([f"driver {run['driver']}", *used])


def markdown(result):
    """Tables of a result, one a phase; `ratio` is how many times as fast as that row unet_fast is.

    Args:
        result: dict as step.py writes it.

    Returns:
        str.

    >>> row = {"phase": "train", "batch": 8, "p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 1.0, "mean": 1.0}
    >>> row |= {"img_s": 10, "peak_mib": 1, "first_step_s": 1, "run": 1}
    >>> rows = [row | {"system": "unet_fast", "ms": 10.0}, row | {"system": "peer", "ms": 15.0}]
    >>> runs = [{"driver": "1", "versions": {}}]
    >>> result = {"card": "a card", "fingerprint": "0", "runs": runs, "rows": rows}
    >>> print(markdown(result).splitlines()[-1])
    | peer | 8 | 15.00 | 1.50 | 10 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1 | 1.0 |
    """
    titles = ["system", "batch", "ms", "ratio", *list(_COLUMNS)[1:]]
    environments = dict.fromkeys(environment(result["runs"][row["run"] - 1]) for row in result["rows"])
    calls = len({row["run"] for row in result["rows"]})
    lines = ["; ".join([result["card"], *environments, f"{calls} runs" if calls > 1 else "one run"])]
    for phase, title in PHASES.items():
        table = []
        for batch in _batches(result["rows"]):
            rows, ours = _of(result["rows"], phase, batch)
            for row in rows:
                cells = [format(row[key], form) for key, form in _COLUMNS.values()]
                cells = [row["system"], str(batch), cells[0], _ratio(row, ours), *cells[1:]]
                table.append(f"| {' | '.join(cells)} |")
        if table:
            lines += ["", f"A step of {title}:", "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *table]
    return "\n".join(lines)


def plot(result, path):
    """Draws images a second of every system, a field for each phase and batch.

    Args:
        result: dict as step.py writes it.
        path: of the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    batches, phases = _batches(rows), [phase for phase in PHASES if any(row["phase"] == phase for row in rows)]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    figure, fields = plt.subplots(
        len(phases),
        len(batches),
        figsize=(2.4 + 3.6 * len(batches), 0.9 + (0.7 + 0.3 * len(systems)) * len(phases)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for line, phase in zip(fields, phases, strict=True):
        for field, batch in zip(line, batches, strict=True):
            chosen, ours = _of(rows, phase, batch)
            places = [systems.index(row["system"]) for row in chosen]
            colors = ["#c8501e" if row["system"].startswith(OURS) else "#7d8fa3" for row in chosen]
            bars = field.barh(places, [row["img_s"] for row in chosen], color=colors)
            labels = [f"{row['img_s']:.0f}" + (f"  ({_ratio(row, ours)}x)" if ours else "") for row in chosen]
            labels = [f"{row['img_s']:.0f}" if row is ours else text for row, text in zip(chosen, labels, strict=True)]
            field.bar_label(bars, labels, padding=3, fontsize=8)
            field.set_title(f"{PHASES[phase]}, batch {batch}", fontsize=10)
            field.set_yticks(range(len(systems)), systems, fontsize=9)
            field.tick_params(axis="x", labelsize=8)
            field.margins(x=0.28)  # room for the figures beside the bars
            field.spines[["top", "right"]].set_visible(False)
            if line is fields[-1]:
                field.set_xlabel("images/s", fontsize=9)
    fields[0, 0].invert_yaxis()
    figure.suptitle(
        f"U-Net, 572x572 to 388x388, {result['card']}\nin brackets: how many times as fast unet_fast is", fontsize=11
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
