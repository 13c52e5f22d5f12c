"""The tables and figures of ``diffusion-align estimators`` against closed forms and enumerations written anew."""

import functools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from diffusion_align.estimators import kl as kl_module
from diffusion_align.report import estimator_plots, estimator_tables
from diffusion_align.report.estimator_plots import gradient_coefficients, plot_gradient_coefficients
from diffusion_align.report.estimator_tables import (
    EXAMPLE,
    EstimatorError,
    Normal,
    Softmax,
    estimator_errors,
    expected_gradients,
    gradient_noise,
    gradient_table,
    value_table,
)
from diffusion_align.report.estimator_tables import random_softmax as drawn
from diffusion_align.report.plots import PALETTE

Q, P = Normal(0.1, 0.2), Normal(0.0, 1.0)  # [002] appendix D
F64 = torch.float64


def exact(q, p):
    """KL and {kind: (bias, log std)}, both in nats."""
    kl, rows = estimator_errors(q, p, samples=2)
    return kl, {row.kind: (row.exact_bias, row.exact_log_std) for row in rows}


# Values: closed forms. z is standard normal under q, x = log(p/q) = a z² + b z + c.


class Closed:
    """Moments of k1, k2 and k3 from those of the standard normal."""

    def __init__(self, q, p):
        gap, s = (p.mean - q.mean) / q.std, p.std / q.std
        self.gap, self.s = gap, s
        x = np.polynomial.Polynomial([-0.5 * (gap / s) ** 2 - math.log(s), gap / s**2, 0.5 - 0.5 / s**2])
        self.mean, self.square, self.fourth = self._under(x), self._under(x**2), self._under(x**4)
        self.mean_under_p = self._under(x(np.polynomial.Polynomial([gap, s])))
        self.kl = math.log(s) + (1 + gap**2) / (2 * s**2) - 0.5

    @staticmethod
    def _under(polynomial):
        moments = (1, 0, 1, 0, 3, 0, 15, 0, 105)
        return sum(float(c) * m for c, m in zip(polynomial.coef, moments))

    @property
    def k1(self):
        return 0.0, math.sqrt(self.square - self.mean**2)

    @property
    def k2(self):
        return self.square / 2 - self.kl, math.sqrt(self.fourth / 4 - (self.square / 2) ** 2)

    @property
    def log_ratio_square(self):
        """log E (p/q)², or infinite: 1/(s² sqrt(2/s² - 1)) exp(gap²/(2 - s²))."""
        if self.s**2 >= 2:
            return math.inf
        return self.gap**2 / (2 - self.s**2) - math.log(self.s) - 0.5 * math.log(2 - self.s**2)

    @property
    def k3_log_std(self):
        """E (r - 1 - x)² = E r² - 1 + E x² - 2 E_p x + 2 E x; the first alone where it is large."""
        if self.log_ratio_square > 60:
            return 0.5 * self.log_ratio_square
        rest = -1 + self.square - 2 * self.mean_under_p + 2 * self.mean - self.kl**2
        return 0.5 * math.log(math.exp(self.log_ratio_square) + rest)


def pairs(n, seed):
    """Gaussians alike and unlike: near, a thousand times narrower or wider, many standard deviations apart."""
    random = np.random.default_rng(seed)
    for _ in range(n):
        q = Normal(random.normal() * 10 ** random.uniform(-2, 3), 10 ** random.uniform(-3, 3))
        s = 10 ** random.uniform(*random.choice([(-0.5, 0.5), (-3, 3)]))
        yield q, Normal(q.mean + q.std * random.normal() * 10 ** random.uniform(-1, 1.5), q.std * s)


def test_k1_and_k2_are_the_closed_forms_of_any_pair():
    for q, p in pairs(200, seed=0):
        kl, errors = exact(q, p)
        closed = Closed(q, p)
        assert kl == pytest.approx(closed.kl, rel=1e-8, abs=1e-14)
        for kind, (bias, std) in (("k1", closed.k1), ("k2", closed.k2)):
            size = max(kl, abs(bias))
            assert errors[kind][0] == pytest.approx(bias, abs=1e-8 * size), (q, p)
            assert math.exp(errors[kind][1]) == pytest.approx(std, rel=1e-6), (q, p)


