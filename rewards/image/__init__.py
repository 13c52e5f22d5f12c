"""Rewards for images: any callable ``reward(images, prompts, metadata)``, one score an image (see `rewards.base`)."""
