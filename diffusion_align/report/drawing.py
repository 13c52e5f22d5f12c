"""Panels, lines and axes of the plots, and what the metrics are called on them."""

from __future__ import annotations

import math
import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

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
    "gold": ("Held-out (gold) reward", "mean reward"),
    "gold_stderr": ("Uncertainty of the gold reward", "standard error"),
    "diversity": ("Diversity of the fixed pictures", "mean distance of two"),
    "kl": ("KL to the reference, per step", "nats"),
    "kl_path": ("KL to the reference, a whole path", "nats"),
    "kl_path_stderr": ("Uncertainty of the KL of a whole path", "standard error"),
    "clip_ratio/region_mean": ("Clipped decisions", "fraction"),
    "clip_ratio/low_mean": ("Clipped decisions, ratio too low", "fraction"),
    "clip_ratio/high_mean": ("Clipped decisions, ratio too high", "fraction"),
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
    "drift": ("Distance from the reference on the data", "nats a token"),
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


def colors(count: int) -> list[str]:
    return [PALETTE[n % len(PALETTE)] for n in range(count)]


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


def finish_axes(axes: Axes, key: str, x: str, *, title: str | None = None, unit: str | None = None) -> None:
    name, default_unit = describe(key)
    axes.set_title(title or name, fontsize=10, loc="left", color=INK, parse_math=False)  # names of users' rewards
    axes.set_xlabel(X_NAMES.get(x, x), fontsize=8.5, color=INK)
    axes.set_ylabel(default_unit if unit is None else unit, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, color=GRID, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.grid(True, color=GRID, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
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
