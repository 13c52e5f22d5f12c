"""The numbers of a sampler, read once from a diffusers scheduler and never changed.

diffusers' ``step()`` keeps state, rounds its coefficients to float32 and draws its own noise, so it cannot replay a
decision. Here every coefficient is computed in float64 when the schedule is built; sampling and replay gather from the
same table.

Symbols: ``x_t`` is the noisier latent, ``x_s`` the next one; ``ab`` is ``alphas_cumprod``; a latent is
``alpha * x_0 + sigma * eps`` with ``alpha = sqrt(ab)`` and ``sigma = sqrt(1 - ab)``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.errors import UserError
from diffusion_align.training.config import Section

SAMPLERS = ("ddim", "ddpm")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_DDPM_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
# diffusers clamps a vanishing DDPM variance to 1e-20; such a step is deterministic in every sense that matters.
_SMALLEST_STD = 1e-8


class SamplerConfig(Section):
    """How pictures are sampled, in training and for the grids."""

    name: Literal["ddim", "ddpm"] = "ddim"
    steps: int = Field(50, ge=1, le=MOST)
    eta: float = Field(1.0, ge=0, le=1, description="DDIM's noise; 0 has no density and is refused for training")
    guidance_scale: float = Field(5.0, ge=1, le=LARGEST, description="1 switches guidance off")


@dataclass(frozen=True)
class Step:
    """Coefficients of one decision for each of B samples, (B, 1, 1, 1) each, except ``timestep`` (B,)."""

    timestep: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    x_0_weight: Tensor
    eps_weight: Tensor
    x_t_weight: Tensor
    std: Tensor


@dataclass(frozen=True)
class DiffusionSchedule:
    """The T decisions of one sampler setting; index 0 is the first (noisiest) step.

    ``table`` holds the columns of ``Step`` as (T,) tensors. ``std[i] == 0`` marks a deterministic step: it is sampled
    but has no density, so it takes no part in log-prob, ratio, loss or KL.
    """

    sampler: str
    prediction_type: str
    eta: float
    clip_range: float | None
    table: Step

    def __len__(self) -> int:
        return len(self.table.timestep)

    @property
    def stochastic_steps(self) -> Tensor:
        """(S,) int64, on the CPU: indices of the steps that have a density."""
        return (self.table.std.cpu() > 0).nonzero().squeeze(1)

    def at(self, index: Tensor) -> Step:
        """The coefficients of steps ``index`` (B,), shaped to multiply (B, C, H, W)."""
        if index.ndim != 1:
            raise ValueError(f"index must have shape (B,), got {tuple(index.shape)}")
        columns = {f.name: getattr(self.table, f.name)[index] for f in fields(Step)}
        return Step(**{name: c if name == "timestep" else c.view(-1, 1, 1, 1) for name, c in columns.items()})

    def without_clip(self) -> DiffusionSchedule:
        """The same schedule with x_0 as predicted."""
        return replace(self, clip_range=None)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> DiffusionSchedule:
        """The same schedule with its columns on ``device``; coefficients in ``dtype`` (float32 or float64)."""
        columns = {f.name: getattr(self.table, f.name) for f in fields(Step)}
        moved = {n: c.to(device) if n == "timestep" else c.to(device, dtype) for n, c in columns.items()}
        return replace(self, table=Step(**moved))


def build_schedule(scheduler: Any, steps: int, *, sampler: str = "ddim", eta: float = 1.0) -> DiffusionSchedule:
    """The schedule that diffusers' DDIM or DDPM scheduler with this configuration would follow.

    One departure: with ``timestep_spacing="linspace"`` DDIM's x_s is at the next timestep of the list, not one constant
    stride below x_t, by which diffusers leaves the list.

    Args:
        scheduler: any diffusers scheduler of the DDPM family; only its configuration is read, so a pipeline's
            PNDM, Euler or DPM-solver scheduler serves as well.
        steps: number of denoising steps T.
        sampler: "ddim" (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16) or "ddpm" (ancestral, Ho et al. 2020,
            arXiv:2006.11239, eq. 7).
        eta: DDIM's noise scale, 0 <= eta <= 1; "ddpm" ignores it. 0 gives no density and is fit for sampling only.

    Returns:
        Columns in float64 on the CPU.

    Raises:
        ValueError: an unknown sampler, or eta out of range.
        UserError: what this model cannot do: its prediction type or variance, dynamic thresholding, too many steps, or
            a step without signal (zero terminal SNR) while it predicts epsilon.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is unknown: use one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is out of range: DDIM needs 0 <= eta <= 1")
    config = dict(scheduler.config)
    if config.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise UserError(f"prediction_type={config['prediction_type']!r} is not one of {', '.join(PREDICTION_TYPES)}")
    if "beta_schedule" not in config:
        raise UserError(
            "the model's scheduler has no beta schedule (flow matching?): use a Stable Diffusion 1.x, 2 or XL model"
        )
    if config.get("thresholding"):
        raise UserError("the scheduler uses dynamic thresholding, which has no replay here: set thresholding=False")
    if not 1 <= steps <= config["num_train_timesteps"]:
        raise UserError(
            f"sampler.steps={steps} must lie between 1 and num_train_timesteps={config['num_train_timesteps']}"
        )

    # Other samplers' configurations carry no clip_sample; diffusers would then fill in DDIM's default, which is True.
    config.setdefault("clip_sample", False)
    source = (DDIMScheduler if sampler == "ddim" else DDPMScheduler).from_config(config)
    source.set_timesteps(steps)
    timesteps = source.timesteps.to(torch.int64).cpu()
    if int(timesteps.max()) >= config["num_train_timesteps"]:
        raise UserError(
            f"sampler.steps={steps} with the scheduler's steps_offset={config['steps_offset']} is one too many: "
            "use fewer"
        )
    ab_t = source.alphas_cumprod.double()[timesteps]
    ab_s = _next_alphas_cumprod(source, sampler, timesteps)
    if source.config.prediction_type == "epsilon" and bool((ab_t <= 0).any()):
        # Where every step is trained on, as by Diffusion-DPO, no spacing leaves the first one out.
        spacing = "timestep_spacing='leading' or " if steps < config["num_train_timesteps"] else ""
        raise UserError(
            "the scheduler starts without signal (rescale_betas_zero_snr) but the model predicts epsilon, from which "
            f"x_0 cannot be recovered there: use {spacing}rescale_betas_zero_snr=False"
        )
    weights = _ddim_weights(ab_t, ab_s, eta) if sampler == "ddim" else _ddpm_weights(source, timesteps, ab_t, ab_s)
    x_0_weight, eps_weight, x_t_weight, std = weights
    return DiffusionSchedule(
        sampler=sampler,
        prediction_type=source.config.prediction_type,
        eta=eta,
        clip_range=float(source.config.clip_sample_range) if source.config.clip_sample else None,
        table=Step(timesteps, ab_t.sqrt(), (1 - ab_t).sqrt(), x_0_weight, eps_weight, x_t_weight, std),
    )


