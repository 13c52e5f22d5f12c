"""Two models, the same prompts and seeds, one judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.pipelines.image import ImageAlignmentPipeline, score_images
from diffusion_align.report import before_after, save_png
from diffusion_align.rewards import build_reward


@dataclass(frozen=True)
class Comparison:
    """Mean scores of A and B, and how often B beats A (a tie counts half) with its 95 % Wilson interval."""

    mean_first: float
    mean_second: float
    win_rate: float
    low: float
    high: float
    pairs: int


def compare_models(
    first: str, second: str, prompts: Sequence[str], judge: Any, *, seed: int = 0, output: Path | None = None
) -> Comparison:
    """Draw every prompt once by each model, from the same noise and with B's sampler, and judge the pairs.

    Args:
        first, second: what ``ImageAlignmentPipeline.from_pretrained`` takes.
        prompts: texts.
        judge: what ``build_reward`` takes.
        seed: of the first picture.
        output: where to write the pictures side by side.
    """
    pipelines = [ImageAlignmentPipeline.from_pretrained(model) for model in (first, second)]
    pipelines[0].sampler = pipelines[1].sampler
    reward = build_reward(judge, model=pipelines[1].model, device=pipelines[1].pipeline.device)
    images = [pipeline(prompts, seed=seed).images for pipeline in pipelines]
    scores = [score_images(reward, drawn, prompts) for drawn in images]
    wins = (scores[1] > scores[0]).float() + 0.5 * (scores[1] == scores[0]).float()
    low, high = wilson_interval(wins.mean().item(), len(prompts))
    if output is not None:
        shown = min(len(prompts), 24)
        values = [s[:shown].tolist() for s in scores]
        picture = before_after(
            images[0][:shown],
            images[1][:shown],
            captions=list(prompts[:shown]),
            rewards_before=values[0],
            rewards_after=values[1],
        )
        save_png(picture, output)
    return Comparison(scores[0].mean().item(), scores[1].mean().item(), wins.mean().item(), low, high, len(prompts))


def wilson_interval(rate: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return centre - half, centre + half
