"""Which image people prefer for a prompt, by HPS v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341).

Both are open_clip's ViT-H-14 trained on rankings of images made for one prompt; only the weights differ. An image is
resized until its *longer* side fits and gets black borders, as in the authors' own scoring code. (That code resizes
through torchvision, which antialiases since version 0.17 and did not before; here it is always antialiased.)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.image.clip import ClipEncoder, open_clip_encoder, share_encoder
from diffusion_align.rewards.image.clip_score import ClipScore
from diffusion_align.rewards.networks import (
    LocalFile,
    NetworkSettings,
    load_tensors,
    read_tensors,
    unfilled,
    weights_file,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REPOSITORY = "xswu/HPSv2"
FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2": "HPS_v2_compressed.pt"}


class HpsV2Settings(NetworkSettings):
    """How much people prefer the image for its prompt: cosine of the embeddings by HPS v2.1 or v2.

    The authors' tables print it times 100.
    """

    name: ClassVar[str] = "hps_v2"
    about: ClassVar[dict[str, Any]] = {
        "needs": "prompts",
        "model": f"{REPOSITORY}, {FILES['v2.1']}",
        "range": "-1 to 1, in practice 0.15 to 0.35",
        "cost": "2 GB to download, 0.4 TFLOPs per image",
        "extra": "open-clip",
        "licence": "Apache-2.0",
        "differentiable": True,
    }

    version: Literal["v2.1", "v2"] = Field("v2.1", description="which weights; scores of the two are not comparable")
    weights: LocalFile = Field(None, description="a local .pt or .safetensors file in place of the download")
    architecture: str = Field(
        "ViT-H-14", min_length=1, description="open_clip's name for the network; the published weights are of ViT-H-14"
    )

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if importlib.util.find_spec("open_clip") is None:
            raise RewardError("it needs open_clip: pip install 'diffusion-align[open-clip]'")
        return self

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> ClipScore:
        def load(device: torch.device, dtype: torch.dtype) -> ClipEncoder:
            file = weights_file(self.weights, REPOSITORY, FILES[self.version])
            return load_hps(file, self.architecture, device, dtype)

        name = f"{self.architecture} with {self.weights or FILES[self.version]}"
        encoder = share_encoder(name, load, device=device, dtype=self.dtype)
        return ClipScore(encoder, name=self.name, batch_size=self.batch_size)


def load_hps(path: Path, architecture: str, device: torch.device, dtype: torch.dtype) -> ClipEncoder:
    """open_clip's ``architecture`` with the weights in ``path``.

    Raises:
        RewardError: not a file of tensors, not those of ``architecture``, or open_clip does not know that.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise RewardError(f"architecture='{architecture}' is not known to open_clip: the published one is 'ViT-H-14'")
    tensors = read_tensors(path)
    with unfilled():
        network = open_clip.CLIP(**config)
    load_tensors(network, tensors, path)
    return open_clip_encoder(str(path), network, architecture, device, dtype, fit=resize_and_pad)


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """(B, 3, size, size): the longer side resized to ``size`` (bicubic, antialiased, not clamped), black borders."""
    from torch.nn import functional

    long = max(images.shape[-2:])
    height, width = (round(side * size / long) for side in images.shape[-2:])
    if long != size:
        images = functional.interpolate(
            images, size=[height, width], mode="bicubic", antialias=True, align_corners=False
        )
    left, top = (size - width) // 2, (size - height) // 2
    return functional.pad(images, [left, size - width - left, top, size - height - top])
