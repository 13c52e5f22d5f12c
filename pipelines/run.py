"""One entry for every method."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from diffusion_align.methods import method_of
from diffusion_align.pipelines.identity import code_content
from diffusion_align.training.callbacks import named_callbacks
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.context import RunContext
from diffusion_align.training.launch import agreed, start
from diffusion_align.training.trainer import Trainer


def run(
    config: TrainingConfig,
    *,
    pipeline: Any = None,
    model: Any = None,
    tokenizer: Any = None,
) -> Trainer[Any]:
    """Train as ``config`` says and return the finished trainer.

    Args:
        config: checked settings of any method, from ``read_config`` or ``check_config``.
        pipeline: a loaded diffusers pipeline, see ``image_context``.
        model, tokenizer: a loaded language model, see ``text_context``.

    Raises:
        UserError: data, models or rewards that do not fit; and see ``Trainer.train``.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    method = method_of(config.method)
    callbacks = agreed(lambda: named_callbacks(config.callbacks))
    if method.model_kind == "image":
        from diffusion_align.pipelines.image_context import image_context

        context = image_context(config, pipeline)  # type: ignore[arg-type]
    elif method.model_kind is None:
        context = RunContext(*start(config, lambda narrow: 0.0))
    else:
        from diffusion_align.pipelines.text_context import text_context

        context = text_context(config, model, tokenizer)
    trainer = method.from_run(replace(context, callbacks=callbacks))
    own = code_content([sys.modules[method.__module__]])  # this package's is known by its version
    trainer.identity = context.identity | ({"method": own} if own else {})
    trainer.train()
    return trainer
