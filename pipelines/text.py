"""TextAlignmentPipeline: load a language model, align it, write with it, save it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from diffusion_align.data.schemas import BadRow
from diffusion_align.data.sources import first_rows, is_hub
from diffusion_align.data.text_encoding import (
    Messages,
    Text,
    TextEncoder,
    checked_text,
    context_length,
    ends_of,
)
from diffusion_align.data.text_rows import (
    LabelledRow,
    PreferenceRow,
    PromptRow,
    Rows,
    TextDataConfig,
    labelled_rows,
    preference_rows,
    prompt_rows,
)
from diffusion_align.devices import device_problem
from diffusion_align.errors import ConfigError, UserError, short
from diffusion_align.llm.collection import WeightedRewards, trainer_state
from diffusion_align.llm.dpo import DPOConfig, DPOTrainer
from diffusion_align.llm.grpo import GRPOConfig, GRPOTrainer
from diffusion_align.llm.kto import KTOConfig, KTOTrainer
from diffusion_align.llm.policy import LanguagePolicy, merged, save_model
from diffusion_align.llm.ppo import PPOConfig, PPOTrainer
from diffusion_align.llm.reward_model import RewardModel, RewardModelConfig, RewardModelTrainer
from diffusion_align.llm.rollout import rollout
from diffusion_align.methods import method_of
from diffusion_align.models.language_models import (
    language_model_problem,
    load_ends,
    load_language_model,
    load_sequence_classifier,
    load_tokenizer,
    model_places,
)
from diffusion_align.models.lora import carries_adapters, remove_lora
from diffusion_align.paths import path_problem
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.identity import text_identity
from diffusion_align.rewards.places import recorded
from diffusion_align.rewards.text import build_text_reward, check_text_reward
from diffusion_align.training.accelerator import agreed, best_seconds, processes, start
from diffusion_align.training.randomness import generator
from diffusion_align.writing import output_folder

MOST_CHECKED = 10_000

PolicyConfig = GRPOConfig | PPOConfig | DPOConfig | KTOConfig
TextMethodConfig = PolicyConfig | RewardModelConfig
TextMethodTrainer = GRPOTrainer | PPOTrainer | DPOTrainer | KTOTrainer | RewardModelTrainer


@dataclass(frozen=True)
class WrittenTexts:
    """What a call returns: one completion a prompt."""

    texts: list[str]


class TextAlignmentPipeline:
    """A causal language model that can be aligned with rewards or preferences.

    Example:
        >>> pipe = TextAlignmentPipeline.from_pretrained("tiny-lm")
        >>> pipe.align(method="grpo", reward="length", prompts=["And he said"], output_dir="runs/a", epochs=20)
        >>> pipe(["And he said"], seed=0).texts[0]

    Attributes:
        model: the transformers model; after ``align`` it holds the trained weights.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
    ) -> TextAlignmentPipeline:
        """Load an embedded model ("tiny-lm", "smollm2"), a folder, a hub id, or a run folder with its final weights.

        Args:
            model: what to load; adapters are merged into the weights.
            dtype: of the weights.
            device: where to put it; a GPU if there is one.

        Raises:
            UserError: the model cannot be loaded.
        """
        if problem := device_problem(device):
            raise UserError(f"device={str(device)!r} {problem}")
        loaded, tokenizer = load_language_model(str(model), dtype=dtype)
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(loaded, tokenizer, name=str(model))

    def align(self, method: str = "grpo", *, output_dir: str | Path, **settings: Any) -> TextAlignmentPipeline:
        """Train towards rewards or preferences; afterwards this pipeline writes with the trained weights.

        Args:
            method: "grpo" or "ppo", which need ``prompts`` and a ``reward``; "dpo" or "kto", which need a ``dataset``
                or, to sample and judge their own, ``prompts`` and a ``reward``.
            output_dir: the run folder (see README for what it holds).
            **settings: fields of the method's configuration; the same names as in YAML. Among them

                - reward: a name, "module:function", a mapping with options, or a function
                  ``reward(prompts, completions, **columns) -> list of floats (or None)``; or a list of these;
                - prompts, dataset: a list, a generator, a ``datasets.Dataset``, a pandas DataFrame, a file or the id of
                  a data set on the hub, with TRL's columns.

        Returns:
            This pipeline, whose ``name`` is the run folder from now on.

        Raises:
            ConfigError: everything that is wrong with the settings, before anything is trained.
            RewardError, TrainingError, Interrupted: see ``Trainer.train``; the model is then as it was before.
        """
        method_of(method, "text")
        if "model" in settings:
            raise UserError(f"model={settings['model']!r} is not this pipeline's: load it with from_pretrained")
        if "dtype" in settings:
            raise UserError(f"dtype={settings['dtype']!r} is for loading a model: give it to from_pretrained")
        raw = {"method": method, "model": self.name, "output_dir": output_dir}
        config = cast(PolicyConfig, check_config(raw | settings))
        adapted = carries_adapters(self.model)
        model = copy.deepcopy(self.model) if config.lora is None else self.model
        try:
            trainer = run(config, model=model, tokenizer=self.tokenizer)
        except BaseException:
            if not adapted:
                remove_lora(self.model)
            raise
        trainer.optimization.load_ema_weights()
        self.model, self.name = merged(model), str(config.output_dir)
        # What is trained next is trained on this, and its adapter's configuration has to say so.
        self.model.name_or_path = self.model.config.name_or_path = str(config.output_dir / "final")
        return self

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
            max_new_tokens: the most tokens of a completion.
            temperature: above 0; small is nearly greedy.
            batch_size: completions written at once.

        Returns:
            An object whose ``.texts`` is a list of strings.
        """
        if max_new_tokens < 1 or not temperature > 0 or batch_size < 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens}, temperature={temperature}, batch_size={batch_size}: the first and "
                "the last must be at least 1, the temperature above 0"
            )
        rows = _fitting_rows(_several(prompts), self.tokenizer, context_length(self.model.config), max_new_tokens)
        policy = LanguagePolicy.for_sampling(self.model, self.tokenizer, temperature=temperature)
        texts: list[str] = []
        for begin in range(0, len(rows), batch_size):
            some = rows[begin : begin + batch_size]
            streams = [generator(seed, "write", begin + i) for i in range(len(some))]
            written = rollout(policy, [row.ids for row in some], streams, max_new_tokens=max_new_tokens)
            texts += policy.decode(written.sequences)
        return WrittenTexts(texts)

    def score(self, prompts: Sequence[Text], texts: Sequence[str], reward: Any, **columns: Sequence[Any]) -> Tensor:
        """Scores (B,) of completions by a reward, nan where it has nothing to say.

        A reward that names ``completion_ids`` gets the tokens that the texts have behind their prompts, each with an
        end; ``trainer_state`` is None.

        Args:
            prompts, texts: B of each.
            reward: as for ``align``.
            **columns: what else the reward needs, B values each.
        """
        lengths = {"texts": len(texts)} | {name: len(values) for name, values in columns.items()}
        wrong = [f"{length} {name}" for name, length in lengths.items() if length != len(prompts)]
        if isinstance(prompts, str) or isinstance(texts, str) or wrong:
            given = ", ".join(wrong) or "a single text"
            raise UserError(f"{len(prompts)} prompts and {given}: give lists of one length")
        rewards = WeightedRewards([build_text_reward(reward, device=self.model.device)], torch.ones(1))
        rows = [
            PromptRow(prompt, [], {name: values[i] for name, values in columns.items()})
            for i, prompt in enumerate(prompts)
        ]
        ids = self._answer_ids(prompts, texts) if rewards.want_ids else None
        return rewards.scores(rows, texts, ids).squeeze(1)

    def _answer_ids(self, prompts: Sequence[Text], texts: Sequence[str]) -> list[list[int]]:
        ends = ends_of(self.tokenizer, getattr(self.model, "generation_config", None))
        encoder = TextEncoder(self.tokenizer, max_completion_length=1, ends=ends)
        try:
            return [
                encoder.answer_ids(checked_text(prompt, "the prompt"), text)
                for prompt, text in zip(prompts, texts, strict=True)
            ]
        except BadRow as problem:
            raise UserError(f"{problem}") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole model, adapters merged, and its tokenizer, for plain transformers.

        Args:
            folder: made if it is not there.

        Raises:
            UserError: it is a file.
        """
        save_model(self.model, self.tokenizer, output_folder(folder))


