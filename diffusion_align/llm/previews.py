"""Completions of fixed prompts with fixed seeds, during a run and before and after it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_align.data.text_rows import PromptRow
from diffusion_align.llm.collection import WeightedRewards
from diffusion_align.llm.policy import LanguagePolicy
from diffusion_align.llm.rollout import rollout
from diffusion_align.rewards.base import RewardError
from diffusion_align.training.policy_trainer import PREVIEWED, Previews
from diffusion_align.training.randomness import generator
from diffusion_align.writing import make_folder, write_text


class Previewed(NamedTuple):
    """Completions of the prompts, and their tokens."""

    texts: list[str]
    ids: list[list[int]]


class TextPreviews(Previews[Previewed]):
    """Completions of the prompts, a JSON line for each.

    Args:
        policy: what samples.
        rows: the prompts, the first ``PREVIEWED`` of them; completion i depends on its prompt, ``seed`` and i only.
        rewards: they score what is shown where they can; ``trainer_state`` is None for them.
        seed: of the streams.
        batch_size: completions sampled at once.
        max_completion_length: tokens.
    """

    suffix = ".jsonl"

    def __init__(
        self,
        policy: LanguagePolicy,
        rows: Sequence[PromptRow],
        rewards: WeightedRewards | None,
        *,
        seed: int,
        batch_size: int,
        max_completion_length: int,
    ) -> None:
        self.policy, self.rows, self.rewards = policy, list(rows[:PREVIEWED]), rewards
        self.seed, self.length = seed, max_completion_length
        reference = policy.reference if policy.has_reference else None
        super().__init__(reference, count=len(self.rows), batch_size=batch_size)

    def sample_batch(self, indices: range) -> Previewed:
        streams = [generator(self.seed, "show", i) for i in indices]
        prompts = [self.rows[i].ids for i in indices]
        sequences = rollout(self.policy, prompts, streams, max_new_tokens=self.length).sequences
        return Previewed(self.policy.decode(sequences), list(sequences.tokens))

    def join(self, parts: Sequence[Previewed]) -> Previewed:
        return Previewed([text for part in parts for text in part.texts], [ids for part in parts for ids in part.ids])

    def write(self, samples: Previewed, path: Path) -> None:
        """``prompt``, ``completion`` and, if there is one, its ``reward``."""
        self._lines(path, [{"completion": text, **score} for text, score in zip(samples.texts, self._scores(samples))])

    def write_pairs(self, before: Previewed, after: Previewed, path: Path) -> None:
        """``prompt``, ``before`` and ``after``, ``reward_before`` and ``reward_after``."""
        self._lines(
            path,
            [
                {"before": old, "after": new, **_named(was, "before"), **_named(now, "after")}
                for old, new, was, now in zip(before.texts, after.texts, self._scores(before), self._scores(after))
            ],
        )

    def _scores(self, shown: Previewed) -> list[dict[str, float]]:
        """Nothing where a reward cannot say (a shown prompt may lack the columns it needs)."""
        if self.rewards is None:
            return [{} for _ in shown.texts]
        try:
            scores = self.rewards.scores(self.rows, shown.texts, shown.ids)
            total = replace(self.rewards, may_be_silent=True).total(self.rows, scores)
            return [{} if math.isnan(score) else {"reward": score} for score in total.tolist()]
        except RewardError:
            return [{} for _ in shown.texts]

    def _lines(self, path: Path, lines: Sequence[dict[str, Any]]) -> None:
        make_folder(path.parent)
        rows = [{"prompt": row.prompt, **line} for row, line in zip(self.rows, lines, strict=True)]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _named(score: dict[str, float], when: str) -> dict[str, float]:
    return {f"{name}_{when}": value for name, value in score.items()}
