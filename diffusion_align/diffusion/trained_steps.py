"""Which of a sampler's steps are trained on, and whether one of them outweighs the rest.

How much a step counts in log-ratio and KL is what an equal error of the network costs there, in nats: more and more as
the noise of a step vanishes. diffusers ends the sigmas of Stable Diffusion 3 at .009, so that of 10 steps the last one
with noise would hold more than 99 % of the path's KL, for a change that nobody sees.
"""

from __future__ import annotations

from torch import Tensor

from diffusion_align.diffusion.sampler_settings import Weighting
from diffusion_align.diffusion.schedule import DiffusionSchedule, select_step_range
from diffusion_align.diffusion.transitions import nats_per_squared_error, step_scales

MOST = 0.5
"""The share of the path's KL from which on a step outweighs all others together."""


def trained_steps(schedule: DiffusionSchedule, timestep_range: tuple[float, float] | None) -> Tensor:
    """(S,) int64: the stochastic steps within ``timestep_range``.

    None is all of them, but for a flow-matching model the last one where it outweighs all others.
    """
    steps = schedule.stochastic_steps
    if timestep_range is not None:
        return select_step_range(steps, timestep_range)
    shares = _kl_shares(schedule, steps)
    last_outweighs = schedule.prediction_type == "flow" and len(steps) > 1 and float(shares[-1]) > MOST
    return steps[:-1] if last_outweighs else steps


def outweighing_step(
    schedule: DiffusionSchedule, steps: Tensor, weighting: Weighting = "exact", *, setting: str = "timestep_range"
) -> str | None:
    """A sentence about the one of three or more trained ``steps`` (S,) that outweighs the others together, if one does.

    ``weighting``: of the steps, see ``step_scales``. ``setting``: by which it can be left out.
    """
    if len(steps) < 3:  # of two, one always does
        return None
    share, place = _kl_shares(schedule, steps, weighting).max(dim=0)
    if float(share) <= MOST:
        return None
    return (
        f"step {int(steps[place]) + 1} of {len(schedule)} holds {100 * float(share):.3g} % of the KL that equal errors "
        f"of the network make in the {len(steps)} trained steps, so ratio and KL are mostly its own: leave it out with "
        f"{setting}, or take more steps"
    )


def _kl_shares(schedule: DiffusionSchedule, steps: Tensor, weighting: Weighting = "exact") -> Tensor:
    weights = (nats_per_squared_error(schedule) * step_scales(schedule, steps, weighting))[steps]
    return weights / weights.sum()
