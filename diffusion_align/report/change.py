"""What a run changed: a metric at its start and at its end, and their difference in standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_align.report.metrics import NAMES, Row, plus_minus, series

MIN_FOR_ERROR = 5  # fewer updates tell too little about their spread for a standard error


class Change(NamedTuple):
    """A metric at the start and at the end.

    Attributes:
        before, after: its means.
        errors: their standard errors; nan where they are not known.
        places: the epochs that the two are of; or of updates, the number of all.
    """

    before: float
    after: float
    errors: tuple[float, float]
    places: tuple[float, ...]

    @property
    def standard_errors(self) -> float:
        """``after - before`` over its standard error, that of independent means; nan where it is not known."""
        error = math.hypot(*self.errors)
        return (self.after - self.before) / error if error > 0 else math.nan


def change_of_epochs(rows: Sequence[Row], key: str) -> Change | None:
    """From the first to the last epoch whose row holds ``key``, with the errors in ``key_stderr``; None without any."""
    epochs, values = series(rows, key, x="epoch")
    if not len(epochs):
        return None
    known = dict(zip(*series(rows, f"{key}_stderr", x="epoch")))
    errors = known.get(epochs[0], math.nan), known.get(epochs[-1], math.nan)
    return Change(float(values[0]), float(values[-1]), errors, (float(epochs[0]), float(epochs[-1])))


def change_of_updates(rows: Sequence[Row], key: str) -> Change | None:
    """From the first to the last tenth of the updates; None without any."""
    _, values = series(rows, key)
    if not len(values):
        return None
    (before, first), (after, last) = mean_of_tenth(values, first=True), mean_of_tenth(values, first=False)
    return Change(before, after, (first, last), (len(values),))


def mean_of_tenth(values: np.ndarray, *, first: bool) -> tuple[float, float]:
    """The mean of the first or last tenth, and its standard error if it has ``MIN_FOR_ERROR`` values, else nan."""
    size = max(1, len(values) // 10)
    part = values[:size] if first else values[-size:]
    error = part.std(ddof=1) / math.sqrt(size) if size >= MIN_FOR_ERROR else math.nan
    return float(part.mean()), float(error)


def result_line(rows: Sequence[Row]) -> str | None:
    """``reward -0.13 ± 0.24 → 1.15 ± 0.10, +4.9 standard errors (...)``, and in brackets what is compared.

    That is the held-out reward, where it was evaluated twice; else the reward of two epochs' own samples; else an
    accuracy of the updates. None where nothing was measured twice.
    """
    compared = {
        "gold": "after epochs {:.0f} and {:.0f}",
        "reward": "samples trained on in epochs {:.0f} and {:.0f}",
    }
    for key, what in compared.items():
        change = change_of_epochs(rows, key)
        if change is not None and change.places[0] < change.places[1]:
            return _line(key, change, what.format(*change.places))
    for key in ("rewards/accuracies", "accuracy"):
        change = change_of_updates(rows, key)
        if change is not None and change.places[0] > 1:
            count = int(change.places[0])
            part = "tenth " if count >= 20 else ""
            return _line(key, change, f"the first and the last {part}of {count} updates")
    return None


def _line(key: str, change: Change, what: str) -> str:
    before, after = (plus_minus(*one) for one in zip((change.before, change.after), change.errors))
    known = math.isfinite(change.standard_errors)
    far = f", {change.standard_errors:+.1f} standard errors" if known else ""
    return f"{NAMES[key]} {before} → {after}{far} ({what})"
