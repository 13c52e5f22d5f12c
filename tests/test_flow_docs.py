"""The tables on the pages about flow matching are what the samplers and settings are."""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion_align.diffusion.ddpo_settings import DDPOConfig
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.diffusion.transitions import nats_per_squared_error
from diffusion_align.models.families.flow_matching import set_linear_timesteps

DOCS = Path(__file__).parent.parent / "docs"
HOW_TO = (DOCS / "flow.md").read_text()
MATHEMATICS = (DOCS / "mathematics/flow_matching.md").read_text()
OPTIONS = {
    "ODE": ("flow", {"eta": 0.0}),
    "`flow` eta 0.5": ("flow", {"eta": 0.5}),
    "`flow` eta 1": ("flow", {"eta": 1.0}),
    "`ddim` eta 0.5": ("ddim", {"eta": 0.5}),
    "`flow_sde` 0.7": ("flow_sde", {"noise_level": 0.7}),
    "`cps` 0.7": ("cps", {"noise_level": 0.7}),
    "`dance` 0.3": ("dance", {"noise_level": 0.3}),
}
"""As they are written on the pages."""
SD3 = FlowMatchEulerDiscreteScheduler(shift=3.0)


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(text, header):
    """The rows of the table with this header, as lists of cells."""
    _, found = text.split(header + "\n", 1)
    lines = re.match(r"(?:\|.*\n)+", found)[0].splitlines()
    return [cells(line) for line in lines[1:]]


def flow_schedule(written, steps, scheduler=SD3, set_timesteps=None):
    name, options = OPTIONS[written]
    return build_schedule(scheduler, steps, sampler=name, options=options, set_timesteps=set_timesteps)


def weights(schedule):
    return nats_per_squared_error(schedule)[schedule.stochastic_steps]


def final_std(schedule, std):
    """Of what is sampled with the exact velocity for data N(0, std^2), over std; every step is linear in x_t."""
    variance = 1.0
    columns = zip(*(getattr(schedule.table, name).tolist() for name in COLUMNS), strict=True)
    for alpha, sigma, x_0_weight, eps_weight, x_t_weight, noise in columns:
        x_0 = alpha * std**2 / (alpha**2 * std**2 + sigma**2)  # E[x_0 | x_t] = x_0 * x_t
        eps = (1 - alpha * x_0) / sigma
        variance = (x_0_weight * x_0 + eps_weight * eps + x_t_weight) ** 2 * variance + noise**2
    return math.sqrt(variance) / std


COLUMNS = ("alpha_t", "sigma_t", "x_0_weight", "eps_weight", "x_t_weight", "std")


def information(schedule, std):
    """(S,) of each stochastic step about m, of data N(m, std^2) and its exact velocity, over the 1 / std^2 of an image:
    ``(d mean / d m)^2 / noise^2 * std^2``."""
    found = []
    for i in schedule.stochastic_steps.tolist():
        alpha, sigma, x_0_weight, eps_weight, _, noise = (getattr(schedule.table, name)[i].item() for name in COLUMNS)
        x_0 = sigma**2 / (alpha**2 * std**2 + sigma**2)  # d E[x_0 | x_t] / dm; eps = (x_t - alpha x_0) / sigma
        found.append(((x_0_weight - eps_weight * alpha / sigma) * x_0 * std / noise) ** 2)
    return found


def test_what_a_window_sees():
    header = "| window | std 1 | std 0.3 | std 0.1 |"
    found = [information(flow_schedule("`flow` eta 0.5", 10), float(name.split()[1])) for name in cells(header)[1:]]
    windows = {"steps 1 to 3": slice(0, 3), "steps 3 to 5": slice(2, 5), "steps 6 to 8": slice(5, 8)}
    rows = [[name, *(f"{sum(one[part]):.2g}" for one in found)] for name, part in windows.items()]
    assert table(HOW_TO, header) == rows


def test_the_information_is_that_of_finite_differences():
    """Of the mean of x_s when m moves, in float64."""
    schedule, std, x_t, small = flow_schedule("`flow` eta 0.5", 10), 0.3, 0.7, 1e-6

    def mean(i, m):
        alpha, sigma, x_0_weight, eps_weight, x_t_weight, _ = (getattr(schedule.table, n)[i].item() for n in COLUMNS)
        x_0 = m + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * m)
        return x_0_weight * x_0 + eps_weight * (x_t - alpha * x_0) / sigma + x_t_weight * x_t

    for i, found in enumerate(information(schedule, std)):
        slope = (mean(i, small) - mean(i, -small)) / (2 * small)
        assert found == pytest.approx((slope * std / schedule.table.std[i].item()) ** 2, rel=1e-6)


