"""How well an image serves its prompt, by ImageReward (Xu et al. 2023, arXiv:2304.05977).

BLIP (Li et al. 2022, arXiv:2201.12086) with a head: a ViT-L/16 sees the image at 224 x 224, a BERT reads the prompt
and looks at the patches by cross-attention, and five linear layers without activations map its first token to a score,
normalised with the mean and standard deviation of the authors' test set. The networks are those of transformers; the
published weights are renamed to fit. Their sizes are read off the weights; every attention head is 64 wide, as in the
published model.
"""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.image.clip import CLIP_MEAN, CLIP_STD, preprocess
from diffusion_align.rewards.networks import (
    LocalFile,
    NetworkSettings,
    is_missing_folder,
    load_tensors,
    load_tokenizer,
    read_tensors,
    shape_of,
    torch_dtype,
    unfilled,
    weights_file,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

REPOSITORY, FILE = "zai-org/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
PROMPT_TOKENS = 35
HEAD_WIDTH = 64
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
VISION_NAMES = {  # part of a key in transformers: the same in the published file
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "encoder.layers.": "blocks.",
    ".layer_norm": ".norm",
    ".self_attn.qkv.": ".attn.qkv.",
    ".self_attn.projection.": ".attn.proj.",
    "post_layernorm.": "norm.",
}


class ImageReward:
    """The head's score as a reward. `ImageRewardSettings` builds it."""

    name = "image_reward"
    differentiable = True

    def __init__(
        self, vision: Any, text: Any, head: nn.Module, tokenizer: Any, *, batch_size: int = 64, file: str = FILE
    ):
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.scorer = f"{file}, fitted to people's rankings of images of one prompt"
        self.batch_size = batch_size
        for part in (vision, text, head):
            part.eval().requires_grad_(False)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        import torch

        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt"
        )
        parts = (part.split(self.batch_size) for part in (images, tokens.input_ids, tokens.attention_mask))
        return torch.cat([self._score(*part) for part in zip(*parts)])

    def _score(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) float32 on the networks' device, from images and (B, L) tokens with their mask."""
        device, dtype = self.vision.device, self.vision.dtype
        pixels = preprocess(images.to(device), self.vision.config.image_size, CLIP_MEAN, CLIP_STD)
        patches = self.vision(pixel_values=pixels.to(dtype)).last_hidden_state
        words = self.text(
            input_ids=ids.to(device), attention_mask=mask.to(device), encoder_hidden_states=patches
        ).last_hidden_state
        return (self.head(words[:, 0].float()).squeeze(-1) - MEAN) / STD

    def to(self, device: str | torch.device) -> ImageReward:
        for part in (self.vision, self.text, self.head):
            part.to(device)
        return self


class ImageRewardSettings(NetworkSettings):
    """How well the image serves its prompt: ImageReward-v1.0, in standard deviations from the average.

    Prompts lose what is beyond 35 tokens, as with the authors. The head is always float32.
    """

    name: ClassVar[str] = "image_reward"
    about: ClassVar[dict[str, Any]] = {
        "needs": "prompts",
        "model": f"{REPOSITORY}, {FILE} (tokenizer: {TOKENIZER})",
        "range": "unbounded, 0 is average and 1 a standard deviation; in practice -2.3 to 2",
        "cost": "1.8 GB to download, 0.14 TFLOPs per image",
        "licence": "Apache-2.0",
        "differentiable": True,
    }

    weights: LocalFile = Field(
        None, description="a local .pt or .safetensors file with the published names, in place of the download"
    )
    tokenizer: str = Field(
        TOKENIZER, min_length=1, description="folder or Hub id; the published weights need the default's"
    )

    @field_validator("tokenizer")
    @classmethod
    def _there(cls, tokenizer: str) -> str:
        if is_missing_folder(tokenizer):
            raise ValueError(f"give a folder that holds the tokenizer of {TOKENIZER}, or a Hub id")
        return tokenizer

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> ImageReward:
        wanted = torch_dtype(self.dtype, device)
        file = weights_file(self.weights, REPOSITORY, FILE)
        vision, text, head = load_image_reward(file)
        words = load_tokenizer(self.tokenizer, text.config.vocab_size)
        parts = vision.to(device, wanted), text.to(device, wanted), head.to(device)
        return ImageReward(*parts, words, batch_size=self.batch_size, file=str(self.weights or FILE))


def load_image_reward(path: Path) -> tuple[Any, Any, nn.Module]:
    """Image network, text network and head with the weights in ``path``, float32 on the CPU.

    Raises:
        RewardError: not a file of tensors, or not those of ImageReward.
    """
    from torch import nn
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    tensors = read_tensors(path)
    vision_width, _, patch, _ = shape_of(tensors, f"{VISION}patch_embed.proj.weight", 4, path)
    patches = shape_of(tensors, f"{VISION}pos_embed", 3, path)[1] - 1
    if isqrt(patches) ** 2 != patches:
        raise RewardError(f"'{path}' has position embeddings for {patches} patches, which is not a square")
    vocabulary, text_width = shape_of(tensors, f"{TEXT}embeddings.word_embeddings.weight", 2, path)
    for width in (vision_width, text_width):
        if width % HEAD_WIDTH:
            raise RewardError(f"'{path}' has a network {width} wide, which is no multiple of {HEAD_WIDTH}")
    vision_config = BlipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=shape_of(tensors, f"{VISION}blocks.0.mlp.fc1.weight", 2, path)[0],
        num_hidden_layers=_depth(tensors, f"{VISION}blocks."),
        num_attention_heads=vision_width // HEAD_WIDTH,
        image_size=isqrt(patches) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=vision_width,
        intermediate_size=shape_of(tensors, f"{TEXT}encoder.layer.0.intermediate.dense.weight", 2, path)[0],
        num_hidden_layers=_depth(tensors, f"{TEXT}encoder.layer."),
        num_attention_heads=text_width // HEAD_WIDTH,
        max_position_embeddings=shape_of(tensors, f"{TEXT}embeddings.position_embeddings.weight", 2, path)[0],
        layer_norm_eps=1e-12,
        bos_token_id=None,  # nothing is generated; the defaults would have to be in the vocabulary
        eos_token_id=None,
        sep_token_id=None,
    )
    with unfilled():
        vision, text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
        head = nn.Sequential(
            *(nn.Linear(text_width, 1024), nn.Dropout(0.2)),
            *(nn.Linear(1024, 128), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.Dropout(0.1)),
            *(nn.Linear(64, 16), nn.Linear(16, 1)),
        )
    # The file also holds parts that only BLIP's training needs.
    load_tensors(vision, tensors, path, name_of=_vision_name, strict=False)
    load_tensors(text, tensors, path, name_of=TEXT.__add__, strict=False)
    load_tensors(head, tensors, path, name_of=HEAD.__add__, strict=False)
    return vision, text, head


def _depth(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many numbered layers the keys under ``prefix`` name."""
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


def _vision_name(key: str) -> str:
    for ours, published in VISION_NAMES.items():
        key = key.replace(ours, published)
    return VISION + key
