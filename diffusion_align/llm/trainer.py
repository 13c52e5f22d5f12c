"""What the trainers of language models share beyond the loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_align.data.text_rows import PromptRow
from diffusion_align.estimators import kl_value, masked_mean, masked_sum
from diffusion_align.llm.collection import WeightedRewards
from diffusion_align.llm.policy import LanguagePolicy, widest_float
from diffusion_align.llm.settings import TextConfig
from diffusion_align.llm.showing import SHOWN, TextShow
from diffusion_align.report import write_report
from diffusion_align.training.launch import make_accelerator
from diffusion_align.training.loop import Trainer

Batch = TypeVar("Batch")
LossType = Literal["grpo", "dapo", "dr_grpo"]


class TextTrainer(Trainer[Batch]):
    """A policy, rewards (if any), and what is shown of them.

    Args:
        config: checked settings.
        policy: the language model, on ``accelerator.device``.
        rewards: what scores completions, already checked.
        shown: fixed prompts to show; the first ``SHOWN`` of them.
        accelerator: devices, precision and processes; a plain one when not given.
    """

    config: TextConfig

    def __init__(
        self,
        config: TextConfig,
        policy: LanguagePolicy,
        *,
        rewards: WeightedRewards | None = None,
        shown: Sequence[PromptRow] = (),
        accelerator: Accelerator | None = None,
    ) -> None:
        super().__init__(config, accelerator or make_accelerator())
        self.policy, self.rewards = policy, rewards
        self._show = TextShow(
            policy,
            shown[:SHOWN],
            rewards,
            seed=config.seed,
            batch_size=config.sample_batch_size,
            max_completion_length=config.max_completion_length,
        )

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.policy.trainable

    def show(self, name: str) -> None:
        self._show.write(self.folder / "samples" / f"{name}.jsonl")

    def finish(self) -> None:
        """Write ``final/`` (what transformers and peft load), the samples before and after, and the report."""
        self.policy.save(self.folder / "final")
        if self.policy.has_reference:
            self._show.write_before_after(self.folder / "samples" / "before_after.jsonl")
        write_report(self.folder)

    def global_sum(self, value: Tensor) -> float:
        """Of a number of every process."""
        return float(self.accelerator.reduce(value.to(widest_float(value.device)), reduction="sum"))


def per_sample(losses: Tensor, mask: Tensor, loss_type: LossType, *, mean_length: float, max_length: int) -> Tensor:
    """(B,) of token losses (B, T), so that their mean over samples is the loss that is meant.

    - "grpo": the mean of each sample's tokens; ``aggregate(mode="sequence")``.
    - "dapo": the mean over all tokens; ``aggregate(mode="token")`` where ``mean_length`` is the samples' mean length.
    - "dr_grpo": the sum over ``max_length``; ``aggregate(mode="fixed_length")``.
    """
    if loss_type == "grpo":
        return masked_mean(losses, mask, 1)
    return masked_sum(losses, mask, 1) / (mean_length if loss_type == "dapo" else max_length)


def kl_metrics(trainer: TextTrainer, logp: Tensor, logp_ref: Tensor, mask: Tensor) -> dict[str, float]:
    """``kl`` in nats a token and ``kl_path`` in nats a completion, of all processes' samples of ``logp``.

    k1: unbiased, and unlike k3 of finite variance however far the policy is; near 0 it may be a little negative.
    ``kl_path_stderr`` is the standard error over completions.
    """
    values = kl_value(logp, logp_ref, "k1", mask=mask)
    total, tokens, samples = (trainer.global_sum(x) for x in (values.sum(), mask.sum(), mask.any(1).sum()))
    path = total / max(samples, 1)
    deviations = (values.sum(1) - path)[mask.any(1)].to(widest_float(values.device))
    error = math.sqrt(trainer.global_sum(deviations.square().sum()) / max(samples - 1, 1) / max(samples, 1))
    return {"kl": total / max(tokens, 1), "kl_path": path, "kl_path_stderr": error}
