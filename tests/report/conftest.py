"""Reports without their plots, which take seconds."""

import pytest


@pytest.fixture
def blank_plots(monkeypatch):
    monkeypatch.setattr("diffusion_align.report.plots.figure_png", lambda figure: b"")
