"""Sampling completions with the log-prob of every token, under the very distribution that is sampled from.

No token makes a GPU wait for the host: whether rows are finished is looked at every ``_CHECKED_EVERY`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.errors import UserError
from diffusion_align.estimators import categorical_log_probs
from diffusion_align.llm.policy import LanguagePolicy, Sequences, concatenate, inputs_of, pad_to, widest_float
from diffusion_align.training.finite import require_finite_logits

_CHECKED_EVERY = 16  # tokens between looks at which rows are finished, where a look makes the device wait
_LEAVE_AT = 0.75  # share of a batch's rows that are left when the finished ones leave
_BLOCK = 128  # entries of the vocabulary whose chances are first looked at together


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
    number of processes. With ``policy.sampling="fast"`` equal prompts are read once, and finished rows leave the batch.

    Args:
        policy: the behaviour policy.
        prompts: B token lists, none empty.
        generators: B of them; each is advanced by ``max_new_tokens`` numbers.
        max_new_tokens: the most tokens of a completion, at least 1.
        on_token: called after each token (progress, interruption).

    Raises:
        ValueError: an empty prompt, or numbers of prompts and generators that differ.
        TrainingError: the model's log-probs are not finite.
        UserError: ``sampling="fast"`` with a model whose cache cannot be reordered.
    """
    if len(prompts) != len(generators) or not all(len(p) for p in prompts) or max_new_tokens < 1:
        raise ValueError(
            f"{len(prompts)} prompts, {len(generators)} generators, {max_new_tokens=}: one generator per prompt, no "
            "prompt empty, at least one token"
        )
    device, batch, fast = policy.device, len(prompts), policy.sampling == "fast"
    every = _checked_every(device)
    chances = torch.stack([torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in generators])
    chances = chances.to(device, widest_float(device))
    model: _Cached | _Whole = _Cached(policy, prompts) if policy.keeps_cache else _Whole(policy, prompts)

    rows: Tensor | None = None  # those that are left, where some have left
    token: Tensor | None = None
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    logps: list[Tensor] = []
    mask: list[Tensor] = []

    def of_all(x: Tensor, left: float) -> Tensor:
        """(B,) of what is known of ``rows``."""
        return x if rows is None else x.new_full((batch,), left).index_copy(0, rows, x)

    for turn in range(max_new_tokens):
        logits = model.next_logits(token)
        now = chances[:, turn] if rows is None else chances[rows, turn]
        token, chosen = (_draw_fast if fast else _draw_exactly)(policy, logits, now)
        token = torch.where(alive, token, policy.pad)
        tokens.append(of_all(token, policy.pad))
        logps.append(of_all(torch.where(alive, chosen, 0.0), 0.0))
        mask.append(of_all(alive, False))
        alive = alive & ~torch.isin(token, policy.ends)
        on_token()
        if (turn + 1) % every:
            continue
        left = int(alive.sum())  # here the device waits
        if not left:
            break
        if fast and left <= _LEAVE_AT * len(alive):
            stay = alive.nonzero().squeeze(1)
            rows = stay if rows is None else rows[stay]
            model.keep(stay)
            token, alive = token[stay], alive[stay]
    counts = torch.stack(mask, 1)
    width = max(int(counts.any(0).sum()), 1)
    counts, logp, ids = counts[:, :width], torch.stack(logps[:width], 1), torch.stack(tokens[:width], 1)
    require_finite_logits(logp, what="the language model")
    sequences = _right_padded(prompts, ids, counts, policy.pad)
    return Completions(sequences, logp, ~of_all(alive, False))


def _checked_every(device: torch.device) -> int:
    """Tokens between looks at which rows are finished."""
    return 1 if device.type == "cpu" else _CHECKED_EVERY


def _draw_exactly(policy: LanguagePolicy, logits: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) tokens, and their log-probs by the function that scores them."""
    token = _draw(categorical_log_probs(logits, temperature=policy.temperature), chances)
    return token, policy.label_log_probs(logits[:, None], token[:, None]).squeeze(1)


def _draw_fast(policy: LanguagePolicy, logits: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """The same up to float32's rounding: the vocabulary is summed in blocks, and each row looks into one of them."""
    logp = categorical_log_probs(logits, temperature=policy.temperature)
    p, spare = logp.exp(), -logp.shape[-1] % _BLOCK
    blocks = (nn.functional.pad(p, (0, spare)) if spare else p).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(-1).to(chances.dtype).cumsum_(-1)
    target = chances[:, None] * sums[:, -1:]
    block = _reached(sums, target)
    before = nn.functional.pad(sums, (1, 0)).gather(1, block)
    inside = blocks.take_along_dim(block.unsqueeze(-1), 1).squeeze(1).to(chances.dtype).cumsum_(-1)
    token = (block * _BLOCK + _reached(inside, (target - before).clamp(min=0))).clamp(max=logp.shape[-1] - 1)
    return token.squeeze(1), logp.gather(1, token).squeeze(1)


