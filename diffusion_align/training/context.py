"""What a trainer is made from: everything that a configuration names, opened, checked and on its device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from diffusion_align.training.callbacks import Callback
from diffusion_align.training.digests import Identity


@dataclass(frozen=True)
class RunContext:
    """One run before its trainer; what the configuration does not name is empty or None.

    Attributes:
        config: checked settings, ``mixed_precision`` decided.
        accelerator: devices, precision, processes and trackers.
        policy: what is trained, by the method's ``model_kind``: a ``DenoisingPolicy``, a ``LanguagePolicy``, a
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
