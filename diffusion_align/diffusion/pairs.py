"""Preference pairs of pictures: the embedded drawings, a file, a folder or a Hugging Face dataset.

Rows are ``prompt, chosen, rejected`` or, as in Pick-a-Pic, ``caption, jpg_0, jpg_1, label_0`` where the label says
whether picture 0 wins. Pictures are decoded when asked for and never kept.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from diffusion_align.assets.preferences import load_preferences
from diffusion_align.training.config import Section, nearest
from diffusion_align.training.errors import ConfigError

EMBEDDED = "emoji_style"
LAYOUTS = (
    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"prompt": "caption", "first": "jpg_0", "second": "jpg_1", "first_wins": "label_0"},
)
_SUFFIXES = (".jsonl", ".parquet", ".csv")
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # PIL would run Ghostscript on an EPS
_SHOWN = 10


class PairsConfig(Section):
    """Where the pairs come from."""

    source: str = Field(
        min_length=1, description="emoji_style, a .jsonl, .csv or .parquet file, a folder, or a Hub dataset owner/name"
    )
    split: str = Field("train", min_length=1, description="train, heldout or all of emoji_style; a dataset's own split")
    columns: dict[str, str] | None = Field(
        None, description="our name -> the source's: prompt, chosen, rejected or prompt, first, second, first_wins"
    )
    skip_bad_rows: bool = Field(False, strict=True, description="leave rows out that cannot be used")
    max_pairs: int | None = Field(None, ge=1, description="use the first so many pairs only")


class _BadRow(Exception):
    """What is wrong with a row."""


@dataclass(frozen=True)
class PairSet:
    """The usable pairs of a source, in row order."""

    prompts: list[str]
    rows: list[int]
    ties: int
    skipped: dict[int, str]
    _config: PairsConfig = field(repr=False)
    _table: _Rows | _Dataset = field(repr=False)
    _columns: list[str] = field(repr=False)
    _first_wins: list[bool] = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def pictures(self, i: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Chosen and rejected of pair ``i``, (3, H, W) float32 in [0, 1], scaled to cover ``size`` and centre-cropped.

        Args:
            i: index of the pair, below ``len(self)``.
            size: (H, W) in pixels.

        Raises:
            ConfigError: a picture that cannot be read.
        """
        try:
            chosen, rejected = (_fitted(value, side, self._table.folder, size) for side, value in self._cells(i))
        except _BadRow as bad:
            raise ConfigError([f"pairs: row {self.rows[i]}: {bad}"]) from None
        return chosen, rejected

    def check_pictures(self, advance: Callable[[], None] = lambda: None) -> PairSet:
        """The pairs whose pictures can all be used; decodes each once and calls ``advance`` after each pair.

        Raises:
            ConfigError: bad rows without ``skip_bad_rows``, or no pair is left.
        """
        bad: dict[int, str] = {}
        executor = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            for start in range(0, len(self), 1024):
                block = range(start, min(start + 1024, len(self)))
                for i, problem in zip(block, executor.map(self._picture_problem, block)):
                    if problem:
                        bad[self.rows[i]] = problem
                    advance()
        finally:
            executor.shutdown(cancel_futures=True)
        good = [row not in bad for row in self.rows]
        checked = replace(
            self,
            prompts=list(compress(self.prompts, good)),
            rows=list(compress(self.rows, good)),
            skipped=dict(sorted((self.skipped | bad).items())),
            _first_wins=list(compress(self._first_wins, good)),
        )
        return _usable(checked, bad)

    def _cells(self, i: int) -> list[tuple[str, Any]]:
        first, second = self._table.cells(self.rows[i], self._columns)
        return list(zip(("chosen", "rejected"), (first, second) if self._first_wins[i] else (second, first)))

    def _picture_problem(self, i: int) -> str | None:
        try:
            chosen, rejected = (_decoded(value, side, self._table.folder) for side, value in self._cells(i))
        except _BadRow as bad:
            return f"pairs: row {self.rows[i]}: {bad}"
        if chosen.size != rejected.size:
            sizes = "chosen is {}x{} and rejected {}x{}".format(*chosen.size, *rejected.size)
            return f"pairs: row {self.rows[i]}: {sizes}: both must have one size"
        same = chosen.tobytes() == rejected.tobytes()
        return f"pairs: row {self.rows[i]}: chosen and rejected are the same picture" if same else None


