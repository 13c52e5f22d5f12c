"""A language policy: a causal language model with LoRA (or full) training, a temperature and a reference.

Nothing here knows an algorithm. ``Sequences`` are prompts with completions, right-padded for scoring; only positions
from the first completion on go through the model's head.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.data.text_encoding import context_length, eos_token_ids
from diffusion_align.errors import UserError
from diffusion_align.estimators import (
    categorical_entropy,
    linear_log_probs_and_entropy,
    linear_token_log_probs,
    token_log_probs,
)
from diffusion_align.estimators.masked import at_least_float32
from diffusion_align.llm.settings import SLICED_FROM, Logits, LoRAConfig, Sampling
from diffusion_align.models.dropout import set_dropout
from diffusion_align.models.lora import (
    adapter_layers,
    add_lora,
    carries_adapters,
    merge_lora,
    save_peft,
    switched_off,
)
from diffusion_align.models.memory import checkpoint_activations
from diffusion_align.writing import new_folder

IGNORED = -100
# Models without a key-value cache, or whose state sees the padding. What is not known here is found by the first pass's
# deviation of the ratio from 1.
_WITHOUT_CACHE = {"mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm", "openai-gpt"}
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_CHUNK = 8192  # entries of the vocabulary that are float32 at a time
_SLICE = 2048  # entries of the vocabulary that have logits at a time, where these are sliced


@dataclass(frozen=True)
class Sequences:
    """B prompts with completions of at most T tokens, right-padded to L; int64, on one device.

    Attributes:
        ids: (B, L), prompt, completion, padding.
        starts: (B,), the length of each prompt, at least 1.
        mask: (B, T) bool, True for completion tokens that count: up to and with the first end of sequence.
    """

    ids: Tensor
    starts: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def attention_mask(self) -> Tensor:
        """(B, L) int64: 1 for the tokens of prompt and completion."""
        ends = self.starts + self.mask.sum(1)
        return (torch.arange(self.ids.shape[1], device=self.ids.device) < ends[:, None]).long()

    @property
    def completions(self) -> Tensor:
        """(B, T) int64, padding where ``mask`` is False."""
        return self.ids.gather(1, self.places.clamp(max=self.ids.shape[1] - 1))

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each completion as sampled, up to and with the first end."""
        rows = zip(self.completions.tolist(), self.mask.sum(1).tolist(), strict=True)
        return [ids[:length] for ids, length in rows]

    @property
    def places(self) -> Tensor:
        """(B, T) int64, where in ``ids`` each completion token stands; beyond its end where the row is shorter."""
        return self.starts[:, None] + torch.arange(self.mask.shape[1], device=self.ids.device)

    def __getitem__(self, rows: Tensor) -> Sequences:
        """Some of them, cut to the longest that is left."""
        ids, starts, mask = self.ids[rows], self.starts[rows], self.mask[rows]
        longest = int(mask.sum(1).max()) if len(mask) else 0
        length = int((starts + mask.sum(1)).max()) if len(mask) else 0
        return Sequences(ids[:, :length], starts, mask[:, : max(longest, 1)])


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad: int,
    device: torch.device | str = "cpu",
) -> Sequences:
    """``Sequences`` of token lists; every token of a completion counts.

    Raises:
        ValueError: an empty prompt, or numbers of prompts and completions that differ.
    """
    if len(prompts) != len(completions) or not all(len(p) for p in prompts):
        raise ValueError(
            f"{len(prompts)} prompts and {len(completions)} completions: give as many, and no empty prompt"
        )
    rows = [torch.tensor([*p, *c], dtype=torch.int64) for p, c in zip(prompts, completions, strict=True)]
    lengths = torch.tensor([len(c) for c in completions])
    mask = torch.arange(max(int(lengths.max()), 1)) < lengths[:, None]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return Sequences(ids.to(device), torch.tensor([len(p) for p in prompts], device=device), mask.to(device))


