"""Latents and captions of a run's preference pairs: encoded once and, what memory cannot keep, in the run folder."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.data.buckets import Size, fit
from diffusion_align.data.image_pairs import PairSet, decoders
from diffusion_align.diffusion.policy import (
    PROMPT,
    PROMPT_BATCH,
    Conditioning,
    DenoisingPolicy,
    cached_prompts,
)
from diffusion_align.diffusion.prompt_files import PromptFiles
from diffusion_align.errors import CheckpointError, ConfigError, UserError
from diffusion_align.images import without_warnings
from diffusion_align.training.checkpoint import open_tensors
from diffusion_align.training.digests import Identity, content_digest
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars
from diffusion_align.writing import make_folder, new_file

_SHARD = 256  # pairs in a file
_LEFT_OUT = "left_out"
_CAPTIONS = 16 * PROMPT_BATCH  # encoded at once: offloaded text encoders are copied to the device for each of these


class LatentCache:
    """Chosen and rejected latents of all ``pairs`` in ``folder``, at most 256 pairs of one size per file.

    A file that is there is not made again, so an interrupted encoding resumes where it stopped. Every file holds a
    digest of what it was made from, the content of its pairs and of the model: a file of others is made again. It also
    names the pairs whose images turned out to be bad when they were decoded, which are then left out of ``pairs``.

    Args:
        sizes: (height, width) in pixels to which the images of each pair are fitted; the policy's own if not given.
        dtype: of the latents in the files; they are read in float32.
        prompts: where more captions than the policy can keep are kept, if they are.
    """

    def __init__(
        self,
        folder: Path,
        pairs: PairSet,
        policy: DenoisingPolicy,
        sizes: Sequence[Size] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        prompts: Path | None = None,
    ) -> None:
        self.folder, self.pairs, self.policy, self.dtype, self.prompts = folder, pairs, policy, dtype, prompts
        self.cropped = sizes is not None  # else SDXL is told of whole images of its own size, as when it samples
        self.sizes = list(sizes or [policy.image_size] * len(pairs))
        of_size: dict[Size, list[int]] = {size: [] for size in sorted(set(self.sizes))}
        for pair, size in enumerate(self.sizes):
            of_size[size].append(pair)
        self._files = [
            some[start : start + _SHARD] for some in of_size.values() for start in range(0, len(some), _SHARD)
        ]
        self._places = self._places_without({})
        self._full = False
        self._model: Any = None  # digests of the model that encodes

    def fill(self, identity: Identity, *, batch_size: int, processes: Processes, bars: Bars) -> None:
        """Encode what is missing, every process its part, with a progress bar; between files the run can be stopped.

        Captions are encoded too. More of them than the policy can keep are kept in files, or encoded as they come.

        Args:
            identity: what the run is made of.
            batch_size: pairs encoded at once: twice as many images in a pass of the VAE.
            processes, bars: of the run.
        """
        if self._full:
            return
        self._model = [digest for _, digest in identity.get("model", ())]
        self._fill_prompts(processes, bars)
        numbers = [n for n in range(len(self._files)) if not self._is_made(n)]
        processes.wait()  # all have looked before the first file is written
        own = numbers[processes.index :: processes.count]
        rounds = -(-len(numbers) // processes.count)
        total = sum(len(self._files[n]) for n in own)
        with closing(self._decoded(own, batch_size)) as decoded, bars.task("  encoding images", total) as advance:
            for turn in range(rounds):
                processes.stop_if_interrupted()
                failure = None
                try:
                    if turn < len(own):
                        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
                        bad: dict[int, str] = {}
                        for _ in range(0, len(self._files[own[turn]]), batch_size):
                            images, found = next(decoded)
                            for side, latents in zip(sides, self._encode(images), strict=True):
                                side.append(latents)
                            bad |= found
                            advance(images.shape[1] + len(found))
                        if bad and not self.pairs.skips_bad_rows:
                            self.pairs.without(bad)  # says what is wrong
                        chosen, rejected = map(torch.cat, sides)
                        self._write(own[turn], {"chosen": chosen, "rejected": rejected}, bad)
                except UserError as error:  # an image cannot be used, or has vanished, or the disk is full
                    failure = error
                processes.raise_together(failure, UserError)
        processes.wait()
        if self._leave_out():
            bars.print_start(self.pairs.left_out)
        self._full = True

    def _fill_prompts(self, processes: Processes, bars: Bars) -> None:
        captions = sorted(dict.fromkeys(zip(self.pairs.prompts, self.sizes, strict=True)), key=lambda one: one[1])
        few = self.policy.encode(*zip(*captions[:PROMPT_BATCH], strict=True))
        if len(captions) <= cached_prompts(few):
            with bars.task("  encoding prompts", len(captions)) as advance:
                for start in range(0, len(captions), _CAPTIONS):
                    some = captions[start : start + _CAPTIONS]
                    self.policy.encode(*zip(*some, strict=True))
                    advance(len(some))
        elif self.prompts is not None and PROMPT not in few:
            files = PromptFiles(self.prompts, captions, self._model)
            if processes.from_main(files.fits(few)):
                files.fill(self.policy, processes, bars)
                self.policy.prompt_files = files

    def read(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Chosen and rejected latents (C, H, W) of pairs ``indices``, float32, on the CPU."""
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, row in (self._places[index] for index in indices):
            with open_tensors(self._path(number)) as file:  # it is mapped: only these rows are read
                for side, name in zip(sides, ("chosen", "rejected"), strict=True):
                    side.append(file.get_slice(name)[row].float())
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

    def _decoded(self, numbers: Sequence[int], batch_size: int) -> Generator[tuple[Tensor, dict[int, str]], None, None]:
        """Of each batch of pairs in the files ``numbers``: images (2, B, 3, H, W), and row -> what is wrong with bad
        pairs, which are not among them. Threads decode the next batches while one is encoded; the images of a batch are
        overwritten once the next one is wanted."""
        batches = [
            self._files[n][start : start + batch_size]
            for n in numbers
            for start in range(0, len(self._files[n]), batch_size)
        ]
        threads = decoders()
        done: dict[torch.Size, list[Tensor]] = {}  # new memory would have to be cleared, which takes as long again
        ahead: deque[tuple[Sequence[int], Tensor, list[Future[str | None]]]] = deque()
        with without_warnings(), ThreadPoolExecutor(threads) as executor:
            try:
                waiting = iter(batches)
                for _ in batches:
                    while len(ahead) <= -(-threads // batch_size) and (coming := next(waiting, None)) is not None:
                        shape = torch.Size((2, len(coming), 3, *self.sizes[coming[0]]))
                        images = done[shape].pop() if done.get(shape) else torch.empty(shape)
                        jobs = [executor.submit(self._decode, i, images[:, k]) for k, i in enumerate(coming)]
                        ahead.append((coming, images, jobs))
                    batch, images, jobs = ahead.popleft()
                    problems = [job.result() for job in jobs]
                    bad = {self.pairs.rows[i]: one for i, one in zip(batch, problems, strict=True) if one is not None}
                    yield images[:, [one is None for one in problems]] if bad else images, bad
                    done = {images.shape: [*done.get(images.shape, ()), images]}
            finally:
                executor.shutdown(wait=False, cancel_futures=True)

    def _decode(self, pair: int, images: Tensor) -> str | None:
        """The images of ``pair`` into ``images`` (2, 3, H, W), or what is wrong with them.

        Raises:
            ConfigError: they cannot be read, and are not what was there when all were looked at.
        """
        try:
            self.pairs.images(pair, self.sizes[pair], images)
        except ConfigError as error:
            if not self.pairs.is_unchanged(pair):
                raise
            return str(error)
        return None

    def _encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Latents (B, C, H, W) of both sides of ``images`` (2, B, 3, H, W)."""
        if not images.shape[1]:
            return torch.empty(0, dtype=self.dtype), torch.empty(0, dtype=self.dtype)
        return self.policy.encode_images(images.flatten(0, 1)).to("cpu", self.dtype).tensor_split(2)

    def _leave_out(self) -> bool:
        """Leave pairs out of ``pairs`` whose images turned out to be bad, as the files say; whether there are any."""
        bad: dict[int, str] = {}
        for number in range(len(self._files)):
            with open_tensors(self._path(number)) as file:
                bad |= _left_out(file)
        if bad:
            self.sizes = [size for size, row in zip(self.sizes, self.pairs.rows, strict=True) if row not in bad]
            self._places = self._places_without(bad)
            self.pairs = self.pairs.without(bad)
        return bool(bad)

    def _places_without(self, bad: Collection[int]) -> list[tuple[int, int]]:
        """Where the latents of each pair lie but for the ``bad`` rows: number of the file, and place in it."""
        good = ([pair for pair in some if self.pairs.rows[pair] not in bad] for some in self._files)
        return [
            place for _, place in sorted((pair, (n, k)) for n, some in enumerate(good) for k, pair in enumerate(some))
        ]

    def _is_made(self, number: int) -> bool:
        try:
            with open_tensors(self._path(number)) as file:
                made = (file.metadata() or {}).get("pairs") == self._digest(number)
                return made and (not _left_out(file) or self.pairs.skips_bad_rows)
        except CheckpointError:  # it is not there, or not whole
            return False

    def _digest(self, number: int) -> str:
        pairs = self._files[number]
        narrow = [] if self.dtype == torch.float32 else [str(self.dtype)]
        return content_digest([self._model, self.sizes[pairs[0]], *narrow, *map(self.pairs.identity, pairs)])

    def _write(self, number: int, tensors: dict[str, Tensor], bad: Mapping[int, str]) -> None:
        make_folder(self.folder)
        metadata = {"pairs": self._digest(number)} | ({_LEFT_OUT: json.dumps(bad)} if bad else {})
        with new_file(self._path(number)) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


def _left_out(file: Any) -> dict[int, str]:
    """Row -> what is wrong, of the pairs whose latents are not in ``file`` because their images are bad."""
    return {int(row): problem for row, problem in json.loads((file.metadata() or {}).get(_LEFT_OUT, "{}")).items()}
