"""Plots of a run's metrics, as matplotlib ``Figure`` objects drawn by Agg: no pyplot, so nothing global to close."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffusion_align.report.drawing import (
    DPI,
    INK,
    PALETTE,
    REWARD_COMPONENT,
    SMOOTHING,
    X_NAMES,
    add_legend,
    colors,
    draw_band,
    draw_line,
    draw_smooth_line,
    finish_axes,
    new_figure,
    start_at_zero,
)
from diffusion_align.report.metrics import Row, natural_x, numeric_keys, read_metrics, series
from diffusion_align.writing import make_folder, write_bytes

RunDirs = str | Path | Sequence[str | Path]

Panel = tuple[str, str, Mapping[str, str], tuple[float, str] | None]
"""The metric that names its unit, its title, its lines, and the level of the reference or of chance."""
IMPLICIT_REWARD_PANELS: tuple[Panel, ...] = (
    ("rewards/accuracies", "Implicit accuracy", {"rewards/accuracies": "accuracy"}, (0.5, "chance")),
    ("rewards/margins", "Implicit reward, chosen − rejected", {"rewards/margins": "margin"}, (0.0, "reference")),
    (
        "rewards/chosen",
        "Implicit reward",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        (0.0, "reference"),
    ),
)
_PREFERENCE_PANELS: tuple[Panel, ...] = (
    *IMPLICIT_REWARD_PANELS,
    (
        "error/winner",
        "Error − the reference's",
        {"error/winner": "winner", "error/loser": "loser"},
        (0.0, "reference"),
    ),
    ("kl/winner", "KL to the reference, per step", {"kl/winner": "winner", "kl/loser": "loser"}, None),
    (
        "error/winner_ratio",
        "Winner's error / the reference's",
        {"error/winner_ratio": "winner"},
        (1.0, "reference"),
    ),
    ("drift", "Distance from the reference on the data", {"drift": "drift"}, None),
)
_HELD_OUT = "eval/"
_TIME_PARTS = ("sample", "score", "update", "evaluation", "grid")
PREFERENCE_KEYS = tuple(key for _, _, lines, _ in _PREFERENCE_PANELS for key in lines)


def plot_metrics(
    rows: Sequence[Row],
    keys: Sequence[str],
    *,
    x: str | None = None,
    columns: int = 2,
    title: str | None = None,
    described: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Figure:
    """One panel a key, a line each; ``x`` is "step" or "epoch", by default whichever the key is logged by.

    ``described``: key -> title and unit where they are not those of the report.

    Raises:
        ValueError: a key that no row holds as a number.
    """
    if not keys:
        raise ValueError("keys is empty: name at least one metric")
    figure, panels = new_figure(len(keys), columns=columns)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    for axes, key in zip(panels, keys):
        axis = x or natural_x([rows], key)
        xs, values = _require(rows, key, axis)
        draw_line(axes, xs, values, PALETTE[0])
        name, unit = (described[key][0], described[key][1]) if key in described else (None, None)
        finish_axes(axes, key, axis, title=name, unit=unit)
    return figure


def plot_reward(rows: Sequence[Row]) -> Figure:
    """The mean reward of each epoch's samples with a band of ± 2 standard errors."""
    figure, (axes,) = new_figure(1)
    epochs, reward = _require(rows, "reward", "epoch")
    draw_line(axes, epochs, reward, PALETTE[0], label="mean over the epoch's samples")
    error_epochs, error = series(rows, "reward_stderr", x="epoch")
    both = np.isin(epochs, error_epochs)
    if both.any():
        half = 2 * error[np.isin(error_epochs, epochs)]
        draw_band(axes, epochs[both], reward[both] - half, reward[both] + half, PALETTE[0], "± 2 standard errors")
    add_legend(axes)
    finish_axes(axes, "reward", "epoch")
    return figure


