"""Trajectories from one start: partition functions telescope, and the loss is stationary at the soft optimum."""

import itertools

import pytest
import torch
from oracles import F64, assert_same, randn

from diffusion_align.estimators import trajectory_dpo_loss

BETA = 0.7


@pytest.fixture
def tree():
    """Three steps of two actions, each node with its own rewards and reference; the soft optimum backwards."""
    rewards = [randn(2**t, 2, seed=t) for t in range(3)]
    reference = [randn(2**t, 2, seed=10 + t).log_softmax(1) for t in range(3)]
    value, optimum = torch.zeros(8, dtype=F64), []
    for reward, ref in zip(reversed(rewards), reversed(reference)):
        q = reward + value.reshape(-1, 2)
        value = BETA * (ref + q / BETA).logsumexp(1)
        optimum.insert(0, ref + (q - value.unsqueeze(1)) / BETA)
    return rewards, reference, optimum, value


def _along(tables, path):
    node, found = 0, []
    for table, action in zip(tables, path):
        found.append(table[node, action])
        node = 2 * node + action
    return torch.stack(found)


def test_log_ratios_of_whole_trajectories_are_returns_less_the_value_of_the_start(tree):
    rewards, reference, optimum, start = tree
    for path in itertools.product(range(2), repeat=3):
        log_ratio = _along(optimum, path) - _along(reference, path)
        expected = _along(rewards, path).sum() - start[0]
        assert_same(BETA * log_ratio.sum(), expected)
    soft_advantage = BETA * (optimum[0] - reference[0])
    kl = (optimum[0].exp() * (optimum[0] - reference[0])).sum()
    assert_same((optimum[0].exp() * soft_advantage).sum(), BETA * kl)
    assert kl > 0.01


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_loss_is_stationary_exactly_at_the_optimum(tree, shift):
    rewards, reference, optimum, _ = tree
    logits = [(table + shift * randn(*table.shape, seed=20)).requires_grad_() for table in optimum]
    policy = [table.log_softmax(1) for table in logits]
    paths = list(itertools.product(range(2), repeat=3))
    first, second = zip(*itertools.combinations(paths, 2))
    log_ratios = [torch.stack([_along(policy, p) - _along(reference, p) for p in side]) for side in (first, second)]
    returns = [torch.stack([_along(rewards, p).sum() for p in side]) for side in (first, second)]
    labels = torch.sigmoid(returns[0] - returns[1])
    loss = trajectory_dpo_loss(*log_ratios, labels, BETA)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), logits)]).norm()
    assert slope < 1e-12 if shift == 0 else slope > 0.01