def test_the_price_of_noise():
    """Also that of the library's own steps, which become short: the sum of weights at a over that at sqrt(2)."""
    rows = table(MATHEMATICS, "| `noise_level` a | eta | price |")
    assert len(rows) == 7
    for level, eta, price in rows:
        a = math.sqrt(2) if level == "1.414" else float(level)
        exact = (1 + a**2 / 2) ** 2 / (2 * a**2)
        assert float(eta) == pytest.approx(a / math.sqrt(2), abs=5e-4)
        assert float(price) == pytest.approx(exact, abs=0.5 * 10 ** -len(price.partition(".")[2]))
        if a < 2:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
            priced, least = (
                weights(build_schedule(scheduler, 1000, eta=one))[400:600].sum() for one in (a / math.sqrt(2), 1.0)
            )
            assert priced / least == pytest.approx(exact, rel=0.01)


def test_the_weights_of_the_steps():
    header = "| t | `flow` eta 1 | `flow` eta 0.5 | `ddim` eta 0.5 | `flow_sde` 0.7 | `cps` 0.7 | `dance` 0.3 |"
    columns = [weights(flow_schedule(name, 10)) for name in cells(header)[1:]]
    times = flow_schedule("ODE", 10).table.sigma_t.tolist()
    rows = [[f"{t:.4f}", *(f"{column[i]:.3g}" for column in columns)] for i, t in enumerate(times[:9])]
    assert table(MATHEMATICS, header) == rows


def test_the_share_of_the_last_step():
    header = "| | `flow` eta 0.5 | `flow_sde` 0.7 | `cps` 0.7 | `dance` 0.3 |"
    flux = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    cases = {
        "Stable Diffusion 3, 10 steps": (10, SD3, None),
        "Stable Diffusion 3, 40 steps": (40, SD3, None),
        "FLUX, 512 pixels, 10 steps": (10, flux, partial(set_linear_timesteps, tokens=1024)),
        "FLUX, 1024 pixels, 28 steps": (28, flux, partial(set_linear_timesteps, tokens=4096)),
    }
    rows = []
    for case, how in cases.items():
        found = [weights(flow_schedule(name, *how)) for name in cells(header)[1:]]
        rows.append([case, *(f"{100 * one[-1] / one.sum():.3g} %" for one in found)])
    assert table(MATHEMATICS, header) == rows


def test_what_converges():
    rows = []
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        for name in ("ODE", "`flow` eta 0.5", "`flow` eta 1", "`flow_sde` 0.7", "`dance` 0.3", "`cps` 0.7"):
            found = [
                " / ".join(f"{final_std(flow_schedule(name, steps, scheduler), std):.3f}" for std in (0.5, 0.1))
                for steps in (10, 50, 200)
            ]
            rows.append([f"{shift:g}", name, *found])
    assert table(MATHEMATICS, "| shift | sampler | 10 steps | 50 steps | 200 steps |") == rows


def test_the_clip_in_nats():
    """By the settings themselves."""
    header = "| model | pixels | d | 1e-3 | 1e-4 | 1e-5 |"
    models = [("emoji-flow", 64, 4, 4), *(("Stable Diffusion 3.5, FLUX.1", side, 16, 8) for side in (512, 768, 1024))]
    rows = []
    for model, side, channels, factor in models:
        dimensions = channels * (side // factor) ** 2
        bounds = [settings(clip).clip_bounds(dimensions)[2] for clip in cells(header)[3:]]
        rows.append([model, f"{side}²", f"{dimensions:,}".replace(",", " "), *(f"{nats:.3g}" for nats in bounds)])
    assert table(MATHEMATICS, header) == rows


def settings(clip):
    named = {"model": "emoji-sd", "reward": "jpeg_compressibility", "prompts": ["a"], "output_dir": "x"}
    return DDPOConfig(**named, clip_range=float(clip))


def test_an_averaged_ratio_is_below_one():
    """E exp(log ratio / d) = exp(-(1 - 1/d) KL / d), by Gauss-Hermite quadrature in the direction of the shift."""
    nodes, quadrature = np.polynomial.hermite_e.hermegauss(60)
    for dimensions, distance in ((4, 0.5), (1024, 3.0)):
        ratio = np.exp((distance * nodes - distance**2 / 2) / dimensions)
        mean = (ratio * quadrature).sum() / math.sqrt(2 * math.pi)
        kl = distance**2 / 2
        assert mean == pytest.approx(math.exp(-(1 - 1 / dimensions) * kl / dimensions), rel=1e-12)


def test_a_short_step_has_the_weight_of_a_likelihood():
    """w / h = (1 - t) / t at eta 1."""
    schedule = build_schedule(FlowMatchEulerDiscreteScheduler(shift=1.0), 1000)
    t = schedule.table.sigma_t
    for i in (100, 500, 900):
        found = nats_per_squared_error(schedule)[i] / (t[i] - t[i + 1])
        assert found == pytest.approx(((1 - t[i]) / t[i]).item(), rel=0.02)
