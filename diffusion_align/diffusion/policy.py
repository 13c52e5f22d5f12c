"""A denoising policy: the UNet of a diffusers pipeline with guidance, LoRA (or full) training and a reference.

Nothing here knows an algorithm. A pipeline family differs from another only in how it encodes prompts
(``_encode_sd``, ``_encode_sdxl``); everything else is shared.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffusion_align.bounds import HIGHEST_RANK, MOST
from diffusion_align.errors import TrainingError, UserError
from diffusion_align.models.image_pipelines import unet_problem
from diffusion_align.models.lora import adapter_layers, add_lora, carries_adapters, rescale_lora, switched_off
from diffusion_align.models.lora_file import save_lora
from diffusion_align.training.config import Section
from diffusion_align.training.finite import all_finite

Conditioning = dict[str, Tensor]
"""UNet keyword -> (B, ...): ``encoder_hidden_states`` and, for SDXL, ``text_embeds`` and ``time_ids``."""

ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTION_LAYERS = ["conv1", "conv2"]
CACHED_PROMPTS = 2048
"""Embeddings of so many prompts are kept; beyond that they are made again."""


class LoRAConfig(Section):
    """Low-rank adapters on the UNet."""

    rank: int = Field(8, ge=1, le=HIGHEST_RANK, description="rank of every adapter")
    alpha: int | None = Field(None, ge=1, le=MOST, description="scale is alpha / rank; the rank itself when not given")
    layers: Literal["attention", "attention+convolutions"] = Field(
        "attention", description="small models need the convolutions of the residual blocks as well"
    )


class DenoisingPolicy:
    """pi(x_s | x_t, c) of a Stable Diffusion pipeline; log-probs come from ``rollout`` and ``replay``.

    Args:
        pipeline: a ``StableDiffusionPipeline`` (SD1.x, SD2) or ``StableDiffusionXLPipeline``. Text encoders and VAE
            are frozen; on a CPU the UNet gets eager attention, whose backward pass is faster there. What is frozen
            keeps its dtype, what is trained becomes float32.
        lora: adapters to train; None trains the whole UNet and keeps a frozen copy as the reference.
        guidance_scale: classifier-free guidance in sampling *and* training; 1 switches it off (half the work).
        autocast: context in which the network runs; decisions stay float32.

    Raises:
        UserError: a pipeline class that is not supported, or a network that is not text-to-image.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        lora: LoRAConfig | None,
        guidance_scale: float = 1.0,
        device: torch.device | str = "cpu",
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        family = type(pipeline).__name__
        if family not in _ENCODERS:
            raise UserError(f"{family} is not supported: use one of {', '.join(_ENCODERS)}")
        if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
            raise UserError("this UNet takes more than the latent (inpainting?): use a text-to-image checkpoint")
        if problem := unet_problem("the model", family, pipeline.unet.config):
            raise UserError(problem)
        adapted = _check_adapter(pipeline.unet, lora)
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.device = torch.device(device)
        self.guidance_scale = guidance_scale
        self.autocast = autocast
        self.lora = lora
        self._encode = _ENCODERS[family]
        self._prompt_cache: dict[str, Conditioning] = {}
        for part in _networks(pipeline):
            part.to(self.device).requires_grad_(False).eval()
        if self.device.type == "cpu":
            from diffusers.models.attention_processor import AttnProcessor

            pipeline.unet.set_attn_processor(AttnProcessor())
        self._frozen_unet: nn.Module | None = None
        if lora is None:
            # What is trained is float32, and its reference has to round as it does.
            self._frozen_unet = copy.deepcopy(pipeline.unet.float())
            pipeline.unet.requires_grad_(True)
        elif not adapted:
            add_lora(pipeline.unet, peft_config(lora))
            pipeline.unet.eval()  # the new layers as well
        self._adapter_layers = adapter_layers(pipeline.unet)
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        if lora is not None and adapted:
            # Files hold a scale of 1; the settings say at which scale it is trained.
            rescale_lora(pipeline.unet, peft_config(lora).lora_alpha)

    @property
    def unet(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is trained: the adapters, or the whole UNet."""
        named = self.pipeline.unet.named_parameters()
        return {name: p for name, p in named if self.lora is None or ".lora_" in name}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the model's own resolution."""
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what ``decode`` returns."""
        return tuple(side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])  # type: ignore[return-value]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the UNet is conditioned on, (B, ...); each different prompt goes through the text encoders once."""
        cached = {p: self._prompt_cache[p] for p in prompts if p in self._prompt_cache}
        missing = [p for p in dict.fromkeys(prompts) if p not in cached]
        if len(self._prompt_cache) + len(missing) > CACHED_PROMPTS:
            self._prompt_cache.clear()
        cached |= {p: self._encode(self, p) for p in missing}  # SDXL's empty prompt comes back to this method
        self._prompt_cache |= cached
        rows = [cached[p] for p in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def predict(
        self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning, *, guidance_scale: float | None = None
    ) -> Tensor:
        """The guided network output (B, C, H, W), float32 or wider: uncond + guidance_scale * (cond - uncond).

        Args:
            x_t: (B, C, H, W).
            timestep: (B,) int64, the model's own time.
            conditioning: of the same B samples, from ``encode``.
            guidance_scale: the policy's own when not given.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if scale == 1:
            return self._run_unet(x_t, timestep, conditioning)
        unconditional = self.encode([""])
        both = {k: torch.cat([unconditional[k].expand(len(x_t), *v.shape[1:]), v]) for k, v in conditioning.items()}
        output = self._run_unet(torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), both)
        without, with_prompt = output.chunk(2)
        return without + scale * (with_prompt - without)

    def _run_unet(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        unet = self.pipeline.unet
        added = {k: v for k, v in conditioning.items() if k != "encoder_hidden_states"}
        with self.autocast():
            output = unet(
                x_t.to(unet.dtype),
                timestep,
                encoder_hidden_states=conditioning["encoder_hidden_states"].to(unet.dtype),
                added_cond_kwargs=added or None,
                return_dict=False,
            )[0]
        return output.to(torch.promote_types(output.dtype, torch.float32))

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, ``predict`` is the reference policy: the adapter switched off, or the frozen copy."""
        trained = self.pipeline.unet
        with switched_off(self._adapter_layers):
            self.pipeline.unet = trained if self._frozen_unet is None else self._frozen_unet
            try:
                yield
            finally:
                self.pipeline.unet = trained

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], float32, from x_0 latents (B, C, H, W).

        Raises:
            TrainingError: latents or pictures are not finite; a clamp would make them black or white.
        """
        vae = self.pipeline.vae
        shift, scale = self._vae_shift_and_scale(latents)
        images = vae.decode((latents * scale + shift).to(vae.dtype), return_dict=False)[0]
        if problem := overflow_problem(self.pipeline, *all_finite(latents, images), autocast=self.autocast):
            raise TrainingError(problem)
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """x_0 latents (B, C, H, W), float32, of pictures (B, 3, H, W) in [0, 1]: the mode of the VAE's posterior.

        Raises:
            TrainingError: they are not finite.
        """
        vae = self.pipeline.vae
        raw = vae.encode((images * 2 - 1).to(self.device, vae.dtype)).latent_dist.mode().float()
        if problem := overflow_problem(self.pipeline, True, *all_finite(raw)):
            raise TrainingError(problem)
        shift, scale = self._vae_shift_and_scale(raw)
        return (raw - shift) / scale

    def _vae_shift_and_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What turns the UNet's latents into the VAE's: ``latents * scale + shift``."""
        config = self.pipeline.vae.config
        shift, scale = like.new_zeros(()), like.new_tensor(1 / config.scaling_factor)
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            shift, std = (like.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
            scale = scale * std
        return shift + (getattr(config, "shift_factor", None) or 0.0), scale

    def save_lora(self, folder: Path) -> None:
        """Write the adapter, see ``save_lora``."""
        save_lora(self.pipeline, folder)


def overflow_problem(
    pipeline: Any,
    latents: bool,
    images: bool,
    *,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> str | None:
    """One sentence if the UNet's ``latents`` or what the VAE makes of them (``images``) are not finite, or None.

    ``autocast``: the context in which the UNet ran.
    """
    if latents and images:
        return None
    part, dtype = ("UNet", pipeline.unet.dtype) if not latents else ("VAE", pipeline.vae.dtype)
    what = "latents" if not latents else "results"
    with autocast():
        kind = pipeline.unet.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if not latents and narrow == torch.float16:
        return f"the UNet's {what} are not finite with mixed_precision=fp16: set mixed_precision=bf16 or no"
    if dtype != torch.float16:
        return (
            f"the {part}'s {what} are not finite: its weights are damaged, or were trained too far (lower "
            "learning_rate); choose another model or checkpoint"
        )
    also = ", or force_upcast: true in the model's vae/config.json" if latents else ""
    return f"the {part}'s {what} are not finite in float16: set dtype=bfloat16 or dtype=float32{also}"


@contextlib.contextmanager
def finite_images(pipeline: Any) -> Iterator[None]:
    """Inside, what diffusers' own call decodes is looked at, which it would clamp and cast; raised when it is left.

    Raises:
        TrainingError: latents or images were not finite.
    """
    seen: list[Tensor] = []

    def look(_: nn.Module, given: tuple[Tensor, ...], decoded: Tensor) -> None:
        seen.append(torch.stack([x.detach().isfinite().all() for x in (given[0], decoded)]))

    hook = pipeline.vae.decoder.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()
    latents, images = torch.stack(seen).all(0).tolist() if seen else (True, True)
    if problem := overflow_problem(pipeline, latents, images):
        raise TrainingError(problem)


def _check_adapter(unet: Any, lora: LoRAConfig | None) -> bool:
    """Whether ``unet`` already carries an adapter of the shape that ``lora`` describes, which is then trained on."""
    if not carries_adapters(unet):
        return False
    adapters = unet.peft_config
    if set(adapters) != {"default"} or lora is None:
        raise UserError(f"the model carries adapters ({', '.join(adapters)}): merge or unload them before training")
    carried, wanted = adapters["default"], peft_config(lora)
    if carried.use_dora or carried.lora_bias:
        raise UserError("the model already carries an adapter of another kind than plain LoRA: merge it first")
    if carried.rank_pattern:
        raise UserError("the model already carries an adapter of several ranks: merge it first")
    if carried.r != wanted.r:
        raise UserError(f"the model already carries an adapter of rank {carried.r}: set lora.rank to that")
    endings = tuple(f".{layer}" for layer in wanted.target_modules)
    if any(f".{name}".endswith(endings) != hasattr(part, "lora_A") for name, part in _layers(unet)):
        raise UserError(f"the model already carries an adapter of other layers than lora.layers={lora.layers!r}")
    return True


def _layers(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What an adapter may be on, by the names without one."""
    for name, part in unet.named_modules():
        known = isinstance(part, nn.Linear | nn.Conv2d) or hasattr(part, "lora_A")
        if known and "lora_" not in name and not name.endswith(".base_layer"):
            yield name, part


def _networks(pipeline: Any) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def peft_config(lora: LoRAConfig) -> Any:
    from peft import LoraConfig

    layers = ATTENTION_LAYERS + (CONVOLUTION_LAYERS if lora.layers == "attention+convolutions" else [])
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=layers)


def _encode_sd(policy: DenoisingPolicy, prompt: str) -> Conditioning:
    embeds, _ = policy.pipeline.encode_prompt(prompt, policy.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds}


def _encode_sdxl(policy: DenoisingPolicy, prompt: str) -> Conditioning:
    pipeline = policy.pipeline
    if prompt == "" and pipeline.config.get("force_zeros_for_empty_prompt"):
        some = policy.encode(["-"])  # SDXL's unconditional embedding is zeros of the usual shape
        return {k: v if k == "time_ids" else torch.zeros_like(v) for k, v in some.items()}
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device=policy.device, do_classifier_free_guidance=False)
    height, width = policy.image_size
    size = torch.tensor([[height, width, 0, 0, height, width]], dtype=embeds.dtype, device=policy.device)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": size}


_ENCODERS: dict[str, Callable[[DenoisingPolicy, str], Conditioning]] = {
    "StableDiffusionPipeline": _encode_sd,
    "StableDiffusionXLPipeline": _encode_sdxl,
}
