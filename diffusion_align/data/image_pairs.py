"""Preference pairs of images: the embedded drawings, a file, a folder or a Hugging Face dataset.

Rows are ``prompt, chosen, rejected`` or, as in Pick-a-Pic, ``caption, jpg_0, jpg_1, label_0`` where the label says
whether image 0 wins. Images are decoded on access and never kept: once in a run, when they are encoded, unless only
decoding can tell whether a file is whole.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from pydantic import Field, field_validator

from diffusion_align.data.buckets import Size, fit
from diffusion_align.data.drawings import PreferencePair, load_preferences
from diffusion_align.data.schemas import BadRow, ColumnSchemas, RowsConfig, Source, checked_prompt, limit_of
from diffusion_align.data.sources import FILES, Cells, GivenRows, ListTable, Table, short
from diffusion_align.errors import ConfigError
from diffusion_align.images import UnreadableImage, open_image, size_of_whole, to_rgb, without_warnings
from diffusion_align.lazy import is_tensor
from diffusion_align.training.digests import WHOLE, content_digest, file_digest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EMBEDDED = "emoji_style"
_SAME = "chosen and rejected are the same image"
COLUMN_SCHEMAS = (
    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"prompt": "caption", "first": "jpg_0", "second": "jpg_1", "first_wins": "label_0"},
)


class PairsConfig(RowsConfig):
    """Where the pairs come from."""

    places = f"{EMBEDDED}, {FILES}"
    column_schemas: ClassVar[Mapping[str, ColumnSchemas]] = {"pairs": COLUMN_SCHEMAS}
    limit, stem = "max_pairs", "pairs"
    source: Source = Field(description=f"{EMBEDDED}, {FILES}")
    split: str = Field("train", min_length=1, description="train, heldout or all of emoji_style; a dataset's own split")
    columns: dict[str, str] | None = Field(
        None,
        description="column names, ours -> the source's: prompt, chosen, rejected or prompt, first, second, first_wins",
    )
    max_pairs: int | None = limit_of("pairs")

    def open_source(self, name: str) -> Table:
        return _embedded(self) if self.source == EMBEDDED else super().open_source(name)

    def read(self, name: str, kind: str) -> PairSet:
        return _pair_set(self, *self.table(name, kind))

    @field_validator("source", mode="after")
    @classmethod
    def _as_files(cls, source: Any) -> Any:
        """Images in a list or a DataFrame as the bytes of a file, which is what rows hold everywhere else."""
        if not isinstance(source, GivenRows) or not isinstance(source.table, ListTable):
            return source
        rows = [{name: _as_file(cell) for name, cell in row.items()} for row in source.table.rows]
        return GivenRows(ListTable(rows, source.table.folder))


@dataclass(frozen=True)
class PairSet:
    """The usable pairs of a source, in row order."""

    prompts: list[str]
    rows: list[int]
    ties: int
    skipped: dict[int, str]
    _config: PairsConfig = field(repr=False)
    _table: Table = field(repr=False)
    _columns: list[str] = field(repr=False)
    _first_wins: list[bool] = field(repr=False)
    _contents: dict[int, list[str]] = field(default_factory=dict, repr=False)  # row -> digests of its images
    _sizes: dict[int, Size] = field(default_factory=dict, repr=False)  # row -> that of both its images

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, i: int, size: Size, out: Tensor | None = None) -> Tensor:
        """Chosen and rejected of pair ``i``, (2, 3, H, W) float32 in [0, 1], scaled to cover ``size``, centre-cropped.

        Args:
            out: where to put them, if not in a new tensor.

        Raises:
            ConfigError: an image that cannot be read, or both are the same.
        """
        import torch

        found = torch.empty(2, 3, *size) if out is None else out
        with self._naming(i):
            images = [_image(value, side, self._table.folder, size) for side, value in self._cells(i)]
            fitted = [image if is_tensor(image) else _fitted(image, size) for image in images]
            if _are_same(images, fitted):
                raise BadRow(_SAME)
        for pixels, place in zip(fitted, found):
            _put(pixels, place)
        return found

    def size(self, i: int) -> Size:
        """(height, width) of the images of pair ``i``, which ``check_images`` has found to be of one size.

        Raises:
            ConfigError: an image that cannot be read.
        """
        known = self._sizes.get(self.rows[i])
        if known is None:
            with self._naming(i):
                (side, value), _ = self._cells(i)
                known, _ = _outline(value, side, self._table.folder)
        return known

    def identity(self, i: int) -> list[Any]:
        """What tells pair ``i`` from others: row, prompt and digests of both images' content."""
        row = self.rows[i]
        return [row, self.prompts[i], *(self._contents.get(row) or self._digests(i))]

    @without_warnings()
    def check_images(self, advance: Callable[[], None] = lambda: None) -> PairSet:
        """The pairs whose images can all be used, as far as their files tell; calls ``advance`` after each pair.

        Every file is read once. An image is only decoded here if nothing else tells whether its file is whole; what
        decoding alone can find of the others, ``images`` says.

        Raises:
            ConfigError: bad rows without ``skip_bad_rows``, or no pair is left.
        """
        bad: dict[int, str] = {}
        contents: dict[int, list[str]] = {}
        sizes: dict[int, Size] = {}
        executor = ThreadPoolExecutor(decoders())
        try:
            for start in range(0, len(self), 1024):
                block = range(start, min(start + 1024, len(self)))
                for i, (found, digests) in zip(block, executor.map(self._looked_at, block)):
                    if isinstance(found, str):
                        bad[self.rows[i]] = found
                    else:
                        contents[self.rows[i]], sizes[self.rows[i]] = digests, found
                    advance()
        finally:
            executor.shutdown(cancel_futures=True)
        return replace(self, _contents=contents, _sizes=sizes).without(bad)

    def without(self, bad: Mapping[int, str]) -> PairSet:
        """Without the rows that are ``bad``, row -> what is wrong.

        Raises:
            ConfigError: there are some without ``skip_bad_rows``, or no pair is left.
        """
        good = [row not in bad for row in self.rows]
        left = replace(
            self,
            prompts=list(compress(self.prompts, good)),
            rows=list(compress(self.rows, good)),
            skipped=dict(sorted({**self.skipped, **bad}.items())),
            _first_wins=list(compress(self._first_wins, good)),
        )
        return _usable(left, bad)

    @property
    def left_out(self) -> str:
        """What was left out, as a line to print."""
        rows = ", ".join(map(str, list(self.skipped)[:10])) + (" ..." if len(self.skipped) > 10 else "")
        counts = f"{len(self)} pairs; left out: {self.ties} ties, {len(self.skipped)} bad rows"
        return f"{counts} ({rows})" if rows else counts

    @property
    def skips_bad_rows(self) -> bool:
        return self._config.skip_bad_rows

    def is_unchanged(self, i: int) -> bool:
        """Whether the files of pair ``i`` are those that ``check_images`` has read.

        Raises:
            ConfigError: one has vanished.
        """
        return self._digests(i) == self._contents.get(self.rows[i])

    def _cells(self, i: int) -> list[tuple[str, Any]]:
        first, second = self._table.cells(self.rows[i], self._columns)
        return list(zip(("chosen", "rejected"), (first, second) if self._first_wins[i] else (second, first)))

    @contextmanager
    def _naming(self, i: int) -> Iterator[None]:
        """Inside, what is wrong with pair ``i`` is an error that names its row."""
        try:
            yield
        except BadRow as bad:
            raise ConfigError([f"pairs: row {self.rows[i]}: {bad}"]) from None

    def _looked_at(self, i: int) -> tuple[str | Size, list[str]]:
        """The problem with the images of pair ``i``, or their size and the digests of their contents."""
        try:
            looks = [_outline(value, side, self._table.folder) for side, value in self._cells(i)]
            (chosen, _), (rejected, _) = looks
            digests = [digest for _, digest in looks]
            if chosen != rejected:
                sizes = "chosen is {}x{} and rejected {}x{}".format(*chosen[::-1], *rejected[::-1])
                raise BadRow(f"{sizes}: both must have one size")
            if digests[0] == digests[1]:
                raise BadRow(_SAME)
        except BadRow as bad:
            return f"pairs: row {self.rows[i]}: {bad}", []
        return chosen, digests

    def _digests(self, i: int) -> list[str]:
        """Digests of the contents of pair ``i``'s chosen and rejected images."""
        try:
            sources = [_image_source(value, side, self._table.folder) for side, value in self._cells(i)]
            return [_digest(source) for source in sources]
        except (BadRow, OSError) as error:  # it has vanished
            raise ConfigError([f"pairs: row {self.rows[i]}: {error}"]) from None


