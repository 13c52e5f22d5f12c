"""A preference loss for text: chi-squared preference optimisation (XPO; Huang et al. 2024, arXiv:2407.13399).

DPO with the link ``phi(z) = z + log z`` in place of ``log z``, z = pi/pi_ref, so that a policy far from its reference
pays more than a logarithm. With r the log-ratio of a completion, R the clip:

    loss = -log sigmoid(clamp(beta (phi(r_chosen) - phi(r_rejected)), -2R, 2R)),    phi(r) = exp(r) + r
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_align.estimators import masked_mean
from diffusion_align.extending import DPOConfig, DPOTrainer


class ChiPOConfig(DPOConfig):
    """Settings of ChiPOTrainer, beside those of DPO."""

    clip: float = Field(2.0, gt=0, description="R, half the largest difference of rewards")


class ChiPOTrainer(DPOTrainer):
    """Chi-squared preference optimisation: DPO that is careful where the policy leaves its reference."""

    config: ChiPOConfig
    config_class = ChiPOConfig

    def pair_losses(self, chosen: Tensor, rejected: Tensor, counts: Tensor, beta: float | Tensor) -> Tensor:
        """(n,) from log-ratios of the chosen (n,) and rejected (n, M): the mean over those there are."""
        scale = torch.as_tensor(beta, device=chosen.device).view(-1, 1)
        margins = scale * (phi(chosen)[:, None] - phi(rejected))
        bound = 2 * self.config.clip
        return masked_mean(-logsigmoid(margins.clamp(-bound, bound)), counts, 1)


def phi(log_ratio: Tensor) -> Tensor:
    """Of z = exp(log_ratio): z + log z, z bounded where it is far beyond any clip."""
    return log_ratio.clamp(max=20.0).exp() + log_ratio
