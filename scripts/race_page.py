"""The table and the figure of docs/which_method.md, from the rows of the race."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from race_course import ENTRANTS, PLAIN, SEEDS, Course, Row

from diffusion_align.report.plots import INK, PALETTE, draw_band, draw_line, label_axes, new_figure

T_OF_FOUR = 2.776
"""The 97.5 % point of Student's t with four degrees of freedom: two methods, three seeds each, one variance."""
BEGIN, END = "<!-- python scripts/race.py table -->", "<!-- end of the table -->"
TITLES = {"aesthetic": "the aesthetic reward", "jpeg_compressibility": "small JPEG files"}
MARK = "†"
"""Of a held-out reward below that of DDPO with every step by more than two standard errors."""
HEADER = (
    "| method | learning rate | passes to the target | fewer than with every step | reward | held-out reward | "
    "diversity | KL, nats | CPU-seconds |"
)


@dataclass(frozen=True)
class Finish:
    """The final runs of one method.

    Attributes:
        method: its name.
        rows: of the seeds.
        reached: those of them that reached the target.
        at: the evaluation there of each of these; KL of a run that went on to its end is that there.
    """

    method: str
    rows: Sequence[Row]
    reached: Sequence[Row]
    at: Sequence[Row]

    @property
    def complete(self) -> bool:
        """Whether every seed has reached the target."""
        return len(self.at) == len(SEEDS)

    def mean(self, key: str) -> float:
        """Over the seeds that reached the target, there."""
        return statistics.mean(e[key] for e in self.at)


def finish(course: Course, method: str) -> Finish:
    """The final runs of ``method``."""
    rows = course.of(method, "final")
    found = [(row, e) for row in rows if (e := course.reached(row)) is not None]
    at = [{"kl": row["evaluations"][-1]["kl"]} | e for row, e in found]
    return Finish(method, rows, [row for row, _ in found], at)


def fewer(plain: Finish, other: Finish) -> tuple[float, float, float] | None:
    """How many times fewer passes ``other`` takes, and its 95 % interval; None where a seed of ``other`` did not reach
    the target, or one of ``plain`` has not run.

    The ratio of the geometric means; the interval is Student's for the difference of the means of the log-passes. A run
    of ``plain`` that did not reach the target counts with what it spent, so the ratio is then a lower bound.
    """
    if not (len(plain.rows) == len(SEEDS) and plain.at and other.complete):
        return None
    spent = [row["passes"] for row in plain.rows if row not in plain.reached]
    logs = [[math.log(passes) for passes in [*spent, *(e["passes"] for e in plain.at)]]]
    logs += [[math.log(e["passes"]) for e in other.at]]
    difference = statistics.mean(logs[0]) - statistics.mean(logs[1])
    error = _standard_error(*logs)
    low, high = difference - T_OF_FOUR * error, difference + T_OF_FOUR * error
    return math.exp(difference), math.exp(low), math.exp(high)


def falls_below(plain: Finish, other: Finish) -> bool:
    """Whether the held-out reward at the target is more than two standard errors below that of ``plain``, by the seeds
    that reached it."""
    if other.method == plain.method or min(len(plain.at), len(other.at)) < 2:
        return False
    values = [[e["held_out"] for e in one.at] for one in (plain, other)]
    return statistics.mean(values[1]) < statistics.mean(values[0]) - 2 * _standard_error(*values)


