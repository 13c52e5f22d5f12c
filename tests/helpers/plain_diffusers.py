"""diffusers' own pipelines, run as they come: what this package's sampling is compared with."""

import torch
from diffusers import DDIMScheduler

from diffusion_align.models.image_pipelines import load_pipeline


def plain_pipeline(path):
    """diffusers' pipeline under DDIM, which without eta adds no noise."""
    pipeline = load_pipeline(path)
    pipeline.scheduler = DDIMScheduler.from_config({"clip_sample": False, **pipeline.scheduler.config})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def captured(pipeline, prompts, latents, **options):
    """Images, final latents, and what the UNet was given at every call."""
    calls = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    final = pipeline(prompts, latents=latents.clone(), output_type="latent", **options).images
    hook.remove()
    images = pipeline(prompts, latents=latents.clone(), output_type="pt", **options).images
    return images, final, calls


def initial(streams, shape, n=2):
    return torch.stack([torch.randn(shape, generator=g) for g in streams(n)])