def decoders() -> int:
    """How many threads decode images: this process's part of the processors. PIL decodes and scales, and hashlib
    reads, without holding Python's lock."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def open_pairs(config: PairsConfig) -> PairSet:
    """The pairs of ``config.source``; labels, prompts and the presence of the images are checked here.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    pairs: PairSet = config.opened("pairs", "pairs")
    return pairs


def _pair_set(config: PairsConfig, table: Table, names: Mapping[str, str]) -> PairSet:
    if not names:
        return _usable(PairSet([], [], 0, {}, config, table, [], []), {})
    sides = [names[side] for side in (("chosen", "rejected") if "chosen" in names else ("first", "second"))]
    others = [names[name] for name in ("prompt", "first_wins") if name in names]
    ties = 0

    def make(row: Sequence[Any]) -> tuple[str, bool] | None:
        """The prompt, and whether the first image wins; None of a tie."""
        nonlocal ties
        first, second, prompt, *label = row
        win = _label(label[0]) if label else 1
        if win == 0.5:
            ties += 1
            return None
        if win is None:
            raise BadRow(f"{names['first_wins']} is {short(label[0])}, not one of 0, 0.5, 1")
        checked_prompt(prompt)
        _check_sources((first, second) if win else (second, first), table.folder)
        return prompt, win == 1

    with closing(table.scan([*sides, *others], sides)) as scan:
        made, rows, bad = config.usable("pairs", table, scan, make)
    prompts, first_wins = [prompt for prompt, _ in made], [wins for _, wins in made]
    return _usable(PairSet(prompts, rows, ties, bad, config, table, sides, first_wins), bad)


