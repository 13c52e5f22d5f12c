"""ImageAlignmentPipeline: load a text-to-image model, align it, draw with it, save it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_align.diffusion.ddpo import DDPOConfig, DDPOTrainer
from diffusion_align.diffusion.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from diffusion_align.diffusion.evaluation import Evaluation
from diffusion_align.diffusion.loading import load_pipeline
from diffusion_align.diffusion.pairs import PairsConfig, PairSet, open_pairs
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.schedule import SamplerConfig
from diffusion_align.diffusion.settings import EvaluationConfig
from diffusion_align.pipelines.configuration import check_config, shipped_prompts
from diffusion_align.pipelines.machine import best_seconds, processes, start
from diffusion_align.rewards import build_reward, check_reward
from diffusion_align.rewards.clip import default_clip, load_clip
from diffusion_align.training.config import load_yaml
from diffusion_align.training.errors import UserError, first_line
from diffusion_align.training.progress import progress_bars
from diffusion_align.training.prompts import Prompt, load_prompts


@dataclass(frozen=True)
class DrawnImages:
    """What a call returns, as diffusers' pipelines do."""

    images: list[Image.Image]


class ImageAlignmentPipeline:
    """A diffusers text-to-image pipeline that can be aligned with a reward.

    Example:
        >>> pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd")
        >>> pipe.align(reward="aesthetic", prompts=["a red apple"], output_dir="runs/a", epochs=20)
        >>> pipe(["a red apple"], seed=0).images[0].save("apple.png")

    Attributes:
        pipeline: the diffusers pipeline; after ``align`` its UNet holds the trained weights.
        sampler: how ``__call__`` samples unless told otherwise; after ``align``, as in training.
    """

    def __init__(self, pipeline: Any, *, model: str, sampler: SamplerConfig | None = None) -> None:
        self.pipeline = pipeline
        self.model = model
        self.sampler = sampler or SamplerConfig(eta=0.0)
        self._policy: DenoisingPolicy | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        lora: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        variant: str | None = None,
        base_config: str | None = None,
    ) -> ImageAlignmentPipeline:
        """Load an embedded model ("emoji-sd"), a folder, a hub id or a ``.safetensors`` file.

        Args:
            model: Stable Diffusion 1.x, 2 or XL; or a run folder, whose model, final weights and sampler are used.
            lora: folder or file with LoRA weights to put on top, such as a run's ``final/``.
            dtype: of the weights.
            device: where to put it; a GPU if there is one.
            variant: weight files of a folder or hub id to choose, e.g. "fp16".
            base_config: for a model in one file, folder or hub id of a diffusers pipeline built like it.

        Raises:
            UserError: the model or the LoRA cannot be loaded.
        """
        sampler = SamplerConfig(steps=20, guidance_scale=2.0, eta=0.0) if str(model) == "emoji-sd" else None
        run_folder = Path(model).expanduser()
        if (run_folder / "config.yaml").is_file() and (run_folder / "final").is_dir():
            settings = load_yaml(run_folder / "config.yaml")
            sampler = SamplerConfig(**settings["sampler"])
            if settings["lora"]:
                model, lora = settings["model"], run_folder / "final"
                variant = variant or settings.get("weights_variant")
                base_config = base_config or settings.get("base_config")
            else:
                model = run_folder / "final"
        pipeline = load_pipeline(str(model), dtype=dtype, variant=variant, base_config=base_config)
        if lora is not None:
            if not Path(lora).expanduser().exists():
                raise UserError(f"lora={str(lora)!r}: there is no such file or folder")
            try:
                pipeline.load_lora_weights(str(Path(lora).expanduser()), adapter_name="default")
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise UserError(f"lora={str(lora)!r} could not be loaded into {model}: {first_line(error)}") from error
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(pipeline, model=str(model), sampler=sampler)

    def align(self, method: str = "ddpo", *, output_dir: str | Path, **settings: Any) -> ImageAlignmentPipeline:
        """Train towards a reward or preferences; afterwards this pipeline draws with the trained weights.

        Args:
            method: "ddpo", which needs a ``reward`` and ``prompts``, or "diffusion_dpo", which needs ``pairs`` or, to
                draw and judge its own, a ``reward`` and ``prompts``.
            output_dir: the run folder (see README for what it holds).
            **settings: fields of ``DDPOConfig`` or ``DiffusionDPOConfig``; the same names as in YAML. Among them

                - reward: a name, "module:function", a mapping with options, or a function
                  ``reward(images, prompts, metadata) -> (B,)``;
                - prompts: list of texts, file, or shipped list;
                - pairs: "emoji_style", a folder or file with pairs, or the id of a data set on the hub.

        Returns:
            This pipeline.

        Raises:
            ConfigError: everything that is wrong with the settings, before anything is trained.
            RewardError, TrainingError, Interrupted: see ``Trainer.train``.
        """
        raw = {"method": method, "model": self.model, "output_dir": output_dir}
        config = cast(ImageConfig, check_config(raw | settings))
        trainer = run(config, pipeline=self.pipeline)
        trainer.keep_average()
        self._policy = trainer.policy
        self.sampler = config.sampler
        return self

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        batch_size: int = 8,
    ) -> DrawnImages:
        """Draw one picture a prompt with diffusers' own sampler.

        Args:
            prompts: texts.
            seed: picture i uses ``seed + i``, whatever else is drawn.
            steps, guidance_scale, eta: instead of ``self.sampler``'s.
            batch_size: pictures drawn at once.

        Returns:
            An object whose ``.images`` is a list of PIL images.
        """
        from diffusers import DDIMScheduler, DDPMScheduler

        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        original = self.pipeline.scheduler
        most = original.config.num_train_timesteps
        if steps is not None and not 1 <= steps <= most:
            raise UserError(f"steps={steps} must lie between 1 and num_train_timesteps={most}")
        kind = DDPMScheduler if self.sampler.name == "ddpm" else DDIMScheduler
        self.pipeline.scheduler = kind.from_config({"clip_sample": False, **original.config})
        images: list[Image.Image] = []
        try:
            for start in range(0, len(texts), batch_size):
                some = texts[start : start + batch_size]
                images += self.pipeline(
                    some,
                    num_inference_steps=steps or self.sampler.steps,
                    guidance_scale=self.sampler.guidance_scale if guidance_scale is None else guidance_scale,
                    eta=self.sampler.eta if eta is None else eta,
                    generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(some))],
                ).images
        finally:
            self.pipeline.scheduler = original
        return DrawnImages(images)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], reward: Any) -> Tensor:
        """Scores (B,) of pictures by a reward."""
        function = build_reward(reward, model=self.model, device=self.pipeline.device)
        return score_images(function, images, prompts)

    def save_lora(self, folder: str | Path) -> None:
        """Write the adapter alone, for diffusers' ``load_lora_weights``."""
        if self._policy is None or self._policy.lora is None:
            raise UserError("there is no trained adapter to save: call align() with lora first")
        self._policy.save_lora(Path(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline with the adapter merged in, for diffusers' ``from_pretrained``."""
        adapted = bool(getattr(self.pipeline.unet, "peft_config", None))
        if not adapted:
            self.pipeline.save_pretrained(str(folder))
            return
        merged = _without_adapter(self.pipeline.unet)
        trained, self.pipeline.unet = self.pipeline.unet, merged
        try:
            self.pipeline.save_pretrained(str(folder))
        finally:
            self.pipeline.unet = trained


ImageConfig = DDPOConfig | DiffusionDPOConfig
ImageTrainer = DDPOTrainer | DiffusionDPOTrainer


def run(config: ImageConfig, *, pipeline: Any = None) -> ImageTrainer:
    """Train as ``config`` says and return the finished trainer.

    Args:
        config: checked settings, from ``read_config`` or ``check_config``.
        pipeline: a loaded diffusers pipeline; ``config.model`` is loaded when not given.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    pairs = _usable_pairs(config.pairs) if isinstance(config, DiffusionDPOConfig) and config.pairs else None
    if pipeline is None:
        pipeline = load_pipeline(
            config.model,
            dtype=getattr(torch, config.dtype),
            variant=config.weights_variant,
            base_config=config.base_config,
        )
    config, accelerator = start(config, lambda narrow: _seconds_a_pass(pipeline.unet, narrow))
    policy = DenoisingPolicy(
        pipeline,
        lora=config.lora,
        guidance_scale=config.sampler.guidance_scale,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )
    prompts = load_prompts(config.prompts, shipped=shipped_prompts()) if config.prompts is not None else []
    known = prompts or [(text, {}) for text in (pairs.prompts if pairs else [])]
    reward = _checked_reward(config.reward, config.model, policy, known, weights=config.reward_weights)
    evaluation = None if config.evaluation is None else _evaluation(config.evaluation, config.model, policy, known)
    trainer: ImageTrainer
    if isinstance(config, DDPOConfig):
        assert reward is not None
        trainer = DDPOTrainer(config, policy, reward, prompts, accelerator, evaluation=evaluation)
    else:
        trainer = DiffusionDPOTrainer(
            config,
            policy,
            pairs=pairs,
            reward=reward,
            prompts=prompts,
            evaluation=evaluation,
            accelerator=accelerator,
        )
    trainer.train()
    return trainer


def _checked_reward(
    spec: Any, model: str, policy: DenoisingPolicy, prompts: Sequence[Prompt], *, weights: Sequence[float] | None = None
) -> Any:
    """The reward, or the weighted sum of several, asked once about a dummy batch; None if there is none."""
    if spec is None:
        return None
    if isinstance(spec, list | tuple):
        spec = {"name": "combine", "rewards": list(spec), "weights": weights}
    reward = build_reward(spec, model=model, device=policy.device)
    texts, metadata = zip(*prompts, strict=True)
    check_reward(reward, image_size=policy.image_size, device=policy.device, prompts=texts, metadata=metadata)
    return reward


def _evaluation(settings: EvaluationConfig, model: str, policy: DenoisingPolicy, known: Sequence[Prompt]) -> Evaluation:
    """The gold reward and the distance of pictures, ready. ``known``: prompts where the settings name none."""
    prompts = known if settings.prompts is None else load_prompts(settings.prompts, shipped=shipped_prompts())
    embed = None
    if settings.diversity != "pixels":
        clip = default_clip(model) if settings.diversity == "clip" else settings.diversity
        embed = load_clip(clip, device=policy.device).embed_images
    gold = _checked_reward(settings.reward, model, policy, prompts)
    return Evaluation(prompts, settings.pictures, settings.every, gold, embed)


def _usable_pairs(settings: PairsConfig) -> PairSet:
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


def _seconds_a_pass(unet: Any, narrow: bool) -> float:
    """Of a forward pass of two samples."""
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.zeros(2, unet.config.in_channels, size, size, dtype=unet.dtype)
    timestep = torch.zeros(2, dtype=torch.int64)
    added = None
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}
    states = torch.zeros(2, 8, width, dtype=unet.dtype)
    return best_seconds(lambda: unet(latents, timestep, encoder_hidden_states=states, added_cond_kwargs=added), narrow)


def score_images(reward: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Scores (B,) of PIL pictures, which may differ in size."""
    from diffusion_align.rewards import call_reward

    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        scores.append(call_reward(reward, as_batch([image]), [prompt], [{}]))
    return torch.cat(scores)


def as_batch(images: Sequence[Image.Image]) -> Tensor:
    """Float (B, 3, H, W) in [0, 1] of PIL pictures of one size, as rewards take them."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 255


def _without_adapter(unet: torch.nn.Module) -> torch.nn.Module:
    """A copy of a UNet with its LoRA merged into the weights and no adapter layers left."""
    import copy

    from diffusers import UNet2DConditionModel
    from peft.tuners.lora import LoraLayer

    copied = copy.deepcopy(unet)
    for module in copied.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    plain = UNet2DConditionModel.from_config(unet.config).to(unet.dtype)
    merged = {name.replace(".base_layer.", "."): p for name, p in copied.state_dict().items() if ".lora_" not in name}
    plain.load_state_dict(merged)
    return plain.to(unet.device)
