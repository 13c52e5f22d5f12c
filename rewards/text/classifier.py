"""A sequence classifier as judge: a reward model, a sentiment or toxicity network, or one that you trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from diffusion_align.bounds import MOST
from diffusion_align.rewards.base import RewardError, foreign_code
from diffusion_align.rewards.networks import (
    NetworkName,
    TextNetworkSettings,
    load_network,
    load_tokenizer,
    note,
    token_limit,
    tokenize_batch,
    without_token_types,
)
from diffusion_align.rewards.text.base import Text, text_of, words_left_out

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Classifier:
    """One logit or probability as a reward. `ClassifierSettings` builds it."""

    name = "classifier"

    def __init__(self, network: Any, tokenizer: Any, label: int, settings: ClassifierSettings):
        self.network, self.tokenizer, self.label, self.settings = network, tokenizer, label, settings
        self.limit = token_limit(tokenizer, network.config, settings.max_length)

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> Tensor:
        import torch

        texts, special = layout(self.tokenizer, prompts, completions, self.settings.reads)
        parts = []
        for start in range(0, len(texts), self.settings.batch_size):
            part = texts[start : start + self.settings.batch_size]
            device = self.network.device
            tokens = tokenize_batch(self.tokenizer, part, limit=self.limit, device=device, add_special_tokens=special)
            with torch.no_grad():
                parts.append(self._scores(self.network(**tokens).logits.float()))
        return torch.cat(parts)

    def _scores(self, logits: Tensor) -> Tensor:
        """(n,) of logits (n, number of labels)."""
        if self.settings.output == "logit":
            return logits[:, self.label]
        several = logits.shape[1] > 1 and self.network.config.problem_type != "multi_label_classification"
        return (logits.softmax(-1) if several else logits.sigmoid())[:, self.label]

    def to(self, device: str | torch.device) -> Classifier:
        self.network.to(device)
        return self


def layout(tokenizer: Any, prompts: list[Text], completions: list[Text], reads: str) -> tuple[list[Any], bool]:
    """What the tokenizer is given for each sample, and whether it has to add special tokens.

    ``joined`` messages go through the chat template, which writes the special tokens itself, if the tokenizer has one;
    without one a line break stands between prompt and completion. ``joined`` text is the completion behind the prompt.
    """
    if reads == "completion":
        return [text_of(completion) for completion in completions], True
    rows = list(zip(prompts, completions, strict=True))
    if reads == "pair":
        return [(text_of(prompt), text_of(completion)) for prompt, completion in rows], True
    if all(isinstance(text, str) for row in rows for text in row):
        return [f"{prompt}{completion}" for prompt, completion in rows], True
    if tokenizer.chat_template is None:
        return [f"{text_of(prompt)}\n{text_of(completion)}" for prompt, completion in rows], True
    chats: Any = [[*_messages(prompt, "user"), *_messages(completion, "assistant")] for prompt, completion in rows]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    for chat, text in zip(chats, texts, strict=True):
        if (lost := words_left_out(chat, text)) is not None:
            raise RewardError(
                f"the chat template of the classifier leaves the words of a message out ({lost!r:.80}): give one "
                "whose template writes them, or set reads to pair or completion"
            )
    return texts, False


def _number_or_name(label: Any) -> int | str | None:
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise ValueError("it must be the number or the name of a label")
    return label


class ClassifierSettings(TextNetworkSettings):
    """What a sequence classifier, such as a reward model, scores: the logit or probability of a label.

    "probability" is the sigmoid of the only logit (and of each, in a model of several labels at once), else the
    softmax. Input longer than ``max_length`` loses its beginning.
    """

    name: ClassVar[str] = "classifier"
    about: ClassVar[dict[str, Any]] = {
        "range": "unbounded (logit), 0 to 1 (probability)",
        "licence": "that of the model given",
    }

    model: NetworkName = Field(
        description="folder or Hub id for AutoModelForSequenceClassification, or a folder that PEFT saved over one; "
        "only safetensors are read"
    )
    base: NetworkName | None = Field(None, description="where an adapter's base is, if not where the adapter says")
    label: Annotated[int | str | None, PlainValidator(_number_or_name)] = Field(
        None, description="number or name of the label; may be left out where there is but one"
    )
    output: Literal["logit", "probability"] = Field("logit", description="what is returned of the label")
    reads: Literal["joined", "pair", "completion"] = Field(
        "joined",
        description="the conversation (messages by the chat template, text one behind the other), prompt and "
        "completion as an encoder's two segments, or the completion alone",
    )
    batch_size: int = Field(16, ge=1, le=MOST, description="samples per forward pass")

    @model_validator(mode="after")
    def _adapter_is_whole(self) -> Self:
        folder = Path(self.model).expanduser()
        adapter = (folder / ADAPTER_CONFIG).is_file()
        if self.base is not None and not adapter:
            raise RewardError(
                f"base='{self.base}' is for adapters, but model='{self.model}' is no folder with an {ADAPTER_CONFIG}: "
                "leave it out"
            )
        if adapter and not (folder / ADAPTER_WEIGHTS).is_file():
            raise RewardError(f"model='{self.model}' has no {ADAPTER_WEIGHTS}: save the adapter as safetensors")
        return self

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> Classifier:
        network, tokenizer = _load(self.model, self.base, self.dtype, device)
        return Classifier(network, tokenizer, _label_index(network.config, self.label, self.model), self)


def _load(model: str, base: str | None, dtype: str, device: str | torch.device) -> tuple[Any, Any]:
    """Network and tokenizer, one padding token between them."""
    folder = Path(model).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        network, base = _load_adapter(folder, base, dtype, device)
        tokenizer = load_tokenizer(model if (folder / "tokenizer_config.json").is_file() else base)
    else:
        network = load_network("AutoModelForSequenceClassification", model, dtype=dtype, device=device)
        tokenizer = load_tokenizer(model)
    config = network.config.get_text_config()
    if tokenizer.pad_token_id is None:
        padding = tokenizer.eos_token_id if config.pad_token_id is None else config.pad_token_id
        if padding is None:
            raise RewardError(f"the tokenizer of '{model}' has no padding token: set tokenizer.pad_token and save it")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    # Decoders are read at their last token that is no padding, which they tell by this number.
    config.pad_token_id = tokenizer.pad_token_id
    without_token_types(tokenizer, config)
    # Padding on the right, because positions are counted from the left; what is too long loses its oldest part.
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    return network, tokenizer


def _load_adapter(folder: Path, base: str | None, dtype: str, device: str | torch.device) -> tuple[Any, str]:
    """An adapter over its base, and the name of the base. The head is the adapter's, or the base's if it has none."""
    from safetensors import safe_open

    with foreign_code(f"'{folder}' does not hold an adapter (", ")"):
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118, not a dict
    note(folder)
    base = base or settings.get("base_model_name_or_path")
    if not base:
        raise RewardError(f"the adapter in '{folder}' does not name the model it was trained on: give its base")
    heads = {key: shape for key, shape in shapes.items() if ".lora_" not in key}
    # A head of several layers ends in the one with the fewest rows, one a label.
    labels = min((shape[0] for key, shape in heads.items() if key.endswith(".weight")), default=None)
    network = load_network(
        "AutoModelForSequenceClassification",
        base,
        dtype=dtype,
        device=device,
        may_lack=lambda key: any(name.endswith(f".{key}") for name in heads),
        **({} if labels is None else {"num_labels": labels}),
    )
    from diffusion_align.models.lora import load_peft

    with foreign_code(f"the adapter in '{folder}' does not fit '{base}' (", ")"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = load_peft(network, folder, torch_device=str(network.device))
    return adapted.eval().requires_grad_(False), base


def _label_index(config: Any, label: int | str | None, model: str) -> int:
    """The column of the logits that ``label`` names."""
    names = {int(number): str(name) for number, name in config.id2label.items()}
    if label is None and len(names) == 1:
        return 0
    if label in names:
        return int(label)
    by_name = [number for number, name in names.items() if name == label]
    if len(by_name) != 1:
        there_are = ", ".join(f"{number} ({name})" for number, name in names.items())
        raise RewardError(f"label={label!r} is no label of '{model}': choose one of {there_are}")
    return by_name[0]


def _messages(text: Text, role: str) -> list[Any]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)
