"""KL estimators: values, and the expected gradient of every form in every placement, enumerated exactly."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.estimators import (
    categorical_kl,
    clipped_surrogate,
    gaussian_kl,
    gaussian_log_prob,
    importance_ratio,
    kl,
    kl_gradient_coefficient,
    kl_loss,
    kl_reward,
    kl_value,
    reward_to_go,
    score_function_loss,
)
from tests.helpers.oracles import F64, FILLS, assert_compiles, assert_same, randn, refused, tensor, unmoved_by

KINDS = kl.KINDS
FORMS = [(kind, gradient) for kind in KINDS for gradient in ("unbiased", "direct")]


class Softmax:
    """Four actions; ``old`` is the policy itself, or a third one. The reference is far: clipping at 2 has an effect."""

    def __init__(self, seed, off_policy):
        self.theta = randn(4, seed=seed).requires_grad_()
        self.logits_ref = 1.5 * randn(4, seed=seed + 100)
        self.logp, self.ref = self.theta.log_softmax(0), self.logits_ref.log_softmax(0)
        self.old = randn(4, seed=seed + 200).log_softmax(0) if off_policy else self.logp.detach()

    def gradient(self, scalar):
        return torch.autograd.grad(scalar, self.theta, retain_graph=True)[0]

    def expected(self, losses):
        """Gradient of the expected loss over actions drawn from ``old``; the losses are (4,), one an action."""
        return self.gradient((self.old.exp() * losses).sum())

    def divergence(self, first, second):
        return self.gradient((first.exp() * (first - second)).sum())

    @property
    def exact(self):
        return self.divergence(self.logp, self.ref)

    @property
    def reverse(self):
        return self.divergence(self.ref, self.logp)

    def pushed(self, penalty):
        """Gradient of the penalty in the reward, weighed by pi/pi_old as PPO does without its clip."""
        return self.expected(clipped_surrogate(self.logp, self.old, -penalty, clip=math.inf))


@pytest.fixture(params=[0, 1, 2])
def on(request):
    return Softmax(request.param, off_policy=False)


@pytest.fixture(params=[0, 1, 2])
def off(request):
    return Softmax(request.param, off_policy=True)


def _differ(a, b):
    assert (a - b).norm() > 0.01 * b.norm()


def test_on_policy_the_exact_forms_are_exact(on):
    assert_same(on.gradient(categorical_kl(on.theta, on.logits_ref)), on.exact)
    assert_same(on.pushed(kl_reward(on.old, on.ref)), on.exact)
    assert_same(on.expected(score_function_loss(on.logp, -kl_reward(on.old, on.ref))), on.exact)
    assert_same(on.expected(kl_loss(on.logp, on.ref)), on.exact)
    assert_same(on.expected(kl_loss(on.logp, on.ref, gradient="direct")), on.exact)
    for kind in ("k1", "k2", "k3", "k4"):
        assert_same(on.expected(kl_loss(on.logp, on.ref, kind=kind)), on.exact)
    assert on.exact.norm() > 0.1


def test_k1_in_the_reward_k2_and_weighted_k3_as_losses_agree_sample_by_sample(on):
    for action in range(4):
        one = torch.zeros(4, dtype=F64)
        one[action] = 1.0
        k1 = on.gradient((one * score_function_loss(on.logp, -kl_reward(on.old, on.ref))).sum())
        for kind in ("k2", "k3"):
            assert_same(on.gradient((one * kl_loss(on.logp, on.ref, kind=kind)).sum()), k1)


def test_on_policy_k1_as_a_loss_is_no_constraint(on):
    loss = kl_loss(on.logp, on.ref, kind="k1", gradient="direct", allow_biased=True)
    assert_same(on.expected(loss), torch.zeros(4, dtype=F64), rtol=0, atol=1e-15)


def test_on_policy_k3_as_a_loss_is_the_other_kl(on):
    for kind in ("k3", "k4"):
        assert_same(on.expected(kl_loss(on.logp, on.ref, kind=kind, gradient="direct", allow_biased=True)), on.reverse)
    assert_same(on.pushed(kl_gradient_coefficient(on.old, on.ref, "k3")), on.reverse)  # [002] eq. 35
    _differ(on.reverse, on.exact)


def test_on_policy_k2_and_k3_in_the_reward_have_their_documented_biases(on):
    k2 = 0.5 * (on.old - on.ref).square()
    assert_same(on.pushed(kl_reward(on.old, on.ref, "k2", allow_biased=True)), on.gradient((on.logp.exp() * k2).sum()))
    _differ(on.gradient((on.logp.exp() * k2).sum()), on.exact)
    for kind in ("k3", "k4"):
        assert_same(on.pushed(kl_reward(on.old, on.ref, kind, allow_biased=True)), on.exact - on.reverse)
    clipped = (on.ref - on.old).exp().clamp(max=2.0) - 1 + on.old - on.ref
    penalty = kl_reward(on.old, on.ref, "k3_clip", clip=2.0, allow_biased=True)
    assert_same(on.pushed(penalty), on.gradient((on.logp.exp() * clipped).sum()))


def test_on_policy_the_minimax_coefficient_is_the_squared_distance(on):
    loss = score_function_loss(on.logp, -kl_gradient_coefficient(on.logp, on.ref, "minimax"))
    assert_same(on.expected(loss), on.gradient(0.5 * (on.logp.exp() - on.ref.exp()).square().sum()))


def test_k3_clip_by_autograd_changes_sign_where_clipped(on):
    ratio = (on.ref - on.logp).exp()
    literal = on.expected(ratio.clamp(max=2.0) - 1 + on.logp - on.ref)
    direct = kl_loss(on.logp, on.ref, kind="k3_clip", gradient="direct", clip=2.0, allow_biased=True)
    assert_same(on.expected(direct), literal)
    weighed = kl_loss(on.logp, on.ref, kind="k3_clip", clip=2.0, allow_biased=True)
    assert_same(on.expected(weighed), on.expected((1 - ratio.clamp(max=2.0)).detach() * on.logp))
    coefficient = kl_gradient_coefficient(on.logp, on.ref, "k3_clip", clip=2.0)
    assert_same(coefficient, (1 - ratio.clamp(max=2.0)).detach())
    clipped = ratio > 2
    assert (torch.autograd.grad(direct.sum(), on.logp, retain_graph=True)[0][clipped] == 1).all()
    assert (coefficient[clipped] == -1).all()


def test_off_policy_the_weighed_losses_are_exact(off):
    for kind in ("k1", "k2", "k3", "k4"):
        assert_same(off.expected(kl_loss(off.logp, off.ref, logp_old=off.old, kind=kind)), off.exact)
    weight = importance_ratio(off.logp, off.old)
    assert_same(off.expected(weight.detach() * 0.5 * (off.logp - off.ref).square()), off.exact)
    assert_same(off.expected(weight * (off.logp - off.ref)), off.exact)
    k3 = (off.ref - off.logp).exp() - 1 + off.logp - off.ref
    assert_same(off.expected(weight * k3), off.exact)


def test_the_weighed_losses_are_what_autograd_makes_of_the_literal_formulas(off):
    weight, log_ratio = importance_ratio(off.logp, off.old), off.logp - off.ref
    literal = {
        "k1": weight * log_ratio,
        "k2": weight.detach() * 0.5 * log_ratio.square(),
        "k3": weight * ((-log_ratio).exp() - 1 + log_ratio),
    }
    for kind, loss in literal.items():
        ours = kl_loss(off.logp, off.ref, logp_old=off.old, kind=kind)
        assert_same(ours, loss)
        for action in range(4):
            assert_same(off.gradient(ours[action]), off.gradient(loss[action]))


def test_off_policy_biased_forms_have_their_documented_biases(off):
    weight, k2 = importance_ratio(off.logp, off.old), 0.5 * (off.logp - off.ref).square()
    unweighed = off.expected(kl_loss(off.logp, off.ref, logp_old=off.old, gradient="direct", allow_biased=True))
    assert_same(unweighed, off.expected(k2))
    _differ(unweighed, off.exact)
    assert_same(off.expected(weight * k2), off.gradient((off.logp.exp() * k2).sum()))
    _differ(off.expected(weight * k2), off.exact)
    k1 = kl_loss(off.logp, off.ref, kind="k1", gradient="direct", allow_biased=True)
    assert_same(off.expected(k1), -off.divergence(off.old, off.logp))  # descending it leaves pi_old
    k3 = kl_loss(off.logp, off.ref, kind="k3", gradient="direct", allow_biased=True)
    assert_same(off.expected(k3), off.expected((off.ref - off.logp).exp() - 1 + off.logp - off.ref))
    _differ(off.expected(k3), off.exact)


def test_off_policy_ppo_constrains_to_the_reference_less_the_sampling_policy(off):
    frozen = off.pushed(kl_reward(off.old, off.ref))
    assert_same(frozen, off.exact - off.divergence(off.logp, off.old))
    _differ(frozen, off.exact)
    moving = off.pushed(kl_reward(off.logp, off.ref))  # pi_theta inside R-hat, [002] eq. 39 as printed
    assert_same(moving, off.exact)
    eq35 = (off.logp.exp() * (1 - (off.ref - off.old).exp())).sum()
    assert_same(off.pushed(kl_gradient_coefficient(off.old, off.ref, "k3")), off.gradient(eq35))


def test_a_step_is_charged_with_later_steps_only_by_reward_to_go():
    """Two steps of two actions; the first decides which of two policies takes the second."""
    first, second = randn(2).requires_grad_(), randn(2, 2, seed=1).requires_grad_()
    ref_first, ref_second = randn(2, seed=2).log_softmax(0), 2 * randn(2, 2, seed=3).log_softmax(1)
    paths = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    logp = torch.stack([first.log_softmax(0)[paths[:, 0]], second.log_softmax(1)[paths[:, 0], paths[:, 1]]], 1)
    logp_ref = torch.stack([ref_first[paths[:, 0]], ref_second.log_softmax(1)[paths[:, 0], paths[:, 1]]], 1)

    def gradient(losses, chances):
        expected = (chances * losses.sum(1)).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(expected, (first, second), retain_graph=True)])

    exact = gradient(logp - logp_ref, logp.sum(1).exp())
    chances = logp.sum(1).exp().detach()
    to_go = gradient(score_function_loss(logp, -reward_to_go(kl_reward(logp, logp_ref))), chances)
    assert_same(to_go, exact)
    per_step = gradient(kl_loss(logp, logp_ref), chances)
    assert_same(per_step[2:], exact[2:])
    _differ(per_step[:2], exact[:2])


@pytest.mark.parametrize("std", [0.3, 1.0])
@pytest.mark.parametrize("gap", [(-0.7,), (2.0,), (0.05, -1.0), (0.5, 0.2, -0.4)])
def test_gaussian_k1_has_the_gradient_of_the_closed_form_and_the_documented_noise(std, gap):
    """Gauss-Hermite quadrature over the action noise, exact for the polynomials at hand; [000] eq. 31 and 76.

    The relative noise of one sample, tr Cov / |mean|², is d (1 + D²/4) + 1, and d + 1 with the KL as the baseline.
    """
    d = len(gap)
    nodes, weights = (torch.tensor(a, dtype=F64) for a in np.polynomial.hermite.hermgauss(4))
    noise = math.sqrt(2) * torch.cartesian_prod(*[nodes] * d).reshape(-1, d)
    chances = torch.cartesian_prod(*[weights / math.sqrt(math.pi)] * d).reshape(-1, d).prod(1)
    gap = torch.tensor(gap, dtype=F64)
    mean = torch.full((len(noise), d), 0.4, dtype=F64, requires_grad=True)
    mean_ref = mean.detach() - gap
    x = mean.detach() + std * noise
    logp, logp_ref = gaussian_log_prob(x, mean, std), gaussian_log_prob(x, mean_ref, std)
    closed_form = gaussian_kl(mean, mean_ref, std)
    (exact,) = torch.autograd.grad(closed_form.sum(), mean, retain_graph=True)
    assert_same(exact[0], gap / std**2)
    k1 = kl_reward(logp, logp_ref)
    squared_distance = (gap / std).square().sum().item()
    noisy = d * (1 + squared_distance / 4) + 1
    for loss, relative in (
        (score_function_loss(logp, -k1), noisy),
        (kl_loss(logp, logp_ref), noisy),
        (score_function_loss(logp, closed_form - k1), d + 1),
    ):
        (samples,) = torch.autograd.grad(loss.sum(), mean, retain_graph=True)
        expectation = (chances[:, None] * samples).sum(0)
        assert_same(expectation, exact[0], rtol=1e-11, atol=1e-11)
        variance = (chances * (samples - expectation).square().sum(1)).sum()
        assert (variance / expectation.square().sum()).item() == pytest.approx(relative, rel=1e-9)


@pytest.mark.parametrize("d", [1, 7])
def test_how_often_the_counterexample_of_eq_33_occurs(d):
    """mu < x < mu_ref and x nearer to mu, along the line between them: Phi(D/2) - 1/2, whatever d."""
    delta = randn(d, seed=5)
    distance = delta.norm()
    along = (randn(100_000, d, seed=6) @ delta) / distance
    chance = 0.5 * math.erf(distance.item() / 2 / math.sqrt(2))
    found = ((along > 0) & (along < distance - along)).double().mean().item()
    assert found == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 100_000))


def test_appendix_d_by_quadrature():
    """[002] appendix D: q = N(.1, .2) sampled, p = N(0, 1); bias and standard deviation over the true KL."""
    x = torch.linspace(-20, 20, 400_001, dtype=F64)[:, None]
    logq = gaussian_log_prob(x, torch.full_like(x, 0.1), 0.2)
    logp = gaussian_log_prob(x, torch.zeros_like(x), 1.0)
    weights = logq.exp() * 1e-4
    true = gaussian_kl(tensor([0.1]), torch.zeros(1, 1, dtype=F64), 0.2, 1.0).item()
    assert true == pytest.approx(1.134438, abs=5e-7)
    expected = {"k1": (0.0, 0.5986), "k2": (-0.2295, 0.5087), "k3_clip": (-0.4645, 0.4489)}
    for kind, (bias, std) in expected.items():
        value = kl_value(logq, logp, kind)
        mean = (weights * value).sum()
        assert (mean.item() - true) / true == pytest.approx(bias, abs=5e-5)
        assert ((weights * (value - mean) ** 2).sum().sqrt() / true).item() == pytest.approx(std, abs=5e-5)
    k3 = kl_value(logq, logp, "k3")
    assert (weights * k3).sum().item() == pytest.approx(true, rel=1e-9)
    moments = [(weights * k3.square())[(x[:, 0] - 0.1).abs() < width].sum().item() for width in (1, 2, 4)]
    assert moments[1] > 1e5 * moments[0] > 0  # the second moment diverges
    assert moments[2] > 1e5 * moments[1]


def test_expected_values(on):
    chances, log_ratio = on.logp.exp().detach(), (on.logp - on.ref).detach()
    true = (chances * log_ratio).sum()
    for kind in ("k1", "k3", "k4"):
        assert_same((chances * kl_value(on.logp, on.ref, kind)).sum(), true)
    assert_same((chances * kl_value(on.logp, on.ref, "k2")).sum(), (chances * 0.5 * log_ratio**2).sum())
    missing = (chances * ((-log_ratio).exp() - 2).clamp(min=0)).sum()
    assert missing > 0
    assert_same((chances * kl_value(on.logp, on.ref, "k3_clip", clip=2.0)).sum(), true - missing)


def test_values_by_hand():
    logp = tensor(-1.0, -1.0, -4.0)
    logp_ref = tensor(-1.0, -2.0, -1.0)
    expected = {
        "k1": [0.0, 1.0, -3.0],
        "k2": [0.0, 0.5, 4.5],
        "k3": [0.0, math.exp(-1), math.exp(3) - 4],
        "k4": [0.0, math.exp(-1), math.exp(3) - 4],
        "k3_clip": [0.0, math.exp(-1), 10 - 1 - 3.0],
    }
    for kind, values in expected.items():
        assert_same(kl_value(logp, logp_ref, kind), torch.tensor(values, dtype=F64))
        assert_same(kl_reward(logp, logp_ref, kind, allow_biased=True), torch.tensor(values, dtype=F64))
        loss = kl_loss(logp, logp_ref, logp_old=logp - math.log(2), kind=kind, allow_biased=True)
        assert_same(loss, 2 * torch.tensor(values, dtype=F64))
        loss = kl_loss(logp, logp_ref, logp_old=logp - 1, kind=kind, gradient="direct", allow_biased=True)
        assert_same(loss, torch.tensor(values, dtype=F64))
    coefficients = {
        "k1": [0.0, 1.0, -3.0],
        "k2": [0.0, 1.0, -3.0],
        "k3": [0.0, 1 - math.exp(-1), 1 - math.exp(3)],
        "k4": [0.0, 1 - math.exp(-1), 1 - math.exp(3)],
        "k3_clip": [0.0, 1 - math.exp(-1), -9.0],
        "minimax": [0.0, math.exp(-1) - math.exp(-2), math.exp(-4) - math.exp(-1)],
    }
    for kind, values in coefficients.items():
        assert_same(kl_gradient_coefficient(logp, logp_ref, kind), torch.tensor(values, dtype=F64))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6))
def test_k4_is_k3(log_ratios):
    logp = torch.tensor(log_ratios, dtype=F64)
    k1, k3 = (kl_value(logp, torch.zeros_like(logp), kind) for kind in ("k1", "k3"))
    seed = torch.where(k1 < 0, k3, torch.minimum(k1, k3))
    assert torch.equal(kl_value(logp, torch.zeros_like(logp), "k4"), seed)
    assert (k3 >= 0).all()


def _calls():
    for kind in KINDS:
        yield lambda a, b, c, kind=kind, **kw: kl_value(a, b, kind, **kw)
        yield lambda a, b, c, kind=kind, **kw: kl_reward(a, b, kind, allow_biased=True, **kw)
        yield lambda a, b, c, kind=kind, **kw: kl_gradient_coefficient(a, b, kind, **kw)
    yield lambda a, b, c, **kw: kl_gradient_coefficient(a, b, "minimax", **kw)


def _losses():
    for kind, gradient in FORMS:
        yield lambda a, b, c, kind=kind, gradient=gradient, **kw: kl_loss(
            a, b, logp_old=c, kind=kind, gradient=gradient, allow_biased=True, **kw
        )
        yield lambda a, b, c, kind=kind, gradient=gradient, **kw: kl_loss(
            a, b, kind=kind, gradient=gradient, allow_biased=True, **kw
        )


def test_only_the_trained_policy_has_a_gradient():
    tensors = [randn(2, 3, seed=s).requires_grad_() for s in range(3)]
    for call in _losses():
        gradients = torch.autograd.grad(call(*tensors).sum(), tensors, allow_unused=True)
        assert gradients[0].abs().max() > 0
        assert gradients[1] is None
        assert gradients[2] is None
    for call in _calls():
        assert not call(*tensors).requires_grad


@pytest.mark.parametrize("fill", FILLS)
def test_masked_entries_change_neither_value_nor_gradient(fill):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    clean = [randn(3, 3, seed=s) for s in range(3)]
    for call in [*_losses(), *_calls()]:
        value, *_ = unmoved_by(fill, mask, lambda *x, call=call: call(*x, mask=mask), *clean)
        assert (value[~mask] == 0).all()
        assert torch.equal(call(*clean)[mask], value[mask])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.floats(-100, 100)] * 3), max_size=5), st.sampled_from([torch.float32, F64]))
def test_extreme_log_probs_stay_finite_and_keep_their_gradient(rows, dtype):
    tensors = torch.tensor(rows, dtype=dtype).reshape(-1, 3).unbind(1)
    for call in [*_losses(), *_calls()]:
        logp = tensors[0].clone().requires_grad_()
        value = call(logp, *tensors[1:])
        assert value.isfinite().all()
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), logp)
            assert gradient.isfinite().all()
    ours = kl_loss(logp, tensors[1], kind="k3", gradient="direct", allow_biased=True)
    (gradient,) = torch.autograd.grad(ours.sum(), logp)
    assert torch.equal(gradient == 0, logp == tensors[1])  # the bound on r zeroes nothing


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 20.0), (F64, 600.0)])
def test_the_ratio_is_bounded_and_k3_stays_positive(dtype, bound):
    for log_ratio in (-bound - 1, -1e9):
        logp = torch.tensor([log_ratio], dtype=dtype)
        k3 = kl_value(logp, torch.zeros_like(logp), "k3")
        torch.testing.assert_close(k3, torch.tensor([math.expm1(bound) - bound], dtype=dtype))
        coefficient = kl_gradient_coefficient(logp, torch.zeros_like(logp), "k3")
        torch.testing.assert_close(coefficient, torch.tensor([-math.expm1(bound)], dtype=dtype))
        minimax = kl_gradient_coefficient(-logp, torch.zeros_like(logp), "minimax")
        torch.testing.assert_close(minimax, torch.tensor([math.expm1(bound)], dtype=dtype))


def test_the_bound_of_k3_clip_may_be_below_one_and_is_reached_at_equality():
    log_ratio = tensor(-math.log(10.0), 1.0)
    zeros = torch.zeros_like(log_ratio)
    assert kl_value(log_ratio, zeros, "k3_clip", clip=0.3)[1].item() == pytest.approx(0.3, abs=1e-12)
    log_ratio.requires_grad_()
    kl_loss(log_ratio, zeros, kind="k3_clip", gradient="direct", allow_biased=True).sum().backward()
    assert_same(log_ratio.grad, tensor(-9.0, 1 - math.exp(-1)))


def test_half_precision_is_widened():
    logp, ref = randn(3).bfloat16(), randn(3, seed=1).bfloat16()
    for call in [*_losses(), *_calls()]:
        value = call(logp, ref, logp)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, call(logp.float(), ref.float(), logp.float()))


def test_wrong_shapes_kinds_and_settings_are_named():
    x, column = torch.zeros(2, 3), torch.zeros(2, 1)
    for call in [*_losses(), *_calls()]:
        refused(r"\(2, 3\).*\(2, 1\)", call, x, column, x)
        refused("mask", call, x, x, x, mask=column.bool())
        refused("bool", call, x, x, x, mask=x)
        for clip in (0.0, -1.0, math.nan):
            refused("clip=", call, x, x, x, clip=clip)
    for gradient in ("unbiased", "direct"):
        refused(r"logp_old \(2, 1\)", kl_loss, x, x, logp_old=column, gradient=gradient, allow_biased=True)
    for call in (kl_value, kl_gradient_coefficient, kl_reward, lambda a, b, kind: kl_loss(a, b, kind=kind)):
        refused(r"kind='k5'.*'k1', 'k2', 'k3'", call, x, x, "k5")
    for call in (kl_value, kl_reward, lambda a, b, kind: kl_loss(a, b, kind=kind)):
        refused("kind='minimax'", call, x, x, "minimax")
    refused("gradient='exact'", kl_loss, x, x, gradient="exact")


BIASED = {
    "k1 direct": (lambda x: kl_loss(x, x, kind="k1", gradient="direct"), "expected gradient is 0"),
    "k2 direct": (lambda x: kl_loss(x, x, logp_old=x, gradient="direct"), "not weighed by pi/pi_old"),
    "k3 direct": (lambda x: kl_loss(x, x, kind="k3", gradient="direct"), r"grad KL\(ref\|\|pi\)"),
    "k4 direct": (lambda x: kl_loss(x, x, kind="k4", gradient="direct"), r"grad KL\(ref\|\|pi\)"),
    "k3_clip direct": (lambda x: kl_loss(x, x, kind="k3_clip", gradient="direct"), "changes sign"),
    "k3_clip unbiased": (lambda x: kl_loss(x, x, kind="k3_clip"), "clipped grad KL"),
    "k2 reward": (lambda x: kl_reward(x, x, "k2"), "sum over actions of pi l²/2 s"),
    "k3 reward": (lambda x: kl_reward(x, x, "k3"), r"grad KL\(pi\|\|ref\) - grad KL\(ref\|\|pi\)"),
    "k4 reward": (lambda x: kl_reward(x, x, "k4"), r"grad KL\(pi\|\|ref\) - grad KL\(ref\|\|pi\)"),
    "k3_clip reward": (lambda x: kl_reward(x, x, "k3_clip"), "clipped"),
}
UNBIASED = [
    lambda x: kl_loss(x, x),
    lambda x: kl_loss(x, x, logp_old=x),
    lambda x: kl_loss(x, x, gradient="direct"),
    lambda x: kl_loss(x, x, logp_old=x, kind="k1"),
    lambda x: kl_loss(x, x, logp_old=x, kind="k3"),
    lambda x: kl_loss(x, x, logp_old=x, kind="k4"),
    lambda x: kl_loss(x, x, kind="k1", gradient="direct", allow_biased=True),
    lambda x: kl_reward(x, x),
    lambda x: kl_reward(x, x, "k3", allow_biased=True),
    lambda x: kl_value(x, x, "k2"),
]


@pytest.mark.parametrize("name", BIASED)
def test_biased_forms_warn_once_naming_the_bias(name, monkeypatch):
    monkeypatch.setattr(kl, "_warned", set())
    call, bias = BIASED[name]
    with pytest.warns(UserWarning, match=bias) as caught:
        call(torch.zeros(2))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "allow_biased=True" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(torch.zeros(2))


def test_exact_and_silenced_forms_do_not_warn(monkeypatch):
    monkeypatch.setattr(kl, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in UNBIASED:
            call(torch.zeros(2))


@pytest.mark.parametrize(("kind", "gradient"), FORMS)
def test_kl_loss_compiles_without_a_graph_break(kind, gradient):
    logp, ref, old = (12 * randn(3, 4, seed=s) for s in range(3))
    given = {"logp_old": old, "kind": kind, "gradient": gradient, "mask": randn(3, 4, seed=3) > -1}
    assert_compiles(kl_loss, logp, ref, **given, allow_biased=True)


def test_a_biased_form_that_would_warn_compiles_too(monkeypatch):
    monkeypatch.setattr(kl, "_warned", set())
    torch._dynamo.reset()
    x = randn(4)
    compiled = torch.compile(kl_loss, backend="aot_eager", fullgraph=True)
    assert_same(
        compiled(x, x + 1, kind="k3", gradient="direct"),
        kl_loss(x, x + 1, kind="k3", gradient="direct", allow_biased=True),
    )
