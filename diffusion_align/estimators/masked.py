"""Masked reductions, and the entry checks and the dtype rule that all estimators share.

``mask`` is bool, True means *counts*; ``dim`` is never optional.

A masked entry, even infinite or NaN, changes neither a value nor a gradient: it is replaced by ``where`` before any
arithmetic. Where nothing counts the result is 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

Dim = int | tuple[int, ...]


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 or wider: half precision and integers become float32, float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_shapes(*, ndim: int | None = None, **tensors: Tensor | None) -> None:
    """Raise a ``ValueError`` that names all shapes unless the tensors have one shape (of ``ndim`` dimensions)."""
    given = {name: x for name, x in tensors.items() if x is not None}
    shapes = [tuple(x.shape) for x in given.values()]
    wrong_ndim = ndim is not None and any(len(shape) != ndim for shape in shapes)
    if wrong_ndim or any(shape != shapes[0] for shape in shapes):
        found = ", ".join(f"{name} {shape}" for name, shape in zip(given, shapes))
        wanted = "one common shape" if ndim is None else f"one common shape of {ndim} dimension(s)"
        raise ValueError(f"expected {wanted}, got {found}; nothing is broadcast here.")


def group_indices(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the group of each sample, sizes of the groups), both int64 on the CPU; ids (B,) must be integers."""
    if group_ids.is_floating_point():
        raise ValueError(f"group_ids must be integers, got {group_ids.dtype}.")
    _, index, counts = torch.unique(group_ids.cpu(), return_inverse=True, return_counts=True)
    return index, counts


def check_mask(mask: Tensor | None) -> None:
    """Raise a ``ValueError`` unless ``mask`` is None or boolean."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor (True = counts), got {mask.dtype}; use mask.bool().")


def masked_fill_zero(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` in float32 or wider, and 0, without a gradient, where ``mask`` says that an entry does not count."""
    check_mask(mask)
    return at_least_float32(x) if mask is None else torch.where(mask, at_least_float32(x), 0.0)


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}.")


def _check(x: Tensor, mask: Tensor, dim: Dim) -> Tensor:
    check_shapes(x=x, mask=mask)
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        raise ValueError(f"dim={dim!r} is not allowed for x {tuple(x.shape)}: name every dimension to reduce.")
    return masked_fill_zero(x, mask)


def masked_sum(x: Tensor, mask: Tensor, dim: Dim) -> Tensor:
    """Sum of the entries of ``x`` that count, over ``dim``, in the unit of ``x``.

    Args:
        x: any shape; a gradient flows to the entries that count and 0 to the others.
        mask: bool, the shape of ``x``.
        dim: one dimension or several.

    Returns ``x`` without ``dim``, float32 or wider; 0 where nothing counts. Raises ValueError on different shapes, a
    mask that is not bool, or no ``dim``.
    """
    return _check(x, mask, dim).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: Dim) -> Tensor:
    """Mean of the entries of ``x`` that count, over ``dim``; arguments, result and errors as ``masked_sum``."""
    return _check(x, mask, dim).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, dim: Dim) -> Tensor:
    """``(x - mean) / std`` over the entries that count along ``dim``; no unit, no hidden epsilon.

    The std is the population's (divided by the count). A std of zero yields exactly 0.

    Args:
        x: any shape; a gradient flows, through mean and std too.
        mask: bool, the shape of ``x``.
        dim: the dimension or dimensions that share a mean and a std.

    Returns the shape of ``x``, float32 or wider; 0 where masked. Raises ValueError as ``masked_sum``.
    """
    x = _check(x, mask, dim)
    if x.numel() == 0:
        return x
    count = mask.sum(dim, keepdim=True).clamp(min=1)
    # Measured from the smallest entry, equal entries are exact zeros: a rounded mean would leave a noise of one ulp
    # that the division then blows up to ±1.
    lowest = torch.where(mask, x, math.inf).amin(dim, keepdim=True).detach()
    shifted = torch.where(mask, x - lowest, 0.0)
    centred = torch.where(mask, shifted - shifted.sum(dim, keepdim=True) / count, 0.0)
    variance = centred.square().sum(dim, keepdim=True) / count
    # The inner where keeps sqrt's infinite slope at zero out of the backward pass.
    std = torch.where(variance == 0, 1.0, variance).sqrt()
    return torch.where(variance == 0, 0.0, centred / std)


def aggregate(
    x: Tensor, mask: Tensor, mode: Literal["token", "sequence", "fixed_length"] = "token", *, length: int | None = None
) -> Tensor:
    """One scalar from a (B, T) loss, in its unit.

    - "token": the mean over all entries that count (DAPO, arXiv:2503.14476, eq. 8).
    - "sequence": the mean over rows of each row's mean (GRPO, arXiv:2402.03300, eq. 3); an empty row is 0.
    - "fixed_length": the sum divided by B·``length`` (Dr. GRPO, arXiv:2503.20783), so long rows are not discounted.

    Args:
        x: (B, T); a gradient flows to the entries that count.
        mask: (B, T) bool.
        mode: see above.
        length: the constant of "fixed_length"; None means T, which then depends on the padding.

    Returns 0-d, float32 or wider; 0 for an empty batch. Raises ValueError on different shapes, a mask that is not bool,
    an unknown mode or a length below 1.
    """
    check_choice("mode", mode, ("token", "sequence", "fixed_length"))
    check_shapes(ndim=2, x=x, mask=mask)
    if length is not None and length < 1:
        raise ValueError(f"length={length} is not allowed: it must be at least 1.")
    if mode == "token":
        return masked_mean(x, mask, (0, 1))
    if mode == "sequence":
        return masked_mean(x, mask, 1).sum() / max(x.shape[0], 1)
    return masked_sum(x, mask, (0, 1)) / max(x.shape[0] * (x.shape[1] if length is None else length), 1)
