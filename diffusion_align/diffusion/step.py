"""One step of a sampler, and the noising process at its two ends; what samplers of UNets and of flow models share.

Symbols: ``x_t`` is the noisier latent, ``x_s`` the next one. A latent is ``alpha * x_0 + sigma * eps``: for a UNet
``alpha = sqrt(ab)``, ``sigma = sqrt(1 - ab)`` with diffusers' ``alphas_cumprod`` ab, for a flow-matching model
``alpha = 1 - sigma``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# diffusers clamps a vanishing DDPM variance to 1e-20; such a step is deterministic in every sense that matters.
SMALLEST_STD = 1e-8


@dataclass(frozen=True)
class Step:
    """Coefficients of steps: of a sampler's T, (T,) each, or gathered for B samples, (B, 1, 1, 1) each.

    ``timestep`` (T,) or (B,) is the model's own time: int64, or float32 for a flow-matching model, 1000 sigma.
    ``std == 0`` is a deterministic step.
    """

    timestep: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    x_0_weight: Tensor
    eps_weight: Tensor
    x_t_weight: Tensor
    std: Tensor


@dataclass(frozen=True)
class NoiseLevels:
    """Both ends of T steps, (T,) each, float64: ``signal = alpha**2`` and ``noise = sigma**2`` at x_t and at x_s.

    ``added`` is the variance that noising adds from x_s to x_t, ``noise_t - signal_t / signal_s * noise_s``.
    """

    timestep: Tensor
    signal_t: Tensor
    noise_t: Tensor
    signal_s: Tensor
    noise_s: Tensor
    added: Tensor

    @property
    def variance(self) -> Tensor:
        """(T,) of the posterior q(x_s | x_t, x_0): ``noise_s (1 - SNR_t / SNR_s)``."""
        return (self.noise_s / self.noise_t * self.added).clamp(min=0)

    @property
    def snr_ratio(self) -> Tensor:
        """(T,) SNR_t / SNR_s, of the signal-to-noise ratios: 0 in a step to the data or from pure noise, 1 at most."""
        return (1 - self.added / self.noise_t).clamp(min=0, max=1)

    def step(self, x_0_weight: Tensor, eps_weight: Tensor, x_t_weight: Tensor, std: Tensor) -> Step:
        """Steps between these levels."""
        alpha, sigma = self.signal_t.sqrt(), self.noise_t.sqrt()
        return Step(self.timestep, alpha, sigma, x_0_weight, eps_weight, x_t_weight, std)

    def preserving_step(self, std: Tensor) -> Step:
        """Steps with noise ``std`` (T,) whose x_s is ``alpha_s x_0 + sigma_s eps'`` where eps' has the variance of eps.

        mean = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps (Song et al. 2021, arXiv:2010.02502, eq. 12).
        """
        std = std.where(std >= SMALLEST_STD, 0.0)
        eps_weight = (self.noise_s - std**2).clamp(min=0).sqrt()
        return self.step(self.signal_s.sqrt(), eps_weight, 0 * std, std)


def flow_levels(scheduler: Any, steps: int) -> NoiseLevels:
    """The levels of a flow-matching scheduler whose timesteps are set, from its own ``sigmas`` (T + 1,).

    Raises:
        ValueError: it is set to another number of steps.
    """
    sigmas = scheduler.sigmas.double().cpu()
    if len(sigmas) != steps + 1:
        raise ValueError(f"steps={steps} differs from the {len(sigmas) - 1} that the scheduler is set to")
    t, s = sigmas[:-1], sigmas[1:]
    added = t**2 - ((1 - t) / (1 - s)) ** 2 * s**2
    return NoiseLevels(scheduler.timesteps.cpu(), (1 - t) ** 2, t**2, (1 - s) ** 2, s**2, added)


def eta_of(options: Mapping[str, Any]) -> Tensor:
    """``options["eta"]``, 1 if it is not given: from 0 to 1, one number or (T,).

    Raises:
        ValueError: it is out of range.
    """
    import torch

    eta = torch.as_tensor(options.get("eta", 1.0), dtype=torch.float64)
    if not bool(((eta >= 0) & (eta <= 1)).all()):
        raise ValueError(f"eta={options['eta']} is out of range: it must be 0 <= eta <= 1")
    return eta
