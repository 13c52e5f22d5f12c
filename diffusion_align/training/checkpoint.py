"""Checkpoints, written atomically: a kill leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_align import writing
from diffusion_align.errors import CheckpointError, first_line

_MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d+)")


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    weights: Mapping[str, Mapping[str, Tensor]],
    tensors: Any,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step_N`` and delete all but the newest ``keep``.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: optimizer steps so far.
        weights: file stem -> name -> tensor, written as safetensors.
        tensors: nested dicts and lists of tensors and plain values (optimizer, RNG), read back with weights_only.
        state: JSON values (counters, configuration, statistics).
        keep: how many checkpoints to leave.

    Raises:
        WriteError: there is no room, or the run's folder is gone; the checkpoints before stand.
    """
    writing.make_folder(folder)
    target = folder / f"step_{step:08d}"
    if not (target / _MANIFEST).exists():  # the same step again: what is there is as good, and is never without a copy
        shutil.rmtree(target, ignore_errors=True)
        with writing.new_folder(target) as temporary:
            for stem, named in weights.items():
                copies = {n: t.detach().cpu().contiguous() for n, t in named.items()}
                save_file(copies, temporary / f"{stem}.safetensors")
            with (temporary / "tensors.pt").open("wb") as file:  # given a path, torch hides why it cannot be written
                torch.save(tensors, file)
            (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            manifest = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and (p / _MANIFEST).exists()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], Any, dict[str, Any]]:
    """(weights, tensors, state) of a checkpoint whose every byte has been verified.

    Raises:
        CheckpointError: a file is missing or differs from its recorded hash.
    """
    problem = ""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        damaged = [name for name, digest in manifest.items() if _sha256(path / name) != digest]
        if damaged:
            problem = f"{', '.join(damaged)} differs from its hash"
        elif not manifest.keys() >= {"tensors.pt", "state.json", "trained.safetensors"}:
            problem = "its manifest is incomplete"
    except (OSError, ValueError, AttributeError) as error:
        problem = str(error)
    if problem:
        raise CheckpointError(f"checkpoint {path} is damaged ({problem}): delete it to resume from the one before")
    weights = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    tensors = torch.load(path / "tensors.pt", map_location="cpu", weights_only=True)
    return weights, tensors, json.loads((path / "state.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file of the run, opened to read parts of it.

    Raises:
        CheckpointError: it is damaged, or was removed while the run continues.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or gone ({first_line(error)}): choose a new output_dir") from None


def rng_state() -> dict[str, Any]:
    """Every global random state, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - user code may use it
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
