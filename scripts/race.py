"""The race behind docs/which_method.md: passes through the network until today's DDPO reward is reached, by method.

    python scripts/race.py run                     # what is missing, one run after the other; one thread
    python scripts/race.py run --only "DDPO, windows" --reward aesthetic --model emoji-sd
    python scripts/race.py table                   # the table of the page, from the rows
    python scripts/race.py figure                  # docs/images/race.png, from the rows

A target is the mean reward, over seeds 0, 1 and 2, at the end of the shipped DDPO recipe; these runs come first, and
the target never changes afterwards. Every other method runs with three learning rates, its recipe's times 1, 3 and 1/3,
at one seed, until the target is reached, its budget is spent, another learning rate is known to take fewer passes, or
half of these passes have led less than a quarter of the way to the target. The best one, by the highest reward if none
reached the target, then runs with the three seeds. A run whose row is there is not repeated.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated

import typer
from race_course import ENTRANTS, REWARDS, course, fix_target, read_targets
from race_page import draw, put_between_marks, tables
from race_run import ROOT, commit_of_code, run_job

from diffusion_align.report import save_figure
from diffusion_align.writing import append_line, write_text

PAGE = ROOT / "docs" / "which_method.md"
FIGURE = ROOT / "docs" / "images" / "race.png"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Results = Annotated[Path, typer.Option(help="folder of rows.jsonl and targets.json")]


@app.callback()
def race() -> None:
    """Race the methods."""


@app.command("run")
def run_missing(
    only: Annotated[list[str] | None, typer.Option(help="entrants; all when not given")] = None,
    reward: Annotated[list[str] | None, typer.Option(help="rewards; both when not given")] = None,
    model: Annotated[list[str] | None, typer.Option(help="models")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="seeds; all when not given")] = None,
    dry: Annotated[bool, typer.Option(help="only print what would run next")] = False,
    results: Results = ROOT / "docs" / "race",
) -> None:
    """Run what is missing; several commands may share the work if none is given the runs of another."""
    commit = "" if dry else commit_of_code()
    results = results.absolute()
    for one_model, one_reward, method in itertools.product(
        model or ["emoji-sd"], reward or list(REWARDS), only or list(ENTRANTS)
    ):
        while True:
            jobs = list(course(results, one_model, one_reward).jobs(method))
            jobs = [(job, limits) for job, limits in jobs if seed is None or job.seed in seed]
            for job, limits in jobs:
                print(job, limits, flush=True)
            if dry or not jobs:
                break
            row = run_job(jobs[0][0], *ENTRANTS[method].settings(one_reward, one_model), jobs[0][1], commit)
            append_line(results / "rows.jsonl", json.dumps(row))
            print(f"  {row['ended']}: {row['evaluations'][-1]}", flush=True)
            fix_target(results, one_model, one_reward)


@app.command()
def table(results: Results = ROOT / "docs" / "race") -> None:
    """Write the tables of the page."""
    courses = [course(results, *name.split("/")) for name in read_targets(results)]
    write_text(PAGE, put_between_marks(PAGE.read_text(encoding="utf-8"), tables(courses)))


@app.command()
def figure(results: Results = ROOT / "docs" / "race") -> None:
    """Draw the figure of the page."""
    save_figure(draw([course(results, *name.split("/")) for name in read_targets(results)]), FIGURE)


if __name__ == "__main__":
    app()
