"""The numbers of a sampler, tabulated once from a diffusers scheduler and never changed.

diffusers' ``step()`` keeps state, rounds its coefficients to float32 and samples its own noise, so it cannot replay a
step. Here every coefficient is computed in float64 when the schedule is built; sampling and replay gather from the same
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffusion_align.diffusion.samplers import SAMPLERS, Sampler, Step, find_sampler, scheduler_config
from diffusion_align.diffusion.settings import SamplerConfig  # noqa: F401, from where model cards import it
from diffusion_align.errors import UserError, foreign_code

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

    @property
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
        return replace(self, table=Step(**moved))


def build_schedule(
    scheduler: Any,
    steps: int,
    *,
    sampler: str | Sampler = "ddim",
    eta: float = 1.0,
    options: Mapping[str, Any] | None = None,
) -> DiffusionSchedule:
    """The schedule of a sampler on the noising process of a diffusers scheduler.

    Args:
        scheduler: any diffusers scheduler of the DDPM family; only its configuration is read, so a pipeline's
            PNDM, Euler or DPM-solver scheduler serves as well.
        steps: number of denoising steps T.
        sampler: "ddim", "ddpm", a function ``(scheduler, steps, options) -> Step`` or a reference to one.
        eta: DDIM's noise scale, 0 <= eta <= 1; 0 gives no density and is fit for sampling only.
        options: of the sampler, instead of ``{"eta": eta}``.

    Returns:
        Columns in float64 on the CPU.

    Raises:
        ValueError: an option out of range.
        UserError: an unknown sampler, or one whose table does not fit; or what this model cannot do: its prediction
            type or variance, dynamic thresholding, too many steps, or a step without signal (zero terminal SNR) while
            it predicts epsilon.
    """
    from diffusers import DDIMScheduler

    tabulate = find_sampler(sampler) if isinstance(sampler, str) else sampler
    config = scheduler_config(scheduler)
    if config.get("prediction_type", "epsilon") not in _PREDICTION_TYPES:
        raise UserError(
            f"the scheduler's prediction_type={config['prediction_type']!r} is not supported: it must be one of "
            f"{', '.join(_PREDICTION_TYPES)}"
        )
    if "beta_schedule" not in config:
        raise UserError(
            "the model's scheduler has no beta schedule (flow matching?): use a Stable Diffusion 1.x, 2 or XL model"
        )
    if config.get("thresholding"):
        raise UserError("the scheduler uses dynamic thresholding, which is not supported: set thresholding=False in it")
    if not 1 <= steps <= config["num_train_timesteps"]:
        raise UserError(
            f"sampler.steps={steps} must lie between 1 and num_train_timesteps={config['num_train_timesteps']}"
        )

    options = {"eta": eta} if options is None else options
    if tabulate in SAMPLERS.values():
        table = tabulate(scheduler, steps, options)
    else:
        with foreign_code(f"sampler {sampler!r} raised "):
            table = tabulate(scheduler, steps, options)
        _check_table(table, f"sampler {sampler!r}", steps, config["num_train_timesteps"])
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


def _check_table(table: Any, sampler: str, steps: int, times: int) -> None:
    """UserError unless what a sampler returned fits."""
    if not isinstance(table, Step):
        returned = type(table).__name__
        raise UserError(f"{sampler} must return a Step, see diffusion/samplers.py, and returned a {returned}")
    for name, column in vars(table).items():
        wanted = torch.int64 if name == "timestep" else torch.float64
        if not isinstance(column, Tensor) or column.shape != (steps,) or column.dtype != wanted:
            raise UserError(f"{sampler} must return {name} as {steps} numbers, {wanted}")
        if not bool(column.isfinite().all()):
            raise UserError(f"{sampler} returned {name} with numbers that are not finite: give every step a finite one")
    if bool(((table.timestep < 0) | (table.timestep >= times)).any()):
        raise UserError(f"{sampler} returned a timestep that the model does not know: they go from 0 to {times - 1}")
    if bool((table.std < 0).any()):
        raise UserError(f"{sampler} returned a negative std: it must be at least 0")


def training_schedule(scheduler: Any) -> DiffusionSchedule:
    """Every step of the noising process that the model was trained on, undone by DDPM with the posterior's variance.

    The last one, to the data, is deterministic. Raises as ``build_schedule`` does.
    """
    config = dict(scheduler.config)
    whole = {"steps_offset": 0, "timestep_spacing": "leading", "clip_sample": False, "variance_type": "fixed_small"}
    config.pop("_use_default_values", None)  # diffusers forgets what is set here if it was not set there
    plain = SimpleNamespace(config=config | whole)
    return build_schedule(plain, config.get("num_train_timesteps", 1), sampler="ddpm")


def select_step_range(steps: Tensor, fractions: tuple[float, float]) -> Tensor:
    """Those of ``steps`` (S,) from fraction ``fractions[0]`` of them to fraction ``fractions[1]``."""
    first, last = (round(fraction * len(steps)) for fraction in fractions)
    return steps[first:last]
