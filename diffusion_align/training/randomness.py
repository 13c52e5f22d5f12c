"""Random streams named by what they are for, so that nothing depends on batch sizes, processes or interruptions."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *names: int | str) -> torch.Generator:
    """A CPU generator for one purpose, e.g. ``generator(seed, "noise", epoch, sample)``; same names, same stream."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
