"""Entry checks and the dtype rule shared by the estimators."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
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


def check_mask(mask: Tensor | None) -> None:
    """Raise a ``ValueError`` unless ``mask`` is None or boolean."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor (True = counts), got {mask.dtype}; use mask.bool().")


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` in float32 or wider, and 0, without a gradient, where ``mask`` says that an entry does not count."""
    check_mask(mask)
    return widen(x) if mask is None else torch.where(mask, widen(x), 0.0)


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}.")
