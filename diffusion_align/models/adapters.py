"""LoRA adapters of a diffusers pipeline: put on, merged into the weights, taken off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.errors import UserError, first_line, short
from diffusion_align.inputs import check_path
from diffusion_align.models.lora import ADAPTER, carries_adapters, load_lora, lora_layers, merge_lora, remove_lora
from diffusion_align.models.lora_file import read_lora


@dataclass(frozen=True)
class AdapterState:
    """The UNet's adapter at some time; false without one.

    Attributes:
        weights: name -> copy of every weight.
        scales: layer -> its alpha and its scale.
        config: peft's settings.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    config: Any = None

    def __bool__(self) -> bool:
        return bool(self.weights)


def adapted_parts(pipeline: Any) -> dict[str, nn.Module]:
    """Name -> network of those that carry adapters."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: network for name, network in networks.items() if carries_adapters(network)}


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
        UserError: there is nothing, or some of it does not fit the pipeline.
    """
    check_path(lora, f"lora={short(str(lora))}")
    for name, part in read_lora(lora, pipeline, model).items():
        try:
            load_lora(getattr(pipeline, name), part.config, part.weights)
        except Exception as error:  # peft raises whatever settings of others lead to
            raise UserError(f"lora={str(lora)!r} could not be loaded into {model}: {first_line(error)}") from error


def merge_adapters(pipeline: Any) -> None:
    """Add the adapters to the weights; no adapter layers are left."""
    for network in adapted_parts(pipeline).values():
        merge_lora(network)


def take_off(pipeline: Any) -> None:
    """Leave the pipeline as it was before adapters were put on it."""
    for network in adapted_parts(pipeline).values():
        remove_lora(network)


def adapter_weights(pipeline: Any) -> AdapterState:
    """A copy of the UNet's adapter."""
    if "unet" not in adapted_parts(pipeline):
        return AdapterState()
    named = pipeline.unet.named_parameters()
    weights = {name: p.detach().clone() for name, p in named if ".lora_" in name}
    layers = lora_layers(pipeline.unet).items()
    scales = {name: (layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER]) for name, layer in layers}
    return AdapterState(weights, scales, pipeline.unet.peft_config[ADAPTER])


@torch.no_grad()
def put_back(pipeline: Any, state: AdapterState) -> None:
    """Undo what has happened to the UNet's adapter since ``adapter_weights``; without any then, take it off."""
    if not state:
        take_off(pipeline)
        return
    pipeline.unet.peft_config[ADAPTER] = state.config
    for name, layer in lora_layers(pipeline.unet).items():
        layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = state.scales[name]
    for name, parameter in pipeline.unet.named_parameters():
        if name in state.weights:
            parameter.data = state.weights[name].to(parameter.device)


@contextlib.contextmanager
def merged(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline's networks are copies with their adapters merged."""
    trained = adapted_parts(pipeline)
    for name, part in trained.items():
        setattr(pipeline, name, copy.deepcopy(part))
    try:
        merge_adapters(pipeline)
        yield
    finally:
        for name, part in trained.items():
            setattr(pipeline, name, part)
