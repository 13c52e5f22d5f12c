"""Stage ``vae``: a small AutoencoderKL, 64x64 -> 4x16x16, then its decoder alone."""

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_align.data.drawings import BACKGROUNDS, composite

from .augment import move
from .common import Build, chance, choose, mean_of_last, train, written_atomically
from .data import Drawings, load_drawings

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
KL_WEIGHT = 3e-4


def random_images(drawings: Drawings, generator: torch.Generator, n: int) -> Tensor:
    """(n, 3, 64, 64) drawings of any source, moved, on any of the 12 backgrounds or a random colour; in [-1, 1]."""
    rgba = move(drawings.rgba[choose(generator, drawings.rgba, n)], generator)
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[choose(generator, list(BACKGROUNDS), n)]
    if chance(generator, 0.3):
        colours = torch.rand((n, 3), generator=generator) * 255
    return composite(rgba, colours) * 2 - 1


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """L1 + ½ L1 of the horizontal and vertical differences + MSE; the middle term keeps edges sharp."""
    d = x - y
    edges = (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()
    return d.abs().mean() + 0.5 * edges + d.square().mean()


def build_vae(build: Build) -> None:
    """Writes ``emoji-sd/vae`` (fp16) and ``vae.json`` with its peak signal-to-noise ratio."""
    folder = build.out / "emoji-sd" / "vae"
    if (folder / "diffusion_pytorch_model.safetensors").exists() and (build.work / "vae.json").exists():
        return
    from diffusers import AutoencoderKL

    torch.manual_seed(build.seed)
    drawings, vae = load_drawings(build), AutoencoderKL(**CONFIG).to(build.device, memory_format=torch.channels_last)

    def whole(generator: torch.Generator) -> Tensor:
        x = random_images(drawings, generator, 24).to(build.device)
        with build.autocast():
            moments = vae.encode(x).latent_dist
            noise = torch.randn(moments.mean.shape, generator=generator).to(build.device)
            y = vae.decode(moments.mean + moments.std * noise).sample
        mean, logvar = moments.mean.float(), moments.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(y.float(), x) + KL_WEIGHT * kl

    def decoder_only(generator: torch.Generator) -> Tensor:
        x = random_images(drawings, generator, 24).to(build.device)
        with build.autocast():
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.mode()
            y = vae.decode(latents).sample
        return reconstruction_loss(y.float(), x)

    losses = train(build, "vae", vae, whole, steps=build.steps(2000), lr=3e-3, warmup=100, ema_decay=0.995)
    vae.encoder.requires_grad_(False)
    decoder_losses = train(
        build, "dec-vae", vae, decoder_only, steps=build.steps(900), lr=1.5e-3, warmup=50, ema_decay=0.995
    )
    with torch.no_grad():
        x = random_images(drawings, torch.Generator().manual_seed(1), 256)
        latents = torch.cat([vae.encode(part.to(build.device)).latent_dist.mode() for part in x.split(32)])
        y = torch.cat([vae.decode(part).sample.cpu().clamp(-1, 1) for part in latents.split(32)])
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())
    psnr = (-10 * torch.log10(F.mse_loss(y / 2, x / 2, reduction="none").mean((1, 2, 3)))).mean().item()
    vae.half().save_pretrained(folder)
    figures = {"psnr_db": psnr, "loss": mean_of_last(losses), "decoder_loss": mean_of_last(decoder_losses)}
    with written_atomically(build.work / "vae.json") as temporary:
        temporary.write_text(
            json.dumps(figures | {"scaling_factor": vae.config.scaling_factor}, indent=2) + "\n", encoding="utf-8"
        )
