"""The protocol of text rewards, TRL's, and the functions through which every one of them is called.

A reward scores finished completions; it is called by name and gets what it names::

    def brief(completions, **columns):
        return [-float(len(text_of(completion))) for completion in completions]

    def correct(prompts, completions, answer):   # `answer` is a column of the data
        return [None if a is None else float(a in text_of(c)) for c, a in zip(completions, answer)]

    def patient(completion_ids, completions, trainer_state):   # only for rewards that name them, see `EXTRAS`
        done = trainer_state.global_step / trainer_state.max_steps if trainer_state else 1.0
        return [-done * len(ids) for ids in completion_ids]

Nothing a reward answers is trusted: `call_text_reward` checks it at every call, `check_text_reward` once before
training starts.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field

from diffusion_align.rewards.base import (
    RewardError,
    answer_of,
    as_scores,
    check_finite,
    foreign_code,
    in_its_thread,
    parameters_of,
    reward_name,
    without_info,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Text = str | list[dict[str, Any]]
"""A prompt or a completion: plain text, or messages ``[{"role": ..., "content": ...}, ...]``."""

EXTRAS = ("completion_ids", "trainer_state")
"""What TRL passes besides; here a reward gets it if it names it, ``**columns`` do not.

``completion_ids``: B lists of token ids, with the end of sequence of those that were not cut off. ``trainer_state``: a
``TrainerState`` for training samples, None in ``score`` and for the texts that a run shows.
"""
_DUMMIES = ("Yes.", "", "The answer is 42: six times seven.\nSurely.")  # an empty completion will come up in training


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands while its samples are scored; the names are those of ``transformers.TrainerState``.

    Attributes:
        global_step: optimizer steps so far.
        epoch: finished epochs.
        max_steps: optimizer steps of the whole run.
    """

    global_step: int
    epoch: float
    max_steps: int


class TextReward(Protocol):
    """What a text reward looks like. Plain functions are rewards; the attributes below are optional.

    ``name: str`` is what logs and errors call it; ``to(device)`` moves whatever model it holds.
    """

    def __call__(
        self, prompts: list[Text], completions: list[Text], **columns: list[Any]
    ) -> Sequence[float | None] | Tensor | np.ndarray:
        """One score per completion, more is better; None where this reward has nothing to say about a sample.

        Prompts and completions have the same form. ``columns`` are the other columns of the data, B values each. A
        reward that names ``completion_ids`` or ``trainer_state`` gets those too (see `EXTRAS`).
        """
        ...


def text_of(text: Text) -> str:
    """The words of a prompt or completion: itself, or what its messages say, a line break between them.

    Raises:
        RewardError: neither text nor messages.
    """
    if isinstance(text, str):
        return text
    if not isinstance(text, list) or not all(isinstance(m, Mapping) and "content" in m for m in text):
        raise RewardError(
            f"a prompt or completion must be text or a list of messages with 'role' and 'content', got {text!r:.80}"
        )
    return "\n".join(_content(message["content"]) for message in text)


def words_left_out(messages: Sequence[Mapping[str, Any]], rendered: str, *, in_full: int = 0) -> str | None:
    """The content of the first message that a chat template left out of ``rendered``; None if all are there.

    White space does not count, nor whether a content stands there as JSON (answers of tools do). What an assistant
    thought (up to ``</think>``) may be left out as templates do with earlier turns, but for the last ``in_full``
    messages.
    """
    found = "".join(rendered.split())
    for place, message in enumerate(messages):
        content = _content(message["content"])
        forms = [content, json.dumps(content, ensure_ascii=False)[1:-1]]
        if message.get("role") == "assistant" and place < len(messages) - in_full:
            forms.append(content.rpartition("</think>")[2])
        if not any("".join(form.split()) in found for form in forms):
            return content
    return None


def call_text_reward(
    reward: TextReward,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
    trainer_state: TrainerState | None = None,
) -> Tensor:
    """Scores of one batch, (B,) on the CPU, nan where the reward answered None; all others finite.

    float32 where the reward returns that or less, else float64. It gets the columns that it names, or all of them if it
    takes ``**columns``, as copies. Gradients are off.

    Args:
        reward: what is called.
        prompts, completions, columns: B of each.
        completion_ids, trainer_state: see `EXTRAS`.

    Raises:
        RewardError: the reward raised, needs a column or tokens that are not there, or answered a wrong type, shape or
            length, or a value that is not finite.
        ValueError: prompts, completions, their tokens and columns do not belong together.
    """
    import torch

    name, batch = reward_name(reward), len(completions)
    lengths = {"prompts": len(prompts)} | {key: len(values) for key, values in columns.items()}
    if completion_ids is not None:
        lengths["completion_ids"] = len(completion_ids)
    if any(length != batch for length in lengths.values()):
        raise ValueError(f"{batch} completions do not match the lengths of the rest, {lengths}")
    named = extras_of(reward)
    if clash := {"prompts", "completions", *named} & set(columns):
        raise RewardError(f"the data has a column '{min(clash)}', a name that rewards need: rename it")

    extras: dict[str, Any] = {}
    if "trainer_state" in named:
        extras["trainer_state"] = trainer_state
    if "completion_ids" in named and completion_ids is not None:
        extras["completion_ids"] = [list(ids) for ids in completion_ids]
    arguments = _arguments(reward, prompts, completions, columns, extras)

    def called() -> Any:
        with torch.no_grad():
            return answer_of(reward, **arguments)

    answer = in_its_thread(reward, called)
    silent = torch.zeros(batch, dtype=torch.bool)
    with foreign_code(f"reward '{name}' returned what cannot be read: "):
        answer = without_info(answer)
        if isinstance(answer, list | tuple) and len(answer) == batch:
            silent = torch.tensor([value is None for value in answer], dtype=torch.bool)
            answer = [0.0 if value is None else value for value in map(_number, answer)]
        scores = as_scores(answer, batch, name, "completions").detach()
    otherwise = ", or None where the reward has nothing to say"
    check_finite(scores, name, lambda i: f"completion {i} {_after(prompts[i])}", otherwise)
    return scores.masked_fill(silent, torch.nan)


