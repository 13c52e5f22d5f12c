"""Log-probs, entropy and exact KL of categorical actions: tokens out of a vocabulary of V. Nats.

Everything from the logits on is computed in float32 or wider. A logit of -inf is an action that cannot happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffusion_align.estimators.masked import at_least_float32, check_shapes

IGNORED = -100  # the label of a position that is not scored


class _TokenLogProb(torch.autograd.Function):
    """``logits[label] - logsumexp(logits)``, a slice of the vocabulary at a time; kept are the input and one number a
    token. ``features`` are the logits, or with ``weight`` what the output layer makes them of."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor | None, labels: Tensor, scale: float, size: int) -> Tensor:
        ctx.scale, ctx.size = scale, size
        dtype = at_least_float32(features[:0]).dtype
        normaliser = picked = torch.full(labels.shape, -torch.inf, dtype=dtype, device=labels.device)
        for start, logits in _slices(ctx, features, weight):
            normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1))
            here, index = _position(labels, start, logits)
            picked = torch.where(here, logits.gather(-1, index).squeeze(-1), picked)
        ctx.save_for_backward(features, weight, labels, normaliser)
        return torch.where(labels == IGNORED, 0.0, picked - normaliser)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("token log-probs have no second derivative: do not set create_graph.")
        features, weight, labels, normaliser = ctx.saved_tensors
        scored = labels != IGNORED
        outer = torch.where(scored, grads[0] * ctx.scale, 0.0).unsqueeze(-1)
        exact = features.dtype if weight is None else normaliser.dtype  # of the sum over slices
        d_features = torch.zeros_like(features, dtype=exact) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        clean = features if weight is None else torch.where(scored.unsqueeze(-1), features, 0.0).flatten(0, -2)
        with torch.autocast(features.device.type, enabled=False):  # as in the forward pass
            for start, logits in _slices(ctx, features, weight):
                part = slice(start, start + logits.shape[-1])
                d_logits = logits.sub_(normaliser.unsqueeze(-1)).exp_().mul_(-outer)
                d_logits.masked_fill_(~scored.unsqueeze(-1), 0.0)
                here, index = _position(labels, start, logits)
                d_logits.scatter_add_(-1, index, torch.where(here.unsqueeze(-1), outer, 0.0))
                if d_features is not None and weight is None:
                    d_features[..., part] = d_logits
                elif d_features is not None and weight is not None:
                    d_features += d_logits.to(weight.dtype) @ weight[part]
                if d_weight is not None:
                    d_weight[part] = d_logits.flatten(0, -2).to(weight.dtype).mT @ clean
        return None if d_features is None else d_features.to(features.dtype), d_weight, None, None, None


def _slices(ctx: Any, features: Tensor, weight: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, features.shape[-1] if weight is None else weight.shape[0], ctx.size):
        part = slice(start, start + ctx.size)
        logits = features[..., part] if weight is None else features @ weight[part].mT
        yield start, at_least_float32(logits) * ctx.scale


