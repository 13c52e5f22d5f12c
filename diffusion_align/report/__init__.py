"""Plots, picture grids and the run report; of the project they know how files are written, and the estimators."""

from diffusion_align.report.grids import before_after, image_grid, save_png
from diffusion_align.report.html import write_report
from diffusion_align.report.metrics import read_metrics
from diffusion_align.report.plots import (
    compare_runs,
    figure_png,
    plot_clip_fraction,
    plot_gold,
    plot_grad_norm,
    plot_kl,
    plot_metrics,
    plot_ratio,
    plot_reward,
    plot_reward_components,
    plot_time_split,
    save_figure,
)

__all__ = [
    "before_after",
    "compare_runs",
    "figure_png",
    "image_grid",
    "plot_clip_fraction",
    "plot_gold",
    "plot_grad_norm",
    "plot_kl",
    "plot_metrics",
    "plot_ratio",
    "plot_reward",
    "plot_reward_components",
    "plot_time_split",
    "read_metrics",
    "save_figure",
    "save_png",
    "write_report",
]
