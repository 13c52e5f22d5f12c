"""Who takes part in the race, on which courses, and what each still has to run; targets and rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from race_run import PROMPTS, Job, Limits

from diffusion_align.pipelines.configuration import read_config
from diffusion_align.writing import write_text

Row = dict[str, Any]

SHIPPED, PLAIN = "DDPO as shipped", "DDPO, every step"
SEEDS = (0, 1, 2)
SEARCH_SEED = 100
FACTORS = (1.0, 3.0, 1 / 3)
BUDGET = 1.5
"""Passes of a run, in those of the shipped recipe's whole run."""
REWARDS = {"aesthetic": "ddpo_emoji_aesthetic", "jpeg_compressibility": "ddpo_emoji_jpeg"}
"""Reward -> the shipped DDPO recipe of emoji-sd."""
FLOW_RECIPE = "flow_emoji_jpeg"
"""The shipped DDPO recipe of emoji-flow, for both rewards."""
FLOW = ["model=emoji-flow", "t5=false", "max_sequence_length=1", "attention=sdpa", "lora.layers=attention+feed_forward"]
"""Settings of a recipe of emoji-sd for emoji-flow."""


@dataclass(frozen=True)
class Entrant:
    """A method with its settings.

    Attributes:
        recipe: shipped one, or one per reward; None is the DDPO recipe of the reward and model.
        overrides: of the recipe.
        on_sd, on_flow: further ones for one of the models.
        flow_recipe: shipped one for emoji-flow, where there is one; otherwise it is ``recipe`` with other settings.
        searched: whether its learning rate is searched; otherwise it is the recipe's, and runs go to their end.
        budget: see ``BUDGET``.
        without: rewards it cannot train, and why.
    """

    recipe: str | Mapping[str, str] | None = None
    overrides: Sequence[str] = ()
    on_sd: Sequence[str] = ()
    on_flow: Sequence[str] = ()
    flow_recipe: str | None = None
    searched: bool = True
    budget: float = BUDGET
    without: Mapping[str, str] = field(default_factory=dict)

    def settings(self, reward: str, model: str) -> tuple[str, list[str]]:
        """The recipe, and its overrides but for reward, model, learning rate and seed."""
        flow = model == "emoji-flow"
        further = self.on_flow if flow else self.on_sd
        if self.recipe is None:
            return (FLOW_RECIPE if flow else REWARDS[reward]), [*self.overrides, *further]
        overrides = [f"prompts={json.dumps(PROMPTS)}", *self.overrides]
        if flow and self.flow_recipe:
            return self.flow_recipe, [*overrides, *further]
        recipe = self.recipe if isinstance(self.recipe, str) else self.recipe[reward]
        return recipe, [*overrides, *(FLOW[1:] if flow else ()), *further]


NFT = {"aesthetic": "quickstart", "jpeg_compressibility": "nft_emoji_jpeg"}
FLOW_NFT = "flow_emoji_nft"
"""For both rewards."""
NFT_RATE = ["learning_rate=0.003"]
"""Where the search began; quickstart has the learning rate that won it."""
UNWATCHED = ["consistency_images=0"]
"""A measurement before training, which changes nothing in it."""
ENTRANTS: dict[str, Entrant] = {
    SHIPPED: Entrant(searched=False),
    PLAIN: Entrant(overrides=["timestep_range=[0.0, 1.0]", "timestep_fraction=1.0"], budget=6),
    "DDPO, windows": Entrant(
        overrides=[
            *("timestep_range=null", "timestep_fraction=1.0", "sampler.noisy_steps=3", "sampler.noisy_range=[0.0, 0.9]")
        ],
        on_flow=["sampler.noisy_range=[0.0, 0.8]"],
    ),
    "online Diffusion-DPO": Entrant("dpo_emoji_online"),
    "NFT": Entrant(NFT, UNWATCHED, NFT_RATE, flow_recipe=FLOW_NFT),
    "AWM": Entrant(NFT, [*UNWATCHED, "objective=awm", "beta=null"], NFT_RATE, flow_recipe=FLOW_NFT),
    "DGPO": Entrant(NFT, [*UNWATCHED, "objective=dgpo", "beta=null"], NFT_RATE, flow_recipe=FLOW_NFT),
    "RWR": Entrant("rwr_emoji_aesthetic"),
    "DRaFT": Entrant(
        "draft_emoji_aesthetic",
        ["evaluation=null", "stop_when.gold_falling=null"],
        on_flow=["kl_coef=0"],  # a late step of a flow model holds so many nats that it does not move at 3e-4
        without={"jpeg_compressibility": "the reward has no gradient"},
    ),
}


