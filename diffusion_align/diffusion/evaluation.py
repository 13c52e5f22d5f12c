"""Images of fixed prompts, sampled from fixed noise: those a run shows, and those of its held-out evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.settings import ImageEvaluationConfig, ImageStopConfig  # noqa: F401, their former place
from diffusion_align.report import before_after, image_grid, save_png
from diffusion_align.rewards.base import RewardError, call_reward
from diffusion_align.training.evaluation import Evaluation
from diffusion_align.training.policy_trainer import PREVIEWED, Previews
from diffusion_align.training.randomness import generator
from diffusion_align.writing import new_file

BEFORE = "before.safetensors"
"""In ``samples/`` of a run without a reference: the images before training."""


@dataclass
class ImageEvaluation(Evaluation):
    """For images: ``prompts`` are texts with their metadata, ``reward`` is ``reward(images, prompts, metadata)``.

    Args:
        embed: images (B, 3, H, W) in [0, 1] -> unit embeddings (B, D); None for distances of pixels.
    """

    embed: Callable[[Tensor], Tensor] | None = None

    def metrics(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """``diversity`` of ``features``: embeddings, or the images themselves."""
        return {"diversity": mean_pairwise_distance(found["features"])}


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean distance of the N (N - 1) / 2 pairs of rows of ``features`` (N, D).

    Rows of unit length (embeddings): ``1 - cosine``, between 0 and 2. Images (N, C, H, W) in [0, 1]: the root mean
    square of the difference of their pixels, between 0 and 1.

    Raises:
        ValueError: fewer than two rows.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"features {tuple(features.shape)} must be of at least two images")
    rows = features.double().flatten(1)
    if features.ndim == 2:  # sum_ij <a_i, a_j> = |sum_i a_i|^2
        return (1 - (rows.sum(0).square().sum() - rows.square().sum()) / (count * (count - 1))).item()
    return (torch.pdist(rows).mean() / math.sqrt(rows.shape[1])).item()


def sample_images(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    prompts: Sequence[str],
    seed: int,
    purpose: str = "show",
    *,
    batch_size: int = 8,
    first: int = 0,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] on the CPU; the i-th depends on prompt, seed, purpose and ``first + i`` only."""
    images = []
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        streams = [generator(seed, purpose, first + start + i) for i in range(len(texts))]
        nothing = torch.empty(len(texts), 0, dtype=torch.int64)
        trajectory = rollout(policy, schedule, policy.encode(texts), streams, record=nothing)
        images.append(policy.decode(trajectory.latents).cpu())
    return torch.cat(images)


class ImagePreviews(Previews[Tensor]):
    """Images (B, 3, H, W) of the prompts, as PNG.

    Args:
        policy, schedule: what samples.
        prompts: with the metadata that ``reward`` receives.
        texts: which prompts to show; the first of ``prompts`` if not given.
        reward: of each image before and after; None for none.
        seed: of the noise.
        batch_size: images sampled at once.
    """

    suffix = ".png"

    def __init__(
        self,
        policy: DenoisingPolicy,
        schedule: DiffusionSchedule,
        prompts: Sequence[Prompt],
        texts: Sequence[str] | None,
        *,
        reward: Callable[..., Any] | None,
        seed: int,
        batch_size: int,
    ) -> None:
        known = dict(prompts)
        self.texts = list(texts or known)[: None if texts else PREVIEWED]
        reference = policy.reference if policy.has_reference else None
        super().__init__(reference, count=len(self.texts), batch_size=batch_size)
        self.policy, self.schedule, self.reward, self.seed = policy, schedule, reward, seed
        self.metadata = [known.get(text, {}) for text in self.texts]

    def sample_batch(self, indices: range) -> Tensor:
        texts = self.texts[indices.start : indices.stop]
        return sample_images(self.policy, self.schedule, texts, self.seed, batch_size=len(texts), first=indices.start)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def write(self, samples: Tensor, path: Path) -> None:
        save_png(image_grid(samples, captions=self.texts), path)

    def keep(self, samples: Tensor, folder: Path) -> None:
        with new_file(folder / BEFORE) as temporary:
            save_file({"images": (samples * 255).round().to(torch.uint8).contiguous()}, temporary)

    def kept(self, folder: Path) -> Tensor | None:
        file = folder / BEFORE
        return load_file(file)["images"].float() / 255 if file.is_file() else None

    def write_pairs(self, before: Tensor, after: Tensor, path: Path) -> None:
        scores = [self._scores(images) for images in (before, after)]
        image = before_after(before, after, captions=self.texts, rewards_before=scores[0], rewards_after=scores[1])
        save_png(image, path)

    def _scores(self, images: Tensor) -> list[float] | None:
        """The reward of each image; None if it cannot say (a shown prompt may lack the metadata it needs)."""
        if self.reward is None:
            return None
        try:
            return call_reward(self.reward, images.to(self.policy.device), self.texts, self.metadata).tolist()
        except RewardError:
            return None
