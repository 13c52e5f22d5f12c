"""Prompts, preferences and labelled completions as tokens, from rows with TRL's columns.

``prompt``; ``prompt, chosen, rejected`` or ``chosen, rejected``; ``prompt, completion, label``: texts, or conversations
(lists of messages with role and content) that go through the tokenizer's chat template. The other columns stay with
the row, for rewards. Each difference from TRL is noted where it occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import Field

from diffusion_align.assets import shipped_text_prompts
from diffusion_align.data.schemas import BadRow, ColumnSchemas, RowsConfig, Source, bare_prompts, limit_of
from diffusion_align.data.sources import FILES, TableSource, first_rows, scalar, short
from diffusion_align.data.text_encoding import Encoded, Text, TextEncoder, checked_text, checked_texts, split_prompt
from diffusion_align.errors import ConfigError, together

Row = TypeVar("Row")
_PAIR = {"chosen": "chosen", "rejected": "rejected"}
_PROMPT, _LABEL = {"prompt": "prompt"}, {"label": "label"}
COLUMN_SCHEMAS: dict[str, ColumnSchemas] = {
    "prompts": (_PROMPT,),
    "preferences": (_PROMPT | _PAIR | _LABEL, _PROMPT | _PAIR, _PAIR | _LABEL, _PAIR),
    "labels": (_PROMPT | {"completion": "completion"} | _LABEL,),
}
"""The columns of each kind of row, under the names that are looked for by default."""
_PLACES = f"a list of rows, a .txt file of prompts, {FILES}"


class TextDataConfig(RowsConfig):
    """Where the rows come from."""

    places = _PLACES
    column_schemas = COLUMN_SCHEMAS
    limit, lines = "max_rows", "prompt"
    source: Source = Field(description=_PLACES)
    columns: dict[str, str] | None = Field(
        None, description="column names, ours -> the source's: prompt, chosen, rejected, completion, label"
    )
    max_rows: int | None = limit_of("rows")

    def table_source(self, name: str) -> TableSource:
        rows = self.source
        if isinstance(rows, list):
            rows = bare_prompts(rows, self.columns, _PROMPT)
        elif isinstance(rows, str):
            rows = str(shipped_text_prompts().get(rows, rows))
        return replace(super().table_source(name), source=rows)


@dataclass(frozen=True)
class PromptRow:
    """A prompt as the source has it, its tokens and the row's other columns."""

    prompt: Text
    ids: list[int]
    columns: dict[str, Any]


@dataclass(frozen=True)
class PreferenceRow:
    """Tokens of one preferred and one or more other completions; ``label`` is P(chosen is preferred)."""

    prompt: Text
    ids: list[int]
    chosen: list[int]
    rejected: list[list[int]]
    label: float = 1.0
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledRow:
    """Tokens of a completion that is desirable or not."""

    prompt: Text
    ids: list[int]
    completion: list[int]
    desirable: bool
    columns: dict[str, Any] = field(default_factory=dict)


def prompts_of(rows: Sequence[PromptRow | PreferenceRow | LabelledRow]) -> list[PromptRow]:
    """Each prompt once, in the order of the rows, with the other columns of its first row."""
    first = {tuple(row.ids): PromptRow(row.prompt, row.ids, row.columns) for row in reversed(rows)}
    return list(reversed(first.values()))


@dataclass(frozen=True)
class Truncation:
    """How many rows there are, how many of them were shortened, and how many bad ones were left out."""

    rows: int
    prompts: int
    completions: int
    left_out: int = 0

    def __str__(self) -> str:
        cut = f"of {self.rows} rows, {self.prompts} had the prompt cut on the left and {self.completions} a completion"
        return f"{cut} cut on the right" + (f"; left out: {self.left_out} bad rows" if self.left_out else "")


class Rows(NamedTuple, Generic[Row]):
    """The usable rows in the order of the source, and what became of their lengths."""

    rows: list[Row]
    truncation: Truncation


def prompt_rows(config: TextDataConfig, encoder: TextEncoder, *, name: str = "data") -> Rows[PromptRow]:
    """The prompts of ``config.source``, ready for ``rollout``; a bare text in a list of rows is a prompt.

    Args:
        config: where the rows are.
        encoder: makes tokens of them.
        name: what the setting behind ``config`` is called, for messages.

    Raises:
        ConfigError: everything that is wrong, at once.
    """

    def make(cells: dict[str, Any], columns: dict[str, Any]) -> tuple[PromptRow, Encoded]:
        prompt = checked_text(cells["prompt"], "the prompt")
        encoded = encoder.encode(prompt, [])
        return PromptRow(prompt, encoded.ids, columns), encoded

    return _rows(config, encoder, name, "prompts", make)


