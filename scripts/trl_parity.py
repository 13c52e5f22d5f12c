"""Gradients of TRL's trainers and ours on the same model, data, log-probs and advantages: how far apart they are.

TRL is no dependency: ``pip install trl==1.16.0`` into an environment of its own, then

    python scripts/trl_parity.py

Each line is max |ours - TRL's| over max |TRL's|, over all parameters of the embedded tiny-lm in float32, trained in
full with the original as the reference. Lines that begin with "differs" are where the two differ on purpose.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from diffusion_align.data.text_encoding import TextEncoder
from diffusion_align.data.text_rows import LabelledRow, PreferenceRow, PromptRow
from diffusion_align.llm.collection import WeightedRewards
from diffusion_align.llm.dpo import DPOTrainer
from diffusion_align.llm.grpo import GRPOBatch, GRPOTrainer
from diffusion_align.llm.kto import KTOTrainer
from diffusion_align.llm.policy import LanguagePolicy, pack
from diffusion_align.llm.reward_model import RewardModel, RewardModelTrainer
from diffusion_align.llm.settings import DPOConfig, GRPOConfig, KTOConfig, RewardModelConfig
from diffusion_align.models.language_models import load_language_model, load_sequence_classifier

PAIRS = [
    ("And the king said", " unto them, Go.", " nothing"),
    ("In the morning", " he rose up early, and went", " it rained"),
    ("Now", " therefore hear", " then the days of the years"),
    ("The sons of", " Levi", " men, and all the people that were"),
]
PAIR_ROWS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
LENGTH = 48
BETA = 0.3
Gradient = dict[str, Tensor]


def perturbed(model: nn.Module) -> nn.Module:
    """A policy that differs from its reference."""
    noise = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.05 * parameter.std() if parameter.numel() > 1 else 0.0
            parameter.add_(scale * torch.randn(parameter.shape, generator=noise))
    return model


def gradient(model: nn.Module, loss: Tensor) -> Gradient:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(ours: Gradient, theirs: Gradient) -> float:
    """Largest difference over largest entry."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) / max(
        float(g.abs().max()) for g in theirs.values()
    )


