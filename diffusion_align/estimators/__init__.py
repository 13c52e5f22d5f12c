"""Pure tensor functions shared by denoising and language policies: log-probs, KL, advantages, policy and preference
losses. Results are float32 or wider; wrong shapes and settings out of their range are a ``ValueError``.
"""

# ruff: noqa: F401
from diffusion_align.estimators.advantages import (
    PromptStatistics,
    gae,
    group_advantages,
    leave_one_out_advantages,
    multi_reward_advantages,
    reward_to_go,
    softmax_weights,
)
from diffusion_align.estimators.categorical import (
    categorical_entropy,
    categorical_kl,
    categorical_log_probs,
    linear_log_probs_and_entropy,
    linear_token_log_probs,
    token_log_probs,
)
from diffusion_align.estimators.diffusion_preference import (
    beta_in_nats,
    corrected_diffusion_dpo_loss,
    diffusion_dpo_loss,
)
from diffusion_align.estimators.dynamic_beta import (
    BetaNetwork,
    beta_entropy_penalty,
    beta_factor,
    beta_range_penalty,
    beta_smoothness_penalty,
)
from diffusion_align.estimators.gaussian import gaussian_kl, gaussian_log_prob
from diffusion_align.estimators.kl import kl_gradient_coefficient, kl_loss, kl_reward, kl_value
from diffusion_align.estimators.masked import aggregate, masked_mean, masked_sum, masked_whiten
from diffusion_align.estimators.matching import (
    centred_reward_loss,
    group_preference_weights,
    likelihood_weight,
    matching_error,
    nft_loss,
    nft_loss_as_trust_region,
    reward_probability,
)
from diffusion_align.estimators.policy import (
    clip_fractions,
    clipped_ratio_loss,
    clipped_ratios,
    clipped_surrogate,
    importance_ratio,
    score_function_loss,
    value_loss,
)
from diffusion_align.estimators.preference import (
    bradley_terry_loss,
    dpo_loss,
    fit_bradley_terry,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    rso_accept,
    simpo_loss,
    trajectory_dpo_loss,
)
from diffusion_align.estimators.trust_region import divergence_mask, guarded_ratio


def __getattr__(name: str) -> object:
    """The former name of a function."""
    if name == "several_rewards_advantages":
        return multi_reward_advantages
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
