"""What people look at: grids of fixed prompts and seeds, before and after, and the files a run ends with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.model_card import write_model_card
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.report import before_after, image_grid, save_png
from diffusion_align.rewards.base import RewardError, call_reward
from diffusion_align.training.randomness import generator
from diffusion_align.writing import new_folder


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
    """Pictures (B, 3, H, W) in [0, 1] on the CPU; the i-th depends on prompt, seed, purpose and ``first + i`` only."""
    images = []
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        streams = [generator(seed, purpose, first + start + i) for i in range(len(texts))]
        nothing = torch.empty(len(texts), 0, dtype=torch.int64)
        trajectory = rollout(policy, schedule, policy.encode(texts), streams, record=nothing)
        images.append(policy.decode(trajectory.latents).cpu())
    return torch.cat(images)


class ImageShow:
    """The fixed prompts of a run, drawn as the policy is now."""

    def __init__(
        self,
        policy: DenoisingPolicy,
        schedule: DiffusionSchedule,
        prompts: Sequence[Prompt],
        seed: int,
        batch_size: int,
    ) -> None:
        self.policy, self.schedule, self.seed, self.batch_size = policy, schedule, seed, batch_size
        self.prompts = [text for text, _ in prompts]
        self.metadata = [metadata for _, metadata in prompts]

    def draw(self) -> Tensor:
        return sample_images(self.policy, self.schedule, self.prompts, self.seed, batch_size=self.batch_size)

    def score(self, images: Tensor, reward: Callable[..., Any] | None) -> list[float] | None:
        """The reward of each picture; None if it cannot say (a shown prompt may lack the metadata it needs)."""
        if reward is None:
            return None
        try:
            return call_reward(reward, images.to(self.policy.device), self.prompts, self.metadata).tolist()
        except RewardError:
            return None

    def write(self, path: Path) -> None:
        """Write a grid of the fixed prompts."""
        save_png(image_grid(self.draw(), captions=self.prompts), path)

    def write_weights(self, folder: Path) -> None:
        """Write the adapter, or the whole pipeline if all of the UNet is trained, as diffusers loads them."""
        with new_folder(folder) as aside:
            if self.policy.lora is None:
                self.policy.pipeline.save_pretrained(str(aside))
            else:
                self.policy.save_lora(aside)

    def finish(self, folder: Path, reward: Callable[..., Any] | None) -> None:
        """Write ``final/`` (what diffusers loads, and its card) and ``samples/before_after.png``."""
        final = folder / "final"
        after = self.draw()  # before anything is written: these weights may give no images
        with self.policy.reference():
            before = self.draw()
        self.write_weights(final)
        picture = before_after(
            before,
            after,
            captions=self.prompts,
            rewards_before=self.score(before, reward),
            rewards_after=self.score(after, reward),
        )
        save_png(picture, folder / "samples" / "before_after.png")
        write_model_card(folder, final, pipeline_class=type(self.policy.pipeline).__name__)