def pairs_problems(config: PairsConfig) -> list[str]:
    """Sentences about what can be seen without decoding a picture and without a download; [] if all is well."""
    problems: list[str] = []
    try:
        if not _is_hub(config.source):
            open_pairs(config)
            return []
        problems = _mapping_problems(config.columns)
        _load_dataset_function(config)
    except ConfigError as error:
        return problems + error.problems
    return problems


def open_pairs(config: PairsConfig) -> PairSet:
    """The pairs of ``config.source``; labels, prompts and the presence of the pictures are checked here.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    problems = _mapping_problems(config.columns)
    try:
        table = _open_table(config)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    if not len(table):
        return _usable(PairSet([], [], 0, {}, config, table, [], []), {})
    names = _mapping(config.columns or {}, table.names)
    sides = [names[side] for side in (("chosen", "rejected") if "chosen" in names else ("first", "second"))]
    firsts, seconds = (table.outline(name) for name in sides)
    prompts = table.column(names["prompt"])
    label = names.get("first_wins")
    wins = table.column(label) if label else [1] * len(table)
    result = PairSet([], [], 0, {}, config, table, sides, [])
    ties = 0
    for row in range(len(table)):
        if len(result) == config.max_pairs:
            break
        win = _label(wins[row])
        if win == 0.5:
            ties += 1
            continue
        try:
            if win is None:
                raise _BadRow(f"{label} is {_short(wins[row])}, not one of 0, 0.5, 1")
            _check_prompt(prompts[row])
            pair = (firsts[row], seconds[row]) if win else (seconds[row], firsts[row])
            sources = [_picture_source(value, side, table.folder) for side, value in zip(("chosen", "rejected"), pair)]
            if isinstance(sources[0], Path) and sources[0] == sources[1]:
                raise _BadRow("chosen and rejected are the same picture")
        except _BadRow as bad:
            result.skipped[row] = f"pairs: row {row}: {bad}"
            continue
        result.prompts.append(prompts[row])
        result.rows.append(row)
        result._first_wins.append(win == 1)
    return _usable(replace(result, ties=ties), result.skipped)


def _usable(pairs: PairSet, bad: Mapping[int, str]) -> PairSet:
    """``pairs``, or a ConfigError if none is left or the rows newly found ``bad`` may not be left out."""
    config = pairs._config
    if pairs.rows and (config.skip_bad_rows or not bad):
        return pairs
    problems = _first(list(bad.values()))
    if pairs.rows:
        problems.append("pairs: mend the rows above, or set pairs.skip_bad_rows=true to leave them out")
    else:
        counts = f"{len(pairs._table)} rows, {pairs.ties} ties, {len(pairs.skipped)} bad rows"
        problems.append(f"pairs.source={config.source!r} holds no usable pair ({counts}): give at least one")
    raise ConfigError(problems)


def _first(sentences: list[str], what: str = "row") -> list[str]:
    more = len(sentences) - _SHOWN
    rest = [f"pairs: {more} more {what}{'s are' if more > 1 else ' is'} bad"] if more > 0 else []
    return sentences[:_SHOWN] + rest


def _mapping_problems(columns: Mapping[str, str] | None) -> list[str]:
    columns = columns or {}
    ours = list(dict.fromkeys(name for layout in LAYOUTS for name in layout))
    problems = [f"pairs.columns: unknown name {name!r}: {nearest(name, ours)}" for name in columns if name not in ours]
    if not problems and not any(columns.keys() <= layout.keys() for layout in LAYOUTS):
        problems.append("pairs.columns: give prompt, chosen, rejected or prompt, first, second, first_wins, not both")
    if len(set(columns.values())) < len(columns):
        problems.append("pairs.columns: two names stand for one column: give each its own")
    return problems


def _mapping(columns: Mapping[str, str], found: Sequence[str]) -> dict[str, str]:
    layouts = [layout | dict(columns) for layout in LAYOUTS if columns.keys() <= layout.keys()]
    for layout in layouts:
        if set(layout.values()) <= set(found):
            return layout
    have = f"the columns found are {', '.join(map(_short, found))}"
    missing = [f"there is no column {name!r}" for name in columns.values() if name not in found]
    needed = " or ".join(", ".join(layout.values()) for layout in layouts)
    what = " and ".join(missing) if missing else f"the columns {needed} are needed"
    raise ConfigError([f"pairs.columns: {what}; {have}: map our names to these"])


class _Rows:
    """Rows in memory; pictures are paths relative to ``folder``, or tensors."""

    def __init__(self, rows: list[dict[str, Any]], folder: Path | None) -> None:
        self.rows, self.folder = rows, folder
        self.names = list(dict.fromkeys(name for row in rows for name in row if name is not None))

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]

    outline = column

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        return [self.rows[row].get(name) for name in names]


class _Dataset:
    """Rows of a ``datasets.Dataset``: an Arrow table mapped from disk; Image columns are (bytes, path) structs."""

    def __init__(self, dataset: Any, folder: Path | None) -> None:
        self.table, self.folder, self.names = dataset.with_format("arrow")[:], folder, dataset.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> list[Any]:
        return self.table.column(name).to_pylist()

    def outline(self, name: str) -> list[Any]:
        """A picture column with one byte in place of each picture's bytes, which are not read."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.table.column(name)
        if not isinstance(column.type, pa.StructType):
            return _outline(column)
        bytes_, paths = (
            _outline(pc.struct_field(column, part)) if column.type.get_field_index(part) >= 0 else [None] * len(column)
            for part in ("bytes", "path")
        )
        return [data or path for data, path in zip(bytes_, paths)]

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        return [self.table.column(name)[row].as_py() for name in names]


