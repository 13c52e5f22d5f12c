"""Embeddings of more prompts than memory keeps: encoded once, in files of the run folder, and read as they are used."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from diffusion_align.data.buckets import Size
from diffusion_align.errors import CheckpointError, UserError
from diffusion_align.models.families import Conditioning
from diffusion_align.training.checkpoint import open_tensors
from diffusion_align.training.digests import content_digest
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars
from diffusion_align.writing import make_folder, new_file

if TYPE_CHECKING:
    from diffusion_align.diffusion.policy import DenoisingPolicy

FILE = 128
"""Prompts in a file."""
MOST_OF_DISK = 0.5
"""Share of the free disk that the files may take."""


class PromptFiles:
    """What the network is told of ``prompts``, which no trained weight changes, at most 128 prompts per file.

    A file that is there is not made again; every file holds a digest of what it was made from.

    Args:
        prompts: different texts, each with the (height, width) of its image in pixels.
        model: digests of the model that encodes.
    """

    def __init__(self, folder: Path, prompts: Sequence[tuple[str, Size]], model: Any) -> None:
        self.folder, self._model = folder, model
        self._files = [prompts[start : start + FILE] for start in range(0, len(prompts), FILE)]
        self._places = {one: (n, row) for n, some in enumerate(self._files) for row, one in enumerate(some)}

    def fits(self, like: Conditioning) -> bool:
        """Whether there is room on the disk for all of them, of which ``like`` (B, ...) are B.

        Where files are there already counts as free, so that a run which is resumed continues with them.
        """
        each = sum(part.nbytes for part in like.values()) / len(next(iter(like.values())))
        there = sum(path.stat().st_size for path in map(self._path, range(len(self._files))) if path.is_file())
        return each * len(self._places) < MOST_OF_DISK * (shutil.disk_usage(self.folder.parent).free + there)

    def fill(self, policy: DenoisingPolicy, processes: Processes, bars: Bars) -> None:
        """Encode what is missing, every process its part, with a progress bar; between files the run can be stopped."""
        numbers = [n for n in range(len(self._files)) if not self._is_made(n)]
        processes.wait()  # all have looked before the first file is written
        own = numbers[processes.index :: processes.count]
        with bars.task("  encoding prompts", sum(len(self._files[n]) for n in own)) as advance:
            for turn in range(-(-len(numbers) // processes.count)):
                processes.stop_if_interrupted()
                failure = None
                try:
                    if turn < len(own):
                        prompts = self._files[own[turn]]
                        self._write(own[turn], policy.encode(*zip(*prompts, strict=True)))
                        advance(len(prompts))
                except UserError as error:  # the disk is full
                    failure = error
                processes.raise_together(failure, UserError)
        processes.wait()

    def read(self, prompts: Iterable[tuple[str, Size]], device: torch.device) -> dict[tuple[str, Size], Conditioning]:
        """What the network is told of those of the ``prompts`` that are in the files, (1, ...) each."""
        found = {}
        for prompt in prompts:
            if prompt in self._places:
                number, row = self._places[prompt]
                with open_tensors(self._path(number)) as file:  # it is mapped: only this row is read
                    names = list(file.keys())
                    found[prompt] = {name: file.get_slice(name)[row : row + 1].to(device) for name in names}
        return found

    def _is_made(self, number: int) -> bool:
        try:
            with open_tensors(self._path(number)) as file:
                return (file.metadata() or {}).get("prompts") == self._digest(number)
        except CheckpointError:  # it is not there, or not whole
            return False

    def _digest(self, number: int) -> str:
        return content_digest([self._model, *self._files[number]])

    def _write(self, number: int, encoded: Conditioning) -> None:
        make_folder(self.folder)
        tensors = {name: part.cpu().contiguous() for name, part in encoded.items()}
        with new_file(self._path(number)) as temporary:
            save_file(tensors, temporary, {"prompts": self._digest(number)})

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
