"""One entry for every method."""

from __future__ import annotations

from typing import Any

from diffusion_align.methods import method_of
from diffusion_align.training.config import TrainingConfig


def run(config: TrainingConfig) -> Any:
    """Train as ``config`` (checked settings of any method) says and return the finished trainer."""
    if method_of(config.method).model_kind != "image":
        from diffusion_align.pipelines import text

        return text.run(config)  # type: ignore[arg-type]
    from diffusion_align.pipelines import image

    return image.run(config)  # type: ignore[arg-type]
