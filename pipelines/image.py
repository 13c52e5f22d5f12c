"""ImageAlignmentPipeline: load a text-to-image model, align it, sample from it, save it."""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, cast, overload

import torch
from PIL import Image
from torch import Tensor

from diffusion_align.arguments import also_called
from diffusion_align.assets import EMBEDDED_PIPELINES
from diffusion_align.bounds import LARGEST_SIDE
from diffusion_align.data.prompts import check_image_prompts
from diffusion_align.diffusion.policy import finite_images
from diffusion_align.diffusion.rollout import normal_noise, scheduler_of
from diffusion_align.diffusion.sampler_settings import SamplerConfig
from diffusion_align.diffusion.settings import DenoisingConfig, negative_prompt_checks
from diffusion_align.errors import ConfigError, UserError, problems_of, short
from diffusion_align.inputs import check_device, check_path, default_device
from diffusion_align.methods import method_name, method_of
from diffusion_align.models import adapters
from diffusion_align.models.families import (
    ModelFamily,
    check_settings,
    family_name,
    family_of,
    find_family,
    give_family,
)
from diffusion_align.models.image_pipelines import load_pipeline, save_pipeline, takes_eta
from diffusion_align.models.lora import ADAPTER
from diffusion_align.models.memory import in_channels_last, keep_activations, split_decoding, text_encoders
from diffusion_align.models.model_card import LARGEST_ETA, OF_SAMPLES, facts_of, write_model_card
from diffusion_align.models.model_ref import check_image_model, image_model_ref
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.run import (
    LOADING,
    NOT_FROM_PIPE,
    NOT_LOADED,
    AlignmentPipeline,
    align_call,
    dtype_of,
    not_in_memory,
    not_uploaded,
    on_disk,
    run,
)
from diffusion_align.pipelines.scoring import ImageLike, score_images
from diffusion_align.report import image_grid, save_png
from diffusion_align.rewards import build_reward
from diffusion_align.training.places import absolute_paths, is_base_of_run
from diffusion_align.training.trainer import Trainer
from diffusion_align.writing import make_folder, new_folder, output_folder

if TYPE_CHECKING:
    from diffusion_align.pipelines import settings as typed
    from diffusion_align.pipelines.compare import Comparison

CALLING = {"prompt": "prompts", "num_inference_steps": "steps", "cfg_scale": "guidance_scale"}
NOT_CALLED = {
    "resolution": "give height and width",
    "generator": "give seed, of which image i uses seed + i",
    "num_images_per_prompt": "give a prompt once per image",
    "output_type": "images are PIL images, which numpy.asarray reads",
    "return_dict": "what is returned has .images",
}
NOT_LOADED_HERE = NOT_LOADED | {
    "custom_pipeline": "load the pipeline with diffusers and pass it to from_pipe",
    "scheduler": "set sampler after loading",
    **dict.fromkeys(("safety_checker", "requires_safety_checker", "feature_extractor"), "leave it out, none is loaded"),
    **dict.fromkeys(("gradient_checkpointing", "offload_text_encoders"), "give it to align"),
    "vae_slicing": "give it to align, or call .pipeline.vae.enable_slicing()",
    "vae_tiling": "give it to align, or call .pipeline.vae.enable_tiling()",
}


READS = ("max_sequence_length", "t5")
"""Settings that say how a model reads prompts."""


@dataclass(frozen=True)
class SampledImages:
    """What a call returns, as diffusers' pipelines do; notebooks show it as a grid.

    Attributes:
        images: what was sampled.
        prompts: of each of them.
    """

    images: list[Image.Image]
    prompts: list[str] = field(default_factory=list)

    def grid(self, columns: int | None = None) -> Image.Image:
        """One image of them all, the prompts beneath.

        Args:
            columns: images per row; nearly a square if not given.

        Raises:
            UserError: there are none, or ``columns`` is below 1.
        """
        try:
            return image_grid(self.images, captions=self.prompts or None, columns=columns)
        except ValueError as error:
            raise UserError(str(error)) from None

    def save(self, folder: str | Path) -> Path:
        """Write ``0000.png`` and so on, and ``grid.png`` of them all; returns the folder.

        Args:
            folder: made if it is not there; images of these names in it are replaced.

        Raises:
            UserError: there are no images, or they cannot be written.
        """
        target, grid = Path(os.path.expanduser(folder)), self.grid()
        make_folder(target, parents=True)
        for i, image in enumerate(self.images):
            save_png(image, target / f"{i:04d}.png")
        save_png(grid, target / "grid.png")
        return target

    def _repr_png_(self) -> bytes | None:
        return png_bytes(self.grid()) if self.images else None


