"""The KL of a whole path from few of its steps: which of them to look at, the estimate and its standard error.

A path has S trained steps, whose KLs differ by orders of magnitude, mostly in known proportions (``weights``). So every
step is looked at, each time in another sample, and the estimate is the sum over steps of the mean of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def choose_actions(steps: Tensor, trained: Tensor, weights: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """(n, 2) int64 (row, column) of ``steps``: every trained step that occurs, and what is left by weight.

    The step whose KL is largest decides how well the sum is known (Neyman's allocation). A step is looked at in
    different samples, those taken least so far first, so that n samples or more serve n looks once each. In random
    order.

    Args:
        steps: (M, K) the steps that M samples have recorded, each once.
        trained: (S,) those there are.
        weights: (S,) in what proportion their KLs are, roughly.
        most: how many may be looked at, if that is more than S.
        generator: on the CPU.
    """
    left = max(most - len(trained), 0)
    share = weights.double().cpu() / weights.sum().item() * left
    counts = 1 + share.floor().long()
    rest = left - int(share.floor().sum())
    counts[(share - share.floor()).sort(descending=True, stable=True).indices[:rest]] += 1
    order = torch.randperm(len(steps), generator=generator)
    taken = torch.zeros(len(steps), dtype=torch.int64)
    found = []
    for step, each in zip(trained.tolist(), counts.tolist(), strict=True):
        places, columns = (steps[order] == step).nonzero(as_tuple=True)
        rows = order[places]
        for choice in taken[rows].sort(stable=True).indices[:each].tolist():
            taken[rows[choice]] += 1
            found.append([int(rows[choice]), int(columns[choice])])
    indices = torch.tensor(found, dtype=torch.int64).view(-1, 2)
    return indices[torch.randperm(len(indices), generator=generator)]


def path_kl(steps: Tensor, kl: Tensor, trained: Tensor, weights: Tensor) -> tuple[float, float]:
    """``sum_s mean_i kl_si`` over the trained steps, and its standard error; both in the unit of ``kl``.

    Where a step was looked at more than once its own variance is known. Otherwise the relative variance is taken to be
    that of all steps together: of those looked at several times or, where none was, of successive steps' KLs over their
    weights (von Neumann's mean square successive difference). The larger of the two where both are there. Steps that
    nothing is known of are as the others, by their weights.

    Args:
        steps: (n,) int64.
        kl: (n,) of a sample at that step, at least 0.
        trained: (S,) the steps of a path, in order.
        weights: (S,) in what proportion the KLs of the trained steps are, roughly.

    Raises:
        ValueError: nothing was looked at.
    """
    if not len(kl):
        raise ValueError("kl is empty: look at one step at least")
    kl, weights = kl.double().cpu(), weights.double().cpu()
    index = torch.searchsorted(trained, steps.cpu())
    counts = torch.bincount(index, minlength=len(trained))
    seen = counts > 0
    means = torch.zeros_like(weights).index_add(0, index, kl) / counts.clamp(min=1)
    squares = torch.zeros_like(weights).index_add(0, index, (kl - means[index]).square())
    scale = 1.0 if bool(seen.all()) else float(weights.sum() / weights[seen].sum())

    several = counts > 1
    if several.any():
        known = several & (means > 0)
        relative = (squares[known] / (counts[known] - 1) / means[known].square()).mean() if known.any() else 0.0
    else:
        level = means[seen] / weights[seen]
        pairs = (level[1:] + level[:-1]) / 2
        known = pairs > 0
        relative = ((level.diff()[known] / pairs[known]).square() / 2).mean() if known.any() else float(len(level) < 2)
    variance = relative * means.square() / counts.clamp(min=1)
    own = squares / (counts - 1).clamp(min=1) / counts.clamp(min=1)
    variance = torch.where(several, variance.maximum(own), variance)
    return scale * float(means.sum()), scale * math.sqrt(float(variance.sum()))
