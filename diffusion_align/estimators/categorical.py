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
    """``logits[label] - logsumexp(logits)``, a slice of the vocabulary at a time; kept are the logits and one number a
    token."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, scale: float, size: int) -> Tensor:
        ctx.scale, ctx.size = scale, size
        dtype = at_least_float32(logits[:0]).dtype
        normaliser = picked = torch.full(labels.shape, -torch.inf, dtype=dtype, device=labels.device)
        for start, part in _TokenLogProb.slices(ctx, logits):
            normaliser = torch.logaddexp(normaliser, part.logsumexp(-1))
            here, index = _position(labels, start, part)
            picked = torch.where(here, part.gather(-1, index).squeeze(-1), picked)
        ctx.save_for_backward(logits, labels, normaliser)
        return torch.where(labels == IGNORED, 0.0, picked - normaliser)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _refuse_second_derivative()
        logits, labels, normaliser = ctx.saved_tensors
        outer = grads[0] * ctx.scale
        d_logits = torch.empty_like(logits)
        for start, part in _TokenLogProb.slices(ctx, logits):
            d_logits[..., start : start + ctx.size] = _d_logits(part, labels, start, normaliser, outer)
        return d_logits, None, None, None

    @staticmethod
    def slices(ctx: Any, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, logits.shape[-1], ctx.size):
            yield start, at_least_float32(logits[..., start : start + ctx.size]) * ctx.scale


class _LinearTokenLogProb(torch.autograd.Function):
    """The same of the logits that the output layer makes of hidden states, which are never there as a whole; and their
    entropy, without a gradient.

    One pass over the slices (online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867) keeps, of all actions but the
    label, the sums over ``e = exp(logit - maximum)`` of 1, of ``log e`` for the entropy, and of the rows of ``weight``:
    the gradient of the hidden states is a multiple of what these make, and needs no second pass. That of the weight
    does. The label joins at the end, so that where it is all but certain nothing cancels out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        size: int,
        with_entropy: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.scale, ctx.size = scale, size
        dtype = at_least_float32(hidden[:0]).dtype
        lowest = torch.finfo(dtype).min
        maximum = torch.full((*labels.shape, 1), lowest, dtype=dtype, device=labels.device)
        picked = torch.full_like(maximum, -torch.inf)
        count, logs = torch.zeros_like(maximum), torch.zeros_like(maximum)
        rows = torch.zeros_like(hidden, dtype=dtype)
        for start, logits in _LinearTokenLogProb.slices(ctx, hidden, weight, bias):
            here, index = _position(labels, start, logits)
            of_label = logits.gather(-1, index)
            picked = torch.where(here.unsqueeze(-1), of_label, picked)
            highest = torch.maximum(maximum, logits.amax(-1, keepdim=True))
            drop, maximum = maximum - highest, highest
            shrink = drop.exp()
            log_e = logits.scatter_(-1, index, torch.where(here.unsqueeze(-1), -torch.inf, of_label)).sub_(maximum)
            e = log_e.exp() if with_entropy else log_e.exp_()
            if with_entropy:
                sums = torch.linalg.vecdot(e, log_e.clamp_(min=lowest)).unsqueeze(-1)
                logs = shrink * (logs + drop * count) + sums
            count = shrink * count + e.sum(-1, keepdim=True)
            if with_gradient:
                rows = shrink * rows + e.to(weight.dtype) @ weight[start : start + size]
        e = (picked - maximum).exp()
        total = count + e
        if with_gradient:
            known = ((labels >= 0) & (labels < len(weight))).unsqueeze(-1)
            row = torch.where(known, weight[labels.clamp(0, len(weight) - 1)], 0.0)
            ctx.save_for_backward(hidden, weight, bias, labels, maximum + total.log(), (count * row - rows) / total)
        scored = (labels != IGNORED).unsqueeze(-1)
        logp = torch.where(scored, picked - maximum - total.log(), 0.0).squeeze(-1)
        entropy = torch.where(scored, total.log() - (logs + torch.xlogy(e, e)) / total, 0.0).squeeze(-1)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _refuse_second_derivative()
        hidden, weight, bias, labels, normaliser, direction = ctx.saved_tensors
        scored, outer = (labels != IGNORED).unsqueeze(-1), grads[0] * ctx.scale
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        d_hidden = torch.where(scored, outer.unsqueeze(-1) * direction, 0.0).to(hidden.dtype) if of_hidden else None
        d_weight = torch.empty_like(weight) if of_weight else None
        d_bias = torch.empty_like(bias) if of_bias else None
        if d_weight is None and d_bias is None:
            return d_hidden, *[None] * 7
        clean = torch.where(scored, hidden, 0.0).flatten(0, -2)
        with torch.autocast(hidden.device.type, enabled=False):  # as in the forward pass
            for start, logits in _LinearTokenLogProb.slices(ctx, hidden, weight, bias):
                part = slice(start, start + ctx.size)
                d_logits = _d_logits(logits, labels, start, normaliser.squeeze(-1), outer).flatten(0, -2)
                if d_weight is not None:
                    d_weight[part] = d_logits.to(weight.dtype).mT @ clean
                if d_bias is not None:
                    d_bias[part] = d_logits.sum(0)
        return d_hidden, d_weight, d_bias, *[None] * 5

    @staticmethod
    def slices(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(weight), ctx.size):
            part = slice(start, start + ctx.size)
            logits = torch.nn.functional.linear(hidden, weight[part], None if bias is None else bias[part])
            yield start, at_least_float32(logits).mul_(ctx.scale)


