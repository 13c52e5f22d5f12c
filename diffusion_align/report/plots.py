"""Plots for PNG files, as matplotlib ``Figure`` objects drawn by Agg: no pyplot, so nothing global to close."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from diffusion_align.report.metrics import MetricTable, natural_x, present, read_metrics, series
from diffusion_align.report.names import X_NAMES, describe
from diffusion_align.writing import make_folder, write_bytes

# Okabe and Ito's colours, told apart with every common form of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
INK, GRID = "#333333", "#dddddd"
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 2.9
DPI = 150
MARKED_POINTS = 30  # lines of at most this many points show them

RunDirs = str | Path | Sequence[str | Path]


def compare_runs(
    runs: Mapping[str, RunDirs],
    keys: Sequence[str],
    path: str | Path | None = None,
    *,
    columns: int = 2,
    title: str | None = None,
) -> Figure:
    """One panel per key and one line per label: the mean over its runs (seeds), with a band from least to greatest.

    Only points that every run of a label reached are averaged, so that a run cut short cannot bend the mean.

    Args:
        runs: label → a run folder, or several that differ in the seed.
        keys: metrics; each is drawn over epochs or over updates, as it was logged. A label without the key has no line.
        path: where to write the PNG, if anywhere.

    Raises:
        ValueError: a folder without ``metrics.jsonl``, or a key that no run holds.
    """
    if not runs or not keys:
        raise ValueError("compare_runs needs at least one run and one key")
    rows = {}
    for label, folders in runs.items():
        several = [folders] if isinstance(folders, str | Path) else folders
        rows[label] = [MetricTable(read_metrics(Path(folder) / "metrics.jsonl")) for folder in several]
    figure, panels = new_figure(len(keys), columns=columns)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    for axes, key in zip(panels, keys):
        axis = natural_x([seed for seeds in rows.values() for seed in seeds], key)
        for (label, seeds), color in zip(rows.items(), itertools.cycle(PALETTE)):
            curves = [series(seed, key, x=axis) for seed in seeds]
            curves = [curve for curve in curves if len(curve[0])]
            if not curves:
                continue
            xs = curves[0][0]
            for other, _ in curves[1:]:
                xs = np.intersect1d(xs, other)
            values = np.stack([ys[np.isin(x, xs)] for x, ys in curves])
            if not len(xs):
                raise ValueError(
                    f"the runs of {label!r} have no {axis} of {key!r} in common: compare them under two labels"
                )
            draw_line(axes, xs, values.mean(0), color, label=label)
            if len(curves) > 1:
                draw_band(axes, xs, values.min(0), values.max(0), color)
        if not axes.lines:
            present([row for seeds in rows.values() for seed in seeds for row in seed], [key])
        finish_axes(axes, key, axis)
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    figure.legend(
        [lines[label] for label in rows if label in lines], [label for label in rows if label in lines],
        frameon=False, fontsize=8.5, labelcolor=INK, ncols=min(len(lines), 2 * columns), loc="outside lower center",
    )  # fmt: skip
    if path is not None:
        save_figure(figure, path)
    return figure


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG bytes on white."""
    buffer = io.BytesIO()
    figure.set_dpi(DPI)
    figure.set_facecolor("white")
    canvas = FigureCanvasAgg(figure)
    if layout := figure.get_layout_engine():
        layout.execute(figure)  # and again by drawing: the ticks change with the margins, and these with the ticks
    canvas.print_png(buffer)  # print_figure would lay out and draw once more, with the same result
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure as a PNG, whole or not at all; returns the path, ``~`` expanded, whose folder is made."""
    target = Path(path).expanduser()
    make_folder(target.parent, parents=True)
    write_bytes(target, figure_png(figure))
    return target


def new_figure(count: int, *, columns: int = 2) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    n_rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(PANEL_WIDTH * columns, PANEL_HEIGHT * n_rows), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    )
    return figure, [figure.add_subplot(n_rows, columns, n + 1) for n in range(count)]


def draw_line(axes: Axes, xs: np.ndarray, values: np.ndarray, color: str, *, label: str | None = None) -> None:
    marker = "o" if len(xs) <= MARKED_POINTS else None
    width = 1.6 if len(xs) <= 200 else 0.9
    axes.plot(xs, values, color=color, linewidth=width, marker=marker, markersize=3, label=label, zorder=3)


def draw_band(axes: Axes, xs: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, label: str = "") -> None:
    if len(xs) == 1:  # a band over one point has no area
        axes.vlines(xs, low, high, color=color, linewidth=1.2, alpha=0.6, label=label, zorder=2)
    else:
        axes.fill_between(xs, low, high, color=color, alpha=0.18, linewidth=0, label=label, zorder=2)


def label_axes(axes: Axes, title: str, x: str, y: str, *, size: float = 8.5) -> None:
    axes.set_title(title, fontsize=size + 1.5, loc="left", color=INK, parse_math=False)  # names of users' rewards
    axes.set_xlabel(x, fontsize=size, color=INK)
    axes.set_ylabel(y, fontsize=size, color=INK)
    axes.tick_params(labelsize=size - 0.5, color=GRID, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.grid(True, color=GRID, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def finish_axes(axes: Axes, key: str, x: str, *, title: str | None = None, unit: str | None = None) -> None:
    name, default_unit = describe(key)
    label_axes(axes, title or name, X_NAMES.get(x, x), default_unit if unit is None else unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
    axes.yaxis.get_offset_text().set_fontsize(8)
