"""Tiny random models of the classes of Z-Image; a Qwen3 of a few layers reads letters in a chat template."""

from __future__ import annotations

import torch

from tests.helpers.flow_models import scheduler, spread, t5, vae

TEMPLATE = (
    "{% for message in messages %}user {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}{% if not enable_thinking %}quick {% endif %}"
)


def qwen3(width=24, layers=3):
    """A tokenizer with a chat template, and a model whose own limits are not those of prompts."""
    from transformers import Qwen3Config, Qwen3Model

    tokenizer, _ = t5()
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = 1000
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=600,
    )
    return tokenizer, Qwen3Model(config)


def z_image(*, scheduler_config=None, **network):
    """A ``ZImagePipeline``; its images have 1024 pixels unless they are told otherwise."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    settings = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [8, 4, 4],
        "axes_lens": [600, 64, 64],
    }
    tokenizer, text_encoder = qwen3()
    return ZImagePipeline(
        transformer=spread(ZImageTransformer2DModel(**(settings | network)), by=0.05),
        scheduler=scheduler(**(scheduler_config or {"num_train_timesteps": 1000, "shift": 3.0})),
        vae=vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
