"""Random streams named by what they are for, so that nothing depends on batch sizes, processes or interruptions."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *names: int | str) -> torch.Generator:
    """A CPU generator for one purpose, e.g. ``generator(seed, "noise", epoch, sample)``; same names, same stream."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))


def stream_seed(seed: int, *names: int | str) -> int:
    """What ``generator`` seeds a stream with, for generators of other devices."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
