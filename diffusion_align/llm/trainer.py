"""What the trainers of language models share beyond the loop: settings, completions with rewards, what is shown of them
and how far they are from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.data.text_rows import (
    LabelledRow,
    PreferenceRow,
    PromptRow,
    prompts_of,
    rows_name,
)
from diffusion_align.errors import ConfigError, TrainingError
from diffusion_align.estimators import kl_value, masked_mean, masked_sum
from diffusion_align.llm.collection import Collected, WeightedRewards, completion_metrics, trainer_state
from diffusion_align.llm.policy import LanguagePolicy, Sequences, pad_to, widest_float
from diffusion_align.llm.previews import TextPreviews
from diffusion_align.llm.rollout import Completions, joined, rollout
from diffusion_align.llm.settings import LossType, OnlineConfig, TextConfig, TextEvaluationConfig  # noqa: F401, their former place
from diffusion_align.models.model_card import write_model_card
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.collection import Calls, sample_and_score
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.context import EpochCost, Metric, RunContext
from diffusion_align.training.evaluation import Evaluation
from diffusion_align.training.finite import require_finite_logits
from diffusion_align.training.method import Dropout
from diffusion_align.training.policy_trainer import PolicyTrainer
from diffusion_align.training.processes import Processes
from diffusion_align.training.randomness import generator
from diffusion_align.training.settings import StopConfig

Batch = TypeVar("Batch")


@dataclass
class TextEvaluation(Evaluation):
    """For completions: ``prompts`` are ``PromptRow``, ``reward`` are ``WeightedRewards``."""

    def metrics(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """``kl_path`` and its standard error, nats per completion, of ``kl_path`` (N,) where it is measured.

        The mean of log(pi/pi_ref) over completions of the policy as it is: k1, which is unbiased.
        """
        if "kl_path" not in found:
            return {}
        values = found["kl_path"].double()
        return {"kl_path": values.mean().item(), "kl_path_stderr": values.std().item() / math.sqrt(len(values))}


class TextTrainer(PolicyTrainer[Batch]):
    """A policy, rewards (if any), what is shown and what is evaluated of them.

    Args:
        config: checked settings.
        policy: the language model, on ``accelerator.device``.
        prompts: what to complete, with the columns that the rewards receive.
        rewards: what scores completions, already checked.
        rows: given completions.
        shown: prompts to show; the first of the data when not given.
        evaluation: the held-out rewards and fixed prompts, if anything is to be evaluated.
        accelerator, callbacks: see ``Trainer``.

    Raises:
        ConfigError: data that the method cannot use.
    """

    config: TextConfig
    config_class: ClassVar[type[TrainingConfig]] = TextConfig
    model_kind = TextConfig.model_kind
    needs_every_reward = True  # False: a completion about which no reward says anything is no error
    metrics: ClassVar[Mapping[str, Metric]] = {
        "kl": Metric(
            "KL to the reference, per token",
            "nats per token",
            "How far the policy had gone from the reference when it sampled the epoch's completions, per token.",
        ),
        "kl_path": Metric(
            "KL to the reference, per completion", "nats per completion", "The same, summed over a completion."
        ),
    }

    def __init__(
        self,
        config: TextConfig,
        policy: LanguagePolicy,
        prompts: Sequence[PromptRow] = (),
        rewards: WeightedRewards | None = None,
        *,
        rows: Sequence[PreferenceRow | LabelledRow] = (),
        shown: Sequence[PromptRow] | None = None,
        evaluation: TextEvaluation | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, evaluation=evaluation, accelerator=accelerator, callbacks=callbacks)
        if rewards is not None and not self.needs_every_reward:
            rewards = replace(rewards, may_be_silent=True)
        self.policy, self.prompts, self.rows, self.rewards = policy, prompts, rows, rewards
        self.previews = TextPreviews(
            policy,
            (prompts or prompts_of(rows)) if shown is None else shown,
            rewards,
            seed=config.seed,
            batch_size=config.sample_batch_size,
            max_completion_length=config.max_completion_length,
        )
        if misfits := list(self.data_checks()):
            raise ConfigError(misfits)

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """In completions; each is scored once by the reference, if there is one, and trained on in every pass."""
        count, prompts = config.samples_per_epoch, getattr(config, "prompts", None)
        what = f"{count} completions of at most {config.max_completion_length} tokens, of {rows_name(prompts)}"
        if prompts is None:
            what = f"{count} rows of {rows_name(getattr(config, 'dataset', None))}"
        return EpochCost(
            what=("text per epoch", what),
            units=count,
            actions=count,
            sampling=count if prompts is not None else 0,
            trained=count * config.inner_epochs,
            reference=count if config.needs_reference else 0,
        )

    @classmethod
    def from_run(cls, run: RunContext) -> Self:
        return cls(
            run.config,
            run.policy,
            run.data.get("prompts", ()),
            run.reward,
            rows=run.data.get("dataset", ()),
            shown=run.shown,
            evaluation=run.evaluation,
            accelerator=run.accelerator,
            callbacks=run.callbacks,
        )

    def data_checks(self) -> Iterator[str]:
        """A generator of sentences about rows or prompts that the method cannot use."""
        return iter(())

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.policy.trainable

    @property
    def dropout(self) -> Dropout | None:
        return self.policy.dropout

    @property
    def rules(self) -> StopConfig:
        return self.config.stop_when

    def sample_held_out(self, evaluation: Evaluation, indices: range) -> dict[str, Tensor]:
        """``gold`` (n,); and ``kl_path`` (n,), log(pi/pi_ref) of each, where the method logs no KL of its own."""
        rows = evaluation.prompts_of(indices)
        streams = [generator(self.config.seed, "evaluation", i) for i in indices]
        length = self.config.max_completion_length
        completions = rollout(self.policy, [row.ids for row in rows], streams, max_new_tokens=length)
        sequences, rewards = completions.sequences, evaluation.reward
        scores = rewards.scores(rows, self.policy.decode(sequences), sequences.tokens)
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

    def sample(self, prompts: Sequence[PromptRow], group_size: int) -> tuple[list[PromptRow], Collected]:
        """Each of the epoch's prompts ``group_size`` times, N rows, and their completions, scored.

        This process samples its part, batch by batch, and scores it, in the background where a reward is called there.

        Raises:
            RewardError, TrainingError, Interrupted: see ``sample_and_score``.
        """
        config, rewards = self.config, self.rewards
        assert rewards is not None
        chosen = items_of_epoch(prompts, config.seed, self.epoch, config.samples_per_epoch // group_size)
        rows = [row for row in chosen for _ in range(group_size)]
        length, state = config.max_completion_length, trainer_state(config, step=self.step, epoch=self.epoch)

        def sample_batch(batch: range) -> tuple[Completions, Calls]:
            some = [rows[i] for i in batch]
            streams = [generator(config.seed, "tokens", self.epoch, i) for i in batch]
            prompts = [row.ids for row in some]
            left = length

            def on_token() -> None:
                nonlocal left
                left -= 1
                advance(1)

            sampled = rollout(self.policy, prompts, streams, max_new_tokens=length, on_token=on_token)
            advance(left)
            texts = self.policy.decode(sampled.sequences)
            return sampled, rewards.calls(some, texts, sampled.sequences.tokens, state)

        own, size = self.local_samples, config.sample_batch_size
        with self.bars.task("  sampling", -(-len(own) // size) * length) as advance:
            parts, scores, waited = sample_and_score(
                own, size, sample_batch, self.processes, check=lambda some: rewards.total([rows[i] for i in own], some)
            )
        completions = joined(parts, self.policy.pad)
        finished, lengths = (
            self.accelerator.gather(x).cpu() for x in (completions.finished, completions.sequences.mask.sum(1))
        )
        total = rewards.total(rows, scores)
        if total.isnan().all():  # of no sample at all: an error after all
            replace(rewards, may_be_silent=False).total(rows, scores)
        metrics = completion_metrics(rewards.names, total, scores, lengths, finished) | {"time/score": waited}
        return rows, Collected(completions, finished, scores, total, metrics)

    def local_indices(self, indices: Tensor) -> Tensor:
        """Those of the global samples ``indices`` that are this process's, counted from its first, on the device."""
        own = self.local_samples
        return (indices[(indices >= own.start) & (indices < own.stop)] - own.start).to(self.accelerator.device)

    def reference_log_probs(self, sequences: Sequences) -> Tensor:
        """Log-probs (B, T) of the reference for completions of this process; called on every process, B may be 0.

        Raises:
            TrainingError: on every process, if they are not finite on any.
        """
        with self.policy.reference():
            found = self.log_probs_in_batches(sequences, self.config.sample_batch_size, "  reference")
        failure = None
        try:
            require_finite_logits(found, what="the reference")
        except TrainingError as error:
            failure = error
        self.processes.raise_together(failure, TrainingError)
        return found

    @torch.no_grad()
    def log_probs_in_batches(self, sequences: Sequences, size: int, what: str) -> Tensor:
        """Log-probs (B, T), ``size`` completions at once; ``what`` names the progress bar."""
        return self.in_batches(sequences, lambda some: self.policy.log_probs(self.policy.score(some)), what, size)

    def in_batches(
        self, sequences: Sequences, compute: Callable[[Sequences], Tensor], what: str, size: int | None = None
    ) -> Tensor:
        """(B, T) of ``compute``'s values for ``sequences``, 0 beyond their ends; as many at once as are sampled."""
        width, every = sequences.mask.shape[1], torch.arange(len(sequences), device=sequences.ids.device)
        parts = [torch.zeros(0, width, device=every.device)] if not len(every) else []
        with self.bars.task(what, len(every)) as advance:
            for rows in every.split(size or self.config.sample_batch_size) if len(every) else ():
                parts.append(pad_to(compute(sequences[rows]), width, 0.0))
                advance(len(rows))
        return torch.cat(parts)


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
    """``kl`` in nats per token and ``kl_path`` in nats per completion, of all processes' samples of ``logp``.

    k1: unbiased, and unlike k3 of finite variance however far the policy is; near 0 it may be a little negative.
    ``kl_path_stderr`` is the standard error over completions.
    """
    values = kl_value(logp, logp_ref, "k1", mask=mask)
    total, tokens, samples = (processes.sum(x) for x in (values.sum(), mask.sum(), mask.any(1).sum()))
    path = total / max(samples, 1)
    deviations = (values.sum(1) - path)[mask.any(1)].to(widest_float(values.device))
    error = math.sqrt(processes.sum(deviations.square().sum()) / max(samples - 1, 1) / max(samples, 1))
    return {"kl": total / max(tokens, 1), "kl_path": path, "kl_path_stderr": error}
