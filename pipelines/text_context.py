"""What a run on text is made from: rows, rewards and the policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from diffusion_align.data.sources import is_hub
from diffusion_align.data.text_encoding import TextEncoder, context_length, eos_token_ids
from diffusion_align.data.text_rows import (
    LabelledRow,
    PreferenceRow,
    PromptRow,
    Rows,
    TextDataConfig,
    labelled_rows,
    preference_rows,
    prompt_rows,
    prompts_of,
)
from diffusion_align.errors import ConfigError, UserError, problems_of
from diffusion_align.llm.collection import WeightedRewards, trainer_state
from diffusion_align.llm.policy import LanguagePolicy
from diffusion_align.llm.reward_model import RewardModel
from diffusion_align.llm.trainer import TextEvaluation
from diffusion_align.methods import method_of
from diffusion_align.models.language_models import (
    load_ends,
    load_language_model,
    load_sequence_classifier,
    load_tokenizer,
    model_places,
    use_attention,
)
from diffusion_align.pipelines.run import built, language_model_content, rows_content
from diffusion_align.rewards import build_text_reward, check_text_reward
from diffusion_align.training.context import RunContext
from diffusion_align.training.digests import Identity
from diffusion_align.training.launch import agreed, processes, start, time_forward

MOST_CHECKED = 10_000


def text_context(config: Any, model: Any = None, tokenizer: Any = None) -> RunContext:
    """The context of a run on text.

    Args:
        config: checked settings of any text method.
        model, tokenizer: loaded ones; ``config.model`` is loaded when not given.

    Raises:
        ConfigError, UserError: data or models that do not fit, in one sentence each.
    """
    held_out = getattr(config, "evaluation", None)

    def read() -> tuple[TextEncoder, dict[str, list[Any]], list[PromptRow] | None, list[PromptRow]]:
        if tokenizer is None:
            reader = _Reader.of(config)
        else:
            ends = eos_token_ids(tokenizer, getattr(model, "generation_config", None))
            reader = _Reader(config, tokenizer, context_length(model.config), ends)
        data = {name: reader(name, rows) for name, rows in _sources(config).items()}
        held_out_prompts = data.pop("evaluation.prompts", [])
        if held_out is not None and held_out.prompts is None:
            held_out_prompts = prompts_of(data.get("prompts") or data["dataset"])
        return reader.encoder, data, reader.shown(data.get("prompts", ())), held_out_prompts

    encoder, data, shown, held_out_prompts = agreed(read)  # before any weights are loaded
    spec, other = getattr(config, "reward", None), getattr(config, "reference_model", None)
    identity: Identity = {"model": language_model_content(config.model)}
    if other is not None:
        _check_same_tokens(config, encoder.tokenizer)
        identity["reference_model"] = language_model_content(other)
    identity |= {name: [rows_content(getattr(config, name), rows)] for name, rows in data.items() if rows}
    rewards = evaluation = None
    if spec is not None:
        some = data.get("prompts") or data.get("dataset", [])
        rewards, identity["reward"] = built(spec, lambda: _rewards(config, config, some, encoder))
    if held_out is not None:
        reward, content = built(held_out.reward, lambda: _rewards(held_out, config, held_out_prompts, encoder))
        evaluation = TextEvaluation(held_out_prompts, held_out.samples, held_out.every, reward)
        fixed = held_out.prompts or getattr(config, "prompts", None) or config.dataset
        identity["evaluation"] = [rows_content(fixed, held_out_prompts), *content]
    config, accelerator, policy = _policy(config, model, encoder.tokenizer)
    return RunContext(
        config,
        accelerator,
        policy=policy,
        data=data,
        reward=rewards,
        evaluation=evaluation,
        shown=shown,
        identity=identity,
    )


def _sources(config: Any) -> dict[str, TextDataConfig]:
    """The settings that name rows, of those that are given."""
    held_out = getattr(config, "evaluation", None)
    sources = {name: getattr(config, name, None) for name in ("prompts", "dataset", "eval_dataset")}
    sources["evaluation.prompts"] = None if held_out is None else held_out.prompts
    return {name: source for name, source in sources.items() if source is not None}


def _policy(config: Any, model: Any, tokenizer: Any) -> tuple[Any, Accelerator, LanguagePolicy | RewardModel]:
    """The trained model, with the settings and the accelerator of the run; the precision depends on the model."""
    classifier = _trains_classifier(config)
    reference = None
    if classifier:
        model, tokenizer = load_sequence_classifier(config.model)
    elif model is None:
        model, _ = load_language_model(config.model, dtype=getattr(torch, config.dtype))
    if getattr(config, "reference_model", None) is not None:
        reference, _ = load_language_model(config.reference_model, dtype=getattr(torch, config.dtype))
    for loaded in (model, reference):
        if loaded is not None:
            use_attention(loaded, config.attention)
    config, accelerator = start(config, lambda use_bf16: _seconds_per_pass(model, use_bf16))
    common: dict[str, Any] = {"lora": config.lora, "device": accelerator.device, "autocast": accelerator.autocast}
    common["gradient_checkpointing"] = config.gradient_checkpointing
    if classifier:
        return config, accelerator, RewardModel(model, tokenizer, **common)
    policy = LanguagePolicy(
        model,
        tokenizer,
        temperature=config.temperature,
        needs_reference=config.needs_reference,
        reference=reference,
        logits=config.logits,
        sampling=config.sampling,
        **common,
    )
    return config, accelerator, policy


def _trains_classifier(config: Any) -> bool:
    return method_of(config.method).model_kind == "classifier"


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
        ends = () if _trains_classifier(config) else load_ends(config.model, tokenizer)
        return cls(config, tokenizer, context, ends)

    def __call__(self, name: str, data: TextDataConfig) -> list[Any]:
        """The rows of ``data``, the setting ``name``."""
        found = self.read(name, data)
        cut = found.truncation
        if processes().is_main_process and (cut.prompts or cut.completions or cut.left_out):
            Console(stderr=True).print(f"{name}: {cut}", highlight=False, markup=False, soft_wrap=True)
        return found.rows

    def read(self, name: str, data: TextDataConfig) -> Rows[Any]:
        """The rows of ``data`` as those of the setting ``name``."""
        kind: Callable[..., Rows[Any]] = prompt_rows
        if not name.endswith("prompts"):
            labelled = method_of(self.config.method).dataset_kind == "labels"
            kind = labelled_rows if labelled else preference_rows
        return kind(data, self.encoder, name=name)

    def shown(self, prompts: Sequence[PromptRow]) -> list[PromptRow] | None:
        """The rows of ``show_prompts``, with the other columns of the same prompt in ``prompts``."""
        shown = getattr(self.config, "show_prompts", None)
        if shown is None:
            return None
        known = {str(row.prompt): row.columns for row in prompts}
        rows = bare_rows(shown, self.encoder, name="show_prompts")
        return [PromptRow(row.prompt, row.ids, known.get(str(row.prompt), {})) for row in rows]


def bare_rows(prompts: Sequence[Any], encoder: TextEncoder, *, name: str) -> list[PromptRow]:
    """The rows of prompts that are given as they are, without the settings of a source."""
    if not prompts:
        return []
    try:
        data = TextDataConfig(source=[{"prompt": prompt} for prompt in prompts])
        return prompt_rows(data, encoder, name=name).rows
    except ConfigError as error:
        # There is no source of which bad rows could be left out, or that would hold no others.
        of_a_source = f"{name}.source=", f"{name}: fix"
        raise ConfigError([problem for problem in error.problems if not problem.startswith(of_a_source)]) from None


def _check_same_tokens(config: Any, tokenizer: Any) -> None:
    other, _ = load_tokenizer(str(config.reference_model))
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"reference_model={config.reference_model!r} has {len(other)} tokens, not the {len(tokenizer)} of "
            f"model={config.model!r}: use a reference with the model's own tokens"
        )


def _rewards(
    settings: Any, config: Any, prompts: Sequence[PromptRow | PreferenceRow | LabelledRow], encoder: TextEncoder
) -> WeightedRewards:
    """The rewards of a run, or of its evaluation, which has ``settings`` of its own; each tried on real prompts."""
    specs = settings.reward if isinstance(settings.reward, list | tuple) else [settings.reward]
    weights = torch.tensor(getattr(settings, "reward_weights", None) or [1.0] * len(specs), dtype=torch.float64)
    rewards = WeightedRewards([build_text_reward(spec, device=processes().device) for spec in specs], weights)
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


def check_rows(config: Any) -> tuple[dict[str, int], list[str]]:
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
    for name, data in _sources(config).items():
        if is_hub(data.source):
            continue
        most = min(data.max_rows or MOST_CHECKED, MOST_CHECKED)
        try:
            counts[name] = len(read.read(name, data.model_copy(update={"max_rows": most})).rows)
        except ConfigError as error:
            problems += error.problems
    return counts, problems + problems_of(read.shown, [])


def _seconds_per_pass(model: Any, use_bf16: bool) -> float:
    """Seconds of a forward pass of two short texts."""
    ids = torch.zeros(2, 32, dtype=torch.int64)
    return time_forward(lambda: model(input_ids=ids, use_cache=False), use_bf16)
