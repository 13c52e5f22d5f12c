"""A chart as the shapes of an SVG, which the page's template writes; its text and colours are the page's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from diffusion_align.report.charts import Band, Bars, Chart, Curve

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 412, 14, 208  # of the plot, beside its scales
MARGIN = 0.05  # of what is shown, beyond the outermost points
MARKED_POINTS = 30  # lines of at most this many points show them
MANY_POINTS = 200  # and those of more are thin
COLUMNS = 400  # of a longer line, at most four points are drawn in each: the first, the lowest, the highest, the last
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


class Axis(NamedTuple):
    """From the values ``low`` to ``high`` on to ``start`` to ``end`` of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, values: Any) -> Any:
        return self.start + (np.asarray(values) - self.low) / (self.high - self.low) * (self.end - self.start)


def shapes(chart: Chart) -> dict[str, Any]:
    """``paths`` (class, d), ``dots`` (class, x, y), ``x_ticks`` and ``y_ticks`` (place, text), ``factor``, ``legend``
    (class, text), for ``panel`` of the template."""
    x, y = _axes(chart)
    y_ticks, factor = _labels(_ticks(y.low, y.high, 6))
    x_ticks, _ = _labels([tick for tick in _ticks(x.low, x.high, 8) if tick == round(tick)], scaled=False)
    return {
        "chart": chart,
        "paths": [path for path in _paths(chart, x, y) if path[1]],
        "dots": [
            (f"c{curve.colour}", f"{left:.1f}", f"{top:.1f}")
            for curve in chart.curves
            if len(curve.xs) <= MARKED_POINTS and curve.style == "plain"
            for left, top in zip(x(curve.xs), y(curve.ys))
            if math.isfinite(top)
        ],
        "x_ticks": [(f"{x(value):.1f}", text) for value, text in x_ticks],
        "y_ticks": [(f"{y(value):.1f}", text) for value, text in y_ticks],
        "factor": factor,
        "legend": list(_legend(chart)),
    }


