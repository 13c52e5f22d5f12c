"""Advantages from rewards: groups, leave-one-out, per-prompt history (DDPO, arXiv:2305.13301, §5.2), GAE.

Nothing here carries a gradient, except ``reward_to_go``. Computed in float64 on the CPU, once per batch: there are few
numbers, and sums over groups are then the same on every run. Results are returned on the rewards' device, in float32 or
wider. There is no hidden epsilon: a spread of exactly zero yields an advantage of exactly zero. [002] "Rethinking KL
Divergence in RLHF", 2025, §4.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_align.estimators.masked import (
    check_choice,
    check_mask,
    check_shapes,
    group_indices,
    masked_fill_zero,
)


def _float64(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _like(result: Tensor, x: Tensor) -> Tensor:
    return result.to(x.device, torch.promote_types(x.dtype, torch.float32))


def _checked_rewards(rewards: Tensor) -> Tensor:
    values = _float64(rewards)
    bad = int((~(values.abs() <= 1e150)).sum())  # their squares have to be finite, too
    if bad:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} hold {bad} value(s) that are not finite or beyond 1e150: drop or replace."
        )
    return values


def _group_centred(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r - mean of its group, index of its group, sizes of the groups); exactly 0 in a group of equal rewards."""
    check_shapes(ndim=1, rewards=rewards, group_ids=group_ids)
    index, counts = group_indices(group_ids)
    values = _checked_rewards(rewards)
    # Measured from the group's smallest reward, equal rewards are exact zeros; a mean rounded by one ulp would
    # otherwise be blown up to ±1 by the division.
    zeros = values.new_zeros(counts.numel())
    shifted = values - zeros.scatter_reduce(0, index, values, "amin", include_self=False)[index]
    return shifted - (zeros.index_add(0, index, shifted) / counts)[index], index, counts


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    clip_std: tuple[float, float] = (0.0, math.inf),
    ddof: int = 1,
) -> Tensor:
    """``(r - mean) / clip(std, min, max)`` with the mean of the reward's group, no unit ([002] eq. 40–41; GRPO).

    Equal rewards and one-element groups give exactly 0.

    Args:
        rewards: (B,) finite; no gradient flows.
        group_ids: (B,) integers; equal ids form a group, in any order.
        scale: the std of the "group", of all rewards of the "batch", or "none" (Dr. GRPO: the unit of the reward).
        clip_std: (min, max) for the std; min keeps noise from being blown up to ±1.
        ddof: 1 divides the squares by n - 1, 0 by n.

    Returns (B,), float32 or wider. Raises ValueError on different shapes, ids that are not integers, rewards that are
    not finite, or a setting out of its range.
    """
    check_choice("scale", scale, ("group", "batch", "none"))
    low, high = clip_std
    if not 0 <= low <= high or ddof not in (0, 1):
        raise ValueError(f"clip_std={clip_std}, ddof={ddof} is not allowed: 0 <= min <= max, ddof 0 or 1.")
    centred, index, counts = _group_centred(rewards, group_ids)
    if scale == "none" or centred.numel() == 0:
        return _like(centred, rewards)
    if scale == "batch":
        deviation, index = _group_centred(rewards, torch.zeros_like(group_ids))[:2]
        counts = torch.tensor([deviation.numel()])
    else:
        deviation = centred
    squares = deviation.new_zeros(counts.numel()).index_add(0, index, deviation.square())
    std = (squares / (counts - ddof).clamp(min=1)).sqrt().clamp(low, high)[index]
    return _like(torch.where(std == 0, 0.0, centred / std), rewards)


