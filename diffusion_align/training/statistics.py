"""Averages and extremes over the decisions of one update, of all processes, without a transfer a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

_EXTREMES = {"min": torch.amin, "max": torch.amax}


def equal_reward_metric(rewards: Tensor, group_size: int) -> dict[str, float]:
    """``frac_reward_zero_std``, the share of groups whose rewards are all equal; nothing of groups of one.

    ``rewards`` (N,), a group beside each other.
    """
    if group_size < 2:
        return {}
    groups = rewards.view(-1, group_size)
    return {"frac_reward_zero_std": (groups == groups[:, :1]).all(dim=1).double().mean().item()}


class UpdateStatistics:
    """Collects (n,) tensors by name; a name ending in ``/min`` or ``/max`` keeps its extreme, others their mean.

    A statistic may cover only some of the micro-batches.
    """

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, statistics: Mapping[str, Tensor]) -> None:
        """Take in the statistics of one micro-batch."""
        for name, values in statistics.items():
            reduce = _EXTREMES.get(name.rpartition("/")[2], torch.sum)
            reduced = reduce(values)
            if name in self._values:
                reduced = reduce(torch.stack([self._values[name], reduced]))
            self._values[name] = reduced
            self._counts[name] = self._counts.get(name, 0) + len(values)

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """Name -> number, the same on every process; one transfer to the host."""
        values = torch.stack([v.float() for v in self._values.values()]).tolist() if self._values else []
        parts = [{name: (value, self._counts[name]) for name, value in zip(self._values, values, strict=True)}]
        if accelerator.num_processes > 1:
            parts = gather_object(parts)
        result: dict[str, float] = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            found, counts = zip(*(part[name] for part in parts if name in part), strict=True)
            if name.endswith(("/min", "/max")):
                result[name] = min(found) if name.endswith("/min") else max(found)
            else:
                result[name] = sum(found) / sum(counts)
        return result