def _standard_error(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the difference of two means."""
    return math.sqrt(statistics.variance(first) / len(first) + statistics.variance(second) / len(second))


def tables(courses: Sequence[Course]) -> str:
    """Markdown: a table per model and reward, the methods in the order of their passes; those that lost come last."""
    return "\n\n".join(_table(course) for course in courses if course.target is not None)


def put_between_marks(page: str, text: str) -> str:
    """``page`` with ``text`` between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _table(course: Course) -> str:
    methods = [method for method in ENTRANTS if course.of(method, "final")]
    finishes = sorted((finish(course, method) for method in methods), key=_place)
    plain = finish(course, PLAIN)
    title = f"**{course.model}, {TITLES[course.reward]}**: the target is {course.target:.3f}"
    lines = [f"{title}.", "", HEADER, "|---" * 9 + "|"]
    lines += [_line(_cells(plain, one)) for one in finishes]
    for method, entrant in ENTRANTS.items():
        if course.reward in entrant.without:
            lines.append(_line([method, "", entrant.without[course.reward], *[""] * 6]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _place(one: Finish) -> tuple[int, float]:
    """The more seeds reach the target, and in the fewer passes, the earlier."""
    return -len(one.at), one.mean("passes") if one.at else 0.0


def _cells(plain: Finish, one: Finish) -> list[str]:
    rate = f"{one.rows[0]['learning_rate']:g}"
    if not one.at:
        best = max(e["reward"] for row in one.rows for e in row["evaluations"])
        spent = max(row["evaluations"][-1]["passes"] for row in one.rows)
        return [one.method, rate, f"not in {spent:,}; at most {best:.3f}", *[""] * 6]
    passes = [e["passes"] for e in one.at]
    some = "" if len(one.at) == len(SEEDS) else f" ({len(one.at)} of {len(one.rows)} seeds)"
    ratio = fewer(plain, one)
    times = "" if ratio is None else "1" if one.method == PLAIN else "{:.1f} × ({:.1f} to {:.1f})".format(*ratio)
    if ratio is not None and not plain.complete:
        times = f"over {times}"
    mark = f" {MARK}" if falls_below(plain, one) else ""
    return [
        one.method,
        rate,
        f"{one.mean('passes'):,.0f} ({min(passes):,} to {max(passes):,}){some}",
        times,
        f"{one.mean('reward'):.2f}",
        f"{one.mean('held_out'):.3f}{mark}",
        f"{one.mean('diversity'):.3f}",
        f"{one.mean('kl'):.1f}",
        f"{one.mean('cpu_seconds'):.0f}",
    ]


def draw(courses: Sequence[Course]) -> Figure:
    """Reward and held-out reward over passes: the mean of the seeds and their range, a line per method.

    A run that has ended counts on with its last evaluation.
    """
    courses = [course for course in courses if course.target is not None]
    figure, panels = new_figure(2 * len(courses), columns=2)
    colours = dict(zip(ENTRANTS, [*PALETTE, "#888888"], strict=True))
    known: dict[str, Any] = {}
    for i, course in enumerate(courses):
        for axes, key, name in zip(panels[2 * i :], ("reward", "held_out"), ("reward", "CLIP score, held out")):
            for method, colour in colours.items():
                rows = course.of(method, "final")
                if not rows:
                    continue
                xs, values = _curves(rows, lambda e: e[key])  # noqa: B023 - called here
                draw_line(axes, xs, values.mean(0), colour, label=method)
                draw_band(axes, xs, values.min(0), values.max(0), colour)
                known[method] = axes.lines[-1]
            if key == "reward":
                axes.axhline(course.target, color=INK, linewidth=0.8, linestyle="--", zorder=1)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            label_axes(axes, f"{course.model}, {TITLES[course.reward]}: {name}", "passes through the network", name)
    figure.legend(
        known.values(), known, frameon=False, fontsize=8.5, labelcolor=INK, ncols=4, loc="outside lower center"
    )  # fmt: skip
    return figure


def _curves(rows: Sequence[Row], value: Callable[[Row], float]) -> tuple[np.ndarray, np.ndarray]:
    """Passes (n,) and the value of each run (runs, n) there, between its evaluations by straight lines."""
    seen = [[e for e in row["evaluations"] if e["passes"] > 0] for row in rows]
    first = max(one[0]["passes"] for one in seen)
    xs = np.array(sorted({e["passes"] for one in seen for e in one if e["passes"] >= first}), dtype=float)
    return xs, np.stack([np.interp(xs, [e["passes"] for e in one], [value(e) for e in one]) for one in seen])
