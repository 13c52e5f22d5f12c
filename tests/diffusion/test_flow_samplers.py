"""Samplers of flow-matching models: their papers' formulas written out once more, closed forms and printed figures, and
the images of targets whose velocity is known exactly."""

import itertools
import math
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.diffusion.transitions import GaussianTransition, denoise, nats_per_squared_error
from tests.helpers.oracles import F64, assert_same, randn, with_gradients

SQRT2 = math.sqrt(2)
SAMPLERS = [("flow", 0.5), ("ddim", 0.5), ("flow_sde", 0.7), ("cps", 0.7), ("dance", 0.3)]


def option(sampler, noise):
    return {"eta" if sampler in ("flow", "ddim") else "noise_level": noise}


def schedule(sampler, noise, steps=10, shift=3.0, sigmas=None):
    """Of Stable Diffusion 3's scheduler, or at ``sigmas`` (T + 1,); in float64."""

    def given(scheduler, _):
        scheduler.sigmas = torch.tensor(sigmas, dtype=F64)
        scheduler.timesteps = (1000 * scheduler.sigmas[:-1]).float()

    return build_schedule(
        FlowMatchEulerDiscreteScheduler(shift=shift),
        steps if sigmas is None else len(sigmas) - 1,
        sampler=sampler,
        options=option(sampler, noise),
        set_timesteps=None if sigmas is None else given,
    )


def levels(steps=10, shift=3.0):
    """diffusers' own sigmas, as floats."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.double().tolist()


def as_published(sampler, noise, x, v, t, s, second):
    """Mean and std of one step, each as its source writes it; ``second``: sigma of the schedule's second step."""
    dt, x_0, eps = s - t, x - t * v, x + (1 - t) * v
    rho = s * (1 - t) / ((1 - s) * t)
    if s == 0:
        return x_0, 0.0
    if sampler == "flow_sde":
        g = noise * math.sqrt(t / (1 - (second if t == 1 else t)))
        return x * (1 + g**2 / (2 * t) * dt) + v * (1 + g**2 * (1 - t) / (2 * t)) * dt, g * math.sqrt(-dt)
    if sampler == "dance":
        score = -(x - (1 - t) * x_0) / t**2
        return x + (v - 0.5 * noise**2 * score) * dt, noise * math.sqrt(-dt)
    if sampler == "cps":
        std = s * math.sin(noise * math.pi / 2)
        return (1 - s) * x_0 + s * math.cos(noise * math.pi / 2) * eps, std
    std = noise * s * math.sqrt(1 - rho**2) if sampler == "ddim" else s * math.sqrt(1 - rho ** (2 * noise**2))
    return (1 - s) * x_0 + math.sqrt(s**2 - std**2) * eps, std


