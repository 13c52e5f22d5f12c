"""Write the prompts of a list that a model draws worst by its CLIP score (`emoji_weak.txt` was made by this)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from diffusion_align.data.prompts import load_prompts
from diffusion_align.diffusion.evaluation import sample_images
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.rewards import build_reward, call_reward

COUNT, IMAGES = 32, 3


def main(output: str) -> None:
    """Score ``IMAGES`` samples of each concept and write the ``COUNT`` worst prompts."""
    prompts = [text for text, _ in load_prompts("emoji_concepts")]
    policy = DenoisingPolicy(load_pipeline("emoji-sd"), lora=None)
    schedule = build_schedule(policy.pipeline.scheduler, 10).to("cpu")
    reward = build_reward("clip_score", model="emoji-sd")
    total = torch.zeros(len(prompts))
    for seed in range(IMAGES):
        images = sample_images(policy, schedule, prompts, seed)
        total += call_reward(reward, images, prompts, [{} for _ in prompts])
    worst = sorted(total.argsort()[:COUNT].tolist())
    print(f"mean of all {total.mean() / IMAGES:.4f}, of the {COUNT} worst {total[worst].mean() / IMAGES:.4f}")
    Path(output).write_text("".join(prompts[i] + "\n" for i in worst), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