DrawnImages = SampledImages  # the former name


class ImageAlignmentPipeline(AlignmentPipeline):
    """A diffusers text-to-image pipeline that can be aligned with a reward or preferences.

    Example:
        >>> pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd")
        >>> pipe.align(reward="aesthetic", prompts=["a red apple"], output_dir="runs/a", epochs=20)
        >>> pipe(["a red apple"], seed=0).images[0].save("apple.png")

    Attributes:
        pipeline: the diffusers pipeline; after ``align`` its UNet (or transformer) holds the trained weights.
        model: what lies under all adapters: an embedded name, a folder or a Hub id; None if that is not known.
        origin: what that was before anything was trained, by which rewards choose their CLIP.
        run: the run folder whose result this is, None if it is of no run.
        sampler: how ``__call__`` samples unless told otherwise; after ``align``, as in training.
        height, width: likewise, of the images in pixels; None for the model's own.
        negative_prompt: likewise, what guidance leads away from; None for no prompt.
    """

    inside = "pipeline"
    load_time = {  # noqa: RUF012
        "weights_variant": "variant",
        **{name: name for name in ("dtype", "base_config", "family", "upcast_vae", *READS)},
    }

    def __init__(self, pipeline: Any, *, model: str | None, sampler: SamplerConfig | None = None) -> None:
        """Wrap a diffusers pipeline; ``from_pretrained`` is the usual way.

        Args:
            pipeline: of Stable Diffusion 1.x, 2, XL, 3 or 3.5, of FLUX.1 or Z-Image, or of a family of your own.
            model: what it was loaded from; None if it is in no folder.
            sampler: how to sample; 50 deterministic steps with guidance 5, or with none where the model takes none, if
                not given.
        """
        self.pipeline = pipeline
        self.model = model
        self.sampler = sampler or SamplerConfig(eta=0.0)
        if sampler is None and problems_of(self._check_guidance, self.sampler.guidance_scale, None):
            self.sampler = SamplerConfig(eta=0.0, guidance_scale=1.0)
        self.height: int | None = None
        self.width: int | None = None
        self.negative_prompt: str | None = None
        self.origin = model
        # Called so in a configuration, None if in no folder: the weights without their adapter, and as they are.
        self._below = self._called = model
        self._trains = False  # whether peft's ADAPTER is one that ``align`` trains further, and not part of the weights
        self._variant: str | None = None
        self._base_config: str | None = None
        self._family: str | None = None
        self._upcast_vae: bool | None = None
        self._reads: dict[str, Any] = {}

    @property
    def _about(self) -> tuple[str | None, bool]:
        return self.model, bool(adapters.adapted_parts(self.pipeline))

    @property
    def _others(self) -> bool:
        """Whether it carries adapters that belong to its weights, as diffusers' ``load_lora_weights`` puts them on."""
        return bool(adapters.adapter_names(self.pipeline) - ({ADAPTER} if self._trains else set()))

    @classmethod
    @also_called(LOADING, NOT_LOADED_HERE)
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        lora: str | Path | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: str | torch.device | None = None,
        variant: str | None = None,
        base_config: str | None = None,
        family: str | type[ModelFamily] | None = None,
        upcast_vae: bool | None = None,
        max_sequence_length: int | None = None,
        t5: bool | None = None,
    ) -> ImageAlignmentPipeline:
        """Load an embedded model ("emoji-sd", "emoji-flow"), a folder, a Hub id, a ``.safetensors`` file, or a run.

        Args:
            model: Stable Diffusion 1.x, 2, XL, 3 or 3.5, FLUX.1 or Z-Image; or a run folder, whose model, final
                weights, sampler, size of images and negative prompt are used.
            lora: folder or file with LoRA weights to put on top, such as a run's ``final/``.
            dtype: of the weights; torch's, or its name.
            device: where to put it; a GPU if there is one.
            variant: weight files of a folder or Hub id to choose, e.g. "fp16"; those of the run, of a run folder, if
                not given.
            base_config: for a model in one file, folder or Hub id of a diffusers pipeline built like it; that of the
                run, of a run folder, if not given.
            family: for a model of no shipped family, a model family of your own: the class, or where it is
                found, "module:Class" or "file.py:Class"; that of the run, of a run folder, if not given.
            upcast_vae: float32 for the VAE, whatever ``dtype``; as the run, of a run folder, or as the VAE's
                configuration says if not given.
            max_sequence_length: tokens of a prompt for T5 or Qwen3, in models that have one; as the run, of a run
                folder, or as the pipeline by default if not given.
            t5: False loads Stable Diffusion 3 without its T5; as the run, of a run folder, if not given.

        Raises:
            UserError: the model or the LoRA cannot be loaded.
        """
        check_device(device, f"device={str(device)!r}")
        ref = image_model_ref(str(model))
        variant = ref.variant if variant is None else variant
        base_config = ref.base_config if base_config is None else base_config
        family = ref.family if family is None else family
        upcast_vae = ref.settings.get("upcast_vae") if upcast_vae is None else upcast_vae
        options: Any = {"variant": variant, "base_config": base_config, "family": find_family(family)}
        options["upcast_vae"] = upcast_vae
        given = {"max_sequence_length": max_sequence_length, "t5": t5}
        reads = {name: ref.settings.get(name) if given[name] is None else given[name] for name in READS}
        options["settings"] = reads = {name: value for name, value in reads.items() if value is not None}
        pipeline = load_pipeline(ref.base, dtype=dtype_of(dtype), **options)
        stack = [*ref.adapters, *([lora] if lora is not None else [])]
        for i, adapter in enumerate(stack):
            adapters.load_lora(pipeline, adapter, ref.base)
            if i < len(stack) - 1:
                adapters.merge_adapters(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device or default_device())
        sampler = SamplerConfig(steps=20, guidance_scale=2.0, eta=0.0) if ref.base in EMBEDDED_PIPELINES else None
        if ref.run is not None:
            sampler = SamplerConfig(**(ref.settings.get("sampler") or {})).preview
        pipe = cls(pipeline, model=ref.base, sampler=sampler)
        for name in OF_SAMPLES:
            setattr(pipe, name, ref.settings.get(name))
        pipe.origin = ref.origin
        pipe.run = ref.run if lora is None else None
        pipe._called = str(model) if lora is None else None
        pipe._below = ref.below if lora is None else str(model)
        pipe._trains = bool(stack)
        pipe._variant, pipe._base_config, pipe._family = variant, base_config, family_name(family)
        pipe._upcast_vae, pipe._reads = upcast_vae, reads
        slices, tiles = (bool(ref.settings.get(name)) for name in ("vae_slicing", "vae_tiling"))
        split_decoding(pipeline.vae, slices=slices, tiles=tiles)
        return pipe

    @classmethod
    @also_called({}, NOT_FROM_PIPE | {"upcast_vae": "load its VAE in the dtype that you want"})
    def from_pipe(
        cls,
        pipeline: Any,
        *,
        model: str | Path | None = None,
        sampler: SamplerConfig | None = None,
        family: str | type[ModelFamily] | None = None,
    ) -> ImageAlignmentPipeline:
        """Align a diffusers pipeline that is loaded already.

        LoRA weights that it carries, active and at their scales, belong to it: it samples with them, and ``align``
        starts from them merged, which is its reference. Weights that are in no folder, such as these, are written to
        ``base/`` of the run folder, which ``config.yaml`` then names. Weights changed in any other way are not noticed:
        save and load such a pipeline first.

        Args:
            pipeline: of Stable Diffusion 1.x, 2, XL, 3 or 3.5, of FLUX.1 or Z-Image, or of ``family``.
            model: the folder or Hub id that it was loaded from, which ``config.yaml`` and cards name; its own if not
                given.
            sampler: how to sample; 50 deterministic steps with guidance 5 if not given.
            family: as of ``from_pretrained``.

        Raises:
            UserError: it is another kind of pipeline, or ``model`` is none.
        """
        give_family(pipeline, find_family(family))
        name = str(model or pipeline.config.get("_name_or_path") or "")
        problems = problems_of(lambda: check_image_model(name, family=family_name(family)))
        if problems and model is not None:
            raise ConfigError(problems)
        pipe = cls(pipeline, model=None if problems else name, sampler=sampler)
        pipe.origin = image_model_ref(name).origin if name else None
        pipe._family = family_name(family)
        upcast = pipeline.vae.dtype == torch.float32
        pipe._upcast_vae = None if upcast == pipeline.vae.config.force_upcast else upcast
        if getattr(pipeline, "num_fused_loras", 0):
            pipe._below = pipe._called = None
        return pipe

    @overload
    def align(
        self, method: typed.DDPO = ..., *, output_dir: str | Path, **settings: Unpack[typed.DDPOSettings]
    ) -> Self: ...

    @overload
    def align(
        self, method: typed.DiffusionDPO, *, output_dir: str | Path, **settings: Unpack[typed.DiffusionDPOSettings]
    ) -> Self: ...

    @overload
    def align(
        self, method: typed.Forward, *, output_dir: str | Path, **settings: Unpack[typed.ForwardSettings]
    ) -> Self: ...

    @overload
    def align(self, method: typed.RWR, *, output_dir: str | Path, **settings: Unpack[typed.RWRSettings]) -> Self: ...

    @overload
    def align(
        self, method: typed.RewardGradient, *, output_dir: str | Path, **settings: Unpack[typed.RewardGradientSettings]
    ) -> Self: ...

    @overload
    def align(self, method: type[Trainer[Any]], *, output_dir: str | Path, **settings: Any) -> Self: ...

    def align(self, method: str | type[Trainer[Any]] = "ddpo", *, output_dir: str | Path, **settings: Any) -> Self:
        """Train towards a reward or preferences; afterwards this pipeline samples with the trained weights.

        Training and the reference start from the current weights: adapters on them are merged into a copy, and a new
        adapter is trained. Two exceptions: ``resume=True`` with this pipeline's own LoRA run resumes that run
        with its reference; and an adapter given as ``lora`` to ``from_pretrained`` is itself trained further, with
        the model without it as the reference.

        Args:
            method: a name that ``diffusion-align list methods`` shows. "diffusion_dpo" needs ``pairs`` or, to sample
                and judge its own, a ``reward`` and ``prompts``, as the others do. A trainer of your own is its class,
                or where that is found, "module:Class" or "file.py:Class".
            output_dir: the run folder (see README for what it holds).
            **settings: fields of the method's configuration; the same names as in YAML. Among them

                - reward: a name, "module:function", a mapping with options, or a function
                  ``reward(images, prompts, metadata) -> (B,)``;
                - prompts: list of texts, file, or shipped list; a generator, ``datasets.Dataset`` or pandas DataFrame;
                  or a function that returns a prompt or (prompt, metadata), called ahead, see ``rows_of_calls``;
                - pairs: "emoji_style", a folder or file with pairs, or the id of a dataset on the Hub; or rows, as for
                  prompts, with PIL images;
                - callbacks: ``Callback`` objects, called during the run, or where they are found, as in YAML;
                - resume: continue the run in ``output_dir`` from its newest checkpoint.

        Returns:
            This pipeline, whose ``run`` is the run folder from now on.

        Raises:
            ConfigError: everything that is wrong with the settings, before anything is trained.
            RewardError, TrainingError, Interrupted: see ``Trainer.train``; the pipeline then samples as it did before.
        """
        method_of(method, "image")
        self._refuse_load_time(settings)
        check_path(output_dir, f"output_dir={short(str(output_dir))}", to="writable")
        folder = Path(output_dir).expanduser()
        resumes = self._made(folder) and settings.get("resume") is True
        given = adapters.adapted_parts(self.pipeline)
        as_they_are = self._others or (self.run is not None and not resumes)
        below = None if self._others else self._called if as_they_are else self._below
        if (resumes and not given) or (below is None and settings.get("resume") is True and folder.exists()):
            raise not_in_memory(folder)
        # The model is here already: what has to be right about it is its name in the run's config.yaml.
        named = self.model or EMBEDDED_PIPELINES[0]
        raw: dict[str, Any] = {"method": method_name(method), "model": named, "output_dir": output_dir}
        raw |= {"weights_variant": self._variant, "base_config": self._base_config, "upcast_vae": self._upcast_vae}
        raw |= {"family": self._family if self.model else None, **self._reads}
        if settings.get("lora", {}) is not None:
            raw["dtype"] = str(adapters.frozen_dtype(self.pipeline)).removeprefix("torch.")
        found = absolute_paths({"family": self._family})
        config = cast(DenoisingConfig, check_config(raw | settings).model_copy(update=found))

        trained = family_of(self.pipeline).network
        before = given if as_they_are else {}
        weights = {} if before else adapters.adapter_weights(self.pipeline)
        before = before | ({trained: getattr(self.pipeline, trained)} if config.lora is None else {})
        device = self.pipeline.device
        for name, network in before.items():
            setattr(self.pipeline, name, copy.deepcopy(network))
            network.to("cpu")  # where it waits in case that training breaks off
        vae, attention = self.pipeline.vae, getattr(getattr(self.pipeline, trained), "attn_processors", None)
        decoding = {"slices": vae.use_slicing, "tiles": vae.use_tiling}
        failed = False
        reordered = config.channels_last and not in_channels_last(vae)
        try:
            if as_they_are:
                adapters.merge_adapters(self.pipeline)
            if config.lora is None or not config.lora.text_encoder:
                _refuse_other_parts(self.pipeline)
            with on_disk(config, below, self._write, without=("weights_variant", "base_config")) as config:
                trainer = run(config, pipeline=self.pipeline, started=align_call(config))
        except BaseException:
            for name, network in before.items():
                setattr(self.pipeline, name, network)
                with suppress(torch.OutOfMemoryError):  # the first failure is raised; this stays where it waited
                    network.to(device)
            adapters.restore_lora(self.pipeline, weights, untouched=before)
            split_decoding(vae, **decoding)
            failed = True
            raise
        finally:
            if config.gradient_checkpointing:
                for part in (getattr(self.pipeline, trained), vae, *text_encoders(self.pipeline)):
                    keep_activations(part)
            if config.attention != "auto" and attention:  # "auto" would take it over into the next run
                getattr(self.pipeline, trained).set_attn_processor(attention)
            for part in (getattr(self.pipeline, trained), vae) if reordered else ():
                part.to(memory_format=torch.contiguous_format)
            with suppress(torch.OutOfMemoryError) if failed else nullcontext():
                for encoder in text_encoders(self.pipeline):
                    encoder.to(getattr(self.pipeline, trained).device)
        trainer.optimization.load_ema_weights()
        self.sampler = config.decided_by(self.pipeline.scheduler).sampler.preview
        self.run, self._called = config.output_dir, str(config.output_dir)
        for name in OF_SAMPLES:
            setattr(self, name, getattr(trainer.config, name))
        self._below = (below or str(config.model)) if config.lora else str(config.output_dir)
        self._trains = True
        return self

    @also_called(CALLING, NOT_CALLED)
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
    ) -> SampledImages:
        """Sample one image per prompt by diffusers' own call.

        Args:
            prompts: texts.
            seed: image i uses ``seed + i``, whatever else is sampled.
            steps, guidance_scale, eta: instead of ``self.sampler``'s.
            negative_prompt: what guidance leads away from, for all images; ``self.negative_prompt`` if not given.
            height, width: of the images in pixels; ``self.height`` and ``self.width`` if not given.
            batch_size: images sampled at once.

        Returns:
            An object whose ``.images`` is a list of PIL images.

        Raises:
            UserError: a number is out of range or not possible with this model, there is a negative prompt without
                guidance, or the images are not finite.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_image_prompts(texts)
        original = self.pipeline.scheduler
        most = original.config.num_train_timesteps
        if steps is not None and not (isinstance(steps, int) and 1 <= steps <= most):
            raise UserError(f"steps={steps} must lie between 1 and num_train_timesteps={most}, a whole number")
        if eta is not None and not 0 <= eta <= 1:
            raise UserError(f"eta={eta} must lie between 0 and 1")
        if eta is not None and self.sampler.noise_setting != "eta":
            raise UserError(self.sampler.no_eta(eta))
        if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
            raise UserError(f"guidance_scale={guidance_scale} must be a number from 0")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        scale = self.sampler.guidance_scale if guidance_scale is None else guidance_scale
        if problems := list(negative_prompt_checks(negative_prompt, scale)):
            raise ConfigError(problems)
        away = self.negative_prompt if negative_prompt is None else negative_prompt
        self._check_guidance(scale, away)
        size = self._size(height, width)
        chosen = {"steps": steps or self.sampler.steps, "eta": self.sampler.eta if eta is None else eta}
        self.pipeline.scheduler = scheduler_of(self.sampler.model_copy(update=chosen), original)
        images: list[Image.Image] = []
        try:
            for start in range(0, len(texts), batch_size):
                some = texts[start : start + batch_size]
                generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
                if hasattr(self.pipeline.scheduler, "noise"):
                    self.pipeline.scheduler.noise = self._noise_of(generators, size)
                with finite_images(self.pipeline):
                    images += self.pipeline(
                        some,
                        num_inference_steps=chosen["steps"],
                        **family_of(self.pipeline).call_guidance(scale),
                        **({} if away is None else {"negative_prompt": [away] * len(some)}),
                        **size,
                        **({"eta": min(chosen["eta"], LARGEST_ETA)} if takes_eta(self.pipeline) else {}),
                        generator=generators,
                        **family_of(self.pipeline).call_options,
                    ).images
        finally:
            self.pipeline.scheduler = original
        return SampledImages(images, texts)

    def _check_guidance(self, scale: float, negative_prompt: str | None) -> None:
        family = family_of(self.pipeline)
        settings = {"guidance_scale": scale, "negative_prompt": negative_prompt}
        check_settings(family, getattr(self.pipeline, family.network).config, settings)

    def _noise_of(self, generators: list[torch.Generator], size: Mapping[str, int]) -> Callable[[Tensor], Tensor]:
        """What a scheduler of flow matching takes its noise from, in the order of a rollout."""
        family = family_of(self.pipeline)
        config = getattr(self.pipeline, family.network).config
        shape = family.latent_shape(config, family.latent_size(config, self.pipeline.vae.config, **size))
        return lambda latents: family.as_in_pipeline(normal_noise(generators, shape, latents.device))

    def _size(self, height: int | None, width: int | None) -> dict[str, int]:
        """``height`` and ``width`` of the pipeline's own call, both if one is given here or by ``self``: some pipelines
        ignore one without the other.

        Raises:
            UserError: one is not a possible side of this model's images.
        """
        sides = {"height": self.height if height is None else height, "width": self.width if width is None else width}
        for name, side in sides.items():
            if side is not None and not (isinstance(side, int) and 8 <= side <= LARGEST_SIDE):
                raise UserError(f"{name}={short(side)} must be a whole number of pixels from 8 to {LARGEST_SIDE}")
        if not any(sides.values()):
            return {}
        family, vae = family_of(self.pipeline), self.pipeline.vae.config
        latent_size = family.latent_size(getattr(self.pipeline, family.network).config, vae, **sides)
        return {name: side * family.vae_factor(vae) for name, side in zip(sides, latent_size)}

    def compare(
        self,
        other: str | Path | ImageAlignmentPipeline,
        prompts: Sequence[str],
        judge: Any,
        *,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
        per_prompt: int = 1,
        output: str | Path | None = None,
    ) -> Comparison:
        """Sample the same prompts from the same noise by another model and by this one, and let a reward judge.

        Args:
            other: a pipeline, or what ``from_pretrained`` takes: A of the result, and this pipeline is B.
            prompts: texts.
            judge: a reward, as for ``align``.
            metadata: mappings, one for each prompt, for a judge that reads them.
            seed: of the first image; the i-th of each uses ``seed + i``.
            per_prompt: images per prompt.
            output: file to write the first images to, side by side.

        Returns:
            Mean scores, how often this pipeline wins with its 95 % interval, and the image a notebook shows.
        """
        from diffusion_align.pipelines.compare import compare_models

        path = None if output is None else Path(output).expanduser()
        return compare_models(
            other,
            self,
            prompts,
            judge,
            metadata=metadata,
            seed=seed,
            output=path,
            per_prompt=per_prompt,
            family=self._family,
        )

    def score(
        self,
        images: Sequence[ImageLike] | Tensor,
        prompts: Sequence[str],
        reward: Any,
        *,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor:
        """Scores (B,) of images by a reward.

        Args:
            images: B PIL images, float tensors (3, H, W) in [0, 1] or uint8 arrays (H, W, 3); sizes may differ.
            prompts: B texts.
            reward: as for ``align``.
            metadata: B mappings for a reward that reads them.

        Raises:
            UserError: the counts differ, or something is no image.
            RewardError: the reward cannot be built, or cannot score them.
        """
        function = build_reward(reward, model=self.origin, device=self.pipeline.device)
        return score_images(function, images, prompts, metadata)

    def merge(self) -> ImageAlignmentPipeline:
        """Add the adapter to the weights, in memory, and return this pipeline.

        Sampling is faster then, and ``save_lora`` has nothing to write any more. Without an adapter nothing happens.
        """
        if adapters.adapted_parts(self.pipeline):
            self._called = None if self._others else self._called
            adapters.merge_adapters(self.pipeline)
            self._below = self._called
        return self

    def save_lora(self, folder: str | Path) -> None:
        """Write the adapter alone, for diffusers' ``load_lora_weights``.

        Args:
            folder: made if it is not there.

        Raises:
            UserError: there is no adapter, or ``folder`` is a file.
        """
        if self._others or family_of(self.pipeline).network not in adapters.adapted_parts(self.pipeline):
            raise UserError("there is no trained adapter to save: call align() with lora first")
        with new_folder(output_folder(folder)) as temporary:
            adapters.save_lora(self.pipeline, temporary)

    def _save_merged(self, folder: Path) -> None:
        with adapters.merged(self.pipeline):
            self._write(folder)

    def _write(self, folder: Path) -> None:
        with new_folder(folder) as temporary:
            save_pipeline(self.pipeline, temporary)

    def _save_adapter(self, folder: Path) -> None:
        if self._others or family_of(self.pipeline).network not in adapters.adapted_parts(self.pipeline):
            raise not_uploaded("there is no adapter to upload")
        if not hasattr(self.pipeline, "load_lora_weights"):
            kind = type(self.pipeline).__name__
            raise not_uploaded(f"diffusers loads no LoRA for a {kind}")
        if self._below != self.model or is_base_of_run(str(self._below)):
            raise not_uploaded(f"the adapter's base model {self._below} is not on the Hub")
        self.save_lora(folder)

    def _write_card(self, target: Path, *, location: str, merged: bool) -> None:
        if self.run is not None and self._called is not None and not self._others:
            weights = "best" if Path(self._called).expanduser() == self.run / "best" else "final"
            write_model_card(
                self.run, target, weights=weights, location=location, merged=merged, pipeline=facts_of(self.pipeline)
            )


def sampling_problems(
    model: str,
    *,
    family: str | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
) -> list[str]:
    """Sentences about what is wrong with a model and the arguments of its call, as far as shows without loading it."""
    return [
        *problems_of(check_image_model, model, family=family, height=height, width=width, to_train=False),
        *negative_prompt_checks(negative_prompt, guidance_scale),
    ]


def _refuse_other_parts(pipeline: Any) -> None:
    """Of a run that trains the adapter of the network alone, a LoRA on a text encoder would be no part."""
    family = family_of(pipeline)
    others = sorted(adapters.adapted_parts(pipeline).keys() - {family.network})
    if others:
        raise UserError(
            f"the lora also changes {', '.join(others)}, which the adapter of a {family.network_title} cannot hold: "
            "merge() it first, or set lora.text_encoder=true to train it further"
        )


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