def test_k3_is_unbiased_and_its_second_moment_is_the_closed_form_or_infinite():
    seen = set()
    for q, p in pairs(300, seed=1):
        kl, errors = exact(q, p)
        closed = Closed(q, p)
        assert errors["k3"] == errors["k4"]
        assert abs(errors["k3"][0]) < 1e-8 * kl, (q, p)
        if closed.log_ratio_square == math.inf:
            assert errors["k3"][1] == math.inf
            seen.add("infinite")
        elif closed.log_ratio_square > 1e-3:  # below that the closed form itself cancels
            assert errors["k3"][1] == pytest.approx(closed.k3_log_std, rel=1e-8, abs=1e-8), (q, p)
            seen.add("beyond a float" if errors["k3"][1] > 710 else "finite")
    assert seen == {"infinite", "finite", "beyond a float"}


@pytest.mark.parametrize("gap", [0.0, 0.1, -3.0])
@pytest.mark.parametrize("margin", [1e-2, 1e-5, 1e-8])
def test_both_sides_of_the_boundary_of_integrability(gap, margin):
    q = Normal(-0.7, 0.3)
    near, beyond = (Normal(q.mean + gap * q.std, math.sqrt(2) * q.std * (1 + sign * margin)) for sign in (-1, 1))
    expected = Closed(q, near).k3_log_std
    assert exact(q, near)[1]["k3"][1] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert exact(q, beyond)[1]["k3"][1] == math.inf
    assert exact(beyond, q)[1]["k3"][1] < 10  # the other way round nothing is near a boundary


@pytest.mark.parametrize("distance", [20.0, 30.0, 60.0])
def test_the_bound_of_the_estimators_on_the_ratio_does_not_reach_the_exact_column(distance, monkeypatch):
    """E (p/q)² is e^(D²), with most of its mass where log(p/q) is 1.5 D²: 600 nats at D = 20."""
    wanted = exact(Normal(0, 1), Normal(distance, 1))[1]
    assert wanted["k3"][1] == pytest.approx(distance**2 / 2, rel=1e-12)
    assert abs(wanted["k3"][0]) < 1e-9 * distance**2
    monkeypatch.setattr(kl_module, "_bound", lambda x: 300.0)
    assert exact(Normal(0, 1), Normal(distance, 1))[1] == wanted


@pytest.mark.parametrize(
    ("q", "p"), [(Q, P), (P, Q), (Normal(0, 1), Normal(2, 1)), (Normal(3, 0.5), Normal(0, 0.6)), (P, Normal(0, 0.05))]
)
def test_k3_clip_is_a_brute_sum(q, p):
    """Two million points of the trapezoid rule; the mean also by the normal distribution function."""
    kl, errors = exact(q, p)
    x = torch.linspace(q.mean - 12 * q.std, q.mean + 12 * q.std, 2_000_001, dtype=F64)
    log_q, log_p = (torch.distributions.Normal(*(torch.tensor(v, dtype=F64) for v in n)).log_prob(x) for n in (q, p))
    values = (log_p - log_q).exp().clamp(max=10.0) - 1 + log_q - log_p
    weights = log_q.exp() * (x[1] - x[0])
    mean = (weights * values).sum()
    assert errors["k3_clip"][0] == pytest.approx(mean.item() - kl, abs=1e-8 * kl)
    std = (weights * (values - mean).square()).sum().sqrt().item()
    assert math.exp(errors["k3_clip"][1]) == pytest.approx(std, rel=1e-8)


def test_k3_clip_between_its_two_kinks_by_the_normal_distribution_function():
    """p narrow in q: E min(r, C) lacks P_p(r > C) - C P_q(r > C)."""
    q, p = Normal(0, 1), Normal(0.3, 0.02)
    _, errors = exact(q, p)
    a, b, c = 0.5 - 0.5 / p.std**2, p.mean / p.std**2, -0.5 * (p.mean / p.std) ** 2 - math.log(p.std) - math.log(10)
    low, high = sorted(np.roots([a, b, c]))

    def chance(normal):
        cdf = [0.5 * math.erfc((normal.mean - x) / normal.std / math.sqrt(2)) for x in (low, high)]
        return cdf[1] - cdf[0]

    assert errors["k3_clip"][0] == pytest.approx(10 * chance(q) - chance(p), rel=1e-9)
    assert chance(q) > 0.01


def test_equal_gaussians_are_all_zero():
    kl, rows = estimator_errors(Normal(3.0, 0.1), Normal(3.0, 0.1), samples=100)
    assert kl == 0
    for row in rows:
        assert row[1:4] == (0, 0, 0)
        assert row.exact_log_std == -math.inf


