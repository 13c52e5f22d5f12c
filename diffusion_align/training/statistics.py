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

    ``rewards`` (N,), a group beside each other; nan where there is none.
    """
    if group_size < 2:
        return {}
    groups, nothing = rewards.view(-1, group_size), rewards.isnan().view(-1, group_size)
    equal = groups.masked_fill(nothing, -torch.inf).amax(1) <= groups.masked_fill(nothing, torch.inf).amin(1)
    return {"frac_reward_zero_std": equal.double().mean().item()}


class UpdateStatistics:
    """Collects (n,) tensors by name; a name ending in ``/min`` or ``/max`` keeps its extreme, others their mean.

    One ending in ``_stderr`` is the standard error of the mean of what is given, which is taken to be independent. A
    statistic may cover only some of the micro-batches.
    """

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._moments: list[tuple[str, Tensor]] = []

    def add(self, statistics: Mapping[str, Tensor]) -> None:
        """Take in the statistics of one micro-batch."""
        for name, values in list(statistics.items()):
            if name.endswith("_stderr"):
                self._moments.append((name, values.detach()))
                continue
            reduce = _EXTREMES.get(name.rpartition("/")[2], torch.sum)
            reduced = reduce(values)
            if name in self._values:
                reduced = reduce(torch.stack([self._values[name], reduced]))
            self._values[name] = reduced
            self._counts[name] = self._counts.get(name, 0) + len(values)

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """Name -> number, the same on every process; one transfer to the host."""
        sums = torch.stack([v.float() for v in self._values.values()]).tolist() if self._values else []
        parts = [{name: (value, self._counts[name]) for name, value in zip(self._values, sums, strict=True)}]
        names = dict.fromkeys(name for name, _ in self._moments)
        spread = [{name: torch.cat([v for n, v in self._moments if n == name]).cpu() for name in names}]
        if accelerator.num_processes > 1:
            parts, spread = gather_object(parts), gather_object(spread)
        result: dict[str, float] = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            found, counts = zip(*(part[name] for part in parts if name in part), strict=True)
            if name.endswith(("/min", "/max")):
                result[name] = min(found) if name.endswith("/min") else max(found)
            else:
                result[name] = sum(found) / sum(counts)
        for name in dict.fromkeys(name for part in spread for name in part):
            values = torch.cat([part[name] for part in spread if name in part]).double()
            if len(values) > 1:
                result[name] = (values.std() / len(values) ** 0.5).item()
        return result
