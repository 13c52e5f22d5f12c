"""Runs of recipes that scripts share: each in its own process, not repeated once it is finished."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Job = TypeVar("Job")


def train(folder: Path, recipe: str, overrides: Sequence[str]) -> Path:
    """Train in ``folder`` unless that run is finished; an interrupted one is resumed. One thread.

    Raises:
        RuntimeError: with what the command printed.
    """
    if not (folder / "report.html").is_file():
        settings = [*overrides, f"output_dir={folder}", "num_threads=1", "resume=true"]
        command = [sys.executable, "-m", "diffusion_align", "train", recipe, *settings]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
    return folder


def side_by_side(work: Callable[[Job], Path], jobs: Iterable[Job], at_once: int) -> dict[Job, Path]:
    """``work`` of every job, ``at_once`` of them at a time."""
    jobs = list(jobs)
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(jobs, pool.map(work, jobs), strict=True))


def folder_name(*parts: object) -> str:
    """A file name of words and numbers."""
    return re.sub(r"\W+", "_", "_".join(map(str, parts))).strip("_")
