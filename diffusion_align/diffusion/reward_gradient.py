"""Training by a reward's own gradient, through the decoder and the last steps of the sampler.

Loss of one image, with the graph of its last passes and its KL to the reference in nats (``tail_kl``):

    -R(decode(x_0)) + kl_coef * KL

- draft: DRaFT-K, through the last K steps; K = 1 may be averaged over several noises, DRaFT-LV (Clark et al. 2023,
  arXiv:2309.17400).
- align_prop: AlignProp, through a random number of steps (Prabhudesai et al. 2023, arXiv:2310.03739).
- refl: ReFL, by the x_0 that one random late step predicts (Xu et al. 2023, arXiv:2304.05977).

Every update samples its own images by the weights as they are, so that there is no ratio and nothing is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_align.data.prompts import Prompt, items_of_epoch
from diffusion_align.diffusion.policy import Conditioning
from diffusion_align.diffusion.reward_gradient_settings import INERT, RewardGradientConfig
from diffusion_align.diffusion.schedule import DiffusionSchedule, select_step_range, training_schedule
from diffusion_align.diffusion.tail import Tail, predict_tail, renoise, sample_head, sample_tail, tail_kl
from diffusion_align.diffusion.trainer import DenoisingTrainer
from diffusion_align.diffusion.transitions import nats_of_intervals
from diffusion_align.errors import ConfigError, RewardError
from diffusion_align.interrupt import Overdue
from diffusion_align.models.memory import checkpoint_activations
from diffusion_align.rewards.base import call_reward, part_weights, reward_parts
from diffusion_align.training.collection import reward_metrics
from diffusion_align.training.context import EpochCost, Lines, Metric
from diffusion_align.training.finite import all_finite
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.randomness import generator
from diffusion_align.training.statistics import UpdateStatistics

Batch = Sequence[Prompt]
"""The prompts of all of an epoch's images, in their global order."""


