"""Whether a device is there, before anything is loaded onto it."""

from __future__ import annotations

from typing import Any

from diffusion_align.shown import short


def device_problem(device: Any) -> str | None:
    """What is wrong with a device, to stand behind its name; None of one that tensors can be put on, and of None."""
    import torch

    if device is None:
        return None
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        return f"is {short(device)}: give cpu, cuda, cuda:1 or such"
    try:
        if torch.device(device).type == "meta":
            return "cannot be used: it holds no numbers"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the second: torch was built without CUDA
        return f"cannot be used: {(str(error).splitlines() or [type(error).__name__])[0][:300].rstrip('.')}"
    return None
