"""Tables of rows: what Python holds, a file with rows, a folder or a Hugging Face dataset.

A parquet file or folder, and a Hub dataset without ``max_rows``, becomes a table mapped from disk. With ``max_rows``
the rows of a Hub dataset are streamed, no more of them than are needed.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json, to_jsonable_python
from rich.console import Console

from diffusion_align.errors import ConfigError, first_line, short
from diffusion_align.inputs import check_path
from diffusion_align.pretrained import hub_or_cache
from diffusion_align.training.progress import progress_bars

FORMATS = ".jsonl, .jsonl.gz, .json, .csv or .parquet"
FILES = f"a {FORMATS} file, a folder, or a Hub dataset owner/name"
Cells = Generator[Sequence[Any], None, None]
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_MOST_IN_YAML = 4_000_000  # characters of a list as JSON; YAML needs up to twice as many, and reads 10 MB at most
_LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines also splits at form feeds, U+0085, U+2028 and others
SHOWN = 10
_BLOCK = 1000


@dataclass(frozen=True)
class TableSource:
    """Where a table is and what its settings are called in messages.

    Attributes:
        name: of the section: the sentences are about ``name.source``, ``name.split`` and ``name.columns``.
        source: path, Hub dataset or rows.
        split: of a dataset in the format of ``datasets``; a file or what Python holds has one, train.
        max_rows: set if no more than the first rows are wanted; a Hub dataset is then streamed.
        limit: what the setting behind ``max_rows`` is called.
        stem: a folder with a file of this name (and a known suffix) stands for the file.
        allowed: the sources to choose from, for a message.
        lines: the column that the lines of a .txt file are; without it there is no such file.
    """

    name: str
    source: str | Sequence[Any] | GivenRows
    split: str = "train"
    max_rows: int | None = None
    limit: str = "max_rows"
    stem: str | None = None
    allowed: str = FILES
    lines: str | None = None

    def __str__(self) -> str:
        """The setting and its value."""
        shown = repr(self.source) if isinstance(self.source, str) else short(self.source)
        return f"{self.name}.source={shown}"


class ListTable:
    """Rows in memory; paths in them are relative to ``folder``, or to where the process is now."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], folder: Path | None) -> None:
        self.rows, self.folder = rows, (folder or Path()).absolute()
        self.names = list(dict.fromkeys(name for row in rows for name in row if name is not None))

    def __len__(self) -> int:
        return len(self.rows)

    def scan(self, names: Sequence[str], outlined: Sequence[str] = ()) -> Cells:
        """The cells of each row, in the requested order; in ``outlined`` a single byte may stand for all bytes."""
        for row in range(len(self)):
            yield self.cells(row, names)

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        return [self.rows[row].get(name) for name in names]


class ArrowTable:
    """Rows of an Arrow table mapped from disk; images are bytes, paths or structs of both."""

    def __init__(self, table: Any, folder: Path | None = None) -> None:
        self.table, self.folder, self.names = table, (folder or Path()).absolute(), table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def scan(self, names: Sequence[str], outlined: Sequence[str] = ()) -> Cells:
        for start in range(0, len(self), _BLOCK):
            yield from _scan(self.table.slice(start, _BLOCK), names, outlined)

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        return [self.table.column(name)[row].as_py() for name in names]


class StreamedTable(ArrowTable):
    """Rows of a Hub dataset: ``scan`` downloads as many as it is told to, which are the table from then on."""

    def __init__(self, source: TableSource) -> None:
        import pyarrow as pa

        self._source = source
        dataset = _loaded(source, source.source, split=source.split, streaming=True)
        self._rest = dataset.with_format("arrow").iter(batch_size=1)  # a larger one would begin the next file
        with _loading(source):
            self._first = next(self._rest, None)
        super().__init__(pa.table({}) if self._first is None else self._first.schema.empty_table())

    def scan(self, names: Sequence[str], outlined: Sequence[str] = ()) -> Cells:
        """Once only. What was downloaded is kept in a file without a name in the cache folder of ``datasets``."""
        import datasets
        import pyarrow as pa

        first, rest = self._first, self._rest
        self._first = self._rest = None  # each would keep alive a block of images
        if first is None:
            return
        bar = progress_bars("{task.completed} rows downloaded", console=Console(stderr=True), transient=True)
        with _loading(self._source):
            os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=datasets.config.HF_DATASETS_CACHE, ignore_cleanup_errors=True)
        with folder, closing(rest):
            path = os.path.join(folder.name, "rows.arrow")
            schema = self.table.select(names).schema
            with suppress(GeneratorExit), _loading(self._source), bar, pa.ipc.new_file(path, schema) as file:
                task = bar.add_task("", total=None)
                for row in chain([first], rest):
                    file.write_table(row.select(names))
                    bar.advance(task)
                    yield from _scan(row, names, outlined)
            self.table = pa.ipc.open_file(pa.memory_map(path)).read_all()