def concatenate(parts: Sequence[Sequences], *, pad: int) -> Sequences:
    """All rows of ``parts``, padded to the longest."""
    length, width = (max(getattr(part, name).shape[1] for part in parts) for name in ("ids", "mask"))
    return Sequences(
        torch.cat([pad_to(part.ids, length, pad) for part in parts]),
        torch.cat([part.starts for part in parts]),
        torch.cat([pad_to(part.mask, width, False) for part in parts]),
    )


def pad_to(x: Tensor, width: int, value: float) -> Tensor:
    """``x`` (B, T) with columns of ``value`` up to ``width``."""
    return nn.functional.pad(x, (0, width - x.shape[1]), value=value)


def widest_float(device: torch.device) -> torch.dtype:
    """float64; Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Scored:
    """What one forward pass says about the completions of ``Sequences``.

    Attributes:
        logits: (B, K, V) at temperature 1, of the K positions before which the first completion has begun; where they
            are sliced, (B, K, 0).
        labels: (B, K), the token that followed, -100 where none counts.
        places: (B, T), the position of every completion token among the K.
        mask: (B, T) bool, which of them count.
        hidden: (B, K, D), the last hidden states, if requested.
        label_logp: (B, K), log-probs of the labels, where the logits are sliced.
        entropy: (B, K), where they are, if requested.
    """

    logits: Tensor
    labels: Tensor
    places: Tensor
    mask: Tensor
    hidden: Tensor | None = None
    label_logp: Tensor | None = None
    entropy: Tensor | None = None

    def of_tokens(self, values: Tensor) -> Tensor:
        """(B, T) of values (B, K), 0 where the mask is False."""
        return torch.where(self.mask, values.gather(1, self.places), 0.0)


class LanguagePolicy:
    """pi(token | prompt, tokens before it) of a Hugging Face causal language model.

    Args:
        model: an ``AutoModelForCausalLM``; dropout is off in training as well, so that the ratio starts at 1.
        tokenizer: its tokenizer; where it has no padding token the end of sequence pads, and masks tell them apart.
        lora: adapters to train; None trains the whole model and, for the reference, keeps a frozen copy.
        temperature: of sampling and of every log-prob alike.
        needs_reference: False saves the copy where no reference is used.
        reference: another model with the same tokens to be the reference, instead of ``model`` as it is now.
        autocast: context in which the network runs; log-probs stay float32.
        gradient_checkpointing: see ``checkpoint_activations``.
        logits: "whole": of all scored positions at once. "sliced": log-probs and entropies from slices of the
            vocabulary; the logits are never there as a whole. "auto": sliced where the vocabulary has ``SLICED_FROM``
            tokens or more and the model has a ``plain_head``.
        sampling: "fast" lets ``rollout`` round differently, see there.

    Raises:
        UserError: a tokenizer without an end of sequence, adapters that are there already, other vocabularies, or
            ``logits="sliced"`` of a model without a plain head.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        lora: LoRAConfig | None,
        temperature: float = 1.0,
        needs_reference: bool = True,
        reference: Any = None,
        device: torch.device | str = "cpu",
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        gradient_checkpointing: bool = False,
        logits: Logits = "auto",
        sampling: Sampling = "plain",
    ) -> None:
        self.pad = padding_token(model, tokenizer)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind == "recurrent_gemma" and importlib.metadata.version("transformers").startswith("4."):
            raise UserError(
                "transformers 4 keeps the states of RecurrentGemma's last batch: install transformers 5 or newer"
            )
        if reference is not None and _vocabulary(reference) != _vocabulary(model):
            raise UserError(
                f"the reference has a vocabulary of {_vocabulary(reference)} tokens and the model one of "
                f"{_vocabulary(model)}: use a reference with the model's own tokens"
            )
        self.model, self.tokenizer, self.lora = model.to(device), tokenizer, lora
        self.device, self.temperature, self.autocast = torch.device(device), temperature, autocast
        self.sampling = sampling
        self.eos = int(tokenizer.eos_token_id)
        ends = eos_token_ids(tokenizer, getattr(model, "generation_config", None))
        self.ends = torch.tensor(ends, device=self.device)
        model.requires_grad_(False).eval()
        if lora is None:
            model.requires_grad_(True)
        else:
            add_lora(model, peft_config(lora, model, task_type="CAUSAL_LM"))
            model.eval()  # the new layers as well
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)
            parameter.data = at_least_float32(parameter.data)
        self._adapter_layers = adapter_layers(model)
        self.dropout = set_dropout(model, lora)
        self._frozen: nn.Module | None = None
        if reference is not None:
            self._frozen = reference.to(device).requires_grad_(False).eval()
        elif lora is None and needs_reference:
            self._frozen = copy.deepcopy(model).requires_grad_(False)
        if gradient_checkpointing:
            checkpoint_activations(model)
        self._heads: dict[int, nn.Linear] = {}  # of models whose logits are sliced, by id
        if logits == "sliced" or (logits == "auto" and _vocabulary(model) >= SLICED_FROM):
            for one in filter(None, (self.model, self._frozen)):
                if (head := plain_head(one)) is not None:
                    self._heads[id(one)] = head
                elif logits == "sliced":
                    raise UserError(
                        f"{type(one).__name__} makes more of its logits than a linear layer gives, so they cannot be "
                        "sliced: use logits=auto or logits=whole"
                    )

    @classmethod
    def for_sampling(cls, model: Any, tokenizer: Any, *, temperature: float) -> LanguagePolicy:
        """A policy of ``model`` where it is, without a reference; only to be sampled from."""
        settings: dict[str, Any] = {"lora": None, "needs_reference": False, "logits": "whole"}
        policy = cls(model, tokenizer, temperature=temperature, device=model.device, **settings)
        model.requires_grad_(False)
        return policy

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is trained: the adapters, or the whole model."""
        return {n: p for n, p in self.model.named_parameters() if self.lora is None or ".lora_" in n}

    @property
    def keeps_cache(self) -> bool:
        """Whether a left-padded batch with a cache gives what each row alone gives; recurrent states mix padding in."""
        return self.model.config.get_text_config().model_type not in _WITHOUT_CACHE

    @property
    def hidden_size(self) -> int:
        """D of ``Scored.hidden``."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def has_reference(self) -> bool:
        """Whether ``reference`` can be entered."""
        return self.lora is not None or self._frozen is not None

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and completion together, where the model's configuration says."""
        return context_length(self.model.config)

    def score(
        self,
        sequences: Sequences,
        *,
        with_hidden: bool = False,
        with_entropy: bool = False,
        with_logits: bool = False,
    ) -> Scored:
        """One forward pass over prompts and completions; the head sees no position before the first completion.

        Args:
            with_hidden: keep the last hidden states.
            with_entropy: ``entropy`` will be called; whole logits always have one.
            with_logits: the logits themselves are needed, so they are not sliced.
        """
        first, labels, places = self._positions(sequences)
        positions = torch.arange(first, sequences.ids.shape[1] - 1, device=self.device)
        kept = {"logits_to_keep": positions} if "logits_to_keep" in inputs_of(self.model) else {}
        head = None if with_logits else self._heads.get(id(self.model))
        with self.autocast(), _left_out(head) as given:
            output = self.model(
                input_ids=sequences.ids,
                attention_mask=sequences.attention_mask,
                use_cache=False,
                output_hidden_states=with_hidden,
                **kept,
            )
        hidden = output.hidden_states[-1][:, positions] if with_hidden else None
        found = output.logits if head is None else given[0]
        found = found if kept else found[:, first:-1]
        if head is None:
            return Scored(found, labels, places, sequences.mask, hidden)
        settings: dict[str, Any] = {"bias": head.bias, "temperature": self.temperature, "chunk_size": _SLICE}
        entropy = None
        with self.autocast():
            if with_entropy:
                logp, entropy = linear_log_probs_and_entropy(found, head.weight, labels, **settings)
            else:
                logp = linear_token_log_probs(found, head.weight, labels, **settings)
        return Scored(found[..., :0], labels, places, sequences.mask, hidden, logp, entropy)

    def _positions(self, sequences: Sequences) -> tuple[int, Tensor, Tensor]:
        """The first position to look at, and ``labels`` and ``places`` of ``Scored``."""
        first = int(sequences.starts.min()) - 1
        count = sequences.ids.shape[1] - 1 - first
        places = sequences.places - 1 - first
        labels = torch.full((len(sequences), count), IGNORED, device=self.device)
        rows = torch.arange(len(sequences), device=self.device)[:, None].expand_as(places)
        counted = sequences.mask
        labels[rows[counted], places[counted]] = sequences.completions[counted]
        return first, labels, places.clamp(max=count - 1)

    def log_probs(self, scored: Scored) -> Tensor:
        """Log-probs (B, T) in nats at the policy's temperature, float32, 0 where the mask is False."""
        logp = scored.label_logp
        return scored.of_tokens(self.label_log_probs(scored.logits, scored.labels) if logp is None else logp)

    @torch.no_grad()
    def entropy(self, scored: Scored) -> Tensor:
        """Entropies (B, T) in nats of what each token was chosen from, 0 where the mask is False; without a gradient.

        Raises:
            ValueError: the logits are sliced, and ``score`` was called without ``with_entropy``.
        """
        if scored.label_logp is None:  # one sample at a time: there are four numbers for each entry of the vocabulary
            every = [categorical_entropy(logits, temperature=self.temperature) for logits in scored.logits]
            return scored.of_tokens(torch.stack(every))
        if scored.entropy is None:
            raise ValueError("these logits were sliced: the entropy needs score(..., with_entropy=True)")
        return scored.of_tokens(scored.entropy)

    def label_log_probs(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Log-probs (B, T) of tokens ``labels`` under ``logits`` (B, T, V), by sampling and by replay alike."""
        return token_log_probs(logits, labels, temperature=self.temperature, chunk_size=_CHUNK)

    def hidden(self, sequences: Sequences) -> Scored:
        """As ``score`` with ``with_hidden``, without logits: the head does not run."""
        first, labels, places = self._positions(sequences)
        with self.autocast():
            states = self.model.base_model(
                input_ids=sequences.ids, attention_mask=sequences.attention_mask, use_cache=False
            ).last_hidden_state[:, first : sequences.ids.shape[1] - 1]
        return Scored(states[..., :0], labels, places, sequences.mask, states)

    def decode(self, sequences: Sequences) -> list[str]:
        """The text of each completion, without special tokens."""
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences.tokens]

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, ``score`` is the reference policy: the other model, the frozen copy, or the adapter switched off."""
        trained = self.model
        if self._frozen is None and self.lora is None:
            raise ValueError("this policy was made without a reference: needs_reference=True keeps one")
        with switched_off([] if self._frozen is not None else self._adapter_layers):
            self.model = trained if self._frozen is None else self._frozen
            try:
                yield
            finally:
                self.model = trained

    def save(self, folder: Path) -> None:
        """Write adapter or model, and the tokenizer, for plain transformers (with peft)."""
        save_model(self.model, self.tokenizer, folder)


def padding_token(model: Any, tokenizer: Any) -> int:
    """The padding token for training a model: the end of sequence where the tokenizer has none.

    Raises:
        UserError: a tokenizer without an end of sequence, or adapters that are there already.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token and save it again")
    if carries_adapters(model):
        raise UserError("the model carries adapters already: merge or unload them before training")
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model, or its adapter, and its tokenizer, for plain transformers (with peft)."""
    with new_folder(folder) as temporary:
        with _settings_that_are_written(model, temporary):
            if carries_adapters(model):
                save_peft(model, temporary)
                if model.can_generate():
                    model.generation_config.save_pretrained(str(temporary))
            else:
                model.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))


