"""From what a config or a caller says to a text reward. The forms of a spec are those of image rewards."""

import inspect
import math
from typing import Any

import torch

from diffusion_align.rewards.base import parameters_of, reward_name, runs_in_background
from diffusion_align.rewards.build import build, describe, problem
from diffusion_align.rewards.resolve import TEXT
from diffusion_align.rewards.text.base import Text, TextReward, call_text_reward, extras_of


class ScaledTextReward:
    """``scale`` times another text reward; -1 turns its sign. None stays None."""

    def __init__(self, reward: Any, scale: float):
        self.reward, self.scale = reward, scale
        self.name = f"{scale:g}*{reward_name(reward)}"
        self.background = runs_in_background(reward)
        # Besides the columns it names what the reward inside does, and is given no more than that.
        *own, columns = inspect.signature(self).parameters.values()
        inside = [p for p in parameters_of(reward) or () if p.name in extras_of(reward)]
        extras = [p.replace(kind=p.KEYWORD_ONLY) for p in inside]
        self.__signature__ = inspect.Signature([*own, *extras, columns])

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        extras = {name: columns.pop(name) for name in extras_of(self.reward) if name in columns}
        scores = call_text_reward(self.reward, prompts, completions, columns, **extras)
        return [None if math.isnan(score) else self.scale * score for score in scores.tolist()]

    def to(self, device: str | torch.device) -> "ScaledTextReward":
        if hasattr(self.reward, "to"):
            self.reward.to(device)
        return self


def build_text_reward(spec: Any, *, device: str | torch.device = "cpu") -> TextReward:
    """The text reward that ``spec`` describes, ready on ``device``.

    Args:
        spec: as for `build_reward`: a name from `TEXT_REWARDS`, ``"package.module:function"``,
            ``"path/to/file.py:function"``, a callable, or a mapping ``{"name": any of these, **options}``, among
            them ``scale`` and ``background``. A function is the reward itself and must take ``completions`` by name; a
            class is built first, given ``device`` if it names it.

    Raises:
        RewardError: whatever `text_reward_problem` reports, or the reward's model cannot be loaded.
    """
    reward, scale = build(TEXT, spec, {"device": device})
    return reward if scale == 1.0 else ScaledTextReward(reward, scale)


def text_reward_problem(spec: Any) -> str | None:
    """What is wrong with ``spec``, in one sentence, or None. Imports your code if it names some; loads no model.

    Whether the data has the columns that the reward needs is for `check_text_reward` to say.
    """
    return problem(TEXT, spec)


def describe_text_rewards() -> list[dict[str, Any]]:
    """One dict a built-in text reward: name, description, range, extra, licence, options."""
    return describe(TEXT)
