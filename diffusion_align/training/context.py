"""What a method is made from, and what it says of itself: the meaning of its metrics, the cost of an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusion_align.training.callbacks import Callback
    from diffusion_align.training.digests import Identity


@dataclass(frozen=True)
class RunContext:
    """One run before its trainer: what its configuration names, opened, checked and on its device; else empty or None.

    Attributes:
        config: checked settings, ``mixed_precision`` decided.
        accelerator: devices, precision, processes and trackers.
        policy: the model to train, by the method's ``model_kind``: a ``DenoisingPolicy``, a ``LanguagePolicy``, a
            ``RewardModel``, or None.
        data: setting -> its rows: ``prompts``, ``pairs``, ``dataset``, ``eval_dataset``.
        reward: a function for images, ``WeightedRewards`` for text; already checked.
        evaluation: the held-out reward and fixed prompts.
        shown: rows of ``show_prompts``, of text.
        callbacks: called after the project's own.
        identity: what the run is made of, by content.
    """

    config: Any
    accelerator: Accelerator
    policy: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)
    reward: Any = None
    evaluation: Any = None
    shown: Sequence[Any] | None = None
    callbacks: Sequence[Callback] = ()
    identity: Identity = field(default_factory=dict)


class Metric(NamedTuple):
    """What one key in ``metrics.jsonl`` means; a run keeps it in ``metrics.json``.

    Attributes:
        title: of its plot.
        unit: of its axis, such as "nats per token".
        reading: one sentence that tells how it is read.
    """

    title: str
    unit: str = ""
    reading: str = ""


Lines = list[tuple[str, str]]
"""(name, value); a name without a value is the heading of those that follow."""


@dataclass(frozen=True)
class EpochCost:
    """What an epoch costs, computed from settings alone: passes of the network on one sample, of all processes together
    and without those of the evaluation.

    Attributes:
        what: what an epoch is about, a name and a value such as ("images per epoch", "64, each 20 steps").
        units: samples or pairs that the epoch's updates divide among themselves.
        actions: those trained on, of all units together: steps of an image or pair, completions.
        sampling: forward passes to sample.
        trained: forward and backward passes.
        reference, probed: forward passes for the reference, and to estimate how far the policy is from it.
        old: forward passes of the policy that sampled, where an update compares with it.
        estimated: forward passes for what is needed before the first update, such as values.
        decoded: images decoded.
        differentiated: images decoded with a backward pass.
        graphs: training passes whose activations are kept together, for one backward pass.
        width: samples in a training pass for each action of a micro-batch.
        recorded: latents kept of an epoch.
        snapshots: copies of the trained weights that are kept beside them.
    """

    what: tuple[str, str]
    units: int
    actions: int
    sampling: int = 0
    trained: int = 0
    reference: int = 0
    probed: int = 0
    old: int = 0
    estimated: int = 0
    decoded: int = 0
    differentiated: int = 0
    graphs: int = 1
    width: int = 1
    recorded: int = 0
    snapshots: int = 0
