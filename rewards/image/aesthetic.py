"""How pleasing an image is, by a small head on a CLIP image embedding: LAION's predictors and an embedded one.

- ``v2``: LAION V2, the one that DDPO trained on: ``sac+logos+ava1-l14-linearMSE.pth``, five linear layers without
  activations on CLIP ViT-L/14 (christophschuhmann/improved-aesthetic-predictor, Apache-2.0). Downloaded from the Hub
  repository ``camenduru/improved-aesthetic-predictor``, a copy made by a third party; its SHA-256 is compared with the
  authors' file.
- ``v1``: LAION V1, one linear layer on CLIP ViT-L/14 (LAION-AI/aesthetic-predictor, MIT). We know of no Hub repository
  that holds this 4 kB file by itself, so it comes from the authors' GitHub repository, checked in the same way.
- ``embedded``: one linear layer on emoji-clip, fitted to pairs of emoji drawings (Bradley-Terry); embedded.

``head`` takes a local file instead (.pth or .safetensors), and its own shape decides what is built from it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from diffusion_align.assets import asset_path
from diffusion_align.pretrained import hub_or_cache
from diffusion_align.rewards.base import RewardError, foreign_code
from diffusion_align.rewards.image.clip import EMOJI_CLIP, VIT_L_14, Clip, ClipEncoder, is_emoji_model, load_clip
from diffusion_align.rewards.networks import LocalFile, NetworkSettings, has_digest, note, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

VARIANTS = {"v2": VIT_L_14, "v1": VIT_L_14, "embedded": EMOJI_CLIP}
HEADS = {
    "v2": "LAION's V2 head, fitted to people's ratings of photographs and generated images",
    "v1": "LAION's V1 head, fitted to people's ratings of images",
    "embedded": "the embedded head, fitted to preferences over emoji drawings",
}
V2_REPOSITORY, V2_FILE = "camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"
V1_URL = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"
SHA256 = {
    "v2": "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    "v1": "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
}


class Aesthetic:
    """The head's score as a reward. `AestheticSettings` builds it."""

    name = "aesthetic"
    differentiable = True

    def __init__(self, encoder: ClipEncoder, head: nn.Module, *, batch_size: int = 64, label: str = "a head"):
        self.encoder, self.batch_size = encoder, batch_size
        self.scorer = f"{label}, on {encoder.label}"
        self.head = head.eval().requires_grad_(False).to(encoder.device)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        embeddings = self.encoder.embed_images(images, batch_size=self.batch_size)
        return self.head.to(embeddings.device)(embeddings).squeeze(-1)

    def to(self, device: str | torch.device) -> Aesthetic:
        self.encoder.to(device)
        return self


class AestheticSettings(NetworkSettings):
    """How pleasing the image is: the score of a head on its unit-length CLIP embedding.

    The head is always float32.
    """

    name: ClassVar[str] = "aesthetic"
    about: ClassVar[dict[str, Any]] = {
        "model": "CLIP openai/clip-vit-large-patch14 with LAION's V2 or V1 head; or emoji-clip and an embedded head",
        "range": "about 1 to 10 (v1, v2); unbounded, 0 is average (embedded)",
        "cost": "1.7 GB to download, 0.16 TFLOPs per image (v2, v1); nothing to download (embedded)",
        "licence": "Apache-2.0 (v2, embedded), MIT (v1, CLIP ViT-L/14)",
        "differentiable": True,
    }

    variant: Literal["v2", "v1", "embedded"] | None = Field(
        None, description="LAION's head, or ours; by default embedded for the models emoji-sd and emoji-flow, else v2"
    )
    clip: Clip | None = Field(None, description="another CLIP; it must be the one that the head was trained on")
    head: LocalFile = Field(None, description="a local .pth or .safetensors file in place of the download")

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> Aesthetic:
        variant = self.variant or ("embedded" if is_emoji_model(model) else "v2")
        file = Path(self.head).expanduser() if self.head else head_file(variant)
        note(file)
        scorer = load_head(file)  # before CLIP: smaller, fails sooner
        encoder = load_clip(self.clip or VARIANTS[variant], device=device, dtype=self.dtype)
        if scorer[0].in_features != encoder.dim:
            raise RewardError(
                f"the aesthetic head '{self.head or variant}' takes {scorer[0].in_features} numbers but CLIP "
                f"'{encoder.name}' gives {encoder.dim}: set clip to the CLIP that the head was trained on"
            )
        label = f"the head in {self.head}" if self.head else HEADS[variant]
        return Aesthetic(encoder, scorer, batch_size=self.batch_size, label=label)


def load_head(path: Path) -> nn.Sequential:
    """The head in ``path``, float32 on the CPU: ``weight, bias``, or ``layers.N.weight, layers.N.bias``.

    The numbering tells the authors' two networks apart: Linear-Dropout-...-Linear-Linear (0, 2, 4, 6, 7) and
    Linear-ReLU-Dropout-...-Linear-ReLU-Linear (0, 3, 6, 9, 11). Dropout is for training and left out.

    Raises:
        RewardError: not a file of tensors, or not a head.
    """
    from torch import nn

    state = read_tensors(path)
    with foreign_code(f"'{path}' does not hold an aesthetic head (", ")"):
        if "weight" in state:
            state = {f"layers.0.{key}": value for key, value in state.items()}
        names = [key.split(".") for key in state]
        numbers = sorted(int(name[1]) for name in names if name[0] == "layers" and name[-1] == "weight")
        relu = len(numbers) > 1 and numbers[-1] - numbers[-2] > 1
        layers: list[nn.Module] = []
        for number in numbers:
            weight, bias = state[f"layers.{number}.weight"].float(), state[f"layers.{number}.bias"].float()
            layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])  # leaves the global RNG alone
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers += [layer, nn.ReLU()] if relu and number != numbers[-1] else [layer]
        sizes = [layer.weight.shape for layer in layers if isinstance(layer, nn.Linear)]
        if not sizes or sizes[-1][0] != 1 or any(low[0] != high[1] for low, high in pairwise(sizes)):
            raise ValueError(f"layers {[tuple(size) for size in sizes]} do not end in one score")
    return nn.Sequential(*layers)


def head_file(variant: str) -> Path:
    """The file of a published head, downloaded once and compared with the authors' SHA-256; or the embedded one.

    Raises:
        RewardError: it cannot be downloaded, or is not the published file.
    """
    import torch

    if variant == "embedded":
        return Path(asset_path("aesthetic-head"))
    source = f"{V2_REPOSITORY}, {V2_FILE}" if variant == "v2" else V1_URL
    advice = "connect once, or set the options head and clip to local copies"
    with foreign_code(f"the aesthetic head '{variant}' could not be downloaded ({source}; ", f"): {advice}"):
        if variant == "v2":
            from huggingface_hub import hf_hub_download

            with hub_or_cache():
                path = Path(hf_hub_download(V2_REPOSITORY, V2_FILE))
        else:
            path = Path(torch.hub.get_dir()) / "checkpoints" / V1_URL.rsplit("/", 1)[1]
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(V1_URL, str(path), progress=False)
    if not has_digest(path, SHA256[variant]):
        raise RewardError(
            f"'{path}' is not the published aesthetic head '{variant}': delete it, or set head to another file"
        )
    return path
