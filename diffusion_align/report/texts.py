"""What the report of a text run shows that no image run has: its samples, its plots, and how it says them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.report.metrics import Row, is_number, series
from diffusion_align.report.plots import Panel

FOLDED_BEYOND = 400  # characters of a text that are shown before the rest is folded away
FOLDED_LINES = 8
MAX_ROWS = 32  # of a table; the files hold the others

COMPLETION_PANELS: tuple[Panel, ...] = (
    (
        "completions/mean_length",
        "Length of the completions",
        {
            "completions/mean_length": "mean",
            "completions/min_length": "shortest",
            "completions/max_length": "longest",
        },
        None,
    ),
    ("completions/clipped_ratio", "Completions without an end", {"completions/clipped_ratio": "without"}, None),
    ("entropy", "Entropy of a token", {"entropy": "entropy"}, None),
)
SCORE_PANELS: tuple[Panel, ...] = (
    ("accuracy", "Accuracy", {"accuracy": "trained on", "eval/accuracy": "held out"}, (0.5, "chance")),
    ("margin", "Score, chosen − rejected", {"margin": "trained on", "eval/margin": "held out"}, (0.0, "no preference")),
    ("scores/chosen", "Scores", {"scores/chosen": "chosen", "scores/rejected": "rejected"}, (0.0, "0")),
)

COMPLETION_READING = (
    "How long the completions are, how many the length limit cut off before their end, and how undecided the policy is "
    "about the next token. Lengths that run away, or an entropy that falls towards 0, mean that a reward is exploited."
)
SCORE_READING = (
    "How often, and by how much, the chosen completion scores higher. Held-out pairs that fall behind those trained on "
    "are overfitting."
)
PLOTS = (
    (SCORE_PANELS, SCORE_READING),
    (COMPLETION_PANELS, COMPLETION_READING),
)


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
    """The prompts with what was written before and after training; None if there is no such file."""
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


def completion_sentences(rows: Sequence[Row]) -> list[str]:
    """How long the completions were in the first epoch and in the last, and how many were cut off."""
    _, lengths = series(rows, "completions/mean_length", x="epoch")
    _, clipped = series(rows, "completions/clipped_ratio", x="epoch")
    if not len(lengths):
        return []
    change = f"went from {lengths[0]:.3g} to {lengths[-1]:.3g}" if len(lengths) > 1 else f"was {lengths[0]:.3g}"
    cut = f"; the limit cut {100 * clipped[-1]:.3g} % of them off in the last epoch" if len(clipped) else ""
    return [f"The mean length of completions {change} tokens{cut}."]


def held_out_sentences(rows: Sequence[Row]) -> list[str]:
    """The accuracy of a reward model on pairs it was not trained on."""
    _, accuracy = series(rows, "eval/accuracy", x="epoch")
    if not len(accuracy):
        return []
    if len(accuracy) == 1:
        return [f"On the held-out pairs it was {accuracy[0]:.3g} after the first epoch."]
    return [
        f"On the held-out pairs it was {accuracy[0]:.3g} after the first epoch and {accuracy[-1]:.3g} after the last."
    ]


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
