"""The experiments behind docs/ddpo.md and quickstart: train the recipes over seeds, draw the figures, print the table.

    python scripts/experiments.py --runs runs/experiments

Runs that are finished are not repeated; interrupted ones are resumed. One thread per run, as many runs at once as
``--at-once``, so wall times are not those of a recipe run alone.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from training_runs import folder_name, side_by_side, train

from diffusion_align.report import compare_runs, read_metrics, save_figure

ROOT = Path(__file__).parent.parent
# name -> recipe, overrides, seeds
EXPERIMENTS: dict[str, tuple[str, list[str], int]] = {
    "quickstart": ("quickstart", [], 3),
    "aesthetic": ("ddpo_emoji_aesthetic", [], 3),
    "jpeg": ("ddpo_emoji_jpeg", [], 3),
    "clip": ("ddpo_emoji_clip", [], 3),
    "jpeg, sign flipped": ("ddpo_emoji_jpeg", ["reward={name: jpeg_compressibility, scale: -1.0}"], 1),
    "jpeg, kl_coef 30": ("ddpo_emoji_jpeg", ["kl_coef=30"], 1),
    "jpeg, recipe with KL": ("ddpo_emoji_kl", [], 1),
}


def main(
    runs: Annotated[Path, typer.Option(help="where the run folders go")] = ROOT / "runs" / "experiments",
    at_once: int = 2,
    only: Annotated[list[str] | None, typer.Option(help="names of experiments; all when not given")] = None,
) -> None:
    """Train, then draw and print."""
    names = [name for name in EXPERIMENTS if not only or name in only]
    jobs = [(name, seed) for name in names for seed in range(EXPERIMENTS[name][2])]
    folders = side_by_side(lambda job: _train(runs, *job), jobs, at_once)
    grouped = {name: [folders[job] for job in jobs if job[0] == name] for name in names}
    print(
        "experiment               reward: first epoch -> last   difference (std. error over seeds)   "
        "KL nats per step at the end"
    )
    for name, group in grouped.items():
        print(_line(name, group))
    if only:
        return
    images = ROOT / "docs" / "images"
    save_figure(_sign_figure(grouped["jpeg"][0], grouped["jpeg, sign flipped"][0]), images / "sign.png")
    penalties = {"kl_coef 0": grouped["jpeg"][:1], "kl_coef 30": grouped["jpeg, kl_coef 30"]}
    compare_runs(
        penalties, ["kl", "reward"], images / "kl.png", title="JPEG size: the KL to the reference, free and priced"
    )
    for name in ("aesthetic", "jpeg", "clip"):
        compare_runs({f"{name}, mean and range of 3 seeds": grouped[name]}, ["reward", "kl"], images / f"{name}.png")
    for name, folder in (
        ("quickstart", grouped["quickstart"][0]),
        ("aesthetic", grouped["aesthetic"][0]),
        ("jpeg", grouped["jpeg"][0]),
        ("jpeg_kl", grouped["jpeg, recipe with KL"][0]),
    ):
        shutil.copy(folder / "samples" / "before_after.png", images / f"{name}_before_after.png")


def _sign_figure(rewarded: Path, punished: Path) -> Figure:
    """JPEG size over epochs, whatever the sign of the reward was."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for label, folder, sign in (("small files rewarded", rewarded, -1), ("large files rewarded", punished, 1)):
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "reward" in row]
        axes.plot([row["epoch"] for row in rows], [sign * row["reward"] for row in rows], marker=".", label=label)
    axes.set(xlabel="epoch", ylabel="JPEG size, kB", title="The same run with the reward's sign flipped")
    axes.legend(frameon=False)
    return figure


def _train(runs: Path, name: str, seed: int) -> Path:
    recipe, overrides, _ = EXPERIMENTS[name]
    return train(runs / folder_name(name, f"seed{seed}"), recipe, [*overrides, f"seed={seed}"])


def _line(name: str, group: list[Path]) -> str:
    rows = [read_metrics(folder / "metrics.jsonl") for folder in group]
    rewards = [[row["reward"] for row in run if "reward" in row] for run in rows]
    gains = [run[-1] - run[0] for run in rewards]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    ends = [[row["kl"] for row in run if "kl" in row and row["epoch"] > run[-1]["epoch"] - 5] for run in rows]
    kl = statistics.mean(statistics.mean(end) for end in ends)
    first, last = (statistics.mean(run[i] for run in rewards) for i in (0, -1))
    return f"{name:24s} {first:8.3f} -> {last:8.3f}         {statistics.mean(gains):+8.3f} ({error:.3f}){kl:26.3f}"


if __name__ == "__main__":
    typer.run(main)