def _d_logits(logits: Tensor, labels: Tensor, start: int, normaliser: Tensor, outer: Tensor) -> Tensor:
    """Gradient of the scaled logits, which it overwrites: ``outer (1[label] - p)``; 0 where nothing is scored."""
    scored = labels != IGNORED
    outer = torch.where(scored, outer, 0.0).unsqueeze(-1)
    d_logits = logits.sub_(normaliser.unsqueeze(-1)).exp_().mul_(-outer)
    d_logits.masked_fill_(~scored.unsqueeze(-1), 0.0)
    here, index = _position(labels, start, logits)
    return d_logits.scatter_add_(-1, index, torch.where(here.unsqueeze(-1), outer, 0.0))


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("token log-probs have no second derivative: do not set create_graph.")


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
    return _TokenLogProb.apply(logits, labels, 1.0 / temperature, chunk_size or logits.shape[2])


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = 1024,
) -> Tensor:
    """``token_log_probs(hidden @ weight.T + bias, labels)`` without the logits ever being there as a whole.

    Saves the (B, T, V) logits, their log-softmax and both gradients. A gradient of the weight costs the output layer's
    forward pass once more, in the backward pass; one of the hidden states alone does not.

    Args:
        hidden: (B, T, D), what the output layer is given; a gradient flows.
        weight: (V, D) of the output layer; a gradient flows.
        labels, temperature: as in ``token_log_probs``.
        bias: (V,) of the output layer, if it has one; a gradient flows.
        chunk_size: how many entries of the vocabulary there are at a time; None means all of them.

    Returns (B, T), float32 or wider. Raises ValueError as ``token_log_probs``.
    """
    return _linear(hidden, weight, labels, bias, temperature, chunk_size, with_entropy=False)[0]


def linear_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = 1024,
) -> tuple[Tensor, Tensor]:
    """``linear_token_log_probs``, and ``categorical_entropy`` of the same logits, in one pass over their slices.

    The entropy (B, T) is exact, in nats, 0 where the label is -100, and has no gradient. Everything else is as in
    ``linear_token_log_probs``.
    """
    return _linear(hidden, weight, labels, bias, temperature, chunk_size, with_entropy=True)


def _linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    chunk_size: int | None,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    fits = hidden.ndim == 3 and weight.ndim == 2 and hidden.shape[2:] == weight.shape[1:] and weight.numel() > 0
    if not fits or hidden.shape[:2] != labels.shape or (bias is not None and bias.shape != weight.shape[:1]):
        given = [hidden, weight, labels, *([] if bias is None else [bias])]
        expected = "hidden (B, T, D), weight (V, D), labels (B, T)" + ("" if bias is None else ", bias (V,)")
        raise ValueError(f"expected {expected}, got {_shapes(*given)}.")
    labels = _checked(labels, weight.shape[0], temperature, chunk_size)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    needed = any(x.requires_grad for x in (hidden, weight, bias) if x is not None) and torch.is_grad_enabled()
    size = chunk_size or weight.shape[0]
    with torch.autocast(device, enabled=False):
        return _LinearTokenLogProb.apply(hidden, weight, bias, labels, 1.0 / temperature, size, with_entropy, needed)


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