def _outline(column: Any) -> list[Any]:
    import pyarrow.compute as pc

    if str(column.type) not in ("binary", "large_binary"):
        return column.to_pylist()
    return [b"." if length else None for length in pc.binary_length(column).to_pylist()]


def _is_hub(source: str) -> bool:
    known = source == EMBEDDED or os.path.exists(os.path.expanduser(source)) or source.endswith(_SUFFIXES)
    return not known and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def _open_table(config: PairsConfig) -> _Rows | _Dataset:
    source, path = config.source, Path(os.path.expanduser(config.source))
    if source == EMBEDDED:
        return _embedded(config)
    if _is_hub(source):
        return _Dataset(_loaded(config, source, split=config.split), None)
    if os.path.isdir(path):
        files = [path / f"pairs{suffix}" for suffix in _SUFFIXES if os.path.isfile(path / f"pairs{suffix}")]
        if not files:
            return _Dataset(_loaded(config, str(path.resolve()), split=config.split), path)
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise ConfigError([f"pairs.source={source!r} holds {names}: give the file that is meant"])
        path = files[0]
    if not os.path.isfile(path):
        raise ConfigError(
            [
                f"pairs.source={_short(source)}: there is no such file or folder: give {EMBEDDED}, a .jsonl, .csv or "
                ".parquet file, a folder, or a Hub dataset owner/name"
            ]
        )
    if path.suffix not in _SUFFIXES:
        raise ConfigError([f"pairs.source={source!r}: use a .jsonl, .csv or .parquet file"])
    if config.split != "train":
        raise ConfigError([f"pairs.split={config.split!r} is not known: a file holds one split, train; leave it out"])
    if path.suffix == ".parquet":
        file = glob.escape(str(path.resolve()))
        return _Dataset(_loaded(config, "parquet", data_files=file, split="train"), path.parent)
    return _Rows(_read(config, path), path.parent)


