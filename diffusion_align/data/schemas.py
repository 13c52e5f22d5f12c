"""Rows as a setting names them: where they are, our names of their columns, and what is reported about bad ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, InstanceOf, PlainSerializer, field_validator, model_validator

from diffusion_align.bounds import MOST_ROWS
from diffusion_align.data.prompt_functions import CALLS, rows_of_calls
from diffusion_align.data.sources import (
    FILES,
    SHOWN,
    GivenRows,
    StreamedTable,
    Table,
    TableSource,
    check_hub,
    in_python,
    is_hub,
    listed,
    named_if_long,
    open_table,
    refuse_splits,
    short,
)
from diffusion_align.errors import ConfigError, nearest, together
from diffusion_align.training.section import Section

MOST_CHARACTERS = 1_000_000
"""Per prompt or completion."""
_AS_TEXT = PlainSerializer(lambda rows: str(rows), return_type=str, when_used="json")
Source = str | list[Any] | Annotated[InstanceOf[GivenRows], _AS_TEXT]
"""A file, folder, Hub dataset or shipped name; rows; or rows of which ``config.yaml`` holds a digest only."""
ColumnSchemas = Sequence[Mapping[str, str]]
"""Our name -> the name that is looked for by default; a source has the columns of one of them."""
Made = TypeVar("Made")


def limit_of(rows: str) -> Any:
    """The field that says how many of ``rows`` are used."""
    what = f"largest number of {rows} to use; no more are downloaded from a Hub dataset"
    return Field(None, ge=1, le=MOST_ROWS, description=what)


class BadRow(Exception):
    """What is wrong with a row."""


class RowsConfig(Section):
    """Where rows come from; a bare list, file or name stands for its ``source``."""

    stands_for: ClassVar[str] = "source"
    places: ClassVar[str] = f"a list of rows, {FILES}"
    """What ``source`` may be, for messages."""
    column_schemas: ClassVar[Mapping[str, ColumnSchemas]] = {}
    """The columns of each kind of rows that there may be."""
    limit: ClassVar[str]
    """The setting that says how many rows are used."""
    stem: ClassVar[str | None] = None
    lines: ClassVar[str | None] = None
    """See ``TableSource``."""

    source: Source = Field(description="where the rows are, or the rows themselves")
    split: str = Field("train", min_length=1, description="a dataset's own split")
    columns: dict[str, str] | None = Field(None, description="column names, ours -> the source's")
    skip_bad_rows: bool = Field(False, strict=True, description="skip rows that cannot be used")

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        refuse_splits(value)
        if isinstance(value, cls):
            return value
        settings = value if isinstance(value, Mapping) else {"source": value}
        source = settings.get("source")
        if callable(source) and not isinstance(source, Iterable) and "prompts" in cls.column_schemas:
            calls, columns = settings.get(cls.limit), settings.get("columns")
            column = columns.get("prompt", "prompt") if isinstance(columns, Mapping) else "prompt"
            calls = calls if isinstance(calls, int) and 0 < calls <= MOST_ROWS else CALLS
            return {**settings, "source": rows_of_calls(source, calls, column=column)}
        if settings is not value and not isinstance(value, Iterable | Path | GivenRows):
            raise ValueError(f"give {cls.places}")
        return settings

    @field_validator("source", mode="before")
    @classmethod
    def _a_place_or_rows(cls, value: Any) -> Any:
        rows = in_python(value)
        if not isinstance(rows, str | Path | list | GivenRows) or (not isinstance(rows, Path) and not len(rows)):
            raise ValueError(f"give {cls.places}")
        return str(rows) if isinstance(rows, Path) else named_if_long(rows)

    @property
    def most(self) -> int | None:
        """How many rows are wanted, if not all."""
        return getattr(self, self.limit)

    def table_source(self, name: str) -> TableSource:
        """Where the rows of the setting ``name`` are."""
        return TableSource(name, self.source, self.split, self.most, self.limit, self.stem, self.places, self.lines)

    def table(self, name: str, kind: str) -> tuple[Table, dict[str, str]]:
        """The rows of the setting ``name``, and their names of our columns, {} if there are none.

        Raises:
            ConfigError: all that is wrong with the settings and the source, at once.
        """
        column_schemas = self.column_schemas[kind]
        _, table = together(lambda: check_columns(name, column_schemas, self.columns), lambda: self.open_source(name))
        return table, mapping(name, column_schemas, self.columns, table.names) if table.names else {}

    def open_source(self, name: str) -> Table:
        return open_table(self.table_source(name))

    def read(self, name: str, kind: str) -> Any:
        """What ``opened`` returns: the table, where rows want a model to be more."""
        return self.table(name, kind)

    def usable(
        self, name: str, table: Table, rows: Iterable[Any], make: Callable[[Any], Made | None]
    ) -> tuple[list[Made], list[int], dict[int, str]]:
        """What ``make`` makes of the ``rows`` of ``table``, at most ``self.most``; their numbers; and the bad ones.

        ``make`` raises BadRow; its None is neither good nor bad. Of a streamed table nothing is downloaded for a list
        of bad rows that would not be shown.
        """
        made, numbers, bad = [], [], {}
        stops = isinstance(table, StreamedTable) and not self.skip_bad_rows
        for number, row in enumerate(rows):
            try:
                one = make(row)
            except BadRow as problem:
                bad[number] = f"{name}: row {number}: {problem}"
                if stops and len(bad) == SHOWN:
                    break
                continue
            if one is not None:
                made.append(one)
                numbers.append(number)
                if len(made) == self.most:
                    break
        return made, numbers, bad

    def check_usable(self, name: str, count: int, bad: Collection[str], nothing: str) -> None:
        """ConfigError if no row is left, which ``nothing`` says, or ``bad`` ones, sentences, may not be left out."""
        if not count or (bad and not self.skip_bad_rows):
            remedy = f"{name}: fix the rows above, or set {name}.skip_bad_rows=true to leave them out"
            raise ConfigError([*listed(list(bad), name), remedy if count else f"{nothing}: give at least one"])

    def opened(self, name: str, kind: str) -> Any:
        """The rows, as far as they can be read without a model: what ``open_ahead`` opened, for the first caller.

        Args:
            name: what the setting is called, for messages.
            kind: of rows, one of ``column_schemas``.

        Raises:
            ConfigError: everything that is wrong with the rows and the settings, at once.
        """
        ahead = self.__dict__.pop("_ahead", None)
        return self.read(name, kind) if ahead is None else ahead

    def open_ahead(self, name: str, kind: str) -> None:
        """Open rows that are on this machine; of a Hub dataset only what is wrong without the network is found.

        Args, Raises: as of ``opened``.
        """
        source = self.table_source(name)
        if is_hub(source.source):
            together(lambda: check_columns(name, self.column_schemas[kind], self.columns), lambda: check_hub(source))
        else:
            self.__dict__["_ahead"] = self.read(name, kind)


def bare_prompts(
    rows: Sequence[Any], columns: Mapping[str, str] | None, known: Collection[str], *, all_but_mappings: bool = False
) -> list[Any]:
    """The rows of a list in which a bare text is a prompt.

    So is a text with a colon that YAML took for a mapping (``- a sign: stop``), which is then refused with that row's
    number: a mapping of one key that names no column, beside bare texts or with more than a name as its key.

    Args:
        columns: our name -> the source's, as the user has set it.
        known: columns that are looked for by default.
        all_but_mappings: whether whatever else there is stands for a prompt, too.
    """
    names, bare = {*known, *(columns or {}).values()}, any(isinstance(row, str) for row in rows)

    def is_prompt(row: Any) -> bool:
        if not isinstance(row, Mapping):
            return all_but_mappings or isinstance(row, str)
        key, value = next(iter(row.items())) if len(row) == 1 else ("", [])
        alone = key not in names and isinstance(value, str | int | float | date | None)
        return alone and (bare or not str(key).isidentifier())

    column = (columns or {}).get("prompt", "prompt")
    return [{column: row} if is_prompt(row) else row for row in rows]


def check_length(characters: int, what: str) -> None:
    """BadRow for a text that is no text to train on but a file that got here by mistake; it would take minutes."""
    if characters > MOST_CHARACTERS:
        raise BadRow(f"{what} has {characters} characters, more than {MOST_CHARACTERS}: shorten it")


def checked_prompt(prompt: Any) -> str:
    """``prompt`` if it is a text that says something.

    Raises:
        BadRow: it is not.
    """
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        raise BadRow("the prompt is empty")
    if isinstance(prompt, Mapping):
        raise BadRow(f"the prompt is a mapping, {short(prompt)}: quote the text")
    if not isinstance(prompt, str):
        raise BadRow(f"the prompt is {short(prompt)}, not a text")
    check_length(len(prompt), "the prompt")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BadRow(f"the prompt {short(prompt)} is not valid Unicode") from None
    return prompt


def check_columns(name: str, column_schemas: ColumnSchemas, columns: Mapping[str, str] | None) -> None:
    """ConfigError if the setting ``name.columns``, our name -> the source's, cannot be right whatever there is."""
    columns, start = columns or {}, f"{name}.columns"
    known = list(dict.fromkeys(ours for schema in column_schemas for ours in schema))
    problems = [f"{start}: unknown name {ours!r}: {nearest(ours, known)}" for ours in columns if ours not in known]
    if not problems and not any(columns.keys() <= schema.keys() for schema in column_schemas):
        problems.append(f"{start}: give {' or '.join(', '.join(schema) for schema in column_schemas)}, not both")
    if len(set(columns.values())) < len(columns):
        problems.append(f"{start}: two names stand for one column: give each its own")
    if problems:
        raise ConfigError(problems)


