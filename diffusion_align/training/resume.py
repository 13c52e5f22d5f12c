"""What may differ between a run and its continuation: deployment and length; never what determines the weights."""

from __future__ import annotations

import contextlib
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffusion_align.errors import CheckpointError
from diffusion_align.training.aliases import canonical, one_by_one
from diffusion_align.training.config import Content, TrainingConfig
from diffusion_align.training.digests import Identity, changed_content, same_content
from diffusion_align.training.places import absolute_paths
from diffusion_align.training.precision import BEFORE
from diffusion_align.training.processes import Processes
from diffusion_align.training.section import FIELDS_ALONE

_KEEPING = {"checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "interrupt_grace"}
WATCHING = {"output_dir", "resume", "accept_changed", "trackers", "callbacks", "num_threads", "grid_every"} | _KEEPING
"""Settings of where a run is and how it is watched, which change no weight."""
_SAVING_MEMORY = {"gradient_checkpointing", "ema_offload", "offload_text_encoders", "prompts_on_disk"}
"""Settings that fit a run into a machine's memory or disk, and change no bit."""
MUTABLE_ON_RESUME = WATCHING | _SAVING_MEMORY | {"epochs", "stop_when"}
"""Settings that may change on resume: where and for how long, never what."""
# Settings whose content is compared instead of their name, where it is known.
_KNOWN_BY_CONTENT = {"model", "reference_model", "prompts", "dataset", "eval_dataset", "pairs"}
# Others that do: they may change, and the last bits of what is computed with them.
_FREE_BUT_FOR_BITS = {"micro_batch_size", "sample_batch_size", "mixed_precision", "tf32", "attention", "channels_last"}
_FREE_BUT_FOR_BITS |= {"vae_slicing", "logits", "sampling"}
# Where a reward is computed and how long it is waited for: a server may come back under another address.
_DEPLOYMENT_OF_REWARDS = {"device", "offload", "background", "url", "timeout", "patience", "token_file"}
_DEPLOYMENT_OF_REWARDS |= {"concurrency", "cache"}


def resume_fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON values, without where its rewards are computed."""
    return {
        name: without_deployment_options(value) if name in ("reward", "evaluation") else value
        for name, value in config.items()
    }


def without_deployment_options(value: Any) -> Any:
    """A reward's setting, nested as it may be, without its options of deployment."""
    if isinstance(value, list):
        return [without_deployment_options(one) for one in value]
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if key not in _DEPLOYMENT_OF_REWARDS}
        return {key: without_deployment_options(inner) for key, inner in kept.items()}
    return value


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the precision of older versions where none is decided, and without how often a run is evaluated."""
    decided = {**config, **{name: value for name, value in BEFORE.items() if config.get(name) is None}}
    if isinstance(evaluation := config.get("evaluation"), Mapping):
        decided["evaluation"] = {name: value for name, value in evaluation.items() if name != "every"}
    return decided


def check_same_run(
    config: TrainingConfig,
    identity: Identity,
    theirs: Mapping[str, Any],
    their_identity: Mapping[str, Any] | None,
    path: Path,
    processes: Processes,
    *,
    model_given: bool = False,
) -> None:
    """Settings and content that determine the weights must be as they were when the run was started.

    Args:
        config, identity: of this process; an empty identity is not compared.
        theirs: the run's settings as JSON values.
        their_identity: what the run was made of, None or empty if that is not known.
        path: where ``theirs`` are from.
        processes: a process on another machine reads other files, and all raise together.
        model_given: whether ``config.dtype`` is that of a language model in memory. Older versions trained such a model
            as it was and wrote "float32", in which they loaded only ``reference_model``.

    Raises:
        CheckpointError: it is another run.
    """
    older = "tf32" not in theirs  # which every version writes that writes the dtype of a model in memory
    dtype_unknown = model_given and older and getattr(config, "reference_model", None) is None
    theirs = canonical(type(config), theirs)
    with contextlib.suppress(ValidationError):  # of an older version: what it did not have was as it is by default
        theirs = type(config).model_validate(theirs, context=FIELDS_ALONE).model_dump(mode="json")
    mine, theirs = (
        one_by_one(resume_fingerprint(absolute_paths(_comparable(one), config.output_dir)))
        for one in (config.model_dump(mode="json"), theirs)
    )
    theirs["method"] = theirs.get("method") or mine["method"]  # older versions did not write what Python had made
    free = MUTABLE_ON_RESUME if config.lr_schedule == "constant" else MUTABLE_ON_RESUME - {"epochs"}
    accepted = set(config.accept_changed)
    free = free | {"dtype"} if dtype_unknown else free
    moved = (same_content(their_identity or {}, identity) & _KNOWN_BY_CONTENT) | accepted
    changed = [k for k in mine if k not in free | moved | _FREE_BUT_FOR_BITS and mine[k] != theirs.get(k)]
    others = {k: v for k, v in changed_content(their_identity or {}, identity).items() if k not in accepted}
    failure = None
    if changed or others:
        acceptable = [k for k in typing.get_args(Content) if k in accepted | set(changed) | others.keys()]
        remedy = "put it back or choose a new output_dir"
        # Another model may be this run's own result, whose adapters would be added once more.
        if set(changed) <= set(acceptable) - {"model", "reference_model"}:
            remedy = (
                f"put it back, choose a new output_dir, or set accept_changed=[{', '.join(acceptable)}] to resume with "
                "what is there now"
            )
        what = ", ".join(f"{k} was {theirs.get(k)!r} and is {mine[k]!r}" for k in changed)
        content = " and ".join(f"{setting} ({', '.join(places)})" for setting, places in others.items())
        which = f"another run: {what};" if changed else f"a run with other content of {content}:"
        failure = CheckpointError(f"{path} belongs to {which} {remedy}")
    processes.raise_together(failure, CheckpointError)
    resized = [k for k in mine if k in _FREE_BUT_FOR_BITS and mine[k] != theirs.get(k)]
    if resized and processes.is_main:
        what = ", ".join(f"{k}={mine[k]} (was {theirs.get(k)})" for k in resized)
        print(f"resumed with {what}: from here on, results may differ from the run's own in rounding", file=sys.stderr)
