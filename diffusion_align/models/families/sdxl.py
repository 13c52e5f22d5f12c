"""Stable Diffusion XL: two text encoders, whose pooled state and the image's size are told to the UNet as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_align.models.families.contract import Conditioning
from diffusion_align.models.families.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StableDiffusionXL(StableDiffusion):
    pipelines: ClassVar[Sequence[str]] = ("StableDiffusionXLPipeline",)
    load_options: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}
    fed: ClassVar[Mapping[str, Sequence[str | None]]] = {
        **StableDiffusion.fed,
        "addition_embed_type": (None, "text_time"),
    }

    def encode(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        import torch

        encoded = self.encode_negative(pipeline, prompts, image_size)
        if pipeline.config.get("force_zeros_for_empty_prompt"):
            empty = torch.tensor([prompt == "" for prompt in prompts], device=encoded["text_embeds"].device)
            encoded["encoder_hidden_states"] = encoded["encoder_hidden_states"].masked_fill(empty[:, None, None], 0.0)
            encoded["text_embeds"] = encoded["text_embeds"].masked_fill(empty[:, None], 0.0)
        return encoded

    def encode_negative(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        """Without the zeros that ``force_zeros_for_empty_prompt`` puts in place of no prompt: as in diffusers, an empty
        negative prompt is encoded."""
        device, size = pipeline.text_encoder_2.device, self.of_size(pipeline, image_size)["time_ids"]
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": size.expand(len(prompts), -1)}

    def of_size(self, pipeline: Any, image_size: tuple[int, int]) -> Conditioning:
        import torch

        encoder = pipeline.text_encoder_2
        kind = {"dtype": encoder.dtype, "device": encoder.device}
        return {"time_ids": torch.tensor([[*image_size, 0, 0, *image_size]], **kind)}

    def of_cropped(self, conditioning: Conditioning, original: Tensor, corner: Tensor) -> Conditioning:
        """With original size, corner and target size, as diffusers' scripts that train SDXL."""
        import torch

        told = conditioning["time_ids"]
        return conditioning | {"time_ids": torch.cat([original.to(told), corner.to(told), told[:, 4:]], dim=1)}

    def inputs(self, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return super().inputs(timestep, conditioning, dtype) | {"added_cond_kwargs": added}

    def zero_conditioning(self, config: Mapping[str, Any], batch: int, tokens: int, **kind: Any) -> Conditioning:
        import torch

        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {"text_embeds": torch.zeros(batch, pooled, **kind), "time_ids": torch.zeros(batch, 6, **kind)}
        return super().zero_conditioning(config, batch, tokens, **kind) | added