def mapping(
    name: str, column_schemas: ColumnSchemas, columns: Mapping[str, str] | None, found: Sequence[str]
) -> dict[str, str]:
    """Our name -> the source's, of the first schema whose columns are all among ``found``.

    Raises:
        ConfigError: there is none.
    """
    columns = columns or {}
    fitting = [{**schema, **columns} for schema in column_schemas if columns.keys() <= schema.keys()]
    for schema in fitting:
        if set(schema.values()) <= set(found):
            return schema
    have = f"the data has {', '.join(map(short, found)) or 'none'}"
    missing = [f"there is no column {column!r}" for column in columns.values() if column not in found]
    wanted = [tuple(schema.values()) for schema in fitting]
    least = [these for these in wanted if not any(set(others) < set(these) for others in wanted)]
    needed = " or ".join(", ".join(these) for these in least)
    many = "columns" if "," in needed else "column"
    what = " and ".join(missing) if missing else f"the {many} {needed} {'are' if many == 'columns' else 'is'} needed"
    nearest_schema = fitting[wanted.index(least[0])]
    ours = next(ours for ours, theirs in nearest_schema.items() if theirs not in found)
    theirs = next((short(column) for column in found if column not in nearest_schema.values()), "...")
    raise ConfigError([f"{name}.columns: {what}; {have}: map our names to these, as in {{{ours}: {theirs}}}"])
