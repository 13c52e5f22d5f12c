"""Calls of a trainer as other libraries take them, and what to call here instead."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_align.errors import UserError

_ELSEWHERE = {
    *("model", "args", "reward_funcs", "reward_model", "ref_model", "train_dataset", "processing_class", "peft_config"),
    *("reward_fn", "prompt_fn", "reward_function", "prompt_function", "sd_pipeline", "pipeline"),
}
"""Arguments of other libraries' trainers."""


def check_call(kind: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """UserError where the trainer class ``kind`` is called as TRL's trainers are, or without a policy."""
    known = inspect.signature(kind.__init__).parameters
    named = kwargs.keys() & _ELSEWHERE - known.keys()
    placed = kind.model_kind is not None and any(isinstance(one, str) or inspect.isroutine(one) for one in args[:2])
    policy = known.get("policy")
    alone = policy is not None and policy.default is policy.empty and len(args) < 2 and "policy" not in kwargs
    alone &= bool(args or kwargs)  # copy.copy gives neither
    if named or placed or alone:
        pipeline = {"image": "ImageAlignmentPipeline", "text": "TextAlignmentPipeline"}.get(str(kind.model_kind))
        raise UserError(
            f"{kind.__name__} takes its config and a loaded policy: call "
            f"diffusion_align.build_trainer({kind.config_class.__name__}(...)).train()"
            + (f", or {pipeline}.from_pretrained(model).align({kind.__name__}, ...)" if pipeline else "")
        )