def _embedded(config: PairsConfig) -> _Rows:
    problems = [f"pairs.columns cannot be used with {EMBEDDED}: leave it out"] if config.columns else []
    if config.split not in ("train", "heldout", "all"):
        problems.append(f"pairs.split={config.split!r} is not known: choose train, heldout or all")
    if problems:
        raise ConfigError(problems)
    pairs = load_preferences(config.split)  # type: ignore[arg-type]
    return _Rows([{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs], None)


def _load_dataset_function(config: PairsConfig) -> Callable[..., Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        needs = f"pairs.source={config.source!r} needs the package datasets"
        raise ConfigError([f"{needs}: pip install 'diffusion-align[datasets]'"]) from None
    return load_dataset


def _loaded(config: PairsConfig, name: str, **options: Any) -> Any:
    load = _load_dataset_function(config)
    try:
        return load(name, trust_remote_code=False, **options)
    except Exception as error:  # builders, pyarrow, the Hub and the network each raise their own
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        remedy = "check the name, the network and your access to it" if _is_hub(config.source) else "mend it"
        raise ConfigError(
            [f"pairs.source={config.source!r}, split {config.split!r}, cannot be loaded ({reason}): {remedy}"]
        ) from None


def _read(config: PairsConfig, path: Path) -> list[dict[str, Any]]:
    start = f"pairs.source={config.source!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{start} cannot be read: {error}"]) from None
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            return [dict(row) for row in reader]
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
        raise ConfigError(_first(problems, "line"))
    return rows


def _label(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number in (0, 0.5, 1) else None


def _check_prompt(prompt: Any) -> None:
    if prompt is None or prompt == "" or (isinstance(prompt, str) and not prompt.strip()):
        raise _BadRow("the prompt is empty")
    if not isinstance(prompt, str):
        raise _BadRow(f"the prompt is {_short(prompt)}, not a text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"the prompt {_short(prompt)} is not valid Unicode") from None


def _picture_source(value: Any, side: str, folder: Path | None) -> Tensor | bytes | Path:
    """The tensor, the encoded bytes or the existing file that a row names; ``_BadRow`` if it names none."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Tensor) or (isinstance(value, bytes) and value):
        return value
    if not isinstance(value, str) or not value.strip():
        raise _BadRow(f"{side} is {_short(value)}, not the path or the bytes of a picture")
    path = (folder or Path()) / value
    if not os.path.isfile(path):
        raise _BadRow(f"the picture {_short(value)[1:-1]} is missing")
    return path


def _decoded(value: Any, side: str, folder: Path | None) -> Image.Image:
    """The picture in RGB, upright, on white where it is transparent."""
    source = _picture_source(value, side, folder)
    if isinstance(source, Tensor):
        return Image.fromarray((source * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits, which PIL would clip at 255
                return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8)).convert("RGB")
            if not picture.has_transparency_data:
                return picture.convert("RGB")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    except Exception:  # PIL's decoders raise whatever they meet in a damaged file
        raise _BadRow(f"{side} is not a picture that can be read") from None


def _fitted(value: Any, side: str, folder: Path | None, size: tuple[int, int]) -> Tensor:
    if isinstance(value, Tensor) and value.shape[1:] == size:
        return value.clone()
    picture, (height, width) = _decoded(value, side, folder), size
    scale = max(height / picture.height, width / picture.width)
    wide, tall = max(width, round(scale * picture.width)), max(height, round(scale * picture.height))
    left, top = (wide - width) // 2, (tall - height) // 2
    x, y = picture.width / wide, picture.height / tall
    box = (left * x, top * y, min((left + width) * x, picture.width), min((top + height) * y, picture.height))
    pixels = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous().float() / 255


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
