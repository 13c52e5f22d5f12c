"""What the evaluation of completions adds to that of every policy: the KL to the reference, if nothing else logs it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import AliasChoices, Field
from torch import Tensor

from diffusion_align.bounds import MOST
from diffusion_align.data.text_rows import TextDataConfig
from diffusion_align.rewards.settings import RewardSetting, several_rewards_problems
from diffusion_align.training.config import Weight
from diffusion_align.training.evaluation import Evaluation, EvaluationConfig


class TextEvaluationConfig(EvaluationConfig):
    """Completions of fixed prompts, sampled from fixed streams every few epochs, scored by what is not trained on."""

    reward: RewardSetting = Field(description="the held-out reward, or a list of them")
    reward_weights: list[Weight] | None = Field(None, description="one for each reward of a list; all 1 if not given")
    prompts: TextDataConfig | None = Field(
        None,
        validation_alias=AliasChoices("prompts", "dataset"),
        description="as for training; the prompts of the training if null; `dataset` is the same",
    )
    samples: int = Field(32, ge=2, le=MOST, description="how many completions; the prompts take turns")

    def cross_checks(self) -> Iterator[str]:
        yield from several_rewards_problems(self.reward, self.reward_weights)


@dataclass
class TextEvaluation(Evaluation):
    """Of completions; ``prompts`` are ``PromptRow``, ``gold`` are ``WeightedRewards``."""

    def metrics(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """``kl_path`` and its standard error, nats a completion, of ``kl_path`` (N,) where it is measured.

        The mean of log(pi/pi_ref) over completions of the policy as it is: k1, which is unbiased.
        """
        if "kl_path" not in found:
            return {}
        values = found["kl_path"].double()
        return {"kl_path": values.mean().item(), "kl_path_stderr": values.std().item() / math.sqrt(len(values))}