def _usable(pairs: PairSet, bad: Mapping[int, str]) -> PairSet:
    """``pairs``, or a ConfigError if none is left or the rows newly found ``bad`` may not be left out."""
    counts = f"{len(pairs._table)} rows, {pairs.ties} ties, {len(pairs.skipped)} bad rows"
    nothing = f"{pairs._config.table_source('pairs')} holds no usable pair ({counts})"
    pairs._config.check_usable("pairs", len(pairs), bad.values(), nothing)
    return pairs


def _label(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number in (0, 0.5, 1) else None


def _check_sources(pair: tuple[Any, Any], folder: Path | None) -> None:
    chosen, rejected = (_place(value, side, folder) for side, value in zip(("chosen", "rejected"), pair))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return
    roundabout = "./" in (both := chosen + rejected) or "//" in both
    if chosen == rejected or (roundabout and Path(chosen) == Path(rejected)):
        raise BadRow(_SAME)


def _as_file(cell: Any) -> Any:
    """A PIL image, or an array (H, W, 3) of 8 bits, as the bytes of a PNG; anything else as it is."""
    import numpy as np

    if isinstance(cell, np.ndarray) and cell.dtype == np.uint8 and cell.ndim == 3 and cell.shape[2] == 3:
        cell = Image.fromarray(cell)
    if not isinstance(cell, Image.Image):
        return cell
    try:
        image = to_rgb(cell)
    except UnreadableImage:
        return cell  # which the row that holds it is then refused for
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _image_source(value: Any, side: str, folder: Path | None) -> Tensor | bytes | Path:
    """The tensor, the encoded bytes or the existing file that a row names; ``BadRow`` if it names none."""
    found = _place(value, side, folder)
    return Path(found) if isinstance(found, str) else found


def _place(value: Any, side: str, folder: Path | None) -> Tensor | bytes | str:
    """``_image_source`` of a row, of which there may be millions: making a Path takes longer than all else here."""
    if not isinstance(value, str):
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if is_tensor(value) or (isinstance(value, bytes) and value):
            return value
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{side} is {short(value)}, not the path or the bytes of an image")
    path = value if folder is None else os.path.join(folder, value)
    if not os.path.isfile(path):
        raise BadRow(f"the image {short(value)[1:-1]} is missing")
    return path


def _digest(source: Tensor | bytes | Path) -> str:
    """Digest of an image file, alone or inside a table, or of a tensor's numbers."""
    if is_tensor(source):
        return content_digest([source])
    return file_digest(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()


def _decoded(value: Any, side: str, folder: Path | None) -> Image.Image:
    """The image in RGB, as ``open_image`` reads it."""
    source = _image_source(value, side, folder)
    if is_tensor(source):
        return Image.fromarray((source * 255).round().byte().permute(1, 2, 0).numpy())
    try:
        return open_image(source)
    except UnreadableImage as problem:
        raise BadRow(f"{side} {problem}") from None


def _size(image: Image.Image) -> Size:
    return image.height, image.width


def _outline(value: Any, side: str, folder: Path | None) -> tuple[Size, str]:
    """Size and digest of an image; it is decoded only if its file does not tell that it is whole."""
    source = _image_source(value, side, folder)
    if is_tensor(source):
        return (source.shape[1], source.shape[2]), _digest(source)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError:
        data = b""
    size = size_of_whole(data) or _size(_decoded(value, side, folder))
    return size, hashlib.sha256(data).hexdigest() if 0 < len(data) <= WHOLE else _digest(source)


def _image(value: Any, side: str, folder: Path | None, size: Size) -> Image.Image | Tensor:
    """The decoded image; a tensor that has ``size`` as it is."""
    return value if is_tensor(value) and value.shape[1:] == size else _decoded(value, side, folder)


def _fitted(image: Image.Image, size: Size) -> np.ndarray:
    """(3, H, W) of 8 bits: scaled to cover ``size`` and centre-cropped."""
    import numpy as np

    if _size(image) != size:
        height, width = size
        (tall, wide), (top, left) = fit(_size(image), size)
        x, y = image.width / wide, image.height / tall
        box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image).transpose(2, 0, 1)


def _put(pixels: np.ndarray | Tensor, place: Tensor) -> None:
    """``pixels`` (3, H, W), of 8 bits or already in [0, 1], in ``place``, in float32."""
    import numpy as np

    if is_tensor(pixels):
        place.copy_(pixels)
    else:  # numpy: torch has threads of its own in every thread of ours
        np.divide(pixels, np.float32(255), out=place.numpy())


def _are_same(images: Sequence[Image.Image | Tensor], fitted: Sequence[np.ndarray | Tensor]) -> bool:
    """Whether two images are the same; a few pixels of what they are fitted to are compared first."""
    import numpy as np

    chosen, rejected = images
    if is_tensor(chosen) or is_tensor(rejected):
        return False
    few, others = (pixels[:, ::16, ::16] for pixels in fitted)
    return np.array_equal(few, others) and chosen.tobytes() == rejected.tobytes()


class _DrawnPairs(ListTable):
    """The embedded pairs, whose drawings are decoded when they are looked at."""

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        super().__init__([{"prompt": pair.prompt, "chosen": pair, "rejected": pair} for pair in pairs], None)

    def scan(self, names: Sequence[str], outlined: Sequence[str] = ()) -> Cells:
        for row in range(len(self)):
            yield [b"0" if name in outlined else self.cells(row, [name])[0] for name in names]

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        found = [(name, self.rows[row][name]) for name in names]
        return [getattr(cell, name) if isinstance(cell, PreferencePair) else cell for name, cell in found]


def _embedded(config: PairsConfig) -> ListTable:
    problems = [f"pairs.columns cannot be used with {EMBEDDED}: leave it out"] if config.columns else []
    if config.split not in ("train", "heldout", "all"):
        problems.append(f"pairs.split={config.split!r} is not known: choose train, heldout or all")
    if problems:
        raise ConfigError(problems)
    return _DrawnPairs(load_preferences(config.split))  # type: ignore[arg-type]
