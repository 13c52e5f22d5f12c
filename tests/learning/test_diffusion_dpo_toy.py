"""Diffusion-DPO against the optimum of RLHF, where that is known: linear, Gaussian, one-dimensional.

Data and reference N(0, 1), reward x_0, beta 1, so the optimum is N(1, 1): E r = 1, KL = 1/2. The policy adds
``shift + slope x_t`` to the reference's mean of each step. What it attains follows from a recursion, without sampling.
The losses alone are trained here, and the trainer by scripts/dpo_toy.py. Run with -m slow.
"""

import math
import runpy
from pathlib import Path

import pytest
import torch

from diffusion_align.estimators import corrected_diffusion_dpo_loss, diffusion_dpo_loss

TOY = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "dpo_toy.py"))
pytestmark = pytest.mark.slow
F64 = torch.float64
T, LINEAR = TOY["T"], TOY["EVEN"]  # alphas_cumprod, 1 for the data
COSINE = torch.cos(torch.linspace(0, math.pi / 2, T + 1, dtype=F64)).square().clamp(min=1e-5)


class Chain(TOY["Chain"]):
    """The reverse of the noising process, from noise to data."""

    def __init__(self, signal):
        super().__init__(signal)
        self.ab_t, self.x_t_weight = self.alpha_t**2, self.schedule.table.x_t_weight

    def batch(self, n, generator, shared_noise):
        """Step, x_t and the posterior mean of x_s, for winners (row 0) and losers of fresh pairs."""
        t = torch.randint(T, (n,), generator=generator)
        x_0 = torch.randn(2, n, generator=generator, dtype=F64)
        first_wins = torch.rand(n, generator=generator, dtype=F64) < torch.sigmoid(x_0[0] - x_0[1])
        x_0 = torch.where(first_wins, x_0, x_0.flip(0))
        noise = torch.randn(1 if shared_noise else 2, n, generator=generator, dtype=F64)
        x_t = self.ab_t[t].sqrt() * x_0 + (1 - self.ab_t[t]).sqrt() * noise
        return t, x_t, self.x_0_weight[t] * x_0 + self.x_t_weight[t] * x_t


