"""Plots of a run's metrics, as matplotlib ``Figure`` objects drawn by Agg: no pyplot, so nothing global to close."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from diffusion_align.report.metrics import Row, natural_x, numeric_keys, read_metrics, series
from diffusion_align.writing import make_folder, write_bytes

# Okabe and Ito's colours, told apart with every common form of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
INK, GRID = "#333333", "#dddddd"
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 2.9
DPI = 150
MARKED_POINTS = 30  # lines of at most this many points show them
SMOOTHING = 20  # the running mean of a noisy line is over one in this many of its points

_NAMES = {
    "reward": ("Reward", "mean reward"),
    "reward_std": ("Spread of the reward", "standard deviation"),
    "reward_stderr": ("Uncertainty of the mean reward", "standard error"),
    "frac_reward_zero_std": ("Groups with equal rewards", "fraction of groups"),
    "frac_without_reward": ("Completions without a reward", "fraction of completions"),
    "untrained_epochs": ("Epochs in a row without training", "epochs"),
    "ratio/rollout_deviation": ("Sampling against scoring", "max |ratio − 1|"),
    "gold": ("Held-out reward", "mean reward"),
    "gold_stderr": ("Uncertainty of the held-out reward", "standard error"),
    "diversity": ("Diversity of the evaluation images", "mean distance of two"),
    "kl": ("KL to the reference, per step", "nats"),
    "kl_path": ("KL to the reference, whole path", "nats"),
    "kl_path_stderr": ("Uncertainty of the whole path's KL", "standard error"),
    "clip_ratio/region_mean": ("Clipped actions", "fraction"),
    "clip_ratio/low_mean": ("Clipped actions, ratio too low", "fraction"),
    "clip_ratio/high_mean": ("Clipped actions, ratio too high", "fraction"),
    "clip_nats": ("Clip range", "nats"),
    "ratio/mean": ("Importance ratio, mean", "ratio"),
    "ratio/min": ("Importance ratio, smallest", "ratio"),
    "ratio/max": ("Importance ratio, largest", "ratio"),
    "ratio/clamped": ("Log-ratios beyond the clamp", "fraction"),
    "ratio/first_pass_deviation": ("Ratio on the first pass", "max |ratio − 1|"),
    "grad_norm": ("Gradient norm", "L2 norm"),
    "learning_rate": ("Learning rate", "learning rate"),
    "loss": ("Loss", "loss"),
    "entropy": ("Entropy", "nats"),
    "samples_used": ("Samples trained on", "samples"),
    "pairs_used": ("Pairs trained on", "pairs"),
    "loss/preference": ("Preference loss", "loss"),
    "rewards/accuracies": ("Implicit accuracy", "fraction of pairs"),
    "rewards/margins": ("Implicit reward, chosen − rejected", "beta × nats"),
    "rewards/chosen": ("Implicit reward, chosen", "beta × nats"),
    "rewards/rejected": ("Implicit reward, rejected", "beta × nats"),
    "error/winner": ("Winner's error − the reference's", "nats"),
    "error/loser": ("Loser's error − the reference's", "nats"),
    "error/winner_ratio": ("Winner's error / the reference's", "ratio"),
    "kl/winner": ("KL to the reference at the winner, per step", "nats"),
    "kl/loser": ("KL to the reference at the loser, per step", "nats"),
    "weight": ("Weight of the corrected loss", "mean weight"),
    "beta_nats": ("Beta", "per nat"),
    "completions/mean_length": ("Length of the completions", "tokens"),
    "completions/min_length": ("Shortest completion", "tokens"),
    "completions/max_length": ("Longest completion", "tokens"),
    "completions/tokens": ("Tokens sampled", "tokens"),
    "completions/clipped_ratio": ("Completions without an end", "fraction"),
    "kl_coef": ("Price of the KL to the reference", "per nat"),
    "drift": ("Distance from the reference on the data", "nats per token"),
    "accuracy": ("Accuracy", "fraction of pairs"),
    "margin": ("Score, chosen − rejected", "score"),
    "scores/chosen": ("Score, chosen", "score"),
    "scores/rejected": ("Score, rejected", "score"),
    "eval/accuracy": ("Accuracy, held-out pairs", "fraction of pairs"),
    "eval/margin": ("Score, chosen − rejected, held-out pairs", "score"),
    "eval/preference": ("Preference loss, held-out pairs", "nats"),
    "loss/policy": ("Policy loss", "loss"),
    "loss/value": ("Value loss", "loss"),
    "loss/center": ("Centring loss", "score²"),
    "value/mean": ("Value, mean", "reward"),
    "returns/mean": ("Return, mean", "reward"),
}
REWARD_COMPONENT = re.compile(r"rewards/(.+)/mean")
X_NAMES = {"step": "optimizer update", "epoch": "epoch"}
_HELD_OUT = "eval/"
_TIME_PARTS = ("sample", "score", "update", "evaluation", "grid")
RunDirs = str | Path | Sequence[str | Path]


class Panel(NamedTuple):
    """Lines over the updates.

    Attributes:
        lines: metric -> what the legend calls it; the first gives the panel its title and unit.
        level: a value that the lines are compared with, the reference's or that of chance, and its name.
        title, unit: instead of the metric's own.
        less: what is subtracted from every value.
        smooth: whether many values are pale and their running mean is bold.
    """

    lines: Mapping[str, str]
    level: tuple[float, str] | None = None
    title: str | None = None
    unit: str | None = None
    less: float = 0.0
    smooth: bool = True


def plot_metrics(
    rows: Sequence[Row],
    keys: Sequence[str],
    *,
    columns: int = 2,
    described: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Figure:
    """One panel per key, a line each, over updates or epochs, whichever the key is logged by.

    ``described``: key -> title and unit where they are not those of the report.

    Raises:
        ValueError: a key that no row holds as a number.
    """
    figure, panels = new_figure(len(keys), columns=columns)
    for axes, key in zip(panels, keys):
        axis = natural_x([rows], key)
        _present(rows, [key], x=axis)
        draw_line(axes, *series(rows, key, x=axis), PALETTE[0])
        name, unit = (described[key][0], described[key][1]) if key in described else (None, None)
        finish_axes(axes, key, axis, title=name, unit=unit)
    return figure


def plot_reward(rows: Sequence[Row]) -> Figure:
    """The mean reward of each epoch's samples with a band of ± 2 standard errors."""
    figure, (axes,) = new_figure(1)
    _present(rows, ["reward"], x="epoch")
    epochs, reward = series(rows, "reward", x="epoch")
    draw_line(axes, epochs, reward, PALETTE[0], label="mean over the epoch's samples")
    error_epochs, error = series(rows, "reward_stderr", x="epoch")
    both = np.isin(epochs, error_epochs)
    if both.any():
        half = 2 * error[np.isin(error_epochs, epochs)]
        draw_band(axes, epochs[both], reward[both] - half, reward[both] + half, PALETTE[0], "± 2 standard errors")
    add_legend(axes)
    finish_axes(axes, "reward", "epoch")
    return figure