def thinned(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points that a line of ``COLUMNS`` columns shows: M4 of Jugel et al., VLDB 2014, which loses no extreme.

    Args:
        xs: (n,) sorted; ys: (n,), not finite where the line has a gap.

    Returns:
        Both, at most 4 ``COLUMNS`` + 4 long; a gap within a column is closed.
    """
    if len(xs) <= 4 * COLUMNS:
        return xs, ys
    column = ((xs - xs[0]) / (xs[-1] - xs[0]) * COLUMNS).astype(int)
    ends = np.append(np.flatnonzero(np.diff(column)) + 1, len(xs))
    kept: list[int] = []
    start = 0
    for end in ends.tolist():
        finite = start + np.flatnonzero(np.isfinite(ys[start:end]))
        if len(finite):
            part = ys[finite]
            kept += sorted({int(finite[0]), int(finite[part.argmin()]), int(finite[part.argmax()]), int(finite[-1])})
        else:
            kept.append(start)
        start = end
    return xs[kept], ys[kept]


def _paths(chart: Chart, x: Axis, y: Axis) -> Iterator[tuple[str, str]]:
    for band in chart.bands:
        yield f"band c{band.colour}", _area(band, x, y)
    for bars in chart.bars:
        yield f"bars c{bars.colour}", _rectangles(bars, x, y)
    if chart.level:
        yield "level", f"M{x.start:.1f} {y(chart.level[0]):.1f}H{x.end:.1f}"
    if chart.mark:
        yield "level", f"M{x(chart.mark[0]):.1f} {y.start:.1f}V{y.end:.1f}"
    for curve in chart.curves:
        width = " many-points" if len(curve.xs) > MANY_POINTS and curve.style == "plain" else ""
        yield f"line {curve.style} c{curve.colour}{width}", _line(curve, x, y)


def _line(curve: Curve, x: Axis, y: Axis) -> str:
    xs, ys = thinned(curve.xs, curve.ys)
    parts, gap = [], True
    for left, top in zip(x(xs).tolist(), y(ys).tolist()):
        if math.isfinite(top):
            parts.append(f"{'M' if gap else 'L'}{left:.1f} {top:.1f}")
        gap = not math.isfinite(top)
    return "".join(parts)


def _area(band: Band, x: Axis, y: Axis) -> str:
    """Of one point, which has no area, an upright line."""
    finite = np.isfinite(band.low) & np.isfinite(band.high)
    if not finite.any():
        return ""
    lower = thinned(band.xs[finite], band.low[finite])
    upper = thinned(band.xs[finite], band.high[finite])
    xs = np.concatenate([lower[0], upper[0][::-1]])
    ys = np.concatenate([lower[1], upper[1][::-1]])
    return "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in zip(x(xs).tolist(), y(ys).tolist())) + "Z"


def _rectangles(bars: Bars, x: Axis, y: Axis) -> str:
    lefts, rights = x(bars.xs - bars.width / 2).tolist(), x(bars.xs + bars.width / 2).tolist()
    bottoms, tops = y(bars.base).tolist(), y(bars.base + bars.heights).tolist()
    return "".join(
        f"M{left:.1f} {bottom:.1f}V{top:.1f}H{right:.1f}V{bottom:.1f}Z"
        for left, right, bottom, top in zip(lefts, rights, bottoms, tops)
    )


def _legend(chart: Chart) -> Iterator[tuple[str, str]]:
    """Nothing where a single line is all there is."""
    lines = [(f"line c{curve.colour}", curve.label) for curve in chart.curves if curve.label]
    areas = [(f"area c{band.colour}", band.label) for band in chart.bands]
    areas += [(f"area bars c{bars.colour}", bars.label) for bars in chart.bars]
    others = [("level", one[1]) for one in (chart.level, chart.mark) if one]
    if len(lines) + len(areas) + len(others) > 1:
        yield from [*lines, *areas, *others]


def _axes(chart: Chart) -> tuple[Axis, Axis]:
    xs = [curve.xs for curve in chart.curves] + [band.xs for band in chart.bands]
    xs += [part.xs + side * part.width / 2 for part in chart.bars for side in (-1, 1)]
    ys = [curve.ys for curve in chart.curves] + [side for band in chart.bands for side in (band.low, band.high)]
    ys += [side for part in chart.bars for side in (part.base, part.base + part.heights)]
    ys += [np.array([chart.level[0]])] if chart.level else []
    left, right = _range(xs, margin=0.0 if chart.bars else MARGIN)
    low, high = _range(ys, margin=MARGIN, from_zero=chart.from_zero)
    return Axis(left, right, LEFT, RIGHT), Axis(low, high, BOTTOM, TOP)


def _range(parts: list[np.ndarray], *, margin: float, from_zero: bool = False) -> tuple[float, float]:
    """What is shown of finite values; (0, 1) where there are none."""
    values = np.concatenate([*parts, np.zeros(0)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if from_zero and low >= 0:
        return 0.0, (1 + margin) * high or 1.0
    around = margin * (high - low) if high > low else 0.05 * abs(high) or 0.5
    return low - around, high + around


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` + 1 round numbers from ``low`` to ``high``."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (*_STEPS, 20.0) if step * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _labels(ticks: list[float], *, scaled: bool = True) -> tuple[list[tuple[float, str]], str]:
    """Ticks with their text, and the power of ten that all are to be multiplied by, as text, where that is shorter."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    power = math.floor(math.log10(largest) + 1e-9) if largest else 0
    power = power if scaled and not -3 <= power <= 4 else 0
    values = [tick / 10.0**power for tick in ticks]
    step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    decimals = next((n for n in range(8) if abs(step * 10**n - round(step * 10**n)) < 1e-6), 8)
    texts = [f"{value:.{decimals}f}".replace("-", "−") for value in values]
    return list(zip(ticks, texts)), f"×1e{power}" if power else ""
