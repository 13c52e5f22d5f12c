"""Where preference pairs are read from: rows of the embedded drawings, a file, a folder or a Hugging Face dataset.

A file or folder, and a Hub dataset without ``max_pairs``, becomes a table mapped from disk. With ``max_pairs`` the rows
of a Hub dataset are streamed, no more of them than are asked for.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from diffusion_align.assets.preferences import load_preferences
from diffusion_align.training.config import nearest
from diffusion_align.training.errors import ConfigError

if TYPE_CHECKING:
    from diffusion_align.diffusion.pairs import PairsConfig

EMBEDDED = "emoji_style"
LAYOUTS = (
    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"prompt": "caption", "first": "jpg_0", "second": "jpg_1", "first_wins": "label_0"},
)
Cells = Generator[Sequence[Any], None, None]
_SUFFIXES = (".jsonl", ".parquet", ".csv")
SHOWN = 10


class Rows:
    """Rows in memory; pictures are paths relative to ``folder``, or tensors."""

    def __init__(self, rows: list[dict[str, Any]], folder: Path | None) -> None:
        self.rows, self.folder = rows, folder
        self.names = list(dict.fromkeys(name for row in rows for name in row if name is not None))

    def __len__(self) -> int:
        return len(self.rows)

    def scan(self, pictures: Sequence[str], others: Sequence[str]) -> Cells:
        """The cells of each row, in the order asked for; a picture's bytes may be a single byte in their place."""
        for row in range(len(self)):
            yield self.cells(row, [*pictures, *others])

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        return [self.rows[row].get(name) for name in names]


class ArrowRows:
    """Rows of an Arrow table mapped from disk; pictures are bytes, paths or structs of both."""

    def __init__(self, table: Any, folder: Path | None = None) -> None:
        self.table, self.folder, self.names = table, folder, table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def scan(self, pictures: Sequence[str], others: Sequence[str]) -> Cells:
        return _scan(self.table, pictures, others)

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        return [self.table.column(name)[row].as_py() for name in names]


class StreamedRows(ArrowRows):
    """Rows of a Hub dataset: ``scan`` downloads as many as it is asked for, which are the table from then on."""

    def __init__(self, config: PairsConfig) -> None:
        import pyarrow as pa

        self._config = config
        dataset = _loaded(config, config.source, split=config.split, streaming=True)
        self._rest = dataset.with_format("arrow").iter(batch_size=1)  # a larger one would begin the next file
        with _loading(config):
            self._first = next(self._rest, None)
        super().__init__(pa.table({}) if self._first is None else self._first.schema.empty_table())

    def scan(self, pictures: Sequence[str], others: Sequence[str]) -> Cells:
        """Once only. What was downloaded is kept in a file without a name in the cache folder of ``datasets``."""
        import datasets
        import pyarrow as pa

        first, rest, names = self._first, self._rest, [*pictures, *others]
        self._first = self._rest = None  # each would hold on to a block of pictures
        console = Console(stderr=True)
        bar = Progress(
            "{task.completed} rows downloaded", console=console, transient=True, disable=not console.is_terminal
        )
        with _loading(self._config):
            os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=datasets.config.HF_DATASETS_CACHE, ignore_cleanup_errors=True)
        with folder, closing(rest):
            path = os.path.join(folder.name, "rows.arrow")
            schema = self.table.select(names).schema
            with suppress(GeneratorExit), _loading(self._config), bar, pa.ipc.new_file(path, schema) as file:
                task = bar.add_task("", total=None)
                for row in chain([first], rest):
                    file.write_table(row.select(names))
                    bar.advance(task)
                    yield from _scan(row, pictures, others)
            self.table = pa.ipc.open_file(pa.memory_map(path)).read_all()


def _scan(table: Any, pictures: Sequence[str], others: Sequence[str]) -> Cells:
    outlines = [_outline(table.column(name)) for name in pictures]
    yield from zip(*outlines, *(table.column(name).to_pylist() for name in others))


def _outline(column: Any) -> list[Any]:
    """A column of pictures with one byte in place of each picture's bytes, which are not read."""
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


def is_hub(source: str) -> bool:
    """Whether ``source`` is the name of a Hub dataset: owner/name, and nothing here is called so."""
    known = source == EMBEDDED or os.path.exists(os.path.expanduser(source)) or source.endswith(_SUFFIXES)
    return not known and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def check_hub(config: PairsConfig) -> None:
    """What can be seen of a Hub dataset without the network.

    Raises:
        ConfigError: the package datasets is missing, or a part of a split is to be streamed.
    """
    _datasets(config)
    if config.max_pairs is not None and "[" in config.split:
        raise ConfigError(
            [f"pairs.split={config.split!r} cannot be used with pairs.max_pairs: name the split without [...]"]
        )


