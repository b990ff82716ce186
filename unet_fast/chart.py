"""Line charts as numbers that a template draws as SVG: where its lines, ticks and texts are."""

import math

import matplotlib.ticker

WIDTH, HEIGHT = 420, 250  # of the drawing, so that its texts can be read where it is as wide as a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 36
_MOST_POINTS = 400  # of a line; more could not be told apart


def chart(title, lines, *, description, marker=None, top=None):
    """A chart of values over training steps.

    Args:
        title: text above it.
        lines: list of dict: `label`, `colour` (CSS), `dash` (SVG's stroke-dasharray, or ""), and `points`, a list of
            (step, value), where a value may be None or not finite, and the line is then broken.
        description: what the chart shows, for those who do not see it.
        marker: (step, value, label) of a point to mark, or None.
        top: end of the value axis, or None for that of the values.

    Returns:
        dict for the template, or None where there is no point to draw.

    >>> from unet_fast.chart import chart
    >>> line = {"label": "loss", "colour": "red", "dash": "", "points": [(0, 1.0), (10, 0.5)]}
    >>> drawn = chart("Loss", [line], description="falls")
    >>> drawn["lines"][0]["path"], [tick["text"] for tick in drawn["y_ticks"]]
    ('M46.0,10.0 L408.0,214.0', ['0.5', '0.6', '0.7', '0.8', '0.9', '1'])
    """
    points = [(x, y) for line in lines for x, y in line["points"] if _is_number(y)]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    x_ticks = _ticks(min(xs), max(xs), 4)
    y_ticks = _ticks(min(ys), max(ys) if top is None else top, 5)
    x_ends = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    y_ends = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x, y):
        return (
            _LEFT + (x - x_ends[0]) / (x_ends[1] - x_ends[0]) * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - (y - y_ends[0]) / (y_ends[1] - y_ends[0]) * (HEIGHT - _TOP - _BOTTOM),
        )

    drawn = []
    for line in lines:
        kept = [(x, y) for x, y in _thinned(line["points"])]
        numbers = [place(x, y) for x, y in kept if _is_number(y)]
        about = {key: line[key] for key in ("label", "colour", "dash")}
        drawn.append(about | {"path": _path(kept, place), "dots": numbers if len(numbers) <= 30 else []})
    if marker:
        x, y = place(*marker[:2])
        marker = {"x": x, "y": y, "label": marker[2]}
    return {
        "title": title,
        "description": description,
        "width": WIDTH,
        "height": HEIGHT,
        "left": _LEFT,
        "right": WIDTH - _RIGHT,
        "bottom": HEIGHT - _BOTTOM,
        "x_ticks": [{"x": place(x, 0)[0], "text": f"{x:,.0f}"} for x in x_ticks if x_ends[0] <= x <= x_ends[1]],
        "y_ticks": [{"y": place(0, y)[1], "text": f"{y:g}"} for y in y_ticks if y_ends[0] <= y <= y_ends[1]],
        "lines": drawn,
        "marker": marker,
    }


def _is_number(value):
    return value is not None and math.isfinite(value)


def _ticks(low, high, count):
    """Round numbers from at most `low` to at least `high`."""
    if low == high:
        low, high = low - abs(low) / 10 - 1e-3, high + abs(high) / 10 + 1e-3
    return [
        round(float(tick), 10)
        for tick in matplotlib.ticker.MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(low, high)
    ]


def _thinned(points):
    """Every n-th point, and the last one."""
    stride = -(-len(points) // _MOST_POINTS)
    return points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])


def _path(points, place):
    parts, pen = [], "M"
    for x, y in points:
        if not _is_number(y):
            pen = "M"
            continue
        parts.append("{}{:.1f},{:.1f}".format(pen, *place(x, y)))
        pen = "L"
    return " ".join(parts)
