"""What people look at while a run trains and when it ends: the fixed prompts of the run, sampled with fixed seeds."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

Samples = TypeVar("Samples")
PREVIEWED = 16
"""How many of the prompts are shown where none are named."""


class Previews(ABC, Generic[Samples]):
    """Samples of a run's fixed prompts; a subclass says of what kind, and how they are written.

    Args:
        reference: context in which the policy is its reference; None where it has none.
    """

    suffix: ClassVar[str]

    def __init__(self, reference: Callable[[], contextlib.AbstractContextManager] | None) -> None:
        self.reference = reference

    @abstractmethod
    def sample(self) -> Samples:
        """One sample per prompt, as the policy is now; each depends on its prompt, its place and the seed only."""

    @abstractmethod
    def write(self, samples: Samples, path: Path) -> None:
        """Write samples to ``path``, whose name ends in ``suffix``."""

    @abstractmethod
    def write_pairs(self, before: Samples, after: Samples, path: Path) -> None:
        """Write samples of the reference and of the policy, with the reward of each where it can say."""

    def before_after(self) -> tuple[Samples, Samples] | None:
        """Samples of the reference and of the policy; None where there is no reference."""
        if self.reference is None:
            return None
        after = self.sample()
        with self.reference():
            return self.sample(), after
