"""PixArt-Sigma (Chen et al. 2024, arXiv:2403.04692) as a model family: a transformer with a T5 text encoder.

Unlike in Stable Diffusion, the network is a transformer, the padding of prompts is masked, and the second half of
the predicted channels is a learned variance, which is dropped, as in diffusers' samplers.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_align.extending import Conditioning, ModelFamily


class PixArt(ModelFamily):
    """Pipelines of the diffusers class PixArtSigmaPipeline."""

    pipelines = ("PixArtSigmaPipeline",)
    network = "transformer"
    network_title = "DiT"
    network_class = "PixArtTransformer2DModel"
    # For sampling: images of exactly the given size, and prompts encoded as in training.
    call_options: ClassVar = {"use_resolution_binning": False, "clean_caption": False}

    def encode(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        device = pipeline.text_encoder.device
        states, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
        return {"states": states, "mask": mask}

    def inputs(self, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "timestep": timestep,
            "encoder_hidden_states": conditioning["states"].to(dtype),
            "encoder_attention_mask": conditioning["mask"],
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def predict(self, network: Any, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return super().predict(network, x_t, timestep, conditioning)[:, : x_t.shape[1]]

    def prompt_tokens(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        return 300  # to which the pipeline pads every prompt; a T5 has no limit

    def zero_conditioning(self, config: Mapping[str, Any], batch: int, tokens: int, **kind: Any) -> Conditioning:
        states = torch.zeros(batch, tokens, config["caption_channels"], **kind)
        return {"states": states, "mask": torch.ones(batch, tokens, device=states.device)}
