"""Whether a model is the velocity of what it samples: what a constant reward would already move.

Forward-process losses assume ``E[target - output | x_t] = 0`` for images of the model's own sampler. Guidance, too few
steps and distillation break it, and then every image pulls the weights the same way, whatever its reward. So the
gradients of the matching errors of n images, g_i, are compared: where the assumption holds their mean is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Consistency(NamedTuple):
    """``share``: ``|E g|² / E|g|²``, estimated without bias, so it may be below 0; 1 where all images agree."""

    share: float
    stderr: float


def common_share(gradients: Iterable[Sequence[Tensor]]) -> Consistency:
    """How much of n gradients, n > 1, is common to all: the mean of ``g_i · g_j`` over pairs, by that of ``|g|²``.

    Each is a sequence of tensors, of the same shapes in all. The standard error is that of a share of 0, where the
    products ``g_i · (g_1 + ... + g_(i-1))`` are uncorrelated.

    Raises:
        ValueError: there are fewer than two.
    """
    total: list[Tensor] = []
    products, norms = [], []
    for gradient in gradients:
        norms.append(_dot(gradient, gradient))
        if not total:
            total = [part.clone() for part in gradient]
            continue
        products.append(_dot(total, gradient))
        for kept, part in zip(total, gradient, strict=True):
            kept += part
    if len(norms) < 2:
        raise ValueError(f"{len(norms)} gradient(s) cannot be compared: give two or more")
    pairs, each = len(norms) * (len(norms) - 1) / 2, sum(norms) / len(norms)
    if each == 0:
        return Consistency(0.0, 0.0)
    return Consistency(sum(products) / pairs / each, math.sqrt(sum(p * p for p in products)) / pairs / each)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """In float64, part by part: of full training a wider copy of all would take gigabytes."""
    parts = [a.flatten().double() @ b.flatten().double() for a, b in zip(one, other, strict=True)]
    return torch.stack(parts).sum().item()
