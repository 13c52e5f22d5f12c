"""Diffusion-DPO: a denoising policy learns from pairs of images, chosen (w) over rejected (l).

Both images of a pair are noised to one step t with one noise; what the step should give and what the policy's mean
misses of it is an error in nats, ``err = |x_s - mu|²/(2 std²)``, weighed by step (``step_scales``):

    original:   -log sigmoid(beta [(err_w_ref - err_w) - (err_l_ref - err_l)])      Wallace et al. 2023, [000] eq. 34
    corrected:  beta sg(sigmoid(r_l - r_w)) (err_w - err_l)                         [000] eq. 36
    + kl_coef * (KL_w + KL_l) / 2                                                   closed form, at both images

The corrected loss has no minimum of its own; its ``kl_coef`` is 2 beta unless given, and 0 is the letter of eq. 36.
With ``lora.dropout`` the two images of a pair share a mask: one policy sees both. So does r, unless it is kept from the
epoch's beginning, where the whole adapter gives it.
Pairs come from a dataset, or are sampled by the policy and judged by a reward in every epoch (online).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad

from diffusion_align.data.buckets import Size, bucket_line, nearest_bucket
from diffusion_align.data.image_pairs import PairSet
from diffusion_align.data.prompts import Prompt, items_of_epoch
from diffusion_align.diffusion.dpo_settings import DiffusionDPOConfig
from diffusion_align.diffusion.evaluation import ImageEvaluation
from diffusion_align.diffusion.latent_cache import LatentCache
from diffusion_align.diffusion.policy import Conditioning, DenoisingPolicy
from diffusion_align.diffusion.rollout import Trajectory, transition
from diffusion_align.diffusion.schedule import (
    DiffusionSchedule,
    SetTimesteps,
    training_schedule,
)
from diffusion_align.diffusion.step_draw import draw_steps, step_probabilities
from diffusion_align.diffusion.trained_steps import trained_steps
from diffusion_align.diffusion.trainer import DenoisingTrainer
from diffusion_align.diffusion.transitions import (
    GaussianTransition,
    add_noise,
    nats_per_squared_error,
    posterior,
    step_scales,
)
from diffusion_align.errors import ConfigError, TrainingError
from diffusion_align.estimators import (
    beta_in_nats,
    corrected_diffusion_dpo_loss,
    diffusion_dpo_loss,
    hinge_loss,
    ipo_loss,
)
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.config import multiple_checks
from diffusion_align.training.context import EpochCost, Lines, Metric
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.randomness import generator
from diffusion_align.training.statistics import agreement, equal_reward_metric


def stacked(latents: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Latents (..., C, H, W) along a new ``dim``; those of several shapes flat (..., D), with zeros at their end."""
    if len({one.shape for one in latents}) == 1:
        return torch.stack(list(latents), dim)
    flat = [one.flatten(-3) for one in latents]
    longest = max(one.shape[-1] for one in flat)
    return torch.stack([pad(one, (0, longest - one.shape[-1])) for one in flat], dim)


def beta_of(config: DiffusionDPOConfig, schedule: DiffusionSchedule, steps: Tensor, dimensions: int) -> float:
    """The price of one nat, for latents of ``dimensions`` numbers trained on at ``steps`` (S,)."""
    if config.beta is not None:
        return config.beta
    weight_sum = float(nats_per_squared_error(schedule)[steps].sum())
    return beta_in_nats(config.beta_dpo or 0.0, dimensions=dimensions, weight_sum=weight_sum)


@dataclass(frozen=True)
class SizeTerms:
    """What the size of latents decides: the schedule, which some models shift by it, and what a nat costs.

    Attributes:
        schedule: of the trained steps, on the device.
        scales: (T,) those of ``step_scales``, on the device.
        beta, kl_coef: per nat.
    """

    schedule: DiffusionSchedule
    scales: Tensor
    beta: float
    kl_coef: float


