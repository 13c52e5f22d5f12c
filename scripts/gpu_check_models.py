"""Models of the published sizes with random weights, built where they are used: no file, no copy in main memory.

Configurations of image models are those of ``doctor/known_models.py``; of a language model they stand here. ``tiny``
keeps classes, blocks and kinds of layers and makes the widths small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_align.doctor import known_models

Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ImageSize:
    """An image model of a published size, and the recipe that it is trained by.

    Attributes:
        title: as people call it.
        model: its Hub id, from which nothing is loaded.
        kind: the diffusers class of its pipeline.
        recipe: a shipped one.
        side: of its images, in pixels.
        tiny: part -> settings that make it small.
    """

    title: str
    model: str
    kind: str
    recipe: str
    side: int
    tiny: Configs

    def configs(self, *, small: bool) -> dict[str, dict[str, Any]]:
        """Part -> configuration."""
        found = known_models.PUBLISHED[self.model]
        return {part: config | self.tiny.get(part, {}) if small else dict(config) for part, config in found.items()}


TINY_SIDE = 64  # pixels
_TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
_TINY_T5 = {"d_model": 64, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 2}
_TINY_VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1}
_TINY = {"vae": _TINY_VAE, "text_encoder": _TINY_CLIP, "text_encoder_2": _TINY_CLIP}
_TINY_SD15 = _TINY | {
    "unet": {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "cross_attention_dim": 32},
}
_TINY_SDXL = _TINY | {
    "unet": {
        "block_out_channels": [32, 64, 64],
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": [2, 4, 4],
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
}
_TINY_SD35 = _TINY | {
    "text_encoder_3": _TINY_T5,
    "transformer": {
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_layers": 3,
        "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64,
        "dual_attention_layers": [0],
        "pos_embed_max_size": 96,
    },
}
_TINY_FLUX = _TINY | {
    "text_encoder_2": _TINY_T5,
    "transformer": {
        "attention_head_dim": 8,
        "axes_dims_rope": [4, 2, 2],
        "num_attention_heads": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
    },
}
IMAGE_SIZES = {
    "sd15": ImageSize(
        "Stable Diffusion 1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "StableDiffusionPipeline",
        "ddpo_sd15_aesthetic",
        512,
        _TINY_SD15,
    ),
    "sdxl": ImageSize(
        "Stable Diffusion XL",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        "ddpo_sdxl_aesthetic",
        1024,
        _TINY_SDXL,
    ),
    "sd35": ImageSize(
        "Stable Diffusion 3.5 Medium",
        "stabilityai/stable-diffusion-3.5-medium",
        "StableDiffusion3Pipeline",
        "flow_sd35_aesthetic",
        1024,
        _TINY_SD35,
    ),
    "flux": ImageSize(
        "FLUX.1-dev",
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        "flow_flux_pickscore",
        1024,
        _TINY_FLUX,
    ),
}


@dataclass(frozen=True)
class TextSize:
    """A language model of a published size: the settings of its ``LlamaConfig``."""

    title: str
    model: str
    config: Mapping[str, Any]

    def settings(self, *, small: bool) -> dict[str, Any]:
        """Of its ``LlamaConfig``."""
        return dict(self.config) | (_TINY_LLAMA if small else {})


_TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
TEXT_SIZES = {
    "text-135m": TextSize(
        "Llama of 135 M",
        "HuggingFaceTB/SmolLM2-135M",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "text-1b": TextSize(
        "Llama of 1.2 B",
        "meta-llama/Llama-3.2-1B",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}


@contextlib.contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, new weights are on ``device`` in ``dtype`` from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """float32 for the VAE of a model that says so, as ``load_pipeline`` has it."""
    return torch.float32 if config.get("force_upcast", True) else dtype


def random_pipeline(
    size: ImageSize, device: torch.device, *, small: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A diffusers pipeline of ``size``, its weights random, the same for the same device."""
    import diffusers
    import transformers

    from diffusion_align.assets import asset_path

    torch.manual_seed(0)
    parts: dict[str, Any] = {}
    clip = transformers.CLIPTokenizer.from_pretrained(asset_path("emoji-sd") / "tokenizer", model_max_length=77)
    t5 = transformers.AutoTokenizer.from_pretrained(asset_path("emoji-flow") / "tokenizer_3")
    networks = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "transformer": getattr(diffusers, _transformer(size)),
    }
    for part, config in size.configs(small=small).items():
        if part == "scheduler":
            kind = getattr(diffusers, config.get("_class_name", "DDIMScheduler"))
            parts[part] = kind.from_config(config)
        elif part in networks:
            with made_on(device, vae_dtype(config, dtype) if part == "vae" else dtype):
                parts[part] = networks[part].from_config(config)
        else:
            name = config["architectures"][0]
            encoder = getattr(transformers, name)
            shape = {key: value for key, value in config.items() if key != "architectures"}
            with made_on(device, dtype):
                parts[part] = encoder(encoder.config_class(**shape))
            parts[part.replace("text_encoder", "tokenizer")] = t5 if name.startswith("T5") else clip
    if size.kind == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if size.kind == "StableDiffusionXLPipeline":
        parts |= {"add_watermarker": False}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return getattr(diffusers, size.kind)(**parts)


def _transformer(size: ImageSize) -> str:
    return "FluxTransformer2DModel" if size.kind == "FluxPipeline" else "SD3Transformer2DModel"


def random_language_model(
    size: TextSize, device: torch.device, *, small: bool = False, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, Any]:
    """A Llama of ``size`` and a tokenizer whose vocabulary is smaller than its own."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from diffusion_align.assets import asset_path

    tokenizer = AutoTokenizer.from_pretrained(asset_path("tiny-lm"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    with made_on(device, dtype):
        model = LlamaForCausalLM(LlamaConfig(**size.settings(small=small), **ends))
    return model.requires_grad_(False).eval(), tokenizer


def parameters(model: Any) -> int:
    """Of all networks of a pipeline, or of one model."""
    parts = model.components.values() if hasattr(model, "components") else [model]
    return sum(p.numel() for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters())
