"""Figures of what multiplies grad log pi in each KL form, and of how noisy k1 in the reward is in many dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator
from torch import Tensor

from diffusion_align.estimators.kl import kl_gradient_coefficient, kl_loss
from diffusion_align.report.estimator_tables import CLIP, GradientNoise, gradient_noise
from diffusion_align.report.plots import INK, PALETTE, label_axes, save_figure

LOGP_REF = -0.7  # [002] figure 1: a probability of one half
DIMENSIONS = tuple(4**n for n in range(8))  # to 16 384, the latents of an image of 512 x 512
DISTANCES = (4.0, 1.0)


def write_estimator_plots(folder: str | Path, *, seed: int = 0) -> list[Path]:
    """Write ``kl_gradient_coefficients.png`` and ``kl_gradient_variance.png`` into ``folder``; returns both paths."""
    coefficients = save_figure(plot_gradient_coefficients(), Path(folder) / "kl_gradient_coefficients.png")
    noise = [gradient_noise(DIMENSIONS, distance=distance, seed=seed) for distance in DISTANCES]
    return [coefficients, save_figure(plot_gradient_variance(noise), Path(folder) / "kl_gradient_variance.png")]


def gradient_coefficients(logp: Tensor, *, clip: float = CLIP) -> dict[str, Tensor]:
    """What multiplies grad log pi when each KL form is minimised, at ``logp`` nats and ``LOGP_REF``; no unit."""
    logp_ref = torch.full_like(logp, LOGP_REF)
    path = logp.detach().requires_grad_()
    loss = kl_loss(path, logp_ref, kind="k3_clip", gradient="direct", clip=clip, allow_biased=True)
    (autograd,) = torch.autograd.grad(loss.sum(), path)
    return {
        "k1": kl_gradient_coefficient(logp, logp_ref, "k1"),
        "k3": kl_gradient_coefficient(logp, logp_ref, "k3"),
        "k3_clip": kl_gradient_coefficient(logp, logp_ref, "k3_clip", clip=clip),
        "k3_clip autograd": autograd,
        "minimax": kl_gradient_coefficient(logp, logp_ref, "minimax"),
    }


def plot_gradient_coefficients() -> Figure:
    """[002] figure 1 and appendix F, with k3_clip beside it, and a little further down, to where the clip sets in."""
    logp = torch.linspace(-4.5, 2.0, 2601, dtype=torch.float64)
    curves = gradient_coefficients(logp)
    edge = LOGP_REF - math.log(CLIP)
    clipped = logp < edge
    figure, axes = _figure()
    axes.axvspan(0, 2, color="#f0f0f0", linewidth=0, zorder=0)
    axes.text(1.0, -12, "densities only", fontsize=10, color="#666666", ha="center")
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)
    axes.axvline(LOGP_REF, color="#999999", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    axes.text(LOGP_REF - 0.07, -12, "log π$_{\\mathrm{ref}}$ = −0.7", fontsize=10, color="#666666", ha="right")
    axes.plot([edge, edge], [1 - CLIP, 1], color=PALETTE[3], linewidth=1.2, linestyle=":", zorder=2)
    for name, color, x, y, label in (
        ("minimax", PALETTE[2], 1.5, 5.4, "minimax"),
        ("k1", PALETTE[0], -4.4, -5.7, "k1 in reward,\nk2 as loss"),
        ("k3", PALETTE[1], -2.25, -5.7, "k3 as loss"),
        ("k3_clip", PALETTE[4], -4.4, -8.6, "k3_clip\ncoefficient"),
        (
            "k3_clip autograd",
            PALETTE[3],
            -4.4,
            1.4,
            f"k3_clip as loss, by autograd\n(C = {CLIP:g}; elsewhere both are k3)",
        ),
    ):
        seen = clipped if "clip" in name else torch.ones_like(clipped)
        axes.plot(logp[seen].numpy(), curves[name][seen].numpy(), color=color, linewidth=2.2, label=name, zorder=3)
        axes.text(x, y, label, fontsize=11, color=color, ha="right" if x > 0 else "left", linespacing=1.1)
    axes.set(xlim=(-4.5, 2), ylim=(-12.5, 7.5))
    axes.yaxis.set_major_locator(MultipleLocator(3))
    label_axes(axes, "What multiplies ∇ log π", "log π of the sampled action (nats)", "coefficient (no unit)", size=11)
    return figure


def plot_gradient_variance(noise: Sequence[Sequence[GradientNoise]]) -> Figure:
    """Relative variance against d, a row of ``noise`` for each distance; dots are sampled, lines are the theory.

    Logarithmic above 1 and linear below, so that the closed form's 0 has its place.
    """
    figure, axes = _figure()
    for row, color in zip(noise, (PALETTE[3], PALETTE[1])):
        d, distance = [point.d for point in row], row[0].distance
        axes.plot(d, [point.k1_reward_theory for point in row], color=color, linewidth=1.8, zorder=3)
        axes.plot(
            d, [point.k1_reward for point in row], "o", color=color, markersize=6, zorder=4,
            label=f"k1 in the reward, D = {distance:g}: d (1 + D²/4) + 1",
        )  # fmt: skip
    d = [point.d for point in noise[-1]]
    axes.plot(d, [point.with_baseline_theory for point in noise[-1]], color=PALETTE[2], linewidth=1.8, zorder=3)
    axes.plot(
        d, [point.with_baseline for point in noise[-1]], "s", color=PALETTE[2], markersize=6, markerfacecolor="white",
        zorder=4, label=f"k1 less the KL in the reward, D = {noise[-1][0].distance:g}: d + 1",
    )  # fmt: skip
    axes.plot(
        d, [point.closed_form for point in noise[-1]], "^-", color=PALETTE[0], linewidth=1.8, markersize=6, zorder=4,
        label="closed-form KL: 0", clip_on=False,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=1.0, linscale=0.6)
    axes.xaxis.set_major_locator(FixedLocator(d))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}".replace(",", "\u2009")))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 2 * max(point.k1_reward_theory for row in noise for point in row))
    y = "tr Cov / |E g|², g with respect to μ"
    label_axes(axes, "Noise of one sample's gradient", "dimensions d of the action", y, size=11)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper left", handlelength=1.2, borderaxespad=0.1)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.4), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    return figure, figure.add_subplot()
