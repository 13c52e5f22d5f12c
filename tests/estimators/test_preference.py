"""Pair losses: Bradley-Terry."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.estimators import bradley_terry_loss


def test_bradley_terry_value_and_gradient():
    chosen = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected)
    expected = [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(4))]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    loss.sum().backward()
    slope = torch.sigmoid(rejected - chosen).detach()
    torch.testing.assert_close(chosen.grad, -slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rejected.grad, slope, rtol=1e-12, atol=1e-12)


def test_bradley_terry_refuses_shapes_that_would_broadcast():
    for rejected in (torch.zeros(1), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=r"chosen \(3,\), rejected"):
            bradley_terry_loss(torch.zeros(3), rejected)
    assert bradley_terry_loss(torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert bradley_terry_loss(torch.zeros(1).half(), torch.zeros(1).half()).dtype == torch.float32


@settings(deadline=None, max_examples=50)
@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_bradley_terry_extreme_scores_stay_finite(a, b):
    chosen = torch.tensor([a], dtype=torch.float32, requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([b], dtype=torch.float32))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert chosen.grad.isfinite().all()
