"""Whether a model is the velocity of what it samples: what a constant reward would already move.

Forward-process losses assume ``E[target - output | x_t] = 0`` for images of the model's own sampler. Guidance, too few
steps and distillation break it, and then every image pulls the weights the same way, whatever its reward. So the
gradients of the matching errors of n images, g_i, are compared: where the assumption holds their mean is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Consistency(NamedTuple):
    """``share``: ``|E g|² / E|g|²``, estimated without bias, so it may be below 0; 1 where all images agree."""

    share: float
    stderr: float


def common_share(gradients: Iterable[Tensor]) -> Consistency:
    """How much of n gradients (D,), n > 1, is common to all: the mean of ``g_i · g_j`` over pairs, by that of ``|g|²``.

    The standard error is that of a share of 0, where the products ``g_i · (g_1 + ... + g_(i-1))`` are uncorrelated.

    Raises:
        ValueError: there are fewer than two.
    """
    total: Tensor | None = None
    products, norms = [], []
    for gradient in gradients:
        wide = gradient.double()  # once: of full training each copy takes gigabytes
        norms.append(float(wide @ wide))
        if total is None:
            total = wide.clone()
        else:
            products.append(float(total @ wide))
            total += wide
    if len(norms) < 2:
        raise ValueError(f"{len(norms)} gradient(s) cannot be compared: give two or more")
    pairs, each = len(norms) * (len(norms) - 1) / 2, sum(norms) / len(norms)
    if each == 0:
        return Consistency(0.0, 0.0)
    return Consistency(sum(products) / pairs / each, math.sqrt(sum(p * p for p in products)) / pairs / each)


def flat_gradient(value: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """(D,) of a 0-d ``value``; 0 where it does not depend on a parameter."""
    found = torch.autograd.grad(value, list(parameters), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])
