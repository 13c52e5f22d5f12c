"""Stage ``unet``: a text-conditioned UNet on cached latents, v-prediction with zero terminal SNR."""

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_align.pretrained import load_in_dtype

from .common import Build, mean_of_last, train, written_atomically
from .data import load_drawings
from .examples import Examples
from .models import existing, tokenize

BATCH = 32
CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (64, 96, 128),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}


def build_unet(build: Build) -> None:
    """Writes the whole ``emoji-sd`` pipeline (fp16) and ``unet.json``."""
    if (build.work / "unet.json").exists() and (build.out / "emoji-sd" / "model_index.json").exists():
        return
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel, CLIPTokenizerFast

    folder = build.out / "emoji-sd"
    vae = load_in_dtype(AutoencoderKL.from_pretrained, existing(folder / "vae", "vae"), dtype=torch.float32)
    vae = vae.to(build.device)
    encoder = existing(folder / "text_encoder", "clip")
    text_encoder = load_in_dtype(CLIPTextModel.from_pretrained, encoder, dtype=torch.float32)
    text_encoder = text_encoder.to(build.device).eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    scheduler = DDIMScheduler(**SCHEDULER)
    torch.manual_seed(build.seed)
    unet = UNet2DConditionModel(**CONFIG).to(build.device, memory_format=torch.channels_last)
    if build.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # the backward pass of fused attention is slow on a CPU

    examples = Examples(load_drawings(build), build.seed)
    latents = examples.latents(build, vae)
    alphas_cumprod = scheduler.alphas_cumprod

    def loss_at(generator: torch.Generator) -> Tensor:
        chosen = examples.random(generator, BATCH)
        x0 = latents[tuple(torch.tensor([example.place for example in chosen]).T)].float()
        # Stratified timesteps: one in each of 32 equal strips, for a steadier loss.
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) * 1000 / BATCH).long().clamp(max=999)
        noise = torch.randn(x0.shape, generator=generator)
        alpha = alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        x_t, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
        with build.autocast():
            with torch.no_grad():
                tokens = tokenize(tokenizer, [example.text for example in chosen]).to(build.device)
                states = text_encoder(tokens).last_hidden_state
            prediction = unet(x_t.to(build.device), t.to(build.device), states).sample
        return F.mse_loss(prediction.float(), v.to(build.device))

    full = build.steps(9400)
    losses = train(build, "unet", unet, loss_at, steps=full, lr=1e-3, warmup=150, ema_decay=0.998)
    longer = train(build, "more", unet, loss_at, steps=build.steps(5100), lr=5e-4, warmup=150, ema_decay=0.998)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save_fp16(pipe, folder)
    with written_atomically(build.work / "unet.json") as temporary:
        temporary.write_text(
            json.dumps({"loss": mean_of_last(losses), "final_loss": mean_of_last(longer)}, indent=2) + "\n",
            encoding="utf-8",
        )


def _save_fp16(pipe, folder) -> None:
    """The pipeline in fp16; the tokenizer and the text encoder are already there, in their portable form."""
    pipe.unet.half().save_pretrained(folder / "unet")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)
