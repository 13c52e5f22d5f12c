"""Sampling completions with the log-prob of every token, under the very distribution that is sampled from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_align.estimators import categorical_log_probs
from diffusion_align.llm.policy import LanguagePolicy, Sequences, concatenate, inputs_of, pad_to, widest_float
from diffusion_align.training.finite import require_finite_logits

# Given the last token of every row (None at the start), the logits (B, V) of the next one.
NextLogits = Callable[[Tensor | None], Tensor]


@dataclass(frozen=True)
class Completions:
    """B sampled completions.

    Attributes:
        sequences: prompts and completions; the first end of sequence is the last token that counts.
        logp_old: (B, T) nats at the policy's temperature, 0 where the mask is False.
        finished: (B,) bool, False where the length limit cut the completion off.
    """

    sequences: Sequences
    logp_old: Tensor
    finished: Tensor


def joined(parts: Sequence[Completions], pad: int) -> Completions:
    """All of ``parts``, padded to the longest."""
    width = max(part.logp_old.shape[1] for part in parts)
    return Completions(
        concatenate([part.sequences for part in parts], pad=pad),
        torch.cat([pad_to(part.logp_old, width, 0.0) for part in parts]),
        torch.cat([part.finished for part in parts]),
    )


@torch.no_grad()
def rollout(
    policy: LanguagePolicy,
    prompts: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
    *,
    max_new_tokens: int,
    on_token: Callable[[], None] = lambda: None,
) -> Completions:
    """Sample one completion per prompt, all at once, with a key-value cache where the model can keep one.

    Every completion has its own CPU generator, so up to rounding it does not depend on the batch, the device or the
    number of processes.

    Args:
        policy: the behaviour policy.
        prompts: B token lists, none empty.
        generators: B of them; each is advanced by ``max_new_tokens`` numbers.
        max_new_tokens: the most tokens of a completion, at least 1.
        on_token: called after each token (progress, interruption).

    Raises:
        ValueError: an empty prompt, or numbers of prompts and generators that differ.
        TrainingError: the model's log-probs are not finite.
    """
    if len(prompts) != len(generators) or not all(len(p) for p in prompts) or max_new_tokens < 1:
        raise ValueError(
            f"{len(prompts)} prompts, {len(generators)} generators, {max_new_tokens=}: one generator per prompt, no "
            "prompt empty, at least one token"
        )
    device, batch = policy.device, len(prompts)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    next_logits = (_cached if policy.keeps_cache else _whole)(policy, prompts, lengths)
    chances = torch.stack([torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in generators])
    chances = chances.to(device, widest_float(device))

    tokens, logps = [], []
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    mask = []
    token = None
    for turn in range(max_new_tokens):
        logits = next_logits(token)
        token = _draw(categorical_log_probs(logits, temperature=policy.temperature), chances[:, turn])
        chosen = policy.label_log_probs(logits[:, None], token[:, None]).squeeze(1)
        token = torch.where(alive, token, policy.pad)
        tokens.append(token)
        logps.append(torch.where(alive, chosen, 0.0))
        mask.append(alive)
        alive = alive & ~torch.isin(token, policy.ends)
        on_token()
        if not alive.any():
            break
    require_finite_logits(torch.stack(logps, 1), what="the language model")
    return Completions(
        _right_padded(prompts, torch.stack(tokens, 1), torch.stack(mask, 1), lengths, policy.pad),
        torch.stack(logps, 1),
        ~alive,
    )


def _cached(policy: LanguagePolicy, prompts: Sequence[Sequence[int]], lengths: Tensor) -> NextLogits:
    """Prompts left-padded, so that the next token of every row is at the same place; then one token per pass."""
    longest = int(lengths.max())
    current = torch.full((len(prompts), longest), policy.pad, device=policy.device)
    for row, prompt in enumerate(prompts):
        current[row, longest - len(prompt) :] = torch.tensor(prompt, device=policy.device)
    attention = (torch.arange(longest, device=policy.device) >= longest - lengths[:, None]).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    inputs = inputs_of(policy.model)
    name = "cache" if "cache" in inputs else "past_key_values"  # transformers renamed it in 5.24
    cache = None

    def next_logits(token: Tensor | None) -> Tensor:
        nonlocal current, attention, positions, cache
        if token is not None:
            current, positions = token[:, None], positions[:, -1:] + 1
            attention = torch.cat([attention, attention.new_ones(len(prompts), 1)], dim=1)
        with policy.autocast():
            further = {"position_ids": positions, "logits_to_keep": 1}
            output = policy.model(
                input_ids=current,
                attention_mask=attention,
                use_cache=True,
                **{name: cache},
                **{key: value for key, value in further.items() if key in inputs},
            )
        cache = getattr(output, name)
        return output.logits[:, -1]

    return next_logits


def _whole(policy: LanguagePolicy, prompts: Sequence[Sequence[int]], lengths: Tensor) -> NextLogits:
    """Prompts right-padded, and everything so far in every pass, as ``score`` sees it."""
    rows = torch.arange(len(prompts), device=policy.device)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True, padding_value=policy.pad)
    ids, ends = ids.to(policy.device), lengths.clone()

    def next_logits(token: Tensor | None) -> Tensor:
        nonlocal ids
        if token is not None:
            ids = pad_to(ids, ids.shape[1] + 1, policy.pad)
            ids[rows, ends] = token
            ends.add_(1)
        attention = (torch.arange(ids.shape[1], device=policy.device) < ends[:, None]).long()
        with policy.autocast():
            logits = policy.model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        return logits[rows, ends - 1]

    return next_logits


def _draw(logp: Tensor, chances: Tensor) -> Tensor:
    """(B,) tokens by inversion of the distribution function, in float64 where the device has it."""
    cumulated = logp.to(chances.dtype).exp().cumsum(-1)
    found = torch.searchsorted(cumulated, (chances * cumulated[:, -1])[:, None], right=True).squeeze(1)
    # Rounding must not choose a token of probability 0 at the end of the vocabulary.
    last = (logp > -torch.inf).int().cumsum(-1).argmax(-1)
    return found.minimum(last)


def _right_padded(
    prompts: Sequence[Sequence[int]], completions: Tensor, mask: Tensor, starts: Tensor, pad: int
) -> Sequences:
    batch, width = completions.shape
    ids = torch.full((batch, int(starts.max()) + width), pad, device=completions.device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=ids.device)
        ids[row, len(prompt) : len(prompt) + width] = completions[row]
    length = int((starts + mask.sum(1)).max())
    return Sequences(ids[:, :length], starts, mask)