@dataclass(frozen=True)
class PairBatch:
    """An epoch's pairs of one process: B samples, K steps each, R images; on the device.

    Of sample i, image ``chosen[i]`` was preferred to ``rejected[i]``. Where the latents of the samples have several
    shapes, ``x_0``, ``noise`` and ``reference_mean`` hold them flat, as ``stacked`` does: (R, D), (n, B, K, D) and
    (2, B, K, D); ``of_shape`` has them in the shapes below.

    Attributes:
        steps: (B, K) int64.
        conditioning: of the B samples.
        keep: global indices of the samples to train on, on the CPU.
        x_0: (R, C, H, W).
        noise: (n, B, K, C, H, W), which makes x_t of x_0 and, for a sampled target, x_s.
        path: the sampler's own steps of the R images, where those are the target.
        reference_mean: (2, B, K, C, H, W), of chosen and rejected, where it is known beforehand.
        implicit_reward: (2, B, K), r of the policy at the beginning of the epoch, where that is used.
        shapes: (C, H, W) of each sample's latents, where there are several.
    """

    chosen: Tensor
    rejected: Tensor
    steps: Tensor
    conditioning: Conditioning
    keep: Tensor
    x_0: Tensor
    noise: Tensor | None = None
    path: Trajectory | None = None
    reference_mean: Tensor | None = None
    implicit_reward: Tensor | None = None
    shapes: Sequence[torch.Size] | None = None

    def of_shape(self, shape: torch.Size) -> PairBatch:
        """A view that is right for the samples of one shape."""

        def view(latents: Tensor | None) -> Any:
            return None if latents is None else latents[..., : shape.numel()].unflatten(-1, shape)

        x_0, noise, means = map(view, (self.x_0, self.noise, self.reference_mean))
        return replace(self, x_0=x_0, noise=noise, reference_mean=means, shapes=None)


@dataclass(frozen=True)
class PairTransitions:
    """n steps of the chosen images and then n of the rejected ones, (2n, ...), with the gradient in ``now``."""

    now: GaussianTransition
    reference: GaussianTransition
    target: GaussianTransition
    scale: Tensor

    @cached_property
    def error(self) -> Tensor:
        """(2n,) nats, times the step's scale."""
        return self.scale * self.target.kl(self.now)

    @cached_property
    def reference_error(self) -> Tensor:
        return self.scale * self.target.kl(self.reference)

    @cached_property
    def kl(self) -> Tensor:
        """(2n,) plain nats, of the policy to the reference."""
        return self.now.kl(self.reference)


