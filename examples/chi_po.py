"""A preference loss for text: chi-squared preference optimisation (χPO; Huang et al. 2024, arXiv:2407.13399).

DPO with the link ``phi(z) = z + log z`` in place of ``log z``, z = pi/pi_ref, which penalises a policy far from its
reference more strongly. With the log-ratio r of a completion and the clip R:

    loss = -log sigmoid(clamp(beta (phi(r_chosen) - phi(r_rejected)), -2R, 2R)),    phi(r) = exp(r) + r
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_align.estimators import masked_mean
from diffusion_align.extending import DPOConfig, DPOTrainer


class ChiPOConfig(DPOConfig):
    """Settings of ChiPOTrainer, in addition to those of DPO."""

    clip: float = Field(2.0, gt=0, description="R: rewards may differ by at most 2 R")


class ChiPOTrainer(DPOTrainer):
    """Chi-squared preference optimisation: DPO with a stronger penalty on leaving the reference."""

    config: ChiPOConfig
    config_class = ChiPOConfig

    def pair_losses(self, chosen: Tensor, rejected: Tensor, counts: Tensor, beta: float | Tensor) -> Tensor:
        """(n,) losses of log-ratios, chosen (n,) and rejected (n, M), averaged where ``counts`` (n, M) is True."""
        scale = torch.as_tensor(beta, device=chosen.device).view(-1, 1)
        margins = scale * (phi(chosen)[:, None] - phi(rejected))
        bound = 2 * self.config.clip
        return masked_mean(-logsigmoid(margins.clamp(-bound, bound)), counts, 1)


def phi(log_ratio: Tensor) -> Tensor:
    """z + log z for z = exp(log_ratio); the bound on z is far beyond any clip."""
    return log_ratio.clamp(max=20.0).exp() + log_ratio
