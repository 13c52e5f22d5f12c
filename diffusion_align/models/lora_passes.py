"""LoRA layers and normalizations that launch the kernels they need and no more, with the bits of peft and of autocast.

Under autocast peft's layer casts its input to the adapter's float32 and back, and both weights in every pass; CUDA's
autocast also casts the frozen weights of normalizations, in every pass, to float32. Here nothing is cast to and fro,
trained weights are cast once while they do not change (``CastWeights``), and frozen ones once (``cast_norms_once``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_align.models.lora import ADAPTER, lora_layers


class CastWeights:
    """The float32 weights of a network's LoRA layers in autocast's dtype.

    Args:
        network: whose plain LoRA layers, of linear layers and convolutions, then compute as this module says.

    Attributes:
        pairs: in a pass A and B of each layer, cast; None where autocast is to cast them.
    """

    def __init__(self, network: nn.Module) -> None:
        self.pairs: Sequence[Tensor] | None = None
        self._weights: list[Tensor] = []
        self._are_kept = False
        self._flat: Tensor | None = None
        for layer in lora_layers(network).values():
            given: Any = type(layer)
            if kind := given if "_cast" in vars(layer) else _lean(given):  # of an earlier policy
                layer.__class__ = kind
                vars(layer).update(_cast=self, _place=len(self._weights))
                self._weights += [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        self._sizes = [weight.numel() for weight in self._weights]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, the weights do not change, and are cast once."""
        before, self._are_kept = self._are_kept, True
        try:
            yield
        finally:
            self._are_kept = before
            self._flat = self._flat if before else None

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Inside ``kept``, while the weights are others for a while."""
        before = self._are_kept, self._flat
        self._are_kept, self._flat = False, None
        try:
            yield
        finally:
            self._are_kept, self._flat = before

    @contextlib.contextmanager
    def in_pass(self) -> Iterator[None]:
        """Inside, where weights are kept and under autocast, the layers of a forward pass take them from here.

        A pass of checkpointed layers that the backward pass repeats is outside: its graph is not the one that is kept.
        """
        dtype = _autocast_dtype(self._weights[0]) if self._are_kept and self._weights else None
        if dtype is None:
            yield
            return
        flat = self._cast_to(dtype)
        if torch.is_grad_enabled():
            flat = _Cast.apply(flat, *self._weights)
        parts = flat.split(self._sizes)
        self.pairs = [part.view(weight.shape) for part, weight in zip(parts, self._weights, strict=True)]
        try:
            yield
        finally:
            self.pairs = None

    @torch.no_grad()
    def _cast_to(self, dtype: torch.dtype) -> Tensor:
        """All weights one after the other."""
        if self._flat is None or self._flat.dtype != dtype:
            flat = torch.empty(sum(self._sizes), dtype=dtype, device=self._weights[0].device)
            parts = zip(flat.split(self._sizes), self._weights, strict=True)
            torch._foreach_copy_([part.view(weight.shape) for part, weight in parts], self._weights)
            self._flat = flat
        return self._flat


class _Cast(torch.autograd.Function):
    """What was cast before, with the gradient of casting it in this pass."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, *weights: Tensor) -> Tensor:
        ctx.shapes, ctx.dtype = [weight.shape for weight in weights], weights[0].dtype
        return flat.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = gradient.to(ctx.dtype).split([shape.numel() for shape in ctx.shapes])
        return None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


@functools.cache
def _lean(kind: type) -> Any:
    """peft's layer of that class, computing as this module says; None for one that is not plain LoRA's."""
    from peft.tuners.lora.layer import Conv2d, Linear

    if kind not in (Linear, Conv2d):
        return None

    class Lean(kind):  # type: ignore[misc, valid-type]
        _cast: CastWeights
        _place: int

        def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
            narrow = _autocast_dtype(x)
            if (
                (given or named or self.disable_adapters or self.merged or self.lora_variant)
                or self.active_adapters != [ADAPTER]
                or ADAPTER not in self.lora_A
                or self.lora_bias[ADAPTER]
                or type(self.lora_dropout[ADAPTER]) is not nn.Identity
                or x.dtype not in ((self.lora_A[ADAPTER].weight.dtype,) if narrow is None else (narrow, torch.float32))
            ):
                return super().forward(x, *given, **named)  # type: ignore[no-any-return]
            if narrow is not None and not (x.requires_grad and torch.is_grad_enabled()):
                x = x.to(narrow)  # for both; the gradients of two casts are added in float32
            result: Tensor = self.base_layer(x)
            pairs, down, up = self._cast.pairs, self.lora_A[ADAPTER], self.lora_B[ADAPTER]
            if pairs is None or narrow is None:  # a model may switch autocast off for some of its layers
                change = up(down(x))
            else:
                change = _apply(up, _apply(down, x, pairs[self._place]), pairs[self._place + 1])
            scale = self.scaling[ADAPTER]
            return result + (change if scale == 1 else change * scale)

        def __reduce__(self) -> tuple[Any, ...]:
            """Copied and pickled it is peft's own again."""
            state = {name: value for name, value in vars(self).items() if name not in ("_cast", "_place")}
            return object.__new__, (kind,), state

    return Lean


def _autocast_dtype(like: Tensor) -> torch.dtype | None:
    """What autocast runs matrix products in on the device of ``like``; None where it is off."""
    kind = like.device.type  # the meta device has no autocast
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _apply(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer or a convolution without a bias, with another weight."""
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight)
    return layer._conv_forward(x, weight, None)  # type: ignore[no-any-return]


def cast_norms_once(network: nn.Module) -> None:
    """Let the normalizations of a frozen network keep their weights in float32 as well, for CUDA's autocast."""
    for part in network.modules():
        if type(part) in _NORMS:
            part.__class__ = _NORMS[type(part)]


class _WideWeights(nn.Module):
    weight: Tensor | None
    bias: Tensor | None

    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        wanted = weight is not None and x.is_cuda and torch.is_autocast_enabled("cuda")
        if weight is None or not wanted or weight.dtype == torch.float32 or weight.requires_grad:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        state = [(part._version, part.device, part.dtype) for part in (weight, bias) if part is not None]
        if self.__dict__.get("_wide_state") != state:
            vars(self).update(_wide_state=state, _wide=(weight.float(), None if bias is None else bias.float()))
        return self._normalize(x, *vars(self)["_wide"])


class _LayerNorm(_WideWeights, nn.LayerNorm):  # type: ignore[misc]
    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _GroupNorm(_WideWeights, nn.GroupNorm):  # type: ignore[misc]
    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.group_norm(x, self.num_groups, weight, bias, self.eps)


_NORMS: dict[type, type] = {nn.LayerNorm: _LayerNorm, nn.GroupNorm: _GroupNorm}
