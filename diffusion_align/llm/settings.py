"""Settings of the methods that train a language model; they import no torch, so that the command line is quick."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from diffusion_align.bounds import HIGHEST_RANK, LARGEST, MOST, MOST_ROWS
from diffusion_align.data.sources import in_python
from diffusion_align.data.text_rows import TextDataConfig
from diffusion_align.errors import problems_of, short
from diffusion_align.models.language_models import language_model_ref
from diffusion_align.rewards.settings import RewardSetting, reward_checks, weight_checks
from diffusion_align.training.aliases import formerly_beside, other_words
from diffusion_align.training.attention import TextAttention, attention_checks
from diffusion_align.training.config import LearningRate, LoRASettings, PolicyConfig, TrainingConfig, multiple_checks
from diffusion_align.training.section import OrInfinite, Section, Weight
from diffusion_align.training.settings import (
    EvaluationConfig,
    ExperimentalAdvantages,
    StopConfig,
    dropout_checks,
    no_std,
)

SLICED_FROM = 4096
"""Tokens of a vocabulary from which ``logits=auto`` is sliced; those of the embedded model are fewer."""
Logits = Literal["auto", "whole", "sliced"]
Sampling = Literal["plain", "fast"]


class LoRAConfig(LoRASettings):
    """Low-rank adapters on the language model."""

    rank: int = Field(16, ge=1, le=HIGHEST_RANK, description="rank of every adapter")
    alpha: int | None = Field(None, ge=1, le=MOST, description="scale is alpha / rank; twice the rank when not given")
    layers: Literal["all-linear", "attention"] = Field("all-linear", description="layers that get an adapter")


class TextEvaluationConfig(EvaluationConfig):
    """Completions of fixed prompts, sampled from fixed streams every few epochs, scored by a held-out reward."""

    aliases: ClassVar = {"dataset": "prompts"}

    reward: RewardSetting = Field(description="the held-out reward, or a list of them")
    reward_weights: list[Weight] | None = Field(
        None, description="one weight per reward of a list; 1 each if not given"
    )
    prompts: TextDataConfig | None = Field(
        None,
        description="like the training prompts, which are used if null",
    )
    samples: int = Field(32, ge=2, le=MOST, description="number of completions; they take the prompts in turn")

    def cross_checks(self) -> Iterator[str]:
        yield from weight_checks(self.reward, self.reward_weights)

    def name_checks(self) -> Iterator[str]:
        yield from reward_checks(self.reward, "text")


class TextConfig(PolicyConfig):
    """What every method that trains a language model has."""

    model_kind = "text"

    lora: LoRAConfig | None = Field(
        default_factory=LoRAConfig, description="the adapter to train; null trains the whole model"
    )
    reference_model: str | None = Field(
        None,
        description="name, folder or Hub id of a reference with the same tokens; if null, the model before training",
    )
    learning_rate: LearningRate = 1e-4
    temperature: float = Field(1.0, ge=1e-3, le=1000, description="temperature of sampling and of every log-prob")
    attention: TextAttention = "auto"
    max_prompt_length: int | None = Field(
        None, ge=1, le=MOST, description="largest number of tokens; longer prompts keep their end"
    )
    max_completion_length: int = Field(
        256, ge=1, le=MOST, description="largest number of tokens; longer completions are cut off"
    )
    logits: Logits = Field(
        "auto",
        description="whole: of all scored tokens at once; sliced: log-probs from slices of the vocabulary, faster and "
        f"with less memory, other rounding; auto: sliced from {SLICED_FROM} tokens on, where the model allows it",
    )
    sampling: Sampling = Field(
        "plain",
        description="fast: a prompt is read once for all its completions, finished ones leave the batch, tokens are "
        "chosen in float32; the same streams of random numbers, other rounding",
    )
    show_prompts: list[Any] | None = Field(
        None, description="prompts of the previews; the first of the data if not given"
    )
    _listed = field_validator("show_prompts", mode="before")(in_python)

    evaluation: TextEvaluationConfig | None = Field(None, description="a held-out reward on fixed prompts")
    stop_when: StopConfig = Field(default_factory=StopConfig, description="rules that end the run early")

    @property
    def needs_reference(self) -> bool:
        """Whether the policy must keep a reference beside the trained model: where a setting needs one."""
        return self.reference_model is not None or self.stop_when.kl_above is not None

    @property
    def logs_kl(self) -> bool:
        """Whether every epoch logs ``kl_path``; else evaluations do."""
        return False

    def cross_checks(self) -> Iterator[str]:
        if self.stop_when.kl_above is not None and not self.logs_kl and self.evaluation is None:
            yield (
                "stop_when.kl_above needs the KL, which this run measures only in evaluations: set evaluation, or "
                "leave it out"
            )
        yield from self.stop_when.unmeasured(self.evaluation)
        yield from attention_checks(self.attention)

    def name_checks(self) -> Iterator[str]:
        yield from problems_of(language_model_ref, self.model)
        if self.reference_model is not None:
            found = problems_of(language_model_ref, self.reference_model)
            yield from (problem.replace("model=", "reference_model=", 1) for problem in found)
        yield from reward_checks(getattr(self, "reward", None), "text")


class OnlineConfig(TextConfig):
    """What methods have that sample completions and score them with rewards."""

    prompts: TextDataConfig | None = Field(None, description="texts or messages: list, file, shipped list or Hub id")
    reward: RewardSetting = Field(
        None, description="name, 'module:function', {name: ..., options}, a function, or a list of these"
    )
    reward_weights: list[Weight] | None = Field(
        None, description="one weight per reward of a list; 1 each if not given"
    )
    aliases: ClassVar = {"num_generations": "group_size"}
    group_size: int = Field(8, ge=1, le=MOST, description="completions per prompt per epoch")

    @property
    def online(self) -> bool:
        """Whether completions are sampled, not given."""
        return True

    def cross_checks(self) -> Iterator[str]:
        yield from weight_checks(self.reward, self.reward_weights)
        if self.online:
            yield from multiple_checks(self, "group_size")


LossType = Literal["grpo", "dapo", "dr_grpo"]


class PolicyGradientConfig(OnlineConfig):
    """Prompts, rewards and the clip of the ratio."""

    aliases: ClassVar = {"epsilon": "clip_range", "epsilon_high": "clip_range_high"}

    clip_range: float = Field(
        0.2, gt=0, lt=1, description="clip of the ratio below 1, and above unless clip_range_high is given"
    )
    clip_range_high: float | None = Field(None, gt=0, le=LARGEST, description="clip of the ratio above 1")
    logp_old: Literal["rollout", "recomputed"] = Field(
        "rollout",
        description="log-probs that ratios start from: as sampled, or scored once more before the first update (bf16)",
    )

    def cross_checks(self) -> Iterator[str]:
        yield from dropout_checks(self.lora)
        if self.prompts is None or self.reward is None:
            yield "prompts and reward must both be given"


KLForm = Literal[
    "k1_reward",
    "k2_reward",
    "k3_reward",
    "k3_gradient_reward",
    "k1_loss",
    "k2_loss",
    "k3_loss",
    "full_vocabulary",
]


class ExperimentalGRPO(ExperimentalAdvantages):
    """Rarely used settings of GRPO."""

    kl_gradient: Literal["unbiased", "direct"] = Field(
        "unbiased", description="gradient of the KL as a loss, see `kl_loss`"
    )
    credit: Literal["step", "to_go"] = Field(
        "step", description="k1_reward: to_go also charges a token with the KL of later tokens"
    )


class GRPOConfig(PolicyGradientConfig):
    """Train a language model towards rewards, each completion compared with the others of its prompt (GRPO).

    Settings of ``GRPOTrainer``; see ``PolicyGradientConfig`` for the others.
    """

    aliases: ClassVar = {
        "beta": "kl_coef",
        "num_iterations": "inner_epochs",
        **formerly_beside(ExperimentalGRPO),
    }

    method: str = Field("grpo", description="the training method")

    ratio_level: Annotated[Literal["token", "sequence"], other_words(decision="token", action="token")] = Field(
        "token", description="one ratio per token, or per completion (sequence)"
    )
    loss_type: LossType = Field("dapo", description="mean over tokens (dapo), samples' means (grpo), or sums (dr_grpo)")

    advantages: Literal["group", "leave_one_out"] = Field(
        "group",
        description="reward minus its group's mean, divided by what scale_rewards says; or minus the mean of "
        "the rest of its group, undivided (RLOO)",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="divide rewards by the std of their group, of the batch, or not at all"
    )
    mask_truncated_completions: bool = Field(
        False, strict=True, description="exclude completions that were cut off from the loss"
    )

    kl_coef: float = Field(0.0, ge=0, le=LARGEST, description="price of one nat of KL to the reference; 0 for none")
    kl: KLForm = Field(
        "k1_reward", description="form of the KL to the reference: as a loss or in the reward, and its estimator"
    )

    experimental: ExperimentalGRPO = Field(default_factory=ExperimentalGRPO, description="rarely used settings")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or super().needs_reference

    @property
    def logs_kl(self) -> bool:
        return self.needs_reference or self.lora is not None

    @property
    def compared(self) -> int:
        """Completions of an epoch whose KL to the reference is measured.

        Without a price of it only some, to see how far the policy has gone: 2 % of the epoch's passes (a backward pass
        counts as two), or four.
        """
        every = self.samples_per_epoch
        return every if self.kl_coef > 0 else min(every, max(4, round(0.02 * every * (1 + 3 * self.inner_epochs))))

    def cross_checks(self) -> Iterator[str]:
        if self.group_size < 2:
            yield "group_size=1 leaves nothing to compare a completion with: use 2 or more"
        yield from self.experimental.bounds_checks()
        if self.kl_coef == 0 and (self.kl != "k1_reward" or self.reference_model is not None):
            setting = f"kl={self.kl}" if self.kl != "k1_reward" else f"reference_model={short(self.reference_model)}"
            yield f"{setting} has no effect while kl_coef=0: set kl_coef above 0, or leave it out"
        rare = self.experimental
        if self.advantages == "leave_one_out" and (self.scale_rewards == "batch" or rare.clips_std):
            setting = "scale_rewards=batch" if self.scale_rewards == "batch" else "experimental.clip_std"
            yield no_std(setting, "advantages=leave_one_out")
        elif self.scale_rewards == "none" and rare.clips_std:
            yield no_std("experimental.clip_std", "scale_rewards=none")
        if rare.credit == "to_go" and self.kl != "k1_reward":
            yield f"experimental.credit=to_go needs kl=k1_reward, not kl={self.kl}: change one of them"
        if rare.kl_gradient == "direct" and not self.kl.endswith("_loss"):
            yield f"experimental.kl_gradient=direct needs a KL in the loss, not kl={self.kl}: change one of them"


class ExperimentalPPO(Section):
    """Rarely used settings of PPO."""

    kl_target: float | None = Field(
        None, gt=0, le=LARGEST, description="target KL in nats per completion; adapts kl_coef"
    )
    kl_horizon: int = Field(
        10_000, ge=1, le=MOST_ROWS, description="number of completions over which kl_coef changes by at most a fifth"
    )


class PPOConfig(PolicyGradientConfig):
    """Train a language model towards rewards, with a value for every token (PPO).

    Settings of ``PPOTrainer``; see ``PolicyGradientConfig`` for the others.
    """

    aliases: ClassVar = {
        "beta": "kl_coef",
        "num_ppo_epochs": "inner_epochs",
        **formerly_beside(ExperimentalPPO),
    }

    method: str = Field("ppo", description="the training method")
    group_size: int = Field(1, ge=1, le=MOST, description="completions per prompt per epoch")

    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    lam: float = Field(
        0.95, ge=0, le=1, description="lambda of GAE: 0 is the one-step error, 1 the return minus the value"
    )
    whiten_advantages: bool = Field(
        True, strict=True, description="scale advantages to mean 0 and std 1 over an epoch's tokens"
    )
    value_coef: float = Field(0.1, ge=0, le=LARGEST, description="weight of the value loss")
    value_clip: OrInfinite | None = Field(
        0.2, ge=0, description="bound on the change of a value since sampling; null for none"
    )

    kl_coef: float = Field(0.05, ge=0, le=LARGEST, description="price of one nat of KL to the reference")
    missing_eos_penalty: float = Field(
        0.0, ge=0, le=LARGEST, description="subtracted from the reward of a completion without an end of sequence"
    )
    experimental: ExperimentalPPO = Field(default_factory=ExperimentalPPO, description="rarely used settings")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or super().needs_reference

    @property
    def logs_kl(self) -> bool:
        return self.kl_coef > 0

    def cross_checks(self) -> Iterator[str]:
        if self.kl_coef == 0 and self.reference_model is not None:
            yield "reference_model has no effect while kl_coef=0: set kl_coef above 0, or leave it out"
        if self.experimental.kl_target is not None and self.kl_coef == 0:
            yield "experimental.kl_target scales kl_coef: set kl_coef above 0, or leave kl_target out"


class PreferenceConfig(OnlineConfig):
    """Rows of a dataset, or prompts for whose completions a reward is called in every epoch (online).

    ``samples_per_epoch`` counts rows, or online completions.
    """

    dataset: TextDataConfig | None = Field(None, description="rows: list, file, shipped list or Hub id")
    group_size: int = Field(4, ge=1, le=MOST, description="online: completions per prompt per epoch")
    beta: float = Field(0.1, gt=0, le=LARGEST, description="price of one nat of log-ratio to the reference")

    @property
    def online(self) -> bool:
        return self.dataset is None

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def fewest_generations(self) -> int:
        """Fewest completions per prompt that can be compared online."""
        return 2

    def cross_checks(self) -> Iterator[str]:
        if self.online and (self.prompts is None or self.reward is None):
            yield "give dataset, or prompts and a reward to sample and judge completions online"
        if not self.online and self.prompts is not None:
            yield "give either dataset, or prompts to sample and judge completions online, not both"
        if self.online and self.group_size < self.fewest_generations:
            yield (
                f"group_size={self.group_size} leaves nothing to compare a completion with: "
                f"use {self.fewest_generations} or more"
            )


class DynamicBetaConfig(Section):
    """beta(x), which is ``beta`` for every prompt before training; see ``estimators.dynamic_beta``."""

    beta_min: float = Field(0.01, ge=0, le=LARGEST, description="beta(x) is penalized below this")
    beta_max: float = Field(1.0, gt=0, le=LARGEST, description="beta(x) is penalized above this")
    range_weight: float = Field(1.0, ge=0, le=LARGEST, description="weight of leaving [beta_min, beta_max]")
    smoothness_weight: float = Field(1.0, ge=0, le=LARGEST, description="weight of the squared slope in the embedding")
    entropy_weight: float = Field(1.0, ge=0, le=LARGEST, description="weight of the distance to alpha x entropy")
    alpha: float = Field(0.05, ge=0, le=LARGEST, description="beta per nat of the reference's entropy")
    hidden: int = Field(64, ge=1, le=HIGHEST_RANK, description="width of the network")
    convention: Literal["product", "inverse"] = Field(
        "product", description="the loss has beta(x) h, or h / beta(x) as its paper prints it"
    )
    detach: bool = Field(True, strict=True, description="false: the preference loss trains beta too (it runs away)")

    def cross_checks(self) -> Iterator[str]:
        if self.beta_min > self.beta_max:
            yield f"beta_min={self.beta_min:g} is more than beta_max={self.beta_max:g}: change one of them"
        if self.detach and not (self.range_weight or self.smoothness_weight or self.entropy_weight):
            yield "range_weight, smoothness_weight and entropy_weight are all 0, so nothing is learned: raise one"


# What only some losses have: setting -> those losses.
_BELONGS = {
    "label_smoothing": ("sigmoid", "robust"),
    "simpo_margin": ("simpo",),
    "orpo_weight": ("orpo",),
    "gamma": ("trajectory",),
}


_WITHOUT_REFERENCE = ("simpo", "orpo")


class ExperimentalDPO(Section):
    """Rarely used settings of DPO."""

    sample_from: Literal["policy", "reference"] = Field(
        "policy", description="online: the model that samples the completions"
    )
    rso_beta: float = Field(
        0.5, ge=1e-6, le=LARGEST, description="rso: reward difference that changes the probability by a factor e"
    )
    dynamic_beta: DynamicBetaConfig | None = Field(None, description="learn a beta per prompt, starting at `beta`")


class DPOConfig(PreferenceConfig):
    """Train a language model towards preferred completions (DPO and its family).

    Settings of ``DPOTrainer``; see ``TextConfig`` and ``PreferenceConfig`` for the others.
    """

    aliases: ClassVar = formerly_beside(ExperimentalDPO)

    method: str = Field("dpo", description="the training method")
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "trajectory"] = Field(
        "sigmoid", description="the preference loss; simpo and orpo need no reference"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="probability that a label is wrong")
    simpo_margin: Weight = Field(0.0, description="simpo: target margin of beta h")
    orpo_weight: float = Field(0.1, ge=0, le=LARGEST, description="orpo: weight of the odds ratio")
    gamma: float = Field(1.0, ge=0, le=1, description="trajectory: discount per token")
    sft_weight: float = Field(0.0, ge=0, le=LARGEST, description="weight of the chosen completion's mean log-prob")
    precompute_ref_log_probs: bool = Field(
        False, strict=True, description="call the reference once; a fully trained model then needs no frozen copy"
    )

    pair_selection: Literal["best_worst", "best_rest", "rso"] = Field(
        "best_worst",
        description="online: best and worst, best and all worse ones, or two that rejection sampling keeps",
    )
    experimental: ExperimentalDPO = Field(default_factory=ExperimentalDPO, description="rarely used settings")

    @property
    def reference_free(self) -> bool:
        return self.loss_type in _WITHOUT_REFERENCE

    @property
    def needs_reference(self) -> bool:
        called = self.experimental.sample_from == "reference" or self.stop_when.kl_above is not None
        return called or not (self.reference_free or self.precompute_ref_log_probs)

    def cross_checks(self) -> Iterator[str]:
        for name, losses in _BELONGS.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and self.loss_type not in losses:
                yield f"{name}={value:g} has no effect with loss_type={self.loss_type}: leave one of them out"
        if self.loss_type == "orpo" and self.beta != type(self).model_fields["beta"].default:
            yield f"beta={self.beta:g} has no effect with loss_type=orpo: set orpo_weight instead"
        rare, standard = self.experimental, ExperimentalDPO()
        if self.pair_selection != "rso" and rare.rso_beta != standard.rso_beta:
            yield f"experimental.rso_beta={rare.rso_beta:g} needs pair_selection=rso: set it, or leave rso_beta out"
        if self.loss_type == "orpo" and self.sft_weight:
            yield "loss_type=orpo includes the log-prob of the chosen completion: leave sft_weight out"
        of_reference = {
            "precompute_ref_log_probs": self.precompute_ref_log_probs,
            "experimental.dynamic_beta": rare.dynamic_beta is not None,
            "reference_model": self.reference_model is not None and rare.sample_from == "policy",
        }
        if self.reference_free and any(of_reference.values()):
            given = " and ".join(name for name, is_given in of_reference.items() if is_given)
            yield f"loss_type={self.loss_type} uses no reference: leave {given} out"
        if self.online and self.precompute_ref_log_probs:
            yield "precompute_ref_log_probs needs a dataset, as online every epoch has new completions: leave it out"
        if not self.online and (rare.sample_from != "policy" or self.pair_selection != "best_worst"):
            yield "experimental.sample_from and pair_selection are for pairs judged online: leave them out, or dataset"
        if self.pair_selection == "best_rest" and self.loss_type != "sigmoid":
            yield (
                f"pair_selection=best_rest gives several rejected completions, which loss_type={self.loss_type} cannot "
                "use: set loss_type=sigmoid"
            )
        if self.pair_selection == "rso" and rare.sample_from != "reference":
            yield "pair_selection=rso needs completions of the reference: set experimental.sample_from=reference"


class ExperimentalKTO(Section):
    """Rarely used settings of KTO."""

    kl_samples: int = Field(
        64, ge=1, le=MOST, description="largest number of mismatched pairs per epoch for the reference point"
    )


class KTOConfig(PreferenceConfig):
    """Train a language model towards desirable completions (KTO).

    Settings of ``KTOTrainer``; see ``TextConfig`` and ``PreferenceConfig`` for the others.
    """

    dataset_kind = "labels"

    aliases: ClassVar = formerly_beside(ExperimentalKTO)

    method: str = Field("kto", description="the training method")
    desirable_weight: float = Field(
        1.0,
        ge=0,
        le=LARGEST,
        description="weight of desirable completions; times their number, 1 to 4/3 of undesirable_weight times theirs",
    )
    undesirable_weight: float = Field(1.0, ge=0, le=LARGEST, description="weight of undesirable completions")
    desirable_above: Weight | None = Field(
        None, description="online: threshold on the reward; the mean over the prompt's completions if not given"
    )
    experimental: ExperimentalKTO = Field(default_factory=ExperimentalKTO, description="rarely used settings")

    @property
    def fewest_generations(self) -> int:
        return 2 if self.desirable_above is None else 1

    def cross_checks(self) -> Iterator[str]:
        if self.desirable_weight == self.undesirable_weight == 0:
            yield "desirable_weight and undesirable_weight are both 0, so nothing is learned: raise one"
        if not self.online and self.desirable_above is not None:
            yield "desirable_above is for completions judged online, and dataset has labels: leave one of them out"
        if self.samples_per_epoch < 2 * (self.group_size if self.online else 1):
            yield (
                f"samples_per_epoch={self.samples_per_epoch} covers one prompt, and KTO's reference point needs two: "
                "raise it"
            )


class RewardModelConfig(TrainingConfig):
    """Train a reward model on preferences.

    Settings of ``RewardModelTrainer``; see ``TrainingConfig`` for those of every trainer.
    ``samples_per_epoch`` counts pairs; a row with several rejected completions is as many pairs.
    """

    model_kind = "classifier"

    method: str = Field("reward_model", description="the training method")
    dataset: TextDataConfig = Field(description="preferences: list, file or Hub id")
    eval_dataset: TextDataConfig | None = Field(None, description="preferences to score after every epoch")
    lora: LoRAConfig | None = Field(
        default_factory=LoRAConfig, description="the adapter to train; null trains the whole model"
    )
    learning_rate: LearningRate = 1e-4
    attention: TextAttention = "auto"
    max_prompt_length: int | None = Field(
        None, ge=1, le=MOST, description="largest number of tokens; longer prompts keep their end"
    )
    max_completion_length: int = Field(
        256, ge=1, le=MOST, description="largest number of tokens; longer completions are cut off"
    )
    center_coef: float = Field(0.0, ge=0, le=LARGEST, description="weight of (r_w + r_l)², pulls them to 0")

    def cross_checks(self) -> Iterator[str]:
        yield from attention_checks(self.attention)

    def name_checks(self) -> Iterator[str]:
        yield from problems_of(language_model_ref, self.model, ("causal", "classifier"))