def test_the_sampled_columns_are_the_listing_of_the_source():
    """[002] appendix D, line by line, on the same draws; ``std`` divides by n - 1."""
    kl, rows = estimator_errors(Q, P, samples=50, seed=3)
    x = Q.mean + Q.std * torch.randn(50, dtype=F64, generator=torch.Generator().manual_seed(3))
    q, p = (torch.distributions.Normal(*(torch.tensor(v, dtype=F64) for v in n)) for n in (Q, P))
    assert kl == pytest.approx(torch.distributions.kl_divergence(q, p).item(), rel=1e-14)
    logr = p.log_prob(x) - q.log_prob(x)
    k1, k3 = -logr, logr.exp() - 1 - logr
    listing = {
        "k1": k1,
        "k2": logr**2 / 2,
        "k3": k3,
        "k4": torch.where(k1 < 0, k3, torch.minimum(k1, k3)),
        "k3_clip": logr.exp().clamp(max=10) - 1 - logr,
    }
    assert [row.kind for row in rows] == ["k1", "k2", "k3", "k3_clip", "k4"]
    for row in rows:
        assert row.sampled_bias == pytest.approx(listing[row.kind].mean().item() - kl, rel=1e-9)
        assert row.sampled_std == pytest.approx(listing[row.kind].std().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("q", "p", "samples", "wanted"),
    [
        (Q, P, 1, "samples=1 is not allowed"),
        (Normal(0, 0), P, 10, "q = 0 0 is not a Gaussian: give a mean and a std > 0"),
        (Q, Normal(0, -1), 10, "p = 0 -1 is not a Gaussian"),
        (Normal(math.nan, 1), P, 10, "q = nan 1 is not a Gaussian"),
        (Q, Normal(0, math.inf), 10, "p = 0 inf is not a Gaussian"),
        (Q, Normal(1e9, 1), 10, r"too different to compare \(KL 5e\+17\)"),
        (Normal(0, 1e-200), P, 10, "too different to compare"),
        (Normal(1e308, 1), Normal(-1e308, 1), 10, "too different to compare"),
    ],
)
def test_what_is_no_pair_is_refused(q, p, samples, wanted):
    with pytest.raises(ValueError, match=wanted) as caught:
        estimator_errors(q, p, samples=samples)
    assert "\n" not in str(caught.value)


# Gradients: every row again, by plain autograd.


def enumerated(example, off_policy):
    """{(placement, form): gradient} with nothing of the library."""
    theta, ref, old = (torch.tensor(x, dtype=F64) for x in example)
    theta = theta.requires_grad_()
    logp, ref = theta - theta.logsumexp(0), ref - ref.logsumexp(0)
    old = old - old.logsumexp(0) if off_policy else logp.detach()

    def grad(scalar):
        return torch.autograd.grad(scalar, theta, retain_graph=True)[0]

    def values(logp):
        x = ref - logp
        k3 = x.exp() - 1 - x
        return {"k1": -x, "k2": x**2 / 2, "k3": k3, "k3_clip": x.exp().clamp(max=10) - 1 - x, "k4": k3}

    true = grad((logp.exp() * (logp - ref)).sum())
    found = {("exact", "full vocabulary"): true}
    for kind, penalty in values(old).items():
        found["in the reward", kind] = grad((logp.exp() * penalty).sum())
    ratio = (ref - old).exp()
    for form, coefficient in (
        ("k3 (eq. 35)", 1 - ratio),
        ("k3_clip", 1 - ratio.clamp(max=10)),
        ("minimax", old.exp() - ref.exp()),
    ):
        found["coefficient in reward", form] = grad((logp.exp() * coefficient).sum())
    for kind, value in values(logp).items():
        found["loss, direct", kind] = grad((old.exp() * value).sum())
        found["loss, unbiased", kind] = true
    clipped = (1 - (ref - logp).exp().clamp(max=10)).detach()
    found["loss, unbiased", "k3_clip"] = grad((logp.exp() * clipped).sum())
    return found, true


