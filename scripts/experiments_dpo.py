"""The experiments behind docs/diffusion_dpo.md: train by every variant, compare with the model before, draw, print.

    python scripts/experiments_dpo.py --runs runs/experiments_dpo

Runs that are finished are not repeated. One thread per run, as many at once as ``--at-once``. The judge is the embedded
style head, the prompts are the 59 concepts that no training pair shows; every prompt is drawn ``--per-prompt`` times.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from training_runs import folder_name, side_by_side, train

from diffusion_align.data.drawings import load_preferences
from diffusion_align.data.prompts import load_prompts
from diffusion_align.pipelines.compare import Comparison, compare_models
from diffusion_align.report import compare_runs, read_metrics

ROOT = Path(__file__).parent.parent
# name -> recipe, overrides, seeds. DDPO's epochs take as long as dpo_emoji_style's 40.
EXPERIMENTS: dict[str, tuple[str, list[str], int]] = {
    "original": ("dpo_emoji_style", [], 3),
    "corrected, KL price 2 beta": ("dpo_emoji_style_corrected", [], 3),
    "corrected, KL price 0": ("dpo_emoji_style_corrected", ["kl_coef=0"], 1),
    "online": ("dpo_emoji_online", [], 3),
    "DDPO": ("ddpo_emoji_aesthetic", ["epochs=16", "prompts={runs}/train_prompts.txt"], 3),
}


def main(
    runs: Annotated[Path, typer.Option(help="where the run folders go")] = ROOT / "runs" / "experiments_dpo",
    at_once: int = 2,
    per_prompt: int = 4,
    only: Annotated[list[str] | None, typer.Option(help="names of experiments; all when not given")] = None,
) -> None:
    """Train, compare, draw and print."""
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "train_prompts.txt").write_text(
        "".join(f"{pair.prompt}\n" for pair in load_preferences("train")), encoding="utf-8"
    )
    names = [name for name in EXPERIMENTS if not only or name in only]
    jobs = [(name, seed) for name in names for seed in range(EXPERIMENTS[name][2])]
    folders = side_by_side(lambda job: _train(runs, *job), jobs, at_once)
    prompts = [text for text, _ in load_prompts("emoji_heldout")]
    torch.set_num_threads(at_once)
    print("experiment                  seed  seconds  wins (95 % interval)      score (s.e.)  KL, nats")
    for (name, seed), folder in folders.items():
        if not (folder / "final").is_dir():
            why = (folder / "stopped.txt").read_text(encoding="utf-8").strip()
            print(f"{name:28s}{seed:4d}  stopped by the guard: {why}")
            continue
        image = folder / "compare.png"
        result = compare_models("emoji-sd", str(folder), prompts, "aesthetic", per_prompt=per_prompt, output=image)
        print(_line(name, seed, folder, result), flush=True)
    if only:
        return
    images = ROOT / "docs" / "images"
    shown = {name: [folders[name, seed] for seed in range(3)] for name in ("original", "corrected, KL price 2 beta")}
    keys = ["rewards/accuracies", "rewards/margins", "error/winner", "error/loser", "kl", "error/winner_ratio"]
    compare_runs(shown, keys, images / "dpo_variants.png", title="Diffusion-DPO on the style pairs, three seeds")
    for name, target in (
        ("original", "dpo"),
        ("corrected, KL price 2 beta", "dpo_corrected"),
        ("online", "dpo_online"),
    ):
        shutil.copy(folders[name, 0] / "samples" / "before_after.png", images / f"{target}_before_after.png")
    shutil.copy(folders["original", 0] / "compare.png", images / "dpo_heldout.png")


def _train(runs: Path, name: str, seed: int) -> Path:
    recipe, overrides, _ = EXPERIMENTS[name]
    folder = runs / folder_name(name, f"seed{seed}")
    settings = [setting.format(runs=runs) for setting in overrides]
    if not (folder / "stopped.txt").is_file():
        try:
            train(folder, recipe, [*settings, f"seed={seed}", "mixed_precision=no", "grid_every=0"])
        except RuntimeError as error:
            if "the policy diverges" not in str(error):
                raise
            (folder / "stopped.txt").write_text(str(error), encoding="utf-8")
    return folder


def _line(name: str, seed: int, folder: Path, result: Comparison) -> str:
    rows = read_metrics(folder / "metrics.jsonl")
    seconds = sum(row.get("time/epoch", 0.0) for row in rows)
    kl = statistics.mean([row["kl_path"] for row in rows if "kl_path" in row][-10:])
    wins = f"{result.win_rate:.3f} ({result.low:.3f} to {result.high:.3f})"
    gain = f"{result.mean_difference:+.2f} ({result.standard_error:.2f})"
    return f"{name:28s}{seed:4d}  {seconds:7.0f}  {wins:24s}  {gain:12s}  {kl:8.1f}"


if __name__ == "__main__":
    typer.run(main)
