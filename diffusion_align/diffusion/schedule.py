"""The numbers of a sampler, tabulated once from a diffusers scheduler and never changed.

diffusers' ``step()`` keeps state, rounds its coefficients to float32 and samples its own noise, so it cannot replay a
step. Here every coefficient is computed in float64 when the schedule is built; sampling and replay gather from the same
table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffusion_align.diffusion.sampler_settings import SamplerConfig  # noqa: F401, from where model cards import it
from diffusion_align.diffusion.samplers import (
    SAMPLERS,
    Sampler,
    check_sampler,
    default_sampler,
    find_sampler,
    scheduler_config,
)
from diffusion_align.diffusion.step import Step
from diffusion_align.errors import UserError, foreign_code
from diffusion_align.models.families.flow_matching import is_flow, set_spaced_timesteps

SetTimesteps = Callable[[Any, int], None]
"""Sets the timesteps of a diffusers scheduler to a number of steps."""
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class DiffusionSchedule:
    """The T steps of one sampler setting; index 0 is the first (noisiest) step.

    ``table`` holds the columns of ``Step`` as (T,) tensors. ``std[i] == 0`` marks a deterministic step: it is sampled
    but has no density, so it takes no part in log-prob, ratio, loss or KL.
    """

    prediction_type: str
    clip_range: float | None
    table: Step

    def __len__(self) -> int:
        return len(self.table.timestep)

    @cached_property
    def stochastic_steps(self) -> Tensor:
        """(S,) int64, on the CPU: indices of the steps that have a density."""
        return (self.table.std.cpu() > 0).nonzero().squeeze(1)

    @cached_property
    def terms(self) -> tuple[str, ...]:
        """The weights that are not 0 at every step. A term of 0 would still turn -0 to 0, and infinities to NaN."""
        weights = ("x_0_weight", "eps_weight", "x_t_weight")
        return tuple(name for name in weights if bool(getattr(self.table, name).any()))

    def at(self, index: Tensor) -> Step:
        """The coefficients of steps ``index`` (B,), shaped to multiply (B, C, H, W)."""
        if index.ndim != 1:
            raise ValueError(f"index must have shape (B,), got {tuple(index.shape)}")
        columns = {f.name: getattr(self.table, f.name)[index] for f in fields(Step)}
        return Step(**{name: c if name == "timestep" else c.view(-1, 1, 1, 1) for name, c in columns.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> DiffusionSchedule:
        """The same schedule with its columns on ``device``; coefficients in ``dtype`` (float32 or float64)."""
        columns = {f.name: getattr(self.table, f.name) for f in fields(Step)}
        moved = {n: c.to(device) if n == "timestep" else c.to(device, dtype) for n, c in columns.items()}
        schedule = replace(self, table=Step(**moved))
        # A GPU would wait for the host to read them from there.
        vars(schedule).update(stochastic_steps=self.stochastic_steps, terms=self.terms)
        return schedule


def build_schedule(
    scheduler: Any,
    steps: int,
    *,
    sampler: str | Sampler | None = None,
    eta: float = 1.0,
    options: Mapping[str, Any] | None = None,
    set_timesteps: SetTimesteps | None = None,
) -> DiffusionSchedule:
    """The schedule of a sampler on the noising process of a diffusers scheduler.

    Args:
        scheduler: any diffusers scheduler of the DDPM family, or flow matching's Euler scheduler; only its
            configuration is read, so a pipeline's PNDM, Euler or DPM-solver scheduler serves as well.
        steps: number of denoising steps T.
        sampler: a name in ``SAMPLERS``, a function ``(scheduler, steps, options) -> Step`` or a reference to one; None
            is the model's own, "ddim" with a beta schedule and "flow" with flow matching.
        eta: noise scale of DDIM and flow, 0 <= eta <= 1; 0 gives no density and is fit for sampling only.
        options: of the sampler, instead of ``{"eta": eta}``.
        set_timesteps: how the pipeline of a flow-matching model sets its scheduler's timesteps, see
            ``ModelFamily.timesteps_setter``; None is Stable Diffusion 3's way. Others have no use for it.

    Returns:
        Columns in float64 on the CPU.

    Raises:
        ValueError: an option out of range.
        UserError: an unknown sampler, one of another kind of model, or one whose table does not fit; or what this model
            cannot do: its prediction type or variance, dynamic thresholding, inverted sigmas, too many steps, or a step
            without signal (zero terminal SNR) while it predicts epsilon.
    """
    config = scheduler_config(scheduler)
    flow = is_flow(config)
    sampler = default_sampler(scheduler) if sampler is None else sampler
    tabulate = find_sampler(sampler) if isinstance(sampler, str) else sampler
    _check_model(config, flow=flow)
    if not 1 <= steps <= config["num_train_timesteps"]:
        raise UserError(
            f"sampler.steps={steps} must lie between 1 and num_train_timesteps={config['num_train_timesteps']}"
        )
    check_sampler(sampler, config)

    if flow:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler.config))
        (set_timesteps or set_spaced_timesteps)(scheduler, steps)
    options = {"eta": eta} if options is None else options
    if tabulate in SAMPLERS.values():
        table = tabulate(scheduler, steps, options)
    else:
        with foreign_code(f"sampler {sampler!r} raised "):
            table = tabulate(scheduler, steps, options)
        _check_table(table, f"sampler {sampler!r}", steps, config["num_train_timesteps"], flow=flow)
    if flow:
        return DiffusionSchedule(prediction_type="flow", clip_range=None, table=table)

    from diffusers import DDIMScheduler

    filled = DDIMScheduler.from_config(config).config  # with diffusers' defaults
    if filled.prediction_type == "epsilon" and bool((table.alpha_t <= 0).any()):
        # Where every step is trained on, as by Diffusion-DPO, no spacing leaves the first one out.
        spacing = "timestep_spacing='leading' or " if steps < config["num_train_timesteps"] else ""
        raise UserError(
            "the scheduler starts without signal (rescale_betas_zero_snr) but the model predicts epsilon, from which "
            f"x_0 cannot be recovered there: use {spacing}rescale_betas_zero_snr=False"
        )
    return DiffusionSchedule(
        prediction_type=filled.prediction_type,
        clip_range=float(filled.clip_sample_range) if filled.clip_sample else None,
        table=table,
    )


def _check_model(config: Mapping[str, Any], *, flow: bool) -> None:
    """UserError unless a scheduler's configuration is of a kind that can be tabulated."""
    for name in ("invert_sigmas", "stochastic_sampling"):
        if flow and config.get(name):
            raise UserError(f"the scheduler has {name}=True, which is not supported: set it to False in it")
    if not flow and config.get("prediction_type", "epsilon") not in _PREDICTION_TYPES:
        raise UserError(
            f"the scheduler's prediction_type={config['prediction_type']!r} is not supported: it must be one of "
            f"{', '.join(_PREDICTION_TYPES)}"
        )
    if not flow and "beta_schedule" not in config:
        raise UserError(
            "the model's scheduler has neither a beta schedule nor flow matching's shift: use a model with a scheduler "
            "of the DDPM family or a FlowMatchEulerDiscreteScheduler"
        )
    if config.get("thresholding"):
        raise UserError("the scheduler uses dynamic thresholding, which is not supported: set thresholding=False in it")