EXAMPLES = [EXAMPLE, drawn(2, 0), drawn(3, 1), drawn(9, 2)]


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("example", EXAMPLES, ids=["default", "2", "3", "9"])
def test_every_row_is_the_enumeration(example, off_policy):
    rows = expected_gradients(example, off_policy=off_policy)
    found, true = enumerated(example, off_policy)
    assert len(rows) == len(found) == 19
    assert (rows[0].placement, rows[0].form, rows[0].cosine, rows[0].norm_ratio) == (
        "exact", "full vocabulary", pytest.approx(1, abs=1e-12), 1.0,
    )  # fmt: skip
    for row in rows:
        gradient = found.pop((row.placement, row.form))
        torch.testing.assert_close(torch.tensor(row.gradient, dtype=F64), gradient, rtol=1e-10, atol=1e-12)
        assert row.norm_ratio == pytest.approx((gradient.norm() / true.norm()).item(), rel=1e-9, abs=1e-12)
        if row.cosine is None:
            assert gradient.norm() < 1e-12 * true.norm()
        else:
            cosine = torch.nn.functional.cosine_similarity(gradient, true, dim=0).item()
            assert row.cosine == pytest.approx(cosine, abs=1e-9)
    assert not found


def test_the_examples_tell_the_forms_apart():
    """Clipping sets in, on-policy and off-policy differ, and what is biased points elsewhere."""
    on, off = ({(r.placement, r.form): r for r in expected_gradients(EXAMPLE, off_policy=o)} for o in (False, True))
    assert on["in the reward", "k2"].cosine == pytest.approx(-0.5442, abs=5e-5)
    assert on["in the reward", "k3"].cosine == pytest.approx(-0.6854, abs=5e-5)
    assert on["loss, direct", "k3_clip"].cosine == pytest.approx(-0.9959, abs=5e-5)
    assert on["loss, direct", "k1"].cosine is None
    for rows in (on, off):
        for kind in ("k1", "k2", "k3", "k4"):
            assert rows["loss, unbiased", kind].cosine == pytest.approx(1, abs=1e-12)
    exact_on_policy = [form for form, r in on.items() if r.cosine is not None and r.cosine > 1 - 1e-9]
    exact_off_policy = [form for form, r in off.items() if r.cosine is not None and r.cosine > 1 - 1e-9]
    assert set(exact_on_policy) - set(exact_off_policy) == {("in the reward", "k1"), ("loss, direct", "k2")}


def test_off_policy_the_frozen_k1_constrains_to_the_reference_less_the_old_policy():
    policy, ref, old = (torch.tensor(x, dtype=F64) for x in EXAMPLE)
    policy.requires_grad_()
    logp = policy.log_softmax(0)
    difference = (logp.exp() * (logp - ref.log_softmax(0))).sum() - (logp.exp() * (logp - old.log_softmax(0))).sum()
    (wanted,) = torch.autograd.grad(difference, policy)
    (row,) = [
        row
        for row in expected_gradients(EXAMPLE, off_policy=True)
        if (row.placement, row.form) == ("in the reward", "k1")
    ]
    torch.testing.assert_close(torch.tensor(row.gradient, dtype=F64), wanted, rtol=1e-12, atol=1e-13)


