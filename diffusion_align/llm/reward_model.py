"""Reward models: a transformer with one number as its head, trained to score the preferred completion higher.

Loss of a pair with scores r_w, r_l and probability p that the first is preferred (the row's ``label``, mostly 1):

    -p log sigmoid(r_w - r_l) - (1 - p) log sigmoid(r_l - r_w)      Bradley & Terry 1952; arXiv:2203.02155, eq. 1
    + center_coef (r_w + r_l)²                                      Eisenstein et al. 2023 (arXiv:2312.09244), eq. 2

[004] prints -sigmoid(r_l - r_w), which trains towards the loser. The scores are fixed up to a constant only;
``center_coef`` pulls them to mean 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.data.text_encoding import context_length, continuation_tokens
from diffusion_align.data.text_rows import PreferenceRow, rows_name
from diffusion_align.errors import TrainingError, UserError
from diffusion_align.estimators import bradley_terry_loss
from diffusion_align.estimators.masked import at_least_float32
from diffusion_align.llm.policy import Sequences, pack, padding_token, peft_config, save_model
from diffusion_align.llm.settings import LoRAConfig, RewardModelConfig
from diffusion_align.models.dropout import set_dropout
from diffusion_align.models.lora import add_lora
from diffusion_align.models.memory import checkpoint_activations
from diffusion_align.models.model_card import write_model_card
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.context import EpochCost, RunContext
from diffusion_align.training.finite import MORE_ROOM, all_finite
from diffusion_align.training.method import Dropout, TrainingPlan
from diffusion_align.training.statistics import agreement
from diffusion_align.training.trainer import Trainer


class RewardModel:
    """r(prompt, completion) of a Hugging Face sequence classifier with one label: the logit at the last token.

    Which token is the last is for the model's own forward to say: the last that differs from its configuration's
    padding. So scores equal those of plain transformers; where the end of sequence pads, the last is the one before it.

    Args:
        model: an ``AutoModelForSequenceClassification`` with one label; dropout is off in training as well.
        tokenizer: its tokenizer; where it has no padding token the end of sequence pads.
        lora: adapters to train beside the head; None trains the whole model.
        autocast: context in which the network runs; scores stay float32.
        gradient_checkpointing: see ``checkpoint_activations``.

    Raises:
        UserError: several labels, a tokenizer without an end of sequence, or an adapter that is already there.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        lora: LoRAConfig | None,
        device: torch.device | str = "cpu",
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.pad = padding_token(model, tokenizer)
        if model.config.num_labels != 1:
            raise UserError(f"the model has num_labels={model.config.num_labels}: a reward model has 1")
        self.model, self.tokenizer, self.device, self.autocast = model.to(device), tokenizer, device, autocast
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = self.pad
        model.requires_grad_(lora is None)
        if lora is not None:
            # The head is called by either name.
            add_lora(model, peft_config(lora, model, task_type="SEQ_CLS", also_trained=["score", "classifier"]))
        model.eval()
        self.dropout = set_dropout(model, lora)
        for parameter in self.trainable.values():
            parameter.data = at_least_float32(parameter.data)
        if gradient_checkpointing:
            checkpoint_activations(model)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is trained: head and adapters, or the whole model."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def pack(self, rows: Sequence[PreferenceRow], completions: Sequence[Sequence[int]]) -> Sequences:
        """Completions, each behind the prompt of its row, as the reward ``classifier`` will be shown them.

        That is a text as the tokenizer ends it, mostly without an end of sequence, and a conversation as the chat
        template ends it, which may write a line break behind it. A completion that was cut has no end.
        """
        longest = context_length(self.model.config)
        ended = []
        for row, completion in zip(rows, completions, strict=True):
            tail = self._tails[not isinstance(row.prompt, str)]
            if list(completion[-1:]) != [self.tokenizer.eos_token_id]:
                kept = list(completion)
            else:
                kept = list(completion[:-1]) if tail is None else [*completion, *tail]
            ended.append(kept if longest is None else kept[: longest - len(row.ids)])
        return pack([row.ids for row in rows], ended, pad=self.pad, device=self.device)

    def score(self, sequences: Sequences) -> Tensor:
        """(B,) scores, float32 or wider."""
        with self.autocast():
            output = self.model(input_ids=sequences.ids, attention_mask=sequences.attention_mask, use_cache=False)
        return at_least_float32(output.logits[:, 0])

    def save(self, folder: Path) -> None:
        """Write the model, or head and adapters, and the tokenizer, for plain transformers (with peft)."""
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # as in training; batches cannot be scored without one
        save_model(self.model, self.tokenizer, folder)

    @cached_property
    def _tails(self) -> dict[bool, list[int] | None]:
        """Whether it is a conversation -> the tokens behind its end of sequence, None if it does not end in one."""
        tokenizer = self.tokenizer
        tails: dict[bool, list[int] | None] = {False: None, True: None}
        if tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
            tails[False] = []
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ended = text.rstrip()
            if ended.endswith(tokenizer.eos_token):
                tails[True] = continuation_tokens(tokenizer, ended, text[len(ended) :])
        return tails


