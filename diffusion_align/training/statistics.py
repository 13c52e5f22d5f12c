"""Averages and extremes over the actions of one update, of all processes, without a transfer per micro-batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffusion_align.estimators import clipped_ratios
from diffusion_align.estimators.policy import LOG_CLAMP

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


def agreement(margin: Tensor, label: float | Tensor = 1.0) -> Tensor:
    """How often a margin's sign says what a label says: 1 where chosen is ahead (margin > 0), 1/2 at a tie, else 0.

    ``label`` is the probability that the chosen one is preferred: the complement counts with 1 - label.
    """
    ahead = (margin > 0).to(margin) + 0.5 * (margin == 0)
    return label * ahead + (1 - label) * (1 - ahead)


def means_of(owners: Tensor, values: Tensor) -> Tensor:
    """(K,) float64 on the CPU: the mean of the ``values`` (n,) of each of K ``owners`` (n,), in their order."""
    kept, places, counts = owners.cpu().unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(kept), dtype=torch.float64).index_add(0, places, values.cpu().double()) / counts


def standard_error(means: Tensor) -> float | None:
    """Of the mean of (K,) independent ones, such as ``means_of`` samples whose steps, or groups whose noise, go
    together; None of one alone, of which nothing is known."""
    return (means.std() / len(means) ** 0.5).item() if len(means) > 1 else None


class UpdateStatistics:
    """Collects (n,) tensors by name; a name ending in ``/min`` or ``/max`` keeps its extreme, others their mean.

    One ending in ``_stderr`` is the ``standard_error`` of the mean of what is given. A statistic may cover only some of
    the micro-batches.
    """

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._moments: list[tuple[str, Tensor, Tensor]] = []  # name, samples, values

    def add(self, statistics: Mapping[str, Tensor], samples: Tensor) -> None:
        """Take in the statistics of one micro-batch; ``samples`` (n,) says which of this process's each value is of, or
        of which group where samples of one go together."""
        for name, values in list(statistics.items()):
            if name.endswith("_stderr"):
                self._moments.append((name, samples, values.detach()))
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
        spread = [{name: self._of_samples(name) for name in dict.fromkeys(name for name, _, _ in self._moments)}]
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
            if (error := standard_error(torch.cat([part[name] for part in spread if name in part]))) is not None:
                result[name] = error
        return result

    def _of_samples(self, name: str) -> Tensor:
        given = [(samples, values) for known, samples, values in self._moments if known == name]
        samples, values = (torch.cat(column) for column in zip(*given, strict=True))
        return means_of(samples, values)


def ratio_statistics(
    ratio: Tensor,
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    *,
    clip: float | None,
    clip_high: float | None = None,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Ratios, and which of them are clipped or clamped, of the actions that count, (n,) each, detached.

    ``ratio`` is ``importance_ratio``'s of ``logp`` and ``logp_old``; args as in ``clipped_surrogate``, but that
    ``clip=None`` is no clip.
    """
    ratio = ratio.detach()
    statistics = {
        "ratio/mean": ratio,
        "ratio/min": ratio,
        "ratio/max": ratio,
        "ratio/clamped": ((logp.detach() - logp_old).abs() > LOG_CLAMP).float(),
    }
    if clip is not None:
        low, high = clipped_ratios(ratio, clip=clip, clip_high=clip_high, advantages=advantages, mask=mask)
        statistics["clip_ratio/low_mean"] = low.float()
        statistics["clip_ratio/high_mean"] = high.float()
        statistics["clip_ratio/region_mean"] = (low | high).float()
    return {name: value if mask is None else value[mask] for name, value in statistics.items()}


def first_pass_deviation(statistics: Mapping[str, float]) -> float:
    """How far from 1 the ratios of an update are that no weight has changed before; only rounding is right."""
    return max(statistics["ratio/max"] - 1, 1 - statistics["ratio/min"])