def test_no_form_warns(monkeypatch):
    monkeypatch.setattr(kl_module, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected_gradients(EXAMPLE, off_policy=True)
        plot_gradient_coefficients()
    assert kl_module._warned == set()


def test_a_drawn_example_repeats_and_needs_two_actions():
    assert drawn(5, 7) == drawn(5, 7) != drawn(5, 8)
    assert {len(logits) for logits in drawn(5, 7)} == {5}
    with pytest.raises(ValueError, match="actions=1 is not allowed"):
        drawn(1, 0)


@pytest.mark.parametrize("distance", [0.5, 1.0, 4.0])
def test_the_sampled_noise_is_the_theory(distance):
    """Half a million numbers a point: one standard error is under 1 %, at d = 1 (a quartic) too."""
    for point in gradient_noise([1, 3, 20], distance=distance, seed=1):
        assert point.k1_reward_theory == point.d * (1 + distance**2 / 4) + 1
        assert point.with_baseline_theory == point.d + 1
        assert point.k1_reward == pytest.approx(point.k1_reward_theory, rel=0.03)
        assert point.with_baseline == pytest.approx(point.with_baseline_theory, rel=0.03)
        assert point.closed_form == 0


def test_the_noise_is_the_mean_over_all_batches(monkeypatch):
    sizes = []

    def counted(n, d, distance, generator):
        sizes.append(n)
        return n * torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    monkeypatch.setattr(estimator_tables, "_squared_errors", counted)
    monkeypatch.setattr(estimator_tables, "_CHUNK", 64)
    (point,) = gradient_noise([20], samples=10)
    assert sizes == [3, 3, 3, 1]
    assert (point.k1_reward, point.with_baseline, point.closed_form) == (1, 2, 3)


def test_the_coefficients_by_hand():
    curves = gradient_coefficients(torch.tensor([-3.5, -0.7, 2.0], dtype=F64))
    expected = {
        "k1": [-2.8, 0, 2.7],
        "k3": [1 - math.exp(2.8), 0, 1 - math.exp(-2.7)],
        "k3_clip": [-9, 0, 1 - math.exp(-2.7)],
        "k3_clip autograd": [1, 0, 1 - math.exp(-2.7)],
        "minimax": [math.exp(-3.5) - math.exp(-0.7), 0, math.exp(2) - math.exp(-0.7)],
    }
    assert set(curves) == set(expected)
    for name, values in expected.items():
        assert curves[name].tolist() == pytest.approx(values, abs=1e-12), name


def drawn_texts(figure):
    """Where every text of the panel lies, in pixels."""
    figure.draw_without_rendering()
    (axes,) = figure.axes
    return axes, {text.get_text(): text.get_window_extent() for text in axes.texts}


def test_the_coefficients_figure_shows_each_curve_where_it_is_its_own():
    axes, boxes = drawn_texts(plot_gradient_coefficients())
    curves = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(curves) == {"k1", "k3", "k3_clip", "k3_clip autograd", "minimax"}
    assert len({line.get_color() for line in curves.values()}) == 5
    for name, line in curves.items():
        x, y = (torch.as_tensor(np.asarray(values)) for values in line.get_data())
        torch.testing.assert_close(y, gradient_coefficients(x)[name])
        assert x.max().item() == pytest.approx(-3.0026 if "clip" in name else 2.0, abs=0.003)
    assert axes.get_xlim()[0] <= -3
    assert axes.get_xlim()[1] == 2  # the range of [002] figure 1
    frame = axes.get_window_extent()
    placed = list(boxes.items())
    for n, (name, box) in enumerate(placed):
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1, name
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1, name
        assert not [other for other, b in placed[n + 1 :] if box.overlaps(b)], name
        for line in curves.values():  # no curve runs through a label
            assert not box.count_contains(axes.transData.transform(line.get_xydata())), (name, line.get_label())
    assert "nats" in axes.get_xlabel()
    assert "no unit" in axes.get_ylabel()


def test_the_variance_figure_has_dots_lines_and_zero():
    rows = [gradient_noise([1, 4, 16], distance=distance, samples=2) for distance in (4.0, 1.0)]
    figure = estimator_plots.plot_gradient_variance(rows)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    drawn_lines = [list(np.asarray(line.get_ydata(), dtype=float)) for line in axes.lines]
    for row in rows:
        assert [point.k1_reward_theory for point in row] in drawn_lines
        assert [point.k1_reward for point in row] in drawn_lines
    assert [2.0, 5.0, 17.0] in drawn_lines
    assert [0.0, 0.0, 0.0] in drawn_lines
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > max(map(max, drawn_lines))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.rsplit(": ")[1] for label in labels] == ["d (1 + D²/4) + 1", "d (1 + D²/4) + 1", "d + 1", "0"]
    legend = axes.get_legend().get_window_extent()
    for line in axes.lines:
        assert not legend.count_contains(axes.transData.transform(line.get_xydata()))


