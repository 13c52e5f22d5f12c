"""LoRA adapters of a diffusers pipeline: put on, merged into the weights, taken off, saved."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffusion_align.training.errors import UserError, first_line


def adapted_parts(pipeline: Any) -> dict[str, nn.Module]:
    """Name -> network of those that carry adapters."""
    return {name: part for name, part in pipeline.components.items() if getattr(part, "peft_config", None)}


def frozen_dtype(pipeline: Any) -> torch.dtype:
    """Of the UNet's own weights; those of an adapter may be wider."""
    return next(p.dtype for name, p in pipeline.unet.named_parameters() if ".lora_" not in name)


def put_on(pipeline: Any, lora: str | Path, model: str) -> None:
    """Load LoRA weights, from safetensors only, as the adapter "default".

    Args:
        pipeline: of diffusers, without adapters.
        lora: folder or file.
        model: what the pipeline was loaded from, for errors.

    Raises:
        UserError: there is nothing, or it does not fit the pipeline.
    """
    from diffusers.utils import logging

    path = Path(lora).expanduser()
    if not path.exists():
        raise UserError(f"lora={str(lora)!r}: there is no such file or folder")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that there is nothing for the text encoders is as it should be
    try:
        pipeline.load_lora_weights(str(path), adapter_name="default", use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"lora={str(lora)!r} could not be loaded into {model}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def merge_adapters(pipeline: Any) -> None:
    """Add the adapters to the weights; no adapter layers are left."""
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def take_off(pipeline: Any) -> None:
    """Leave the pipeline as it was before adapters were put on it."""
    if adapted_parts(pipeline):
        pipeline.unload_lora_weights()


def adapter_weights(pipeline: Any) -> dict[str, Tensor]:
    """Name -> copy of every weight of the UNet's adapters; empty without one."""
    return {name: p.detach().clone() for name, p in pipeline.unet.named_parameters() if ".lora_" in name}


@torch.no_grad()
def put_back(pipeline: Any, weights: dict[str, Tensor]) -> None:
    """Undo what has happened to the UNet's adapters since ``adapter_weights``; without any then, take them off."""
    if not weights:
        take_off(pipeline)
    for name, parameter in pipeline.unet.named_parameters():
        if name in weights:
            parameter.data = weights[name].to(parameter.device)


@contextlib.contextmanager
def merged(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline's networks are copies with their adapters merged."""
    trained = adapted_parts(pipeline)
    for name, part in trained.items():
        setattr(pipeline, name, copy.deepcopy(part))
    try:
        if trained:
            merge_adapters(pipeline)
        yield
    finally:
        for name, part in trained.items():
            setattr(pipeline, name, part)
