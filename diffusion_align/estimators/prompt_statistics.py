"""Advantages against each prompt's own recent rewards (DDPO, arXiv:2305.13301, §5.2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_align.estimators.advantages import _checked_rewards, _like


def _standardised(rewards: Tensor, history: Tensor) -> Tensor:
    """``(rewards - mean) / std`` with the population mean and std of ``history``; 0 where that std is 0."""
    lowest = history.min()  # as in group advantages: equal rewards must leave a spread of exactly 0
    shifted = history - lowest
    std = shifted.std(correction=0)
    return torch.zeros_like(rewards) if std == 0 else (rewards - lowest - shifted.mean()) / std


class PromptStatistics:
    """Each prompt's last rewards, and advantages measured against them.

    Args:
        buffer_size: how many rewards a prompt keeps.
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
