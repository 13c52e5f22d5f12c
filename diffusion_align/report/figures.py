"""The figures of the report: which metrics each shows, and how it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from diffusion_align.report.charts import (
    Chart,
    Panel,
    held_out_charts,
    metric_charts,
    panel_charts,
    reward_chart,
    reward_component_keys,
    time_chart,
)
from diffusion_align.report.metrics import Described, Row, natural_x, numeric_keys, series
from diffusion_align.report.svg import shapes

MAX_OTHER_METRICS = 24
PREFERENCE_PANELS = (
    Panel({"rewards/accuracies": "accuracy"}, (0.5, "chance")),
    Panel({"rewards/margins": "margin"}, (0.0, "reference")),
    Panel({"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, (0.0, "reference"), title="Implicit reward"),
    Panel({"error/winner": "winner", "error/loser": "loser"}, (0.0, "reference"), title="Error − the reference's"),
    Panel({"kl/winner": "winner", "kl/loser": "loser"}, title="KL to the reference, per step"),
    Panel({"error/winner_ratio": "winner"}, (1.0, "reference")),
    Panel({"drift": "drift"}),
)
SCORE_PANELS = (
    Panel({"accuracy": "trained on", "eval/accuracy": "held out"}, (0.5, "chance")),
    Panel({"margin": "trained on", "eval/margin": "held out"}, (0.0, "no preference")),
    Panel({"scores/chosen": "chosen", "scores/rejected": "rejected"}, (0.0, "0"), title="Scores"),
)
COMPLETION_PANELS = (
    Panel(
        {"completions/mean_length": "mean", "completions/min_length": "shortest", "completions/max_length": "longest"}
    ),
    Panel({"completions/clipped_ratio": "without"}),
    Panel({"entropy": "entropy"}, title="Entropy per token"),
)
CLIP_PANELS = (
    Panel(
        {"clip_ratio/region_mean": "either side", "clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"},
        unit="fraction of actions",
        smooth=False,
    ),
)
RATIO_PANELS = (
    Panel(
        {"ratio/mean": "mean", "ratio/max": "largest", "ratio/min": "smallest"},
        (0.0, "as sampled"),
        title="Importance ratio",
        unit="ratio − 1",
        less=1.0,
        smooth=False,
    ),
    Panel({"ratio/first_pass_deviation": "deviation"}, smooth=False),
)
NORM_PANELS = (Panel({"grad_norm": "norm"}, smooth=False),)


class Figure(NamedTuple):
    """A figure of the report: its charts, their x, the metrics (any one is enough), and how to read it."""

    draw: Callable[[Sequence[Row]], Sequence[Chart]]
    x: str
    keys: Sequence[str]
    reading: str


def _of_panels(panels: Sequence[Panel], reading: str) -> Figure:
    keys = [key for panel in panels for key in panel.lines]
    return Figure(functools.partial(panel_charts, shown=panels), "step", keys, reading)


_FIGURES = {
    "reward": Figure(
        reward_chart,
        "epoch",
        ("reward",),
        "The mean reward of each epoch's samples, scored before the updates on them. Bands that do not overlap "
        "are a real difference.",
    ),
    "gold": Figure(
        held_out_charts,
        "epoch",
        ("gold", "gold_stderr", "diversity"),
        "Measured on the same prompts and the same noise every time; not trained on. If the training reward rises "
        "while the held-out reward falls, the reward is being hacked; a diversity that falls towards 0 means that all "
        "samples become one.",
    ),
    "preference": _of_panels(
        PREFERENCE_PANELS,
        "How often, and by how much, the policy prefers the chosen sample more than the reference does. The loss only "
        "depends on the gap between chosen and rejected: both rewards below 0, or both errors above 0, mean that both "
        "became less likely. A winner's error that keeps rising is divergence.",
    ),
    "score": _of_panels(
        SCORE_PANELS,
        "How often, and by how much, the chosen completion scores higher. Held-out pairs that fall behind those "
        "trained on are overfitting.",
    ),
    "completions": _of_panels(
        COMPLETION_PANELS,
        "How long the completions are, how many the length limit cut off before their end, and how undecided the "
        "policy is about the next token. Lengths that run away, or an entropy that falls towards 0, mean that a "
        "reward is exploited.",
    ),
    "clip": _of_panels(
        CLIP_PANELS,
        "Share of actions (steps or tokens) whose gradient the clip removed. Near 0 the clip does nothing; near 1 most "
        "of the gradient is lost.",
    ),
    "ratio": _of_panels(
        RATIO_PANELS,
        "Probability of a sampled action (step or token) now, divided by its probability when it was sampled. On the "
        "first pass nothing has been updated yet, so any deviation from 1 is numerical.",
    ),
    "norm": _of_panels(NORM_PANELS, "The norm of each update's gradient."),
    "time": Figure(
        time_chart,
        "epoch",
        ("time/sample", "time/score", "time/update", "time/evaluation", "time/grid", "time/epoch"),
        "Where the seconds of each epoch went.",
    ),
}
_KL = ("kl", "kl_path", "kl_coef")


def figures(rows: Sequence[Row], described: Described) -> Iterator[dict[str, Any]]:
    for name, (draw, x, keys, reading) in _FIGURES.items():
        if set(numeric_keys(rows, x=x)).intersection(keys):
            yield _figure(draw(rows), reading)
        if name == "reward" and len(components := reward_component_keys(rows)) > 1:
            yield _figure(metric_charts(rows, components), "The rewards that were logged, one by one.")
        if name == "preference" and (kl := [key for key in _KL if key in numeric_keys(rows, x="step")]):
            titles = {key: described[key][0] for key in kl if key in described} | {"kl_coef": "Price of the KL"}
            panels = [Panel({key: "KL"}, title=titles.get(key, key)) for key in kl]
            yield _figure(panel_charts(rows, panels), " ".join(described[key][2] for key in kl if key in described))
    for key in _own(rows, described):
        yield _figure(metric_charts(rows, [key], described=described), described[key][2])


def _shown() -> set[str]:
    """Metrics that a plot of the report shows."""
    return {key for figure in _FIGURES.values() for key in figure.keys} | {*_KL, "reward_stderr", "kl_path_stderr"}


def _own(rows: Sequence[Row], described: Described) -> list[str]:
    """Metrics that the method declares and no plot of the report shows, as far as they were logged."""
    return [key for key in described if key in {*_drawable(rows)} - _shown()]


def _drawable(rows: Sequence[Row]) -> list[str]:
    return [key for key in numeric_keys(rows) if len(series(rows, key, x=natural_x([rows], key))[0])]


def other_metrics(rows: Sequence[Row], described: Described) -> dict[str, Any] | None:
    """Every metric that no figure above shows, so that an algorithm that declares nothing is reported as well."""
    shown = _shown() | {*_own(rows, described), *reward_component_keys(rows)}
    keys = [key for key in _drawable(rows) if key not in shown]
    if not keys:
        return None
    left_out = keys[MAX_OTHER_METRICS:]
    reading = f"Not plotted, see metrics.jsonl: {', '.join(left_out)}." if left_out else ""
    return _figure(metric_charts(rows, keys[:MAX_OTHER_METRICS]), reading)


def _figure(charts: Sequence[Chart], reading: str) -> dict[str, Any]:
    return {"panels": [shapes(chart) for chart in charts], "reading": reading}
