"""FLUX.1: guidance is an input of the network, if it has any; latents are packed, 2x2 to a token, in here alone.

Of the two text encoders CLIP gives the pooled state and T5 the states. The network multiplies its timestep by 1000.
LoRA's feed_forward leaves the single blocks' ``proj_out`` alone, which is the output of their attention as well and
shares its name with the network's last layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusion_align.models.families.contract import Conditioning
from diffusion_align.models.families.flow import FlowFamily
from diffusion_align.models.families.flow_matching import set_linear_timesteps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATCH = 2
"""Latents along the side of a token; ``patch_size`` of the network's configuration is 1, as it is given tokens."""
SIDE = 128
"""Of the latents by default, as in diffusers' pipeline; the network's configuration names none."""


class Flux(FlowFamily):
    pipelines: ClassVar[Sequence[str]] = ("FluxPipeline",)
    network_class: ClassVar[str] = "FluxTransformer2DModel"
    guidance: ClassVar[Literal["free", "embedded"]] = "embedded"
    tokens: ClassVar[int] = 512
    lora_layers: ClassVar[Mapping[str, Sequence[str]]] = {
        **FlowFamily.lora_layers,
        "feed_forward": (*FlowFamily.lora_layers["feed_forward"], "proj_mlp"),
    }

    def setting_checks(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
        yield from super().setting_checks(config, settings)
        scale = settings.get("guidance_scale")
        if scale is not None and scale != 1 and not config.get("guidance_embeds"):
            yield (
                f"guidance_scale={scale:g} has no effect on this model, whose network takes no guidance "
                "(guidance_embeds=false, as in FLUX.1-schnell): set it to 1"
            )
        if settings.get("forward_process") and config.get("guidance_embeds"):
            yield (
                "this model is guidance-distilled (guidance_embeds=true, as in FLUX.1-dev): its prediction is not the "
                "velocity of any noising process, which method=forward trains on; use method=ddpo or diffusion_dpo"
            )
        if settings.get("negative_prompt") is not None:
            yield "negative_prompt has no effect on FLUX, whose guidance is an input of the network: leave it out"
        if settings.get("t5") is False:
            yield "t5=false is for Stable Diffusion 3, and a FLUX model reads its prompts with T5 alone: leave it out"

    def as_in_pipeline(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def patch_size(self, config: Mapping[str, Any]) -> int:
        return PATCH

    def latent_shape(
        self, config: Mapping[str, Any], latent_size: tuple[int, int] | None = None
    ) -> tuple[int, int, int]:
        return config["in_channels"] // PATCH**2, *(latent_size or (SIDE, SIDE))

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int | None) -> None:
        set_linear_timesteps(scheduler, steps, tokens)

    def encode(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        states, pooled, _ = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder.device, max_sequence_length=self.text_tokens
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def inputs(self, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        """``conditioning`` with ``guidance`` (B,), for a network that takes it."""
        states = conditioning["encoder_hidden_states"].to(dtype)
        return {
            "timestep": timestep / 1000,
            "guidance": conditioning.get("guidance"),
            "encoder_hidden_states": states,
            "pooled_projections": conditioning["pooled_projections"].to(dtype),
            "txt_ids": states.new_zeros(states.shape[1], 3),
        }

    def predict(self, network: Any, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        if not network.config.guidance_embeds:
            conditioning = {name: value for name, value in conditioning.items() if name != "guidance"}
        given = self.inputs(timestep, conditioning, x_t.dtype) | {"img_ids": positions(x_t)}
        return unpack(network(pack(x_t), **given, return_dict=False)[0], x_t.shape[2:])

    def prompt_tokens(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        return self.text_tokens

    def zero_conditioning(self, config: Mapping[str, Any], batch: int, tokens: int, **kind: Any) -> Conditioning:
        import torch

        states = torch.zeros(batch, tokens, config["joint_attention_dim"], **kind)
        pooled = torch.zeros(batch, config["pooled_projection_dim"], **kind)
        return {"encoder_hidden_states": states, "pooled_projections": pooled, "guidance": torch.zeros(batch, **kind)}


def pack(latents: Tensor) -> Tensor:
    """Tokens (B, H/2 * W/2, 4 C), row by row, of latents (B, C, H, W): each holds C squares of 2x2."""
    squares = latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, C, H/2, W/2, 2, 2)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, latent_size: Sequence[int]) -> Tensor:
    """Undoes ``pack``; ``latent_size``: (H, W)."""
    rows, columns = (side // PATCH for side in latent_size)
    squares = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (rows, columns))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def positions(latents: Tensor) -> Tensor:
    """(H/2 * W/2, 3) of the tokens: 0, row and column."""
    import torch

    rows, columns = (torch.arange(side // PATCH, device=latents.device) for side in latents.shape[2:])
    return torch.cartesian_prod(rows.new_zeros(1), rows, columns).float()
