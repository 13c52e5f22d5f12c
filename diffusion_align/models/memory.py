"""What lets a model need less of a GPU's memory; only the VAE's tiles change results.

Gradient checkpointing: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from diffusion_align.errors import UserError


def checkpoint_activations(network: Any) -> None:
    """Let ``network`` keep only the input of each of its layers for the backward pass, which computes the rest again.

    It stays in evaluation mode, in which no dropout is active; passes without gradients are as before.

    Args:
        network: of diffusers or transformers.

    Raises:
        UserError: its class does not support it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if hasattr(network, "enable_gradient_checkpointing"):
        try:
            network.enable_gradient_checkpointing()
        except ValueError:
            raise _unsupported(network) from None
        return
    # transformers' own switch checkpoints in training mode alone, where dropout is active.
    layers = [layer for layer in network.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise _unsupported(network)
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, layer.forward)


def keep_activations(network: Any) -> None:
    """Undo ``checkpoint_activations``."""
    if hasattr(network, "disable_gradient_checkpointing"):
        network.disable_gradient_checkpointing()
    for layer in network.modules():
        if getattr(layer.__dict__.get("forward"), "func", None) is _checkpointed:
            del layer.forward


def named_text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """Name -> text encoder of a diffusers pipeline."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)}


def text_encoders(pipeline: Any) -> list[nn.Module]:
    """The text encoders of a diffusers pipeline."""
    return list(named_text_encoders(pipeline).values())


def check_no_hooks(pipeline: Any) -> None:
    """UserError if accelerate's hooks move a part of a diffusers pipeline whenever it runs."""
    if any(hasattr(part, "_hf_hook") for part in pipeline.components.values()):
        raise UserError(
            "the pipeline moves its parts between devices by itself, as after enable_model_cpu_offload(): call its "
            "remove_all_hooks() and to(device) first; offload_text_encoders saves memory here"
        )


@contextlib.contextmanager
def on_device(networks: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, frozen networks are copied to ``device``; what is in main memory is kept, and theirs again at the end."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    held = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in held:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in held:
            tensor.data = data  # the copy on the device is dropped, not copied back


def split_decoding(vae: Any, *, slices: bool, tiles: bool) -> None:
    """Switch slicing (one image at a time) and tiling (images larger than the VAE's own) of a diffusers VAE on or off.

    A tile is normalized by its own mean and variance, so tiling changes the images, see docs/ddpo.md.

    Args:
        vae: changed in place.
        slices: one image at a time.
        tiles: overlapping ones of the size in the VAE's configuration (``sample_size``).
    """
    vae.use_slicing, vae.use_tiling = slices, tiles


def in_channels_last(network: nn.Module) -> bool:
    """Whether the weights of its convolutions are in that order."""
    return any(weight.ndim == 4 and not weight.is_contiguous() for weight in network.parameters())


@contextlib.contextmanager
def tiled(vae: Any, tiles: bool) -> Iterator[None]:
    """Inside, a diffusers VAE decodes in tiles, or does not."""
    before = {"slices": vae.use_slicing, "tiles": vae.use_tiling}
    split_decoding(vae, slices=vae.use_slicing, tiles=tiles)
    try:
        yield
    finally:
        split_decoding(vae, **before)


def _checkpointed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)


def _unsupported(network: Any) -> UserError:
    kind = type(network).__name__
    return UserError(f"{kind} does not support gradient checkpointing: set gradient_checkpointing=false")
