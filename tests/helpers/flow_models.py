"""Tiny random models of the classes of Stable Diffusion 3 and FLUX.1, and their schedulers; T5 reads letters."""

from __future__ import annotations

import torch

from tests.helpers.published import text_encoder

SD3_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SCHNELL_SCHEDULER = {**DYNAMIC, "shift": 1.0, "use_dynamic_shifting": False}
SIDE = 16  # pixels of the tiny FLUX, which names no size


def scheduler(**config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def t5(width=24):
    """A tokenizer that knows lower-case letters, and an encoder of two layers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    known = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "]
    letters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>")
    config = T5Config(vocab_size=len(known), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def vae(channels=4):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def sd3(tokenizer, *, with_t5=True, scheduler_config=SD3_SCHEDULER, **network):
    """A ``StableDiffusion3Pipeline`` for images of 16x16 pixels; ``tokenizer``: of both CLIPs."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8 + 12,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    tokenizer_3, text_encoder_3 = t5() if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=spread(SD3Transformer2DModel(**(settings | network))),
        scheduler=scheduler(**scheduler_config),
        vae=vae(),
        text_encoder=text_encoder(tokenizer, width=8, projection=8, layers=2),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder(tokenizer, width=12, act="gelu", projection=12, layers=2),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux(tokenizer, *, guidance_embeds=True, scheduler_config=None, **network):
    """A ``FluxPipeline``, dev if it embeds the guidance, else schnell; ``tokenizer``: of CLIP."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    settings = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 2, 2),
        "guidance_embeds": guidance_embeds,
    }
    tokenizer_2, text_encoder_2 = t5()
    return FluxPipeline(
        transformer=spread(FluxTransformer2DModel(**(settings | network))),
        scheduler=scheduler(**(scheduler_config or (DYNAMIC if guidance_embeds else SCHNELL_SCHEDULER))),
        vae=vae(),
        text_encoder=text_encoder(tokenizer, layers=2),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


@torch.no_grad()
def spread(network, by=0.2):
    """Larger weights than a new network has, so that what it is told of shows in what it predicts."""
    for parameter in network.parameters():
        parameter.add_(by * torch.randn_like(parameter))
    return network


def noisy_policy(folder, *, scheduler=None, dtype=None, noise=0.0, reads=None, **settings):
    """A policy of images of ``SIDE`` pixels whose trained weights are moved by ``noise`` of a fixed stream.

    ``scheduler``: what is other in its configuration; ``reads``: settings of the family.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
    from diffusion_align.models.image_pipelines import load_pipeline

    pipeline = load_pipeline(folder, dtype=dtype, settings=reads or {})
    if scheduler:
        config = {**pipeline.scheduler.config, **scheduler}
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    torch.manual_seed(0)
    policy = DenoisingPolicy(pipeline, **({"lora": LoRAConfig(rank=4), "height": SIDE, "width": SIDE} | settings))
    with torch.no_grad():
        for parameter in policy.trainable.values() if noise else ():
            parameter.add_(noise * torch.randn_like(parameter))
    return policy


def schedule_of(policy, dtype=torch.float32, **sampler):
    from diffusion_align.diffusion.sampler_settings import SamplerConfig

    config = SamplerConfig(**({"steps": 4} | sampler))
    return config.schedule(policy.pipeline.scheduler, policy.timesteps_setter()).to("cpu", dtype)
