"""Digests of what a run is made of: equal content has equal digests wherever it lies, whatever its name or date.

A file up to 64 MB is read whole. Of a larger one evenly spaced blocks are read: of every tensor in a safetensors file
(and its header), else of the file. Weights that were trained on, scaled or swapped differ in every block; seven
gigabytes take less than two seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

Identity = dict[str, list[tuple[str, str | None]]]
"""Setting -> (place, digest) of all that it names; None where nothing on this machine says what is there."""

WHOLE = 64_000_000  # bytes
_BLOCK = 4096
_SPACING_IN_TENSORS, _SPACING = 4 << 20, 256 << 10
_MODEL_SUFFIXES = {".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken"}
_UNUSED_PARTS = {"safety_checker", "feature_extractor", "image_encoder"}


def file_digest(path: str | os.PathLike[str]) -> str:
    """Digest of a file's content: all of it up to ``WHOLE`` bytes, blocks of a larger one.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"blocks of {size}".encode())
        for start, length, spacing in _extents(file, size):
            for offset in _block_offsets(length, spacing):
                file.seek(start + offset)
                digest.update(file.read(min(_BLOCK, length - offset)))
        return digest.hexdigest()


def model_digest(folder: Path) -> str:
    """Digest of a model's folder: the weights, configurations and tokenizer that lie in it, by name.

    For a diffusers pipeline (``model_index.json``) those in the folders of its parts. What else lies there, such as a
    README, does not count.
    """
    places = [folder]
    index = folder / "model_index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        places = [folder / name for name, value in content.items() if isinstance(value, list)]
        places = [place for place in places if place.name not in _UNUSED_PARTS and place.is_dir()]
    files = [
        file for place in places for file in place.iterdir() if file.suffix in _MODEL_SUFFIXES and file.is_file()
    ] + ([index] if index.is_file() else [])
    return content_digest(sorted((file.relative_to(folder).as_posix(), file_digest(file)) for file in files))


def hub_commit(repository: str) -> str | None:
    """The commit of a Hub repository that this machine's cache holds and a load now would find, if any."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in ("model_index.json", "config.json"):
        try:
            found = try_to_load_from_cache(repository, name)
        except HFValidationError:
            return None
        if isinstance(found, str) and "snapshots" in Path(found).parts:
            parts = Path(found).parts
            return parts[parts.index("snapshots") + 1]
    return None


def place_digest(place: str | os.PathLike[str]) -> str | None:
    """Digest of a file, a model's folder, or a Hub id (its commit); None where this machine has none of that name."""
    path = os.path.expanduser(place)
    try:
        if os.path.isdir(path):
            return model_digest(Path(path))
        if os.path.isfile(path):
            return file_digest(path)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # also of a damaged model's configuration
        return None
    return hub_commit(os.fspath(place)) if os.fspath(place).count("/") <= 1 else None  # gpt2 has no owner


def content_digest(rows: Iterable[Any]) -> str:
    """Digest of values: texts, numbers, bytes, arrays, and lists, mappings and dataclasses of these, in their order.

    Of an object of any other kind only its class counts: what it prints may hold its address.
    """
    digest = hashlib.sha256()
    for row in rows:
        try:
            text = json.dumps(row, default=_plain)
        except (TypeError, ValueError, RecursionError):  # keys that JSON does not have, a list that holds itself
            text = type(row).__name__
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def same_content(before: Mapping[str, Iterable[Iterable[Any]]], now: Identity) -> set[str]:
    """Settings all of whose content is known on both sides, and the same; as of ``changed_content``."""
    return {
        setting
        for setting in before.keys() & now.keys()
        if now[setting]
        and [digest for _, digest in before[setting]] == [digest for _, digest in now[setting]]
        and all(digest for _, digest in now[setting])
    }


def code_files(module: ModuleType) -> list[Path]:
    """The file of a module, then, sorted, the user's own files that it uses.

    Those are the files of modules that are imported there by name, or of which something is; followed as far as they
    are neither Python's, nor installed, nor this package.
    """
    found: dict[Path, None] = {}
    waiting: list[ModuleType | None] = [module]
    while waiting:
        one = waiting.pop()
        file = getattr(one, "__file__", None)
        if one is None or not isinstance(file, str) or Path(file) in found or not os.path.isfile(file):
            continue
        if _is_own_code(one) or (found and _is_installed(file)):
            continue
        found[Path(file)] = None
        for value in list(vars(one).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name != "__main__":
                waiting.append(sys.modules.get(name))
    return [*list(found)[:1], *sorted(list(found)[1:])]


def changed_content(before: Mapping[str, Iterable[Iterable[Any]]], now: Identity) -> dict[str, list[str]]:
    """Setting -> places in it whose content is not what it was; what one side does not know is not compared.

    Args:
        before: an ``Identity``, as JSON gives it back.
        now: of the same settings.
    """
    changed: dict[str, list[str]] = {}
    for setting in before.keys() & now.keys():
        old, new = [tuple(pair) for pair in before[setting]], now[setting]
        if len(old) != len(new):
            changed[setting] = [place for place, _ in new] or [place for place, _ in old]
            continue
        places = [place for (_, was), (place, found) in zip(old, new, strict=True) if was and found and was != found]
        if places:
            changed[setting] = places
    return {setting: changed[setting] for setting in now if setting in changed}


def _extents(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int]]:
    """(start, length, spacing of blocks) of the parts of a large file; the header of safetensors is read whole."""
    length = int.from_bytes(file.read(8), "little")
    try:
        header: Any = json.loads(file.read(length)) if 2 <= length <= min(size - 8, 100_000_000) else None
        tensors = sorted(one["data_offsets"] for name, one in header.items() if name != "__metadata__")
    except (ValueError, AttributeError, KeyError, TypeError):
        yield 0, size, _SPACING
        return
    yield 0, 8 + length, 1
    for begin, end in tensors:
        yield 8 + length + begin, end - begin, _SPACING_IN_TENSORS


def _block_offsets(length: int, spacing: int) -> Iterable[int]:
    """Where blocks begin: evenly spaced from the first to the last, or everywhere if that is hardly more."""
    count = 2 + length // spacing
    if count * _BLOCK >= length:
        return range(0, length, _BLOCK)
    return (i * (length - _BLOCK) // (count - 1) for i in range(count))


def _plain(value: Any) -> Any:
    """What stands for a value that JSON does not have."""
    import torch
    from torch import Tensor

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return vars(value)
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(raw.tobytes()).hexdigest()]
    if str(getattr(value, "dtype", "")) == "object":
        return value.tolist()
    if hasattr(value, "tobytes"):  # an array, or an image of PIL's
        shape = getattr(value, "shape", None) or getattr(value, "size", None)
        return [str(getattr(value, "dtype", getattr(value, "mode", ""))), shape, _plain(value.tobytes())]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return type(value).__name__ if type(value).__str__ is object.__str__ else str(value)


def _is_own_code(module: ModuleType) -> bool:
    return module.__name__.split(".")[0] == "diffusion_align"


def _is_installed(file: str) -> bool:
    path = Path(file).resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return any(path.is_relative_to(Path(place).resolve()) for place in _PYTHON)


_PYTHON = [place for name, place in sysconfig.get_paths().items() if name in ("stdlib", "platstdlib")]
