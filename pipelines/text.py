"""TextAlignmentPipeline: load a language model, align it, sample from it, save it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, cast, overload

import torch
from torch import Tensor

from diffusion_align.arguments import also_called, check_same_length
from diffusion_align.assets import LANGUAGE_MODELS
from diffusion_align.data.schemas import BadRow
from diffusion_align.data.sources import first_rows
from diffusion_align.data.text_encoding import Messages, Text, TextEncoder, checked_text, context_length, eos_token_ids
from diffusion_align.data.text_rows import PromptRow, TextDataConfig
from diffusion_align.errors import ConfigError, UserError, first_line, problems_of, short
from diffusion_align.inputs import check_device, check_path, default_device
from diffusion_align.llm.collection import WeightedRewards
from diffusion_align.llm.policy import LanguagePolicy, merged, save_model
from diffusion_align.llm.rollout import rollout
from diffusion_align.llm.settings import TextConfig
from diffusion_align.methods import method_name, method_of
from diffusion_align.models.language_models import (
    language_model_ref,
    load_language_model,
    load_tokenizer,
    use_attention,
)
from diffusion_align.models.lora import adapter_layers, carries_adapters, forget_adapters, merge_lora, remove_lora
from diffusion_align.models.memory import keep_activations
from diffusion_align.models.model_card import write_model_card
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.run import (
    LOADING,
    NOT_FROM_PIPE,
    NOT_LOADED,
    AlignmentPipeline,
    align_call,
    dtype_of,
    not_in_memory,
    not_uploaded,
    on_disk,
    run,
)
from diffusion_align.pipelines.text_context import bare_rows
from diffusion_align.rewards import build_text_reward
from diffusion_align.training.places import is_base_of_run
from diffusion_align.training.randomness import generator
from diffusion_align.training.trainer import Trainer
from diffusion_align.writing import new_folder, write_bytes, write_text

if TYPE_CHECKING:
    from diffusion_align.pipelines import settings as typed
    from diffusion_align.pipelines.compare import Comparison
    from diffusion_align.pipelines.pairs import PairsWritten


CALLING = {"prompt": "prompts", "text_inputs": "prompts", "inputs": "prompts"} | dict.fromkeys(
    ("max_tokens", "max_completion_length"), "max_new_tokens"
)
NOT_CALLED = {
    "do_sample": "a small temperature is nearly greedy",
    "num_return_sequences": "give a prompt once per completion",
    "generator": "give seed",
    "max_length": "give max_new_tokens, which does not count the prompt",
    "return_full_text": "what is returned has .texts, without the prompts",
} | dict.fromkeys(("top_k", "top_p"), "completions are sampled from the whole distribution, by temperature")
NOT_LOADED_HERE = NOT_LOADED | {
    "trust_remote_code": "models that need code of their own are not supported",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "quantized models are not supported"),
}


IN_MEMORY = "a model in memory"
"""What one is called that is in no folder."""


@dataclass(frozen=True)
class WrittenTexts:
    """What a call returns: one completion per prompt."""

    texts: list[str]


class TextAlignmentPipeline(AlignmentPipeline):
    """A causal language model that can be aligned with rewards or preferences.

    Example:
        >>> pipe = TextAlignmentPipeline.from_pretrained("tiny-lm")
        >>> pipe.align(method="grpo", reward="length", prompts=["And he said"], output_dir="runs/a", epochs=20)
        >>> pipe(["And he said"], seed=0).texts[0]

    Attributes:
        model: the transformers model; after ``align`` it holds the trained weights.
        tokenizer: its tokenizer.
        name: what the model is called in a configuration, None if it is in no folder; after ``align`` the run folder.
        run: the run folder whose result this is, None if it is of no run.
    """

    inside = "model"
    load_time = {"dtype": "dtype"}  # noqa: RUF012

    def __init__(self, model: Any, tokenizer: Any, *, name: str | None) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @property
    def _about(self) -> tuple[str | None, bool]:
        return self.name, carries_adapters(self.model)

    @classmethod
    @also_called(LOADING, NOT_LOADED_HERE)
    def from_pretrained(
        cls, model: str | Path, *, dtype: torch.dtype | str = torch.float32, device: str | torch.device | None = None
    ) -> TextAlignmentPipeline:
        """Load an embedded model ("tiny-lm", "smollm2"), a folder, a Hub id, or a run folder with its final weights.

        Args:
            model: what to load; adapters are merged into the weights.
            dtype: of the weights; torch's, or its name.
            device: where to put it; a GPU if there is one.

        Raises:
            UserError: the model cannot be loaded.
        """
        check_device(device, f"device={str(device)!r}")
        loaded, tokenizer = load_language_model(str(model), dtype=dtype_of(dtype))
        loaded.to(device or default_device())
        pipe = cls(loaded, tokenizer, name=str(model))
        pipe.run = language_model_ref(str(model)).run
        return pipe

    @classmethod
    @also_called({}, NOT_FROM_PIPE)
    def from_pipe(
        cls, pipeline: Any, tokenizer: Any = None, *, model: str | Path | None = None
    ) -> TextAlignmentPipeline:
        """Align a language model that is loaded already.

        Adapters that it carries, active and at their scales, are merged into a copy, which is sampled and aligned.
        Weights that are in no folder, such as these, are written to ``base/`` of the run folder, which ``config.yaml``
        then names. Weights changed in any other way are not noticed: save and load such a model first.

        Args:
            pipeline: a causal language model of transformers, one of peft, or a ``pipeline("text-generation")``.
            tokenizer: of the model; a pipeline has its own.
            model: the folder or Hub id that it was loaded from, which ``config.yaml`` and cards name; its own if not
                given.

        Raises:
            UserError: it is no such model, has no tokenizer, carries adapters that cannot be merged, or ``model`` is
                none.
        """
        inside = getattr(pipeline, "tokenizer", None)
        loaded = pipeline.model if inside is not None and hasattr(pipeline, "model") else pipeline
        tokenizer = tokenizer or inside
        config = getattr(loaded, "config", None)
        if not hasattr(loaded, "generate") or config is None or getattr(config, "is_encoder_decoder", False):
            raise UserError(f"a {type(loaded).__name__} is not supported: give a causal language model of transformers")
        if tokenizer is None:
            raise UserError("the model comes without a tokenizer: give it as well, as in from_pipe(model, tokenizer)")
        if not hasattr(tokenizer, "eos_token_id"):
            raise UserError(
                f"the tokenizer is a {type(tokenizer).__name__}: load it with AutoTokenizer.from_pretrained"
            )
        if getattr(loaded, "is_quantized", False):
            raise UserError("quantized models are not supported: load the model without quantization")
        if model is not None:
            language_model_ref(str(model))
        plain = _without_adapters(loaded)
        name = str(model or getattr(plain, "name_or_path", "")) if plain is loaded else ""
        return cls(plain, tokenizer, name=None if problems_of(language_model_ref, name) else name)

    @overload
    def align(
        self, method: typed.GRPO = ..., *, output_dir: str | Path, **settings: Unpack[typed.GRPOSettings]
    ) -> Self: ...

    @overload
    def align(self, method: typed.PPO, *, output_dir: str | Path, **settings: Unpack[typed.PPOSettings]) -> Self: ...

    @overload
    def align(self, method: typed.DPO, *, output_dir: str | Path, **settings: Unpack[typed.DPOSettings]) -> Self: ...

    @overload
    def align(self, method: typed.KTO, *, output_dir: str | Path, **settings: Unpack[typed.KTOSettings]) -> Self: ...

    @overload
    def align(self, method: type[Trainer[Any]], *, output_dir: str | Path, **settings: Any) -> Self: ...

    def align(self, method: str | type[Trainer[Any]] = "grpo", *, output_dir: str | Path, **settings: Any) -> Self:
        """Train towards rewards or preferences; afterwards this pipeline samples with the trained weights.

        Args:
            method: "grpo" or "ppo", which need ``prompts`` and a ``reward``; "dpo" or "kto", which need a ``dataset``
                or, to sample and judge their own, ``prompts`` and a ``reward``.
                A trainer of your own is its class, or where that is found, "module:Class" or "file.py:Class".
            output_dir: the run folder (see README for what it holds).
            **settings: fields of the method's configuration; the same names as in YAML. Among them

                - reward: a name, "module:function", a mapping with options, or a function
                  ``reward(prompts, completions, **columns) -> list of floats (or None)``; or a list of these;
                - prompts, dataset: a list, a generator, a ``datasets.Dataset``, a pandas DataFrame, a file or the id of
                  a dataset on the Hub, with TRL's columns; prompts may be a function that returns a prompt or (prompt,
                  columns), called ahead, see ``rows_of_calls``;
                - callbacks: ``Callback`` objects, called during the run, or where they are found, as in YAML.

        Returns:
            This pipeline, whose ``name`` is the run folder from now on.

        Raises:
            ConfigError: everything that is wrong with the settings, before anything is trained.
            RewardError, TrainingError, Interrupted: see ``Trainer.train``; the model is then as it was before.
        """
        method_of(method, "text")
        self._refuse_load_time(settings)
        folder = Path(output_dir).expanduser()
        # The adapter of its own run is merged already.
        if (self.name is None or self._made(folder)) and settings.get("resume") is True and folder.exists():
            raise not_in_memory(folder)
        # The model is here already: what has to be right about it is its name in the run's config.yaml.
        named = self.name or LANGUAGE_MODELS[0]
        raw: dict[str, Any] = {"method": method_name(method), "model": named, "output_dir": output_dir}
        if settings.get("lora", {}) is not None:  # float64 is in no setting
            raw["dtype"] = str(min(self.dtype, torch.float32, key=lambda one: one.itemsize)).removeprefix("torch.")
        config = cast(TextConfig, check_config(raw | settings))
        adapted = carries_adapters(self.model)
        model = copy.deepcopy(self.model) if config.lora is None else self.model
        attention = model.config._attn_implementation
        try:
            with on_disk(config, self.name, self._save_merged) as config:
                if self.name is None:
                    model.name_or_path = model.config.name_or_path = config.model
                trainer = run(config, model=model, tokenizer=self.tokenizer, started=align_call(config))
        except BaseException:
            if not adapted:
                remove_lora(self.model)
            raise
        finally:
            keep_activations(model)
            if config.attention != "auto":  # which would take it over into the next run
                use_attention(model, attention)
        trainer.optimization.load_ema_weights()
        self.model, self.name, self.run = merged(model), str(config.output_dir), config.output_dir
        # The next run is trained on this, and its adapter's configuration must name it.
        self.model.name_or_path = self.model.config.name_or_path = str(config.output_dir / "final")
        return self

    @also_called(CALLING, NOT_CALLED)
    def __call__(
        self,
        prompts: Text | Sequence[Text],
        *,
        seed: int = 0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        batch_size: int = 8,
    ) -> WrittenTexts:
        """Complete each prompt.

        Args:
            prompts: texts, or conversations (lists of messages) that go through the chat template; one or several.
            seed: completion i depends on its prompt, ``seed`` and i, whatever else is written.
            max_new_tokens: the maximum number of tokens per completion.
            temperature: above 0; small is nearly greedy.
            batch_size: completions written at once.

        Returns:
            An object whose ``.texts`` is a list of strings.
        """
        given = several(prompts)
        streams = [generator(seed, "write", i) for i in range(len(given))]
        return WrittenTexts(self._complete(given, streams, max_new_tokens, temperature, batch_size))

    def sample_each(
        self,
        prompts: Sequence[Text],
        seeds: Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        batch_size: int = 8,
    ) -> list[str]:
        """Completions, each from a seed of its own: the i-th is ``self(prompts[i], seed=seeds[i]).texts[0]``.

        Args:
            prompts: texts or conversations.
            seeds: one for each.
            max_new_tokens, temperature, batch_size: as for a call.
        """
        streams = [generator(seed, "write", 0) for seed in seeds]
        return self._complete(prompts, streams, max_new_tokens, temperature, batch_size)

    def _complete(
        self,
        prompts: Sequence[Text],
        streams: Sequence[torch.Generator],
        max_new_tokens: int,
        temperature: float,
        batch_size: int,
    ) -> list[str]:
        for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if number < 1:
                raise UserError(f"{name}={number} must be at least 1")
        if not temperature > 0:
            raise UserError(f"temperature={temperature} must be above 0")
        rows = _fitting_rows(prompts, self.tokenizer, context_length(self.model.config), max_new_tokens)
        policy = LanguagePolicy.for_sampling(self.model, self.tokenizer, temperature=temperature)
        texts: list[str] = []
        for some in torch.arange(len(rows)).split(batch_size) if rows else ():
            ids = [rows[i].ids for i in some.tolist()]
            written = rollout(policy, ids, [streams[i] for i in some.tolist()], max_new_tokens=max_new_tokens)
            texts += policy.decode(written.sequences)
        return texts

    def compare(
        self,
        other: str | Path | TextAlignmentPipeline,
        prompts: Sequence[Text],
        judge: Any,
        *,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
        per_prompt: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        output: str | Path | None = None,
    ) -> Comparison:
        """Complete the same prompts from the same random numbers by another model and by this one; a reward judges.

        Args:
            other: a pipeline, or what ``from_pretrained`` takes: A of the result, and this pipeline is B.
            prompts: texts or conversations.
            judge: a reward, as for ``align``.
            metadata: mappings, one for each prompt: the columns that the judge names.
            seed: of the first completion; the i-th of each uses ``seed + i``.
            per_prompt: completions per prompt.
            max_new_tokens: the maximum number of tokens per completion.
            temperature: of both models.
            output: .jsonl or .md file to write the pairs to, side by side.

        Returns:
            Mean scores, how often this pipeline wins with its 95 % interval, and the texts.
        """
        from diffusion_align.pipelines.compare import compare_texts

        return compare_texts(
            other,
            self,
            prompts,
            judge,
            metadata=metadata,
            seed=seed,
            output=None if output is None else Path(output).expanduser(),
            per_prompt=per_prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )

    def make_pairs(
        self,
        prompts: Sequence[Text],
        judge: Any,
        output: str | Path,
        *,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        per_prompt: int = 4,
        seed: int = 0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        resume: bool = False,
    ) -> PairsWritten:
        """Sample several completions per prompt and write the best and the worst of each as a row for ``dpo``.

        Args:
            prompts: texts or conversations.
            judge: a reward, as for ``align``.
            output: folder for ``pairs.jsonl``, which ``align(method="dpo", dataset=...)`` takes.
            metadata: mappings, one for each prompt: the columns that the judge names; they are kept in the rows.
            per_prompt: completions per prompt, at least 2.
            seed: of the first completion; the i-th uses ``seed + i``.
            max_new_tokens: the maximum number of tokens per completion.
            temperature: of sampling.
            resume: continue the pairs in ``output``, which must have been begun with the same settings.
        """
        from diffusion_align.pipelines.pairs import TextCandidates, make_pairs

        given = several(prompts)
        notes = [{} for _ in given] if metadata is None else metadata
        check_same_length(("prompts", given), ("metadata", notes))
        candidates = TextCandidates(self, max_new_tokens=max_new_tokens, temperature=temperature)
        rows = list(zip(given, map(dict, notes)))
        return make_pairs(candidates, rows, judge, output, per_prompt=per_prompt, seed=seed, resume=resume)

    def score(self, prompts: Sequence[Text], texts: Sequence[str], reward: Any, **columns: Sequence[Any]) -> Tensor:
        """Scores (B,) of completions by a reward, nan where it has nothing to say.

        A reward that names ``completion_ids`` gets the tokens that the texts have behind their prompts, each with an
        end; ``trainer_state`` is None.

        Args:
            prompts, texts: B of each.
            reward: as for ``align``.
            **columns: what else the reward needs, B values each.
        """
        return self.score_rows(prompts, texts, reward, columns)

    def score_rows(
        self, prompts: Sequence[Text], texts: Sequence[str], reward: Any, columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """``score`` with columns of any name, also that of an argument."""
        check_same_length(("prompts", prompts), ("texts", texts), *columns.items())
        rewards = WeightedRewards([build_text_reward(reward, device=self.model.device)], torch.ones(1))
        rows = [
            PromptRow(prompt, [], {name: values[i] for name, values in columns.items()})
            for i, prompt in enumerate(prompts)
        ]
        ids = self._answer_ids(prompts, texts) if rewards.want_ids else None
        return rewards.scores(rows, texts, ids).squeeze(1)

    def _answer_ids(self, prompts: Sequence[Text], texts: Sequence[str]) -> list[list[int]]:
        ends = eos_token_ids(self.tokenizer, getattr(self.model, "generation_config", None))
        encoder = TextEncoder(self.tokenizer, max_completion_length=1, ends=ends)
        try:
            return [
                encoder.answer_ids(checked_text(prompt, "the prompt"), text)
                for prompt, text in zip(prompts, texts, strict=True)
            ]
        except BadRow as problem:
            raise UserError(f"{problem}") from None

    def _save_merged(self, folder: Path) -> None:
        save_model(self.model, self.tokenizer, folder)

    def _save_adapter(self, folder: Path) -> None:
        """The adapter of the run, which names its base as others know it."""
        ref = None if self.run is None or self.name is None else language_model_ref(self.name)
        if ref is None or not ref.adapters:
            raise not_uploaded("there is no adapter to upload")
        if len(ref.adapters) > 1 or is_base_of_run(ref.base):
            raise not_uploaded(f"the adapter's base model {ref.below} is not on the Hub")
        with new_folder(folder) as temporary:
            for file in filter(Path.is_file, Path(ref.adapters[0]).iterdir()):
                write_bytes(temporary / file.name, file.read_bytes())
            settings = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
            base = Path(ref.origin)
            settings["base_model_name_or_path"] = base.name if base.is_absolute() else ref.origin
            write_text(temporary / "adapter_config.json", json.dumps(settings, indent=2))

    def _write_card(self, target: Path, *, location: str, merged: bool) -> None:
        if self.run is not None and self.name is not None:
            weights = "best" if Path(self.name).expanduser() == self.run / "best" else "final"
            write_model_card(self.run, target, kind="text", weights=weights, location=location, merged=merged)


def _without_adapters(model: Any) -> Any:
    """``model`` itself, or a copy of what is under peft's layers with what they compute in its weights."""
    layers = adapter_layers(model)
    if not layers and not hasattr(model, "get_base_model"):
        return model
    try:
        plain = copy.deepcopy(model)
        if not layers:
            raise ValueError("they are learned prompts")
        if not hasattr(plain, "merge_and_unload"):
            merge_lora(plain)
        else:
            off = any(getattr(layer, "disable_adapters", False) for layer in layers)
            plain = plain.unload() if off else plain.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises whatever an adapter of its many kinds cannot do
        raise UserError(
            f"the model's adapters cannot be merged into its weights ({first_line(error)}): give a model without them"
        ) from error
    forget_adapters(plain)  # peft's settings stay on it
    return plain


