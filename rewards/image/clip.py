"""CLIP embeddings for rewards: one preprocessing, one encoder class, three places to load it from.

A CLIP is named by a string:

- ``emoji-clip``: the embedded one, the default for ``emoji-sd`` and ``emoji-flow``;
- a folder or Hub id of a transformers CLIPModel, such as ``openai/clip-vit-large-patch14`` (the default otherwise);
- ``open_clip:ARCHITECTURE/WEIGHTS``, such as ``open_clip:ViT-B-32/laion2b_s34b_b79k``; WEIGHTS is a tag that open_clip
  knows or a checkpoint file. Needs ``pip install 'diffusion-align[open-clip]'``.
"""

from __future__ import annotations

import functools
import importlib.util
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainValidator

from diffusion_align.assets import EMBEDDED_PIPELINES
from diffusion_align.pretrained import hub_or_cache, load_in_dtype
from diffusion_align.rewards.base import RewardError, foreign_code
from diffusion_align.rewards.networks import (
    embed_each,
    is_missing_folder,
    load_tokenizer,
    note,
    place,
    recorded,
    settings_beside,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

VIT_L_14 = "openai/clip-vit-large-patch14"
EMOJI_CLIP = "emoji-clip"
OPEN_CLIP = "open_clip:"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def default_clip(model: str | None) -> str:
    """The CLIP that judges ``model``: the embedded one for the embedded models, ViT-L/14 for everything else."""
    return EMOJI_CLIP if is_emoji_model(model) else VIT_L_14


def is_emoji_model(model: str | None) -> bool:
    """Whether ``model`` names an embedded image model."""
    return model is not None and Path(str(model)).name in EMBEDDED_PIPELINES


def model_for_images(sizes: Iterable[tuple[int, int]]) -> str | None:
    """The model whose default CLIP judges images of these sizes in pixels, for ``default_clip``.

    ``emoji-sd`` if all are 64 x 64, which are its samples and the emoji drawings; else None, for photographs and art.
    """
    return "emoji-sd" if set(sizes) == {(64, 64)} else None


def resize_and_crop(images: Tensor, size: int, *, mode: str = "bicubic") -> Tensor:
    """(B, 3, size, size): the shorter side resized to ``size`` (antialiased), then a centre crop."""
    height, width = images.shape[-2:]
    if min(height, width) != size:
        short = min(height, width)
        target = [size * height // short, size * width // short]
        images = _resized(images, target, mode)
        height, width = target
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[..., top : top + size, left : left + size]


def squash(images: Tensor, size: int, *, mode: str = "bicubic") -> Tensor:
    """(B, 3, size, size): both sides resized to ``size`` (antialiased), whatever that does to the proportions."""
    return images if images.shape[-2:] == (size, size) else _resized(images, [size, size], mode)


def _resized(images: Tensor, target: list[int], mode: str) -> Tensor:
    from torch.nn import functional

    resized = functional.interpolate(images, size=target, mode=mode, antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def preprocess(
    images: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    fit: Callable[[Tensor, int], Tensor] = resize_and_crop,
) -> Tensor:
    """CLIP's input, float32 (B, 3, size, size), from float images (B, 3, H, W) in [0, 1]; a gradient flows.

    ``fit``, then ``(x - mean) / std``: by default CLIP's own recipe except that pixels are not rounded to 8 bits after
    the resize.
    """
    images = fit(images.float(), size)
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


class ClipEncoder:
    """Unit-length image and text embeddings of one frozen CLIP. Load it with `load_clip`.

    Attributes:
        scale: by what the CLIP multiplied cosines in its training, ``exp(logit_scale)``.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        image_features: Callable[[Tensor], Tensor],
        text_features: Callable[[list[str]], Tensor],
        dim: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        scale: float,
        fit: Callable[[Tensor, int], Tensor] = resize_and_crop,
    ):
        self.name, self.module, self.dim = name, module.eval().requires_grad_(False), dim
        self._image_features, self._text_features = image_features, text_features
        self._size, self._mean, self._std, self._fit = size, mean, std, fit
        self.scale = scale
        self.places: list[str] = []  # what it was loaded from

    @property
    def label(self) -> str:
        return f"CLIP {self.name}" + (", trained on emoji drawings" if self.name == EMOJI_CLIP else "")

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to(self, device: str | torch.device) -> ClipEncoder:
        self.module.to(device)
        return self

    def embed_images(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Unit embeddings, float32 (B, D) on the encoder's device; a gradient flows to ``images`` where it is on."""
        import torch
        from torch.nn import functional

        parameter = next(self.module.parameters())
        features = [
            self._image_features(
                preprocess(part.to(parameter.device), self._size, self._mean, self._std, fit=self._fit).to(
                    parameter.dtype
                )
            )
            for part in images.split(batch_size)
        ]
        return functional.normalize(torch.cat(features).float(), dim=-1)

    def embed_texts(self, prompts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Unit embeddings, float32 (B, D), no gradient. Equal prompts are encoded once; long ones lose their end."""
        import torch
        from torch.nn import functional

        with torch.no_grad():
            return functional.normalize(embed_each(prompts, batch_size, self._text_features).float(), dim=-1)


_shared = ContextVar("_shared", default=True)
_loaded: weakref.WeakValueDictionary[tuple[str, str, str], ClipEncoder] = weakref.WeakValueDictionary()


def load_clip(
    name: str, *, device: str | torch.device = "cpu", dtype: str = "float32", tokenizer: str | None = None
) -> ClipEncoder:
    """The CLIP called ``name`` (see the module), frozen; rewards that use the same one share it.

    ``tokenizer``: folder or Hub id of the tokenizer to take where a transformers CLIPModel comes without one.

    Raises:
        RewardError: unknown, not found, damaged, or not a CLIP; an extra is missing.
    """
    check_clip(name)

    def load(device: torch.device, dtype: torch.dtype) -> ClipEncoder:
        if name.startswith(OPEN_CLIP):
            with hub_or_cache():
                return load_open_clip(name, device, dtype)
        return load_transformers(name, device, dtype, tokenizer)

    return share_encoder(name, load, device=device, dtype=dtype)


def share_encoder(
    name: str, load: Callable[[torch.device, torch.dtype], ClipEncoder], *, device: str | torch.device, dtype: str
) -> ClipEncoder:
    """The encoder called ``name`` if one is in use on ``device`` in ``dtype``, else what ``load`` gives.

    Raises:
        RewardError: ``load`` failed, or ``dtype`` does not suit ``device``.
    """
    import torch

    device = torch.device(device)
    key, wanted = (name, str(device), dtype), torch_dtype(dtype, device)
    encoder = _loaded.get(key) if _shared.get() else None
    if encoder is None or encoder.device.type != device.type or device.index not in (None, encoder.device.index):
        advice = "check the name and the connection, or give a folder that holds a CLIPModel"
        with foreign_code(f"clip='{name}' could not be loaded (", f"): {advice}"), recorded() as places:
            encoder = load(device, wanted)
        encoder.places = places
        if _shared.get():
            _loaded[key] = encoder
    for one in encoder.places:
        note(one)
    return encoder


@contextmanager
def unshared() -> Iterator[None]:
    """Encoders loaded inside belong to nobody else: whoever moves one to and fro moves no other reward's."""
    token = _shared.set(False)
    try:
        yield
    finally:
        _shared.reset(token)


def check_clip(name: str) -> str:
    """The name of a CLIP as it is; nothing is loaded.

    Raises:
        RewardError: it cannot be one, or the package that it needs is missing.
    """
    if not isinstance(name, str) or not name:
        raise RewardError(
            f"clip={name!r} must be '{EMOJI_CLIP}', a folder, a Hub id or '{OPEN_CLIP}ARCHITECTURE/WEIGHTS'"
        )
    if name.startswith(OPEN_CLIP):
        architecture, _, weights = name.removeprefix(OPEN_CLIP).partition("/")
        if not architecture or not weights:
            raise RewardError(
                f"clip='{name}' must read '{OPEN_CLIP}ARCHITECTURE/WEIGHTS', e.g. {OPEN_CLIP}ViT-B-32/laion2b_s34b_b79k"
            )
        if importlib.util.find_spec("open_clip") is None:
            raise RewardError(f"clip='{name}' needs open_clip: pip install 'diffusion-align[open-clip]'")
    elif is_missing_folder(name):
        raise RewardError(f"clip='{name}' is not a folder: give one that holds a transformers CLIPModel")
    return name


Clip = Annotated[str, PlainValidator(check_clip)]


def load_transformers(
    name: str, device: torch.device, dtype: torch.dtype, other_tokenizer: str | None = None
) -> ClipEncoder:
    """A transformers CLIPModel; ``other_tokenizer`` is where to take the tokenizer if it comes without one."""
    import torch
    from transformers import AutoConfig, CLIPModel

    if name == EMOJI_CLIP:
        from diffusion_align.assets import asset_path

        source = str(asset_path(EMOJI_CLIP))
    else:
        source = place(name)
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
        return load_tokenizer(source, config.vocab_size)
    except RewardError:
        if other is None:
            raise
    try:
        return load_tokenizer(other, config.vocab_size)
    except RewardError as error:
        raise RewardError(f"clip='{name}' comes without a tokenizer, and {error}") from error


def _pooled(features: Any) -> Tensor:
    """The projected embedding: transformers up to 4 returns it, 5 wraps it in an output object."""
    from torch import Tensor

    return features if isinstance(features, Tensor) else features.pooler_output


def _normalisation(source: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of the folder's own ``preprocessor_config.json``, else CLIP's; emoji-clip sees [-1, 1]."""
    if Path(source).name == EMOJI_CLIP:
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    settings = settings_beside(source, "preprocessor_config.json")
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
