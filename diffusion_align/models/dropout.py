"""Dropout on the input of LoRA adapters, as in peft (Hu et al. 2021, arXiv:2106.09685), in training passes only.

Networks are in evaluation mode here: sampling, references, previews and evaluations see the whole adapter, and
``Dropout`` surrounds the training pass alone. A mask is seeded by the layer and by the sample that a row belongs to. So
it depends on no other row: two processes equal one, and a resumed run, or the second forward pass of gradient
checkpointing, sees the same masks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion_align.errors import UserError
from diffusion_align.models.lora import ADAPTER, lora_layers
from diffusion_align.training.randomness import stream_seed

if TYPE_CHECKING:
    from diffusion_align.training.config import LoRASettings
    from diffusion_align.training.method import Dropout


class RowDropout(nn.Module):
    """``nn.Dropout`` in which each row has a random stream of its own; without ``seeds`` the identity.

    Args:
        probability: of each number to be zeroed; the others are divided by 1 minus this.
        layer: name of its layer.

    Attributes:
        seeds: one per row; equal seeds share a mask. A pass of 2n or 4n rows (pairs, guidance) repeats n seeds.
    """

    def __init__(self, probability: float, layer: str) -> None:
        super().__init__()
        self.probability, self.layer = probability, layer
        self.seeds: Sequence[int] = ()

    def forward(self, x: Tensor) -> Tensor:
        """(R, ...) of the same shape.

        Raises:
            UserError: R is none of these, as in layers that are given tokens without their sample.
        """
        if not self.seeds:
            return x
        if len(x) not in (count := len(self.seeds), 2 * count, 4 * count):
            raise UserError(f"lora.dropout cannot tell the samples of {self.layer}'s input apart: set lora.dropout=0")
        masks = {seed: self._kept(seed, x) for seed in dict.fromkeys(self.seeds)}
        rows = torch.stack([masks[seed] for seed in self.seeds])
        every = rows.repeat(len(x) // len(rows), *[1] * (x.ndim - 1))
        return x * every / (1 - self.probability)

    def _kept(self, seed: int, x: Tensor) -> Tensor:
        stream = torch.Generator(x.device).manual_seed(stream_seed(seed, self.layer))
        return torch.rand(x.shape[1:], generator=stream, device=x.device) >= self.probability


def set_dropout(network: nn.Module, lora: LoRASettings | None) -> Dropout | None:
    """Give a network's adapters the dropout of ``lora``, switched off; returns what switches it on, None if 0."""
    probability, layers = lora.dropout if lora is not None else 0.0, lora_layers(network)
    for name, layer in layers.items():
        layer.lora_dropout[ADAPTER] = (RowDropout(probability, name) if probability else nn.Identity()).eval()
    return functools.partial(_dropping_out, list(layers.values())) if probability else None


@contextlib.contextmanager
def _dropping_out(layers: Sequence[Any], seeds: Sequence[int]) -> Iterator[None]:
    def switch(seeds: Sequence[int]) -> None:
        for layer in layers:
            layer.lora_dropout[ADAPTER].seeds = seeds
            layer.training = bool(seeds)  # which peft's DoRA looks at; the modules within stay as they are

    switch(seeds)
    try:
        yield
    finally:
        switch(())