def plot_gold(rows: Sequence[Row]) -> Figure:
    """The held-out reward with a band of ± 2 standard errors and its best marked, and the diversity of the pictures."""
    keys = _present(rows, ("gold", "diversity"), x="epoch")
    figure, panels = new_figure(len(keys))
    for axes, key, color in zip(panels, keys, (PALETTE[2], PALETTE[3])):
        epochs, values = series(rows, key, x="epoch")
        label = "mean over the fixed pictures" if key == "gold" else None
        draw_line(axes, epochs, values, color, label=label)
        if key == "gold":
            best = epochs[values.argmax()]
            axes.axvline(best, color="#777777", linewidth=1.0, linestyle="--", label="best", zorder=2)
            errors = dict(zip(*series(rows, "gold_stderr", x="epoch")))
            half = 2 * np.array([errors.get(epoch, 0.0) for epoch in epochs])
            draw_band(axes, epochs, values - half, values + half, color, "± 2 standard errors")
            add_legend(axes)
        finish_axes(axes, key, "epoch")
        if key == "diversity":
            start_at_zero(axes)
    return figure


def plot_reward_components(rows: Sequence[Row]) -> Figure:
    """Each ``rewards/<name>/mean`` in a panel of its own, because rewards differ in scale."""
    return plot_metrics(rows, reward_component_keys(rows) or ["rewards/<name>/mean"], x="epoch")


def reward_component_keys(rows: Iterable[Row]) -> list[str]:
    """The keys ``rewards/<name>/mean`` found in the rows, sorted; ``rewards/accuracies`` and the like are none."""
    return [key for key in numeric_keys(rows, x="epoch") if REWARD_COMPONENT.fullmatch(key)]


def plot_preference(rows: Sequence[Row]) -> Figure:
    """A preference run over its updates: implicit accuracy and rewards, errors and KL at winner and loser."""
    return plot_panels(rows, _PREFERENCE_PANELS)