Table = ListTable | ArrowTable


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Rows from Python that YAML cannot hold, or should not: a configuration names them by their content."""

    table: Table

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"{len(self)} rows given in Python, sha256 {self._digest[:16]}"

    __str__ = __repr__

    @cached_property
    def _digest(self) -> str:
        """Digest of all rows, or of 4096 evenly spaced ones if an Arrow table has more than 64 MB."""
        names, count = self.table.names, len(self)
        large = isinstance(self.table, ArrowTable) and self.table.table.nbytes > 64_000_000
        digest = hashlib.sha256(repr((names, count)).encode())
        for row in sorted({i * count // 4096 for i in range(4096)}) if large else range(count):
            _add_to(digest, self.table.cells(row, names))
        return digest.hexdigest()


def refuse_splits(value: Any) -> None:
    """ValueError for a dataset of which a split has to be chosen."""
    if type(value).__name__ in ("DatasetDict", "IterableDatasetDict"):
        first = next(iter(value), "train")
        raise ValueError(f"it holds the splits {', '.join(value)}: give one of them, as in data[{first!r}]")


def in_python(value: Any) -> Any:
    """Rows that Python hands over, such that they can be read more than once; whatever holds no rows stays as it is.

    A ``datasets.Dataset`` or a pandas DataFrame is ``GivenRows``. Anything else that can be gone through (a list, a
    generator, a column) is a list, with numpy's numbers as Python's own; it is ``GivenRows`` if there is more in it
    than YAML can hold.
    """
    if isinstance(value, str | bytes | Path | Mapping | GivenRows | BaseModel) or not isinstance(value, Iterable):
        return value
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(value).__mro__}
    if "datasets.Dataset" in kinds:
        return GivenRows(ArrowTable(value.with_format("arrow")[:]))  # type: ignore[attr-defined]
    if "pandas.DataFrame" in kinds:
        frame: Any = value
        frame = frame.astype(object).where(frame.notna(), None)
        return GivenRows(ListTable([_plain_python(row) for row in frame.to_dict("records")], None))
    rows = [_plain_python(row) for row in value]
    try:
        to_jsonable_python(rows)
    except ValueError:
        return GivenRows(ListTable(rows, None)) if all(isinstance(row, Mapping) for row in rows) else rows
    return rows


def named_if_long(rows: Any) -> Any:
    """A list of texts (prompts) or of mappings that is too long for ``config.yaml`` as ``GivenRows``; else ``rows``."""
    if not isinstance(rows, list) or len(json.dumps(rows, default=str, skipkeys=True)) <= _MOST_IN_YAML:
        return rows
    kind = next((kind for kind in (str, Mapping) if all(isinstance(row, kind) for row in rows)), None)
    if kind is None:
        return rows
    return GivenRows(ListTable([{"prompt": row} if kind is str else row for row in rows], None))


def _plain_python(value: Any) -> Any:
    """``value`` with numpy's single numbers, and its arrays of objects, as Python's own."""
    if isinstance(value, Mapping):
        return {key: _plain_python(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple) or str(getattr(value, "dtype", "")) == "object":
        return [_plain_python(inner) for inner in value]
    return scalar(value)


def _add_to(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        value = [part for item in value.items() for part in item]
    if isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for inner in value:
            _add_to(digest, inner)
    elif isinstance(value, bytes):
        digest.update(f"b{len(value)}".encode() + value)
    elif hasattr(value, "tobytes"):  # an array, a PIL image
        digest.update(repr([str(getattr(value, name, "")) for name in ("dtype", "shape", "mode", "size")]).encode())
        digest.update(value.tobytes())
    else:
        text = repr(value)
        digest.update(f"{type(value).__name__}{text if ' at 0x' not in text else ''},".encode())


def _scan(table: Any, names: Sequence[str], outlined: Sequence[str]) -> Cells:
    yield from zip(
        *(_outline(table.column(name)) if name in outlined else table.column(name).to_pylist() for name in names)
    )


def _outline(column: Any) -> list[Any]:
    """A column of images with one byte in place of each image's bytes, which are not read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column.type, pa.StructType):
        bytes_, paths = (
            _outline(pc.struct_field(column, part)) if column.type.get_field_index(part) >= 0 else [None] * len(column)
            for part in ("bytes", "path")
        )
        return [data or path for data, path in zip(bytes_, paths)]
    if not pa.types.is_binary(column.type) and not pa.types.is_large_binary(column.type):
        return column.to_pylist()
    return [b"." if length else None for length in pc.binary_length(column).to_pylist()]


