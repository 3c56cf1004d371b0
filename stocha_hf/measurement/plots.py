"""Plots: lines from points, one picture or several, written to a file, where a label has one style.

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

MANY = (
    10  # labels: with more, colours come again with dashes, one legend stands beside the pictures, texts are left out
)
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
    """Draw each picture, up to three in a row or four in two rows, and write `path`, whose ending says the format.

    Raises StochaError as check_plot does.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    columns = 2 if len(pictures) == 4 else min(len(pictures), 3)
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    styles = _styles(dict.fromkeys(label for picture in pictures for label in picture.lines))
    for axis, picture in zip(axes, pictures, strict=False):
        _draw(axis, picture, styles)
    for axis in axes[len(pictures) :]:
        axis.remove()
    if len(styles) > MANY:
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend([handles[label] for label in styles], styles, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each label is drawn."""
    dashes = ("-", "--", ":")
    return {
        label: {"color": f"C{at % MANY}", "linestyle": dashes[at // MANY % len(dashes)]}
        for at, label in enumerate(labels)
    }


def _draw(axis: Any, picture: Picture, styles: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.ticker import LogFormatter

    few = len(styles) <= MANY
    for label, points in picture.lines.items():
        ordered = sorted(points, key=lambda point: point[:2])
        if len(ordered) == 1 and picture.levels:
            axis.axhline(ordered[0][1], label=label, color="grey", linestyle="--")
        else:
            errors = [point[3] or 0.0 for point in ordered] if all(point[3:] for point in ordered) else None
            xs, ys = zip(*[point[:2] for point in ordered], strict=True)
            axis.errorbar(xs, ys, errors, label=label, marker="o", capsize=2, **styles[label])
        for x, y, text in (point[:3] for point in ordered if few and point[2:]):
            axis.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="small")
    for scale in picture.log:
        getattr(axis, f"set_{scale}scale")("log")
        numbers = getattr(axis, f"{scale}axis")
        numbers.set_major_formatter(LogFormatter())  # 60, where the default is 6 x 10^1
        numbers.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.margins(x=0.08)  # room for a text beside the last point
    axis.set(title=picture.title, xlabel=picture.x, ylabel=picture.y, ylim=picture.y_limits)
    axis.grid(alpha=0.3)
    if few:
        axis.legend()
