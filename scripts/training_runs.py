"""Runs of recipes that scripts share: each in its own process, not repeated once it is finished."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from diffusion_align.pipelines.configuration import read_config
from diffusion_align.training.reading import load_yaml

Job = TypeVar("Job")


def train(folder: Path, recipe: str, overrides: Sequence[str]) -> Path:
    """Train in ``folder`` unless that run is finished; an interrupted one is resumed. One thread.

    Raises:
        RuntimeError: with what the command printed, or the run in ``folder`` has other settings.
    """
    settings = [*overrides, f"output_dir={folder}", "num_threads=1", "resume=true"]
    if (folder / "report.html").is_file():
        wanted, found = read_config(recipe, settings).model_dump(mode="json"), load_yaml(folder / "config.yaml")
        other = [key for key in wanted if key != "mixed_precision" and wanted[key] != found.get(key)]  # auto is decided
        if other:
            raise RuntimeError(f"{folder} is of a run with other settings ({', '.join(other)}): choose another folder")
    else:
        command = [sys.executable, "-m", "diffusion_align", "train", recipe, *settings]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
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