class DiffusionDPOTrainer(DenoisingTrainer[PairBatch]):
    """Trains as ``DiffusionDPOConfig`` says.

    Args:
        pairs: checked pairs, unless they are sampled and judged online.
        reward: online the judge; with ``pairs`` optional.
        others: see ``DenoisingTrainer``.

    Raises:
        ConfigError: the settings leave no step to train on, or do not fit the number of processes.
    """

    config: DiffusionDPOConfig
    config_class = DiffusionDPOConfig
    headline = "rewards/accuracies"
    metrics = {  # noqa: RUF012
        "beta_nats": Metric("Beta", "per nat", "The price of one nat: beta, or beta_dpo converted for this model."),
        "weight": Metric(
            "Weight of a pair in the gradient",
            "mean weight",
            "How much the pairs still have to teach: near 0 the policy tells all of them apart already.",
        ),
    }
    keeps = ("latents", "prompts")

    def __init__(
        self,
        config: DiffusionDPOConfig,
        policy: DenoisingPolicy,
        *,
        pairs: PairSet | None = None,
        reward: Callable[..., Any] | None = None,
        prompts: list[Prompt] | None = None,
        evaluation: ImageEvaluation | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        known = prompts or [(text, {}) for text in (pairs.prompts if pairs else [])]
        super().__init__(config, policy, reward, known, accelerator, evaluation=evaluation, callbacks=callbacks)
        self.pairs = pairs
        if config.online:
            for problem in multiple_checks(config, "group_size", self.accelerator.num_processes):
                raise ConfigError([problem])
        self.probabilities = step_probabilities(config.step_draw, self.trained_steps, len(self.exact_schedule))
        self.importance = self._importance().to(self.accelerator.device, torch.float32)
        self.terms = functools.cache(self._terms)  # once for each size, as every loss asks for them
        own = self.terms(policy.latent_shape)
        self.beta, self.kl_coef = own.beta, own.kl_coef
        # Guidance belongs to the sampler's steps; the noising process, which the other targets undo, has none.
        as_sampled = config.experimental.target == "logged" or policy.family.guidance == "embedded"
        self.guidance_scale = config.sampler.guidance_scale if as_sampled else 1.0
        self.latents = None
        if pairs is not None:
            sizes = self._bucketed(pairs, config.bucket_step) if config.bucket_step else None
            dtype = getattr(torch, config.latent_cache_dtype)
            again = config.epochs * config.samples_per_epoch > len(pairs)
            captions = self.folder / "prompts" if config.prompts_on_disk and again else None
            self.latents = LatentCache(self.folder / "latents", pairs, policy, sizes, dtype=dtype, prompts=captions)

    def _terms(self, shape: tuple[int, ...]) -> SizeTerms:
        """Those of latents of ``shape`` (C, H, W)."""
        config, steps, device = self.config, self.trained_steps, self.accelerator.device
        setter = self.policy.timesteps_setter((shape[1], shape[2]))
        schedule = self.trained_schedule(config, self.policy.pipeline.scheduler, setter)
        beta = beta_of(config, schedule, steps, math.prod(shape))
        default_kl_coef = 2 * beta if config.variant == "corrected" else 0.0
        return SizeTerms(
            schedule=schedule.to(device),
            scales=step_scales(schedule, steps, config.weighting).to(device, torch.float32),
            beta=beta,
            kl_coef=default_kl_coef if config.kl_coef is None else config.kl_coef,
        )

    def _importance(self) -> Tensor:
        """(T,) float64: even a step's probability over that of its draw, for metrics of all trained steps alike."""
        importance = torch.ones(len(self.exact_schedule), dtype=torch.float64)
        if self.config.step_draw != "uniform":
            importance[self.trained_steps] = 1 / (len(self.trained_steps) * self.probabilities)
        return importance

    @classmethod
    def trained_schedule(
        cls, config: Any, scheduler: Any, set_timesteps: SetTimesteps | None = None
    ) -> DiffusionSchedule:
        logged = config.experimental.target == "logged"
        build = super().trained_schedule
        return build(config, scheduler, set_timesteps) if logged else training_schedule(scheduler, set_timesteps)

    @classmethod
    def steps_trained_on(cls, config: Any, schedule: DiffusionSchedule) -> Tensor:
        steps = trained_steps(schedule, config.timestep_range)
        if len(steps) < config.steps_per_pair:
            within = list(config.timestep_range or (0.0, 1.0))
            left = f"timestep_range={within} leaves {len(steps)} of the steps to train on"
            each = f"steps_per_pair={config.steps_per_pair}"
            raise ConfigError([f"{left}, fewer than {each}: use a wider range"])
        return steps

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        sampled = super().epoch_cost(config, steps)
        online, logged = config.online, config.experimental.target == "logged"
        pairs = config.samples_per_epoch // (config.group_size if online else 1)
        actions = pairs * config.steps_per_pair
        width = 2 * (sampled.width if logged else 1)
        # Where the reference is called once for all inner epochs, so is the policy as it is at the epoch's beginning.
        looks = 2 if config.inner_epochs > 1 or config.experimental.old_refresh == "epoch" else 1
        judged = f"{pairs}, the best and the worst of {config.group_size} images each"
        source = "" if config.pairs is None else config.pairs.source
        return EpochCost(
            what=("pairs per epoch", judged if online else f"{pairs} from {source}"),
            units=pairs,
            actions=actions,
            sampling=sampled.sampling if online else 0,
            trained=width * actions * config.inner_epochs,
            reference=width * actions * looks,
            decoded=sampled.decoded if online else 0,
            width=width,
            # x_t and x_s of all that were judged; or the noise of an action, and the two images of a pair.
            recorded=2 * actions * config.group_size if logged else actions + 2 * config.samples_per_epoch,
        )

    @classmethod
    def in_nats(cls, config: Any, schedule: DiffusionSchedule | None, steps: Tensor | None, dimensions: int) -> Lines:
        lines = super().in_nats(config, schedule, steps, dimensions)
        if config.beta is not None:
            return [*lines, ("beta in nats", f"{config.beta:.3g}")]
        if config.beta_dpo is None or schedule is None or steps is None or len(steps) == 0:
            return lines
        beta = beta_of(config, schedule, steps, dimensions)
        return [
            *lines,
            ("beta in nats", f"{beta:.3g}, which beta_dpo={config.beta_dpo:g} is at this resolution and schedule"),
        ]

    def collect(self) -> tuple[PairBatch, dict[str, float]]:
        """This process's pairs of the epoch: read, or sampled and judged; then a step and a noise for each action."""
        return self._judged() if self.latents is None else self._given(self.latents)

    def estimate(self, batch: PairBatch) -> tuple[PairBatch, TrainingPlan, dict[str, float]]:
        """The reference's means where they are used more than once, and the reward of the policy as it is now."""
        if self.config.inner_epochs > 1 or self.config.experimental.old_refresh == "epoch":
            batch = self._with_reference_means(batch)
        return batch, TrainingPlan(batch.keep, batch.steps.shape[1]), {"beta_nats": self.beta}

    def loss(self, batch: PairBatch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the module docstring."""
        config = self.config
        terms = self.terms(batch.x_0.shape[1:])
        beta, kl_coef = terms.beta, terms.kl_coef
        seen = self._transitions(batch, samples, actions)
        (err_w, err_l), (ref_w, ref_l), kl = seen.error.chunk(2), seen.reference_error.chunk(2), seen.kl
        gain_w, gain_l = (ref_w - err_w).detach(), (ref_l - err_l).detach()
        rare = config.experimental
        if rare.loser_clip is not None:
            err_l = err_l.minimum(ref_l + rare.loser_clip)
        err_l, loser_ref = rare.loser_weight * err_l, rare.loser_weight * ref_l
        statistics = {}
        if config.variant == "corrected":
            if batch.implicit_reward is not None:
                r_w, r_l = batch.implicit_reward[:, samples, actions]
            else:
                r_w, r_l = self._implicit_reward(seen).chunk(2)
            losses = corrected_diffusion_dpo_loss(err_w, err_l, r_w, r_l, beta)
            statistics["weight"] = torch.sigmoid(beta * (r_l - r_w))
        elif config.loss_type == "sigmoid":
            losses = diffusion_dpo_loss(err_w, ref_w, err_l, loser_ref, beta, label_smoothing=config.label_smoothing)
            statistics["weight"] = torch.sigmoid(beta * (gain_l - gain_w))
        else:
            loss = {"ipo": ipo_loss, "hinge": hinge_loss}[config.loss_type]
            losses = loss(ref_w - err_w, loser_ref - err_l, beta)
        margin = beta * (gain_w - gain_l)
        kl_w, kl_l = kl.detach().chunk(2)
        kl_mean = (kl_w + kl_l) / 2 * self.importance[batch.steps[samples, actions]]
        statistics |= {
            "loss/preference": losses.detach(),
            "rewards/accuracies": agreement(margin),
            "rewards/margins": margin,
            "rewards/chosen": beta * gain_w,
            "rewards/rejected": beta * gain_l,
            "error/winner": -gain_w,
            "error/loser": -gain_l,
            "error/reference": ref_w,
            "kl/winner": kl_w,
            "kl/loser": kl_l,
            "kl": kl_mean,
            "kl_path": kl_mean * len(self.trained_steps),
            "kl_path_stderr": kl_mean * len(self.trained_steps),
        }
        if kl_coef > 0:
            losses = losses + kl_coef * (seen.scale * kl).view(2, -1).mean(0)
        return losses, statistics

    def micro_batches(self, batch: PairBatch, indices: Tensor) -> Iterator[tuple[PairBatch, Tensor]]:
        """Each of latents of one shape."""
        if batch.shapes is None:
            yield from super().micro_batches(batch, indices)
            return
        for shape in sorted(set(batch.shapes)):
            of_shape = torch.tensor([one == shape for one in batch.shapes])
            yield from super().micro_batches(batch.of_shape(shape), indices[of_shape[indices[:, 0]]])

    def check_update(self, statistics: Mapping[str, float], *, first: bool) -> dict[str, float]:
        """The divergence guard: the chosen images must not become much less likely than they were."""
        ratio = 1 + statistics["error/winner"] / statistics["error/reference"]
        most = self.config.experimental.max_winner_error
        if ratio > most:
            remedy = "raise kl_coef (2 beta or more)" if self.config.variant == "corrected" else "lower learning_rate"
            raise TrainingError(
                f"the policy diverges: its error on the chosen images is {ratio:.3g} times the reference's, beyond "
                f"experimental.max_winner_error={most:g}, so it unlearns what is preferred: {remedy}"
            )
        return {"error/winner_ratio": ratio}

    def data_lines(self) -> Sequence[str]:
        return () if self.latents is None or not self.config.bucket_step else (bucket_line(self.latents.sizes),)

    def loss_coefficients(self) -> dict[str, float]:
        config = self.config
        beta = {"beta": config.beta} if config.beta is not None else {"beta_dpo": config.beta_dpo or 0.0}
        return {"kl_coef": self.kl_coef, "loser_weight": config.experimental.loser_weight, **beta}

    # -- where pairs come from -------------------------------------------------------------------------------------

    def _bucketed(self, pairs: PairSet, step: int) -> list[Size]:
        """The bucket of each pair."""
        pipeline, (height, width) = self.policy.pipeline, self.policy.image_size
        network, vae = self.policy.network.config, pipeline.vae.config
        buckets = self.policy.family.buckets(network, vae, step, height=height, width=width)
        sizes = [pairs.size(i) for i in range(len(pairs))]
        nearest = {size: nearest_bucket(size, buckets) for size in set(sizes)}
        return [nearest[size] for size in sizes]

    def _given(self, latents: LatentCache) -> tuple[PairBatch, dict[str, float]]:
        """This process's part of the epoch's pairs, in a new random order each time all have been seen; metrics."""
        config = self.config
        latents.fill(self.identity, batch_size=config.sample_batch_size, processes=self.processes, bars=self.bars)
        pairs = latents.pairs
        epoch = items_of_epoch(range(len(pairs)), config.seed, self.epoch, config.samples_per_epoch)
        own = [epoch[i] for i in self.local_samples]
        rows = torch.arange(2 * len(own), device=self.processes.device)
        chosen, rejected = latents.read(own)
        shapes = [one.shape for one in chosen]
        batch = PairBatch(
            chosen=rows[: len(own)],
            rejected=rows[len(own) :],
            steps=torch.stack([self._sampled_steps(i) for i in self.local_samples]).to(rows.device),
            conditioning=latents.conditioning(own, self._captions([pairs.prompts[i] for i in own])),
            keep=torch.arange(config.samples_per_epoch),
            x_0=stacked(chosen + rejected).to(rows.device),
            noise=self._noise(shapes),
            shapes=shapes if len(set(shapes)) > 1 else None,
        )
        return batch, {
            "data_epochs": (self.epoch + 1) * config.samples_per_epoch / len(pairs),
            "pairs": len(pairs),
            "pairs_tied": pairs.ties,
            "pairs_skipped": len(pairs.skipped),
        }

    def _judged(self) -> tuple[PairBatch, dict[str, float]]:
        """Sample images of every prompt and keep the best and the worst; prompts whose images tie are left out."""
        config, own, device = self.config, self.local_samples, self.processes.device
        groups = config.samples_per_epoch // config.group_size
        logged = config.experimental.target == "logged"
        nothing = torch.empty(0, dtype=torch.int64)
        collected = self.sample(
            group_size=config.group_size,
            record=lambda i: self._sampled_steps(i // config.group_size) if logged else nothing,
        )
        path, scores = collected.trajectory, collected.rewards.view(groups, config.group_size)
        first = torch.arange(groups) * config.group_size
        best, worst = first + scores.argmax(1), first + scores.argmin(1)
        gaps = scores.amax(1) - scores.amin(1)
        rejected_of = torch.zeros(config.samples_per_epoch, dtype=torch.int64)
        rejected_of[best] = worst
        texts = [collected.samples[i][0] for i in own]
        batch = PairBatch(
            chosen=torch.arange(len(own), device=device),
            rejected=self.local(rejected_of) - own.start,
            steps=torch.stack([self._sampled_steps(i // config.group_size) for i in own]).to(device),
            conditioning=self.policy.encode(self._captions(texts)) if config.caption_dropout else path.conditioning,
            keep=best[gaps > 0],
            x_0=path.latents,
            noise=None if logged else self._noise([path.latents[0].shape] * len(own)),
            path=path if logged else None,
        )
        equal = equal_reward_metric(collected.rewards, config.group_size)
        return batch, collected.metrics | equal | {"reward_gap": gaps.mean().item()}

    def _sampled_steps(self, sample: int) -> Tensor:
        """(K,) one step at random from each of K equally likely parts of the trained ones."""
        config, stream = self.config, generator(self.config.seed, "timesteps", self.epoch, sample)
        places = torch.rand(config.steps_per_pair, generator=stream)
        return draw_steps(self.trained_steps, config.step_draw, self.probabilities, places)

    def _noise(self, shapes: Sequence[torch.Size]) -> Tensor:
        """(n, B, K, C, H, W), shared by the two images of a pair; n = 2 where x_s is sampled as well."""
        config = self.config
        each = 2 if config.experimental.target == "posterior_sample" else 1, config.steps_per_pair
        streams = [generator(config.seed, "pair noise", self.epoch, i) for i in self.local_samples]
        noises = [torch.randn((*each, *shape), generator=s) for shape, s in zip(shapes, streams, strict=True)]
        return stacked(noises, dim=1).to(self.processes.device)

    def _captions(self, texts: Sequence[str]) -> list[str]:
        """``texts``, of which some are dropped; one for both images of a pair, so that it is dropped from both.

        A dropped caption is no prompt, as in pre-training, and not the negative prompt: that is a text which chosen
        images would be trained to follow, while guidance leads away from it.
        """
        share, seed = self.config.caption_dropout, self.config.seed
        if not share:
            return list(texts)
        streams = [generator(seed, "caption dropout", self.epoch, i) for i in self.local_samples]
        dropped = [bool(torch.rand((), generator=stream) < share) for stream in streams]
        return ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]

    # -- transitions -----------------------------------------------------------------------------------------------

    def _transitions(self, batch: PairBatch, samples: Tensor, actions: Tensor) -> PairTransitions:
        """One forward pass of 2n images for the policy and, unless it is known, one for the reference."""
        images = torch.cat([batch.chosen[samples], batch.rejected[samples]])
        side = torch.arange(2, device=samples.device).repeat_interleave(len(samples))
        samples, actions = samples.repeat(2), actions.repeat(2)
        steps, terms = batch.steps[samples, actions], self.terms(batch.x_0.shape[1:])
        x_t, target = self._states(batch, images, samples, actions, terms.schedule)
        conditioning = {name: value[samples] for name, value in batch.conditioning.items()}

        def step() -> GaussianTransition:
            return transition(self.policy, terms.schedule, x_t, steps, conditioning, guidance_scale=self.guidance_scale)

        if batch.reference_mean is None:
            with torch.no_grad(), self.policy.reference():
                reference = step()
        else:
            reference = GaussianTransition(batch.reference_mean[side, samples, actions], target.std)
        return PairTransitions(step(), reference, target, terms.scales[steps])

    def _states(
        self, batch: PairBatch, images: Tensor, samples: Tensor, actions: Tensor, schedule: DiffusionSchedule
    ) -> tuple[Tensor, GaussianTransition]:
        """x_t, and the step from there that the policy is measured against."""
        steps = batch.steps[samples, actions]
        std = schedule.at(steps).std.flatten()
        if batch.path is not None:
            return batch.path.x_t[images, actions], GaussianTransition(batch.path.x_s[images, actions], std)
        assert batch.noise is not None
        x_0, eps = batch.x_0[images], batch.noise[0, samples, actions]
        x_t = add_noise(x_0, eps, steps, schedule)
        target = posterior(x_t, x_0, eps, steps, schedule)
        if self.config.experimental.target == "posterior_sample":
            target = GaussianTransition(target.sample(batch.noise[1, samples, actions]), std)
        return x_t, target

    def _implicit_reward(self, seen: PairTransitions) -> Tensor:
        """r of the corrected loss, (2n,) nats times the step's scale, without beta."""
        mode = self.config.experimental.reward_mode
        if mode == "kl":
            return seen.scale * seen.kl.detach()
        gain = (seen.reference_error - seen.error).detach()
        return gain if mode == "logratio" else seen.scale * seen.kl.detach() * gain.sign()

    @torch.no_grad()
    def _with_reference_means(self, batch: PairBatch) -> PairBatch:
        """With the reference's means, and r of the policy at the epoch's beginning, of every action trained on."""
        own = self.local_samples
        kept = batch.keep[(batch.keep >= own.start) & (batch.keep < own.stop)] - own.start
        shape = (2, *batch.steps.shape)
        means = batch.x_0.new_zeros(*shape, *batch.x_0.shape[1:])
        rewards = batch.x_0.new_zeros(shape)
        pairs = torch.cartesian_prod(kept, torch.arange(shape[2]))
        known = replace(batch, reference_mean=means)
        for part, micro_batch in self.micro_batches(known, pairs):
            samples, actions = micro_batch.to(means.device).unbind(1)
            seen = self._transitions(replace(part, reference_mean=None), samples, actions)
            assert part.reference_mean is not None  # a view of ``means``
            part.reference_mean[:, samples, actions] = seen.reference.mean.unflatten(0, (2, -1))
            rewards[:, samples, actions] = self._implicit_reward(seen).view(2, -1)
        return replace(known, implicit_reward=rewards if self.config.experimental.old_refresh == "epoch" else None)
