"""One run of the race: its network passes counted by a hook, its images evaluated between epochs.

A pass is one latent through the trained network; its backward pass counts as two more. Guidance, the old policy and the
reference count; what the race itself samples and compares to evaluate does not.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffusion_align
from diffusion_align.diffusion.evaluation import mean_pairwise_distance
from diffusion_align.diffusion.rollout import rollout, transition
from diffusion_align.diffusion.trained_steps import trained_steps
from diffusion_align.diffusion.transitions import GaussianTransition
from diffusion_align.errors import TrainingError, UserError
from diffusion_align.extending import Callback, Trainer
from diffusion_align.pipelines.configuration import read_config
from diffusion_align.pipelines.run import run
from diffusion_align.rewards import build_reward
from diffusion_align.rewards.base import call_reward
from diffusion_align.rewards.image.clip import EMOJI_CLIP, load_clip
from diffusion_align.training.randomness import generator

ROOT = Path(__file__).parent.parent
PROMPTS = ["a lion", "a panda", "a red apple", "a pizza", "a rocket", "a guitar", "a crab", "an umbrella"]
"""Of training and evaluation alike."""
PER_PROMPT = 4
"""Images per prompt in every evaluation."""
SEED = 2026
"""Of the evaluations' noise, the same in all of them."""
HELD_OUT = "clip_score"
SPACING = 1.05, 1.5
"""An epoch is evaluated where so many times the passes of the last evaluation were made: the smaller number once the
epoch's own samples are a quarter of the way to the target, or where that is not known."""
QUARTER = 0.25
HOPELESS = 0.5
"""A search ends where this part of its budget has led less than a quarter of the way to the target."""
TRAINED_RANGE = {"emoji-sd": (0.0, 0.9), "emoji-flow": (0.0, 0.8)}
"""The steps whose KL is summed: those that the shipped recipes train on, for every method."""


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        method: name of the entrant.
        reward: that is trained and evaluated.
        model: embedded.
        learning_rate: of the optimizer.
        seed: of the run.
        role: "search", of the learning rate, or "final", of one of the three seeds.
    """

    method: str
    reward: str
    model: str
    learning_rate: float
    seed: int
    role: str

    @property
    def folder(self) -> Path:
        """Where its run goes."""
        name = "_".join(str(value).replace(" ", "_").replace(",", "") for value in asdict(self).values())
        return ROOT / "runs" / "race" / name


@dataclass(frozen=True)
class Limits:
    """Where a run ends.

    Attributes:
        target: evaluation reward; None is unknown.
        budget: passes; None is to the end of the recipe, whether or not the target is reached.
    """

    target: float | None
    budget: float | None


class PassCounter:
    """Counts rows through ``network`` until it is closed: 1 each, 3 with a graph for a backward pass."""

    def __init__(self, network: nn.Module) -> None:
        self.passes, self._counts = 0, True
        self._handle = network.register_forward_hook(self._count)

    def _count(self, _: nn.Module, __: Any, output: Any) -> None:
        rows: Tensor = output[0]  # of a tuple, or of what diffusers returns
        if self._counts:
            self.passes += len(rows) * (3 if rows.requires_grad else 1)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, nothing is counted."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def close(self) -> None:
        self._handle.remove()


class Evaluations(Callback):
    """Evaluates the policy before the first epoch and between epochs, and ends the run at its limits.

    Args:
        job, limits: of the run.
        sampler: settings of the sampler that evaluates, the same for every method.

    Attributes:
        found: one row per evaluation.
        passes: made so far.
    """

    def __init__(self, job: Job, limits: Limits, sampler: Any) -> None:
        self.job, self.limits, self.sampler = job, limits, sampler
        self.found: list[dict[str, Any]] = []
        self._spent = (0.0, 0.0)  # CPU-seconds and seconds of the evaluations

    @property
    def passes(self) -> int:
        return self._counter.passes

    def on_start(self, trainer: Trainer[Any]) -> None:
        policy = trainer.policy  # type: ignore[attr-defined]
        self._counter = PassCounter(policy.network)
        setter = policy.timesteps_setter()
        schedule = self.sampler.schedule(policy.pipeline.scheduler, setter)
        self._steps = trained_steps(schedule, TRAINED_RANGE[self.job.model])
        self._schedule = schedule.to(policy.device)
        self._held_out = build_reward(HELD_OUT, model=self.job.model)
        self._embed = load_clip(EMOJI_CLIP, device=policy.device).embed_images
        self._began = time.process_time(), time.perf_counter()
        self._evaluate(trainer)

    def on_epoch_end(self, trainer: Trainer[Any], row: dict[str, Any]) -> str | None:
        last, budget = trainer.epoch == trainer.config.epochs, self.limits.budget
        over = budget is not None and self.passes >= budget
        spacing = SPACING[0 if self._way(row.get("reward", math.inf)) >= QUARTER else 1]
        if not (last or over or self.passes >= spacing * self.found[-1]["passes"]):
            return None
        self._evaluate(trainer, last=last or over)
        if budget is None:
            return None
        way = self._way(self.found[-1]["reward"])
        if way >= 1:
            return "the target is reached"
        if self.job.role == "search" and self.passes >= HOPELESS * budget and way < QUARTER:
            return "it is hopeless"
        return "the budget is spent" if over else None

    def _way(self, reward: float) -> float:
        """The part of the way to the target; infinite where there is none."""
        start, target = self.found[0]["reward"], self.limits.target
        return math.inf if target is None else float((reward - start) / (target - start))

    def on_close(self, trainer: Trainer[Any]) -> None:
        if hasattr(self, "_counter"):
            self._counter.close()

    def _evaluate(self, trainer: Trainer[Any], *, last: bool = False) -> None:
        """Append a row; of a final run with the KL where it is the ``last`` one or the target is reached."""
        before = time.process_time(), time.perf_counter()
        row: dict[str, Any] = {"epoch": trainer.epoch, "passes": self.passes}
        row["cpu_seconds"], row["seconds"] = (
            round(now - began - spent, 2) for now, began, spent in zip(before, self._began, self._spent, strict=True)
        )
        with self._counter.off(), _without_guidance(trainer.policy) as policy:  # type: ignore[attr-defined]
            texts = [text for text in PROMPTS for _ in range(PER_PROMPT)]
            path = rollout(
                policy,
                self._schedule,
                policy.encode(texts),
                [generator(SEED, "race", i) for i in range(len(texts))],
                record=self._steps.expand(len(texts), -1),
                record_means=True,
            )
            images = policy.decode(path.latents)
            nothing: list[dict[str, Any]] = [{} for _ in texts]
            for name, reward in (("reward", trainer.reward), ("held_out", self._held_out)):  # type: ignore[attr-defined]
                row[name] = round(call_reward(reward, images, texts, nothing).mean().item(), 6)
            row["diversity"] = round(mean_pairwise_distance(self._embed(images)), 6)
            reached = self.limits.target is not None and row["reward"] >= self.limits.target
            if self.job.role == "final" and (last or reached):
                row["kl"] = round(_kl_to_reference(policy, self._schedule, path), 4)
        self.found.append(row)
        after = time.process_time(), time.perf_counter()
        self._spent = tuple(s + a - b for s, a, b in zip(self._spent, after, before, strict=True))  # type: ignore[assignment]


@contextlib.contextmanager
def _without_guidance(policy: Any) -> Iterator[Any]:
    before, policy.guidance_scale = policy.guidance_scale, 1.0
    try:
        yield policy
    finally:
        policy.guidance_scale = before


@torch.no_grad()
def _kl_to_reference(policy: Any, schedule: Any, path: Any) -> float:
    """Nats of the recorded steps of a path together, the mean of all paths."""
    total = 0.0
    for k in range(path.steps.shape[1]):
        steps = path.steps[:, k]
        with policy.reference():
            reference = transition(policy, schedule, path.x_t[:, k], steps, path.conditioning)
        total += GaussianTransition(path.mean_old[:, k], reference.std).kl(reference).mean().item()
    return total


def run_job(job: Job, recipe: str, overrides: Sequence[str], limits: Limits, commit: str) -> dict[str, Any]:
    """Run ``job`` and return its row; a run that fails by itself has a row too, with the sentence.

    Args:
        job: what is run.
        recipe, overrides: its settings but for those of ``job``.
        limits: where it ends.
        commit: of the code.
    """
    settings = [
        *(f"{key}={value}" for key, value in (("reward", job.reward), ("model", job.model))),
        *overrides,
        *(f"{key}={value}" for key, value in (("learning_rate", job.learning_rate), ("seed", job.seed))),
        *(
            "grid_every=0",
            "show_prompts=[a lion]",
            "checkpoint_every=100000",
            "checkpoint_minutes=null",
            "num_threads=1",
            "mixed_precision=no",
        ),
        f"output_dir={job.folder.relative_to(ROOT)}",
    ]
    if limits.budget is not None:
        settings.append("epochs=10000")
    shutil.rmtree(job.folder, ignore_errors=True)
    config: Any = read_config(recipe, [*settings, f"output_dir={job.folder}"])
    evaluations = Evaluations(job, limits, evaluation_sampler(job.model))
    config = config.model_copy(update={"callbacks": [evaluations]})
    ended, failed = "", None
    try:
        ended = run(config).stopped or "the recipe's end"
    except TrainingError as error:
        ended = failed = str(error).splitlines()[0]
    return {
        **asdict(job),
        "command": shlex.join(["diffusion-align", "train", recipe, *settings]),
        "commit": commit,
        "target": limits.target,
        "budget": limits.budget,
        "passes": evaluations.found[-1]["passes"],
        "ended": ended,
        "failed": failed is not None,
        "evaluations": evaluations.found,
    }


def evaluation_sampler(model: str) -> Any:
    """Settings of the sampler that evaluates images of ``model``: that of its shipped recipes."""
    return read_config(
        {"emoji-sd": "ddpo_emoji_aesthetic", "emoji-flow": "flow_emoji_jpeg"}[model], ["output_dir=unused"]
    ).sampler


def commit_of_code() -> str:
    """The commit that runs.

    Raises:
        UserError: the code is not that of a commit, or not that beside this script.
    """
    found = Path(diffusion_align.__file__).resolve().parent.parent
    if found != ROOT.resolve():
        raise UserError(f"the package that runs is in {found}: set PYTHONPATH to {ROOT}")

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
        ).stdout.strip()

    if changed := git("status", "--porcelain", "--", ".", ":!docs/race"):
        raise UserError(f"the working tree has changes ({changed.splitlines()[0].strip()}, ...): commit them first")
    return git("rev-parse", "HEAD")
