"""What the forms of the KL do to a run ([002] "Rethinking KL Divergence in RLHF", table 1), on the embedded model.

    python scripts/kl_forms.py --runs runs/kl_forms

GRPO as the recipe ``grpo_tiny`` has it, at one price of a nat, with the KL as k1, k2 or k3 in the loss by autograd of
the bare value ("direct"), k1, k2 or k3 in the reward, over the full vocabulary, and without; on-policy (one update an
epoch) and off-policy (eight updates on the same completions, half as many epochs). Draws docs/images/kl_forms.png.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from training_runs import folder_name, side_by_side, train

from diffusion_align.report import read_metrics, save_figure

ROOT = Path(__file__).parent.parent
FORMS = {
    "no KL": ["kl_coef=0"],
    "k1 as the loss": ["kl=k1_loss", "experimental.kl_gradient=direct"],
    "k2 as the loss": ["kl=k2_loss", "experimental.kl_gradient=direct"],
    "k2 as the loss, weighed": ["kl=k2_loss"],
    "k3 as the loss": ["kl=k3_loss", "experimental.kl_gradient=direct"],
    "k1 in the reward": ["kl=k1_reward"],
    "k2 in the reward": ["kl=k2_reward"],
    "k3 in the reward": ["kl=k3_reward"],
    "full vocabulary": ["kl=full_vocabulary"],
}
REGIMES = {
    "on-policy": ["updates_per_epoch=1", "inner_epochs=1"],
    "off-policy": ["updates_per_epoch=2", "inner_epochs=4"],
}


def main(
    runs: Annotated[Path, typer.Option(help="where the run folders go")] = ROOT / "runs" / "kl_forms",
    at_once: int = 2,
    beta: float = 0.2,
    epochs: Annotated[int, typer.Option(help="on-policy; off-policy half as many")] = 30,
    seeds: int = 1,
    draw: Annotated[bool, typer.Option(help="write the figure into docs/images")] = True,
) -> None:
    """Train every form in both regimes, draw and print."""
    length = {"on-policy": epochs, "off-policy": epochs // 2}
    jobs = [(regime, form, seed) for seed in range(seeds) for regime in REGIMES for form in FORMS]
    folders = side_by_side(
        lambda job: train(
            runs / folder_name(*job),
            "grpo_tiny",
            [
                f"kl_coef={beta}",
                *FORMS[job[1]],
                *REGIMES[job[0]],
                f"seed={job[2]}",
                f"epochs={length[job[0]]}",
                "grid_every=0",
                "clip_range_high=0.2",
            ],
        ),
        jobs,
        at_once,
    )
    print(f"last 5 epochs, beta {beta}                 KL, nats per completion    reward")
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    for column, regime in enumerate(REGIMES):
        for number, form in enumerate(FORMS):
            runs_of_form = [read_metrics(folders[regime, form, seed] / "metrics.jsonl") for seed in range(seeds)]
            ends = []
            for panel, key in zip(panels[:, column], ("kl_path", "reward"), strict=True):
                curves = [[row[key] for row in rows if key in row and "reward" in row] for rows in runs_of_form]
                curve = [statistics.mean(values) for values in zip(*curves, strict=True)]
                style = ("-", "--", ":")[number % 3]  # some forms are one run, and their curves lie on each other
                panel.plot(range(1, len(curve) + 1), curve, style, color=f"C{number}", label=form)
                ends.append(statistics.mean(curve[-5:]))
            print(f"{regime:12s}{form:30s}{ends[0]:16.2f}{ends[1]:16.3f}", flush=True)
        panels[0, column].set(title=regime, yscale="symlog", ylabel="KL to the reference, nats per completion")
        panels[1, column].set(xlabel="epoch", ylabel="reward")
    panels[1, 1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"GRPO on tiny-lm: eight forms of the KL, each at {beta} a nat, and none")
    if draw:
        save_figure(figure, ROOT / "docs" / "images" / "kl_forms.png")


if __name__ == "__main__":
    typer.run(main)
