"""What the forward-process methods make of the matching errors of an image, noised to a level and predicted there.

At the old policy all have the gradient of ``A err``, with ``A`` the advantage and ``err`` the mean squared error: an
image better than the others is learned from, a worse one unlearned. They differ in how far they then go.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from diffusion_align.diffusion.forward_settings import ForwardConfig, Objective
from diffusion_align.estimators import (
    centred_reward_loss,
    clipped_surrogate,
    group_preference_weights,
    matching_error,
    nft_loss,
    reward_probability,
)
from diffusion_align.estimators.policy import LOG_CLAMP


@dataclass(frozen=True)
class Matching:
    """n noised images, or whole groups of them, and what two policies make of them.

    Attributes:
        output: (n, C, H, W) of the network, with a gradient.
        output_old: of the policy that sampled.
        target: what it should have been.
        advantages, group_ids: (n,) of the images.
        dimensions: numbers in a latent.
        nats: what a squared error of 1, summed over dimensions, costs in nats of a whole path.
    """

    output: Tensor
    output_old: Tensor
    target: Tensor
    advantages: Tensor
    group_ids: Tensor
    dimensions: int
    nats: float

    @cached_property
    def error(self) -> Tensor:
        """(n,) mean squared."""
        return matching_error(self.output, self.target)

    @cached_property
    def error_old(self) -> Tensor:
        return matching_error(self.output_old, self.target)

    @property
    def in_nats(self) -> float:
        """What a mean squared error of 1 costs in nats of a whole path."""
        return self.nats * self.dimensions


def nft(found: Matching, config: ForwardConfig) -> Tensor:
    """DiffusionNFT (arXiv:2509.16117): with probability r an image is one of the good, else of the bad ones."""
    probability = reward_probability(found.advantages, config.advantage_clip)
    losses = nft_loss(found.output, found.output_old, found.target, probability, config.strength)
    return config.advantage_clip * losses


def awm(found: Matching, config: ForwardConfig) -> Tensor:
    """Advantage-weighted matching (arXiv:2509.25050): PPO's clipped ratio, with the error in place of -log p."""
    bound = min(config.clip_nats / found.dimensions, LOG_CLAMP)  # beyond which no ratio is
    clip, clip_high = -math.expm1(-bound), math.expm1(bound)
    logp, logp_old = -found.nats * found.error, -found.nats * found.error_old
    return clipped_surrogate(logp, logp_old, found.advantages, clip=clip, clip_high=clip_high) / found.nats


def dgpo(found: Matching, config: ForwardConfig) -> Tensor:
    """Direct group preference optimization (arXiv:2510.08425): the good images of a group over its bad ones."""
    beta = config.strength * found.in_nats
    weights = group_preference_weights(found.error, found.error_old, found.advantages, found.group_ids, beta)
    return 2 * weights * found.advantages * found.error


def crd(found: Matching, config: ForwardConfig) -> Tensor:
    """Centred reward distillation (arXiv:2603.14128): the log-ratios of a group become its advantages over beta."""
    gain = found.in_nats * (found.error_old - found.error)
    return centred_reward_loss(gain, found.advantages, found.group_ids, config.strength) / found.in_nats


OBJECTIVES: dict[Objective, Callable[[Matching, ForwardConfig], Tensor]] = {
    "nft": nft,
    "awm": awm,
    "dgpo": dgpo,
    "crd": crd,
}
