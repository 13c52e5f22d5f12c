"""A beta for each prompt ([003] §5): the network, what it is given, and the penalties it learns from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion_align.estimators import (
    BetaNetwork,
    beta_entropy_penalty,
    beta_factor,
    beta_range_penalty,
    beta_smoothness_penalty,
    categorical_entropy,
)
from diffusion_align.llm.policy import LanguagePolicy, Sequences
from diffusion_align.llm.settings import DynamicBetaConfig
from diffusion_align.training.randomness import generator


class DynamicBeta:
    """The network beta(x) in float32, and its part of a loss.

    Args:
        config: checked settings.
        dimensions: of the prompts' embeddings.
        beta: what beta(x) is before training.
        seed: of the network's weights, so that every process has the same.
        device: of the embeddings.
    """

    def __init__(
        self, config: DynamicBetaConfig, *, dimensions: int, beta: float, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator(seed, "beta network").get_state())
            network = BetaNetwork(dimensions, beta=beta, hidden=config.hidden)
        self.network = network.to(device)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"beta_network.{name}": parameter for name, parameter in self.network.named_parameters()}

    def __call__(self, embeddings: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """For prompts with embeddings (B, D) and the reference's entropy (B,), both detached.

        Returns:
            What multiplies h (B,), the weighted sum of the penalties (B,) with a gradient, and statistics (B,).
        """
        config = self.config
        x = embeddings.detach().to(next(self.network.parameters()).dtype).requires_grad_()
        beta = self.network(x)
        penalty = (
            config.range_weight * beta_range_penalty(beta, config.beta_min, config.beta_max)
            + config.smoothness_weight * beta_smoothness_penalty(beta, x)
            + config.entropy_weight * beta_entropy_penalty(beta, entropy.to(beta), config.alpha)
        )
        seen = beta.detach()
        statistics = {
            "beta/mean": seen,
            "beta/min": seen,
            "beta/max": seen,
            "beta/entropy": entropy.detach(),
            "loss/beta": penalty.detach(),
        }
        return beta_factor(beta, convention=config.convention, detach=config.detach), penalty, statistics


@torch.no_grad()
def prompt_features(policy: LanguagePolicy, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """(B, D) last hidden states at the last token of each prompt, and (B,) entropies of what follows it, nats.

    Of the policy as it is: call it under ``policy.reference()`` for the reference's.
    """
    length = int(sequences.starts.max()) + 1
    first = Sequences(sequences.ids[:, :length], sequences.starts, sequences.mask[:, :1])
    scored = policy.score(first, with_hidden=True, with_logits=True)
    assert scored.hidden is not None
    rows, last = torch.arange(len(first), device=first.ids.device), scored.places[:, 0]
    entropy = categorical_entropy(scored.logits[rows, last], temperature=policy.temperature)
    return scored.hidden[rows, last], entropy
