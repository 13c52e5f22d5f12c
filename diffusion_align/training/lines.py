"""The lines that a run prints: what it trains, and one per epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from diffusion_align.invocation import shown_path
from diffusion_align.report.metrics import NAMES, is_number, plus_minus
from diffusion_align.training.config import TrainingConfig

_HELD_OUT = ("gold", "eval/accuracy")


def start_lines(config: TrainingConfig, *, done: int, device: str, processes: int) -> tuple[str, str]:
    """What is trained, how long and where; and where the report is written. ``done``: finished epochs."""
    every = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    epochs = f"epochs {done + 1} to {config.epochs}" if done else every
    epochs = epochs if done < config.epochs else f"{every}, all finished before"
    places = f"{processes} processes on {device}" if processes > 1 else device
    model = shown_path(config.model) if os.path.isabs(config.model) else config.model
    what = f"training {model} with {config.method}: {epochs}, {places}, mixed_precision={config.mixed_precision}"
    return what, f"report: {shown_path(config.output_dir / 'report.html')}"


def epoch_line(row: Mapping[str, Any], *, epochs: int, headline: str, left: float) -> str:
    """``epoch 3/16  reward 0.08 ± 0.24  KL 0.4 nats  11 s  left 2:20``; what ``row`` lacks is left out.

    Args:
        row: the metrics of an epoch and of its last update; ± is the standard error, the metric's ``_stderr``.
        epochs: of the whole run.
        headline: the metric that comes first.
        left: seconds until the end.
    """
    parts = [f"epoch {row['epoch']}/{epochs}"]
    for key in dict.fromkeys((headline, *_HELD_OUT)):
        if is_number(row.get(key)):
            parts.append(f"{NAMES.get(key, key)} {plus_minus(row[key], row.get(f'{key}_stderr', math.nan))}")
    if is_number(row.get("kl_path")):
        parts.append(f"KL {row['kl_path']:.3g} nats")
    parts.append(duration(row["time/epoch"]))
    if row["epoch"] < epochs:
        parts.append(f"left {clock(left)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``0.31 s``, ``11 s``; from two minutes on like ``clock``."""
    if seconds >= 120:
        return clock(seconds)
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.2g} s"


def clock(seconds: float) -> str:
    """Minutes and seconds, ``2:20``, or also hours, ``31:02:20``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
