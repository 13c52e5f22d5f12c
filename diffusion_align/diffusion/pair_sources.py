"""Where preference pairs are read from: rows of the embedded drawings, or a table of ``diffusion_align.training``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusion_align.assets.preferences import load_preferences
from diffusion_align.training import tables
from diffusion_align.training.errors import ConfigError
from diffusion_align.training.tables import ListTable, Table, TableSource

if TYPE_CHECKING:
    from diffusion_align.diffusion.pairs import PairsConfig

EMBEDDED = "emoji_style"
LAYOUTS = (
    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"prompt": "caption", "first": "jpg_0", "second": "jpg_1", "first_wins": "label_0"},
)


def table_source(config: PairsConfig) -> TableSource:
    """Where the rows of anything but the embedded drawings are; a folder may hold a file called pairs."""
    return TableSource(
        "pairs",
        config.source,
        config.split,
        config.max_pairs,
        limit="max_pairs",
        stem="pairs",
        allowed=f"{EMBEDDED}, {tables.FILES}",
    )


def open_table(config: PairsConfig) -> Table:
    """The rows of ``config.source``, pictures neither looked at nor decoded.

    Raises:
        ConfigError: it is not there, cannot be read, or does not fit the other settings.
    """
    return _embedded(config) if config.source == EMBEDDED else tables.open_table(table_source(config))


def _embedded(config: PairsConfig) -> ListTable:
    problems = [f"pairs.columns cannot be used with {EMBEDDED}: leave it out"] if config.columns else []
    if config.split not in ("train", "heldout", "all"):
        problems.append(f"pairs.split={config.split!r} is not known: choose train, heldout or all")
    if problems:
        raise ConfigError(problems)
    pairs = load_preferences(config.split)  # type: ignore[arg-type]
    return ListTable([{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs], None)
