"""Rewards for images: any callable ``reward(images, prompts, metadata)``, one score per image (see `rewards.base`)."""
