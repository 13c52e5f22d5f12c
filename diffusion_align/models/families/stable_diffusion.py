"""Stable Diffusion 1.x and 2: a UNet conditioned on the states of one text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_align.errors import UserError
from diffusion_align.models.families.contract import CLIP_ATTENTION, Conditioning, ModelFamily

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StableDiffusion(ModelFamily):
    pipelines: ClassVar[Sequence[str]] = ("StableDiffusionPipeline",)
    network_class: ClassVar[str] = "UNet2DConditionModel"
    load_options: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    lora_layers: ClassVar[Mapping[str, Sequence[str]]] = {
        **ModelFamily.lora_layers,
        "convolutions": ("conv1", "conv2"),
    }
    text_encoder_layers: ClassVar[Sequence[str]] = CLIP_ATTENTION
    fed: ClassVar[Mapping[str, Sequence[str | None]]] = {
        "time_cond_proj_dim": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        "encoder_hid_dim_type": (None, "text_proj"),
    }
    """Settings that give a UNet an input -> those whose input is fed."""

    def check(self, pipeline: Any) -> None:
        if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
            raise UserError("this UNet takes more than the latent (inpainting?): use a text-to-image checkpoint")
        super().check(pipeline)

    def check_network(self, subject: str, config: Mapping[str, Any]) -> None:
        for name, values in self.fed.items():
            if config.get(name) not in values:
                raise UserError(
                    f"{subject} has a UNet with {name}={config[name]!r}, an input that training does not feed: use a "
                    "plain Stable Diffusion 1.x, 2 or XL model"
                )

    def encode(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    def inputs(self, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        return {"timestep": timestep, "encoder_hidden_states": conditioning["encoder_hidden_states"].to(dtype)}

    def zero_conditioning(self, config: Mapping[str, Any], batch: int, tokens: int, **kind: Any) -> Conditioning:
        import torch

        return {"encoder_hidden_states": torch.zeros(batch, tokens, config["cross_attention_dim"], **kind)}
