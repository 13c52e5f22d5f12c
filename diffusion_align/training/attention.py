"""``attention``: its implementations, and what each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

ImageAttention = Annotated[
    Literal["auto", "eager", "sdpa", "xformers"],
    Field(description="attention implementation; auto is eager for a UNet on a CPU, else sdpa (torch's own)"),
]
TextAttention = Annotated[
    Literal["auto", "eager", "sdpa", "flash_attention_2"],
    Field(description="attention implementation; auto is what transformers chooses, mostly sdpa"),
]
_PACKAGES = {"xformers": ("xformers", "xformers"), "flash_attention_2": ("flash_attn", "flash-attn")}
"""Implementation that needs a GPU -> its module, and the package that installs it."""


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