def is_hub(source: str | Sequence[Any] | GivenRows) -> bool:
    """Whether ``source`` is the name of a Hub dataset: owner/name, and nothing here is called so."""
    if not isinstance(source, str) or source.endswith((*_SUFFIXES, ".txt")):
        return False
    if os.path.exists(os.path.expanduser(source)):
        return False
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def check_hub(source: TableSource) -> None:
    """What can be seen of a Hub dataset without the network.

    Raises:
        ConfigError: the package datasets is missing, or a part of a split is to be streamed.
    """
    _datasets(source)
    if source.max_rows is not None and "[" in source.split:
        setting, limit = f"{source.name}.split={source.split!r}", f"{source.name}.{source.limit}"
        raise ConfigError([f"{setting} cannot be used with {limit}: name the split without [...]"])


def open_table(source: TableSource) -> Table:
    """The rows of ``source``, cells neither looked at nor decoded.

    Raises:
        ConfigError: it is not there, cannot be read, or does not fit the other settings.
    """
    if isinstance(source.source, GivenRows):
        _one_split(source, "table")
        return source.source.table
    if not isinstance(source.source, str):
        _one_split(source, "list")
        return ListTable(
            _mappings(source, source.source, f"{source.name}.source", "a mapping of column to value"), None
        )
    check_path(source.source, f"{source.name}.source={short(source.source)}", error=ConfigError)
    if is_hub(source.source):
        check_hub(source)
        return StreamedTable(source) if source.max_rows is not None else _mapped(source, source.source, None)
    path = Path(os.path.expanduser(source.source))
    if os.path.isdir(path):
        stems = [f"{source.stem}{suffix}" for suffix in _SUFFIXES] if source.stem else []
        files = [path / name for name in stems if os.path.isfile(path / name)]
        if not files:
            return _mapped(source, str(path.resolve()), path)
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise ConfigError([f"{source} holds {names}: give one of these files"])
        path = files[0]
    if not os.path.isfile(path):
        start = f"{source.name}.source={short(source.source)}"
        raise ConfigError([f"{start}: there is no such file or folder: give {source.allowed}"])
    text = (".txt",) if source.lines else ()
    if not path.name.endswith((*_SUFFIXES, *text)):
        raise ConfigError([f"{source}: use a {'.txt, ' if text else ''}{FORMATS} file"])
    _one_split(source, "file")
    if path.suffix == ".parquet":
        return _mapped(source, "parquet", path.parent, data_files=glob.escape(str(path.resolve())))
    return ListTable(_read(source, path), path.parent)


def first_rows(table: Table, count: int | None) -> Iterator[dict[str, Any]]:
    """The first ``count`` rows with all their columns, or all rows; no more are downloaded."""
    with closing(table.scan(table.names)) as scan:
        for cells in islice(scan, count):
            yield dict(zip(table.names, cells))


def _one_split(source: TableSource, what: str) -> None:
    if source.split != "train":
        start = f"{source.name}.split={source.split!r} is not known"
        raise ConfigError([f"{start}: a {what} holds one split, train; leave it out"])


