"""Rewards for text: any callable ``reward(prompts, completions, **columns)``, one score a completion (see `base`)."""
