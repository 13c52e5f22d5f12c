"""Numbers that are not finite are found where they arise, before a clamp or a cast makes images or files of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from diffusion_align.errors import TrainingError

MORE_ROOM = "use bfloat16 or float32 where float16 is set (dtype, mixed_precision), or a lower learning_rate"
"""What to do about text whose numbers overflow."""
_LARGE = 1e6  # beyond what any recipe sets a coefficient of its loss to


def all_finite(*tensors: Tensor) -> list[bool]:
    """Whether each tensor is finite throughout; one transfer to the host for all of them."""
    return torch.stack([x.detach().isfinite().all() for x in tensors]).tolist() if tensors else []


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """The largest magnitude in any of ``tensors``, a number on their device; nan or inf where one is not finite."""
    found = [x.detach() for x in tensors if x.numel()]
    if not found:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found, math.inf)), math.inf)


def require_finite_logits(logp: Tensor, *, what: str) -> None:
    """TrainingError unless log-probs are finite; ``what`` gave them."""
    if not all_finite(logp)[0]:
        raise TrainingError(f"{what} gives log-probs that are not finite: {MORE_ROOM}, or check the model's weights")


def require_finite_loss(
    metrics: Mapping[str, float], coefficients: Mapping[str, float], *, mixed_precision: str
) -> None:
    """TrainingError unless ``metrics["loss"]`` is finite, which names the term of it and the setting to change.

    Args:
        metrics: of the update at ``step``; the terms are those whose names begin with ``loss/`` or ``kl``.
        coefficients: setting -> value, of those that a term is multiplied by.
        mixed_precision: the setting.
    """
    if math.isfinite(metrics["loss"]):
        return
    terms = [name for name in metrics if name.startswith(("loss/", "kl")) and not math.isfinite(metrics[name])]
    where = f" ({terms[0]} is {metrics[terms[0]]})" if terms else ""
    name, value = max(coefficients.items(), key=lambda item: abs(item[1]), default=("", 0.0))
    remedy = "lower learning_rate" if abs(value) <= _LARGE else f"{name}={value:g} is too large, lower it"
    if mixed_precision != "no":
        remedy += f" or set mixed_precision=no instead of {mixed_precision}"
    raise TrainingError(f"the loss became {metrics['loss']} at step {metrics['step']}{where}: {remedy}")
