"""Settings of Diffusion-DPO; they import no torch, so that the command line is quick."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.data.image_pairs import PairsConfig
from diffusion_align.data.prompts import PromptsConfig
from diffusion_align.diffusion.sampler_settings import TIMESTEP_RANGE, StepDraw, Weighting, range_checks
from diffusion_align.diffusion.settings import DenoisingConfig, Side
from diffusion_align.rewards.settings import RewardSetting, weight_checks
from diffusion_align.training.aliases import formerly_beside, other_words
from diffusion_align.training.config import multiple_checks
from diffusion_align.training.section import OrInfinite, Section, Weight


class ExperimentalDiffusionDPO(Section):
    """Rarely used settings of Diffusion-DPO."""

    target: Literal["posterior_mean", "posterior_sample", "logged"] = Field(
        "posterior_mean",
        description="x_s: its mean given x_0, a sample given x_0, or online the one that the sampler logged",
    )
    reward_mode: Literal["kl", "signed_kl", "logratio"] = Field(
        "kl", description="corrected: r is the KL to the reference (eq. 36), that with a sign, or the log-ratio"
    )
    old_refresh: Literal["update", "epoch"] = Field(
        "update", description="corrected: when the policy that r is computed with is refreshed"
    )
    loser_weight: float = Field(1.0, ge=0, le=LARGEST, description="weight of the rejected image's error")
    loser_clip: OrInfinite | None = Field(
        None, gt=0, description="the rejected image's error counts up to the reference's plus this many nats"
    )
    max_winner_error: OrInfinite = Field(
        2.0, gt=1, description="stop when the chosen images' error is this many times the reference's"
    )


class DiffusionDPOConfig(DenoisingConfig):
    """Fine-tune a text-to-image pipeline towards the preferred of two images (Diffusion-DPO).

    Settings of ``DiffusionDPOTrainer``; see ``DenoisingConfig`` and ``TrainingConfig`` for those of every trainer.
    ``samples_per_epoch`` counts pairs, or with online judging images.
    """

    aliases: ClassVar = {
        "decisions_per_pair": "steps_per_pair",
        "num_generations": "group_size",
        "bucket_reso_steps": "bucket_step",
        "aspect_bucket_alignment": "bucket_step",
        **formerly_beside(ExperimentalDiffusionDPO),
    }

    method: str = Field("diffusion_dpo", description="the training method")
    pairs: PairsConfig | None = Field(None, description="a source of pairs, or a mapping with its options")
    bucket_step: Side | None = Field(
        None,
        description="train on pairs at about their own aspect ratio, in buckets of at most the run's area whose sides "
        "are multiples of this many pixels (usually 64); null crops all to one size",
    )
    latent_cache_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the pairs' latents in the run folder: bfloat16 takes half the disk and rounds them"
    )
    prompts_on_disk: bool = Field(
        True,
        strict=True,
        description="keep embeddings of more captions than memory holds (2048) in the run folder, if they take at most "
        "half of the free disk; false encodes them again in every epoch",
    )
    prompts: PromptsConfig | None = Field(
        None, description="for judging online: list of texts, file, folder, Hub dataset or shipped list"
    )
    reward: RewardSetting = Field(None, description="judges online; with `pairs` it only scores the shown images")
    reward_weights: list[Weight] | None = Field(
        None, description="one weight per reward of a list; 1 each if not given"
    )
    group_size: int = Field(
        4, ge=2, le=MOST, description="online: images per prompt; the best and the worst are a pair"
    )

    variant: Literal["original", "corrected"] = Field(
        "original", description="the Diffusion-DPO paper's loss, or the corrected one of docs/diffusion_dpo.md"
    )
    loss_type: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="loss of the difference of log-ratios")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="probability that a label is wrong")
    beta: float | None = Field(None, gt=0, le=LARGEST, description="price of one nat, as weighted by `weighting`")
    beta_dpo: float | None = Field(
        None, gt=0, le=LARGEST, description="Diffusion-DPO's beta (2000 to 5000), for mean squared errors"
    )
    weighting: Annotated[Weighting, other_words(share="snr_share")] = Field(
        "uniform", description="weights of the steps: exact, uniform (Diffusion-DPO's) or snr_share"
    )
    timestep_range: tuple[Weight, Weight] | None = Field(None, description=TIMESTEP_RANGE)
    steps_per_pair: int = Field(
        1, ge=1, le=MOST, description="steps sampled per pair per epoch, each with its own noise"
    )
    step_draw: StepDraw = Field(
        "uniform",
        description="how often a step is sampled: uniform, all alike; or logit_normal, most often in the middle",
    )
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="share of pairs trained on with the empty prompt")

    kl_coef: float | None = Field(
        None, ge=0, le=LARGEST, description="price of one nat of KL; 2 beta (corrected) or 0 when not given"
    )
    experimental: ExperimentalDiffusionDPO = Field(
        default_factory=ExperimentalDiffusionDPO, description="rarely used settings"
    )

    @property
    def online(self) -> bool:
        return self.pairs is None

    def cross_checks(self) -> Iterator[str]:
        yield from weight_checks(self.reward, self.reward_weights)
        if (self.beta is None) == (self.beta_dpo is None):
            yield "give either beta (per nat) or beta_dpo (Diffusion-DPO's, for mean squared errors)"
        if self.online and (self.prompts is None or self.reward is None):
            yield "give pairs, or prompts and a reward to sample and judge pairs online"
        if not self.online and self.prompts is not None:
            yield "give either pairs, or prompts to sample and judge pairs online, not both"
        if self.online:
            yield from multiple_checks(self, "group_size")
            if self.bucket_step is not None:
                yield "bucket_step is for given pairs, but images judged online all have one size: leave it out"
        rare = self.experimental
        if rare.target == "logged" and (not self.online or self.sampler.is_deterministic):
            yield (
                "experimental.target=logged needs the sampler's noisy steps: judge online and set "
                f"sampler.{self.sampler.noise_setting} above 0"
            )
        if rare.target == "logged" and self.caption_dropout:
            yield "experimental.target=logged trains on steps sampled with their prompt: leave caption_dropout out"
        yield from range_checks(self.timestep_range)
        if self.step_draw == "logit_normal" and self.stop_when.kl_above is not None:
            yield (
                "stop_when.kl_above needs the KL of every step, but step_draw=logit_normal hardly ever samples those "
                "next to the image, which carry much of it: set step_draw=uniform, or leave it out"
            )
        if self.variant == "corrected" and (self.loss_type != "sigmoid" or self.label_smoothing):
            yield "variant=corrected has a loss of its own: leave loss_type and label_smoothing out"
        if self.loss_type != "sigmoid" and self.label_smoothing:
            yield f"label_smoothing has no effect with loss_type={self.loss_type}: leave one of them out"
        if self.variant == "original" and (rare.reward_mode != "kl" or rare.old_refresh != "update"):
            yield (
                "experimental.reward_mode and experimental.old_refresh need variant=corrected: set it, or leave them "
                "out"
            )
