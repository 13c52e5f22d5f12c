"""A run's report as notebooks show it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunReport:
    """``report.html`` of a run folder, written if it is not there or the run was killed; notebooks show it in a frame.

    Attributes:
        run: the run folder.
    """

    run: Path

    @property
    def path(self) -> Path:
        """The self-contained page."""
        from diffusion_align.report import write_report  # with what it draws plots with
        from diffusion_align.report.status import read_status

        path = self.run / "report.html"
        return path if path.is_file() and read_status(self.run).state != "gone" else write_report(self.run)

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 45em; border: 1px solid #ccc"></iframe>'
