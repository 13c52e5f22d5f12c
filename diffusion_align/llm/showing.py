"""What people read: completions of fixed prompts with fixed seeds, before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_align.data.text_rows import PromptRow
from diffusion_align.llm.collection import WeightedRewards, completion_ids
from diffusion_align.llm.policy import LanguagePolicy
from diffusion_align.llm.rollout import rollout
from diffusion_align.rewards.base import RewardError
from diffusion_align.training.randomness import generator
from diffusion_align.writing import make_folder, write_text

SHOWN = 16


class _Shown(NamedTuple):
    """Completions of the prompts, and their tokens."""

    texts: list[str]
    ids: list[list[int]]


class TextShow:
    """The fixed prompts of a run, continued as the policy is now.

    Args:
        rows: the prompts; completion i depends on its prompt, ``seed`` and i only.
        rewards: they score what is shown where they can; ``trainer_state`` is None for them.
    """

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
        self.policy, self.rows, self.rewards = policy, list(rows), rewards
        self.seed, self.batch_size, self.length = seed, batch_size, max_completion_length

    def write(self, path: Path) -> None:
        """Write a JSON line for each prompt: ``prompt``, ``completion`` and, if there is one, its ``reward``."""
        shown = self._sample()
        self._lines(path, [{"completion": text, **score} for text, score in zip(shown.texts, self._scores(shown))])

    def write_before_after(self, path: Path) -> None:
        """The same with ``before`` and ``after``, by the reference and by the policy."""
        after = self._sample()
        with self.policy.reference():
            before = self._sample()
        self._lines(
            path,
            [
                {"before": old, "after": new, **_named(was, "before"), **_named(now, "after")}
                for old, new, was, now in zip(before.texts, after.texts, self._scores(before), self._scores(after))
            ],
        )

    def _sample(self) -> _Shown:
        shown = _Shown([], [])
        for start in range(0, len(self.rows), self.batch_size):
            some = self.rows[start : start + self.batch_size]
            streams = [generator(self.seed, "show", start + i) for i in range(len(some))]
            sampled = rollout(self.policy, [row.ids for row in some], streams, max_new_tokens=self.length)
            shown.texts.extend(self.policy.decode(sampled.sequences))
            shown.ids.extend(completion_ids(sampled.sequences))
        return shown

    def _scores(self, shown: _Shown) -> list[dict[str, float]]:
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
