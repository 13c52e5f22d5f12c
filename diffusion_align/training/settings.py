"""Settings of what every policy's run shares: held-out evaluation, and the rules that end a run early."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from diffusion_align.bounds import MOST
from diffusion_align.rewards.settings import RewardSetting
from diffusion_align.training.config import LoRASettings
from diffusion_align.training.section import OrInfinite, Section

if TYPE_CHECKING:
    from diffusion_align.training.evaluation import Evaluation


class EvaluationConfig(Section):
    """What every held-out evaluation has."""

    reward: RewardSetting = Field(None, description="the held-out reward")
    every: int = Field(10, ge=1, le=MOST, description="epochs between evaluations; the last epoch always has one")


def no_std(setting: str, other: str) -> str:
    """The sentence that ``setting``, which is about the std of a group, does nothing with the setting ``other``."""
    return f"{setting} has no effect with {other}, which divides by no std: leave one of them out"


def dropout_checks(lora: LoRASettings | None) -> Iterator[str]:
    """A sentence if adapters have dropout where a ratio compares training passes with the policy that sampled."""
    if lora is not None and lora.dropout:
        yield (
            f"lora.dropout={lora.dropout:g} trains a different policy from the one that sampled, so ratios would not "
            "start at 1: leave it out"
        )


class ExperimentalAdvantages(Section):
    """Rarely used settings of advantages."""

    clip_std: tuple[OrInfinite, OrInfinite] = Field(
        (0.0, math.inf), description="bounds on the std that rewards are divided by"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize", description="several rewards: the advantage of their sum, or the sum of their advantages"
    )

    def bounds_checks(self) -> Iterator[str]:
        """For the ``cross_checks`` of the configuration that holds it, so that its others are reported as well."""
        if not 0 <= self.clip_std[0] <= self.clip_std[1]:
            yield f"experimental.clip_std={list(self.clip_std)} must be two numbers 0 <= low <= high"

    @property
    def clips_std(self) -> bool:
        return self.clip_std != (0.0, math.inf)


class StopConfig(Section):
    """When a run ends before its last epoch: as soon as one of these holds."""

    kl_above: OrInfinite | None = Field(
        None, gt=0, description="largest kl_path of a whole sample in nats, less two standard errors"
    )
    gold_falling: int | None = Field(
        None, ge=1, le=MOST, description="evaluations in a row in which the held-out reward is below its best"
    )

    def unmeasured(self, evaluation: EvaluationConfig | None) -> Iterator[str]:
        """Sentences about rules that need what ``evaluation`` does not measure."""
        if self.gold_falling is not None and evaluation is None:
            yield "stop_when.gold_falling needs evaluations: set evaluation, or leave it out"
        elif self.gold_falling is not None and evaluation is not None and evaluation.reward is None:
            yield "stop_when.gold_falling needs a held-out reward: set evaluation.reward, or leave it out"

    def broken(self, row: Mapping[str, Any], evaluation: Evaluation | None) -> list[str]:
        """The rules that an epoch's metrics break, a sentence each."""
        reasons = []
        kl, error = row.get("kl_path"), row.get("kl_path_stderr", 0.0)
        if self.kl_above is not None and kl is not None and kl - 2 * error > self.kl_above:
            known = f"{kl:.4g} nats" + (f" (standard error {error:.2g})" if error else "")
            reasons.append(f"the KL to the reference is {known}, above stop_when.kl_above={self.kl_above:g}")
        best = None if evaluation is None else evaluation.best
        if self.gold_falling is not None and evaluation and best and evaluation.falling >= self.gold_falling:
            epoch, score = best
            found = f"{evaluation.falling} evaluations (stop_when.gold_falling={self.gold_falling})"
            reasons.append(
                f"the held-out reward has been below its best, {score:.4g} after epoch {epoch}, in the last {found}"
                if epoch
                else f"the held-out reward has been below that before training, {score:.4g}, in all {found}, so there "
                "is no best/: lower learning_rate, raise kl_coef or beta, or choose another held-out reward"
            )
        return reasons
