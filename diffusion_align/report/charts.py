"""Charts of a run's metrics, as data: what is drawn, over what; ``svg`` draws them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from diffusion_align.report.metrics import Row, natural_x, numeric_keys, present, series
from diffusion_align.report.names import X_NAMES, describe, is_reward_component

SMOOTHING = 20  # the running mean of a noisy line is over one in this many of its points
MAX_BARS = 200  # of more epochs each bar is the mean over several
_HELD_OUT = "eval/"
_TIME_PARTS = ("sample", "score", "update", "evaluation", "grid")
_TIME_COLOURS = {**{part: n for n, part in enumerate(_TIME_PARTS[:3])}, "evaluation": 5, "grid": 4, "other": 8}


class Curve(NamedTuple):
    """A line through (n,) points, sorted by x; ``colour`` counts through the palette, ``label`` is for the legend."""

    xs: np.ndarray
    ys: np.ndarray
    label: str = ""
    colour: int = 0
    style: Literal["plain", "pale", "bold"] = "plain"


class Band(NamedTuple):
    """The area between two lines."""

    xs: np.ndarray
    low: np.ndarray
    high: np.ndarray
    label: str
    colour: int = 0


class Bars(NamedTuple):
    """One part of stacked bars, ``width`` wide: where each begins and how high it is."""

    xs: np.ndarray
    base: np.ndarray
    heights: np.ndarray
    label: str
    colour: int
    width: float


@dataclass(frozen=True)
class Chart:
    """One panel.

    Attributes:
        title, x, unit: what stands above it, below it and at its scale.
        level: a value that the lines are compared with, and its name; drawn across.
        mark: an x worth pointing at, and its name; drawn upright.
        from_zero: the scale begins at 0, unless an estimate is below: a quantity that cannot be negative.
    """

    title: str
    x: str
    unit: str
    curves: Sequence[Curve] = ()
    bands: Sequence[Band] = ()
    bars: Sequence[Bars] = ()
    level: tuple[float, str] | None = None
    mark: tuple[float, str] | None = None
    from_zero: bool = False


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


def metric_charts(
    rows: Sequence[Row], keys: Sequence[str], *, described: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> list[Chart]:
    """One chart per key, a line each, over updates or epochs, whichever the key is logged by.

    ``described``: key -> title and unit where they are not those of the report.

    Raises:
        ValueError: a key that no row holds as a number.
    """
    charts = []
    for key in keys:
        axis = natural_x([rows], key)
        present(rows, [key], x=axis)
        title, unit = described[key][:2] if key in described else describe(key)
        charts.append(Chart(title, X_NAMES[axis], unit, [Curve(*series(rows, key, x=axis))]))
    return charts


def reward_chart(rows: Sequence[Row]) -> list[Chart]:
    """The mean reward of each epoch's samples with a band of ± 2 standard errors."""
    present(rows, ["reward"], x="epoch")
    epochs, reward = series(rows, "reward", x="epoch")
    curve = Curve(epochs, reward, "mean over the epoch's samples")
    error_epochs, error = series(rows, "reward_stderr", x="epoch")
    both = np.isin(epochs, error_epochs)
    half = 2 * error[np.isin(error_epochs, epochs)]
    band = Band(epochs[both], reward[both] - half, reward[both] + half, "± 2 standard errors")
    title, unit = describe("reward")
    return [Chart(title, X_NAMES["epoch"], unit, [curve], [band] if both.any() else [])]


def held_out_charts(rows: Sequence[Row]) -> list[Chart]:
    """The held-out reward with a band of ± 2 standard errors and its best marked, and the diversity of the images."""
    charts = []
    for key in present(rows, ("gold", "diversity"), x="epoch"):
        title, unit = describe(key)
        epochs, values = series(rows, key, x="epoch")
        if key == "diversity":
            charts.append(Chart(title, X_NAMES["epoch"], unit, [Curve(epochs, values, colour=3)], from_zero=True))
            continue
        errors = dict(zip(*series(rows, "gold_stderr", x="epoch")))
        half = 2 * np.array([errors.get(epoch, 0.0) for epoch in epochs])
        band = Band(epochs, values - half, values + half, "± 2 standard errors", 2)
        curve = Curve(epochs, values, "mean over the evaluation images", 2)
        best = (float(epochs[values.argmax()]), "best")
        charts.append(Chart(title, X_NAMES["epoch"], unit, [curve], [band], mark=best))
    return charts


