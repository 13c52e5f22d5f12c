"""The Gaussian step of a denoising policy: the only place where a mean and a std are made.

The sampler takes its steps from a ``GaussianTransition``, the ratio scores with it and the KL compares two of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from diffusion_align.diffusion.sampler_settings import Weighting
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.step import Step
from diffusion_align.estimators import gaussian_kl, gaussian_log_prob
from diffusion_align.estimators.masked import at_least_float32

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class GaussianTransition:
    """p(x_s | x_t) = N(mean, std^2 I); ``mean`` (B, C, H, W), ``std`` (B,), float32 or wider."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """x_s (B, C, H, W) for standard normal ``noise`` of that shape; where std = 0 it is the mean."""
        return self.mean + self.std.view(-1, 1, 1, 1) * noise

    def log_prob(self, x_s: Tensor, *, reduction: Reduction = "sum") -> Tensor:
        """Log-density of ``x_s`` (B,) in nats ("sum") or nats per dimension ("mean"); needs std > 0."""
        return gaussian_log_prob(x_s, self.mean, self.std, reduction=reduction)

    def kl(self, other: GaussianTransition, *, reduction: Reduction = "sum") -> Tensor:
        """KL(self || other) (B,), closed form, in nats ("sum") or nats per dimension ("mean"); needs std > 0."""
        return gaussian_kl(self.mean, other.mean, self.std, other.std, reduction=reduction)

    def detach(self) -> GaussianTransition:
        return GaussianTransition(self.mean.detach(), self.std)


def predicted_x_0_and_eps(x_t: Tensor, prediction: Tensor, step: Step, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise that ``prediction`` stands for, from ``x_t = alpha_t x_0 + sigma_t eps``.

    Args:
        x_t: (B, C, H, W).
        prediction: (B, C, H, W), the (guided) network output; the only input with a gradient.
        step: coefficients of each sample's step.
        prediction_type: "epsilon", "v_prediction" (v = alpha_t eps - sigma_t x_0), "sample", or "flow"
            (v = eps - x_0, where alpha_t + sigma_t = 1).
    """
    if prediction_type == "epsilon":
        return (x_t - step.sigma_t * prediction) / step.alpha_t, prediction
    if prediction_type == "v_prediction":
        return step.alpha_t * x_t - step.sigma_t * prediction, step.alpha_t * prediction + step.sigma_t * x_t
    if prediction_type == "flow":
        return x_t - step.sigma_t * prediction, x_t + step.alpha_t * prediction
    return prediction, (x_t - step.alpha_t * prediction) / step.sigma_t


def network_target(x_0: Tensor, eps: Tensor, step: Step, prediction_type: str) -> Tensor:
    """The output (B, C, H, W) that stands for this clean latent and noise, see ``predicted_x_0_and_eps``."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return step.alpha_t * eps - step.sigma_t * x_0
    return eps - x_0 if prediction_type == "flow" else x_0


def denoise(x_t: Tensor, prediction: Tensor, index: Tensor, schedule: DiffusionSchedule) -> GaussianTransition:
    """p(x_s | x_t) of the sampler that ``schedule`` describes; a pure function, used by sampling and by replay.

    A clipped x_0 leaves eps as predicted, as diffusers does.

    Args:
        x_t: (B, C, H, W).
        prediction: (B, C, H, W), the (guided) network output.
        index: (B,) int64, the step of each sample.
        schedule: on the device of ``x_t``.

    Raises:
        ValueError: shapes differ.
    """
    x_0, eps = clean_and_noise(x_t, prediction, index, schedule)
    return posterior(at_least_float32(x_t), x_0, eps, index, schedule)


def clean_and_noise(
    x_t: Tensor, prediction: Tensor, index: Tensor, schedule: DiffusionSchedule
) -> tuple[Tensor, Tensor]:
    """x_0 as the sampler takes it, clipped where it clips, and eps as predicted; (B, C, H, W), float32 or wider.

    Args, Raises: as of ``denoise``.
    """
    if x_t.shape != prediction.shape or index.shape != x_t.shape[:1]:
        raise ValueError(
            f"x_t {tuple(x_t.shape)} and prediction {tuple(prediction.shape)} must have one shape (B, C, H, W) and "
            f"index {tuple(index.shape)} must be (B,)"
        )
    x_t, prediction = at_least_float32(x_t), at_least_float32(prediction)
    x_0, eps = predicted_x_0_and_eps(x_t, prediction, schedule.at(index), schedule.prediction_type)
    if schedule.clip_range is not None:
        x_0 = x_0.clamp(-schedule.clip_range, schedule.clip_range)
    return x_0, eps


def posterior(x_t: Tensor, x_0: Tensor, eps: Tensor, index: Tensor, schedule: DiffusionSchedule) -> GaussianTransition:
    """The step of a sampler that knows the clean latent and the noise of ``x_t``: ``a x_0 + b eps + c x_t``, and std.

    DDPM's is q(x_s | x_t, x_0), the exact posterior of the noising process (arXiv:2006.11239, eq. 7). All are
    (B, C, H, W), ``index`` (B,).
    """
    step = schedule.at(index)
    values = {"x_0_weight": x_0, "eps_weight": eps, "x_t_weight": x_t}
    mean = reduce(torch.add, [getattr(step, name) * values[name] for name in schedule.terms])
    return GaussianTransition(mean, step.std.flatten())


def add_noise(x_0: Tensor, eps: Tensor, index: Tensor, schedule: DiffusionSchedule) -> Tensor:
    """``x_t = alpha_t x_0 + sigma_t eps``, (B, C, H, W), at the beginning of step ``index`` (B,)."""
    step = schedule.at(index)
    return step.alpha_t * x_0 + step.sigma_t * eps


def nats_per_squared_error(schedule: DiffusionSchedule) -> Tensor:
    """(T,) float64: what a squared error of 1 in the network's output costs in nats, ``c²/(2 std²)``; inf for std = 0.

    c is the derivative of a step's mean in the output, which is affine in it (a clipped x_0 is not; the clip is not
    counted here).
    """
    one = torch.ones(len(schedule), 1, 1, 1, dtype=torch.float64)
    index = torch.arange(len(schedule))
    plain = replace(schedule.to("cpu", torch.float64), clip_range=None)
    at_one, at_zero = (denoise(0 * one, output, index, plain) for output in (one, 0 * one))
    return ((at_one.mean - at_zero.mean).flatten() ** 2) / (2 * at_zero.std**2)


def x_0_per_output(schedule: DiffusionSchedule) -> Tensor:
    """(T,) float64: by how much x_0 changes for a change of 1 in the network's output; a clip is not counted."""
    one, index = torch.ones(len(schedule), 1, 1, 1, dtype=torch.float64), torch.arange(len(schedule))
    plain = replace(schedule.to("cpu", torch.float64), clip_range=None)
    at_one, at_zero = (clean_and_noise(0 * one, output, index, plain)[0] for output in (one, 0 * one))
    return (at_one - at_zero).flatten()


