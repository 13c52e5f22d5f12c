"""beta(x): the network's start and independence of its batch, its penalties, its place in a preference loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import softplus

from diffusion_align.estimators import (
    BetaNetwork,
    beta_entropy_penalty,
    beta_factor,
    beta_range_penalty,
    beta_smoothness_penalty,
    dpo_loss,
)
from tests.helpers.oracles import F64, assert_same, randn, refused, tensor


def _trained(dimensions=4, hidden=6, beta=0.3):
    """A network off its start, in float64."""
    torch.manual_seed(0)
    network = BetaNetwork(dimensions, beta=beta, hidden=hidden).double()
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(0.5 * randn(*parameter.shape, seed=i))
    return network


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.1, 1.0, 5.0, 20.0, 50.0, 1e4])
@pytest.mark.parametrize("dimensions", [2, 7])
def test_every_prompt_starts_at_beta(beta, dimensions):
    embeddings = torch.cat([torch.randn(5, dimensions), torch.zeros(1, dimensions), torch.full((1, dimensions), 1e6)])
    result = BetaNetwork(dimensions, beta=beta)(embeddings)
    assert result.shape == (7,)
    assert (result == result[0]).all()
    assert result[0].item() == pytest.approx(beta, rel=5e-7)  # the rounding of float32
    assert BetaNetwork(dimensions)(embeddings).tolist() == pytest.approx([0.1] * 7, rel=5e-7)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 4), max_size=4), st.integers(0, 5))
def test_beta_is_positive_for_any_prompt_and_its_slope_finite(rows, seed):
    torch.manual_seed(seed)
    network = BetaNetwork(4, beta=1e-3)
    torch.nn.init.normal_(network.layers[-1].weight)
    embeddings = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4).requires_grad_()
    beta = network(embeddings)
    assert beta.shape == (len(rows),)
    assert (beta > 0).all()
    penalty = beta_smoothness_penalty(beta, embeddings)
    penalty.sum().backward()
    assert penalty.shape == (len(rows),)
    assert penalty.isfinite().all()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_a_prompts_beta_and_slope_do_not_depend_on_its_batch():
    network, embeddings = _trained(), randn(5, 4)
    changed = embeddings.clone()
    changed[2] = 100 * randn(4, seed=9)
    results = []
    for x in (embeddings, changed):
        x.requires_grad_()
        beta = network(x)
        results.append((beta.detach(), beta_smoothness_penalty(beta, x).detach()))
    others = torch.tensor([0, 1, 3, 4])
    for before, after in zip(*results):
        assert torch.equal(before[others], after[others])
        assert before[2] != after[2]
    assert results[0][0].unique().numel() == 5
    for i in range(5):
        x = embeddings.detach()[[i]].requires_grad_()
        beta = network(x)
        assert_same(beta, results[0][0][[i]])
        assert_same(beta_smoothness_penalty(beta, x), results[0][1][[i]])
    network.train()
    trained = network(embeddings)
    assert torch.equal(network.eval()(embeddings), trained)


def test_a_network_comes_back_from_its_state():
    network, embeddings = _trained(), randn(3, 4)
    other = BetaNetwork(4, beta=7.0, hidden=6).double()
    assert not torch.equal(other(embeddings), network(embeddings))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(embeddings), network(embeddings))


def test_bad_settings_and_embeddings_of_the_network_are_named():
    for beta in (0.0, -1.0, math.nan, math.inf):
        refused(f"beta={beta}", BetaNetwork, 4, beta=beta)
    refused("dimensions=0", BetaNetwork, 0)
    refused("hidden=0", BetaNetwork, 4, hidden=0)
    refused("dimensions", BetaNetwork, 1)  # LayerNorm makes a single number 0
    for shape in ((3, 5), (4,), (2, 3, 4)):
        refused(r"expected embeddings \(B, 4\)", BetaNetwork(4), torch.zeros(shape))


def test_both_conventions_and_their_gradients():
    for convention, value, slope in (
        ("product", lambda b: b, lambda b: b**0),
        ("inverse", lambda b: 1 / b, lambda b: -1 / b**2),
    ):
        beta = randn(5).exp().requires_grad_()
        factor = beta_factor(beta, convention=convention, detach=False)
        assert_same(factor, value(beta))
        factor.sum().backward()
        assert_same(beta.grad, slope(beta.detach()))
        detached = beta_factor(beta, convention=convention)
        assert torch.equal(detached, factor)
        assert not detached.requires_grad
    assert torch.equal(beta_factor(beta), beta)
    assert beta_factor(torch.ones(2).half()).dtype == torch.float32
    assert beta_factor(torch.ones(0)).shape == (0,)
    refused("convention='divide'", beta_factor, beta, convention="divide")


@pytest.mark.parametrize("convention", ["product", "inverse"])
def test_a_preference_loss_trains_beta_only_if_it_is_told_to(convention):
    network, embeddings = _trained(), randn(6, 4)
    chosen, rejected = randn(6, seed=1).requires_grad_(), randn(6, seed=2).requires_grad_()
    beta = network(embeddings)
    h = chosen - rejected
    factor = beta if convention == "product" else 1 / beta
    for detach in (True, False):
        loss = dpo_loss(chosen, rejected, beta_factor(beta, convention=convention, detach=detach))
        expected = softplus(-factor * h)
        assert_same(loss, expected)
        inputs = [chosen, rejected, *network.parameters()]
        ours = torch.autograd.grad(loss.sum(), inputs, retain_graph=True, allow_unused=detach)
        theirs = torch.autograd.grad(expected.sum(), inputs, retain_graph=True)
        for i, (a, b) in enumerate(zip(ours, theirs)):
            if detach and i > 1:
                assert a is None
                assert b.abs().max() > 1e-6
            else:
                assert_same(a, b)


def test_beta_trained_by_the_preference_loss_runs_to_a_bound():
    """The slope in beta is -h sigmoid(-beta h): of one sign wherever the pair is ordered right, whatever beta is."""
    h = tensor(0.5, 2.0, -0.5)
    for value in (1e-3, 0.1, 10.0):
        beta = torch.full((3,), value, dtype=F64, requires_grad=True)
        loss = dpo_loss(h, torch.zeros(3, dtype=F64), beta_factor(beta, detach=False))
        loss.sum().backward()
        assert_same(beta.grad, -h * torch.sigmoid(-value * h))
        assert (beta.grad * h < 0).all()


def test_range_penalty_value_and_gradient():
    beta = torch.tensor([0.01, 0.05, 0.2, 0.5, 0.75], dtype=F64, requires_grad=True)
    penalty = beta_range_penalty(beta, 0.05, 0.5)
    assert penalty.tolist() == pytest.approx([0.04, 0, 0, 0, 0.25], abs=1e-15)
    penalty.sum().backward()
    assert beta.grad.tolist() == [-1, 0, 0, 0, 1]
    assert beta_range_penalty(beta, 0.0, math.inf).tolist() == [0.0] * 5
    assert beta_range_penalty(beta, 0.2, 0.2).tolist() == pytest.approx([0.19, 0.15, 0, 0.3, 0.55], abs=1e-15)
    for low, high in ((0.5, 0.1), (-0.1, 0.5), (math.nan, 0.5), (0.1, math.nan)):
        refused(r"beta_min=.*beta_max=", beta_range_penalty, beta, low, high)


def test_entropy_penalty_value_and_gradient():
    beta, entropy = randn(5).exp().requires_grad_(), randn(5, seed=1).exp().requires_grad_()
    penalty = beta_entropy_penalty(beta, entropy, 0.3)
    assert_same(penalty, beta**2 - 0.6 * beta * entropy + 0.09 * entropy**2)
    penalty.sum().backward()
    assert_same(beta.grad, (2 * beta - 0.6 * entropy).detach())
    assert entropy.grad is None
    assert beta_entropy_penalty(torch.tensor([0.6]), torch.tensor([2.0]), 0.3).item() == pytest.approx(0, abs=1e-12)
    assert_same(beta_entropy_penalty(beta, entropy, 0.0), beta.square())
    for bad in (torch.ones(1), torch.ones(5, 1)):
        refused(r"beta \(5,\), entropy", beta_entropy_penalty, beta, bad, 0.3)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1e4, width=32), st.floats(0, 1e4, width=32)), max_size=3))
def test_penalties_of_extreme_betas_stay_finite(rows):
    beta, entropy = torch.tensor(rows, dtype=torch.float32).reshape(-1, 2).unbind(1)
    beta = beta.clone().requires_grad_()
    for penalty in (beta_range_penalty(beta, 0.01, 10.0), beta_entropy_penalty(beta, entropy, 0.1)):
        assert penalty.shape == beta.shape
        assert penalty.isfinite().all()
        assert torch.autograd.grad(penalty.sum(), beta)[0].isfinite().all()


def test_smoothness_of_a_known_function_and_its_gradient():
    """beta = softplus(w x): its slope is sigmoid(w x) w."""
    w, x = randn(3).requires_grad_(), randn(5, 3, seed=1).requires_grad_()
    penalty = beta_smoothness_penalty(softplus(x @ w), x)
    slope = torch.sigmoid(x @ w)
    assert_same(penalty, slope**2 * (w**2).sum())
    ours = torch.autograd.grad(penalty.sum(), (w, x), retain_graph=True)
    theirs = torch.autograd.grad((slope**2 * (w**2).sum()).sum(), (w, x))
    assert_same(ours, theirs)


def test_smoothness_is_the_squared_slope_of_the_network_by_differences():
    network, x = _trained(), randn(3, 4)
    x.requires_grad_()
    penalty = beta_smoothness_penalty(network(x), x)
    with torch.no_grad():
        step = 1e-6 * torch.eye(4, dtype=F64)
        slopes = torch.stack([(network(x + s) - network(x - s)) / 2e-6 for s in step], 1)
    assert_same(penalty, slopes.square().sum(1), rtol=1e-7, atol=1e-9)
    assert (penalty > 1e-4).all()


def test_smoothness_trains_the_network():
    network, x = _trained(3, 4), randn(2, 3).requires_grad_()
    names, parameters = zip(*network.named_parameters())

    def penalty(*values):
        return beta_smoothness_penalty(functional_call(network, dict(zip(names, values)), (x,)), x)

    assert torch.autograd.gradcheck(penalty, tuple(p.detach().requires_grad_() for p in parameters))
    gradients = torch.autograd.grad(beta_smoothness_penalty(network(x), x).sum(), parameters)
    for parameter, gradient in zip(parameters, gradients):
        assert gradient.shape == parameter.shape
    before = beta_smoothness_penalty(network(x), x).sum()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            parameter.sub_(1e-3 * gradient)
    assert beta_smoothness_penalty(network(x), x).sum() < before


def test_smoothness_needs_betas_of_its_embeddings():
    x = torch.randn(3, 4, requires_grad=True)
    beta = x.sum(1)
    for bad in ((beta, x[:2]), (beta[:, None], x), (beta, beta), (beta, x[:, :, None])):
        refused(r"beta \(B,\) and embeddings \(B, D\)", beta_smoothness_penalty, *bad)
    for bad in ((beta.detach(), x), (beta, x.detach())):
        refused("require a gradient", beta_smoothness_penalty, *bad)
    none = torch.zeros(0, 4, requires_grad=True)
    assert beta_smoothness_penalty(none.sum(1), none).shape == (0,)


def test_penalties_refuse_other_shapes_settings_and_unrelated_embeddings():
    refused("1 dimension", beta_range_penalty, torch.ones(2, 3), 0.0, 0.5)
    refused("1 dimension", beta_entropy_penalty, torch.ones(2, 3), torch.ones(2, 3), 1.0)
    for alpha in (-1.0, float("nan"), float("inf")):
        refused("alpha=", beta_entropy_penalty, torch.ones(2), torch.ones(2), alpha)
    with pytest.raises(ValueError, match="not computed from these"):
        beta_smoothness_penalty(torch.ones(2, requires_grad=True) * 1.0, torch.ones(2, 3, requires_grad=True))
    assert BetaNetwork(4).bfloat16()(torch.zeros(1, 4).bfloat16()).dtype == torch.float32


def test_half_precision_betas_are_widened_and_one_hidden_unit_is_enough():
    beta = torch.tensor([0.1013, 0.7]).bfloat16()
    wide = beta.float()
    for narrow, exact in (
        (beta_range_penalty(beta, 0.2003, 0.6003), beta_range_penalty(wide, 0.2003, 0.6003)),
        (beta_entropy_penalty(beta, beta, 0.3), beta_entropy_penalty(wide, wide, 0.3)),
        (beta_factor(beta, convention="inverse"), beta_factor(wide, convention="inverse")),
    ):
        assert narrow.dtype == torch.float32
        assert_same(narrow, exact, rtol=1e-6, atol=1e-7)
    assert BetaNetwork(3, hidden=1)(torch.zeros(2, 3)).shape == (2,)