def open_table(config: PairsConfig) -> Rows | ArrowRows:
    """The rows of ``config.source``, pictures neither looked at nor decoded.

    Raises:
        ConfigError: it is not there, cannot be read, or does not fit the other settings.
    """
    source, path = config.source, Path(os.path.expanduser(config.source))
    if source == EMBEDDED:
        return _embedded(config)
    if is_hub(source):
        check_hub(config)
        return StreamedRows(config) if config.max_pairs is not None else _mapped(config, source, None)
    if os.path.isdir(path):
        files = [path / f"pairs{suffix}" for suffix in _SUFFIXES if os.path.isfile(path / f"pairs{suffix}")]
        if not files:
            return _mapped(config, str(path.resolve()), path)
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise ConfigError([f"pairs.source={source!r} holds {names}: give the file that is meant"])
        path = files[0]
    if not os.path.isfile(path):
        allowed = f"{EMBEDDED}, a .jsonl, .csv or .parquet file, a folder, or a Hub dataset owner/name"
        raise ConfigError([f"pairs.source={short(source)}: there is no such file or folder: give {allowed}"])
    if path.suffix not in _SUFFIXES:
        raise ConfigError([f"pairs.source={source!r}: use a .jsonl, .csv or .parquet file"])
    if config.split != "train":
        raise ConfigError([f"pairs.split={config.split!r} is not known: a file holds one split, train; leave it out"])
    if path.suffix == ".parquet":
        return _mapped(config, "parquet", path.parent, data_files=glob.escape(str(path.resolve())))
    return Rows(_read(config, path), path.parent)


def _embedded(config: PairsConfig) -> Rows:
    problems = [f"pairs.columns cannot be used with {EMBEDDED}: leave it out"] if config.columns else []
    if config.split not in ("train", "heldout", "all"):
        problems.append(f"pairs.split={config.split!r} is not known: choose train, heldout or all")
    if problems:
        raise ConfigError(problems)
    pairs = load_preferences(config.split)  # type: ignore[arg-type]
    return Rows([{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs], None)


def _mapped(config: PairsConfig, name: str, folder: Path | None, **options: Any) -> ArrowRows:
    return ArrowRows(_loaded(config, name, split=config.split, **options).with_format("arrow")[:], folder)


def _datasets(config: PairsConfig) -> Any:
    try:
        import datasets
    except ImportError:
        needs = f"pairs.source={config.source!r} needs the package datasets"
        raise ConfigError([f"{needs}: pip install 'diffusion-align[datasets]'"]) from None
    return datasets


def _loaded(config: PairsConfig, name: str, **options: Any) -> Any:
    datasets = _datasets(config)
    with _loading(config):
        return datasets.load_dataset(name, **options)


@contextmanager
def _loading(config: PairsConfig) -> Iterator[None]:
    """Whatever fails is one sentence; nothing else is printed, but on a terminal the bars of a whole download."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = is_hub(config.source) and config.max_pairs is None and sys.stderr.isatty()
    silence = not bars and not datasets.are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        if silence:
            datasets.disable_progress_bars()
        yield
    except Exception as error:  # builders, pyarrow, the Hub and the network each raise their own
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        remedy = "check the name, the network and your access to it" if is_hub(config.source) else "mend it"
        raise ConfigError(
            [f"pairs.source={config.source!r}, split {config.split!r}, cannot be loaded ({reason}): {remedy}"]
        ) from None
    finally:
        if silence:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _read(config: PairsConfig, path: Path) -> list[dict[str, Any]]:
    start = f"pairs.source={config.source!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{start} cannot be read: {error}"]) from None
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            return list(reader)
        except csv.Error as error:
            raise ConfigError([f"{start}: line {reader.reader.line_num} is not valid CSV ({error}): mend it"]) from None
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                rows.append(None)
            if not isinstance(rows[-1], dict):
                problems.append(f"{start}: line {number} is not a JSON object: mend or remove it")
    if problems:
        raise ConfigError(listed(problems, "line"))
    return rows


def mapping_problems(columns: Mapping[str, str] | None) -> list[str]:
    """Sentences about what is wrong with ``pairs.columns`` whatever the source holds."""
    columns = columns or {}
    ours = list(dict.fromkeys(name for layout in LAYOUTS for name in layout))
    problems = [f"pairs.columns: unknown name {name!r}: {nearest(name, ours)}" for name in columns if name not in ours]
    if not problems and not any(columns.keys() <= layout.keys() for layout in LAYOUTS):
        problems.append("pairs.columns: give prompt, chosen, rejected or prompt, first, second, first_wins, not both")
    if len(set(columns.values())) < len(columns):
        problems.append("pairs.columns: two names stand for one column: give each its own")
    return problems


def mapping(columns: Mapping[str, str] | None, found: Sequence[str]) -> dict[str, str]:
    """Our name -> the source's, of the first layout whose columns are all among ``found``.

    Raises:
        ConfigError: there is none.
    """
    columns = columns or {}
    layouts = [layout | dict(columns) for layout in LAYOUTS if columns.keys() <= layout.keys()]
    for layout in layouts:
        if set(layout.values()) <= set(found):
            return layout
    have = f"the columns found are {', '.join(map(short, found))}"
    missing = [f"there is no column {name!r}" for name in columns.values() if name not in found]
    needed = " or ".join(", ".join(layout.values()) for layout in layouts)
    what = " and ".join(missing) if missing else f"the columns {needed} are needed"
    raise ConfigError([f"pairs.columns: {what}; {have}: map our names to these"])


def listed(sentences: list[str], what: str = "row") -> list[str]:
    """The first ten of ``sentences``, and how many more there are."""
    more = len(sentences) - SHOWN
    rest = [f"pairs: {more} more {what}{'s are' if more > 1 else ' is'} bad"] if more > 0 else []
    return sentences[:SHOWN] + rest


def short(value: Any) -> str:
    """``repr(value)`` in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