def _position(labels: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels lie in the slice that begins at ``start``, and where, as an index for ``gather``."""
    index = labels - start
    here = (index >= 0) & (index < logits.shape[-1])
    return here, torch.where(here, index, 0).unsqueeze(-1)


def _checked(labels: Tensor, vocabulary: int, temperature: float, chunk_size: int | None) -> Tensor:
    _check_temperature(temperature)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not allowed: it must be at least 1, or None for no chunks.")
    labels = labels.long()
    outside = (labels != IGNORED) & ((labels < 0) | (labels >= vocabulary))
    if labels.device.type == "cpu" and bool(outside.any()):  # elsewhere the test would make the device wait
        bad = int(labels[outside][0])
        raise ValueError(f"labels hold {bad}: only 0 to {vocabulary - 1}, or {IGNORED} for positions not scored.")
    return labels


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < torch.inf:
        raise ValueError(f"temperature={temperature} is not allowed: it must be > 0 and finite.")


def token_log_probs(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, chunk_size: int | None = None
) -> Tensor:
    """Log-prob of each label in nats: ``log_softmax(logits / temperature)[label]``.

    Args:
        logits: (B, T, V), position t scoring label t (shift before); a gradient flows.
        labels: (B, T) integers in [0, V), or -100: that position is 0 and has no gradient, whatever its logits hold.
        temperature: the one the labels were sampled with, > 0.
        chunk_size: how many entries of the vocabulary are turned to float32 at a time; None means all of them.

    Returns (B, T), float32 or wider. Raises ValueError on shapes that do not fit, labels that are not integers or out
    of range (seen on a CPU only; on other devices such a label scores -inf), or a setting out of its range.
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape or logits.shape[2] == 0:
        raise ValueError(f"expected logits (B, T, V) and labels (B, T), got {_shapes(logits, labels)}.")
    labels = _checked(labels, logits.shape[2], temperature, chunk_size)
    return _TokenLogProb.apply(logits, None, labels, 1.0 / temperature, chunk_size or logits.shape[2])


def linear_token_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = 1.0, chunk_size: int | None = 1024
) -> Tensor:
    """``token_log_probs(hidden @ weight.T, labels)`` without the logits ever being there as a whole.

    Costs the output layer's forward pass once more, in the backward pass; saves the (B, T, V) logits, their log-softmax
    and both gradients.

    Args:
        hidden: (B, T, D), what the output layer is given; a gradient flows.
        weight: (V, D) of the output layer, which has no bias; a gradient flows.
        labels, temperature: as in ``token_log_probs``.
        chunk_size: how many entries of the vocabulary there are at a time; None means all of them.

    Returns (B, T), float32 or wider. Raises ValueError as ``token_log_probs``.
    """
    fits = hidden.ndim == 3 and weight.ndim == 2 and hidden.shape[2:] == weight.shape[1:] and weight.numel() > 0
    if not fits or hidden.shape[:2] != labels.shape:
        shapes = _shapes(hidden, weight, labels)
        raise ValueError(f"expected hidden (B, T, D), weight (V, D) and labels (B, T), got {shapes}.")
    labels = _checked(labels, weight.shape[0], temperature, chunk_size)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    with torch.autocast(device, enabled=False):
        return _TokenLogProb.apply(hidden, weight, labels, 1.0 / temperature, chunk_size or weight.shape[0])


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def categorical_log_probs(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probs in nats of all V tokens: ``log_softmax(logits / temperature)``, of the shape of ``logits`` (..., V).

    A gradient flows. Float32 or wider. Raises ValueError on an empty vocabulary or a temperature that is not > 0.
    """
    _check_temperature(temperature)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"expected logits (..., V) with V > 0, got {_shapes(logits)}.")
    return (at_least_float32(logits) / temperature).log_softmax(-1)


def categorical_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): ``-sum_a p_a log p_a``, exact over the vocabulary.

    ``logits`` (B, T, V) or any (..., V); a gradient flows. Returns (B, T), float32 or wider. Raises ValueError on an
    empty vocabulary or a temperature that is not > 0.
    """
    logp = categorical_log_probs(logits, temperature=temperature)
    return -(logp.exp() * torch.where(logp == -torch.inf, 0.0, logp)).sum(-1)


def categorical_kl(logits: Tensor, logits_ref: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(pi||pi_ref) in nats, exact over the vocabulary ([002] eq. 22, the "full" form): ``sum_a p_a log(p_a/q_a)``.

    Args:
        logits: (B, T, V) or any (..., V), of the policy; a gradient flows.
        logits_ref: the same shape, of the reference; a gradient flows (detach it, or compute it without one).
        temperature: > 0, of both.

    Returns (B, T), float32 or wider; infinite where the policy does what the reference never does, with a probability
    that is not rounded to 0. Raises ValueError on different shapes, no vocabulary or a temperature that is not > 0.
    """
    check_shapes(logits=logits, logits_ref=logits_ref)
    logp, logp_ref = (categorical_log_probs(x, temperature=temperature) for x in (logits, logits_ref))
    possible = logp.exp() > 0
    log_ratio = torch.where(possible, logp, 0.0) - torch.where(possible, logp_ref, 0.0)
    return (logp.exp() * log_ratio).sum(-1)
