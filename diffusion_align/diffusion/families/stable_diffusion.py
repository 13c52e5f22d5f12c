"""Stable Diffusion 1.x and 2: a UNet conditioned on the states of one text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_align.errors import UserError
from diffusion_align.models.image_pipelines import check_unet

Conditioning = dict[str, Tensor]
"""What the network is told of the prompts, name -> (B, ...)."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class StableDiffusion:
    """What a denoising policy needs from a pipeline's family."""

    network = "unet"
    """The part of the pipeline that is trained."""
    network_title = "UNet"
    lora_layers: Mapping[str, Sequence[str]] = {
        "attention": _ATTENTION,
        "attention+convolutions": (*_ATTENTION, "conv1", "conv2"),
    }
    """``lora.layers`` -> names of the layers that LoRA adapts."""

    def check(self, pipeline: Any) -> None:
        """Raise a UserError if this pipeline cannot be trained."""
        if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
            raise UserError("this UNet takes more than the latent (inpainting?): use a text-to-image checkpoint")
        check_unet("the model", type(pipeline).__name__, pipeline.unet.config)

    def use_eager_attention(self, network: Any) -> None:
        """On a CPU its backward pass is faster than fused attention's."""
        from diffusers.models.attention_processor import AttnProcessor

        network.set_attn_processor(AttnProcessor())

    def latent_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the resolution of the network's configuration."""
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return config["in_channels"], height, width

    def encode(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        """What ``predict`` is given for B prompts, (B, ...), on the pipeline's device.

        Args:
            pipeline: with text encoders.
            prompts: texts; the empty one is what guidance leads away from.
            image_size: (height, width) in pixels.
        """
        embeds, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    def predict(self, network: Any, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output (B, C, H, W) for ``x_t`` in its dtype, ``timestep`` (B,)."""
        return network(x_t, timestep, **self.inputs(conditioning, network.dtype), return_dict=False)[0]

    def inputs(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the network that stand for ``conditioning``."""
        return {"encoder_hidden_states": conditioning["encoder_hidden_states"].to(dtype)}

    def zero_inputs(self, config: Mapping[str, Any], batch: int, *, tokens: int = 77, **kind: Any) -> dict[str, Any]:
        """Keyword arguments of one pass of ``batch`` samples through a network of configuration ``config``, all 0.

        ``kind``: their device and dtype, as ``torch.zeros`` takes them.
        """
        return {
            "sample": torch.zeros(batch, *self.latent_shape(config), **kind),
            "timestep": torch.zeros(batch, **kind | {"dtype": torch.int64}),
            "encoder_hidden_states": torch.zeros(batch, tokens, config["cross_attention_dim"], **kind),
        }
