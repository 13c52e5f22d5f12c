"""Plots, image grids and the run report; of the project they know how files are written, and the estimators."""

from typing import TYPE_CHECKING

from diffusion_align.lazy import offered

if TYPE_CHECKING:
    from diffusion_align.report.grids import before_after, image_grid, save_png
    from diffusion_align.report.html import write_report
    from diffusion_align.report.metrics import read_metrics
    from diffusion_align.report.notebook import RunReport
    from diffusion_align.report.plots import compare_runs, save_figure

__all__ = [
    "RunReport",
    "before_after",
    "compare_runs",
    "image_grid",
    "read_metrics",
    "save_figure",
    "save_png",
    "write_report",
]
__getattr__, __dir__ = offered(
    __name__,
    {
        "RunReport": "diffusion_align.report.notebook",
        "before_after": "diffusion_align.report.grids",
        "compare_runs": "diffusion_align.report.plots",
        "image_grid": "diffusion_align.report.grids",
        "read_metrics": "diffusion_align.report.metrics",
        "save_figure": "diffusion_align.report.plots",
        "save_png": "diffusion_align.report.grids",
        "write_report": "diffusion_align.report.html",
    },
)