class _Cached:
    """Prompts left-padded, so that the next token of every row is at the same place; then one token per pass."""

    def __init__(self, policy: LanguagePolicy, prompts: Sequence[Sequence[int]]) -> None:
        self.policy, device = policy, policy.device
        places = {tuple(prompt): None for prompt in prompts} if policy.sampling == "fast" else {}
        self.copies: Tensor | None = None  # which of the prompts that are read each row has
        if places and len(places) < len(prompts):
            index = {prompt: i for i, prompt in enumerate(places)}
            self.copies = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=device)
            prompts = list(places)
        longest = max(map(len, prompts))
        padded = [[policy.pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.current = torch.tensor(padded, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.attention = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        self.positions = (self.attention.cumsum(1) - 1).clamp(min=0)
        self.inputs = inputs_of(policy.model)
        # transformers renamed it in 5.24
        self.name = "cache" if "cache" in self.inputs else "past_key_values"
        self.cache: Any = None

    def next_logits(self, token: Tensor | None) -> Tensor:
        """Given the last token of every row (None at the start), the logits (B, V) of the next one."""
        if token is not None:
            self.current, self.positions = token[:, None], self.positions[:, -1:] + 1
            self.attention = torch.cat([self.attention, self.attention.new_ones(len(token), 1)], dim=1)
        with self.policy.autocast():
            further = {"position_ids": self.positions, "logits_to_keep": 1}
            output = self.policy.model(
                input_ids=self.current,
                attention_mask=self.attention,
                use_cache=True,
                **{self.name: self.cache},
                **{key: value for key, value in further.items() if key in self.inputs},
            )
        self.cache = getattr(output, self.name)
        logits = output.logits[:, -1]
        if self.copies is None:
            return logits
        copies, self.copies = self.copies, None
        self.keep(copies)
        return logits[copies]

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows, in this order, some of them more than once."""
        if not hasattr(self.cache, "reorder_cache"):
            kind = type(self.policy.model).__name__
            raise UserError(f"the cache of {kind} has no rows to take out: use sampling=plain")
        self.cache.reorder_cache(rows)
        self.attention, self.positions = self.attention[rows], self.positions[rows]


class _Whole:
    """Prompts right-padded, and everything so far in every pass, as ``score`` sees it."""

    def __init__(self, policy: LanguagePolicy, prompts: Sequence[Sequence[int]]) -> None:
        self.policy = policy
        self.ids = _padded(prompts, policy.pad, policy.device)
        self.ends = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)

    def next_logits(self, token: Tensor | None) -> Tensor:
        """As ``_Cached.next_logits``."""
        rows = torch.arange(len(self.ids), device=self.ids.device)
        if token is not None:
            self.ids = pad_to(self.ids, self.ids.shape[1] + 1, self.policy.pad)
            self.ids[rows, self.ends] = token
            self.ends = self.ends + 1
        attention = (torch.arange(self.ids.shape[1], device=self.ids.device) < self.ends[:, None]).long()
        with self.policy.autocast():
            logits = self.policy.model(input_ids=self.ids, attention_mask=attention, use_cache=False).logits
        return logits[rows, self.ends - 1]

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows."""
        self.ids, self.ends = self.ids[rows], self.ends[rows]


def _draw(logp: Tensor, chances: Tensor) -> Tensor:
    """(B,) tokens by inversion of the distribution function, in float64 where the device has it."""
    cumulated = logp.to(chances.dtype).exp().cumsum_(-1)
    return _reached(cumulated, chances[:, None] * cumulated[:, -1:]).squeeze(1)


def _reached(cumulated: Tensor, target: Tensor) -> Tensor:
    """(B, 1) where the sums (B, N) first exceed ``target`` (B, 1), at least 0.

    Rounding must not lead to a weight of 0 at the end: it is at most where the sums first are what they come to.
    """
    found = torch.searchsorted(cumulated, target, right=True)
    last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())
    return found.minimum(last).clamp(max=cumulated.shape[1] - 1)


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device, *, extra: int = 0) -> Tensor:
    """(B, L) prompts, right-padded, with ``extra`` columns more than the longest."""
    width = max(map(len, prompts)) + extra
    return torch.tensor([[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts], device=device)


def _right_padded(prompts: Sequence[Sequence[int]], completions: Tensor, mask: Tensor, pad: int) -> Sequences:
    device, width = completions.device, completions.shape[1]
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = _padded(prompts, pad, device, extra=width)
    ids.scatter_(1, starts[:, None] + torch.arange(width, device=device), completions)
    length = int((starts + mask.sum(1)).max())
    return Sequences(ids[:, :length], starts, mask)