class Bench:
    """Both sides of every comparison, in one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.tokenizer = load_language_model("tiny-lm")
        self.policy = perturbed(self.base)
        self.encoder = TextEncoder(self.tokenizer, max_completion_length=LENGTH)

    def ours(self, **options: Any) -> LanguagePolicy:
        return LanguagePolicy(
            copy.deepcopy(self.policy), self.tokenizer, lora=None, reference=copy.deepcopy(self.base), **options
        )

    def settings(self, count: int, **settings: Any) -> dict[str, Any]:
        common = {"model": "tiny-lm", "output_dir": self.folder / "ours", "samples_per_epoch": count, "grid_every": 0}
        sizes = {"sample_batch_size": count, "micro_batch_size": count, "updates_per_epoch": 1}
        return common | sizes | {"max_completion_length": LENGTH} | settings

    def arguments(self, kind: type, count: int, **settings: Any) -> Any:
        return kind(
            output_dir=str(self.folder / "theirs"),
            per_device_train_batch_size=count,
            gradient_accumulation_steps=1,
            bf16=False,
            fp16=False,
            report_to=[],
            gradient_checkpointing=False,
            use_cpu=True,
            **settings,
        )

    # -- preferences -------------------------------------------------------------------------------------------------

    def dpo(self, loss_type: str, theirs: Mapping[str, Any], **settings: Any) -> float:
        """Ours with ``settings`` against TRL's DPO with ``theirs``."""
        from trl import DPOConfig as TheirConfig
        from trl import DPOTrainer as TheirTrainer

        arguments = self.arguments(TheirConfig, len(PAIRS), max_length=None, beta=BETA, **theirs)
        found = self.theirs(TheirTrainer, arguments, PAIR_ROWS, ref_model=copy.deepcopy(self.base))
        return distance(self.preference(loss_type, **settings), found)

    def theirs(
        self, trainer: type, arguments: Any, rows: list[dict[str, Any]], model: Any = None, **options: Any
    ) -> Gradient:
        """The gradient of one of TRL's trainers on ``rows``, of a copy of the policy unless another model is given."""
        model = copy.deepcopy(self.policy) if model is None else model
        data = Dataset.from_list(rows)
        made = trainer(model, args=arguments, train_dataset=data, processing_class=self.tokenizer, **options)
        batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
        return gradient(model, made.compute_loss(model, batch))

    def preference(self, loss_type: str, *, bos: bool = False, **settings: Any) -> Gradient:
        """Our DPO family's gradient on ``PAIRS``; ``bos`` puts a beginning of sequence before the prompts."""
        rows = [self.row(*pair) for pair in PAIRS]
        if bos:
            rows = [dataclasses.replace(row, ids=[self.tokenizer.bos_token_id, *row.ids]) for row in rows]
        given = {} if loss_type == "orpo" else {"beta": BETA}
        config = DPOConfig(
            **self.settings(len(rows), loss_type=loss_type, dataset=["x"], **given | settings)  # type: ignore[arg-type]
        )
        policy = self.ours()
        trainer = DPOTrainer(config, policy, rows=rows)
        return self.backward(trainer, policy.model, len(rows))

    def row(self, prompt: str, chosen: str, rejected: str) -> PreferenceRow:
        ids = self.tokenizer(prompt)["input_ids"]
        sides = [[*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id] for text in (chosen, rejected)]
        return PreferenceRow(prompt, ids, sides[0], [sides[1]])

    @staticmethod
    def backward(trainer: Any, model: nn.Module, count: int) -> Gradient:
        alone(trainer)
        batch, _ = trainer.collect()
        batch, *_ = trainer.estimate(batch)
        samples = torch.arange(count)
        losses, _ = trainer.loss(batch, samples, torch.zeros_like(samples))
        return gradient(model, losses.mean())

    def reference_free(self, loss_type: str) -> float:
        """SimPO and ORPO, TRL's experiments, which begin prompts with BOS; ORPO's odds part alone, at weight 1."""
        if loss_type == "simpo":
            from trl.experimental.cpo import CPOConfig as TheirConfig
            from trl.experimental.cpo import CPOTrainer as TheirTrainer

            own: dict[str, Any] = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": BETA}
            ours = self.preference("simpo", bos=True, simpo_margin=0.5)
        else:
            from trl.experimental.orpo import ORPOConfig as TheirConfig
            from trl.experimental.orpo import ORPOTrainer as TheirTrainer

            own = {"beta": 1.0}
            heavy, light = (self.preference("orpo", bos=True, orpo_weight=w) for w in (1.0, 0.0))
            ours = {name: heavy[name] - light[name] for name in heavy}
        grads = []
        for beta in (own["beta"], 0.0) if loss_type == "orpo" else (own["beta"],):
            arguments = self.arguments(TheirConfig, len(PAIRS), max_length=256, **own | {"beta": beta})
            grads.append(self.theirs(TheirTrainer, arguments, PAIR_ROWS))
        theirs = grads[0]
        if loss_type == "orpo":
            theirs = {name: grads[0][name] - grads[1][name] for name in theirs}
        return distance(ours, theirs)

    def kto(self) -> float:
        from trl import KTOConfig as TheirConfig
        from trl import KTOTrainer as TheirTrainer

        rows = [(*PAIRS[0][:2], True), (PAIRS[1][0], PAIRS[1][2], False)]
        data = [{"prompt": p, "completion": c, "label": good} for p, c, good in rows]
        arguments = self.arguments(TheirConfig, 2, beta=BETA, max_length=None, train_sampling_strategy="sequential")
        theirs = self.theirs(TheirTrainer, arguments, data, ref_model=copy.deepcopy(self.base))
        encoded = [
            LabelledRow(
                p, self.tokenizer(p)["input_ids"], [*self.tokenizer(c)["input_ids"], self.tokenizer.eos_token_id], good
            )
            for p, c, good in rows
        ]
        policy = self.ours()
        own = KTOTrainer(KTOConfig(**self.settings(2, dataset=["x"], beta=BETA)), policy, rows=encoded)  # type: ignore[arg-type]
        return distance(self.backward(own, policy.model, 2), theirs)

    def reward_model(self, *, with_end: bool) -> float:
        """``with_end``: an end of sequence behind our texts as behind TRL's."""
        from trl import RewardConfig as TheirConfig
        from trl import RewardTrainer as TheirTrainer

        classifier, tokenizer = load_sequence_classifier("tiny-lm")
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            classifier.score.weight.normal_(0, 0.1, generator=noise)
        rows = [self.row(*pair) for pair in PAIRS]
        arguments = self.arguments(TheirConfig, len(PAIRS), max_length=None)
        theirs = self.theirs(TheirTrainer, arguments, PAIR_ROWS, copy.deepcopy(classifier))
        config = RewardModelConfig(**self.settings(len(rows), dataset=["x"]))  # type: ignore[arg-type]
        scorer = RewardModel(classifier, tokenizer, lora=None)
        if with_end:
            scorer.__dict__["_tails"] = {False: [], True: None}
        own = RewardModelTrainer(config, scorer, rows)
        return distance(self.backward(own, scorer.model, len(rows)), theirs)

    # -- policy gradients --------------------------------------------------------------------------------------------

    def grpo(self, theirs: Mapping[str, Any], **settings: Any) -> float:
        """The loss and its gradient on given completions, old log-probs and rewards."""
        from trl import GRPOConfig as TheirConfig
        from trl import GRPOTrainer as TheirTrainer

        prompts = [PAIRS[i // 2][0] for i in range(8)]
        texts = [PAIRS[i // 2][1 + i % 2] for i in range(8)]
        ids = [self.tokenizer(p)["input_ids"] for p in prompts]
        completions = [[*self.tokenizer(t)["input_ids"], self.tokenizer.eos_token_id] for t in texts]
        policy = self.ours()
        sequences = pack(ids, completions, pad=policy.pad)
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():
            now = policy.log_probs(policy.score(sequences))
            with policy.reference():
                logp_ref = policy.log_probs(policy.score(sequences))
            logp_old = torch.where(
                sequences.mask, now + 0.15 * torch.randn(now.shape, generator=noise), torch.zeros(())
            )
        rewards = torch.randn(8, generator=noise)

        config = GRPOConfig(
            **self.settings(  # type: ignore[arg-type]
                8, prompts=["x"], reward=len_of, num_generations=2, scale_rewards="none", **settings
            )
        )
        own = GRPOTrainer(config, policy, [PromptRow("x", [1], {})], WeightedRewards([len_of], torch.ones(1)))
        batch = GRPOBatch(
            sequences=sequences,
            logp_old=logp_old,
            scores=rewards[:, None],
            rewards=rewards,
            finished=torch.ones(8, dtype=torch.bool),
            advantages=torch.empty(0),
        )
        alone(own)
        batch, *_ = own.estimate(batch)
        samples = torch.arange(8)
        losses, _ = own.loss(batch, samples, torch.zeros_like(samples))
        ours = gradient(policy.model, losses.mean())

        model = copy.deepcopy(self.policy)
        arguments = self.arguments(
            TheirConfig,
            8,
            num_generations=2,
            max_completion_length=LENGTH,
            temperature=1.0,
            epsilon=config.epsilon,
            **theirs,
        )
        data = Dataset.from_list([{"prompt": p} for p in dict.fromkeys(prompts)])
        trainer = TheirTrainer(
            model, reward_funcs=len_of, args=arguments, train_dataset=data, processing_class=self.tokenizer
        )
        width = max(map(len, ids))
        prompt_ids = torch.full((8, width), policy.pad)
        prompt_mask = torch.zeros(8, width, dtype=torch.int64)
        for i, row in enumerate(ids):
            prompt_ids[i, width - len(row) :], prompt_mask[i, width - len(row) :] = torch.tensor(row), 1
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": sequences.completions,
            "completion_mask": sequences.mask.long(),
            "advantages": (rewards.view(-1, 2) - rewards.view(-1, 2).mean(1, keepdim=True)).flatten(),
            "old_per_token_logps": logp_old,
            "ref_per_token_logps": logp_ref,
            "num_items_in_batch": sequences.mask.sum(),
        }
        trainer.current_gradient_accumulation_steps = 1
        return distance(ours, gradient(model, trainer._compute_loss(model, inputs)))


def len_of(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def alone(trainer: Any) -> None:
    """Let the steps of a trainer be called outside ``train``."""
    trainer.progress, trainer.advance = lambda *_: contextlib.nullcontext(0), lambda *_: None


def comparisons(bench: Bench) -> list[tuple[str, Callable[[], float]]]:
    clip = {"epsilon": 0.1}
    dapo, grpo, dr = ({"loss_type": name} for name in ("dapo", "grpo", "dr_grpo"))
    forms = [
        (f"GRPO, loss_type={kind['loss_type']}, {level} ratio", kind, level)
        for kind in (dapo, grpo, dr)
        for level in ("token", "sequence")
    ]
    lines: list[tuple[str, Callable[[], float]]] = [
        (name, lambda kind=kind, level=level: bench.grpo(  # type: ignore[misc]
            kind | {"importance_sampling_level": level}, ratio_level=level, **kind, **clip))
        for name, kind, level in forms
    ]  # fmt: skip
    biased = {"beta": BETA, "kl": "k3_loss", "kl_gradient": "direct"}
    unbiased = {"beta": BETA, "kl": "k3_loss", "kl_gradient": "unbiased"}
    old, new = ({"beta": BETA, "use_bias_correction_kl": on} for on in (False, True))
    k2 = unbiased | {"kl": "k2_loss"}
    lines += [
        ("GRPO with TRL's k3, ours k3_loss direct", lambda: bench.grpo(dapo | old, **dapo, **clip, **biased)),
        ("GRPO with TRL's bias-corrected k3, ours k3_loss", lambda: bench.grpo(dapo | new, **dapo, **clip, **unbiased)),
        ("GRPO with TRL's bias-corrected k3, ours k2_loss", lambda: bench.grpo(dapo | new, **dapo, **clip, **k2)),
        ("DPO sigmoid", lambda: bench.dpo("sigmoid", {"loss_type": ["sigmoid"]})),
        ("DPO hinge", lambda: bench.dpo("hinge", {"loss_type": ["hinge"]})),
        (
            "DPO robust, label_smoothing=.1",
            lambda: bench.dpo("robust", {"loss_type": ["robust"], "label_smoothing": 0.1}, label_smoothing=0.1),
        ),
        ("SimPO", lambda: bench.reference_free("simpo")),
        ("ORPO, the odds part", lambda: bench.reference_free("orpo")),
        ("KTO", bench.kto),
        ("reward model, the same tokens", lambda: bench.reward_model(with_end=True)),
        (
            "differs: sigmoid with label_smoothing=.1",
            lambda: bench.dpo("sigmoid", {"loss_type": ["sigmoid"], "label_smoothing": 0.1}, label_smoothing=0.1),
        ),
        ("differs: reward model", lambda: bench.reward_model(with_end=False)),
        ("differs: IPO", lambda: bench.dpo("ipo", {"loss_type": ["ipo"]})),
        (
            "differs: sigmoid + SFT term, weight .5",
            lambda: bench.dpo("sigmoid", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, sft_weight=0.5),
        ),
    ]
    return lines


def main() -> None:
    import trl

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"TRL {trl.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name, measure in comparisons(bench):
            print(f"{measure():8.1e}  {name}", flush=True)


if __name__ == "__main__":
    main()
