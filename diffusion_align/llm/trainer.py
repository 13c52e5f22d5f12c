"""What the trainers of language models share beyond the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.data.text_rows import LabelledRow, PreferenceRow, PromptRow, prompts_of, rows_name
from diffusion_align.errors import ConfigError
from diffusion_align.estimators import kl_value, masked_mean, masked_sum
from diffusion_align.llm.collection import (
    Collected,
    WeightedRewards,
    collect_scored,
    completion_ids,
    in_batches,
    reference_log_probs,
    trainer_state,
)
from diffusion_align.llm.evaluation import TextEvaluation
from diffusion_align.llm.policy import LanguagePolicy, Sequences, widest_float
from diffusion_align.llm.previews import TextPreviews
from diffusion_align.llm.rollout import rollout
from diffusion_align.llm.settings import TextConfig
from diffusion_align.models.model_card import write_model_card
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.context import EpochCost, Metric, RunContext
from diffusion_align.training.evaluation import Evaluation, StopConfig
from diffusion_align.training.policy_trainer import PolicyTrainer
from diffusion_align.training.processes import Processes
from diffusion_align.training.randomness import generator

Batch = TypeVar("Batch")
LossType = Literal["grpo", "dapo", "dr_grpo"]


class TextTrainer(PolicyTrainer[Batch]):
    """A policy, rewards (if any), what is shown and what is evaluated of them.

    Args:
        config: checked settings.
        policy: the language model, on ``accelerator.device``.
        prompts: what to complete, with the columns that the rewards receive.
        rows: given completions.
        rewards: what scores completions, already checked.
        shown: prompts to show; the first of the data when not given.
        evaluation: the held-out rewards and fixed prompts, if anything is to be evaluated.
        accelerator, callbacks: see ``Trainer``.

    Raises:
        ConfigError: data that the method cannot use.
    """

    config: TextConfig
    config_class: ClassVar[type[TrainingConfig]] = TextConfig
    model_kind = "text"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "kl": Metric(
            "KL to the reference, a token",
            "nats a token",
            "How far the policy had gone from the reference when it wrote the epoch's completions, for one token.",
        ),
        "kl_path": Metric(
            "KL to the reference, a completion", "nats a completion", "The same, summed over a completion."
        ),
    }

    def __init__(
        self,
        config: TextConfig,
        policy: LanguagePolicy,
        *,
        prompts: Sequence[PromptRow] | None = None,
        rows: Sequence[PreferenceRow | LabelledRow] | None = None,
        rewards: WeightedRewards | None = None,
        shown: Sequence[PromptRow] | None = None,
        evaluation: TextEvaluation | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, evaluation=evaluation, accelerator=accelerator, callbacks=callbacks)
        self.policy, self.prompts, self.rows, self.rewards = policy, prompts or (), rows or (), rewards
        if shown is None:
            shown = self.prompts or prompts_of(self.rows)
        self.previews = TextPreviews(
            policy,
            shown,
            rewards,
            seed=config.seed,
            batch_size=config.sample_batch_size,
            max_completion_length=config.max_completion_length,
        )
        if problems := self.data_problems():
            raise ConfigError(problems)

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """In completions; each is scored once by the reference, if there is one, and trained on in every pass."""
        count, prompts = config.samples_per_epoch, getattr(config, "prompts", None)
        what = f"{count} completions of at most {config.max_completion_length} tokens, of {rows_name(prompts)}"
        if prompts is None:
            what = f"{count} rows of {rows_name(getattr(config, 'dataset', None))}"
        return EpochCost(
            what=("text an epoch", what),
            units=count,
            actions=count,
            sampling=count if prompts is not None else 0,
            trained=count * config.inner_epochs,
            reference=count if config.needs_reference else 0,
        )

    @classmethod
    def from_run(cls, run: RunContext) -> Self:
        rows = {"rows": run.data["dataset"]} if "dataset" in run.data else {}
        return cls(
            run.config,
            run.policy,
            prompts=run.data.get("prompts", ()),
            rewards=run.reward,
            shown=run.shown,
            evaluation=run.evaluation,
            accelerator=run.accelerator,
            callbacks=run.callbacks,
            **rows,
        )

    def data_problems(self) -> list[str]:
        """Sentences about rows or prompts that the method cannot use."""
        return []

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.policy.trainable

    @property
    def rules(self) -> StopConfig:
        return self.config.stop_when

    def sample_held_out(self, evaluation: Evaluation, indices: range) -> dict[str, Tensor]:
        """``gold`` (n,); and ``kl_path`` (n,), log(pi/pi_ref) of each, where the method logs no KL of its own."""
        rows = evaluation.prompts_of(indices)
        streams = [generator(self.config.seed, "evaluation", i) for i in indices]
        length = self.config.max_completion_length
        completions = rollout(self.policy, [row.ids for row in rows], streams, max_new_tokens=length)
        sequences, rewards = completions.sequences, evaluation.gold
        ids = completion_ids(sequences) if rewards.want_ids else None
        scores = rewards.scores(rows, self.policy.decode(sequences), ids)
        found = {"gold": rewards.total(rows, scores)}
        if self.policy.has_reference and not self.config.logs_kl:
            with self.policy.reference():
                logp_ref = self.policy.log_probs(self.policy.score(sequences))
            found["kl_path"] = masked_sum(completions.logp_old - logp_ref, sequences.mask, 1)
        return found

    def write_weights(self, folder: Path) -> None:
        """Write the adapter, or the whole model if all of it is trained, as transformers and peft load it."""
        self.policy.save(folder)

    def write_card(self) -> None:
        write_model_card(self.folder, self.folder / "final", kind="text")

    def sample(self, prompts: Sequence[PromptRow], num_generations: int) -> tuple[list[PromptRow], Collected]:
        """Each of the epoch's prompts ``num_generations`` times, N rows, and their completions, scored."""
        assert self.rewards is not None
        config = self.config
        chosen = items_of_epoch(prompts, config.seed, self.epoch, config.samples_per_epoch // num_generations)
        rows = [row for row in chosen for _ in range(num_generations)]
        return rows, collect_scored(
            self.policy,
            self.rewards,
            rows,
            own=self.local_samples,
            batch_size=config.sample_batch_size,
            stream=partial(generator, config.seed, "tokens", self.epoch),
            max_completion_length=config.max_completion_length,
            state=trainer_state(config, step=self.step, epoch=self.epoch),
            processes=self.processes,
            bars=self.bars,
        )

    def reference_log_probs(self, sequences: Sequences) -> Tensor:
        """Log-probs (B, T) of the reference for completions of this process; called on every process, B may be 0."""
        size = self.config.sample_batch_size
        return reference_log_probs(self.policy, sequences, batch_size=size, processes=self.processes, bars=self.bars)

    def in_batches(self, sequences: Sequences, compute: Callable[[Sequences], Tensor], what: str) -> Tensor:
        """(B, T) of ``compute``'s values for ``sequences``, as many at once as are sampled; see ``in_batches``."""
        return in_batches(sequences, compute, batch_size=self.config.sample_batch_size, bars=self.bars, what=what)


def per_sample(losses: Tensor, mask: Tensor, loss_type: LossType, *, mean_length: float, max_length: int) -> Tensor:
    """(B,) of token losses (B, T), so that their mean over samples is the loss that is meant.

    - "grpo": the mean of each sample's tokens; ``aggregate(mode="sequence")``.
    - "dapo": the mean over all tokens; ``aggregate(mode="token")`` where ``mean_length`` is the samples' mean length.
    - "dr_grpo": the sum over ``max_length``; ``aggregate(mode="fixed_length")``.
    """
    if loss_type == "grpo":
        return masked_mean(losses, mask, 1)
    return masked_sum(losses, mask, 1) / (mean_length if loss_type == "dapo" else max_length)


def kl_metrics(logp: Tensor, logp_ref: Tensor, mask: Tensor, processes: Processes) -> dict[str, float]:
    """``kl`` in nats a token and ``kl_path`` in nats a completion, of all processes' samples of ``logp``.

    k1: unbiased, and unlike k3 of finite variance however far the policy is; near 0 it may be a little negative.
    ``kl_path_stderr`` is the standard error over completions.
    """
    values = kl_value(logp, logp_ref, "k1", mask=mask)
    total, tokens, samples = (processes.sum(x) for x in (values.sum(), mask.sum(), mask.any(1).sum()))
    path = total / max(samples, 1)
    deviations = (values.sum(1) - path)[mask.any(1)].to(widest_float(values.device))
    error = math.sqrt(processes.sum(deviations.square().sum()) / max(samples - 1, 1) / max(samples, 1))
    return {"kl": total / max(tokens, 1), "kl_path": path, "kl_path_stderr": error}
