"""What the metrics of a method mean, as its trainer class declares them; a run keeps it in ``metrics.json``."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """Of one key in ``metrics.jsonl``.

    Attributes:
        title: of its plot.
        unit: of its axis, "nats a token" say.
        reading: one sentence that tells how it is read.
    """

    title: str
    unit: str = ""
    reading: str = ""