@dataclass(frozen=True)
class ScoredPairs:
    """B pairs of one process, on the device.

    Attributes:
        sequences: 2B of them, the B chosen ones and then the B rejected ones.
        labels: (B,) P(chosen is preferred).
    """

    sequences: Sequences
    labels: Tensor


Pair = tuple[PreferenceRow, list[int]]
"""A row and one of its rejected completions."""


class RewardModelTrainer(Trainer[ScoredPairs]):
    """Trains as ``RewardModelConfig`` says.

    Args:
        config: checked settings.
        model: the model to train, on ``accelerator.device``.
        rows: preferences; every rejected completion is one pair.
        eval_rows: preferences to score after every epoch, without training on them.
        accelerator, callbacks: see ``Trainer``.
    """

    config: RewardModelConfig
    config_class = RewardModelConfig
    model_kind = RewardModelConfig.model_kind
    headline = "accuracy"

    def __init__(
        self,
        config: RewardModelConfig,
        model: RewardModel,
        rows: Sequence[PreferenceRow],
        *,
        eval_rows: Sequence[PreferenceRow] = (),
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, accelerator, callbacks=callbacks)
        self.model = model
        self.pairs, self.eval_pairs = (
            [(row, rejected) for row in some for rejected in row.rejected] for some in (rows, eval_rows)
        )

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        pairs = config.samples_per_epoch
        what = ("text per epoch", f"{pairs} rows of {rows_name(config.dataset)}")
        return EpochCost(what, units=pairs, actions=pairs, trained=2 * pairs * config.inner_epochs)

    @classmethod
    def from_run(cls, run: RunContext) -> Self:
        return cls(
            run.config,
            run.policy,
            run.data["dataset"],
            eval_rows=run.data.get("eval_dataset", ()),
            accelerator=run.accelerator,
            callbacks=run.callbacks,
        )

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.model.trainable

    @property
    def dropout(self) -> Dropout | None:
        return self.model.dropout  # the two completions of a pair share a mask

    def collect(self) -> tuple[ScoredPairs, dict[str, float]]:
        """This process's pairs of the epoch."""
        count = self.config.samples_per_epoch
        chosen = items_of_epoch(self.pairs, self.config.seed, self.epoch, count)
        return self._packed([chosen[i] for i in self.local_samples]), {"pairs_used": float(count)}

    def estimate(self, batch: ScoredPairs) -> tuple[ScoredPairs, TrainingPlan, dict[str, float]]:
        """Nothing is estimated: all pairs count."""
        return batch, TrainingPlan(torch.arange(self.config.samples_per_epoch)), {}

    def loss(self, batch: ScoredPairs, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the module docstring; chosen and rejected go through the model together."""
        both = batch.sequences[torch.cat([samples, samples + len(batch.labels)])]
        chosen, rejected = self.model.score(both).chunk(2)
        label = batch.labels[samples]
        losses = label * bradley_terry_loss(chosen, rejected) + (1 - label) * bradley_terry_loss(rejected, chosen)
        margin = (chosen - rejected).detach()
        statistics = {
            "loss/preference": losses.detach(),
            "accuracy": agreement(margin, label),
            "margin": margin,
            "scores/chosen": chosen.detach(),
            "scores/rejected": rejected.detach(),
        }
        if self.config.center_coef > 0:
            offset = (chosen + rejected).square()
            statistics["loss/center"] = offset.detach()
            losses = losses + self.config.center_coef * offset
        return losses, statistics

    def loss_coefficients(self) -> dict[str, float]:
        return {"center_coef": self.config.center_coef}

    def finish(self) -> None:
        """Write ``final/``, what transformers and peft load, and the reward ``classifier``; and its card."""
        self.model.save(self.folder / "final")
        write_model_card(self.folder, self.folder / "final", kind="classifier")

    def measure(self) -> dict[str, float]:
        return self._evaluate() if self.eval_pairs else {}

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Means over ``eval_pairs`` of all processes, with the weights that ``final/`` would hold."""
        own = self.eval_pairs[self.processes.index :: self.processes.count]
        size = self.config.sample_batch_size
        names = ("loss/preference", "accuracy", "margin")
        sums = torch.zeros(len(names), device=self.accelerator.device)
        with self.ema_weights(), self.bars.task("  evaluating", len(own)) as advance:
            for start in range(0, len(own), size):
                some = self._packed(own[start : start + size])
                every = torch.arange(len(some.labels), device=sums.device)
                _, statistics = self.loss(some, every, torch.zeros_like(every))
                sums += torch.stack([statistics[name].sum() for name in names])
                advance(len(every))
        means = self.accelerator.reduce(sums, reduction="sum") / len(self.eval_pairs)
        if not all_finite(means)[0]:
            raise TrainingError(f"the scores of eval_dataset are not finite: {MORE_ROOM}")
        return {f"eval/{name.rpartition('/')[2]}": value for name, value in zip(names, means.tolist(), strict=True)}

    def _packed(self, pairs: Sequence[Pair]) -> ScoredPairs:
        rows = [row for row, _ in pairs]
        sequences = self.model.pack([*rows, *rows], [*(row.chosen for row in rows), *(lost for _, lost in pairs)])
        return ScoredPairs(sequences, torch.tensor([row.label for row in rows], device=self.model.device))