def nats_of_intervals(schedule: DiffusionSchedule, training: DiffusionSchedule) -> Tensor:
    """(T,) float64: what a squared error of 1 in the network's output costs in nats over each step of any sampler.

    A sampler without noise has no density, and the last step of every sampler has none. So the error is counted where
    the model was trained: on all levels of noise that a step passes, undone by the exact posterior, with the error of
    x_0 held over the step. That is ``(SNR_s - SNR_t) / 2`` of a squared error of x_0, with SNR = alpha^2 / sigma^2
    (Kingma et al. 2021, arXiv:2107.00630, eq. 13): for a step that ends in noise ``nats_per_squared_error`` at eta 1,
    and up to the data as far as ``training`` has noise, where that ends.

    Args:
        schedule: the sampler's.
        training: ``training_schedule``.
    """

    def snr(one: DiffusionSchedule) -> Tensor:
        alpha, sigma = one.table.alpha_t.double().cpu(), one.table.sigma_t.double().cpu()
        return (alpha / sigma) ** 2

    ends = torch.cat([snr(schedule)[1:], snr(training)[-1:]])
    return (ends - snr(schedule)).clamp(min=0) / 2 * x_0_per_output(schedule) ** 2


def snr_shares(schedule: DiffusionSchedule) -> Tensor:
    """(T,) float64: how much alpha^2 / (alpha^2 + sigma^2) rises in each step, up to 1 in the last.

    For a UNet that is ``alphas_cumprod``, as alpha^2 + sigma^2 = 1.
    """
    alpha, sigma = (column.double().cpu() for column in (schedule.table.alpha_t, schedule.table.sigma_t))
    signal = alpha**2 / (alpha**2 + sigma**2)
    return torch.cat([signal[1:], signal.new_ones(1)]) - signal


def step_scales(schedule: DiffusionSchedule, steps: Tensor, weighting: Weighting) -> Tensor:
    """(T,) float64: what to multiply a step's nats by, for a step sampled evenly from ``steps``; 0 for the others.

    - exact: the number of steps. In expectation the sum of the nats over all of them.
    - uniform: one and the same factor for the squared error of every step's output, with the sum of the exact ones, as
      Diffusion-DPO does (Wallace et al. 2023, arXiv:2311.12908, drop omega).
    - snr_share: one over the step's share of the fall of ``alphas_cumprod``, see ``snr_shares``. Only this gives every
      step the part of the reward that it can pay for at equal price, see docs/mathematics/diffusion_dpo.md.
    """
    scales = torch.zeros(len(schedule), dtype=torch.float64)
    if weighting == "exact":
        scales[steps] = float(len(steps))
    elif weighting == "uniform":
        weights = nats_per_squared_error(schedule)[steps]
        scales[steps] = weights.sum() / weights
    else:
        shares = snr_shares(schedule)[steps]
        scales[steps] = shares.sum() / shares
    return scales