def _check_table(table: Any, sampler: str, steps: int, times: int, *, flow: bool) -> None:
    """UserError unless what a sampler returned fits."""
    if not isinstance(table, Step):
        returned = type(table).__name__
        raise UserError(f"{sampler} must return a Step, see diffusion/samplers.py, and returned a {returned}")
    for name, column in vars(table).items():
        wanted = torch.float64 if name != "timestep" else torch.float32 if flow else torch.int64
        if not isinstance(column, Tensor) or column.shape != (steps,) or column.dtype != wanted:
            raise UserError(f"{sampler} must return {name} as {steps} numbers, {wanted}")
        if not bool(column.isfinite().all()):
            raise UserError(f"{sampler} returned {name} with numbers that are not finite: give every step a finite one")
    latest = times if flow else times - 1
    if bool(((table.timestep < 0) | (table.timestep > latest)).any()):
        raise UserError(f"{sampler} returned a timestep that the model does not know: they go from 0 to {latest}")
    if bool((table.std < 0).any()):
        raise UserError(f"{sampler} returned a negative std: it must be at least 0")


def training_schedule(scheduler: Any, set_timesteps: SetTimesteps | None = None) -> DiffusionSchedule:
    """Every step of the noising process that the model was trained on, undone by DDPM with the posterior's variance.

    For a flow-matching model, whose time is continuous, as many steps as its scheduler counts (1000), at the sigmas
    that its pipeline would sample them with. The last one, to the data, is deterministic. Arguments and errors are
    those of ``build_schedule``.
    """
    config = dict(scheduler.config)
    times = config.get("num_train_timesteps", 1)
    if is_flow(config):
        return build_schedule(scheduler, times, set_timesteps=set_timesteps)
    whole = {"steps_offset": 0, "timestep_spacing": "leading", "clip_sample": False, "variance_type": "fixed_small"}
    config.pop("_use_default_values", None)  # diffusers forgets what is set here if it was not set there
    plain = SimpleNamespace(config=config | whole)
    return build_schedule(plain, times, sampler="ddpm")


def select_step_range(steps: Tensor, fractions: tuple[float, float]) -> Tensor:
    """Those of ``steps`` (S,) from fraction ``fractions[0]`` of them to fraction ``fractions[1]``."""
    first, last = (round(fraction * len(steps)) for fraction in fractions)
    return steps[first:last]
