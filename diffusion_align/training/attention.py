"""``attention``: which implementation computes it, beyond the one that suits the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Literal

ImageAttention = Literal["auto", "eager", "sdpa", "xformers"]
TextAttention = Literal["auto", "eager", "sdpa", "flash_attention_2"]
_PACKAGES = {"xformers": ("xformers", "xformers"), "flash_attention_2": ("flash_attn", "flash-attn")}
"""What runs on a GPU alone -> the module it is in, and what installs it."""


def attention_checks(name: str) -> Iterator[str]:
    """A sentence if the implementation ``name`` is not installed, or there is no GPU for it."""
    if name not in _PACKAGES:
        return
    module, package = _PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        yield f"attention={name} is not installed: pip install {package}, or set attention=sdpa"
        return
    import torch

    if not torch.cuda.is_available():
        yield f"attention={name} needs a GPU: set attention=sdpa or eager"
