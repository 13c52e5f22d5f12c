"""A beta(x) for each prompt: the network and its three penalties, (B,) each, unreduced ([003] §5).

[003] writes the loss with h/beta(x), against its own derivation and its own reading of a small beta; the usual form is
beta(x) h. A beta trained by the DPO loss itself runs to its bound, so it is detached there and learns from the
penalties. Everything raises a ``ValueError`` on shapes that do not fit and on a setting out of its range.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffusion_align.estimators.masked import at_least_float32, check_choice, check_shapes


class BetaNetwork(nn.Module):
    """beta(x) > 0, (B,), from prompt embeddings (B, D); before training it is ``beta`` for every prompt.

    LayerNorm and not the BatchNorm of [003] §6: with that a prompt's beta, and its slope in the smoothness penalty,
    would depend on the other prompts of its batch.
    """

    def __init__(self, dimensions: int, *, beta: float = 0.1, hidden: int = 64) -> None:
        super().__init__()
        if not 0 < beta < math.inf or dimensions < 2 or hidden < 1:
            raise ValueError(f"{dimensions=}, {beta=}, {hidden=} is not allowed: all must be > 0, dimensions > 1.")
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, beta + math.log(-math.expm1(-beta)))  # the inverse of softplus
        self.dimensions = dimensions
        self.layers = nn.Sequential(nn.LayerNorm(dimensions), nn.Linear(dimensions, hidden), nn.SiLU(), last)

    def forward(self, embeddings: Tensor) -> Tensor:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimensions:
            raise ValueError(f"expected embeddings (B, {self.dimensions}), got {tuple(embeddings.shape)}.")
        return softplus(at_least_float32(self.layers(embeddings)).squeeze(-1))


def beta_factor(beta: Tensor, *, convention: Literal["product", "inverse"] = "product", detach: bool = True) -> Tensor:
    """What multiplies h in a preference loss: beta(x), or with "inverse" 1/beta(x) as [003] prints it.

    Args:
        beta: (B,) > 0.
        detach: False lets the preference loss train beta too, as [003] does.
    """
    check_choice("convention", convention, ("product", "inverse"))
    beta = at_least_float32(beta.detach() if detach else beta)
    return beta if convention == "product" else 1.0 / beta


def beta_range_penalty(beta: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """``max(0, beta - beta_max) + max(0, beta_min - beta)``, in the unit of beta; a gradient flows."""
    check_shapes(ndim=1, beta=beta)
    if not 0 <= beta_min <= beta_max:
        raise ValueError(f"{beta_min=}, {beta_max=} is not allowed: 0 <= beta_min <= beta_max.")
    return (at_least_float32(beta) - beta_max).relu() + (beta_min - at_least_float32(beta)).relu()


def beta_smoothness_penalty(beta: Tensor, embeddings: Tensor) -> Tensor:
    """``|grad_x beta(x)|²`` of each prompt; a gradient flows to what computed beta.

    Args:
        beta: (B,), computed from ``embeddings``, each from its own row.
        embeddings: (B, D), with ``requires_grad``.
    """
    if embeddings.ndim != 2 or beta.shape != embeddings.shape[:1]:
        raise ValueError(
            f"expected beta (B,) and embeddings (B, D), got {tuple(beta.shape)}, {tuple(embeddings.shape)}."
        )
    if not embeddings.requires_grad or not beta.requires_grad:
        raise ValueError("beta must be computed from embeddings that require a gradient: use x.requires_grad_() first.")
    (slope,) = torch.autograd.grad(beta.sum(), embeddings, create_graph=True, allow_unused=True)
    if slope is None:
        raise ValueError("beta was not computed from these embeddings.")
    return at_least_float32(slope).square().sum(1)


def beta_entropy_penalty(beta: Tensor, entropy: Tensor, alpha: float) -> Tensor:
    """``(beta - alpha H)²``, H (B,) the reference's entropy at the prompt, nats, detached; beta has a gradient."""
    check_shapes(ndim=1, beta=beta, entropy=entropy)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"{alpha=} is not allowed: it must be at least 0.")
    return (at_least_float32(beta) - alpha * at_least_float32(entropy).detach()).square()