@contextlib.contextmanager
def _settings_that_are_written(model: Any, folder: Path) -> Iterator[None]:
    """Settings of generation that transformers reads, trains and samples with are written as well, as they are.

    Many a published model has a temperature and no ``do_sample``, which transformers then refuses to save.
    """
    settings: Any = getattr(model, "generation_config", None)
    refused = False
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError:
        refused = True
    if not refused:
        yield
        return
    model.generation_config = type(settings)()
    try:
        yield
    finally:
        model.generation_config = settings
    if model.can_generate():
        settings.to_json_file(str(folder / "generation_config.json"))


@torch.no_grad()
def plain_head(model: Any) -> nn.Linear | None:
    """The output layer, if a model's logits are what this linear layer makes of its input, and nothing more.

    None with an adapter or a hook on it, or where the model scales, caps or cuts its logits. That is found by a pass of
    two tokens in which the layer is left out: what stands in for its output must come back untouched.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return None
    if head._forward_hooks or head._forward_pre_hooks:
        return None
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
    try:
        with _left_out(head) as given:
            output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except Exception:  # it looks at its logits
        return None
    stand_in = given[-1] if given else None
    return head if stand_in is not None and output.logits is stand_in and stand_in._version == 0 else None


@contextlib.contextmanager
def _left_out(head: nn.Linear | None) -> Iterator[list[Tensor]]:
    """Inside, ``head`` gives a number per position; the list holds its last input, and what it gave."""
    given: list[Tensor] = []
    if head is None:
        yield given
        return

    def forward(features: Tensor) -> Tensor:
        given[:] = features, features.new_zeros((*features.shape[:-1], 1), dtype=torch.float32)
        return given[1]

    vars(head)["forward"] = forward
    try:
        yield given
    finally:
        del vars(head)["forward"]


def merged(model: Any) -> Any:
    """``model`` with its LoRA adapters added to the weights and no adapter layers left."""
    merge_lora(model)
    return model


def inputs_of(model: Any) -> frozenset[str]:
    """Names of what its forward pass takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _called_otherwise(model: Any) -> list[str]:
    """Names of linear layers that an adapter cannot stand in for, as their model does not just call them.

    A router that returns more than a product (Llama 4), and what Mamba blocks take the bare weight of: the step size's
    layer, whose adapter would get no gradient, and in some the output's, which peft refuses in models of these types.
    """
    bare = {"out_proj", "dt_proj"} if model.config.model_type in _MAMBA else {"dt_proj"}
    found = set()
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and (name in bare or _returns_more(module)):
            found.add(name)
    return sorted(found)


