"""Plots, picture grids and the run report; of the project they know how files are written, and the estimators."""

from diffusion_align.report.grids import before_after, image_grid, save_png
from diffusion_align.report.html import write_report
from diffusion_align.report.metrics import read_metrics
from diffusion_align.report.plots import compare_runs, save_figure

__all__ = ["before_after", "compare_runs", "image_grid", "read_metrics", "save_figure", "save_png", "write_report"]
