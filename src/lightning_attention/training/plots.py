"""Plots of losses, of one run and of several: nats per token and bits per byte, against tokens and time."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from .. import files
from ..paths import PathLike, to_path
from .metrics import Records, read_metrics

# Losses by their units, and what they are plotted against.
UNITS = {"nats per token": "loss", "bits per byte": "bits_per_byte"}
SCALES = {"tokens": "tokens read", "seconds": "time of training"}
COLORS = ("#1f5fa8", "#d95f02", "#1b9e77", "#c2185b", "#7b52ab", "#8c6d1f", "#2aa6c9", "#666666", "#a6761d", "#e6ab02")
DASHES = "-", "--", ":", "-."
PANEL = 6.4, 4.2  # inches


def plot_loss(
    file: PathLike, picture: PathLike, baselines: dict[str, float] | None = None, title: str | None = None
) -> None:
    """Plot the losses of a run against the tokens read as a PNG: nats per token, and bits per byte if there are any.

    Args:
        file: metrics of a run.
        picture: the file to write.
        baselines: losses in nats per token by name, drawn as horizontal lines unless all losses are below.
        title: text above the plot.

    Raises:
        OSError: the picture cannot be written.
    """
    records, picture = read_metrics(file), to_path(picture, "picture")
    units = units_of([records])
    figure, grid = _figure(1, len(units))
    for axes, unit in zip(grid[0], units, strict=True):
        _draw(axes, records, unit, "tokens", ("training", "held out"), (COLORS[0], COLORS[1]))
        for name, value in (baselines or {}).items() if unit == "nats per token" else ():
            if value <= axes.get_ylim()[1]:  # a line above all losses would press them together
                place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
                axes.axhline(value, linestyle="--", linewidth=1, color="0.55")
                axes.annotate(name, (0.99, value), color="0.4", **place)
        _finish(axes, unit, "tokens")
    _add_legend(figure, grid)
    _save(figure, picture, title)


def plot_runs(runs: Mapping[str, Records], picture: PathLike) -> None:
    """Plot the losses of runs as a PNG: nats per token and bits per byte, against tokens and against time.

    Thin lines are training losses, lines with dots held-out losses. Bits per byte are left out if no run has them.

    Args:
        runs: see `comparison.read_runs`.
        picture: the file to write.

    Raises:
        OSError: the picture cannot be written.
    """
    picture, units = to_path(picture, "picture"), units_of(runs.values())
    figure, grid = _figure(len(units), len(SCALES))
    for axes_of_unit, unit in zip(grid, units, strict=True):
        for axes, scale in zip(axes_of_unit, SCALES, strict=True):
            for index, (name, records) in enumerate(runs.items()):
                color, dashes = COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]
                _draw(axes, records, unit, scale, (name, name), (color, color), dashes)
            _finish(axes, unit, scale)
    _add_legend(figure, grid)
    _save(figure, picture, "Losses of training (thin lines) and of held-out text (dots)")


def units_of(runs: Iterable[Records]) -> list[str]:
    """Units that the losses of runs have; nats per token always."""
    logged = {name for records in runs for record in records for name, value in record.items() if is_number(value)}
    return [unit for unit, name in UNITS.items() if name == "loss" or {name, f"eval_{name}"} & logged]


def points(records: Records, name: str, scale: str = "tokens") -> list[tuple[float, float]]:
    """Values of that name that are finite numbers, each with its place on a scale."""
    pairs: list[Any] = [(record.get(scale), record.get(name)) for record in records]
    return [(x, y) for x, y in pairs if is_number(x) and is_number(y)]


def is_number(value: object) -> bool:
    """True for a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _figure(num_rows: int, num_columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL[0] * num_columns, PANEL[1] * num_rows), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _draw(
    axes: Any, records: Records, unit: str, scale: str, labels: Sequence[str], colors: Sequence[str], dashes: str = "-"
) -> None:
    """Draw the training losses and the held-out losses of a run."""
    training, held_out = (points(records, f"{part}{UNITS[unit]}", scale) for part in ("", "eval_"))
    styles: tuple[dict[str, Any], ...] = (
        {"linewidth": 1, "alpha": 0.6, "marker": "." if len(training) == 1 else None},
        {"linewidth": 1.8, "zorder": 3, "marker": "o", "markersize": 3.5},
    )
    for found, label, color, style in zip((training, held_out), labels, colors, styles, strict=True):
        if found:
            axes.plot(*zip(*found, strict=True), label=_plain(label), color=color, linestyle=dashes, **style)


def _finish(axes: Any, unit: str, scale: str) -> None:
    """Label the axes."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    axes.set(xlabel=SCALES[scale], ylabel=f"loss ({unit})")
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if scale == "tokens" else FuncFormatter(_clock))
    axes.set_xlim(left=0)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Any, grid: Any) -> None:
    """Name what is drawn, below all panels, where it hides no line."""
    handles = dict(zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)


def _plain(text: str) -> str:
    """Text that matplotlib neither reads as a formula nor hides from legends."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _clock(seconds: float, _position: int | None = None) -> str:
    """Format a time in the largest unit that fits it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _save(figure: Any, picture: PathLike, title: str | None) -> None:
    if title:
        figure.suptitle(_plain(title), fontsize=12, fontweight="bold")
    with files.replacing(picture, "wb") as image, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in a name that the font cannot write
        figure.savefig(image, dpi=150, format="png")
