"""Stable Diffusion XL: two text encoders, whose pooled state and the image's size are told to the UNet as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffusion_align.diffusion.families.stable_diffusion import Conditioning, StableDiffusion


class StableDiffusionXL(StableDiffusion):
    def encode(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        device = pipeline.text_encoder_2.device
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        if pipeline.config.get("force_zeros_for_empty_prompt"):
            empty = torch.tensor([prompt == "" for prompt in prompts], device=device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0.0), pooled.masked_fill(empty[:, None], 0.0)
        size = torch.tensor([[*image_size, 0, 0, *image_size]], dtype=embeds.dtype, device=device)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": size.expand(len(prompts), -1)}

    def inputs(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return super().inputs(conditioning, dtype) | {"added_cond_kwargs": added}

    def zero_inputs(self, config: Mapping[str, Any], batch: int, *, tokens: int = 77, **kind: Any) -> dict[str, Any]:
        plain = super().zero_inputs(config, batch, tokens=tokens, **kind)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        shapes = {"text_embeds": pooled, "time_ids": 6}
        added = {name: torch.zeros(batch, size, **kind) for name, size in shapes.items()}
        return plain | {"added_cond_kwargs": added}
