"""DDIM whose noise falls from one step to the next: it explores early and keeps the details."""

from collections.abc import Mapping
from typing import Any

import torch

from diffusion_align.extending import Step, ddim


def falling_eta(scheduler: Any, steps: int, options: Mapping[str, Any]) -> Step:
    """DDIM with an eta that falls linearly from ``options["eta"]`` to ``options["last_eta"]``, 0.1 if not given."""
    last = options.get("last_eta", 0.1)
    if not 0 <= last <= options["eta"]:
        raise ValueError(f"last_eta={last} must lie between 0 and eta={options['eta']}")
    return ddim(scheduler, steps, {"eta": torch.linspace(options["eta"], last, steps, dtype=torch.float64)})
