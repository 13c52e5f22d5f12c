"""Tiny random models built as the published Stable Diffusion 1.5, 2.1 and XL are, and their one-file layout.

Classes, block types, numbers of layers, activations and schedulers are those of the published configuration files;
widths are small. ``original_layout`` renames a pipeline's tensors as the checkpoints name them that were there before
diffusers; it is the inverse of what ``from_single_file`` does, and was written from the names in such files.
"""

from __future__ import annotations

import re

import torch

_SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (8, 16, 16, 16),
    "cross_attention_dim": 16,
}
_UNETS = {
    "sd15": _SD_BLOCKS | {"attention_head_dim": 8},
    "sd2": _SD_BLOCKS | {"attention_head_dim": (2, 4, 4, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16, 16),
        "cross_attention_dim": 16 + 24,
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": [1, 1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}


def pipeline(name, tokenizer, schedulers):
    """The pipeline "sd15", "sd2" or "sdxl" in float32; ``schedulers`` holds the published scheduler of each."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(4, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.13025 if name == "sdxl" else 0.18215,
        ),
        "unet": UNet2DConditionModel(sample_size=8, layers_per_block=2, norm_num_groups=4, **_UNETS[name]),
        "tokenizer": tokenizer,
        "scheduler": schedulers[name],
    }
    if name == "sdxl":
        return StableDiffusionXLPipeline(
            text_encoder=text_encoder(tokenizer),
            text_encoder_2=text_encoder(tokenizer, width=24, act="gelu", projection=24),
            tokenizer_2=tokenizer,
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
            **parts,
        )
    from transformers import CLIPImageProcessor

    act = "quick_gelu" if name == "sd15" else "gelu"
    return StableDiffusionPipeline(
        text_encoder=text_encoder(tokenizer, width=16, act=act),
        safety_checker=None,
        requires_safety_checker=False,
        feature_extractor=CLIPImageProcessor(),
        **parts,
    )


def text_encoder(tokenizer, *, width=16, act="quick_gelu", projection=None, layers=3):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act=act,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=projection or 512,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def original_layout(pipe):
    """Original name -> tensor of everything in ``pipe``, and of what else such a file holds."""
    clip = pipe.text_encoder.state_dict()
    if hasattr(pipe, "text_encoder_2"):
        first = {f"conditioner.embedders.0.transformer.{_wrapped(k)}": v for k, v in clip.items()}
        text = first | _open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    elif pipe.text_encoder.config.hidden_act == "gelu":
        text = _open_clip(clip, "cond_stage_model.model.")
        last = [k for k in text if ".resblocks.2." in k]  # OpenCLIP's last layer, which SD2 does not use
        text |= {k.replace(".resblocks.2.", ".resblocks.3."): torch.full_like(text[k], 7.0) for k in last}
        width = pipe.text_encoder.config.hidden_size
        text["cond_stage_model.model.text_projection"] = torch.full((width, width), 7.0)
    else:
        text = {f"cond_stage_model.transformer.{_wrapped(k)}": v for k, v in clip.items()}
        positions = torch.arange(pipe.text_encoder.config.max_position_embeddings)[None]
        text["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    unet = {f"model.diffusion_model.{_unet_name(k, pipe.unet.config)}": v for k, v in pipe.unet.state_dict().items()}
    vae = {}
    for key, value in pipe.vae.state_dict().items():
        name = _vae_name(key, len(pipe.vae.config.block_out_channels))
        is_attention = ".attn_1." in name and value.ndim == 2  # 1x1 convolutions there
        vae[f"first_stage_model.{name}"] = value[:, :, None, None] if is_attention else value
    extra = {"betas": torch.rand(1000), "alphas_cumprod": torch.rand(1000), "model_ema.decay": torch.tensor(0.9999)}
    return {k: v.contiguous().clone() for k, v in (unet | vae | text | extra).items()}


def _wrapped(name):
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _unet_name(name, config):
    layers = config.layers_per_block
    for ours, original in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if name.startswith(f"{ours}."):
            return original + name.removeprefix(ours)
    side, rest = name.split(".", 1)
    if side == "mid_block":
        kind, i, rest = rest.split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}.{_unet_layer(rest, kind)}"
    block, kind, i, rest = rest.split(".", 3)
    block, i = int(block), int(i)
    if side == "down_blocks":
        first = 1 + block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + i}.{int(kind == 'attentions')}.{_unet_layer(rest, kind)}"
    first = block * (layers + 1)
    if kind == "upsamplers":
        has_attention = "CrossAttn" in config.up_block_types[block]
        return f"output_blocks.{first + layers}.{1 + has_attention}.{rest}"
    return f"output_blocks.{first + i}.{int(kind == 'attentions')}.{_unet_layer(rest, kind)}"


def _unet_layer(rest, kind):
    if kind == "attentions":
        return rest
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    layer, end = rest.split(".")
    return f"{names[layer]}.{end}"


def _vae_name(name, levels):
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for ours, original in (
        ("mid_block.attentions.0", "mid.attn_1"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    ):
        name = name.replace(ours, original)
    return name


def _open_clip(state, prefix):
    state = {_wrapped(k): v for k, v in state.items()}
    names = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    out = {prefix + "logit_scale": torch.tensor(4.6)}
    for key, value in state.items():
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key == "text_projection.weight":
            out[prefix + "text_projection"] = value.T
        elif layer is None:
            out[prefix + names[key]] = value
        else:
            number, part, end = layer.groups()
            block = f"{prefix}transformer.resblocks.{number}."
            if part == "self_attn.q_proj":
                three = [state[key.replace("q_proj", f"{which}_proj")] for which in "qkv"]
                out[f"{block}attn.in_proj_{end}"] = torch.cat(three)
            elif part == "self_attn.out_proj":
                out[f"{block}attn.out_proj.{end}"] = value
            elif part in parts:
                out[f"{block}{parts[part]}.{end}"] = value
    return out
