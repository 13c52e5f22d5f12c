"""Where prompts come from and which ones an epoch uses."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from uuid import UUID

from pydantic import Field, ValidationError, model_serializer

from diffusion_align.assets import shipped_prompts
from diffusion_align.bounds import LONGEST_PROMPT
from diffusion_align.data.schemas import (
    BadRow,
    ColumnSchemas,
    RowsConfig,
    Source,
    bare_prompts,
    checked_prompt,
    limit_of,
)
from diffusion_align.data.sources import FILES, ListTable, Table, TableSource, scalar, short
from diffusion_align.errors import ConfigError
from diffusion_align.inputs import check_path
from diffusion_align.training.section import sentences

Prompt = tuple[str, dict[str, Any]]
"""Text and the metadata a reward receives with it."""
Item = TypeVar("Item")
COLUMN_SCHEMAS = ({"prompt": "prompt"}, {"prompt": "caption"}, {"prompt": "text"})
"""The columns that hold the prompts where none is named; the first one found does."""
_PLACES = f"a list of prompts, a .txt file, {FILES}"
_AS_TEXT = (date, time, timedelta, Decimal, UUID)


class PromptsConfig(RowsConfig):
    """Where the prompts for images come from; a bare list, file or name stands for its ``source``."""

    places = _PLACES
    column_schemas: ClassVar[Mapping[str, ColumnSchemas]] = {"prompts": COLUMN_SCHEMAS}
    limit, stem, lines = "max_prompts", "prompts", "prompt"
    source: Source = Field(description=f"a shipped list, {_PLACES}")
    columns: dict[str, str] | None = Field(
        None, description="column names, ours -> the source's: prompt; prompt, caption or text if not given"
    )
    max_prompts: int | None = limit_of("prompts")

    def table_source(self, name: str) -> TableSource:
        rows, shipped = self.source, shipped_prompts()
        if isinstance(rows, list):
            known = [column for schema in COLUMN_SCHEMAS for column in schema.values()]
            rows = bare_prompts(rows, self.columns, known, all_but_mappings=True)
        elif isinstance(rows, str):
            rows = str(shipped.get(rows, rows))
        return replace(super().table_source(name), source=rows, allowed=f"one of {', '.join(shipped)}, {_PLACES}")

    def read(self, name: str, kind: str) -> list[Prompt]:
        table, names = self.table(name, kind)

        def make(row: tuple[Any, dict[Any, Any]]) -> Prompt:
            return _short_enough(checked_prompt(row[0])), _plain_row(row[1])

        with closing(_rows(table, names.get("prompt", "prompt"))) as rows:
            prompts, _, bad = self.usable(name, table, rows, make)
        what = f"usable prompt ({len(bad)} bad rows)" if bad else "prompt"
        self.check_usable(name, len(prompts), bad.values(), f"{name}.source={short(self.source)} holds no {what}")
        return prompts

    @model_serializer(mode="wrap")
    def _as_short_as_possible(self, whole: Any) -> Any:
        """The source alone if nothing else was set, so that config.yaml says what the user did."""
        settings = whole(self)
        return settings["source"] if self == PromptsConfig.model_construct(source=self.source) else settings


def load_prompts(source: PromptsConfig | str | Path | Iterable[Any] | Mapping[str, Any]) -> list[Prompt]:
    """Prompts with their metadata: a row's other columns, for the reward. Equal prompts are all kept.

    Metadata are plain values: text, numbers, true, false, None, lists and mappings of these. A .csv file holds text
    alone, so a count of 3 is "3" there. Dates and decimal numbers become text. Columns with images or other bytes
    are left out and not read. A row of a list or of a .jsonl file has only the keys it was given.

    Args:
        source: ``PromptsConfig``, or what stands for it: texts and mappings (a list, a generator, a
            ``datasets.Dataset``, a pandas DataFrame), a .txt file (one prompt a
            line, blanks at its ends and all), a .jsonl, .jsonl.gz, .json, .csv or .parquet file, a folder of such (or
            with one called prompts), a Hub dataset, the name of a shipped list, or a mapping with ``source`` and the
            other settings.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    if isinstance(source, str | Path) and str(source):
        check_path(source, f"prompts.source={short(str(source))}", error=ConfigError)
    try:
        return PromptsConfig.model_validate(source).opened("prompts", "prompts")
    except ValidationError as error:
        raise ConfigError(sentences(PromptsConfig, error, section="prompts")) from None


def check_image_prompts(prompts: Sequence[str], *, name: str = "prompts") -> None:
    """Look at prompts that come from no source of rows.

    Raises:
        ConfigError: one is no text of a length that a text encoder has use for.
    """
    check_unicode(prompts, name=name)
    for i, prompt in enumerate(prompts):
        try:
            _short_enough(prompt)
        except BadRow as problem:
            raise ConfigError([f"{name}: entry {i}: {problem}"]) from None


def check_unicode(prompts: Sequence[Any], *, name: str = "prompts") -> None:
    """Look at prompts of the command line, where bytes that are no text become lone surrogates.

    Raises:
        ConfigError: one is not text.
    """
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ConfigError([f"{name}: entry {i} is {short(prompt)}, not a text"])
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ConfigError([f"{name}: entry {i}, {short(prompt)}, is not valid Unicode"]) from None


def _short_enough(prompt: str) -> str:
    if len(prompt) > LONGEST_PROMPT:
        raise BadRow(f"the prompt has {len(prompt):,} characters, and at most {LONGEST_PROMPT:,} are taken: shorten it")
    return prompt


def items_of_epoch(items: Sequence[Item], seed: int, epoch: int, count: int) -> list[Item]:
    """``count`` prompts (or pairs) of ``epoch``: all in a new random order each pass, without gaps between epochs."""
    import torch

    from diffusion_align.training.randomness import generator

    places = range(epoch * count, (epoch + 1) * count)
    turns = {place // len(items) for place in places}
    orders = {turn: torch.randperm(len(items), generator=generator(seed, "prompts", turn)).tolist() for turn in turns}
    return [items[orders[place // len(items)][place % len(items)]] for place in places]


def _rows(table: Table, column: str) -> Generator[tuple[Any, dict[Any, Any]], None, None]:
    """The cell in ``column`` and the others of each row, but for columns of bytes."""
    if isinstance(table, ListTable):
        for row in table.rows:
            yield row.get(column), {name: value for name, value in row.items() if name != column}
        return
    others = [field.name for field in table.table.schema if field.name != column and not _holds_bytes(field.type)]
    with closing(table.scan([column, *others])) as scan:
        for prompt, *cells in scan:
            yield prompt, dict(zip(others, cells))


def _holds_bytes(kind: Any) -> bool:
    """Whether values of an Arrow type have bytes in them, as an image's struct of bytes and path has."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _holds_bytes(kind.storage_type)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in binary) or any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _plain_row(metadata: Mapping[Any, Any]) -> dict[str, Any]:
    if None in metadata:  # what csv.DictReader does with cells that have no column
        raise BadRow("it has more cells than there are columns: put a text with commas in quotes")
    return {name: _plain(name, value) for name, value in metadata.items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(name, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, inner) for inner in value]
    value = scalar(value)
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, str) and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise BadRow(f"{name!r} is not valid Unicode")
    if value is not None and not isinstance(value, str | int | float):
        raise BadRow(f"{name!r} holds {short(value)}, not a text, a number, true, false, null or a list of these")
    return value
