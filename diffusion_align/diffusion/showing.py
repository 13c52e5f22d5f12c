"""What people look at: grids of fixed prompts and seeds, before and after, and the files a run ends with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.report import before_after, image_grid, save_png, write_report
from diffusion_align.rewards.base import call_reward
from diffusion_align.training.randomness import generator

_BATCH = 8


def sample_images(policy: DenoisingPolicy, schedule: DiffusionSchedule, prompts: Sequence[str], seed: int) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] on the CPU; picture i depends on its prompt, ``seed`` and i only."""
    images = []
    for start in range(0, len(prompts), _BATCH):
        texts = list(prompts[start : start + _BATCH])
        streams = [generator(seed, "show", start + i) for i in range(len(texts))]
        nothing = torch.empty(len(texts), 0, dtype=torch.int64)
        trajectory = rollout(policy, schedule, policy.encode(texts), streams, record=nothing)
        images.append(policy.decode(trajectory.latents).cpu())
    return torch.cat(images)


class ImageShow:
    """The fixed prompts of a run, drawn as the policy is now."""

    def __init__(self, policy: DenoisingPolicy, schedule: DiffusionSchedule, prompts: Sequence[str], seed: int) -> None:
        self.policy, self.schedule, self.prompts, self.seed = policy, schedule, list(prompts), seed

    def draw(self) -> Tensor:
        return sample_images(self.policy, self.schedule, self.prompts, self.seed)

    def write(self, path: Path) -> None:
        """Write a grid of the fixed prompts."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(image_grid(self.draw(), captions=self.prompts), path)

    def finish(self, folder: Path, reward: Callable[..., Any]) -> None:
        """Write ``final/`` (what diffusers loads), ``samples/before_after.png`` and ``report.html``."""
        final = folder / "final"
        final.mkdir(parents=True, exist_ok=True)
        if self.policy.lora is None:
            self.policy.pipeline.save_pretrained(str(final))
        else:
            self.policy.save_lora(final)
        after = self.draw()
        with self.policy.reference():
            before = self.draw()
        metadata: list[dict[str, Any]] = [{} for _ in self.prompts]
        scores = [call_reward(reward, images, self.prompts, metadata).tolist() for images in (before, after)]
        picture = before_after(before, after, captions=self.prompts, rewards_before=scores[0], rewards_after=scores[1])
        (folder / "samples").mkdir(exist_ok=True)
        save_png(picture, folder / "samples" / "before_after.png")
        write_report(folder)