def training_schedule(scheduler: Any) -> DiffusionSchedule:
    """Every step of the noising process that the model was trained on, undone by DDPM with the posterior's variance.

    The last one, to the data, is deterministic. Raises as ``build_schedule`` does.
    """
    config = dict(scheduler.config)
    whole = {"steps_offset": 0, "timestep_spacing": "leading", "clip_sample": False, "variance_type": "fixed_small"}
    config.pop("_use_default_values", None)  # diffusers forgets what is set here if it was not set there
    plain = SimpleNamespace(config=config | whole)
    return build_schedule(plain, config.get("num_train_timesteps", 1), sampler="ddpm")


def _next_alphas_cumprod(source: Any, sampler: str, timesteps: Tensor) -> Tensor:
    """ab at x_s. diffusers' two samplers disagree about which timestep that is, and both are followed.

    But not DDIM's stride with linspace spacing: its 10 timesteps are 999, 888, ..., 0 and ``step`` goes down by 100, so
    that the UNet would be told 888 of a latent with the noise of 899; here x_s has the noise of the next timestep.
    """
    alphas_cumprod = source.alphas_cumprod.double()
    following = torch.cat([timesteps[1:], torch.tensor([-1])])
    last = torch.ones((), dtype=torch.float64)
    if sampler == "ddim":
        last = source.final_alpha_cumprod.double()
        if source.config.timestep_spacing != "linspace":
            following = timesteps - source.config.num_train_timesteps // len(timesteps)
    return torch.where(following >= 0, alphas_cumprod[following.clamp(min=0)], last)


def _ddim_weights(ab_t: Tensor, ab_s: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DDIM: mean = sqrt(ab_s) x_0 + sqrt(1 - ab_s - std^2) eps, std = eta * sqrt(eq. 16)."""
    variance = ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)).clamp(min=0)
    std = eta * variance.sqrt()
    std = torch.where(std < _SMALLEST_STD, 0.0, std)
    return ab_s.sqrt(), (1 - ab_s - std**2).clamp(min=0).sqrt(), torch.zeros_like(std), std


def _ddpm_weights(source: Any, timesteps: Tensor, ab_t: Tensor, ab_s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DDPM: mean = sqrt(ab_s) beta / (1 - ab_t) x_0 + sqrt(alpha) (1 - ab_s) / (1 - ab_t) x_t."""
    kind = source.config.variance_type
    if kind not in _DDPM_VARIANCES:
        raise UserError(f"variance_type={kind!r} is not supported: use one of {', '.join(_DDPM_VARIANCES)}")
    alpha = ab_t / ab_s
    beta = 1 - alpha
    variance = beta if kind == "fixed_large" else (1 - ab_s) / (1 - ab_t) * beta
    std = variance.clamp(min=0).sqrt()
    std = torch.where((timesteps == 0) | (std < _SMALLEST_STD), 0.0, std)  # diffusers adds no noise at t = 0
    x_0_weight = ab_s.sqrt() * beta / (1 - ab_t)
    return x_0_weight, torch.zeros_like(std), alpha.sqrt() * (1 - ab_s) / (1 - ab_t), std


def part_of_steps(steps: Tensor, part: tuple[float, float]) -> Tensor:
    """Those of ``steps`` (S,) from share ``part[0]`` of them to share ``part[1]``."""
    first, last = (round(share * len(steps)) for share in part)
    return steps[first:last]