@torch.no_grad()
def _returns_more(layer: nn.Linear) -> bool:
    """Whether a layer whose class has a forward pass of its own gives something else than a linear layer does.

    Falcon's layers are written anew and give the same.
    """
    kind = type(layer)
    if kind.forward is nn.Linear.forward or not kind.__module__.startswith("transformers.models."):
        return False
    one = torch.zeros_like(layer.weight[:1])
    one[0, 0] = 1.0  # a product of one term: no order of summation
    expected = nn.functional.linear(one, layer.weight, layer.bias)
    try:
        found = layer(one)
    except Exception:  # it takes something else, too
        return True
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return not same or not torch.allclose(found, expected, rtol=0.01)


def peft_config(lora: LoRAConfig, model: Any, *, task_type: str, also_trained: Sequence[str] = ()) -> Any:
    """peft's settings for adapters on ``model``; the modules ``also_trained`` are trained whole and saved with them."""
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as ATTENTION
    from transformers.pytorch_utils import Conv1D

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        # peft looks them up by itself, but not in models of experts, whose settings it rewrites first.
        target_modules="all-linear" if lora.layers == "all-linear" else ATTENTION.get(model.config.model_type),
        exclude_modules=_called_otherwise(model) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's transposed weights
        task_type=task_type,
        base_model_name_or_path=model.name_or_path,
        modules_to_save=list(also_trained) or None,
    )
