"""Losses on pairs of a chosen and a rejected sample."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_align.estimators._checks import check_shapes, widen


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Negative log-likelihood in nats that ``chosen`` beats ``rejected``: ``-log sigmoid(chosen - rejected)``.

    Bradley & Terry 1952; [004] prints ``-sigmoid(rejected - chosen)``, which trains towards the loser.

    Args:
        chosen: (B,) scores (log-strengths); a gradient flows.
        rejected: (B,) scores; a gradient flows.

    Returns:
        (B,) nats, float32 or wider.

    Raises:
        ValueError: on different shapes.
    """
    check_shapes(ndim=1, chosen=chosen, rejected=rejected)
    return -logsigmoid(widen(chosen) - widen(rejected))