@dataclass(frozen=True)
class Course:
    """One model and one reward, with the rows so far.

    Attributes:
        rows: of this model and reward.
        target: evaluation reward; None before it is known.
    """

    model: str
    reward: str
    rows: Sequence[Row]
    target: float | None

    def of(self, method: str, role: str) -> list[Row]:
        """The rows of a method, by learning rate and seed."""
        found = [row for row in self.rows if row["method"] == method and row["role"] == role]
        return sorted(found, key=lambda row: (row["learning_rate"], row["seed"]))

    def reached(self, row: Row) -> Row | None:
        """The first evaluation at or above the target."""
        return next((e for e in row["evaluations"] if self.target is not None and e["reward"] >= self.target), None)

    def passes_to_target(self, row: Row) -> float:
        """Infinite if it was not reached."""
        evaluation = self.reached(row)
        return float("inf") if evaluation is None else evaluation["passes"]

    def best(self, method: str) -> float | None:
        """The learning rate of the search that goes on to the three seeds; None without a search."""
        searched = self.of(method, "search")
        if not searched:
            return None

        def rank(row: Row) -> tuple[float, float]:
            return self.passes_to_target(row), -max(e["reward"] for e in row["evaluations"])

        return float(min(searched, key=rank)["learning_rate"])

    def jobs(self, method: str) -> Iterator[tuple[Job, Limits]]:
        """What a method still has to run: the first of them, then, with its row, the next."""
        entrant = ENTRANTS[method]
        recipe, overrides = entrant.settings(self.reward, self.model)
        base: float = read_config(recipe, [f"model={self.model}", *overrides, "output_dir=unused"]).learning_rate
        if self.reward in entrant.without:
            return
        if not entrant.searched:
            yield from self._missing(method, [(base, seed) for seed in SEEDS], "final", Limits(self.target, None))
            return
        shipped = self.of(SHIPPED, "final")
        if self.target is None or len(shipped) < len(SEEDS):
            return
        budget = entrant.budget * statistics.mean(row["passes"] for row in shipped)
        best = min((self.passes_to_target(row) for row in self.of(method, "search")), default=float("inf"))
        rates = [(float(f"{base * factor:.3g}"), SEARCH_SEED) for factor in FACTORS]
        searches = list(self._missing(method, rates, "search", Limits(self.target, min(budget, best))))
        yield from searches
        if not searches and (rate := self.best(method)) is not None:
            yield from self._missing(method, [(rate, seed) for seed in SEEDS], "final", Limits(self.target, budget))

    def _missing(
        self, method: str, runs: Sequence[tuple[float, int]], role: str, limits: Limits
    ) -> Iterator[tuple[Job, Limits]]:
        there = {(row["learning_rate"], row["seed"]) for row in self.of(method, role)}
        for rate, seed in runs:
            if (rate, seed) not in there:
                yield Job(method, self.reward, self.model, rate, seed, role), limits


def read_rows(results: Path) -> list[Row]:
    """All rows; one of a method, reward, model, learning rate, seed and role each."""
    path = results / "rows.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def read_targets(results: Path) -> dict[str, Row]:
    """Model/reward -> its target."""
    path = results / "targets.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def course(results: Path, model: str, reward: str) -> Course:
    """One model and reward as its rows stand."""
    rows = [row for row in read_rows(results) if (row["model"], row["reward"]) == (model, reward)]
    target = read_targets(results).get(f"{model}/{reward}")
    return Course(model, reward, rows, None if target is None else target["target"])


def fix_target(results: Path, model: str, reward: str) -> None:
    """Write the target if the shipped recipe has run with all seeds and there is none yet."""
    shipped = course(results, model, reward).of(SHIPPED, "final")
    targets, name = read_targets(results), f"{model}/{reward}"
    if name in targets or len(shipped) < len(SEEDS):
        return
    ends = [row["evaluations"][-1]["reward"] for row in shipped]
    commits = sorted({row["commit"] for row in shipped})
    targets[name] = {"target": round(statistics.mean(ends), 4), "ends": ends, "commits": commits}
    write_text(results / "targets.json", json.dumps(targets, indent=1) + "\n")
