"""Pure tensor functions shared by denoising and language policies: log-probs, KL, policy losses, advantages."""

from diffusion_align.estimators.advantages import gae, group_advantages, leave_one_out_advantages, reward_to_go
from diffusion_align.estimators.gaussian import gaussian_kl, gaussian_log_prob
from diffusion_align.estimators.kl import kl_reward
from diffusion_align.estimators.masked import aggregate, masked_mean, masked_sum, masked_whiten
from diffusion_align.estimators.policy import (
    clip_fractions,
    clipped_surrogate,
    importance_ratio,
    score_function_loss,
    value_loss,
)
from diffusion_align.estimators.preference import bradley_terry_loss
from diffusion_align.estimators.prompt_statistics import PromptStatistics

__all__ = [
    "PromptStatistics",
    "aggregate",
    "bradley_terry_loss",
    "clip_fractions",
    "clipped_surrogate",
    "gae",
    "gaussian_kl",
    "gaussian_log_prob",
    "group_advantages",
    "importance_ratio",
    "kl_reward",
    "leave_one_out_advantages",
    "masked_mean",
    "masked_sum",
    "masked_whiten",
    "reward_to_go",
    "score_function_loss",
    "value_loss",
]
