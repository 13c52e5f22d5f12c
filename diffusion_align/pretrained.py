"""Networks of diffusers and transformers in the dtype that is required, whatever their versions call the argument."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from diffusion_align.errors import UserError


def load_in_dtype(
    load: Callable[..., Any], *source: Any, dtype: torch.dtype | Mapping[str, torch.dtype], **options: Any
) -> Any:
    """What ``load`` returns, every floating-point weight of it in ``dtype``.

    An unknown keyword is ignored by diffusers and by some versions of transformers, and the weights are float32 then:
    the keyword is chosen by version, and the result is checked.

    Args:
        load: ``from_pretrained``, ``from_single_file`` or ``from_config`` of a class of diffusers or transformers.
        source: its positional arguments.
        dtype: of the weights; for a pipeline also one for each part by name, and "default" for the others.
        options: further arguments. Parts of a pipeline that are given here stay as they are.

    Raises:
        UserError: a weight came back in another dtype.
    """
    reads = getattr(load, "__name__", "") != "from_config"
    # transformers 4 draws initial weights even for what it reads from a file.
    with torch.random.fork_rng(devices=[], enabled=reads):
        loaded = load(*source, **{_keyword(load): dtype}, **options)
    found = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
    if isinstance(found, nn.Module):
        _check(type(found).__name__, found, dtype["default"] if isinstance(dtype, Mapping) else dtype)
        return loaded
    for name, part in found.components.items():
        if isinstance(part, nn.Module) and name not in options:
            wanted = dtype.get(name, dtype["default"]) if isinstance(dtype, Mapping) else dtype
            _check(name, part, wanted)
    return loaded


def _keyword(load: Callable[..., Any]) -> str:
    """What ``load`` calls the dtype: diffusers renamed the argument in 0.40, transformers in 4.56, below our bound."""
    owner = getattr(load, "__self__", None)
    if not getattr(owner, "__module__", "").startswith("diffusers."):
        return "dtype"
    major, minor = importlib.metadata.version("diffusers").split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (0, 40) else "torch_dtype"


def _check(name: str, network: nn.Module, wanted: torch.dtype) -> None:
    """UserError where a weight is not in ``wanted``; what a network keeps in float32 by its own rule may be that."""
    rules = (getattr(network, rule, None) or () for rule in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    kept = tuple(part for rule in rules for part in rule)
    for key, weight in network.named_parameters():
        if not weight.is_floating_point() or weight.dtype == wanted:
            continue
        if weight.dtype == torch.float32 and any(part in key for part in kept):
            continue
        library = type(network).__module__.partition(".")[0]
        raise UserError(
            f"{name} was loaded in {_name(weight.dtype)} instead of {_name(wanted)} ({key}): this version of {library} "
            "does not honour the dtype, install one that is tested"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