def plot_held_out_reward(rows: Sequence[Row]) -> Figure:
    """The held-out reward with a band of ± 2 standard errors and its best marked, and the diversity of the images."""
    keys = _present(rows, ("gold", "diversity"), x="epoch")
    figure, panels = new_figure(len(keys))
    for axes, key, color in zip(panels, keys, (PALETTE[2], PALETTE[3])):
        epochs, values = series(rows, key, x="epoch")
        label = "mean over the evaluation images" if key == "gold" else None
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


def reward_component_keys(rows: Iterable[Row]) -> list[str]:
    """The keys ``rewards/<name>/mean`` found in the rows, sorted; ``rewards/accuracies`` and the like are none."""
    return [key for key in numeric_keys(rows, x="epoch") if REWARD_COMPONENT.fullmatch(key)]


def plot_panels(rows: Sequence[Row], shown: Sequence[Panel]) -> Figure:
    """Panels over the updates, each with several lines; a panel without metrics is left out.

    Where a panel has many updates its values are pale and their running mean, whose length the axis names, is bold;
    what is measured on held-out data, once per epoch, is drawn as it is.
    """
    known = _present(rows, [key for panel in shown for key in panel.lines], x="step")
    shown = [panel for panel in shown if not panel.lines.keys().isdisjoint(known)]
    figure, panels = new_figure(len(shown))
    for axes, (lines, level, title, unit, less, smooth) in zip(panels, shown):
        curves = {name: series(rows, name) for name in lines if name in known}
        counts = [len(steps) for name, (steps, _) in curves.items() if smooth and not name.startswith(_HELD_OUT)]
        window = max(1, min(counts, default=0) // SMOOTHING)
        for color, (name, label) in zip(PALETTE, lines.items()):
            if name in curves:
                steps, values = curves[name]
                smoothed = 1 if name.startswith(_HELD_OUT) else window
                draw_smooth_line(axes, steps, values - less, color, label=label, window=smoothed)
        if level:
            axes.axhline(level[0], color="#777777", linewidth=1.0, linestyle="--", label=level[1], zorder=2)
        finish_axes(axes, next(iter(lines)), "step", title=title, unit=unit)
        if window > 1:
            axes.set_xlabel(f"{X_NAMES['step']} (bold: mean over {window})", fontsize=8.5, color=INK)
        if level is None:
            start_at_zero(axes)
        if level or len(curves) > 1:
            add_legend(axes)
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
    finish_axes(axes, "time/epoch", "epoch", title="Time per epoch")
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
        rows[label] = [read_metrics(Path(folder) / "metrics.jsonl") for folder in several]
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


def _present(rows: Iterable[Row], keys: Sequence[str], *, x: str | None = None) -> list[str]:
    known = set(numeric_keys(rows, x=x))
    found = [key for key in keys if key in known]
    if not found:
        names = ", ".join(keys)
        over = f" over {x}" if x else ""
        raise ValueError(f"no row holds {names}: the metrics{over} are {', '.join(sorted(known)) or 'empty'}")
    return found


def describe(key: str) -> tuple[str, str]:
    """``(title, unit)`` of a metric, for an axis; a key that is not known stands for itself."""
    if key in _NAMES:
        return _NAMES[key]
    if match := REWARD_COMPONENT.fullmatch(key):
        return f"Reward: {match[1]}", "mean reward"
    if key.startswith("time/"):
        return f"Time: {key.removeprefix('time/')}", "seconds"
    return key, ""


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


def draw_smooth_line(axes: Axes, xs: np.ndarray, values: np.ndarray, color: str, *, label: str, window: int) -> None:
    """The values pale and their running mean bold; the values alone where the window holds one."""
    if window == 1:
        draw_line(axes, xs, values, color, label=label)
    else:
        axes.plot(xs, values, color=color, linewidth=0.7, alpha=0.3, zorder=2.5)
        axes.plot(xs, _running_mean(values, window), color=color, linewidth=1.8, label=label, zorder=3)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over ``window`` neighbours, centred, and over those there are at the ends; window <= len(values)."""
    ones = np.ones(window)
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones(len(values)), ones, mode="same")


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


def start_at_zero(axes: Axes) -> None:
    """Start the axis of a quantity that cannot be negative at 0, unless an estimate of it is."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines])
    values = values[np.isfinite(values)]
    if len(values) and values.min() >= 0:
        axes.set_ylim(0, 1.06 * values.max() or None)


def add_legend(axes: Axes) -> None:
    """Beneath the panel, where it hides no line."""
    legend = axes.legend(
        frameon=False, fontsize=8, labelcolor=INK, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.19),
        columnspacing=1.4, handlelength=1.6,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
