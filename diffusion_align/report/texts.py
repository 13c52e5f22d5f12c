"""Prompts and completions of a text run, as tables of its report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.report.metrics import is_number

FOLDED_BEYOND = 400  # characters of a text that are shown before the rest is folded away
FOLDED_LINES = 8
MAX_ROWS = 32  # of a table; the files hold the others


@dataclass(frozen=True)
class Passage:
    """A text as the report shows it, with its reward, if any; ``rest`` is folded away."""

    start: str
    rest: str = ""
    reward: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of passages under ``columns``, and a note on what is missing."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Passage]]
    note: str


def before_after_table(samples: Path) -> Table | None:
    """The prompts with their completions before and after training; None if there is no such file."""
    path = samples / "before_after.jsonl"
    if not path.is_file():
        return None
    return _table(path, "", {"Before": ("before", "reward_before"), "After": ("after", "reward_after")})


def samples_table(path: Path, label: str) -> Table:
    """The prompts and completions of one epoch."""
    return _table(path, label, {"Completion": ("completion", "reward")})


def _table(path: Path, label: str, columns: Mapping[str, tuple[str, str]]) -> Table:
    """``columns``: heading -> the keys of its text and of its reward."""
    rows, damaged = [], 0
    rewards: dict[str, list[float]] = {heading: [] for heading in columns}
    for line in _lines(path):
        try:
            row = json.loads(line)
            passages = [passage(plain_text(row["prompt"]))]
            for text, reward in columns.values():
                if not isinstance(row[text], str):
                    raise TypeError(text)
                passages.append(passage(row[text], row.get(reward)))
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
            continue
        rows.append(passages)
        for heading, (_, reward) in columns.items():
            rewards[heading] += [row[reward]] if _finite(row.get(reward)) else []
    means = {heading: f", mean reward {math.fsum(x) / len(x):.3g}" if x else "" for heading, x in rewards.items()}
    notes = []
    if len(rows) > MAX_ROWS:
        notes.append(f"The first {MAX_ROWS} of {len(rows)} samples; the others are in samples/{path.name}.")
    if damaged:
        lines = "line is damaged and was" if damaged == 1 else "lines are damaged and were"
        notes.append(f"{damaged} {lines} left out.")
    return Table(
        label, ("Prompt", *(heading + means[heading] for heading in columns)), rows[:MAX_ROWS], " ".join(notes)
    )


def plain_text(text: Any) -> str:
    """A prompt as lines: a text as it is, of a conversation a line ``role: content`` for each message.

    Raises:
        TypeError, KeyError: neither of them.
    """
    if isinstance(text, str):
        return text
    if not isinstance(text, list) or not text:
        raise TypeError("neither a text nor messages")
    return "\n".join(f"{message['role']}: {_content(message['content'])}" for message in text)


def passage(text: str, reward: Any = None) -> Passage:
    """The text, folded where it is long, and its reward if that is a number."""
    # A lone half of a surrogate pair is valid JSON and cannot be written as UTF-8.
    text = text.encode("utf-8", "replace").decode("utf-8")
    shown = f"{reward:.3g}" if _finite(reward) else ""
    start = "\n".join(text[:FOLDED_BEYOND].split("\n")[:FOLDED_LINES])
    if len(start) == FOLDED_BEYOND:  # at the end of a word, if there is one
        start = start[: start.rfind(" ", FOLDED_BEYOND // 2) + 1] or start
    rest = text[len(start) :].removeprefix("\n")
    short = len(rest) < FOLDED_BEYOND // 4 and rest.count("\n") < 2  # not worth folding
    return Passage(text, "", shown) if short else Passage(start, rest, shown)


def _lines(path: Path) -> list[bytes]:
    try:
        return [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except OSError:
        return [b""]


def _content(content: Any) -> str:
    """A message's text: itself, nothing, or its parts of type text."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _finite(value: Any) -> bool:
    return is_number(value) and abs(value) <= 1e300  # JSON knows whole numbers beyond any float
