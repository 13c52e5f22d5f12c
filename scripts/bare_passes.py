"""The network passes of an epoch, counted while it runs and then repeated alone: what an epoch costs at least.

Passes are counted inside ``with UNetPasses() as passes:`` (or ``LanguagePasses``).
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch


class UNetPasses:
    """Of a denoising policy: batch, whether with a gradient, whether of the reference."""

    def __enter__(self) -> UNetPasses:
        from diffusion_align.diffusion.policy import DenoisingPolicy

        self._passes: Counter[tuple[int, bool, bool]] = Counter()
        self._run = DenoisingPolicy._run

        def counted(policy: Any, x_t: torch.Tensor, *arguments: Any) -> torch.Tensor:
            self._passes[(len(x_t), torch.is_grad_enabled(), _is_reference(policy.network))] += 1
            return self._run(policy, x_t, *arguments)

        DenoisingPolicy._run = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        from diffusion_align.diffusion.policy import DenoisingPolicy

        DenoisingPolicy._run = self._run  # type: ignore[method-assign]

    trained_tokens = 0  # a denoising policy has none

    def clear(self) -> None:
        self._passes.clear()

    def seconds(self, trainer: Any) -> float:
        """For the same passes and nothing else."""
        policy = trainer.policy
        inputs = {batch: self._inputs(policy, batch) for batch, _, _ in self._passes}
        with _Stopwatch() as watch:
            for (batch, with_gradient, is_reference), count in self._passes.items():
                with policy.reference() if is_reference else contextlib.nullcontext():
                    for _ in range(count):
                        with torch.set_grad_enabled(with_gradient):
                            output = self._run(policy, *inputs[batch])
                        if with_gradient:
                            output.sum().backward()
        policy.network.zero_grad()
        return watch.seconds

    @staticmethod
    def _inputs(policy: Any, batch: int) -> tuple[Any, ...]:
        latents = torch.randn(batch, *policy.latent_shape, device=policy.device)
        return latents, torch.full((batch,), 500, device=policy.device), policy.encode(["a lion"] * batch)


class LanguagePasses:
    """Of a language policy: sampled completions, and scored ones."""

    def __enter__(self) -> LanguagePasses:
        import diffusion_align.llm.trainer as sampling
        from diffusion_align.llm.policy import LanguagePolicy

        self._sampled: list[tuple[int, int, int]] = []  # batch, prompt, steps
        self._scored: list[tuple[int, int, int, bool, bool]] = []  # batch, length, first place, gradient, reference
        self._rollout, self._score_method = rollout, score = sampling.rollout, LanguagePolicy.score

        def counted_rollout(policy: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
            found = rollout(policy, prompts, *arguments, **options)
            self._sampled.append((len(prompts), max(map(len, prompts)), found.logp_old.shape[1]))
            return found

        def counted_score(policy: Any, sequences: Any, **options: Any) -> Any:
            first, gradient = int(sequences.starts.min()) - 1, torch.is_grad_enabled()
            self._scored.append((*sequences.ids.shape, first, gradient, _is_reference(policy.model)))
            return score(policy, sequences, **options)

        sampling.rollout = counted_rollout
        LanguagePolicy.score = counted_score  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        import diffusion_align.llm.trainer as sampling
        from diffusion_align.llm.policy import LanguagePolicy

        sampling.rollout = self._rollout
        LanguagePolicy.score = self._score_method  # type: ignore[method-assign]

    @property
    def trained_tokens(self) -> int:
        """That went through a backward pass, padding too."""
        return sum(batch * length for batch, length, _, gradient, _ in self._scored if gradient)

    def clear(self) -> None:
        self._sampled.clear()
        self._scored.clear()

    def seconds(self, trainer: Any) -> float:
        """For the same passes and nothing else: no draws, no log-probs, no losses."""
        policy = trainer.policy
        with _Stopwatch() as watch, policy.autocast():
            for shape in self._sampled:
                self._sample(policy, *shape)
            for shape in self._scored:
                self._score(policy, *shape)
        policy.model.zero_grad()
        return watch.seconds

    @staticmethod
    @torch.no_grad()
    def _sample(policy: Any, batch: int, prompt: int, steps: int) -> None:
        ids, cache = torch.full((batch, prompt), 5, device=policy.device), None
        attention = torch.ones_like(ids)
        for _ in range(steps):
            output = policy.model(
                input_ids=ids, attention_mask=attention, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache, ids = output.past_key_values, ids[:, -1:]
            attention = torch.cat([attention, attention[:, :1]], 1)

    @staticmethod
    def _score(policy: Any, batch: int, length: int, first: int, gradient: bool, reference: bool) -> None:
        ids = torch.full((batch, length), 5, device=policy.device)
        places = torch.arange(first, length - 1, device=policy.device)
        with policy.reference() if reference else contextlib.nullcontext():
            with torch.set_grad_enabled(gradient):
                output = policy.model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=places
                )
            if gradient:
                output.logits.sum().backward()


@contextlib.contextmanager
def called_before_collecting(call: Callable[[Any], None]) -> Iterator[None]:
    """Inside, every trainer first tells ``call`` that an epoch begins."""
    from diffusion_align.training.trainer import Trainer

    classes: list[Any] = [Trainer]
    for parent in classes:  # grows while it is gone through
        classes += parent.__subclasses__()
    collects = {kind: kind.__dict__["collect"] for kind in classes[1:] if "collect" in kind.__dict__}

    def wrapped(collect: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def collect_after_call(trainer: Any) -> Any:
            call(trainer)
            return collect(trainer)

        return collect_after_call

    try:
        for kind, collect in collects.items():
            kind.collect = wrapped(collect)
        yield
    finally:
        for kind, collect in collects.items():
            kind.collect = collect


class _Stopwatch:
    """Seconds between entering and leaving, on a GPU too."""

    def __enter__(self) -> _Stopwatch:
        _synchronize()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        _synchronize()
        self.seconds = time.perf_counter() - self._start


def _is_reference(network: Any) -> bool:
    """Whether the adapter layers, if there are any, are switched off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((m for m in network.modules() if isinstance(m, BaseTunerLayer)), None)
    return layer is not None and layer.disable_adapters


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