@pytest.mark.parametrize(("sampler", "noise"), [*SAMPLERS, ("flow", 1.0), ("ddim", 1.0), ("flow_sde", 1.0)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_step_is_the_papers_with_its_gradient(sampler, noise, shift):
    x, v, x_s = (randn(1, 2, 3, 3, seed=seed) for seed in range(3))
    table, sigmas = schedule(sampler, noise, shift=shift), levels(shift=shift)
    for i, (t, s) in enumerate(itertools.pairwise(sigmas)):
        place = {"index": torch.tensor([i]), "schedule": table}
        mean, std = as_published(sampler, noise, x, v, t, s, sigmas[1])
        std = torch.tensor([std], dtype=F64)
        found = denoise(x, v, **place)
        assert_same(found.mean, mean)
        assert_same(found.std, std)
        if std > 0:
            value, gradient = with_gradients(lambda v, place=place: denoise(x, v, **place).log_prob(x_s), v)
            step = partial(as_published, sampler, noise, x, t=t, s=s, second=sigmas[1])
            score = lambda v, step=step, std=std: GaussianTransition(step(v)[0], std).log_prob(x_s)  # noqa: E731
            wanted, slope = with_gradients(score, v)
            assert_same(value, wanted, rtol=1e-11)
            assert_same(gradient, slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("sampler", "noise"), [("flow", 0.0), ("ddim", 0.0), ("flow_sde", 0.0), ("dance", 0.0)])
def test_without_noise_all_are_eulers_ode(sampler, noise):
    x, v = randn(10, 1, 2, 2), randn(10, 1, 2, 2, seed=1)
    table, sigmas = schedule(sampler, noise), torch.tensor(levels(), dtype=F64)
    found = denoise(x, v, torch.arange(10), table)
    assert_same(found.mean, x + v * (sigmas[1:] - sigmas[:-1]).view(-1, 1, 1, 1))
    assert not found.std.any()


def test_the_last_step_is_deterministic_and_returns_the_clean_latent():
    for sampler, noise in SAMPLERS:
        table = schedule(sampler, noise)
        assert table.stochastic_steps.tolist() == list(range(9)), sampler
        x, v = randn(1, 1, 2, 2), randn(1, 1, 2, 2, seed=1)
        assert_same(denoise(x, v, torch.tensor([9]), table).mean, x - table.table.sigma_t[9] * v)


def test_flow_and_ddim_agree_at_both_ends_and_only_there():
    for eta in (0.0, 1.0):
        one, other = (schedule(sampler, eta).table for sampler in ("flow", "ddim"))
        assert_same(one.std, other.std)
        assert_same(one.eps_weight, other.eps_weight)
    eta = 0.7 / SQRT2  # Stable Diffusion 3, .46 -> .28
    flow, ddim = (nats_per_squared_error(schedule(sampler, eta))[7].item() for sampler in ("flow", "ddim"))
    assert (round(flow, 2), round(ddim, 2)) == (0.90, 1.34)


# -- figures -----------------------------------------------------------------------------------------------------------

STEPS = [0, 1, 5, 7, 8]
TABLE = {  # step: flow_sde 0.7: c, std, weight; weights of ddim .7/sqrt 2, cps 0.7 and flow .7/sqrt 2
    0: ("-0.039871", "0.700000", "0.001622", "0.003519", "0.001086", "0.0009"),
    1: ("-0.058242", "0.742964", "0.003073", "0.007744", "0.003355", "0.0051"),
    5: ("-0.130884", "0.352797", "0.068817", "0.130682", "0.070434", "0.1039"),
    7: ("-0.232600", "0.282007", "0.340150", "1.344", "0.585", "0.8986"),
    8: ("-0.335055", "0.225360", "1.105", "1867", "587", "556"),
}


@pytest.mark.parametrize("step", STEPS)
def test_ten_steps_of_stable_diffusion_3(step):
    sde = schedule("flow_sde", 0.7)
    ends = [
        denoise(randn(1, 1, 1, 1), value, torch.tensor([step]), sde).mean
        for value in torch.eye(2, dtype=F64).view(2, 1, 1, 1, 2)[:, ..., :1]
    ]
    others = [schedule(name, noise) for name, noise in (("ddim", 0.7 / SQRT2), ("cps", 0.7), ("flow", 0.7 / SQRT2))]
    figures = [(ends[0] - ends[1]).item(), sde.table.std[step].item()]
    figures += [nats_per_squared_error(one)[step].item() for one in (sde, *others)]
    for found, printed in zip(figures, TABLE[step], strict=True):
        digits = len(printed.partition(".")[2])
        assert f"{found:.{digits}f}" == printed


def test_the_steps_that_end_near_the_data_hold_almost_all_of_the_kl():
    for sampler, noise in (("flow", 0.7 / SQRT2), ("ddim", 0.7 / SQRT2), ("cps", 0.7)):
        weights = nats_per_squared_error(schedule(sampler, noise))[:-1]
        assert weights[-1] / weights.sum() > 0.99


@pytest.mark.parametrize("a", [0.1, 0.3, 0.7, SQRT2, 2.0])
def test_closed_forms_of_flow_sde(a):
    """c = -h (1 + a^2/2), KL = (1 + a^2/2)^2 h (1-t) / (2 a^2 t); in the first step -h and h (1 - t_1) / (2 a^2)."""
    sigmas = torch.tensor(levels(), dtype=F64)
    t, h = sigmas[1:-2], (sigmas[:-1] - sigmas[1:])
    weights = nats_per_squared_error(schedule("flow_sde", a))
    assert_same(weights[1:-1], (1 + a**2 / 2) ** 2 * h[1:-1] * (1 - t) / (2 * a**2 * t))
    assert_same(weights[0], h[0] * (1 - sigmas[1]) / (2 * a**2))
    assert_same(schedule("flow_sde", a).table.std[0], torch.tensor(a * 1.0, dtype=F64))


@pytest.mark.parametrize(("a", "price"), [(0.1, "50.5"), (0.3, "6.07"), (0.5, "2.53"), (0.7, "1.58"), (1.0, "1.125")])
def test_less_noise_makes_the_kl_dearer(a, price):
    """In units of the noise of DDPM, a = sqrt 2, where it is cheapest."""
    dear, cheap = (nats_per_squared_error(schedule("flow_sde", noise))[3] for noise in (a, SQRT2))
    assert f"{(dear / cheap).item():.{len(price.partition('.')[2])}f}" == price


def test_a_short_step_of_eta_1_weighs_1_minus_t_over_t():
    h = 1e-4
    found = [
        (nats_per_squared_error(schedule("flow", 1.0, sigmas=[t, t - h, 0.0]))[0] / (h * (1 - t) / t)).item()
        for t in (0.1, 0.5, 0.9)
    ]
    assert [f"{ratio:.4f}" for ratio in found] == ["1.0016", "1.0004", "1.0007"]


def test_flow_sde_with_noise_sqrt_2_eta_is_the_limit_of_ddim():
    h, t, eta = 1e-3, 0.6, 0.5
    ddim = schedule("ddim", eta, sigmas=[t, t - h, 0.0])
    sde = schedule("flow_sde", SQRT2 * eta, sigmas=[1.0, t, t - h, 0.0])
    std = (ddim.table.std[0] / sde.table.std[1]).item() - 1
    weight = (nats_per_squared_error(ddim)[0] / nats_per_squared_error(sde)[1]).item() - 1
    assert (f"{100 * std:.1f}", f"{100 * weight:.1f}") == ("-0.4", "0.6")


def test_flow_is_the_sde_of_100_000_short_steps_with_its_x_0_held():
    t, s, a, x_0, x, n = 0.8, 0.5, 0.7, 0.3, 1.1, 100_000
    mean, variance, h = x, 0.0, (t - s) / n
    for i in range(n):  # dx = (v + g^2 / 2t eps) dt + g dw, linear in x
        p = t - i * h
        half = a * a / (2 * (1 - p))  # g^2 / 2t
        v, eps = (mean - x_0) / p, (mean - (1 - p) * x_0) / p
        growth = 1 - h * (1 + half) / p
        mean, variance = mean - h * (v + half * eps), growth**2 * variance + 2 * half * p * h
    table = schedule("flow", a / SQRT2, sigmas=[t, s, 0.0])
    x_t, velocity = torch.full((1, 1, 1, 1), x, dtype=F64), torch.full((1, 1, 1, 1), (x - x_0) / t, dtype=F64)
    step = denoise(x_t, velocity, torch.tensor([0]), table)
    assert [f"{value:.6f}" for value in (step.mean.item(), mean)] == ["0.612816", "0.612815"]
    assert [f"{value:.6f}" for value in (step.std.item(), math.sqrt(variance))] == ["0.351077", "0.351079"]


# -- targets whose velocity is known -----------------------------------------------------------------------------------


def velocity(x, t, sd):
    """Of the target N(0, sd^2): E[eps - x_0 | x_t]."""
    gain = (1 - t) * sd**2 / ((1 - t) ** 2 * sd**2 + t**2)
    x_0 = gain * x
    return (x - (1 - t) * x_0) / t - x_0


def moments(table, sd):
    """Std of the result over ``sd``, and the worst relative error of a marginal's std on the way; no samples."""
    variance, worst = torch.ones((), dtype=F64), 0.0
    one = torch.ones(1, 1, 1, 1, dtype=F64)
    sigmas = [*table.table.sigma_t.tolist(), 0.0]
    for i, (t, s) in enumerate(itertools.pairwise(sigmas)):
        step = denoise(one, velocity(one, t, sd), torch.tensor([i]), table)  # linear in x
        variance = step.mean.item() ** 2 * variance + step.std.item() ** 2
        worst = max(worst, abs(math.sqrt(variance / ((1 - s) ** 2 * sd**2 + s**2)) - 1))
    return math.sqrt(variance) / sd, worst


MARGINALS = {  # (sampler, noise, shift): std of the result over the target's for N(0, .5^2) and N(0, .1^2); 10, 50, 200
    ("flow", 0.0, 1.0): ".848 .586  .970 .914  .993 .978",
    ("flow", 0.0, 3.0): ".718 .332  .943 .794  .986 .943",
    ("flow", 0.7 / SQRT2, 1.0): ".822 .570  .963 .893  .990 .971",
    ("flow", 0.7 / SQRT2, 3.0): ".693 .292  .927 .760  .981 .926",
    ("ddim", 1.0, 1.0): ".756 .542  .938 .838  .983 .947",
    ("ddim", 1.0, 3.0): ".639 .262  .882 .692  .964 .879",
    ("flow_sde", 0.7, 1.0): ".954 .953  .997 .963  1.002 .991",
    ("flow_sde", 0.7, 3.0): ".842 2.36  .968 .913  .993 .968",
    ("flow_sde", 1.0, 1.0): ".986 1.20  .998 .982  1.000 .995",
    ("flow_sde", 1.0, 3.0): ".911 3.89  .975 .987  .994 .983",
    ("dance", 0.3, 1.0): ".871 1.04  .975 .978  .994 .994",
    ("dance", 0.3, 3.0): ".753 1.56  .949 .970  .987 .982",
    ("cps", 0.7, 1.0): ".731 .545  .820 .770  .841 .822",
    ("cps", 0.7, 3.0): ".640 .294  .793 .683  .831 .791",
}


@pytest.mark.parametrize(("sampler", "noise", "shift"), MARGINALS)
def test_the_spread_of_a_gaussian_target(sampler, noise, shift):
    printed = MARGINALS[sampler, noise, shift].split()
    found = [
        moments(schedule(sampler, noise, steps=steps, shift=shift), sd)[0]
        for steps in (10, 50, 200)
        for sd in (0.5, 0.1)
    ]
    for value, digits in zip(found, printed, strict=True):
        assert f"{value:.{len(digits.partition('.')[2])}f}".removeprefix("0") == digits


@pytest.mark.parametrize(("noise", "errors"), [(0.0, (0.0297, 0.0074)), (0.7 / SQRT2, (0.0374, 0.0095))])
def test_flow_and_its_ode_converge_at_first_order(noise, errors):
    found = [1 - moments(schedule("flow", noise, steps=steps, shift=1.0), 0.5)[0] for steps in (50, 200)]
    assert 3.6 <= found[0] / found[1] <= 4.4
    assert [f"{error:.4f}" for error in found] == [f"{error:.4f}" for error in errors]


def test_flow_sde_is_within_a_percent_at_50_steps_but_too_wide_on_the_way():
    result, _ = moments(schedule("flow_sde", 0.7, steps=50, shift=1.0), 0.5)
    assert abs(result - 1) < 0.01
    excess = [moments(schedule("flow_sde", noise, steps=200, shift=1.0), 0.5)[1] for noise in (0.7, 1.0)]
    assert [f"{one:.2g}" for one in excess] == ["0.049", "0.15"]  # of the first step, which no number of steps removes


def test_cps_does_not_converge():
    limits = [
        moments(schedule("cps", noise, steps=steps, shift=1.0), 0.5)[0]
        for noise, steps in ((0.7, 200), (0.7, 1000), (0.5, 200), (0.9, 200))
    ]
    assert [f"{one:.3f}" for one in limits[:1] + limits[2:]] == ["0.841", "0.913", "0.749"]
    assert abs(limits[1] - limits[0]) < 0.01


def test_samples_have_the_spread_that_the_moments_say():
    """100 000 samples by 20 steps: the std of their std is .22 %, so 1 % is more than four of them."""
    count, generator = 100_000, torch.Generator().manual_seed(0)
    for sampler, noise in SAMPLERS:
        table = schedule(sampler, noise, steps=20, shift=1.0)
        x = torch.randn(count, 1, 1, 1, generator=generator, dtype=F64)
        for i, t in enumerate(table.table.sigma_t.tolist()):
            step = denoise(x, velocity(x, t, 0.5), torch.full((count,), i), table)
            x = step.sample(torch.randn(x.shape, generator=generator, dtype=F64))
        assert abs(x.std().item() / (0.5 * moments(table, 0.5)[0]) - 1) < 0.01, sampler


@pytest.mark.parametrize(("sampler", "noise"), SAMPLERS)
@pytest.mark.parametrize("steps", [2, 10, 40])
def test_a_point_keeps_no_noise(sampler, noise, steps):
    point, x = randn(4, 1, 2, 2, seed=5), randn(4, 1, 2, 2)
    table = schedule(sampler, noise, steps=steps)
    for i, t in enumerate(table.table.sigma_t.tolist()):
        before = x
        step = denoise(x, (x - point) / t, torch.full((4,), i), table)
        x = step.sample(randn(4, 1, 2, 2, seed=10 + i))
    assert_same(x, point, atol=1e-12)
    assert (before - point).abs().max() > 1e-3