def _fitting_rows(prompts: Sequence[Text], tokenizer: Any, context: int | None, max_new_tokens: int) -> list[PromptRow]:
    """The rows of prompts behind which there is room for a completion."""
    encoder = TextEncoder(tokenizer, max_completion_length=max_new_tokens)
    rows = bare_rows(prompts, encoder, name="prompts")
    longest = max((len(row.ids) for row in rows), default=0)
    if rows and context is not None and longest + max_new_tokens > context:
        raise UserError(
            f"max_new_tokens={max_new_tokens} does not fit behind a prompt of {longest} tokens in the model's "
            f"context of {context}: make one of them shorter"
        )
    return rows


def check_completions(model: str, prompts: Sequence[Text], max_new_tokens: int) -> None:
    """What can be seen of ``TextAlignmentPipeline.from_pretrained(model)(prompts, ...)`` before weights are read.

    Raises:
        UserError: there is no such language model, or its context or chat template does not take the prompts.
    """
    language_model_ref(model)
    _fitting_rows(prompts, *load_tokenizer(model), max_new_tokens)


def read_prompts(source: str) -> list[tuple[Text, dict[str, Any]]]:
    """The prompts of a file, a shipped list or a dataset, with the other columns of their rows.

    Raises:
        ConfigError: there is nothing of that name, or it holds no prompts.
    """
    check_path(source, f"prompts.source={short(source)}", error=ConfigError)
    table, _ = TextDataConfig(source=source).opened("prompts", "prompts")
    rows = first_rows(table, None)
    return [(row["prompt"], {name: value for name, value in row.items() if name != "prompt"}) for row in rows]


def several(prompts: Text | Sequence[Text]) -> list[Text]:
    """A list of prompts, also of one alone: a text, or a conversation, whose items are messages."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    return [cast(Messages, items)] if items and all(isinstance(item, Mapping) for item in items) else items
