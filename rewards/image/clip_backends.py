"""Where a CLIP comes from: a transformers folder or Hub id (the embedded emoji-clip is one), or open_clip."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.pretrained import hub_or_cache, load_in_dtype
from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.image.clip import EMOJI_CLIP, OPEN_CLIP, ClipEncoder, resize_and_crop, squash
from diffusion_align.rewards.places import note
from diffusion_align.rewards.weights import fitting_tokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_transformers(
    name: str, device: torch.device, dtype: torch.dtype, other_tokenizer: str | None = None
) -> ClipEncoder:
    """A transformers CLIPModel; ``other_tokenizer`` is where to take the tokenizer if it comes without one."""
    from transformers import AutoConfig, CLIPModel

    if name == EMOJI_CLIP:
        from diffusion_align.assets import asset_path

        source = str(asset_path(EMOJI_CLIP))
    else:
        source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    note(source)
    with hub_or_cache(source):
        config = AutoConfig.from_pretrained(source)
    if config.model_type != "clip":
        raise RewardError(f"clip='{name}' holds a model of type '{config.model_type}': a CLIPModel ('clip') is needed")
    options = {"config": config, "output_loading_info": True}
    with hub_or_cache(source):
        model, loading = load_in_dtype(CLIPModel.from_pretrained, source, dtype=torch.float32, **options)
    if loading["missing_keys"]:
        raise RewardError(f"clip='{name}' lacks weights ({sorted(loading['missing_keys'])[0]}, ...): download it again")
    scale = model.logit_scale.exp().item()  # in float32: rounded to bfloat16 it would be off by up to 2 %
    model.to(device, dtype)
    nested = Path(source) / "tokenizer"
    tokenizer = _tokenizer(name, str(nested) if nested.is_dir() else source, other_tokenizer, config.text_config)
    length = config.text_config.max_position_embeddings
    mean, std = _normalisation(source)

    def text_features(prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        ids, mask = tokens.input_ids.to(model.device), tokens.attention_mask.to(model.device)
        return _pooled(model.get_text_features(input_ids=ids, attention_mask=mask))

    return ClipEncoder(
        name,
        model,
        image_features=lambda pixels: _pooled(model.get_image_features(pixel_values=pixels)),
        text_features=text_features,
        dim=config.projection_dim,
        size=config.vision_config.image_size,
        mean=mean,
        std=std,
        scale=scale,
    )


def _tokenizer(name: str, source: str, other: str | None, config: Any) -> Any:
    try:
        return fitting_tokenizer(source, config.vocab_size)
    except RewardError:
        if other is None:
            raise
    try:
        return fitting_tokenizer(other, config.vocab_size)
    except RewardError as error:
        raise RewardError(f"clip='{name}' comes without a tokenizer, and {error}") from error


def _pooled(features: Any) -> Tensor:
    """The projected embedding: transformers up to 4 returns it, 5 wraps it in an output object."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _normalisation(source: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of the folder's own ``preprocessor_config.json``, else CLIP's; emoji-clip sees [-1, 1]."""
    from transformers.utils import cached_file

    if Path(source).name == EMOJI_CLIP:
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    try:
        with hub_or_cache(source):
            file = cached_file(source, "preprocessor_config.json")
        settings = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except OSError:
        return CLIP_MEAN, CLIP_STD
    return settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)


def load_open_clip(name: str, device: torch.device, dtype: torch.dtype) -> ClipEncoder:
    import open_clip

    architecture, _, weights = name.removeprefix(OPEN_CLIP).partition("/")
    if Path(weights).is_file():
        note(weights)
    # OpenAI's and some other weights were trained with QuickGELU, which open_clip knows but only warns of.
    quick = bool((open_clip.get_pretrained_cfg(architecture, weights) or {}).get("quick_gelu"))
    model = open_clip.create_model(architecture, pretrained=weights, precision="fp32", force_quick_gelu=quick)
    # open_clip says here how the images were prepared that these weights were trained on.
    prepared = getattr(model.visual, "preprocess_cfg", {})
    fit = squash if prepared.get("resize_mode") == "squash" else resize_and_crop
    fit = functools.partial(fit, mode=prepared.get("interpolation", "bicubic"))
    return open_clip_encoder(name, model, architecture, device, dtype, fit)


def open_clip_encoder(
    name: str,
    model: Any,
    architecture: str,
    device: torch.device,
    dtype: torch.dtype,
    fit: Callable[[Tensor, int], Tensor] = resize_and_crop,
) -> ClipEncoder:
    """The encoder around an open_clip ``model``, which comes in float32 and is moved to ``device`` and ``dtype``."""
    import open_clip

    scale = model.logit_scale.exp().item()
    model.to(device, dtype)
    tokenizer = open_clip.get_tokenizer(architecture)
    visual: Any = model.visual
    size = visual.image_size
    return ClipEncoder(
        name,
        model,
        image_features=model.encode_image,
        text_features=lambda prompts: model.encode_text(tokenizer(prompts).to(next(model.parameters()).device)),
        dim=visual.output_dim,
        size=size if isinstance(size, int) else size[0],
        mean=getattr(visual, "image_mean", None) or CLIP_MEAN,
        std=getattr(visual, "image_std", None) or CLIP_STD,
        scale=scale,
        fit=fit,
    )
