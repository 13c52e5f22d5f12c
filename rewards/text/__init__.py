"""Rewards for text: any callable ``reward(prompts, completions, **columns)``, one score per completion (see `base`)."""
