"""Samplers: functions ``(scheduler, steps, options) -> Step`` that tabulate the coefficients of every step.

A step is affine in what the network's output says of x_t, with Gaussian noise on top:

    x_s = x_0_weight * x_0 + eps_weight * eps + x_t_weight * x_t + std * noise

``SAMPLERS`` holds those known by name; any other is named ``module:function`` or ``path/to/file.py:function``.

For a flow-matching model ``scheduler`` is a ``FlowMatchEulerDiscreteScheduler`` whose ``sigmas`` (T + 1,) and
``timesteps`` (T,) are set as the model's pipeline sets them; ``flow_samplers.py`` has those that only such a model has.

Symbols: see ``step.py``; ``ab`` is ``alphas_cumprod``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_align.diffusion.flow_samplers import FLOW_SAMPLERS
from diffusion_align.diffusion.step import SMALLEST_STD, NoiseLevels, Step, eta_of, flow_levels
from diffusion_align.errors import UserError
from diffusion_align.models.families.flow_matching import is_flow
from diffusion_align.references import resolve

if TYPE_CHECKING:
    from torch import Tensor

Sampler = Callable[[Any, int, Mapping[str, Any]], Step]
_DDPM_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


def ddim(scheduler: Any, steps: int, options: Mapping[str, Any]) -> Step:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12): mean = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps.

    ``options["eta"]`` scales the noise, std = eta * sqrt(eq. 16) = eta sigma_s sqrt(1 - SNR_t / SNR_s): a number from 0
    to 1, or (T,) of them.
    """
    levels = flow_levels(scheduler, steps) if is_flow(scheduler.config) else _ddim_levels(scheduler, steps)
    return levels.preserving_step(eta_of(options) * levels.variance.sqrt())


def _ddim_levels(scheduler: Any, steps: int) -> NoiseLevels:
    """The levels between DDIM's timesteps, of a scheduler with a beta schedule.

    With ``timestep_spacing="linspace"`` x_s is at the next timestep of the list, unlike diffusers, whose constant
    stride leaves the list: its 10 timesteps are 999, 888, ..., 0 and ``step`` goes down by 100, so that the UNet would
    be told 888 of a latent with the noise of 899.
    """
    import torch
    from diffusers import DDIMScheduler

    source, timesteps = diffusers_timesteps(DDIMScheduler, scheduler, steps)
    following = torch.cat([timesteps[1:], torch.tensor([-1])])
    if source.config.timestep_spacing != "linspace":
        following = timesteps - source.config.num_train_timesteps // len(timesteps)
    alphas_cumprod = source.alphas_cumprod.double()
    ab_t = alphas_cumprod[timesteps]
    ab_s = torch.where(following >= 0, alphas_cumprod[following.clamp(min=0)], source.final_alpha_cumprod.double())
    return NoiseLevels(timesteps, ab_t, 1 - ab_t, ab_s, 1 - ab_s, added=1 - ab_t / ab_s)


def ddpm(scheduler: Any, steps: int, options: Mapping[str, Any]) -> Step:
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, eq. 7), the posterior of the noising process:

    mean = sqrt(ab_s) beta / (1 - ab_t) x_0 + sqrt(alpha) (1 - ab_s) / (1 - ab_t) x_t. It has no options.

    Raises:
        UserError: a variance that is not a function of the step.
    """
    import torch
    from diffusers import DDPMScheduler

    source, timesteps = diffusers_timesteps(DDPMScheduler, scheduler, steps)
    kind = source.config.variance_type
    if kind not in _DDPM_VARIANCES:
        raise UserError(f"variance_type={kind!r} is not supported: use one of {', '.join(_DDPM_VARIANCES)}")
    ab_t = source.alphas_cumprod.double()[timesteps]
    ab_s = torch.cat([ab_t[1:], ab_t.new_ones(1)])
    alpha = ab_t / ab_s
    beta = 1 - alpha
    variance = beta if kind == "fixed_large" else (1 - ab_s) / (1 - ab_t) * beta
    std = variance.clamp(min=0).sqrt()
    std = torch.where((timesteps == 0) | (std < SMALLEST_STD), 0.0, std)  # diffusers adds no noise at t = 0
    return Step(
        timestep=timesteps,
        alpha_t=ab_t.sqrt(),
        sigma_t=(1 - ab_t).sqrt(),
        x_0_weight=ab_s.sqrt() * beta / (1 - ab_t),
        eps_weight=torch.zeros_like(std),
        x_t_weight=alpha.sqrt() * (1 - ab_s) / (1 - ab_t),
        std=std,
    )


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "ddpm": ddpm, **FLOW_SAMPLERS}


def default_sampler(scheduler: Any) -> str:
    """The sampler that a model has by default, by its scheduler."""
    return "flow" if is_flow(scheduler.config) else "ddim"


def find_sampler(name: str) -> Sampler:
    """The sampler of that name, or the function that a reference leads to.

    Raises:
        UserError: there is none.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    if ":" not in name:
        known = ", ".join(repr(one) for one in SAMPLERS)
        raise UserError(f"sampler={name!r} is unknown: it must be {known}, 'module:function' or 'file.py:function'")
    return resolve(name, "sampler")


def diffusers_timesteps(kind: Any, scheduler: Any, steps: int) -> tuple[Any, Tensor]:
    """A diffusers scheduler of class ``kind`` with the configuration of ``scheduler``, and its timesteps (T,), int64.

    Raises:
        UserError: the configuration has no room for so many steps.
    """
    import torch

    config = scheduler_config(scheduler)
    source = kind.from_config(config)
    source.set_timesteps(steps)
    timesteps = source.timesteps.to(torch.int64).cpu()
    if int(timesteps.max()) >= config["num_train_timesteps"]:
        raise UserError(
            f"sampler.steps={steps} with the scheduler's steps_offset={config['steps_offset']} is one too many: "
            "use fewer"
        )
    return source, timesteps


def check_sampler(sampler: str | Sampler, config: Mapping[str, Any]) -> None:
    """UserError if a sampler is not for models whose scheduler has this configuration; one's own is for all."""
    tabulate, flow = find_sampler(sampler) if isinstance(sampler, str) else sampler, is_flow(config)
    if flow and tabulate is ddpm:
        raise UserError("sampler.name=ddpm is not for a flow-matching model: use flow with eta=1, which is its DDPM")
    if not flow and tabulate in FLOW_SAMPLERS.values():
        raise UserError(f"sampler.name={sampler} is for flow-matching models, and this is none: use ddim or ddpm")


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """The configuration of a diffusers scheduler, which clips x_0 only where it says so.

    Other samplers' configurations carry no clip_sample; diffusers would then fill in DDIM's default, which is True.
    """
    return {"clip_sample": False, **scheduler.config}
