"""What a run on pictures needs before it starts: rewards, evaluation and pairs, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_align.data.image_pairs import PairsConfig, PairSet, open_pairs
from diffusion_align.data.prompts import Prompt, PromptsConfig, load_prompts
from diffusion_align.diffusion.evaluation import Evaluation
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.settings import EvaluationConfig
from diffusion_align.rewards import build_reward, check_reward
from diffusion_align.rewards.clip import default_clip, load_clip
from diffusion_align.training.accelerator import agreed, processes
from diffusion_align.training.progress import progress_bars


def checked_reward(
    spec: Any, model: str, policy: DenoisingPolicy, prompts: Sequence[Prompt], *, weights: Sequence[float] | None = None
) -> Any:
    """The reward, or the weighted sum of several, asked once about a dummy batch; None if there is none."""
    if spec is None:
        return None
    if isinstance(spec, list | tuple) or weights is not None:
        rewards = list(spec) if isinstance(spec, list | tuple) else [spec]
        spec = {"name": "combine", "rewards": rewards, "weights": weights}
    reward = build_reward(spec, model=model, device=policy.device)
    texts, metadata = zip(*prompts, strict=True)
    check_reward(reward, image_size=policy.image_size, device=policy.device, prompts=texts, metadata=metadata)
    return reward


def prompts_of(setting: PromptsConfig | None) -> list[Prompt]:
    """The prompts that a setting names, of a Hub dataset too: read before any model is loaded."""
    return [] if setting is None else agreed(lambda: load_prompts(setting))


def evaluation_of(
    settings: EvaluationConfig, model: str, policy: DenoisingPolicy, prompts: Sequence[Prompt]
) -> Evaluation:
    """The gold reward and the distance of images of ``prompts``, ready."""
    embed = None
    if settings.diversity != "pixels":
        clip = default_clip(model) if settings.diversity == "clip" else settings.diversity
        embed = load_clip(clip, device=policy.device).embed_images
    gold = checked_reward(settings.reward, model, policy, prompts)
    return Evaluation(prompts, settings.pictures, settings.every, gold, embed)


def usable_pairs(settings: PairsConfig) -> PairSet:
    """The pairs, every picture looked at before any model is loaded, and a line about what was left out."""
    pairs = open_pairs(settings)
    with progress_bars(transient=True, disable=not processes().is_main_process) as progress:
        bar = progress.add_task("reading pictures", total=len(pairs))
        pairs = pairs.check_pictures(lambda: progress.advance(bar))
        if pairs.ties or pairs.skipped:
            rows = ", ".join(map(str, list(pairs.skipped)[:10])) + (" ..." if len(pairs.skipped) > 10 else "")
            progress.console.print(
                f"{len(pairs)} pairs; left out: {pairs.ties} ties, {len(pairs.skipped)} bad rows"
                + (f" ({rows})" if rows else ""),
                highlight=False,
            )
    return pairs
