"""Which picture people prefer for a prompt, by HPS v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341).

Both are open_clip's ViT-H-14 trained on rankings of pictures made for one prompt; only the weights differ. A picture is
resized until its *longer* side fits and gets black borders, as in the authors' own scoring code. (That code resizes
through torchvision, which antialiases since version 0.17 and did not before; here it is always antialiased.)
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.clip import ClipEncoder, running_problem, share_encoder
from diffusion_align.rewards.clip_score import ClipScore
from diffusion_align.rewards.weights import load_tensors, read_tensors, unfilled, weights_file, weights_problem

REPOSITORY = "xswu/HPSv2"
FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2": "HPS_v2_compressed.pt"}
ABOUT = {
    "hps_v2": {
        "model": f"{REPOSITORY}, {FILES['v2.1']}",
        "range": "-1 to 1, in practice 0.15 to 0.35",
        "cost": "2 GB to download, 0.4 TFLOPs a picture",
        "extra": "open-clip",
        "licence": "Apache-2.0",
        "differentiable": True,
    },
}


class HpsV2(ClipScore):
    """The cosine as a reward. Build it with `hps_v2`."""

    name = "hps_v2"


def hps_v2(
    *,
    version: str = "v2.1",
    weights: str | None = None,
    architecture: str = "ViT-H-14",
    dtype: str = "float32",
    batch_size: int = 64,
    model: str | None = None,
    device: str | torch.device = "cpu",
) -> HpsV2:
    """How much people prefer the picture for its prompt: cosine of the embeddings by HPS v2.1 or v2.

    The authors' tables print it times 100.

    Args:
        version: "v2.1" or "v2"; their values do not compare.
        weights: a local file in place of the download (.pt or .safetensors); ``version`` then does not matter.
        architecture: what open_clip calls the network; the published weights are of "ViT-H-14".
        dtype: of the network; "float16" and "bfloat16" only on a GPU.
        batch_size: pictures a forward pass.
        model: the diffusion model being trained; the score does not depend on it.
    """
    problem = hps_v2_problem(
        version=version, weights=weights, architecture=architecture, dtype=dtype, batch_size=batch_size
    )
    if problem:
        raise RewardError(problem)

    def load(device: torch.device, dtype: torch.dtype) -> ClipEncoder:
        return load_hps(weights_file(weights, REPOSITORY, FILES[version]), architecture, device, dtype)

    name = f"{architecture} with {weights or FILES[version]}"
    return HpsV2(share_encoder(name, load, device=device, dtype=dtype), batch_size=batch_size)


def hps_v2_problem(
    *,
    version: Any = "v2.1",
    weights: Any = None,
    architecture: Any = "ViT-H-14",
    dtype: Any = "float32",
    batch_size: Any = 64,
    device: Any = None,
) -> str | None:
    """What is wrong with these options, in one sentence, or None. Loads nothing."""
    if version not in tuple(FILES):
        return f"version={version!r} is unknown: choose one of {', '.join(FILES)}"
    if not isinstance(architecture, str) or not architecture:
        return f"architecture={architecture!r} must be a name that open_clip knows, such as 'ViT-H-14'"
    if importlib.util.find_spec("open_clip") is None:
        return "it needs open_clip: pip install 'diffusion-align[open-clip]'"
    return weights_problem(weights) or running_problem(dtype=dtype, batch_size=batch_size)


def load_hps(path: Path, architecture: str, device: torch.device, dtype: torch.dtype) -> ClipEncoder:
    """open_clip's ``architecture`` with the weights in ``path``.

    Raises:
        RewardError: not a file of tensors, not those of ``architecture``, or open_clip does not know that.
    """
    import open_clip

    from diffusion_align.rewards.clip_backends import open_clip_encoder

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
    long = max(images.shape[-2:])
    height, width = (round(side * size / long) for side in images.shape[-2:])
    if long != size:
        images = functional.interpolate(
            images, size=[height, width], mode="bicubic", antialias=True, align_corners=False
        )
    left, top = (size - width) // 2, (size - height) // 2
    return functional.pad(images, [left, size - width - left, top, size - height - top])