def _mappings(source: TableSource, rows: Sequence[Any], where: str, what: str) -> Sequence[Any]:
    """``rows`` of ``where``, each of which must be ``what``: a mapping, in the words of its format."""
    problems = [
        f"{where}: row {i} is {short(row)}, not {what}: fix or remove it"
        for i, row in enumerate(rows)
        if not isinstance(row, Mapping)
    ]
    if problems:
        raise ConfigError(listed(problems, source.name))
    return rows


def _mapped(source: TableSource, name: str, folder: Path | None, **options: Any) -> ArrowTable:
    return ArrowTable(_loaded(source, name, split=source.split, **options).with_format("arrow")[:], folder)


def _datasets(source: TableSource) -> Any:
    try:
        import datasets
    except ImportError:
        needs = f"{source} needs the package datasets"
        raise ConfigError([f"{needs}: pip install 'diffusion-align[datasets]'"]) from None
    return datasets


def _loaded(source: TableSource, name: Any, **options: Any) -> Any:
    datasets = _datasets(source)
    with _loading(source):
        return datasets.load_dataset(name, **options)


@contextmanager
def _loading(source: TableSource) -> Iterator[None]:
    """Whatever fails is one sentence; nothing else is printed, but on a terminal the bars of a whole download."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = is_hub(source.source) and source.max_rows is None and sys.stderr.isatty()
    silence = not bars and not datasets.are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        if silence:
            datasets.disable_progress_bars()
        with hub_or_cache() if is_hub(source.source) else nullcontext():
            yield
    except Exception as error:  # builders, pyarrow, the Hub and the network each raise their own
        reason = first_line(error.__cause__ or error)
        remedy = "check the name, the network and your access to it" if is_hub(source.source) else "fix it"
        raise ConfigError([f"{source}, split {source.split!r}, cannot be loaded ({reason}): {remedy}"]) from None
    finally:
        if silence:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _read(source: TableSource, path: Path) -> Sequence[dict[str, Any]]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl_rows(source, path)
    with _reading(source):
        text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".txt":
        return [{source.lines or "": line} for line in _LINE_END.split(text) if line.strip()]
    return (_csv_rows if path.suffix == ".csv" else _json_rows)(source, text)


@contextmanager
def _reading(source: TableSource) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError([f"{source} cannot be read: {error}"]) from None


def _jsonl_rows(source: TableSource, path: Path) -> Sequence[dict[str, Any]]:
    """A line at a time: of a list of a million rows, only the rows are in memory."""
    rows, problems = [], []
    with _reading(source), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                rows.append(_json_line(text))
                if not isinstance(rows[-1], dict):
                    problems.append(f"{source}: line {number} is not a JSON object: fix or remove it")
    if problems:
        raise ConfigError(listed(problems, source.name, "line"))
    return rows


def _csv_rows(source: TableSource, text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(max(len(text), 1))  # Python's own is 128 kB per cell
    try:
        names = [name for name in reader.fieldnames or () if name]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:  # the last would be read
            raise ConfigError([f"{source}: two columns are called {short(twice)}: rename or remove one"])
        return list(reader)
    except csv.Error as error:
        line = f"line {reader.reader.line_num} is not valid CSV ({error})"
        raise ConfigError([f"{source}: {line}: fix it"]) from None
    finally:
        csv.field_size_limit(limit)


def _json_rows(source: TableSource, text: str) -> Sequence[dict[str, Any]]:
    rows = _json(text)
    if not isinstance(rows, list):
        remedy = "give a list of rows, [{...}, ...], or call a file of one object per line .jsonl"
        raise ConfigError([f"{source} is not a JSON list: {remedy}"])
    return _mappings(source, rows, str(source), "a JSON object")


def _json_line(text: str) -> Any:
    """``_json``, by a reader that makes each name of a column once; it refuses some of what Python's own allows."""
    try:
        return from_json(text, cache_strings="keys")
    except ValueError:
        return _json(text)


def _json(text: str) -> Any:
    """What a JSON text says; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def listed(sentences: list[str], name: str, what: str = "row") -> list[str]:
    """The first ten of ``sentences``, and how many more there are of ``what`` in the setting ``name``."""
    more = len(sentences) - SHOWN
    rest = [f"{name}: {more} more {what}{'s are' if more > 1 else ' is'} bad"] if more > 0 else []
    return sentences[:SHOWN] + rest


def scalar(value: Any) -> Any:
    """A single number of numpy or torch as Python's own; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