def preference_rows(config: TextDataConfig, encoder: TextEncoder, *, name: str = "data") -> Rows[PreferenceRow]:
    """Preferences; ``rejected`` may be a list of several, and a column ``label`` holds P(chosen is preferred).

    Without a column ``prompt``, or with a text there beside conversations, the prompt is what ``chosen`` and every
    ``rejected`` begin with, as in TRL. Of texts it ends with a word, where TRL cuts inside words. Conversations that
    repeat the prompt's messages are taken without them, which TRL does not do. Sides must differ in the tokens that are
    trained on. Args, Raises: as of ``prompt_rows``.
    """

    def make(cells: dict[str, Any], columns: dict[str, Any]) -> tuple[PreferenceRow, Encoded]:
        label = _probability(cells.get("label", 1.0))
        sides = [checked_text(cells["chosen"], "chosen"), *checked_texts(cells["rejected"], "rejected")]
        if sides[0] in sides[1:]:
            raise BadRow("chosen and rejected are the same")
        prompt, sides = split_prompt(cells, sides)
        encoded = encoder.encode(prompt, sides)
        chosen, *rejected = encoded.completions
        if chosen in rejected:
            counts = f"in the {len(chosen)} tokens that count (the first {encoder.max_completion}, up to an end)"
            where = (
                f" {counts}: let them differ there, or raise max_completion_length" if encoded.completion_cut else ""
            )
            raise BadRow(f"chosen and rejected are the same{where or ' tokens'}")
        return PreferenceRow(prompt, encoded.ids, chosen, rejected, label, columns), encoded

    return _rows(config, encoder, name, "preferences", make)


def labelled_rows(config: TextDataConfig, encoder: TextEncoder, *, name: str = "data") -> Rows[LabelledRow]:
    """Completions with a ``label``, true or false (or 1 or 0): whether they are desirable; as ``prompt_rows``."""

    def make(cells: dict[str, Any], columns: dict[str, Any]) -> tuple[LabelledRow, Encoded]:
        desirable = _truth(cells["label"])
        completion = checked_text(cells["completion"], "the completion")
        if isinstance(cells["prompt"], str) and not isinstance(completion, str):
            raise BadRow("the prompt is a text and the completion a conversation: give both in one form")
        prompt, sides = split_prompt(cells, [completion])
        encoded = encoder.encode(prompt, sides)
        return LabelledRow(prompt, encoded.ids, encoded.completions[0], desirable, columns), encoded

    return _rows(config, encoder, name, "labels", make)


def rows_name(data: TextDataConfig | None) -> str:
    """What sentences call the rows of a setting."""
    if data is None:
        return "nothing"
    return data.source if isinstance(data.source, str) else f"{len(data.source)} given rows"


def _rows(
    config: TextDataConfig,
    encoder: TextEncoder,
    name: str,
    kind: str,
    make: Callable[[dict[str, Any], dict[str, Any]], tuple[Row, Encoded]],
) -> Rows[Row]:
    """What ``make`` makes of the cells, by our names, and of the other columns of each row."""
    _, (table, names) = together(encoder.check, lambda: config.opened(name, kind))

    def made(row: dict[str, Any]) -> tuple[Row, Encoded]:
        try:
            return make({ours: row.pop(theirs) for ours, theirs in names.items()}, row)
        except ConfigError as error:
            raise ConfigError([f"{name}: {problem}" for problem in error.problems]) from None

    rows, _, bad = config.usable(name, table, first_rows(table, config.max_rows) if names else (), made)
    nothing = f"{config.table_source(name)} holds no usable row ({len(bad)} bad rows)"
    config.check_usable(name, len(rows), bad.values(), nothing)
    cuts = (sum(one.prompt_cut for _, one in rows), sum(one.completion_cut for _, one in rows))
    return Rows([row for row, _ in rows], Truncation(len(rows), *cuts, left_out=len(bad)))


def _probability(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= 1:
        raise BadRow(f"label is {short(value)}, not a number from 0 to 1")
    return number


def _truth(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}  # a CSV file holds texts
    found = known.get(value.strip().lower()) if isinstance(value, str) else scalar(value)
    if not isinstance(found, bool | int | float) or found not in (0, 1):
        raise BadRow(f"label is {short(value)}, not true, false, 1 or 0")
    return bool(found)
