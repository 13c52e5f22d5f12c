"""How a reward is hacked, and what notices: the run behind docs/rewards.md, on the embedded model.

    python scripts/reward_hacking.py --runs runs/reward_hacking

The recipe ``ddpo_emoji_gold`` rewards small JPEG files and evaluates the aesthetic score, not trained on. Three
runs: as it is, ended by ``stop_when``; the same carried on without that rule; and one in which a nat of KL has a price.
Draws docs/images/reward_hacking.png and the images of the best and of the last weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from training_runs import train

from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.report import before_after, read_metrics, save_figure, save_png

ROOT = Path(__file__).parent.parent
KEYS = {"reward": "reward: minus the JPEG size, kB", "gold": "gold: aesthetic, held out", "diversity": "diversity"}
PROMPTS = ["a lion", "a panda", "a red apple", "a pizza", "a rocket", "a guitar", "a crab", "an umbrella"]


def main(
    runs: Annotated[Path, typer.Option(help="where the run folders go")] = ROOT / "runs" / "reward_hacking",
    epochs: int = 26,
    seed: int = 0,
    kl_coef: float = 0.1,
    images: Annotated[Path, typer.Option(help="where the images go")] = ROOT / "docs" / "images",
) -> None:
    """Train, draw and print."""
    common = ["grid_every=0", f"epochs={epochs}", f"seed={seed}"]
    stopped = train(runs / "stopped", "ddpo_emoji_gold", common)
    free = runs / "free"
    if not free.exists():  # it begins as the stopped one, bit for bit
        shutil.copytree(stopped, free)
        (free / "report.html").unlink()
    train(free, "ddpo_emoji_gold", [*common, "stop_when={}"])
    priced = train(runs / "kl", "ddpo_emoji_gold", [*common, "stop_when={}", f"kl_coef={kl_coef}"])
    draw(stopped, {"no KL": free, f"kl_coef {kl_coef:g}": priced}, images)


def draw(stopped: Path, curves: dict[str, Path], images: Path) -> None:
    """Both figures, from finished runs; ``stopped`` is the first of ``curves`` as far as the rule let it go."""
    print(json.loads((stopped / "evaluation.json").read_text(encoding="utf-8")))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    end = max(row["epoch"] for row in read_metrics(stopped / "metrics.jsonl"))
    for panel, (key, title) in zip(figure.subplots(1, 3), KEYS.items(), strict=True):
        for label, folder in curves.items():
            found = {row["epoch"]: row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row}
            panel.plot(list(found), list(found.values()), marker=".", label=label)
            print(f"{label:14s}{key:10s}", [round(value, 3) for value in found.values()])
        panel.axvline(end, color="#777777", linestyle="--", linewidth=1, label="stop_when: gold_falling 3")
        panel.set(title=title, xlabel="epoch")
        panel.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    save_figure(figure, images / "reward_hacking.png")

    best = ImageAlignmentPipeline.from_pretrained("emoji-sd", lora=stopped / "best")
    last = ImageAlignmentPipeline.from_pretrained(stopped)
    best.sampler = last.sampler
    sampled = [pipe(PROMPTS, seed=0).images for pipe in (best, last)]
    scores = [pipe.score(drawn, PROMPTS, "aesthetic").tolist() for pipe, drawn in zip((best, last), sampled)]
    grid = before_after(
        *sampled, captions=PROMPTS, rewards_before=scores[0], rewards_after=scores[1], labels=("best", "last")
    )
    save_png(grid, images / "reward_hacking_images.png")


if __name__ == "__main__":
    typer.run(main)