class RewardGradientTrainer(DenoisingTrainer[Batch]):
    """Trains as ``RewardGradientConfig`` says; see ``DenoisingTrainer`` for the arguments.

    Attributes:
        trained_steps: (S,) those of ``schedule`` that the gradient goes through or, where that is random, begins at.
    """

    config: RewardGradientConfig
    config_class = RewardGradientConfig
    updates_stand_alone = True
    metrics: ClassVar[Mapping[str, Metric]] = {
        "kl": Metric(
            "KL to the reference, per step",
            "nats per step",
            "How far the policy is from the reference at a step that has a gradient.",
        ),
        "kl_path": Metric(
            "KL to the reference, all steps with a gradient",
            "nats over the steps with a gradient",
            "The same, summed over an image's steps that have a gradient; those before them are not counted.",
        ),
    }

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        scheduler, setter = self.policy.pipeline.scheduler, self.policy.timesteps_setter()
        nats = nats_of_intervals(self.exact_schedule, training_schedule(scheduler, setter))
        self._nats = nats.to(self.accelerator.device, torch.float32)
        # Of the epoch's finished updates, of all processes: global samples, scores by each reward.
        self._scored: list[tuple[Tensor, Tensor]] = []
        self._scoring: list[tuple[Tensor, Tensor]] = []  # of this process in the update under way
        if self.config.gradient_checkpointing:
            checkpoint_activations(self.policy.pipeline.vae)

    @classmethod
    def steps_trained_on(cls, config: Any, schedule: DiffusionSchedule) -> Tensor:
        """ConfigError where the gradient would begin next to the image, where a step changes nothing."""
        sigmas, every = schedule.table.sigma_t.double().cpu(), torch.arange(len(schedule))
        if config.variant == "refl":
            late = select_step_range(every, config.late_range)
            return _not_inert(late, sigmas, f"late_range={list(config.late_range)}")
        if config.variant == "align_prop":
            last = every[-config.last_steps :] if config.last_steps else every
            return _not_inert(last, sigmas, f"last_steps={config.last_steps}")
        noisy = every[sigmas >= config.from_sigma]
        if config.last_steps is None and not len(noisy):
            raise ConfigError([f"from_sigma={config.from_sigma:g} is above every step's noise level: lower it"])
        first = int(noisy[-1]) if config.last_steps is None else max(0, len(every) - config.last_steps)
        name = "from_sigma" if config.last_steps is None else "last_steps"
        _not_inert(every[first : first + 1], sigmas, f"{name}={getattr(config, name):g}")
        if config.low_variance and first < len(every) - 1:
            raise ConfigError(
                [
                    f"low_variance={config.low_variance} is for a gradient through one step, and {name}="
                    f"{getattr(config, name):g} is {len(every) - first}: set last_steps=1, or leave low_variance out"
                ]
            )
        return every[first:]

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        every, count = config.sampler.steps, config.last_steps or 1
        starts = torch.arange(max(0, every - count), every) if steps is None else steps
        starts = (starts if config.variant != "draft" else starts[:1]).double()
        passes = 1.0 if config.variant == "refl" else every - float(starts.mean()) + config.low_variance
        at_once = 1 if config.variant == "refl" else every - int(starts.min()) + config.low_variance
        again = config.kl_coef > 0 and config.variant != "refl" and not config.low_variance
        images, guided = config.samples_per_epoch, config.sampler.passes
        trained = guided * images * (2 * passes - 1 if again else passes)
        return replace(
            super().epoch_cost(config, steps),
            actions=images,
            sampling=round(guided * images * float(starts.mean())),
            trained=round(trained),
            reference=round(guided * images * passes) if config.has_reference else 0,
            decoded=0,
            differentiated=images * (1 + config.low_variance),
            graphs=2 * at_once - 1 if again else at_once,
            recorded=0,
        )

    @classmethod
    def in_nats(cls, config: Any, schedule: DiffusionSchedule | None, steps: Tensor | None, dimensions: int) -> Lines:
        if schedule is None or steps is None:
            return []
        first, last = (f"sigma {schedule.table.sigma_t[step]:.3g}" for step in steps[[0, -1]].tolist())
        count = len(schedule) - int(steps[0])
        name = f"the last {'step' if count == 1 else f'{count} steps'} of {len(schedule)}, from {first}"
        one = {
            "draft": name,
            "align_prop": f"a random number of steps, at most {name}; at least from {last}",
            "refl": f"one step, from which the image is predicted, between {first} and {last}",
        }
        return [("gradient goes through", one[config.variant])]

    @staticmethod
    def outweighing_step(config: Any, schedule: DiffusionSchedule | None, steps: Tensor | None) -> str | None:
        return None  # nothing is weighed against another step

    def measure_first(self) -> dict[str, float]:
        """See ``TrainingMethod``; the gradient of every reward at an image of the model is checked before."""
        self._probe()
        return super().measure_first()

    def collect(self) -> tuple[Batch, dict[str, float]]:
        """The epoch's prompts; its images are sampled in the updates."""
        return items_of_epoch(self.prompts, self.config.seed, self.epoch, self.config.samples_per_epoch), {}

    def estimate(self, collected: Batch) -> tuple[Batch, TrainingPlan, dict[str, float]]:
        return collected, TrainingPlan(torch.arange(len(collected))), {}

    def accumulate(
        self, batch: Batch, indices: Tensor, normalizer: float, on_actions: Callable[[int], object] = lambda count: None
    ) -> UpdateStatistics:
        """See ``Trainer.accumulate``; what fails on one process, a reward for example, ends all of them."""
        failure: BaseException | None = None
        statistics, self._scoring = UpdateStatistics(), []
        try:
            statistics = super().accumulate(batch, indices, normalizer, on_actions)
        except (Exception, Overdue) as error:  # the other processes wait
            failure = error
        self.processes.raise_together(failure, RewardError)
        self._scored += self.processes.gather_in_order(self._scoring)
        return statistics

    def loss(self, batch: Batch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the module docstring; a reward's images are those that are sampled, before they are rounded to 8 bits."""
        config, numbers = self.config, samples.cpu() + self.local_samples.start
        texts, metadata = zip(*(batch[i] for i in numbers), strict=True)
        streams = [generator(config.seed, "noise", self.epoch, i) for i in numbers.tolist()]
        conditioning = self.policy.encode(texts)
        tails = self._tails(conditioning, streams)
        scores = torch.stack([self._scores(tail.latents, texts, metadata) for tail in tails])
        self._scoring.append((numbers, scores[0].detach()))
        weights = part_weights(self.reward).to(scores)  # type: ignore[arg-type]
        losses = -(scores.mean(dim=0) * weights).sum(dim=1).to(samples.device)
        if not self.policy.has_reference:
            return losses, {}
        with torch.set_grad_enabled(config.kl_coef > 0):
            kl = self._kl(tails, conditioning)
        if config.kl_coef > 0:
            losses = losses + config.kl_coef * kl
        path, count = kl.detach(), len(self.trained_steps if config.variant == "refl" else tails[0].visits)
        found = {"kl": path / count, "kl_path": path}
        # A random step is one and the same for all images of an update, which then do not tell the error.
        return losses, found | ({"kl_path_stderr": path} if config.variant == "draft" else {})

    def after_updates(self) -> dict[str, float]:
        """The rewards of the epoch's images, each by the weights that sampled it."""
        order, scores = map(torch.cat, zip(*self._scored, strict=True))
        scores, self._scored = scores[order.argsort()], []
        parts = reward_parts(self.reward)  # type: ignore[arg-type]
        found = reward_metrics((scores * part_weights(self.reward).to(scores)).sum(dim=1))  # type: ignore[arg-type]
        if len(parts) > 1:
            found |= {f"rewards/{name}/mean": c.mean().item() for name, c in zip(parts, scores.unbind(1))}
        return found

    def loss_coefficients(self) -> dict[str, float]:
        return {"kl_coef": self.config.kl_coef}

    def extra_state(self) -> dict[str, Any]:
        scored = [(order.tolist(), scores.tolist(), str(scores.dtype)) for order, scores in self._scored]
        return super().extra_state() | {"scored": scored}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        dtypes = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}
        given = state.get("scored", [])
        self._scored = [(torch.tensor(order), torch.tensor(s, dtype=dtypes[kind])) for order, s, kind in given]

    def _tails(self, conditioning: Conditioning, streams: Sequence[torch.Generator]) -> list[Tail]:
        """The sampled images' latents; of DRaFT-LV also those of the last step taken again."""
        config, given = self.config, (self.policy, self.schedule)
        first = self._first_step()
        if config.variant == "refl":
            return [predict_tail(*given, conditioning, streams, first)]
        sampled = sample_tail(*given, conditioning, streams, first)
        again = (renoise(*given, sampled.latents, conditioning, streams) for _ in range(config.low_variance))
        return [sampled, *again]

    def _first_step(self) -> int:
        """Where the gradient of this update begins: the same for all its images, on every process."""
        if self.config.variant == "draft":
            return int(self.trained_steps[0])
        stream = generator(self.config.seed, "tail", self.step)
        return int(self.trained_steps[torch.randint(len(self.trained_steps), (), generator=stream)])

    def _kl(self, tails: Sequence[Tail], conditioning: Conditioning) -> Tensor:
        """(B,) nats, the mean over ``tails``: of ReFL as if the steps it draws from were all looked at."""
        found = [tail_kl(self.policy, self.schedule, tail, conditioning, self._nats) for tail in tails]
        kl = torch.stack(found).mean(dim=0)
        return kl * len(self.trained_steps) if self.config.variant == "refl" else kl

    def _scores(self, latents: Tensor, texts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """(B, K) on the CPU, by each of K rewards, with their graph."""
        images = self.policy.decode(latents, grad=True)
        parts = reward_parts(self.reward).values()  # type: ignore[arg-type]
        return torch.stack([call_reward(one, images, texts, metadata, differentiable=True) for one in parts], dim=1)

    def _probe(self) -> None:
        """Check the gradient of each reward at the latents of an image of the model.

        Raises:
            RewardError: it gives none, or one that is 0 or not finite; on every process, if on any.
        """
        failure: BaseException | None = None
        try:
            self._check_gradients()
        except (Exception, Overdue) as error:  # the other processes wait
            failure = error
        self.processes.raise_together(failure, RewardError)

    def _check_gradients(self) -> None:
        text, metadata = self.prompts[0]
        streams = [generator(self.config.seed, "probe")]
        given = self.policy, self.schedule, self.policy.encode([text]), streams
        latents = sample_head(*given, len(self.schedule)).requires_grad_()
        images = self.policy.decode(latents, grad=True)
        for name, part in reward_parts(self.reward).items():  # type: ignore[arg-type]
            score = call_reward(part, images, [text], [metadata], differentiable=True)
            (gradient,) = self.optimization.gradients(score.sum(), [latents], retain_graph=True)
            finite = all_finite(gradient)[0]
            if not finite or not bool(gradient.any()):
                what = "0 everywhere" if finite else "not finite"
                raise RewardError(
                    f"the gradient of reward '{name}' at an image of the model is {what}: choose another reward, or "
                    "train it with DDPO"
                )


def _not_inert(steps: Tensor, sigmas: Tensor, setting: str) -> Tensor:
    """Those of ``steps`` at which a gradient may begin; ConfigError if there is none."""
    found = steps[sigmas[steps] >= INERT]
    if len(found):
        return found
    level = f"; its step begins at sigma {sigmas[steps].max():.3g}" if len(steps) else ""
    raise ConfigError(
        [
            f"{setting} leaves no step that begins at sigma {INERT:g} or above, below which nothing changes "
            f"that one can see{level}: let the gradient go further"
        ]
    )
