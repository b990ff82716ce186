"""What a training shows on the terminal."""

import contextlib
import math

import rich.progress


@contextlib.contextmanager
def bar(console, steps, step, hidden=False):
    """Yields show(step, loss, images a second or None), which moves a progress bar if there is a terminal to draw on.

    Args:
        console: rich.console.Console.
        steps, step: of the training, in all and done at its start.
        hidden: draw nothing.
    """
    columns = (
        rich.progress.TextColumn("step {task.completed}/{task.total}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("loss {task.fields[loss]}"),
        rich.progress.TextColumn("{task.fields[speed]}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(
        *columns, console=console, disable=hidden or not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("", total=steps, completed=step, loss="-", speed="")

        def show(step, loss, speed):
            text = "" if speed is None else f"{speed:.1f} images/s"
            progress.update(task, completed=step, loss=f"{loss:.4f}", speed=text)

        yield show


def row_text(row, steps, is_best):
    """A line of the history as people read it, with a star where it is the best so far."""
    classes = [row[key] for key in row if key.startswith("val_dice_")]
    parts = [
        f"step {row['step']}/{steps}",
        f"loss {math.nan if row['loss'] is None else row['loss']:.4f}",
        f"val loss {row['val_loss']:.4f}",
        f"Dice {row['val_dice']:.4f} ({', '.join(f'{dice:.4f}' for dice in classes)})",
    ]
    if row["loss_scale"] is not None:
        parts.append(f"loss scale {row['loss_scale']:g}, {row['skipped_steps']} skipped")
    if row["images_per_second"] is not None:
        parts.append(f"{row['images_per_second']:.1f} images/s")
    return "  ".join(parts) + ("  *" if is_best else "")
