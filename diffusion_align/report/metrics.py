"""Reading ``metrics.jsonl``: one JSON object per row, of two kinds, one per optimizer update and one per epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
COUNTERS = {"step", "epoch"}
Described = Mapping[str, tuple[str, str, str]]
"""Metric -> its title, unit and how it is read."""
_FAR = "How far the policy was from the reference"
IMAGE_KL = {
    "kl": ("KL to the reference, per step", "nats per step", f"{_FAR}, for one step."),
    "kl_path": (
        "KL to the reference, all trained steps",
        "nats over all trained steps",
        "The same, over all trained steps.",
    ),
}
TEXT_KL = {
    "kl": ("KL to the reference, per token", "nats per token", f"{_FAR}, for one token."),
    "kl_path": ("KL to the reference, per completion", "nats per completion", "The same, summed over a completion."),
}
NAMES = {
    "reward": "reward",
    "rewards/accuracies": "implicit accuracy",
    "rewards/margins": "implicit margin",
    "accuracy": "accuracy",
    "margin": "margin",
    "eval/accuracy": "held-out accuracy",
    "gold": "held-out reward",
    "diversity": "diversity",
}
"""Metrics of an epoch by which a run is judged, as a text calls them."""


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``, in file order.

    A last line without its newline that does not parse was cut off by a kill and is ignored; blank lines are skipped.

    Raises:
        ValueError: the file does not exist, or a line other than a cut last one is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the metrics.jsonl of a run folder")
    lines = path.read_bytes().split(b"\n")  # bytes, because a cut may fall inside a character
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) and line.lstrip().startswith(b"{"):
                break
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not a JSON object: remove that line or restore the file")
        rows.append(row)
    return rows


def read_evaluation(path: Path) -> dict[str, Any]:
    """``evaluation.json``: ``best``, None or its ``epoch`` and ``gold``, and why the run ``stopped``; {} if not there.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    best = found.get("best") if isinstance(found, dict) else 0
    if best is None or (isinstance(best, dict) and all(is_number(best.get(key)) for key in ("epoch", "gold"))):
        return found
    raise ValueError(f"{path} was not written by a run: remove it")


def read_descriptions(path: Path, config: object) -> dict[str, tuple[str, str, str]]:
    """Key -> title, unit and reading of metrics, from ``metrics.json``.

    Runs of before did not write it: then their settings tell whether a KL is of tokens or of steps.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(key): (str(one["title"] or key), str(one["unit"]), str(one["reading"])) for key, one in found.items()
        }
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return dict(TEXT_KL if isinstance(config, dict) and "max_completion_length" in config else IMAGE_KL)


def is_number(value: object) -> bool:
    """True for ints and floats, NaN included; False for bools, strings, lists and None."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def plus_minus(value: float, error: float) -> str:
    """``value ± error`` to two digits of the error; the value alone where no error is known."""
    if not math.isfinite(value) or not math.isfinite(error):
        return f"{value:.4g}"
    decimals = 3 if error <= 0 else min(12, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


class MetricTable(list[Row]):
    """Rows that are not changed any more, with their numbers by metric, so that each row is looked at once.

    ``series`` and ``numeric_keys`` make one of other rows.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        super().__init__(rows)
        self._finite: dict[str | None, set[str]] = {None: set(), **{x: set() for x in COUNTERS}}
        self._points: dict[str, dict[str, dict[float, float]]] = {x: {} for x in COUNTERS}
        for row in self:
            numbers = {key: value for key, value in row.items() if is_number(value)}
            finite = {key for key, value in numbers.items() if math.isfinite(value)}
            self._finite[None] |= finite
            for x in COUNTERS & numbers.keys():
                self._finite[x] |= finite
                points, at = self._points[x], numbers[x]
                for key, value in numbers.items():
                    points.setdefault(key, {})[at] = value

    def points(self, key: str, x: str) -> dict[float, float]:
        """The last value at each ``x``."""
        return self._points[x].get(key, {})

    def finite_keys(self, x: str | None) -> set[str]:
        """Metrics with a finite number, in rows that hold the counter ``x`` if one is given."""
        return self._finite[x]


def _table(rows: Iterable[Row]) -> MetricTable:
    return rows if isinstance(rows, MetricTable) else MetricTable(rows)


def series(rows: Iterable[Row], key: str, *, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """``(xs, values)`` of one key, float64 and sorted by x; rows that lack the key or ``x`` are left out.

    Where several rows share an x the last one counts: a resumed run may have written a row twice.
    """
    found = _table(rows).points(key, x)
    xs = sorted(found)
    return np.array(xs, dtype=np.float64), np.array([found[value] for value in xs], dtype=np.float64)


def numeric_keys(rows: Iterable[Row], *, x: str | None = None) -> list[str]:
    """Keys that hold a finite number in at least one row, sorted; the counters ``step`` and ``epoch`` are left out.

    With ``x`` only the rows that hold that counter are looked at: the keys that can be plotted over it.
    """
    return sorted(_table(rows).finite_keys(x) - COUNTERS)


def present(rows: Iterable[Row], keys: Sequence[str], *, x: str | None = None) -> list[str]:
    """Those of ``keys`` that ``numeric_keys`` finds.

    Raises:
        ValueError: none of them.
    """
    known = numeric_keys(rows, x=x)
    found = [key for key in keys if key in known]
    if not found:
        over = f" over {x}" if x else ""
        raise ValueError(f"no row holds {', '.join(keys)}: the metrics{over} are {', '.join(known) or 'empty'}")
    return found


def natural_x(runs: Sequence[Sequence[Row]], key: str) -> str:
    """``"epoch"`` when the key comes at most once per epoch in every run, otherwise ``"step"``."""
    for rows in runs:
        steps, _ = series(rows, key, x="step")
        epochs, _ = series(rows, key, x="epoch")
        if len(epochs) < len(steps):
            return "step"
    return "epoch"
