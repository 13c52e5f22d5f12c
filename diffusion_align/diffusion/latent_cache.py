"""The latents and captions of a run's preference pairs: encoded once; latents are kept in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.data.image_pairs import PairSet
from diffusion_align.diffusion.policy import CACHED_PROMPTS, PROMPT_BATCH, DenoisingPolicy
from diffusion_align.errors import CheckpointError, UserError
from diffusion_align.training.checkpoint import open_tensors
from diffusion_align.training.digests import Identity, content_digest
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars
from diffusion_align.writing import make_folder, new_file

_SHARD = 256  # pairs in a file


class LatentCache:
    """Chosen and rejected latents of all ``pairs`` in ``folder``, 256 pairs per file.

    A file that is there is not made again, so an interrupted encoding resumes where it stopped. Every file holds a
    digest of what it was made from, the content of its pairs and of the model: a file of others is made again.
    """

    def __init__(self, folder: Path, pairs: PairSet, policy: DenoisingPolicy) -> None:
        self.folder, self.pairs, self.policy = folder, pairs, policy
        self._full = False
        self._model: Any = None  # digests of the model that encodes

    def fill(self, identity: Identity, *, batch_size: int, processes: Processes, bars: Bars) -> None:
        """Encode what is missing, every process its part, with a progress bar; between files the run can be stopped.

        Captions are encoded too; more of them than the policy can keep are encoded as they come.

        Args:
            identity: what the run is made of.
            batch_size: pairs encoded at once.
            processes, bars: of the run.
        """
        if self._full:
            return
        self._model = [digest for _, digest in identity.get("model", ())]
        captions = list(dict.fromkeys(self.pairs.prompts))
        if len(captions) <= CACHED_PROMPTS:
            with bars.task("  encoding prompts", len(captions)) as advance:
                for start in range(0, len(captions), PROMPT_BATCH):
                    some = captions[start : start + PROMPT_BATCH]
                    self.policy.encode(some)
                    advance(len(some))
        numbers = [n for n in range(-(-len(self.pairs) // _SHARD)) if not self._is_made(n)]
        processes.wait()  # all have looked before the first file is written
        own = numbers[processes.index :: processes.count]
        rounds = -(-len(numbers) // processes.count)
        parts_of = {n: range(n * _SHARD, min((n + 1) * _SHARD, len(self.pairs))) for n in own}
        with bars.task("  encoding images", sum(map(len, parts_of.values()))) as advance:
            for turn in range(rounds):
                processes.stop_if_interrupted()
                failure = None
                try:
                    if turn < len(own):
                        pairs, parts = parts_of[own[turn]], []
                        for start in range(pairs.start, pairs.stop, batch_size):
                            batch = range(start, min(start + batch_size, pairs.stop))
                            parts.append(self._encode(batch))
                            advance(len(batch))
                        chosen, rejected = (torch.cat(side) for side in zip(*parts, strict=True))
                        self._write(own[turn], {"chosen": chosen, "rejected": rejected})
                except UserError as error:  # an image has vanished since it was looked at, or the disk is full
                    failure = error
                processes.raise_together(failure, UserError)
        processes.wait()
        self._full = True

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Chosen and rejected latents (B, C, H, W) of pairs ``indices``, on the policy's device."""
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for index in indices:
            with open_tensors(self._path(index // _SHARD)) as file:
                for side, name in zip(sides, ("chosen", "rejected"), strict=True):
                    side.append(file.get_slice(name)[index % _SHARD])
        chosen, rejected = (torch.stack(side).to(self.policy.device) for side in sides)
        return chosen, rejected

    def _encode(self, batch: range) -> tuple[Tensor, Tensor]:
        chosen, rejected = zip(*(self.pairs.images(i, self.policy.image_size) for i in batch), strict=True)
        latents = self.policy.encode_images(torch.stack(chosen + rejected)).cpu()
        return latents[: len(batch)], latents[len(batch) :]

    def _is_made(self, number: int) -> bool:
        try:
            with open_tensors(self._path(number)) as file:
                return (file.metadata() or {}).get("pairs") == self._digest(number)
        except CheckpointError:  # it is not there, or not whole
            return False

    def _digest(self, number: int) -> str:
        places = range(number * _SHARD, min((number + 1) * _SHARD, len(self.pairs)))
        return content_digest([self._model, self.policy.image_size, *(self.pairs.identity(i) for i in places)])

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        make_folder(self.folder)
        metadata = {"pairs": self._digest(number)}
        with new_file(self._path(number)) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