def run(config: TextMethodConfig, *, model: Any = None, tokenizer: Any = None) -> TextMethodTrainer:
    """Train as ``config`` says and return the finished trainer.

    Args:
        config: checked settings, from ``read_config`` or ``check_config``.
        model, tokenizer: loaded ones; ``config.model`` is loaded when not given.

    Raises:
        ConfigError, UserError: data or models that do not fit, in one sentence each.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return _run_reward_model(config) if isinstance(config, RewardModelConfig) else _run(config, model, tokenizer)


def _run(config: PolicyConfig, model: Any, tokenizer: Any) -> TextMethodTrainer:
    def data() -> tuple[TextEncoder, list[PromptRow], list[Any], list[PromptRow] | None]:
        if tokenizer is None:
            read = _Reader.of(config)
        else:
            ends = ends_of(tokenizer, getattr(model, "generation_config", None))
            read = _Reader(config, tokenizer, context_length(model.config), ends)
        prompts, dataset = read("prompts"), read("dataset")
        return read.encoder, prompts, dataset, read.shown(prompts)

    encoder, prompts, dataset, shown = agreed(data)  # before any weights are loaded
    tokenizer = encoder.tokenizer
    with recorded() as places:
        rewards = _rewards(config, prompts or dataset, encoder, processes().device)
    if config.reference_model is not None:
        _check_same_tokens(config, tokenizer)
    dtype = getattr(torch, config.dtype)
    if model is None:
        model, _ = load_language_model(config.model, dtype=dtype)
    reference = None
    if config.reference_model is not None:
        reference, _ = load_language_model(config.reference_model, dtype=dtype)
    config, accelerator = start(config, lambda narrow: _seconds_a_pass(model, narrow))
    policy = LanguagePolicy(
        model,
        tokenizer,
        lora=config.lora,
        temperature=config.temperature,
        needs_reference=config.needs_reference,
        reference=reference,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )
    common: dict[str, Any] = {"rewards": rewards, "shown": shown, "accelerator": accelerator}
    trainer: TextMethodTrainer
    match config:
        case GRPOConfig():
            trainer = GRPOTrainer(config, policy, prompts, **common)
        case PPOConfig():
            trainer = PPOTrainer(config, policy, prompts, **common)
        case DPOConfig():
            trainer = DPOTrainer(config, policy, rows=dataset or None, prompts=prompts or None, **common)
        case _:
            trainer = KTOTrainer(config, policy, rows=dataset or None, prompts=prompts or None, **common)
    trainer.identity = text_identity(config, {"prompts": prompts, "dataset": dataset}, places)
    trainer.train()
    return trainer


class _Reader:
    """Reads the data of a run, and says on the main process what was shortened."""

    def __init__(self, config: Any, tokenizer: Any, context: int | None, ends: Sequence[int]) -> None:
        self.config = config
        self.encoder = TextEncoder(
            tokenizer,
            max_completion_length=config.max_completion_length,
            max_prompt_length=config.max_prompt_length,
            context_length=context,
            ends=ends,
        )

    @classmethod
    def of(cls, config: Any) -> _Reader:
        """With the tokenizer of ``config.model``, whose weights are not read."""
        tokenizer, context = load_tokenizer(config.model)
        # A reward model samples nothing that could end.
        ends = () if isinstance(config, RewardModelConfig) else load_ends(config.model, tokenizer)
        return cls(config, tokenizer, context, ends)

    def __call__(self, name: str) -> list[Any]:
        """The rows of the setting ``name``; none where it is not given."""
        data = getattr(self.config, name, None)
        if data is None:
            return []
        found = self.read(name, data)
        cut = found.truncation
        if processes().is_main_process and (cut.prompts or cut.completions or cut.left_out):
            Console(stderr=True).print(f"{name}: {cut}", highlight=False, markup=False, soft_wrap=True)
        return found.rows

    def read(self, name: str, data: TextDataConfig) -> Rows[Any]:
        """The rows of ``data`` as those of the setting ``name``."""
        kind: Callable[..., Rows[Any]] = prompt_rows
        if name != "prompts":
            kind = labelled_rows if isinstance(self.config, KTOConfig) else preference_rows
        return kind(data, self.encoder, name=name)

    def shown(self, prompts: Sequence[PromptRow]) -> list[PromptRow] | None:
        """The rows of ``show_prompts``, with the other columns of the same prompt in ``prompts``."""
        if self.config.show_prompts is None:
            return None
        known = {str(row.prompt): row.columns for row in prompts}
        rows = _bare_rows(self.config.show_prompts, self.encoder, name="show_prompts")
        return [PromptRow(row.prompt, row.ids, known.get(str(row.prompt), {})) for row in rows]


def _bare_rows(prompts: Sequence[Any], encoder: TextEncoder, *, name: str) -> list[PromptRow]:
    """The rows of prompts that are given as they are, without the settings of a source."""
    if not prompts:
        return []
    try:
        data = TextDataConfig(source=[{"prompt": prompt} for prompt in prompts])
        return prompt_rows(data, encoder, name=name).rows
    except ConfigError as error:
        # There is no source of which bad rows could be left out, or that would hold no others.
        of_a_source = f"{name}.source=", f"{name}: mend"
        raise ConfigError([problem for problem in error.problems if not problem.startswith(of_a_source)]) from None


def _fitting_rows(prompts: Sequence[Text], tokenizer: Any, context: int | None, max_new_tokens: int) -> list[PromptRow]:
    """The rows of prompts behind which there is room for a completion."""
    encoder = TextEncoder(tokenizer, max_completion_length=max_new_tokens)
    rows = _bare_rows(prompts, encoder, name="prompts")
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
    if problem := language_model_problem(model):
        raise UserError(problem)
    _fitting_rows(prompts, *load_tokenizer(model), max_new_tokens)


def _check_same_tokens(config: PolicyConfig, tokenizer: Any) -> None:
    other, _ = load_tokenizer(str(config.reference_model))
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"reference_model={config.reference_model!r} has {len(other)} tokens, not the {len(tokenizer)} of "
            f"model={config.model!r}: use a reference with the model's own tokens"
        )


def _rewards(
    config: PolicyConfig,
    prompts: Sequence[PromptRow | PreferenceRow | LabelledRow],
    encoder: TextEncoder,
    device: torch.device,
) -> WeightedRewards | None:
    """The rewards of a run, each tried on real prompts."""
    if config.reward is None:
        return None
    specs = config.reward if isinstance(config.reward, list | tuple) else [config.reward]
    weights = torch.tensor(config.reward_weights or [1.0] * len(specs), dtype=torch.float64)
    rewards = WeightedRewards([build_text_reward(spec, device=device) for spec in specs], weights)
    some = list(prompts[:4])
    names = dict.fromkeys(name for row in some for name in row.columns)
    for reward in rewards.functions:
        check_text_reward(
            reward,
            [row.prompt for row in some],
            columns={name: [row.columns.get(name) for row in some] for name in names},
            tokenize=lambda text: encoder.answer_ids("", text),
            trainer_state=trainer_state(config),
        )
    return rewards


def _run_reward_model(config: RewardModelConfig) -> RewardModelTrainer:
    def data() -> tuple[list[PreferenceRow], list[PreferenceRow]]:
        read = _Reader.of(config)
        return read("dataset"), read("eval_dataset")

    rows, eval_rows = agreed(data)
    model, tokenizer = load_sequence_classifier(config.model)
    config, accelerator = start(config, lambda narrow: _seconds_a_pass(model, narrow))
    scorer = RewardModel(model, tokenizer, lora=config.lora, device=accelerator.device, autocast=accelerator.autocast)
    trainer = RewardModelTrainer(config, scorer, rows, eval_rows=eval_rows, accelerator=accelerator)
    trainer.identity = text_identity(config, {"dataset": rows, "eval_dataset": eval_rows}, ())
    trainer.train()
    return trainer


def check_rows(config: TextMethodConfig) -> tuple[dict[str, int], list[str]]:
    """How many rows of each setting can be read as a run reads them, and sentences about those that cannot.

    Nothing is downloaded: with a tokenizer or rows on the Hub there is nothing to read. Of each setting it is the first
    ``MOST_CHECKED`` rows.
    """
    try:
        if not os.path.isdir(model_places(config.model)[0]):
            return {}, []
        read = _Reader.of(config)
    except UserError as error:
        return {}, [str(error)]
    counts, problems = {}, []
    for name in ("prompts", "dataset", "eval_dataset"):
        data = getattr(config, name, None)
        if data is None or is_hub(data.source):
            continue
        most = min(data.max_rows or MOST_CHECKED, MOST_CHECKED)
        try:
            counts[name] = len(read.read(name, data.model_copy(update={"max_rows": most})).rows)
        except ConfigError as error:
            problems += error.problems
    try:
        if not isinstance(config, RewardModelConfig):
            read.shown([])
    except ConfigError as error:
        problems += error.problems
    return counts, problems


def read_prompts(source: str) -> list[Text]:
    """The prompts of a file, a shipped list or a data set.

    Raises:
        ConfigError: there is nothing of that name, or it holds no prompts.
    """
    if problem := path_problem(source):
        raise ConfigError([f"prompts.source={short(source)} {problem}"])
    table, _ = TextDataConfig(source=source).open("prompts", "prompts")
    return [row["prompt"] for row in first_rows(table, None)]


def _seconds_a_pass(model: Any, narrow: bool) -> float:
    """Of a forward pass of two short texts."""
    ids = torch.zeros(2, 32, dtype=torch.int64)
    return best_seconds(lambda: model(input_ids=ids, use_cache=False), narrow)


def _several(prompts: Text | Sequence[Text]) -> list[Text]:
    """A list of prompts, also of one alone: a text, or a conversation, whose items are messages."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    return [cast(Messages, items)] if items and all(isinstance(item, Mapping) for item in items) else items
