"""Samplers of flow-matching models, ``x_t = (1 - t) x_0 + t eps`` with t = sigma from 1 (noise) to 0 (data).

All four are affine in x_0, eps and x_t like those of ``samplers.py``, and end in a deterministic step, as noise of the
last step would stay in the image. ``h = t - s`` is the length of a step.

``flow`` and ``ddim`` have the marginals of the noising process if the velocity is exact and the steps are short, as has
``flow_sde`` after its first step. ``cps`` has not: its noise does not shrink with the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_align.diffusion.step import NoiseLevels, Step, eta_of, flow_levels

if TYPE_CHECKING:
    from torch import Tensor

NOISE_LEVELS = {"flow_sde": 0.7, "cps": 0.7, "dance": 0.3}
"""Samplers whose noise is ``noise_level`` instead of eta, with its default: that of their sources."""


def flow(scheduler: Any, steps: int, options: Mapping[str, Any]) -> Step:
    """The reverse SDE with noise ``eta * sqrt(2 t / (1 - t))``, solved exactly over the step for a constant x_0.

    std = s sqrt(1 - rho^(2 eta^2)), rho = s (1 - t) / ((1 - s) t). ``options["eta"]`` is a number from 0, the
    probability-flow ODE by Euler steps, to 1, the posterior q(x_s | x_t, x_0), as ``ddim``'s; in between they differ.
    """
    levels = flow_levels(scheduler, steps)
    kept = levels.snr_ratio ** eta_of(options) ** 2
    return levels.preserving_step((levels.noise_s * (1 - kept)).sqrt())


def cps(scheduler: Any, steps: int, options: Mapping[str, Any]) -> Step:
    """Coefficient-preserving sampling (Flow-CPS, Wang & Yu 2025, arXiv:2509.05952): std = s sin(noise_level pi / 2).

    Not the discretization of an SDE: with many steps the images get too smooth, whatever the network.
    """
    levels = flow_levels(scheduler, steps)
    return levels.preserving_step(levels.noise_s.sqrt() * math.sin(_noise_level("cps", options) * math.pi / 2))


def flow_sde(scheduler: Any, steps: int, options: Mapping[str, Any]) -> Step:
    """Euler-Maruyama with noise ``g = noise_level sqrt(t / (1 - t))`` (Flow-GRPO, Liu et al. 2025, arXiv:2505.05470).

    In the first step, where t = 1, 1 - t is replaced by that of the second, as Flow-GRPO does: whatever the number of
    steps, this one leaves too much noise. Flow-GRPO also adds noise in the last step.
    """
    levels = flow_levels(scheduler, steps)
    t, s = levels.noise_t.sqrt(), levels.noise_s.sqrt()
    signal = 1 - t
    signal[0] = 1 - s[0]
    return _euler_maruyama(levels, _noise_level("flow_sde", options) ** 2 * t / signal)


def dance(scheduler: Any, steps: int, options: Mapping[str, Any]) -> Step:
    """Euler-Maruyama with constant noise ``g = noise_level`` (DanceGRPO, Xue et al. 2025, arXiv:2505.07818)."""
    levels = flow_levels(scheduler, steps)
    return _euler_maruyama(levels, 0 * levels.noise_t + _noise_level("dance", options) ** 2)


def _euler_maruyama(levels: NoiseLevels, variance: Tensor) -> Step:
    """mean = x_t - h (v + g^2 / 2t eps), std = g sqrt(h) with v = eps - x_0; ``variance`` (T,) is g^2."""
    t, s = levels.noise_t.sqrt(), levels.noise_s.sqrt()
    h, last = t - s, s == 0
    x_0_weight, x_t_weight = h.where(~last, 1.0), (0 * h).where(last, 1.0)
    eps_weight = (-h * (1 + variance / (2 * t))).where(~last, 0.0)
    return levels.step(x_0_weight, eps_weight, x_t_weight, (variance * h).sqrt().where(~last, 0.0))


def _noise_level(name: str, options: Mapping[str, Any]) -> float:
    level = options.get("noise_level")
    return NOISE_LEVELS[name] if level is None else float(level)


FLOW_SAMPLERS = {"flow": flow, "flow_sde": flow_sde, "cps": cps, "dance": dance}
"""Those that only a flow-matching model has."""
