"""Reading and applying the models of a build: those of its output folder, or the shipped ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_align.models.model_card import LARGEST_ETA
from diffusion_align.pretrained import load_in_dtype

from .common import Build, BuildError


class ImageModel(NamedTuple):
    """An image model of the build: the stage that writes it, its class in diffusers, options to load it and to draw."""

    stage: str
    pipeline: str
    to_load: Mapping[str, Any] = {}
    to_draw: Mapping[str, Any] = {}


PIPELINES = {
    "emoji-sd": ImageModel("unet", "StableDiffusionPipeline"),
    "emoji-flow": ImageModel(
        "flow",
        "StableDiffusion3Pipeline",
        to_load={"text_encoder_3": None, "tokenizer_3": None},
        to_draw={"max_sequence_length": 0},
    ),
}


def existing(path: Path, stage: str) -> Path:
    """``path``, or a sentence that names the stage which writes it."""
    if not path.exists():
        raise BuildError(f"{path} is missing: run the stage {stage} first (--stages {stage})")
    return path


def load_clip(build: Build):
    """The (CLIPModel, tokenizer) in ``<out>/emoji-clip``, float32, in evaluation mode."""
    from transformers import CLIPModel, CLIPTokenizerFast

    folder = existing(build.out / "emoji-clip", "clip")
    clip = load_in_dtype(CLIPModel.from_pretrained, folder, attn_implementation="eager", dtype=torch.float32)
    return clip.to(build.device).eval(), CLIPTokenizerFast.from_pretrained(folder / "tokenizer")


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """(B, 24) token ids, padded and cut to the model's length."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=24, return_tensors="pt").input_ids


def features(output) -> Tensor:
    """The feature tensor of ``get_image_features`` or ``get_text_features``: transformers 5 wraps it."""
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def embed_images(clip, images: Tensor, batch_size: int = 256) -> Tensor:
    """(B, 128) unit-length image embeddings of images (B, 3, 64, 64) in [0, 1]."""
    device = next(clip.parameters()).device
    chunks = [features(clip.get_image_features(chunk.to(device) * 2 - 1)) for chunk in images.split(batch_size)]
    return F.normalize(torch.cat(chunks), dim=-1).cpu()


@torch.no_grad()
def embed_captions(clip, tokenizer, captions: list[str]) -> Tensor:
    """(B, 128) unit-length text embeddings."""
    device = next(clip.parameters()).device
    return F.normalize(features(clip.get_text_features(tokenize(tokenizer, captions).to(device))), dim=-1).cpu()


def load_pipeline(build: Build, name: str = "emoji-sd"):
    """The pipeline in ``<out>/<name>``, float32, without a progress bar; ``emoji-flow`` without its T5 of zeros."""
    import diffusers

    about = PIPELINES[name]
    folder = existing(build.out / name / "model_index.json", about.stage).parent
    load = getattr(diffusers, about.pipeline).from_pretrained
    pipe = load_in_dtype(load, folder, dtype=torch.float32, **about.to_load).to(build.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(
    pipe, prompts: list[str], *, steps: int, guidance: float, seed: int, batch_size: int = 16, **options
) -> Tensor:
    """(B, 3, 64, 64) images in [0, 1], on the CPU; image i has seed ``seed + i``, whatever the batch size.

    ``options`` are further ones of the pipeline, as ``eta``.
    """
    if "eta" in options:
        options["eta"] = min(options["eta"], LARGEST_ETA)
    images = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators} | options
        images.append(pipe(chunk, height=64, width=64, output_type="pt", **settings).images.float().cpu())
    return torch.cat(images)