def check_text_reward(
    reward: TextReward,
    prompts: Sequence[Text],
    completions: Sequence[Text] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    tokenize: Callable[[str], list[int]] | None = None,
    trainer_state: TrainerState | None = None,
) -> Tensor:
    """Scores (B,) of a dummy batch: run once before training starts.

    Args:
        prompts: real ones.
        completions: in the form of the prompts; default: a word, nothing, a sentence, and so on.
        columns: the other columns of the data, for these prompts.
        tokenize: token ids of the words of a completion, for a reward that names ``completion_ids``.
        trainer_state: at the start of the training.

    Raises:
        RewardError: see `call_text_reward`.
    """
    if not callable(reward):
        raise RewardError(f"a reward must be callable, got {type(reward).__name__}")
    if completions is None:
        texts = [_DUMMIES[i % len(_DUMMIES)] for i in range(len(prompts))]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
    ids = None
    if tokenize is not None and "completion_ids" in extras_of(reward):
        ids = [tokenize(text_of(completion)) for completion in completions]
    return call_text_reward(
        reward, prompts, completions, columns or {}, completion_ids=ids, trainer_state=trainer_state
    )


def weighted_sum(
    scores: Tensor, weights: Tensor, *, prompts: Sequence[Text] | None = None, may_be_silent: bool = False
) -> Tensor:
    """``sum_k weights[k] * scores[:, k]`` over the rewards that had something to say, (B,) in the dtype of ``scores``.

    Args:
        scores: (B, K), nan where reward k had nothing to say.
        weights: (K,).
        prompts: B of them, for the sentence of the error.
        may_be_silent: a sample about which no reward had anything to say is nan and no error.

    Raises:
        RewardError: a sample about which no reward had anything to say.
        ValueError: shapes that do not belong together.
    """
    import torch

    if scores.ndim != 2 or weights.shape != scores.shape[1:]:
        raise ValueError(f"scores {tuple(scores.shape)} must be (B, K) and weights {tuple(weights.shape)} (K,)")
    silent = scores.isnan()
    if (nothing := silent.all(dim=1)).any() and not may_be_silent:
        first = int(nothing.nonzero()[0])
        where = f" {_after(prompts[first])}" if prompts is not None else ""
        raise RewardError(f"every reward returned None for sample {first}{where}: at least one must return a number")
    return (scores.masked_fill(silent, 0.0) * weights.to(scores)).sum(dim=1).masked_fill(nothing, torch.nan)


def extras_of(reward: Any) -> list[str]:
    """Those of `EXTRAS` that ``reward`` names and that are not set already, as an option."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {p.name for p in parameters_of(reward) or () if p.kind in kinds} - set(_bound(reward))
    return [name for name in EXTRAS if name in names]


Column = Annotated[str, Field(min_length=1)]
"""An option that is the name of a column of the data."""


def column_of(columns: Mapping[str, list[Any]], column: str, reward: str) -> list[Any]:
    """The values of a column that a reward cannot do without; RewardError naming those that are there."""
    if column not in columns:
        raise RewardError(
            f"reward '{reward}' needs the column '{column}', but the data has {_names(columns)}: add it or name another"
        )
    return columns[column]


def _arguments(
    reward: Any,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]],
    extras: Mapping[str, Any],
) -> dict[str, Any]:
    """What of the batch ``reward`` takes. An option that is set already is not replaced by a column of its name."""
    given: dict[str, Sequence[Any]] = {"prompts": prompts, "completions": completions, **columns}
    bound = _bound(reward)
    batch: dict[str, Any] = {key: list(values) for key, values in given.items() if key not in bound}
    batch |= extras
    parameters = parameters_of(reward)
    if parameters is None:
        return batch
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in batch:
            if parameter.name == "completion_ids":
                raise RewardError(
                    f"reward '{reward_name(reward)}' needs 'completion_ids', but the completions come without "
                    "tokens: pass completion_ids as well, or score them by a pipeline"
                )
            raise RewardError(
                f"reward '{reward_name(reward)}' needs '{parameter.name}', but the data has {_names(columns)}: set it "
                "as an option, or add the column"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return batch
    return {p.name: batch[p.name] for p in named if p.name in batch}


def _bound(reward: Any) -> Mapping[str, Any]:
    """Options that are set already."""
    return reward.keywords if isinstance(reward, functools.partial) else {}


def _content(content: Any) -> str:
    """A message's content: text, nothing (a call of a tool), or parts, of which those of type text count."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _number(value: Any) -> Any:
    """A scalar tensor, on whatever device, as a number; all else as it is."""
    from torch import Tensor

    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def _after(prompt: Text) -> str:
    return f"(prompt {text_of(prompt)[:80]!r})"


def _names(columns: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, sorted(columns))) or "only prompts"
