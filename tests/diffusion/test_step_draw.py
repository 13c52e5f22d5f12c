"""How steps are drawn: exact probabilities, and draws that have them."""

import math

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from diffusion_align.diffusion.step_draw import draw_steps, step_probabilities

F64 = torch.float64
T = 1000
TRAINED = torch.arange(T - 1)  # the last step of a schedule is deterministic
EDGES = torch.tensor([0, 200, 300, 400, 450, 500, 550, 600, 700, 800, T])


def logit_normal_density(u):
    return torch.exp(-torch.logit(u).square() / 2) / (math.sqrt(2 * math.pi) * u * (1 - u))


def by_bin(probabilities, steps=TRAINED):
    """The probabilities between ``EDGES``."""
    return torch.stack([probabilities[(steps >= a) & (steps < b)].sum() for a, b in EDGES.unfold(0, 2, 1)])


def chi_square(steps, probabilities):
    wanted = len(steps) * by_bin(probabilities)
    found = torch.stack([((steps >= a) & (steps < b)).sum() for a, b in EDGES.unfold(0, 2, 1)])
    return float(((found - wanted).square() / wanted).sum())


def places(count, each=1):
    return torch.rand(count, each, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("first", "last"), [(0, 999), (0, 500), (200, 900), (990, 999)])
def test_probabilities_are_integrals_of_the_density_over_each_step(first, last):
    steps = torch.arange(first, last)
    inner = (torch.arange(1000, dtype=F64) + 0.5) / 1000  # the midpoint rule
    inside = torch.stack([logit_normal_density((i + inner) / T).mean() / T for i in steps])
    found = step_probabilities("logit_normal", steps, T)
    torch.testing.assert_close(found, inside / inside.sum(), atol=1e-12, rtol=1e-6)
    assert found.sum().item() == pytest.approx(1, abs=1e-14)
    assert (found > 0).all()


def test_the_middle_is_likely_and_both_ends_are_alike():
    whole = step_probabilities("logit_normal", torch.arange(T), T)
    torch.testing.assert_close(whole, whole.flip(0), atol=1e-15, rtol=0)
    assert whole[500].item() == pytest.approx(4 / math.sqrt(2 * math.pi) / T, rel=1e-5)
    assert whole[-10:].sum() < 3e-6  # where half of the nats are, see docs/mathematics/diffusion_dpo.md
    even = step_probabilities("uniform", TRAINED, T)
    assert even.tolist() == [1 / 999] * 999


@pytest.mark.parametrize("each", [1, 4])
def test_draws_have_these_probabilities(each):
    """Chi-square of 10 bins, n = 20 000, seed 0. At p = 1e-4 a location of .07 or a scale of 1.06 in place of 0 and 1
    is found with a power above .999; the even draw is told apart at once."""
    probabilities = step_probabilities("logit_normal", TRAINED, T)
    rows = [draw_steps(TRAINED, "logit_normal", probabilities, row) for row in places(20_000 // each, each)]
    steps = torch.stack(rows)
    assert chi_square(steps.flatten(), probabilities) < 33.7  # 9 degrees of freedom; fewer effective ones for 4 parts
    for location, scale in ((0.07, 1.0), (0.0, 1.06)):
        edges = torch.special.ndtr((torch.logit(EDGES.double() / T) - location) / scale)
        off = 20_000 * ((edges.diff() - by_bin(probabilities)).square() / by_bin(probabilities)).sum()
        assert off > POWER_999
    assert chi_square(steps.flatten(), step_probabilities("uniform", TRAINED, T)) > 1000
    cumulative = torch.cat([probabilities.new_zeros(1), probabilities.cumsum(0)])
    for part in range(each):  # one from each of the equally likely parts, up to the step that two of them share
        assert (cumulative[steps[:, part] + 1] > part / each - 1e-12).all()
        assert (cumulative[steps[:, part]] < (part + 1) / each + 1e-12).all()


POWER_999 = 73.0  # noncentrality at which a chi-square of 9 degrees of freedom exceeds 33.7 with probability .999


def test_the_stated_power():
    """The noncentral chi-square itself, of 10^6 draws."""
    normals = torch.randn(1_000_000, 9, generator=torch.Generator().manual_seed(1))
    normals[:, 0] += math.sqrt(POWER_999)
    assert (normals.square().sum(1) > 33.7).double().mean() > 0.999


def test_draws_are_those_of_diffusers_training_scripts():
    """Which take step ``int(1000 u)`` of the schedule; n = 20 000 theirs, the bins and the power of the test above."""
    torch.manual_seed(0)
    u = compute_density_for_timestep_sampling("logit_normal", batch_size=20_000, logit_mean=0.0, logit_std=1.0)
    theirs = (u * T).long()
    assert chi_square(theirs[theirs < 999], step_probabilities("logit_normal", TRAINED, T)) < 33.7


def test_the_even_draw_is_in_equal_parts():
    steps = torch.arange(200, 899)
    row = torch.tensor([0.0, 0.5, 0.999, 0.25])
    found = draw_steps(steps, "uniform", step_probabilities("uniform", steps, T), row)
    assert found.tolist() == [200 + int(699 * (i + x) / 4) for i, x in enumerate(row.tolist())]


@pytest.mark.parametrize("draw", ["uniform", "logit_normal"])
def test_the_ends_of_the_parts_stay_inside(draw):
    for steps in (TRAINED, torch.arange(200, 300), torch.tensor([4])):
        probabilities = step_probabilities(draw, steps, T)
        for place in (0.0, 1 - 2**-24):
            assert torch.isin(draw_steps(steps, draw, probabilities, torch.full((3,), place)), steps).all()