def panel_charts(rows: Sequence[Row], shown: Sequence[Panel]) -> list[Chart]:
    """Panels over the updates, each with several lines; a panel without metrics is left out.

    Where a panel has many updates its values are pale and their running mean, whose length the axis names, is bold;
    what is measured on held-out data, once per epoch, is drawn as it is.
    """
    known = present(rows, [key for panel in shown for key in panel.lines], x="step")
    return [_panel_chart(rows, panel, known) for panel in shown if not panel.lines.keys().isdisjoint(known)]


def _panel_chart(rows: Sequence[Row], panel: Panel, known: Sequence[str]) -> Chart:
    found = {key: series(rows, key) for key in panel.lines if key in known}
    counts = [len(steps) for key, (steps, _) in found.items() if panel.smooth and not key.startswith(_HELD_OUT)]
    window = max(1, min(counts, default=0) // SMOOTHING)
    curves = []
    for colour, (key, label) in enumerate(panel.lines.items()):
        if key not in found:
            continue
        steps, values = found[key][0], found[key][1] - panel.less
        if window == 1 or key.startswith(_HELD_OUT):
            curves.append(Curve(steps, values, label, colour))
        else:
            curves.append(Curve(steps, values, "", colour, "pale"))
            curves.append(Curve(steps, _running_mean(values, window), label, colour, "bold"))
    title, unit = describe(next(iter(panel.lines)))
    x = X_NAMES["step"] + (f" (bold: mean over {window})" if window > 1 else "")
    unit = unit if panel.unit is None else panel.unit
    return Chart(panel.title or title, x, unit, curves, level=panel.level, from_zero=panel.level is None)


def time_chart(rows: Sequence[Row]) -> list[Chart]:
    """Seconds of each epoch as stacked bars: sampling, scoring, updating, grids, and what remains of the epoch.

    Parts that ran side by side may add up to more than the epoch took; nothing then remains. Of more than ``MAX_BARS``
    epochs a bar is the mean over as many as the axis names.
    """
    columns = {part: dict(zip(*series(rows, f"time/{part}", x="epoch"))) for part in (*_TIME_PARTS, "epoch")}
    epochs = np.array(sorted(set().union(*columns.values())))
    if not len(epochs):
        present(rows, [f"time/{part}" for part in (*_TIME_PARTS, "epoch")], x="epoch")
    heights = {part: np.array([columns[part].get(epoch, 0.0) for epoch in epochs]) for part in _TIME_PARTS}
    whole = np.array([columns["epoch"].get(epoch, 0.0) for epoch in epochs])
    heights["other"] = np.maximum(whole - sum(heights.values()), 0)
    each = -(-len(epochs) // MAX_BARS)
    starts = np.arange(0, len(epochs), each)
    counts = np.diff(np.append(starts, len(epochs)))
    middles = np.add.reduceat(epochs, starts) / counts
    width = 0.8 * (float(np.diff(epochs).min()) if len(epochs) > 1 else 1.0) if each == 1 else float(each)
    bars, base = [], np.zeros(len(starts))
    for part, values in heights.items():
        if values.any():
            mean = np.add.reduceat(values, starts) / counts
            bars.append(Bars(middles, base, mean, part, _TIME_COLOURS[part], width))
            base = base + mean
    x = X_NAMES["epoch"] + (f" (a bar: mean over {each})" if each > 1 else "")
    return [Chart("Time per epoch", x, "seconds", bars=bars, from_zero=True)]


def reward_component_keys(rows: Iterable[Row]) -> list[str]:
    """The keys ``rewards/<name>/mean`` found in the rows, sorted; ``rewards/accuracies`` and the like are none."""
    return [key for key in numeric_keys(rows, x="epoch") if is_reward_component(key)]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over ``window`` neighbours, centred, and over those there are at the ends; window <= len(values)."""
    ones = np.ones(window)
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones(len(values)), ones, mode="same")