def plot_panels(rows: Sequence[Row], shown: Sequence[Panel]) -> Figure:
    """Panels over the updates, each with several lines; a panel without metrics is left out.

    Where a panel has many updates its values are pale and their running mean, whose length the axis names, is bold;
    what is measured on held-out data, once an epoch, is drawn as it is.
    """
    known = _present(rows, [key for _, _, lines, _ in shown for key in lines], x="step")
    shown = [panel for panel in shown if not panel[2].keys().isdisjoint(known)]
    figure, panels = new_figure(len(shown))
    for axes, (key, title, lines, level) in zip(panels, shown):
        curves = {name: series(rows, name) for name in lines if name in known}
        counts = [len(steps) for name, (steps, _) in curves.items() if not name.startswith(_HELD_OUT)]
        window = max(1, min(counts, default=0) // SMOOTHING)
        for color, (name, label) in zip(PALETTE, lines.items()):
            if name in curves:
                smoothed = 1 if name.startswith(_HELD_OUT) else window
                draw_smooth_line(axes, *curves[name], color, label=label, window=smoothed)
        if level:
            axes.axhline(level[0], color="#777777", linewidth=1.0, linestyle="--", label=level[1], zorder=2)
        finish_axes(axes, key, "step", title=title)
        if window > 1:
            axes.set_xlabel(f"{X_NAMES['step']} (bold: mean over {window})", fontsize=8.5, color=INK)
        if level is None:
            start_at_zero(axes)
        if level or len(curves) > 1:
            add_legend(axes)
    return figure


def plot_kl(rows: Sequence[Row]) -> Figure:
    """KL to the reference in nats: a panel per denoising step (``kl``) and one for a whole path (``kl_path``)."""
    figure = plot_metrics(rows, _present(rows, ("kl", "kl_path"), x="step"), x="step")
    for axes in figure.axes:
        start_at_zero(axes)
    return figure


def plot_clip_fraction(rows: Sequence[Row]) -> Figure:
    """The fraction of decisions whose ratio left the clip range: in all, below it and above it."""
    keys = _present(rows, ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"), x="step")
    labels = {"clip_ratio/region_mean": "either side", "clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"}
    figure, (axes,) = new_figure(1)
    for key, color in zip(keys, colors(len(keys))):
        draw_line(axes, *series(rows, key), color, label=labels[key])
    finish_axes(axes, "clip_ratio/region_mean", "step", unit="fraction of decisions")
    start_at_zero(axes)
    add_legend(axes)
    return figure


def plot_ratio(rows: Sequence[Row]) -> Figure:
    """The importance ratio minus 1 (mean, smallest, largest) and, beside it, how far the first pass strayed from 1."""
    labels = {"ratio/max": "largest", "ratio/mean": "mean", "ratio/min": "smallest"}
    lines = [key for key in labels if len(series(rows, key)[0])]
    deviation = "ratio/first_pass_deviation"
    has_deviation = len(series(rows, deviation)[0]) > 0
    if not lines and not has_deviation:
        _present(rows, (*labels, deviation), x="step")
    figure, panels = new_figure(bool(lines) + has_deviation)
    if lines:
        axes = panels[0]
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)
        for key, color in zip(labels, (PALETTE[1], PALETTE[0], PALETTE[2])):
            steps, values = series(rows, key)
            if key in lines:
                draw_line(axes, steps, values - 1, color, label=labels[key])
        finish_axes(axes, "ratio/mean", "step", title="Importance ratio", unit="ratio − 1")
        add_legend(axes)
    if has_deviation:
        draw_line(panels[-1], *series(rows, deviation), PALETTE[3])
        finish_axes(panels[-1], deviation, "step")
        start_at_zero(panels[-1])
    return figure


def plot_grad_norm(rows: Sequence[Row]) -> Figure:
    """The norm of the gradient at each update."""
    figure = plot_metrics(rows, ["grad_norm"], x="step")
    start_at_zero(figure.axes[0])
    return figure


def plot_time_split(rows: Sequence[Row]) -> Figure:
    """Seconds of each epoch as stacked bars: sampling, scoring, updating, grids, and what remains of the epoch.

    Parts that ran side by side may add up to more than the epoch took; nothing then remains.
    """
    columns = {part: dict(zip(*series(rows, f"time/{part}", x="epoch"))) for part in (*_TIME_PARTS, "epoch")}
    epochs = np.array(sorted(set().union(*columns.values())))
    if not len(epochs):
        _present(rows, [f"time/{part}" for part in (*_TIME_PARTS, "epoch")], x="epoch")
    heights = {part: np.array([columns[part].get(epoch, 0.0) for epoch in epochs]) for part in _TIME_PARTS}
    whole = np.array([columns["epoch"].get(epoch, 0.0) for epoch in epochs])
    heights["other"] = np.maximum(whole - sum(heights.values()), 0)
    figure, (axes,) = new_figure(1)
    base = np.zeros(len(epochs))
    for part, color in zip(heights, (*PALETTE[:3], PALETTE[5], PALETTE[4], "#bbbbbb")):
        if heights[part].any():
            width = 0.8 if len(epochs) <= 60 else 1.0
            axes.bar(epochs, heights[part], width, bottom=base, color=color, label=part, linewidth=0)
            base = base + heights[part]
    finish_axes(axes, "time/epoch", "epoch", title="Time of an epoch")
    axes.grid(False, axis="x")
    axes.set_ylim(0, max(1.02 * base.max(), 1e-9))
    axes.legend(
        *(list(reversed(part)) for part in axes.get_legend_handles_labels()),
        frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip
    return figure


def compare_runs(
    runs: Mapping[str, RunDirs],
    keys: Sequence[str],
    path: str | Path | None = None,
    *,
    columns: int = 2,
    title: str | None = None,
) -> Figure:
    """One panel a key and one line a label: the mean over the label's runs (seeds) with a band from least to greatest.

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
    rows = {
        label: [read_metrics(Path(folder) / "metrics.jsonl") for folder in _as_list(folders)]
        for label, folders in runs.items()
    }
    figure, panels = new_figure(len(keys), columns=columns)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    for axes, key in zip(panels, keys):
        axis = natural_x([seed for seeds in rows.values() for seed in seeds], key)
        for (label, seeds), color in zip(rows.items(), colors(len(rows))):
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
            _present([row for seeds in rows.values() for seed in seeds for row in seed], [key])
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


def _as_list(folders: RunDirs) -> list[str | Path]:
    return [folders] if isinstance(folders, str | Path) else list(folders)


def _present(rows: Iterable[Row], keys: Sequence[str], *, x: str | None = None) -> list[str]:
    known = set(numeric_keys(rows, x=x))
    found = [key for key in keys if key in known]
    if not found:
        names = ", ".join(keys)
        over = f" over {x}" if x else ""
        raise ValueError(f"no row holds {names}: the metrics{over} are {', '.join(sorted(known)) or 'empty'}")
    return found


def _require(rows: Sequence[Row], key: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    xs, values = series(rows, key, x=x)
    if not len(xs):
        _present(rows, [key], x=x)
    return xs, values