@pytest.fixture
def command(tmp_path, monkeypatch, call_cli):
    """``command("--samples", 100)`` -> (exit status, stdout, stderr), 80 columns wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return functools.partial(call_cli, "estimators")


def cells(out, form):
    """The numbers of every row that begins with ``form``."""
    return [line[len(form) :].split() for line in map(str.strip, out.splitlines()) if line.startswith(f"{form} ")]


def test_the_command_prints_both_tables(command):
    status, out, err = command()
    assert (status, err) == (0, "")
    assert "10,000 samples, seed 0" in out
    assert "KL(q||p) = 1.134438 nats" in out
    values, on, _, direct, unbiased, *off = cells(out, "k3_clip")
    assert values[2:] == ["-0.4645", "0.4489"]
    assert cells(out, "k1")[0][2:] == ["0.0000", "0.5986"]
    assert cells(out, "k2")[0][2:] == ["-0.2295", "0.5087"]
    assert cells(out, "k3")[0][2:] == cells(out, "k4")[0][2:] == ["0.0000", "infinite"]
    assert (on[-2], direct[-2], unbiased[-2]) == ("-0.9763", "-0.9959", "0.9959")
    assert [row[-2] for row in off] == ["-0.5166", "0.9932", "-0.2057", "0.9959"]
    assert cells(out, "full vocabulary") == 2 * [["0.0511", "0.0310", "-0.0609", "-0.0211", "1.0000", "1.0000"]]
    assert cells(out, "k1")[2][-2:] == ["none", "0.0000"]
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert not re.search(r"-0\.0000\b", out)
    assert "\x1b" not in out


def test_the_command_takes_any_pair_and_any_policy(command):
    options = ["--q", "-1", "2", "--p", "60", "2.7", "--samples", "100", "--actions", "7"]
    status, out, err = command(*options, "--seed", "5")
    assert (status, err) == (0, "")
    assert "q has mean -1, std 2; p has mean 60, std 2.7" in out
    assert cells(out, "k3")[0][-1].startswith("10^")
    assert "infinite" not in out
    assert "7 actions" in out
    assert all(row[4] == "…" for row in cells(out, "full vocabulary"))
    assert max(map(len, out.splitlines())) <= 80
    other = command(*options, "--seed", "6")[1]
    assert cells(other, "k1")[0][:2] != cells(out, "k1")[0][:2]
    assert cells(other, "k1")[0][2:] == cells(out, "k1")[0][2:]
    assert out == command(*options, "--seed", "5", "--softmax-seed", "0")[1]


def test_equal_gaussians_are_printed_in_nats(command):
    status, out, _ = command("--q", "1", "2", "--p", "1", "2", "--samples", "10")
    assert status == 0
    assert "KL(q||p) = 0 nats" in out
    assert "bias and std are in nats" in out
    assert "/KL" not in out
    assert cells(out, "k1")[0] == ["0", "0", "0", "0"]
    assert "nan" not in out


def test_the_command_draws_two_figures(command, monkeypatch, tmp_path):
    monkeypatch.setattr(estimator_plots, "DIMENSIONS", (1, 4, 16))
    status, out, err = command("--plot", "new/figures", "--samples", "10")
    assert (status, err) == (0, "")
    folder = tmp_path / "new" / "figures"
    names = {"kl_gradient_coefficients.png", "kl_gradient_variance.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(f"wrote new/figures/{name}" in out for name in names)
    for name in names:
        pixels = np.asarray(Image.open(folder / name).convert("RGB")) / 255
        assert min(pixels.shape[:2]) > 500
        for color in PALETTE[:3]:
            assert (np.abs(pixels - to_rgb(color)).max(-1) < 0.02).sum() > 300, (name, color)


BAD = {
    ("--q", "0", "0"): "q = 0 0 is not a Gaussian",
    ("--samples", "1"): "--samples",
    ("--plot", "note.txt"): "--plot: the folder note.txt",
    ("--plot", "taken"): "taken/kl_gradient_coefficients.png cannot be written",
}


@pytest.mark.parametrize(("arguments", "wanted"), BAD.items(), ids=" ".join)
def test_bad_input_is_one_sentence(command, tmp_path, arguments, wanted):
    (tmp_path / "note.txt").write_text("a cat\n")
    (tmp_path / "taken" / "kl_gradient_coefficients.png").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert wanted in err
    assert sorted(tmp_path.rglob("*")) == before


def test_tables_of_extremes_stay_readable():
    """Numbers beyond a float, and none at all."""
    from rich.console import Console

    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(value_table(*estimator_errors(Normal(0, 1), Normal(60, 1), samples=2)))
        rows = expected_gradients(Softmax((9.0, 0.0), (-9.0, 0.0), (8.0, 0.0)), off_policy=False)
        console.print(gradient_table(rows))
        console.print(value_table(1.0, [EstimatorError("k1", -1e-9, 0.5, -1e-9, math.log(2))]))
    text = captured.get()
    assert cells(text, "k1")[-1] == ["0.0000", "0.5000", "0.0000", "2.0000"]
    assert "10^778.47" in text  # e^1800 / 1800
    assert "…" not in text
    assert "nan" not in text
