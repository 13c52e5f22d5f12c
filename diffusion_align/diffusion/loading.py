"""From a name, folder or hub id to a diffusers pipeline. Weights are read from safetensors only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from diffusion_align.assets import EMBEDDED_MODELS, LANGUAGE_MODELS, asset_path
from diffusion_align.training.config import nearest
from diffusion_align.training.errors import UserError, first_line

EMBEDDED_PIPELINES = ["emoji-sd"]
_PIPELINES = {"StableDiffusionPipeline", "StableDiffusionXLPipeline"}


def model_problem(model: str) -> str | None:
    """One sentence about why ``model`` cannot be a text-to-image pipeline, found without loading or downloading."""
    if model in EMBEDDED_PIPELINES:
        return None
    if model in LANGUAGE_MODELS:
        return f"model={model!r} is a language model, not a text-to-image pipeline: use a text method such as grpo"
    if model in EMBEDDED_MODELS:
        return f"model={model!r} is not a text-to-image pipeline: embedded are {', '.join(EMBEDDED_PIPELINES)}"
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):  # unlike Path.is_dir it answers about any text
        if (folder / "model_index.json").is_file():
            return None
        one_model = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
        hint = ": it holds one model, and a language model needs a text method such as grpo" if one_model else ""
        return f"model={model!r}: the folder has no model_index.json{hint}"
    looks_like_path = folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if looks_like_path:
        hint = nearest(model, EMBEDDED_PIPELINES)
        return f"model={model!r} is neither an embedded model, nor a folder, nor a hub id 'owner/name': {hint}"
    return None


def load_pipeline(model: str, *, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Any:
    """The diffusers pipeline ``model`` stands for, without a safety checker, on the CPU.

    Args:
        model: "emoji-sd", a folder written by ``save_pretrained``, or a hub id.
        dtype: of the weights; those of a VAE that needs float32 are widened.
        variant: weight files to choose, e.g. "fp16".

    Raises:
        UserError: the model is not there, cannot be read, or is of a class that is not supported.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import logging

    problem = model_problem(model)
    if problem:
        raise UserError(problem)
    folder = asset_path(model) if model in EMBEDDED_PIPELINES else Path(os.path.expanduser(model))
    source = str(folder) if os.path.isdir(folder) else model
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # diffusers logs a traceback of its own before it raises
    try:
        index = DiffusionPipeline.load_config(source)
        family = index.get("_class_name") if isinstance(index, dict) else None
        if family not in _PIPELINES:
            raise UserError(
                f"model={model!r} is a {family}, which is not supported: use one of {', '.join(sorted(_PIPELINES))}"
            )
        # transformers makes up an empty tokenizer where there is none.
        parts = [
            name for name, part in index.items() if isinstance(part, list) and part[0] and name != "safety_checker"
        ]
        absent = [name for name in parts if not (folder / name).is_dir()] if os.path.isdir(folder) else []
        if absent:
            raise UserError(f"model={model!r} is incomplete: the folder has no {absent[0]}/")
        if family == "StableDiffusionPipeline":
            pipeline = StableDiffusionPipeline.from_pretrained(
                source,
                dtype=dtype,
                variant=variant,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
        else:
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                source, dtype=dtype, variant=variant, use_safetensors=True, add_watermarker=False
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"model={model!r} could not be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    if pipeline.vae.config.force_upcast and pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)
    return pipeline