def train(chain, loss, *, steps=1000, shared_noise=True, with_slope=False, scale=None, n=4096):
    """Adam with a falling rate. ``scale`` times the nats of a random step stands for the sum over steps (default T)."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.zeros(T, dtype=F64, requires_grad=True)
    slope = torch.zeros(T, dtype=F64, requires_grad=with_slope)
    scale = torch.full((T,), float(T), dtype=F64) if scale is None else scale
    optimizer = torch.optim.Adam([shift, slope] if with_slope else [shift], lr=0.02)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    for _ in range(steps):
        t, x_t, target = chain.batch(n, generator, shared_noise)
        change = shift[t] + slope[t] * x_t
        per_nat = scale[t] / (2 * chain.var[t])
        err_ref = (target - chain.gain[t] * x_t).square() * per_nat
        err = (target - chain.gain[t] * x_t - change).square() * per_nat
        optimizer.zero_grad()
        loss(err, err_ref, change.square() * per_nat).mean().backward()
        optimizer.step()
        falling.step()
    return shift.detach(), slope.detach()


def original(err, err_ref, kl):
    return diffusion_dpo_loss(err[0], err_ref[0], err[1], err_ref[1], 1.0)


def corrected(kl_coef):
    return lambda err, err_ref, kl: corrected_diffusion_dpo_loss(*err, *kl, 1.0) + kl_coef * (kl[0] + kl[1]) / 2


def mean_gap_of_winners():
    """E(x_w - x_l), by quadrature: E of d tanh(d/2), d ~ N(0, 2)."""
    d = torch.linspace(-15, 15, 30_001, dtype=F64)
    density = (-d.square() / 4).exp()
    return float((d * torch.tanh(d / 2) * density).sum() / density.sum())


@pytest.mark.parametrize("with_slope", [False, True])
def test_the_original_reaches_the_optimum(with_slope):
    chain = Chain(LINEAR)
    shift, slope = train(chain, original, with_slope=with_slope)
    reward, var, kl = chain.attained(shift, slope)
    assert reward == pytest.approx(1, rel=0.05)
    assert var == pytest.approx(1, rel=0.05)
    assert kl == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(shift, 1 / (T * chain.ab_s.sqrt()), rtol=0.15, atol=0)


def test_noise_of_their_own_costs_half_the_reward():
    chain = Chain(LINEAR)
    reward, _, _ = chain.attained(*train(chain, original, shared_noise=False))
    assert reward == pytest.approx(0.46, abs=0.04)


def test_one_step_in_place_of_all_is_exact_only_where_each_has_its_share():
    """T times a step's nats allots 1/T of the reward to it, and the KL is sum_t 1/(2 T² (ab_s - ab_t)) >= 1/2: equal
    only if alphas_cumprod falls evenly. Divided by its share ab_s - ab_t instead, any schedule reaches the optimum."""
    chain = Chain(COSINE)
    share = (chain.ab_s - chain.ab_t) / (1 - chain.ab_t[0])
    reward, _, kl = chain.attained(*train(chain, original))
    assert reward == pytest.approx(1, rel=0.05)
    assert kl == pytest.approx(float((0.5 / T**2 / (chain.ab_s - chain.ab_t)).sum()), rel=0.1)
    assert kl > 0.85
    reward, _, kl = chain.attained(*train(chain, original, scale=1 / share))
    assert reward == pytest.approx(1, rel=0.05)
    assert kl == pytest.approx(0.5, rel=0.1)


def test_the_corrected_loss_has_no_minimum():
    chain = Chain(LINEAR)
    short, long = (chain.attained(*train(chain, corrected(0.0), steps=n))[0] for n in (250, 1000))
    assert short > 20
    assert long > 3 * short
    reward, _, kl = chain.attained(*train(chain, corrected(0.0), with_slope=True))
    assert abs(reward) > 1e6
    assert kl > 1e12


@pytest.mark.parametrize("kl_coef", [1.0, 2.0, 4.0])
def test_shifts_alone_come_to_rest_with_any_kl_term_short_of_the_optimum(kl_coef):
    """The weights stay 1/2 and the fixed point is linear: E r = E(x_w - x_l) beta/(2 kl_coef), .181 at 2 beta."""
    chain = Chain(LINEAR)
    reward, _, kl = chain.attained(*train(chain, corrected(kl_coef)))
    assert reward == pytest.approx(mean_gap_of_winners() / (2 * kl_coef), rel=0.05)
    assert kl == pytest.approx(reward**2 / 2, rel=0.1)


def test_with_slopes_a_small_kl_term_does_not_hold_and_twice_beta_does():
    chain = Chain(LINEAR)
    reward, _, kl = chain.attained(*train(chain, corrected(0.5), with_slope=True))
    assert abs(reward) > 1e6
    reward, var, kl = chain.attained(*train(chain, corrected(2.0), with_slope=True))
    assert reward == pytest.approx(mean_gap_of_winners() / 4, rel=0.1)
    assert var == pytest.approx(1, rel=0.1)
    assert kl < 0.05


def test_the_trainer_reaches_the_optimum():
    outcome = TOY["train"](LINEAR, with_slope=True)
    assert outcome.stopped is None
    assert outcome.reward[-1] == pytest.approx(1, rel=0.05)
    assert outcome.variance[-1] == pytest.approx(1, rel=0.05)
    assert outcome.kl[-1] == pytest.approx(0.5, rel=0.1)


def test_swapped_labels_go_as_far_the_other_way():
    outcome = TOY["train"](LINEAR, swapped=True)
    assert outcome.reward[-1] == pytest.approx(-1, rel=0.05)
    assert outcome.kl[-1] == pytest.approx(0.5, rel=0.1)


def test_the_corrected_loss_without_a_kl_term_diverges_and_the_guard_stops_it():
    outcome = TOY["train"](LINEAR, with_slope=True, variant="corrected", kl_coef=0.0)
    assert len(outcome.reward) < 400
    assert outcome.stopped.startswith("the policy diverges: its error on the chosen images is")
    assert "raise kl_coef (2 beta or more)" in outcome.stopped


def test_the_corrected_loss_with_its_default_kl_term_comes_to_rest():
    outcome = TOY["train"](LINEAR, with_slope=True, variant="corrected")
    assert outcome.stopped is None
    assert outcome.reward[-1] == pytest.approx(0.181, rel=0.15)  # E(x_w - x_l) beta / (2 kl_coef)
    assert outcome.variance[-1] == pytest.approx(1, rel=0.1)
    assert outcome.kl[-1] < 0.05
    middle = len(outcome.reward) // 2
    assert abs(outcome.reward[-1] - outcome.reward[middle]) < 0.05