def multi_reward_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    weights: Tensor | None = None,
    *,
    estimator: Callable[..., Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """Sum over K rewards of ``weight_k * estimator(rewards[:, k], group_ids, **settings)``.

    Each is normalised by itself; normalising their sum lets the one that varies most decide alone (GDPO,
    arXiv:2601.05242, whose second whitening over the batch is not done here). nan means that a reward has nothing to
    say about a sample: it then is left out of the mean and std of its group (or batch) and adds 0 to the sum.

    Args:
        rewards: (B, K) finite or nan; no gradient flows.
        weights: (K,), or None for ones.
        estimator: ``group_advantages`` if None, or ``leave_one_out_advantages``.

    Returns (B,), float32 or wider. Raises ValueError as the estimator, or on weights that are not (K,).
    """
    if rewards.ndim != 2 or rewards.shape[1] == 0 or (weights is not None and weights.shape != rewards.shape[1:]):
        found = (tuple(rewards.shape), None if weights is None else tuple(weights.shape))
        raise ValueError(f"expected rewards (B, K) with K > 0 and weights (K,) or None, got {found}.")
    columns = rewards.unbind(1)
    estimate = partial(estimator or group_advantages, **settings)
    advantages = torch.stack([_advantages_of_scored(column, group_ids, estimate) for column in columns], 1)
    return advantages.sum(1) if weights is None else (advantages * weights.detach().to(advantages)).sum(1)


def _advantages_of_scored(rewards: Tensor, group_ids: Tensor, estimate: Callable[..., Tensor]) -> Tensor:
    """``estimate`` of the rewards (B,) that are not nan, and 0 for the others."""
    check_shapes(ndim=1, rewards=rewards, group_ids=group_ids)
    scored = ~rewards.isnan()
    found = estimate(rewards[scored], group_ids[scored.to(group_ids.device)])
    return found.new_zeros(len(rewards)).masked_scatter(scored, found)


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """``r`` minus the mean of the *other* rewards of its group, in the unit of the reward (RLOO, arXiv:2402.14740).

    Args, errors as ``group_advantages``. Returns (B,); a one-element group gives 0.
    """
    centred, index, counts = _group_centred(rewards, group_ids)
    factor = counts / (counts - 1).clamp(min=1)
    return _like(centred * factor[index], rewards)


def softmax_weights(rewards: Tensor, group_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``n softmax(z / temperature)`` over the n rewards of a group, 1 on average; ``z`` as ``group_advantages``.

    The weights of reward-weighted regression (Peters & Schaal 2007), whose temperature is here in stds of the reward.
    Equal rewards and one-element groups give exactly 1.

    Args:
        rewards, group_ids: as of ``group_advantages``.
        temperature: above 0.

    Returns (B,), float32 or wider. Raises ValueError as ``group_advantages``, or if the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not allowed: it must be above 0.")
    logits = group_advantages(_float64(rewards), group_ids) / temperature
    index, counts = group_indices(group_ids)
    nothing = logits.new_zeros(counts.numel())
    largest = nothing.scatter_reduce(0, index, logits, "amax", include_self=False)
    exponentials = (logits - largest[index]).exp()
    sums = nothing.index_add(0, index, exponentials)
    return _like(exponentials * (counts / sums)[index], rewards)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns they imply, in the unit of the reward.

    ``A_t = sum_k (gamma lam)^k delta_{t+k}``, ``delta_t = r_t + gamma V_{t+1} - V_t``, ``R = A + V``. Schulman et al.
    2015 (arXiv:1506.02438), eq. 16. The value after the last action is 0. Entries that do not count are skipped: the
    action before them is followed by the next one that counts.

    Args:
        rewards, values: (B, T); no gradient flows.
        mask: (B, T) bool.
        gamma, lam: in [0, 1]; lam 0 is the one-step error, 1 the return minus the value.

    Returns advantages (B, T) and returns (B, T), float32 or wider, 0 where masked. Raises ValueError on different
    shapes, a mask that is not bool, or gamma or lam out of [0, 1].
    """
    check_shapes(ndim=2, rewards=rewards, values=values, mask=mask)
    check_mask(mask)
    if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"gamma={gamma}, lam={lam} is not allowed: both must lie in [0, 1].")
    counts = mask.cpu()
    reward, value = (torch.where(counts, _float64(x), 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(reward)
    running = next_value = reward.new_zeros(reward.shape[0])
    for t in reversed(range(reward.shape[1])):
        here = counts[:, t]
        delta = reward[:, t] + gamma * next_value - value[:, t]
        running = torch.where(here, delta + gamma * lam * running, running)
        next_value = torch.where(here, value[:, t], next_value)
        advantages[:, t] = torch.where(here, running, 0.0)
    return _like(advantages, rewards), _like(advantages + value, rewards)


def reward_to_go(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of ``x`` from each action to the end, in its unit: ``y_t = sum_{k >= t} x_k``.

    ``x`` (B, T), a gradient flows; ``mask`` (B, T) bool, or None if all entries count. Returns (B, T), float32 or
    wider, 0 where masked. Raises ValueError on different shapes or a mask that is not bool.
    """
    check_shapes(ndim=2, x=x, mask=mask)
    return masked_fill_zero(masked_fill_zero(x, mask).flip(1).cumsum(1).flip(1), mask)


def _standardised(rewards: Tensor, history: Tensor) -> Tensor:
    """``(rewards - mean) / std`` with the population mean and std of ``history``; 0 where that std is 0."""
    lowest = history.min()  # as in group advantages: equal rewards must leave a spread of exactly 0
    shifted = history - lowest
    std = shifted.std(correction=0)
    return torch.zeros_like(rewards) if std == 0 else (rewards - lowest - shifted.mean()) / std


class PromptStatistics:
    """Each prompt's last rewards, and advantages measured against them.

    Args:
        buffer_size: how many rewards are kept per prompt.
        min_count: below this many kept rewards (the new ones included) the whole batch's mean and std are used.
        max_prompts: how many prompts are remembered: those seen last, so that the state has a bound however many
            different ones there are. A batch may have more; the bound holds after it.

    Raises ValueError unless 1 <= min_count <= buffer_size and max_prompts >= 1.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16, *, max_prompts: int = 4096) -> None:
        if not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"min_count={min_count}, buffer_size={buffer_size} is not allowed: 1 <= min_count <= buffer_size, "
                "or no prompt would ever use its own history."
            )
        if max_prompts < 1:
            raise ValueError(f"max_prompts={max_prompts} is not allowed: remember at least 1 prompt.")
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.max_prompts = max_prompts
        # In the order in which prompts were seen last, which JSON keeps.
        self._history: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Append ``rewards`` to their prompts' histories, then return ``(r - mean) / std``, no unit.

        The std is the population's; the common implementation adds 1e-6 to it, here nothing is, and 0 yields 0.

        Args:
            prompts: B strings.
            rewards: (B,) finite; no gradient flows.

        Returns (B,), float32 or wider, on the rewards' device. Raises ValueError on different lengths or rewards that
        are not finite; the histories are then unchanged.
        """
        if isinstance(prompts, str) or rewards.ndim != 1 or len(prompts) != rewards.shape[0]:
            raise ValueError(f"expected B prompts and rewards (B,), got {len(prompts)} and {tuple(rewards.shape)}.")
        values = _checked_rewards(rewards)
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        advantages = torch.zeros_like(values)
        for prompt, index in rows.items():
            history = self._history.pop(prompt, None) or deque(maxlen=self.buffer_size)
            self._history[prompt] = history
            history.extend(values[index].tolist())
            enough = len(history) >= self.min_count
            baseline = torch.tensor(list(history), dtype=torch.float64) if enough else values
            advantages[index] = _standardised(values[index], baseline)
        self._forget()
        return _like(advantages, rewards)

    def state_dict(self) -> dict[str, Any]:
        """The histories as JSON types, exact after a JSON round trip. The settings are not in it."""
        return {"history": {prompt: list(rewards) for prompt, rewards in self._history.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the histories by those of ``state_dict``, of which the newest stay within this object's bounds.

        Raises ValueError if ``state`` is not what ``state_dict`` returns.
        """
        if not isinstance(state, dict) or not isinstance(state.get("history"), dict):
            raise ValueError(f"expected the result of PromptStatistics.state_dict(), got {state!r:.80}.")
        self._history = {
            prompt: deque(map(float, rewards), maxlen=self.buffer_size) for prompt, rewards in state["history"].items()
        }
        self._forget()

    def _forget(self) -> None:
        for prompt in list(self._history)[: max(0, len(self._history) - self.max_prompts)]:
            del self._history[prompt]
