"""What a run on images is made from: rewards, evaluation, prompts and pairs, checked; and the policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch

from diffusion_align.data.image_pairs import PairsConfig, PairSet, open_pairs
from diffusion_align.data.prompts import Prompt, PromptsConfig, load_prompts
from diffusion_align.diffusion.evaluation import ImageEvaluation
from diffusion_align.diffusion.pass_times import autocast, is_measured, measure_policy
from diffusion_align.diffusion.policy import DenoisingPolicy, check_family
from diffusion_align.diffusion.settings import DenoisingConfig, ImageEvaluationConfig
from diffusion_align.diffusion.trainer import DenoisingTrainer
from diffusion_align.methods import method_of
from diffusion_align.models import adapters
from diffusion_align.models.families import find_family
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.models.memory import split_decoding
from diffusion_align.models.model_ref import ModelRef, image_model_ref
from diffusion_align.pipelines.run import built, code_content, family_content, image_model_content, rows_content
from diffusion_align.references import module_of
from diffusion_align.rewards import build_reward, check_reward
from diffusion_align.rewards.image.clip import default_clip, load_clip
from diffusion_align.training.context import RunContext
from diffusion_align.training.digests import Identity
from diffusion_align.training.launch import (
    agreed,
    decide_precision,
    kept_sizes,
    measured,
    processes,
    run_accelerator,
    seed_generators,
)
from diffusion_align.training.progress import progress_bars


def image_context(config: DenoisingConfig, pipeline: Any = None) -> RunContext:
    """The context of a run on images.

    Args:
        config: checked settings.
        pipeline: a loaded diffusers pipeline; ``config.model`` is loaded when not given. A run continues from its
            final weights: its adapters are merged, and a new one is trained with those weights as the reference.
    """
    setting = {name: getattr(config, name, None) for name in ("pairs", "prompts", "reward", "reward_weights")}
    given, judged = setting["pairs"], config.evaluation
    pairs = None if given is None else agreed(lambda: _usable_pairs(given))
    prompts = _prompts(setting["prompts"])
    held_out_prompts = [] if judged is None else _prompts(judged.prompts)
    ref = image_model_ref(config.model)
    config = config.model_copy(update={"family": config.family or ref.family})
    if pipeline is None:
        pipeline = _load(config, ref)
    size = {"height": config.height, "width": config.width}
    config = kept_sizes(decide_precision(config))
    seed_generators(config)
    device = processes().device
    split_decoding(pipeline.vae, slices=config.vae_slicing, tiles=config.vae_tiling)
    policy = DenoisingPolicy(
        pipeline,
        lora=config.lora,
        needs_reference=config.needs_reference,
        guidance_scale=config.sampler.guidance_scale,
        negative_prompt=config.negative_prompt,
        **size,
        device=device,
        autocast=autocast(config.mixed_precision, device),
        gradient_checkpointing=config.gradient_checkpointing,
        offload_text_encoders=config.offload_text_encoders,
        attention=config.attention,
        channels_last=config.channels_last,
    )
    if any(size.values()):  # of one side diffusers' pipelines know nothing
        config = config.model_copy(update=dict(zip(size, policy.image_size)))
    config = config.decided_by(policy.pipeline.scheduler)
    known = prompts or [(text, {}) for text in (pairs.prompts if pairs else [])]
    identity: Identity = {"model": image_model_content(ref, config.base_config)}
    if config.family is not None:
        check_family(policy, config.family)
        identity["family"] = family_content(config.family)
    if prompts:
        identity["prompts"] = [rows_content(setting["prompts"], prompts)]
    if pairs is not None:
        identity["pairs"] = [rows_content(given, (pairs.identity(i) for i in range(len(pairs))))]
    reward = evaluation = None
    if (spec := setting["reward"]) is not None:
        weights = setting["reward_weights"]
        making = partial(_checked_reward, spec, ref.origin, policy, known, weights=weights)
        reward, identity["reward"] = built(spec, making)
    if judged is not None:
        making = partial(_evaluation, judged, ref.origin, policy, held_out_prompts or known)
        evaluation, content = built(judged.reward, making)
        identity["evaluation"] = [rows_content(judged.prompts or setting["prompts"], evaluation.prompts), *content]
    if ":" in str(config.sampler.name):
        identity["sampler"] = code_content([module_of(str(config.sampler.name), "sampler")])
    if is_measured(config):  # beside all that takes memory before it trains
        texts, count = [text for text, _ in known], processes().num_processes
        method, unmeasured = cast(type[DenoisingTrainer[Any]], method_of(config.method)), config
        config = measured(config, lambda: measure_policy(unmeasured, method, policy, texts, count))
    accelerator = run_accelerator(config)
    policy.autocast = accelerator.autocast
    return RunContext(
        config,
        accelerator,
        policy=policy,
        data={"prompts": prompts} | ({} if pairs is None else {"pairs": pairs}),
        reward=reward,
        evaluation=evaluation,
        identity=identity,
    )


def _load(config: DenoisingConfig, ref: ModelRef) -> Any:
    pipeline = load_pipeline(
        ref.base,
        dtype=getattr(torch, str(config.dtype)),
        variant=config.weights_variant or ref.variant,
        base_config=config.base_config or ref.base_config,
        family=find_family(config.family),
        upcast_vae=ref.settings.get("upcast_vae") if config.upcast_vae is None else config.upcast_vae,
        to_train=True,
        height=config.height,
        width=config.width,
        settings=config.family_settings,
    )
    for adapter in ref.adapters:
        adapters.load_lora(pipeline, adapter, ref.base)
        adapters.merge_adapters(pipeline)
    return pipeline


def _checked_reward(
    spec: Any, model: str, policy: DenoisingPolicy, prompts: Sequence[Prompt], *, weights: Sequence[float] | None = None
) -> Any:
    """The reward, or the weighted sum of several, called once with a dummy batch."""
    if isinstance(spec, list | tuple) or weights is not None:
        rewards = list(spec) if isinstance(spec, list | tuple) else [spec]
        spec = {"name": "combine", "rewards": rewards, "weights": weights}
    reward = build_reward(spec, model=model, device=policy.device)
    texts, metadata = zip(*prompts, strict=True)
    check_reward(reward, image_size=policy.image_size, device=policy.device, prompts=texts, metadata=metadata)
    return reward


def _prompts(setting: PromptsConfig | None) -> list[Prompt]:
    """The prompts that a setting names, of a Hub dataset too: read before any model is loaded."""
    return [] if setting is None else agreed(lambda: load_prompts(setting))


def _evaluation(
    settings: ImageEvaluationConfig, model: str, policy: DenoisingPolicy, prompts: Sequence[Prompt]
) -> ImageEvaluation:
    """The held-out reward and the distance of images of ``prompts``, ready."""
    embed = None
    if settings.diversity != "pixels":
        clip = default_clip(model) if settings.diversity == "clip" else settings.diversity
        embed = load_clip(clip, device=policy.device).embed_images
    reward = None if settings.reward is None else _checked_reward(settings.reward, model, policy, prompts)
    return ImageEvaluation(prompts, settings.samples, settings.every, reward, embed)


def _usable_pairs(settings: PairsConfig) -> PairSet:
    """The pairs, every image's file read before any model is loaded, and a line about what was left out."""
    pairs = open_pairs(settings)
    with progress_bars(transient=True, disable=not processes().is_main_process) as progress:
        bar = progress.add_task("reading images", total=len(pairs))
        pairs = pairs.check_images(lambda: progress.advance(bar))
        if pairs.ties or pairs.skipped:
            progress.console.print(pairs.left_out, highlight=False)
    return pairs
