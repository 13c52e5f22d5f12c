"""The latents and captions of a run's preference pairs: encoded once; latents are kept in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.data.buckets import Size, fit
from diffusion_align.data.image_pairs import PairSet
from diffusion_align.diffusion.policy import (
    CACHED_PROMPTS,
    PROMPT_BATCH,
    Conditioning,
    DenoisingPolicy,
    cached_prompts,
)
from diffusion_align.errors import CheckpointError, UserError
from diffusion_align.training.checkpoint import open_tensors
from diffusion_align.training.digests import Identity, content_digest
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars
from diffusion_align.writing import make_folder, new_file

_SHARD = 256  # pairs in a file
_CAPTIONS = 16 * PROMPT_BATCH  # encoded at once: offloaded text encoders are copied to the device for each of these


class LatentCache:
    """Chosen and rejected latents of all ``pairs`` in ``folder``, at most 256 pairs of one size per file.

    A file that is there is not made again, so an interrupted encoding resumes where it stopped. Every file holds a
    digest of what it was made from, the content of its pairs and of the model: a file of others is made again.

    Args:
        sizes: (height, width) in pixels to which the images of each pair are fitted; the policy's own if not given.
    """

    def __init__(
        self, folder: Path, pairs: PairSet, policy: DenoisingPolicy, sizes: Sequence[Size] | None = None
    ) -> None:
        self.folder, self.pairs, self.policy = folder, pairs, policy
        self.cropped = sizes is not None  # else SDXL is told of whole images of its own size, as when it samples
        self.sizes = sizes or [policy.image_size] * len(pairs)
        of_size: dict[Size, list[int]] = {size: [] for size in sorted(set(self.sizes))}
        for pair, size in enumerate(self.sizes):
            of_size[size].append(pair)
        self._files = [
            some[start : start + _SHARD] for some in of_size.values() for start in range(0, len(some), _SHARD)
        ]
        self._places = {pair: (n, row) for n, some in enumerate(self._files) for row, pair in enumerate(some)}
        self._full = False
        self._model: Any = None  # digests of the model that encodes

    def fill(self, identity: Identity, *, batch_size: int, processes: Processes, bars: Bars) -> None:
        """Encode what is missing, every process its part, with a progress bar; between files the run can be stopped.

        Captions are encoded too; more of them than the policy can keep are encoded as they come.

        Args:
            identity: what the run is made of.
            batch_size: pairs encoded at once: twice as many images in a pass of the VAE.
            processes, bars: of the run.
        """
        if self._full:
            return
        self._model = [digest for _, digest in identity.get("model", ())]
        captions = sorted(dict.fromkeys(zip(self.pairs.prompts, self.sizes, strict=True)), key=lambda one: one[1])
        if len(captions) <= CACHED_PROMPTS:
            with bars.task("  encoding prompts", len(captions)) as advance:
                for start in range(0, len(captions), _CAPTIONS):
                    some = captions[start : start + _CAPTIONS]
                    encoded = self.policy.encode(*zip(*some, strict=True))
                    advance(len(some))
                    if len(captions) > cached_prompts(encoded):
                        break
        numbers = [n for n in range(len(self._files)) if not self._is_made(n)]
        processes.wait()  # all have looked before the first file is written
        own = numbers[processes.index :: processes.count]
        rounds = -(-len(numbers) // processes.count)
        with bars.task("  encoding images", sum(len(self._files[n]) for n in own)) as advance:
            for turn in range(rounds):
                processes.stop_if_interrupted()
                failure = None
                try:
                    if turn < len(own):
                        pairs, parts = self._files[own[turn]], []
                        for start in range(0, len(pairs), batch_size):
                            batch = pairs[start : start + batch_size]
                            parts.append(self._encode(batch))
                            advance(len(batch))
                        chosen, rejected = (torch.cat(side) for side in zip(*parts, strict=True))
                        self._write(own[turn], {"chosen": chosen, "rejected": rejected})
                except UserError as error:  # an image has vanished since it was looked at, or the disk is full
                    failure = error
                processes.raise_together(failure, UserError)
        processes.wait()
        self._full = True

    def read(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Chosen and rejected latents (C, H, W) of pairs ``indices``, on the CPU."""
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, row in (self._places[index] for index in indices):
            with open_tensors(self._path(number)) as file:
                for side, name in zip(sides, ("chosen", "rejected"), strict=True):
                    side.append(file.get_slice(name)[row])
        return sides

    def conditioning(self, indices: Sequence[int], texts: Sequence[str]) -> Conditioning:
        """What the network is told of pairs ``indices``, (B, ...): ``texts``, the size of their images, and where it
        is told of that, their original size and the corner at which they were cropped."""
        sizes = [self.sizes[i] for i in indices]
        together = self.policy.encode(texts, sizes)
        if not self.cropped:
            return together
        originals = [self.pairs.size(i) for i in indices]
        corners = [fit(original, size).corner for original, size in zip(originals, sizes, strict=True)]
        return self.policy.family.of_cropped(together, torch.tensor(originals), torch.tensor(corners))

    def _encode(self, pairs: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of pairs of one size."""
        size = self.sizes[pairs[0]]
        chosen, rejected = zip(*(self.pairs.images(i, size) for i in pairs), strict=True)
        latents = self.policy.encode_images(torch.stack(chosen + rejected)).cpu()
        return latents[: len(pairs)], latents[len(pairs) :]

    def _is_made(self, number: int) -> bool:
        try:
            with open_tensors(self._path(number)) as file:
                return (file.metadata() or {}).get("pairs") == self._digest(number)
        except CheckpointError:  # it is not there, or not whole
            return False

    def _digest(self, number: int) -> str:
        pairs = self._files[number]
        size = self.sizes[pairs[0]]
        return content_digest([self._model, size, *map(self.pairs.identity, pairs)])

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        make_folder(self.folder)
        metadata = {"pairs": self._digest(number)}
        with new_file(self._path(number)) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
