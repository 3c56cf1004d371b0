"""Plots: lines from points, one picture or several side by side, written to a file.

Matplotlib is an optional dependency (`pip install 'stocha_hf[plot]'`), imported when a plot is asked for. figures.py
says what a measurement looks like.

    plot_lines(Path("out.png"), {"docs": {"refit": [(80, 16.4), (90, 21.0)]}}, x="zeros, %", y="perplexity")
    plot(Path("out.png"), [Picture("docs", {"refit": [(80, 16.4)]}, "zeros, %", "perplexity"), ...])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocha_hf.errors import StochaError

# label: points (x, y), (x, y, text beside the point) or (x, y, text, half the height of an error bar)
Lines = Mapping[str, Iterable[tuple[Any, ...]]]


@dataclass(frozen=True)
class Picture:
    """Lines under a title. `x` and `y` label the axes, `log` names those that are logarithmic: "", "x", "y" or "xy";
    `y_limits` is the range shown, chosen by the points if None.

    A line of one point is drawn as a level, unless `levels` is false.
    """

    title: str
    lines: Lines
    x: str
    y: str
    log: str = ""
    levels: bool = True
    y_limits: tuple[float, float] | None = None


def check_plot(path: str | Path) -> None:
    """Raise StochaError if a plot could not be written there: called before what takes long."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise StochaError("matplotlib is missing: expected it for a plot; pip install 'stocha_hf[plot]'") from None
    endings = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".") not in endings:
        raise StochaError(f"the plot's name is {path}: expected one like plot.png, ending in {', '.join(endings)}")
    if not Path(path).absolute().parent.is_dir():
        raise StochaError(f"{Path(path).parent}, the plot's folder, does not exist: expected an existing one")


def plot_lines(path: str | Path, pictures: Mapping[str, Lines], *, x: str, y: str, log: bool = False) -> None:
    """plot() of pictures (title: lines) that have the same axes; `log` concerns y."""
    plot(path, [Picture(title, lines, x, y, "y" if log else "") for title, lines in pictures.items()])


def plot(path: str | Path, pictures: Sequence[Picture]) -> None:
    """Draw each picture beside the others and write `path`, whose ending says the format.

    Raises StochaError as check_plot does.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    figure = Figure(figsize=(6 * len(pictures), 4), layout="constrained")
    for axis, picture in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        _draw(axis, picture)
    figure.savefig(path, dpi=120)


def _draw(axis: Any, picture: Picture) -> None:
    from matplotlib.ticker import LogFormatter

    for label, points in picture.lines.items():
        ordered = sorted(points, key=lambda point: point[:2])
        if len(ordered) == 1 and picture.levels:
            axis.axhline(ordered[0][1], label=label, color="grey", linestyle="--")
        else:
            errors = [point[3] or 0.0 for point in ordered] if all(point[3:] for point in ordered) else None
            xs, ys = zip(*[point[:2] for point in ordered], strict=True)
            axis.errorbar(xs, ys, errors, label=label, marker="o", capsize=2)
        for x, y, text in (point[:3] for point in ordered if point[2:]):
            axis.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="small")
    for scale in picture.log:
        getattr(axis, f"set_{scale}scale")("log")
        numbers = getattr(axis, f"{scale}axis")
        numbers.set_major_formatter(LogFormatter())  # 60, where the default is 6 x 10^1
        numbers.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.margins(x=0.08)  # room for a text beside the last point
    axis.set(title=picture.title, xlabel=picture.x, ylabel=picture.y, ylim=picture.y_limits)
    axis.grid(alpha=0.3)
    axis.legend()
