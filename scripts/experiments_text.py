"""The reference experiments behind docs/text.md: train the text recipes over seeds, draw the figures, print the table.

    python scripts/experiments_text.py --runs runs/experiments_text
    python scripts/experiments_text.py --only grpo_tiny --only ppo_tiny

Runs that are finished are not repeated; interrupted ones are resumed. One thread per run, as many runs at once as
``--at-once``, so wall times are not those of a recipe run alone. A recipe with a held-out list is judged on it: base
model and final weights complete every held-out prompt several times, with the same seeds, and the recipe's reward
scores the completions. The smollm2 recipes need the demo model (README, "Language models").
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer
from training_runs import folder_name, side_by_side, train

from diffusion_align.assets import shipped_text_prompts
from diffusion_align.data.sources import TableSource, first_rows, open_table
from diffusion_align.pipelines import TextAlignmentPipeline
from diffusion_align.pipelines.configuration import shipped_configs
from diffusion_align.report import compare_runs, read_metrics
from diffusion_align.training.reading import load_yaml

ROOT = Path(__file__).parent.parent
SEEDS = 3
# recipe -> held-out list
EXPERIMENTS = {
    "grpo_tiny": "verses_heldout",
    "ppo_tiny": "verses_heldout",
    "kto_tiny": "verses_heldout",
    "dpo_multi_negative_tiny": "verses_heldout",
    "dpo_dynamic_beta_tiny": "verses_heldout",
    "grpo_smollm2_arithmetic": "addition_heldout",
    "dpo_smollm2_sentiment": "opinions_heldout",
}


def main(
    runs: Annotated[Path, typer.Option(help="where the run folders go")] = ROOT / "runs" / "experiments_text",
    at_once: int = 2,
    per_prompt: Annotated[int, typer.Option(help="completions of each held-out prompt")] = 8,
    only: Annotated[list[str] | None, typer.Option(help="recipes; all when not given")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for every run")] = None,
) -> None:
    """Train, judge, draw and print."""
    if unknown := set(only or ()) - set(EXPERIMENTS):
        raise typer.BadParameter(f"--only {' '.join(sorted(unknown))}: choose among {', '.join(EXPERIMENTS)}")
    names = [name for name in EXPERIMENTS if not only or name in only]
    jobs = [(name, seed) for name in names for seed in range(SEEDS)]
    folders = side_by_side(
        lambda job: train(runs / folder_name(*job), job[0], [f"seed={job[1]}", "grid_every=0", *(overrides or [])]),
        jobs,
        at_once,
    )
    print("recipe                    seed  seconds  reward, epochs: first 3 -> last 3   held-out: base -> aligned")
    for name in names:
        base = _held_out(name, None, per_prompt)
        for seed in range(SEEDS):
            folder = folders[name, seed]
            print(f"{_line(name, seed, folder)} {base} -> {_held_out(name, folder, per_prompt)}", flush=True)
        keys = [key for key in ("reward", "kl_path", "completions/mean_length") if _logs(folders[name, 0], key)]
        group = {f"{name}, mean and range of {SEEDS} seeds": [folders[name, seed] for seed in range(SEEDS)]}
        compare_runs(group, keys, ROOT / "docs" / "images" / f"{name}.png", columns=3)


def _line(name: str, seed: int, folder: Path) -> str:
    rows = read_metrics(folder / "metrics.jsonl")
    rewards = [row["reward"] for row in rows if "reward" in row]
    seconds = sum(row.get("time/epoch", 0.0) for row in rows)
    first, last = (statistics.mean(part) for part in (rewards[:3], rewards[-3:]))
    return f"{name:26s}{seed:4d}{seconds:9.0f}   {first:8.3f} -> {last:8.3f}              "


def _held_out(name: str, model: Path | None, per_prompt: int) -> str:
    """Mean reward on the held-out list with a 95 % interval over prompts."""
    recipe = load_yaml(shipped_configs()[name])
    source = str(shipped_text_prompts()[EXPERIMENTS[name]])
    rows = list(first_rows(open_table(TableSource("prompts", source, lines="prompt")), None))
    rows = [dict(row) for row in rows for _ in range(per_prompt)]
    pipe = TextAlignmentPipeline.from_pretrained(model or recipe["model"])
    prompts = [row.pop("prompt") for row in rows]
    texts = pipe(prompts, seed=1234, max_new_tokens=recipe["max_completion_length"], batch_size=64).texts
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    scores = pipe.score(prompts, texts, recipe["reward"], **columns).view(-1, per_prompt).mean(1)
    half = 1.96 * float(scores.std()) / len(scores) ** 0.5
    return f"{float(scores.mean()):.3f} ± {half:.3f}"


def _logs(folder: Path, key: str) -> bool:
    return any(key in row for row in read_metrics(folder / "metrics.jsonl"))


if __name__ == "__main__":
    typer.run(main)
