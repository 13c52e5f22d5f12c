"""Where prompts come from and which ones an epoch uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffusion_align.training.errors import ConfigError
from diffusion_align.training.randomness import generator

Prompt = tuple[str, dict[str, Any]]
"""Text and the metadata a reward receives with it."""
Item = TypeVar("Item")


def load_prompts(source: str | Path | Sequence[Any], *, shipped: dict[str, Path] | None = None) -> list[Prompt]:
    """Prompts with their metadata.

    Args:
        source: a list of texts or of mappings with a ``prompt`` key (the other keys are metadata), a ``.txt`` file (one
            prompt a line), a ``.jsonl`` file of such mappings, or the name of a shipped list.
        shipped: name -> file of the lists that come with the package.

    Raises:
        ConfigError: an unknown file or format, no prompts, or an entry that is not a prompt.
    """
    if isinstance(source, str | Path):
        path = (shipped or {}).get(str(source)) or Path(source).expanduser()
        if not path.is_file():
            names = f" and no shipped list has that name ({', '.join(sorted(shipped))})" if shipped else ""
            raise ConfigError([f"prompts={str(source)!r}: there is no such file{names}"])
        entries = _read(path)
    else:
        entries = list(source)
    prompts = [_entry(entry, i, source) for i, entry in enumerate(entries)]
    if not prompts:
        raise ConfigError([f"prompts={_short(source)} holds no prompt: give at least one"])
    return prompts


def items_of_epoch(items: Sequence[Item], seed: int, epoch: int, count: int) -> list[Item]:
    """``count`` prompts (or pairs) of ``epoch``: all in a new random order each pass, without gaps between epochs."""
    places = range(epoch * count, (epoch + 1) * count)
    turns = {place // len(items) for place in places}
    orders = {turn: torch.randperm(len(items), generator=generator(seed, "prompts", turn)).tolist() for turn in turns}
    return [items[orders[place // len(items)][place % len(items)]] for place in places]


def _read(path: Path) -> list[Any]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"prompts={str(path)!r} cannot be read: {error}"]) from None
    if path.suffix == ".txt":
        return lines
    if path.suffix != ".jsonl":
        raise ConfigError([f"prompts={str(path)!r}: use a .txt file (one prompt a line) or a .jsonl file"])
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            raise ConfigError([f"prompts={str(path)!r}: line {number} is not JSON"]) from None
    return entries


def _entry(entry: Any, index: int, source: Any) -> Prompt:
    if isinstance(entry, str) and entry.strip():
        return entry, {}
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str) and entry["prompt"].strip():
        return entry["prompt"], {k: v for k, v in entry.items() if k != "prompt"}
    raise ConfigError(
        [f"prompts={_short(source)}: entry {index} is {_short(entry)}, not a text or a mapping with a 'prompt'"]
    )


def _short(value: Any) -> str:
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 60 else text[:57] + "..."
