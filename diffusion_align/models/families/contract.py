"""What training needs to know of a family of text-to-image pipelines; docs/extending.md writes one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from diffusion_align.data.buckets import Size, aspect_buckets
from diffusion_align.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Conditioning: TypeAlias = "dict[str, Tensor]"
"""What the network is told of the prompts, name -> (B, ...)."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of an attention layer of diffusers."""
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The projections of an attention layer of transformers' CLIP, those that diffusers' scripts adapt."""
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
"""The two linear layers of a feed-forward layer of diffusers."""


class ModelFamily(ABC):
    """What sets the pipelines of one architecture apart from others: a class without state.

    A pipeline is diffusers' own: its network denoises latents (B, C, H, W), its ``vae`` is an ``AutoencoderKL``, and
    its scheduler is of the DDPM kind, with a beta schedule and epsilon, v or x_0 predicted, or flow matching's by Euler
    steps. Rollout, replay, guidance, LoRA, the reference and every method are the same for all families.

    ``pipelines``, ``network_class``, ``encode``, ``inputs`` and ``zero_conditioning`` must be given; the rest has
    defaults.
    """

    pipelines: ClassVar[Sequence[str]]
    """Names of the diffusers classes that are of this family."""
    network: ClassVar[str] = "unet"
    """The part of the pipeline that is trained: "unet" or "transformer"."""
    network_title: ClassVar[str] = "UNet"
    """What messages call it."""
    network_class: ClassVar[str]
    """Name of its class in diffusers; ``doctor`` counts what such a network costs."""
    load_options: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the pipeline's ``from_pretrained``."""
    call_options: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the pipeline's own call, by which ``ImageAlignmentPipeline`` samples."""
    lora_layers: ClassVar[Mapping[str, Sequence[str]]] = {"attention": ATTENTION, "feed_forward": FEED_FORWARD}
    """A kind of layers that ``lora.layers`` can name -> endings of the names of these layers."""
    text_encoder_layers: ClassVar[Sequence[str]] = ()
    """Endings of the names of the layers of the text encoders that ``lora.text_encoder`` adapts; none refuses it. With
    some, gradients must flow through ``encode``, and what it takes from the image's size alone is in ``of_size``."""
    cpu_attention: ClassVar[Literal["eager", "sdpa"]] = "eager"
    """What ``attention: auto`` is on a CPU: the one whose forward and backward pass together take less time there."""
    guidance: ClassVar[Literal["free", "embedded"]] = "free"
    """Classifier-free, by a second pass; or embedded: the scale is in the conditioning, ``guidance`` (B,)."""

    def call_guidance(self, scale: float) -> dict[str, float]:
        """Arguments of the pipeline's own call for guidance of ``scale``, which is 1 where there is none."""
        return {"guidance_scale": scale}

    def with_settings(self, settings: Mapping[str, Any]) -> ModelFamily:
        """The same with those settings of a run (name -> value) that say how it reads prompts; by default none does."""
        return self

    def setting_checks(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
        """Sentences about settings of a run that are not for a network of configuration ``config``.

        Args:
            settings: name -> value, as far as they are known.
        """
        if settings.get("max_sequence_length") is not None:
            yield (
                f"max_sequence_length={settings['max_sequence_length']} is for models that read prompts with T5 or "
                "Qwen3, like Stable Diffusion 3: leave it out"
            )
        if settings.get("t5") is False:
            yield "t5=false is for Stable Diffusion 3: leave it out"

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        """What ``inputs`` takes for B prompts, (B, ...) each, on the pipeline's device.

        An entry has the same shape for every prompt (padded to a fixed length), so that prompts can be batched.

        Args:
            pipeline: with text encoders.
            prompts: texts; the empty one stands for none, which is what guidance leads away from by default.
            image_size: (height, width) in pixels.
        """

    def encode_negative(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        """Like ``encode``, for negative prompts; an empty one is encoded like any other text."""
        return self.encode(pipeline, prompts, image_size)

    def of_size(self, pipeline: Any, image_size: tuple[int, int]) -> Conditioning:
        """The entries of ``encode`` that no text encoder gives, (1, ...) each; see ``text_encoder_layers``."""
        return {}

    def of_cropped(self, conditioning: Conditioning, original: Tensor, corner: Tensor) -> Conditioning:
        """``conditioning`` of images that were scaled to cover their size and then cropped in the middle.

        By default as given, for a network that is not told where its images come from.

        Args:
            conditioning: of B samples, from ``encode`` with the size after the crop.
            original: (B, 2) int64 on the CPU, height and width in pixels before both.
            corner: (B, 2) int64 on the CPU, top and left of the crop in the scaled image, in pixels.
        """
        return conditioning

    def read_once(self, conditioning: Conditioning) -> Conditioning:
        """``conditioning`` of several passes, with what ``inputs`` would read back from the device in each of them."""
        return conditioning

    @abstractmethod
    def inputs(self, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the network's forward pass, beside the latents, which come first.

        Args:
            timestep: (B,) int64; float32, 1000 sigma, for a flow-matching model.
            conditioning: of B samples.
            dtype: of the network.
        """

    @abstractmethod
    def zero_conditioning(self, config: Mapping[str, Any], batch: int, tokens: int, **kind: Any) -> Conditioning:
        """Conditioning of the shapes that ``encode`` gives, all 0, for a network of which only ``config`` is known.

        Args:
            config: of the network.
            batch: samples.
            tokens: of a prompt.
            **kind: device and dtype, as ``torch.zeros`` takes them.
        """

    def predict(self, network: Any, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output (B, C, H, W) for ``x_t`` in its dtype, ``timestep`` (B,)."""
        output: Tensor = network(x_t, **self.inputs(timestep, conditioning, x_t.dtype), return_dict=False)[0]
        return output

    def zeros(
        self,
        config: Mapping[str, Any],
        batch: int,
        *,
        tokens: int = 77,
        latent_size: tuple[int, int] | None = None,
        **kind: Any,
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """``x_t``, ``timestep`` and conditioning of ``batch`` samples, all 0; see ``zero_conditioning``."""
        import torch

        latents = torch.zeros(batch, *self.latent_shape(config, latent_size), **kind)
        timestep = torch.zeros(batch, **kind | {"dtype": torch.int64})
        return latents, timestep, self.zero_conditioning(config, batch, tokens, **kind)

    def latent_shape(
        self, config: Mapping[str, Any], latent_size: tuple[int, int] | None = None
    ) -> tuple[int, int, int]:
        """(C, H, W) of one latent, of ``latent_size`` (H, W) or the size in the network's configuration."""
        size = latent_size or config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return config["in_channels"], height, width

    def image_tokens(self, config: Mapping[str, Any], latent_size: tuple[int, int]) -> int | None:
        """How many tokens the network of a flow-matching model makes of latents (H, W); None if it has none.

        By this number a scheduler with ``use_dynamic_shifting`` shifts its sigmas. ``config``: of the network.
        """
        return None

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int | None) -> None:
        """Set the timesteps of a flow-matching ``scheduler`` exactly as the pipeline's own call does.

        ``flow_matching.set_spaced_timesteps`` is Stable Diffusion 3's way, ``set_linear_timesteps`` is FLUX's. Models
        with a beta schedule do not use it.

        Args:
            scheduler: a ``FlowMatchEulerDiscreteScheduler``.
            steps: denoising steps.
            tokens: from ``image_tokens``.

        Raises:
            UserError: by default, as the pipeline is not known to sample with such a scheduler.
        """
        raise UserError(
            "the model's scheduler is of flow matching, of which its family knows nothing: use a scheduler of the DDPM "
            "family, or define set_timesteps in the family"
        )

    def timesteps_setter(self, config: Mapping[str, Any], latent_size: tuple[int, int]) -> Callable[[Any, int], None]:
        """``set_timesteps`` for latents (H, W), as ``build_schedule`` takes it; ``config``: of the network."""
        return partial(self.set_timesteps, tokens=self.image_tokens(config, latent_size))

    def latent_size(
        self,
        config: Mapping[str, Any],
        vae: Mapping[str, Any],
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[int, int]:
        """(H, W) of the latents of images of ``height`` x ``width`` pixels; the network's own where that is None.

        Args:
            config, vae: configurations of the network and of the VAE.

        Raises:
            ConfigError: see ``check_sides``.
        """
        _, *own = self.latent_shape(config)
        factor = self.vae_factor(vae)
        given = {"height": height, "width": width}
        self.check_sides(config, vae, {name: side for name, side in given.items() if side is not None})
        rows, columns = (mine if side is None else side // factor for mine, side in zip(own, given.values()))
        return rows, columns

    def buckets(
        self,
        config: Mapping[str, Any],
        vae: Mapping[str, Any],
        step: int,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Size]:
        """``aspect_buckets`` for the image size that ``latent_size`` is given.

        Raises:
            ConfigError: see ``check_sides``; or there are fewer than two.
        """
        self.check_sides(config, vae, {"bucket_step": step})
        rows, columns = self.latent_size(config, vae, height=height, width=width)
        size = rows * self.vae_factor(vae), columns * self.vae_factor(vae)
        buckets = aspect_buckets(size, step)
        if len(buckets) < 2:
            raise ConfigError(
                [
                    f"bucket_step={step} is too large for buckets of about {size[0]} x {size[1]} pixels: lower it, or "
                    "raise the resolution"
                ]
            )
        return buckets

    def check_sides(self, config: Mapping[str, Any], vae: Mapping[str, Any], sides: Mapping[str, int]) -> None:
        """ConfigError unless all ``sides``, setting -> pixels, are multiples of the VAE's factor times the network's
        patch size, and of 8, which diffusers' pipelines require whatever the VAE."""
        multiple = math.lcm(8, self.vae_factor(vae) * self.patch_size(config))
        names: dict[int, list[str]] = {}  # of each side: the two that resolution sets are one problem
        for name, side in sides.items():
            names.setdefault(side, []).append(name)
        problems = [
            f"{'='.join(alike)}={side} must be a multiple of {multiple} for this model: set "
            f"{max(1, side // multiple) * multiple} or {(side // multiple + 1) * multiple}"
            for side, alike in names.items()
            if side % multiple
        ]
        if problems:
            raise ConfigError(problems)

    def as_in_pipeline(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) in the shape in which the pipeline's own call has them while it denoises."""
        return latents

    def patch_size(self, config: Mapping[str, Any]) -> int:
        """Latents along a side of what is one token to the network."""
        return config.get("patch_size") or 1

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels per latent along a side, with a VAE of configuration ``vae``."""
        factor: int = 2 ** (len(vae["block_out_channels"]) - 1)
        return factor

    def prompt_tokens(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Tokens of an encoded prompt; ``configs``: part of the pipeline -> its configuration."""
        tokens: int = configs.get("text_encoder", {}).get("max_position_embeddings", 77)
        return tokens

    def check(self, pipeline: Any) -> None:
        """Raise a UserError if this pipeline cannot be trained."""
        self.check_network("the model", getattr(pipeline, self.network).config)

    def check_network(  # noqa: B027, there is nothing wrong by default
        self, subject: str, config: Mapping[str, Any]
    ) -> None:
        """Raise a UserError about ``subject`` if a network of configuration ``config`` cannot be trained."""

    def adapted_layers(self, name: str) -> list[str]:
        """The ``lora_layers`` of the kinds in ``name``, joined by +; UserError if it has none of that kind."""
        if name in self.lora_layers:  # a family may define several kinds together
            return list(self.lora_layers[name])
        kinds = name.split("+")
        if not self.lora_layers.keys() >= set(kinds):
            raise UserError(
                f"lora.layers={name!r} is not of this model, a {self.network_title}: use {', '.join(self.lora_layers)}"
            )
        return [layer for kind in kinds for layer in self.lora_layers[kind]]

    def adapted_encoder_layers(self) -> list[str]:
        """The ``text_encoder_layers``; UserError if there are none."""
        if not self.text_encoder_layers:
            raise UserError(
                f"lora.text_encoder=true is not of this model, whose family {type(self).__name__} names no "
                "text_encoder_layers: set it to false"
            )
        return list(self.text_encoder_layers)

    def use_eager_attention(self, network: Any) -> None:
        """With its matrices in memory; on a CPU a UNet's backward pass is faster than with fused attention."""
        from diffusers.models.attention_processor import AttnProcessor

        network.set_attn_processor(AttnProcessor())

    def use_attention(self, network: Any, name: str) -> None:
        """Let "eager", "sdpa" or "xformers" compute the attention of ``network``, which has diffusers' processors."""
        from diffusers.models.attention_processor import AttnProcessor2_0

        if name == "eager":
            self.use_eager_attention(network)
        elif name == "sdpa":
            network.set_attn_processor(AttnProcessor2_0())
        else:
            network.enable_xformers_memory_efficient_attention()

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), most of whose values are in [-1, 1], from x_0 latents (B, C, H, W)."""
        shift, scale = self._vae_shift_and_scale(pipeline, latents)
        images: Tensor = pipeline.vae.decode((latents * scale + shift).to(pipeline.vae.dtype), return_dict=False)[0]
        return images

    def encode_images(self, pipeline: Any, images: Tensor) -> Tensor:
        """x_0 latents (B, C, H, W), float32, of images (B, 3, H, W) in [-1, 1]: the mode of the VAE's posterior."""
        raw = pipeline.vae.encode(images).latent_dist.mode().float()
        shift, scale = self._vae_shift_and_scale(pipeline, raw)
        latents: Tensor = (raw - shift) / scale
        return latents

    def _vae_shift_and_scale(self, pipeline: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """What turns the network's latents into the VAE's: ``latents * scale + shift``."""
        config = pipeline.vae.config
        shift, scale = like.new_zeros(()), like.new_tensor(1 / config.scaling_factor)
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            shift, std = (like.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
            scale = scale * std
        return shift + (getattr(config, "shift_factor", None) or 0.0), scale
