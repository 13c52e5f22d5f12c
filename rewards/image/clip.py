"""CLIP embeddings for rewards: one preprocessing, one encoder class, three places to load it from.

A CLIP is named by a string:

- ``emoji-clip``: the embedded one, the default for ``emoji-sd``;
- a folder or Hub id of a transformers CLIPModel, such as ``openai/clip-vit-large-patch14`` (the default otherwise);
- ``open_clip:ARCHITECTURE/WEIGHTS``, such as ``open_clip:ViT-B-32/laion2b_s34b_b79k``; WEIGHTS is a tag that open_clip
  knows or a checkpoint file. Needs ``pip install 'diffusion-align[open-clip]'``.
"""

import importlib.util
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import torch
from pydantic import PlainValidator
from torch import Tensor, nn
from torch.nn import functional

from diffusion_align.pretrained import hub_or_cache
from diffusion_align.rewards.base import RewardError, describe_exception
from diffusion_align.rewards.places import note, recorded

VIT_L_14 = "openai/clip-vit-large-patch14"
EMOJI_CLIP = "emoji-clip"
OPEN_CLIP = "open_clip:"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def default_clip(model: str | None) -> str:
    """The CLIP that judges ``model``: the embedded one for ``emoji-sd``, ViT-L/14 for everything else."""
    return EMOJI_CLIP if is_emoji_sd(model) else VIT_L_14


def is_emoji_sd(model: str | None) -> bool:
    """Whether ``model`` names the embedded diffusion model."""
    return model is not None and Path(str(model)).name == "emoji-sd"


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
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to(self, device: str | torch.device) -> "ClipEncoder":
        self.module.to(device)
        return self

    def embed_images(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Unit embeddings, float32 (B, D) on the encoder's device; a gradient flows to ``images`` where it is on."""
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

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Unit embeddings, float32 (B, D), no gradient. Equal prompts are encoded once; long ones lose their end."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        unique = list(rows)
        parts = [unique[start : start + batch_size] for start in range(0, len(unique), batch_size)]
        features = torch.cat([self._text_features(part) for part in parts]).float()
        return functional.normalize(features, dim=-1)[[rows[prompt] for prompt in prompts]]


_shared = ContextVar("_shared", default=True)
_loaded: "weakref.WeakValueDictionary[tuple[str, str, str], ClipEncoder]" = weakref.WeakValueDictionary()


def load_clip(
    name: str, *, device: str | torch.device = "cpu", dtype: str = "float32", tokenizer: str | None = None
) -> ClipEncoder:
    """The CLIP called ``name`` (see the module), frozen; rewards that ask for the same one share it.

    ``tokenizer``: folder or Hub id of the tokenizer to take where a transformers CLIPModel comes without one.

    Raises:
        RewardError: unknown, not found, damaged, or not a CLIP; an extra is missing.
    """
    check_clip(name)

    def load(device: torch.device, dtype: torch.dtype) -> ClipEncoder:
        from diffusion_align.rewards.image.clip_backends import load_open_clip, load_transformers

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
    device = torch.device(device)
    key, wanted = (name, str(device), dtype), torch_dtype(dtype, device)
    encoder = _loaded.get(key) if _shared.get() else None
    if encoder is None or encoder.device.type != device.type or device.index not in (None, encoder.device.index):
        try:
            with recorded() as places:
                encoder = load(device, wanted)
            encoder.places = places
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"CLIP '{name}' could not be loaded ({describe_exception(error)}): "
                "give a folder that holds one, or check the name and the connection"
            ) from error
        if _shared.get():
            _loaded[key] = encoder
    for place in encoder.places:
        note(place)
    return encoder


@contextmanager
def unshared() -> Iterator[None]:
    """Encoders loaded inside belong to nobody else: whoever moves one to and fro moves no other reward's."""
    token = _shared.set(False)
    try:
        yield
    finally:
        _shared.reset(token)


def torch_dtype(dtype: str, device: str | torch.device) -> torch.dtype:
    """The dtype called ``dtype``; RewardError for half precision on a CPU."""
    if torch.device(device).type == "cpu" and dtype != "float32":
        raise RewardError(f"dtype={dtype!r} is for GPUs: on a CPU rewards run in float32")
    return DTYPES[dtype]


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


def is_missing_folder(name: str) -> bool:
    """Whether ``name`` reads like a path, not like a Hub id, and no folder is there."""
    looks_like_a_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return looks_like_a_path and not Path(name).expanduser().is_dir()
