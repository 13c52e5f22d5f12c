"""A denoising policy: the network of a diffusers pipeline with guidance, LoRA (or full) training and a reference.

Nothing here knows an algorithm; what sets one family of pipelines apart from another is in ``families``.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.data.buckets import Size
from diffusion_align.diffusion.prompt_files import PromptFiles
from diffusion_align.diffusion.settings import LoRAConfig
from diffusion_align.diffusion.snapshots import Snapshots
from diffusion_align.errors import TrainingError, UserError, foreign_code, short
from diffusion_align.estimators.masked import at_least_float32
from diffusion_align.models.adapters import save_lora
from diffusion_align.models.dropout import set_dropout
from diffusion_align.models.families import Conditioning, ModelFamily, check_settings, family_of
from diffusion_align.models.image_pipelines import quiet
from diffusion_align.models.lora import adapter_layers, add_lora, carries_adapters, rescale_lora, switched_off
from diffusion_align.models.lora_passes import CastWeights, cast_norms_once
from diffusion_align.models.memory import (
    check_no_hooks,
    checkpoint_activations,
    named_text_encoders,
    on_device,
)
from diffusion_align.training.attention import ImageAttention
from diffusion_align.training.finite import all_finite

Autocast = Callable[[], contextlib.AbstractContextManager]
CACHED_PROMPTS = 2048
"""Embeddings of at most so many prompts are kept, those used last; others are made again."""
CACHED_BYTES = 2 * 2**30
"""They take no more than this: of models with T5 512 prompts of 512 tokens in bfloat16."""
PROMPT_BATCH = 8
"""Prompts in every pass of the text encoders, the last ones of which repeat one if there are fewer: with one shape for
all, an embedding's bits depend on its prompt alone, and not on what the cache held, which a resumed run has lost."""
PROMPT = "prompt"
"""Entry of the conditioning of a policy that adapts its text encoders: (B,) int64, the number of each prompt."""
_Prompt = tuple[str, Size, bool]
"""A text, the (height, width) of its image in pixels, and whether it is a negative prompt."""


@dataclass(frozen=True)
class PreparedConditioning:
    """What several passes of B samples without a gradient are told, see ``DenoisingPolicy.prepare``.

    Attributes:
        inputs: name -> (B, ...); (2B, ...) with classifier-free guidance, without the prompt and with it.
        guidance_scale: of classifier-free guidance; None without.
    """

    inputs: Conditioning
    guidance_scale: float | None = None


class DenoisingPolicy:
    """pi(x_s | x_t, c) of a text-to-image pipeline; log-probs come from ``rollout`` and ``replay``.

    Args:
        pipeline: of a class in ``families.SHIPPED`` (Stable Diffusion, XL, 3, FLUX, Z-Image), or one that
            ``load_pipeline`` has loaded with a family of the user's own. Its VAE is frozen, and its text encoders but
            for adapters on them. What is frozen keeps its dtype, trained weights become float32.
        lora: adapters to train; None trains the whole network and, for the reference, keeps a frozen copy.
        needs_reference: False saves the copy where no reference is used.
        guidance_scale: of guidance in sampling *and* training. Where it is classifier-free, 1 switches it off (half the
            work); where it is embedded, it is an input of the network.
        negative_prompt: what guidance leads away from, in sampling and training alike; None for no prompt. As in
            diffusers an empty text is a prompt: SDXL encodes it, and has zeros for None.
        height, width: of images in pixels; the model's own where None.
        autocast: context in which the network runs; log-probs stay float32.
        gradient_checkpointing: see ``checkpoint_activations``.
        offload_text_encoders: keep them in main memory except while they encode; not where they are trained.
        attention: what computes the network's attention, see ``ModelFamily.use_attention``; "auto" is the family's
            ``cpu_attention`` on a CPU, and on a GPU as the pipeline has it.
        channels_last: put the weights of the network's and the VAE's convolutions into that order.

    Raises:
        UserError: a pipeline class that is not supported, or one with hooks that move its parts, a network that is not
            text-to-image, or sides that are not multiples of the VAE's factor.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        lora: LoRAConfig | None,
        needs_reference: bool = True,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        device: torch.device | str = "cpu",
        autocast: Autocast = contextlib.nullcontext,
        gradient_checkpointing: bool = False,
        offload_text_encoders: bool = False,
        attention: ImageAttention = "auto",
        channels_last: bool = False,
    ) -> None:
        self.family: ModelFamily = family_of(pipeline)
        self.family.check(pipeline)
        check_no_hooks(pipeline)
        self.pipeline = pipeline
        given = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
        given |= {"attention": attention, "channels_last": channels_last}
        check_settings(self.family, self.network.config, given)
        self._latent_size = self.family.latent_size(
            self.network.config, pipeline.vae.config, height=height, width=width
        )
        adapters = {} if lora is None else _adapter_configs(pipeline, lora, self.family)
        adapted = _check_adapters(pipeline, adapters, lora, self.family)
        self._encoders = {name: getattr(pipeline, name) for name in adapters if name != self.family.network}
        self.pipeline.set_progress_bar_config(disable=True)
        self.device = torch.device(device)
        self.guidance_scale, self.negative_prompt = guidance_scale, negative_prompt
        self.autocast = autocast
        self.lora = lora
        self._prompt_cache: dict[_Prompt, Conditioning] = {}  # by encoders that do not change: without their adapters
        self.prompt_files: PromptFiles | None = None  # by the same encoders: prompts that need not be encoded again
        self._prompts: list[_Prompt] = []  # all that were conditioned on, each at its number
        self._numbers: dict[_Prompt, int] = {}
        self._kept: dict[_Prompt, Conditioning] | None = None  # by the adapted encoders, see ``weights_kept``
        self._is_reference = False
        self._offloaded = []
        if offload_text_encoders and not self._encoders:
            self._offloaded = list(named_text_encoders(pipeline).values())
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to("cpu" if part in self._offloaded else self.device).requires_grad_(False).eval()
        if attention != "auto" or self.device.type == "cpu":
            self.family.use_attention(self.network, self.family.cpu_attention if attention == "auto" else attention)
        self._frozen: nn.Module | None = None
        if lora is None:
            self.network.float()
            if needs_reference:  # in float32 as well: it has to round as what is trained does
                self._frozen = copy.deepcopy(self.network)
            self.network.requires_grad_(True)
        for name, config in {} if adapted else adapters.items():
            add_lora(getattr(pipeline, name), config)
            getattr(pipeline, name).eval()  # the new layers as well
        trained = [self.network, *self._encoders.values()]
        self._adapter_layers = [layer for part in trained for layer in adapter_layers(part)]
        self.dropout, *_ = [set_dropout(part, lora) for part in trained]
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        for name, config in adapters.items() if adapted else ():
            # Files hold a scale of 1; the settings say at which scale it is trained.
            rescale_lora(getattr(pipeline, name), config.lora_alpha)
        self._cast = CastWeights(self.network)
        if lora is not None and self.device.type == "cuda":
            cast_norms_once(self.network)
        if channels_last:  # adapters, and what the reference rounds like
            for part in filter(None, (self.network, self._frozen, self.pipeline.vae)):
                part.to(memory_format=torch.channels_last)
        for part in trained if gradient_checkpointing else ():
            checkpoint_activations(part)

    @property
    def network(self) -> Any:
        """The part of the pipeline that is trained; inside ``reference``, the frozen copy of it if there is one."""
        return getattr(self.pipeline, self.family.network)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is trained: the adapters, or the whole network.

        Those of text encoders have the encoder's name before theirs.
        """
        named = dict(self.network.named_parameters())
        for part, encoder in self._encoders.items():
            named |= encoder.named_parameters(prefix=part)
        return {name: p for name, p in named.items() if self.lora is None or ".lora_" in name}

    @cached_property
    def snapshots(self) -> Snapshots:
        """Named copies of ``trainable``."""
        return Snapshots(self.trainable)

    @contextlib.contextmanager
    def as_snapshot(self, name: str) -> Iterator[None]:
        """Inside, without gradients, the policy is the snapshot ``name``."""
        before, self._kept = self._kept, None
        try:
            with self._cast.replaced(), self.snapshots.active(name):
                yield
        finally:
            self._kept = before

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent that is sampled."""
        return self.family.latent_shape(self.network.config, self._latent_size)

    def timesteps_setter(self, latent_size: Size | None = None) -> Callable[[Any, int], None]:
        """How the pipeline sets its scheduler's timesteps, as ``build_schedule`` takes it.

        ``latent_size``: (H, W), if not that of the images that are sampled.
        """
        return self.family.timesteps_setter(self.network.config, latent_size or self._latent_size)

    @property
    def image_size(self) -> Size:
        """(height, width) in pixels of the images that are sampled."""
        return self._pixels(self._latent_size)

    def _pixels(self, latent_size: Sequence[int]) -> Size:
        factor = self.family.vae_factor(self.pipeline.vae.config)
        return latent_size[0] * factor, latent_size[1] * factor

    def encode(self, prompts: Sequence[str], image_sizes: Sequence[Size] | None = None) -> Conditioning:
        """What the network is conditioned on, (B, ...); each different prompt goes through the text encoders once.

        Where those are trained, it is the prompts' numbers, ``PROMPT``, and ``predict`` encodes.

        Args:
            prompts: B texts; an empty one stands for no prompt.
            image_sizes: (height, width) in pixels of each one's image, if not that of the images that are sampled.
        """
        sizes = image_sizes or [self.image_size] * len(prompts)
        keys = [(prompt, size, False) for prompt, size in zip(prompts, sizes, strict=True)]
        return self._numbered(keys) if self._encoders else self._embeddings(keys)

    @torch.no_grad()
    def _encode(self, keys: Sequence[_Prompt]) -> Conditioning:
        """By encoders that do not change, of which all prompts used last are kept."""
        cached = {key: self._prompt_cache.pop(key) for key in dict.fromkeys(keys) if key in self._prompt_cache}
        if self.prompt_files is not None:
            others = [(prompt, size) for prompt, size, negative in dict.fromkeys(keys) if not negative]
            others = [prompt for prompt in others if (*prompt, False) not in cached]
            cached |= {(*prompt, False): one for prompt, one in self.prompt_files.read(others, self.device).items()}
        missing: dict[tuple[Size, bool], list[str]] = {}
        for prompt, size, negative in (key for key in dict.fromkeys(keys) if key not in cached):
            missing.setdefault((size, negative), []).append(prompt)
        batch = 1 if self._encoders else PROMPT_BATCH  # as ``_encode_trained``: equal weights give equal bits
        with on_device(self._offloaded if missing else (), self.device):  # once, for all sizes
            for (size, negative), texts in missing.items():
                encode = self.family.encode_negative if negative else self.family.encode
                for start in range(0, len(texts), batch):
                    some = texts[start : start + batch]
                    encoded = encode(self.pipeline, some + some[-1:] * (batch - len(some)), size)
                    for i, prompt in enumerate(some):
                        cached[prompt, size, negative] = {k: v[i : i + 1].clone() for k, v in encoded.items()}
        self._prompt_cache |= cached  # those used last come last
        for key in list(self._prompt_cache)[: -cached_prompts(cached[keys[0]])]:
            del self._prompt_cache[key]
        return _rows(cached, keys)

    def _numbered(self, keys: Sequence[_Prompt]) -> Conditioning:
        """What stands for prompts until ``predict`` encodes them."""
        for key in keys:
            if key not in self._numbers:
                self._numbers[key] = len(self._prompts)
                self._prompts.append(key)
        beside = {size: self.family.of_size(self.pipeline, size) for _, size, _ in keys}
        told = _rows(beside, [size for _, size, _ in keys])
        return {PROMPT: torch.tensor([self._numbers[key] for key in keys], device=self.device), **told}

    def _encode_trained(self, keys: Sequence[_Prompt]) -> Conditioning:
        """With gradients, by the adapted encoders as they are now; a prompt a pass, so that its embedding's bits depend
        on nothing else, and each different prompt once. diffusers warns of one that is too long where the
        reference encodes it, which happens once."""
        known = {} if self._kept is None else self._kept
        with quiet():
            for prompt, size, negative in dict.fromkeys(keys):
                if (prompt, size, negative) not in known:
                    encode = self.family.encode_negative if negative else self.family.encode
                    known[prompt, size, negative] = encode(self.pipeline, [prompt], size)
        return _rows(known, keys)

    def _embeddings(self, keys: Sequence[_Prompt]) -> Conditioning:
        return self._encode_trained(keys) if self._encoders and not self._is_reference else self._encode(keys)

    def _encoded(self, conditioning: Conditioning) -> Conditioning:
        """``conditioning`` with embeddings in place of the prompts' numbers, if it has those."""
        if PROMPT not in conditioning:
            return conditioning
        keys = [self._prompts[number] for number in conditioning[PROMPT].tolist()]
        return self._embeddings(keys) | {name: value for name, value in conditioning.items() if name != PROMPT}

    @contextlib.contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Inside, without gradients and while no trained weight changes, each prompt is encoded only once, and weights
        are cast once."""
        before, self._kept = self._kept, {} if self._kept is None else self._kept
        try:
            with self._cast.kept():
                yield
        finally:
            self._kept = before

    def weights_cast_once(self) -> contextlib.AbstractContextManager[None]:
        """Inside, with gradients or without, no trained weight changes, and autocast's casts of them are made once."""
        return self._cast.kept()

    def return_text_encoders(self) -> None:
        """Keep offloaded text encoders on the device from now on, where diffusers' own call needs them."""
        for encoder in self._offloaded:
            encoder.to(self.device)
        self._offloaded = []

    def predict(
        self,
        x_t: Tensor,
        timestep: Tensor,
        conditioning: Conditioning | PreparedConditioning,
        *,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """The guided network output (B, C, H, W), float32 or wider: uncond + guidance_scale * (cond - uncond).

        uncond is with the policy's negative prompt, or with none.

        Args:
            x_t: (B, C, H, W).
            timestep: (B,) int64 or, of flow matching, float32: the model's own time.
            conditioning: of the same B samples, from ``encode``, or from ``prepare``, which has the guidance.
            guidance_scale: the policy's own when not given.
        """
        if not isinstance(conditioning, PreparedConditioning):
            size = self._pixels(x_t.shape[2:])
            conditioning = self._doubled(self._encoded(conditioning), guidance_scale, len(x_t), size)
        scale = conditioning.guidance_scale
        if scale is None:
            return self._run(x_t, timestep, conditioning.inputs)
        output = self._run(torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), conditioning.inputs)
        without, with_prompt = output.chunk(2)
        return without + scale * (with_prompt - without)

    @torch.no_grad()
    def prepare(self, conditioning: Conditioning, *, guidance_scale: float | None = None) -> PreparedConditioning:
        """Of images that are sampled, while no trained weight changes: made once for all steps, so that nothing in them
        is read back from the device."""
        batch = len(next(iter(conditioning.values())))
        prepared = self._doubled(self._encoded(conditioning), guidance_scale, batch, self.image_size)
        return replace(prepared, inputs=self.family.read_once(prepared.inputs))

    def _doubled(
        self, conditioning: Conditioning, guidance_scale: float | None, batch: int, image_size: Size
    ) -> PreparedConditioning:
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if self.family.guidance == "embedded":
            told = torch.full((batch,), float(scale), device=self.device)
            return PreparedConditioning(conditioning | {"guidance": told})
        if scale == 1:
            return PreparedConditioning(conditioning)
        without = self._encode_negative(image_size)
        both = {k: torch.cat([without[k].expand(batch, *v.shape[1:]), v]) for k, v in conditioning.items()}
        return PreparedConditioning(both, scale)

    def _encode_negative(self, image_size: Size) -> Conditioning:
        """(1, ...) of what guidance leads away from."""
        return self._embeddings([(self.negative_prompt or "", image_size, self.negative_prompt is not None)])

    def _run(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        network = self.network
        with self.autocast(), contextlib.nullcontext() if self._is_reference else self._cast.in_pass():
            output = self.family.predict(network, x_t.to(_input_dtype(network)), timestep, conditioning)
        return at_least_float32(output)

    @property
    def has_reference(self) -> bool:
        """Whether ``reference`` can be entered."""
        return self.lora is not None or self._frozen is not None

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, ``predict`` is the reference policy: the adapters switched off, or the frozen copy."""
        if not self.has_reference:
            raise ValueError("this policy was made without a reference: needs_reference=True keeps one")
        trained, before = self.network, self._is_reference
        with switched_off(self._adapter_layers):
            setattr(self.pipeline, self.family.network, trained if self._frozen is None else self._frozen)
            self._is_reference = True
            try:
                yield
            finally:
                self._is_reference = before
                setattr(self.pipeline, self.family.network, trained)

    def decode(self, latents: Tensor, *, grad: bool = False) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], float32 or wider, from x_0 latents (B, C, H, W).

        With ``grad`` they have a graph to the latents, and are the same bits. A value that the clamp cuts off then has
        no gradient: no small change of the latents shows there. What the clamp adds is taken for the image's own white
        and black, so a reward cannot drive latents beyond what any file holds.

        Raises:
            TrainingError: latents or images are not finite; a clamp would make them black or white.
        """
        with torch.set_grad_enabled(grad):
            images = self.family.decode(self.pipeline, latents)
            _require_finite(self.pipeline, *all_finite(latents, images), autocast=self.autocast)
            return (at_least_float32(images) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """x_0 latents (B, C, H, W), float32, of images (B, 3, H, W) in [0, 1]: the mode of the VAE's posterior.

        Raises:
            TrainingError: they are not finite.
        """
        latents = self.family.encode_images(self.pipeline, (images * 2 - 1).to(self.device, self.pipeline.vae.dtype))
        _require_finite(self.pipeline, True, *all_finite(latents))
        return latents

    def save_lora(self, folder: Path) -> None:
        """Write the adapters, see ``save_lora``."""
        save_lora(self.pipeline, folder)


def cached_prompts(conditioning: Conditioning) -> int:
    """How many prompts are kept whose embeddings, (B, ...) of B of them, are ``conditioning``."""
    size = sum(part.nbytes // len(part) for part in conditioning.values())
    return max(1, min(CACHED_PROMPTS, CACHED_BYTES // max(1, size)))


def check_family(policy: DenoisingPolicy, name: str) -> None:
    """Run the functions of a model family of the user's own once.

    Raises:
        UserError: one raises, or what it returns has another shape than one sample.
    """
    subject = f"family {short(name, 320)}"
    given = torch.zeros(1, *policy.latent_shape, device=policy.device)
    with foreign_code(f"{subject} raised "), torch.no_grad():
        timestep = torch.zeros(1, dtype=torch.int64, device=policy.device)
        empty, longer = policy.encode([""]), policy.encode(["a red apple on a white table"])
        negative = policy._embeddings([("", policy.image_size, True)])
        cropped = policy.family.of_cropped(empty, torch.tensor([policy.image_size]), torch.tensor([[0, 0]]))
        predicted = policy.predict(given, timestep, empty, guidance_scale=1)
        empty, longer, cropped = map(policy._encoded, (empty, longer, cropped))
        images = policy.decode(given)
        latents = policy.encode_images(torch.zeros(1, 3, *policy.image_size))
    for function, encoded in {"encode": longer, "encode_negative": negative, "of_cropped": cropped}.items():
        if {part: value.shape for part, value in encoded.items()} != {k: value.shape for k, value in empty.items()}:
            padded, alike = "the same shape for every prompt: pad them", "what encode does, in the same shapes"
            raise UserError(f"{subject}: {function} must return {padded if function == 'encode' else alike}")
    if policy._encoders:
        trained = policy._encoded(policy.encode(["a red apple"]))
        if not any(value.requires_grad for value in trained.values()):
            raise UserError(f"{subject}: encode gives no gradient to the text encoders: set lora.text_encoder=false")
    one_image = torch.Size((1, 3, *policy.image_size))
    found = {
        "predict": (predicted, given.shape),
        "decode": (images, one_image),
        "encode_images": (latents, given.shape),
    }
    for function, (output, wanted) in found.items():
        if output.shape != wanted:
            raise UserError(
                f"{subject}: {function} must return {tuple(wanted)} for one sample, and returns {tuple(output.shape)}"
            )


def _require_finite(pipeline: Any, latents: bool, images: bool, *, autocast: Autocast = contextlib.nullcontext) -> None:
    """TrainingError unless the network's ``latents`` and what the VAE makes of them (``images``) are finite.

    ``autocast``: the context in which the network ran.
    """
    if latents and images:
        return
    family = family_of(pipeline)
    network = getattr(pipeline, family.network)
    part, dtype = (family.network_title, network.dtype) if not latents else ("VAE", pipeline.vae.dtype)
    what = "latents" if not latents else "results"
    with autocast():
        kind = network.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if not latents and narrow == torch.float16:
        why = " with mixed_precision=fp16: set mixed_precision=bf16 or no"
    elif dtype != torch.float16:
        why = (
            ": its weights are damaged, or were trained too far (lower learning_rate); choose another model or "
            "checkpoint"
        )
    else:
        also = ", or upcast_vae=true" if latents else ""
        why = f" in float16: set dtype=bfloat16 or dtype=float32{also}"
    raise TrainingError(f"the {part}'s {what} are not finite{why}")


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
    _require_finite(pipeline, latents, images)


def _rows(known: Mapping[Any, Conditioning], keys: Sequence[Any]) -> Conditioning:
    """(B, ...) of B ``keys``, each of whose values in ``known`` is (1, ...)."""
    rows = [known[key] for key in keys]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _check_adapters(pipeline: Any, adapters: Mapping[str, Any], lora: LoRAConfig | None, family: ModelFamily) -> bool:
    """Whether the parts to adapt already carry adapters of the shape that ``lora`` describes, which are then trained
    on."""
    parts = list(adapters) or [family.network]
    carried = [name for name in parts if _check_adapter(getattr(pipeline, name), adapters.get(name), lora)]
    if 0 < len(carried) < len(parts):
        lacking = ", ".join(name for name in parts if name not in carried)
        raise UserError(f"the model already carries an adapter, but none on {lacking}: merge it first")
    return bool(carried)


def _check_adapter(network: Any, wanted: Any, lora: LoRAConfig | None) -> bool:
    """Whether ``network`` already carries an adapter of peft's settings ``wanted``."""
    if not carries_adapters(network):
        return False
    adapters = network.peft_config
    if set(adapters) != {"default"} or lora is None:
        raise UserError(f"the model carries adapters ({', '.join(adapters)}): merge or unload them before training")
    carried = adapters["default"]
    if carried.use_dora != wanted.use_dora:
        kind = "a DoRA adapter" if carried.use_dora else "an adapter without DoRA"
        raise UserError(
            f"the model already carries {kind}: set lora.dora={str(carried.use_dora).lower()}, or merge it first"
        )
    if carried.lora_bias:
        raise UserError("the model already carries an adapter with biases: merge it first")
    if carried.rank_pattern:
        raise UserError("the model already carries an adapter of several ranks: merge it first")
    if carried.r != wanted.r:
        raise UserError(f"the model already carries an adapter of rank {carried.r}: set lora.rank to that")
    endings = tuple(f".{layer}" for layer in wanted.target_modules)
    if any(f".{name}".endswith(endings) != hasattr(part, "lora_A") for name, part in _layers(network)):
        raise UserError(f"the model already carries an adapter of other layers than lora.layers={lora.layers!r}")
    return True


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What an adapter may be on, by the names without one."""
    for name, part in network.named_modules():
        known = isinstance(part, nn.Linear | nn.Conv2d) or hasattr(part, "lora_A")
        if known and "lora_" not in name and not name.endswith(".base_layer"):
            yield name, part


def _adapter_configs(pipeline: Any, lora: LoRAConfig, family: ModelFamily) -> dict[str, Any]:
    """Part of the pipeline -> peft's settings for the adapters on it; the network comes first."""
    encoders = named_text_encoders(pipeline) if lora.text_encoder else ()
    return {family.network: peft_config(lora, family), **{name: encoder_config(lora, family) for name in encoders}}


def peft_config(lora: LoRAConfig, family: ModelFamily) -> Any:
    """peft's settings for adapters on the network of a pipeline of ``family``."""
    return _peft_config(lora, family.adapted_layers(lora.layers))


def encoder_config(lora: LoRAConfig, family: ModelFamily) -> Any:
    """peft's settings for adapters on a text encoder; UserError if the family has none."""
    return _peft_config(lora, family.adapted_encoder_layers())


def _peft_config(lora: LoRAConfig, layers: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        target_modules=layers,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
    )


_INPUT_DTYPES: weakref.WeakKeyDictionary[nn.Module, tuple[torch.dtype, torch.dtype]] = weakref.WeakKeyDictionary()
"""Network -> the dtype of its first parameter at the time, and ``_input_dtype``."""


def _input_dtype(network: Any) -> torch.dtype:
    """``network.dtype`` of a diffusers model, which searches every layer for hooks: 8 ms for SD 1.5 with LoRA."""
    first = next(network.parameters()).dtype
    known = _INPUT_DTYPES.get(network)
    if known is None or known[0] != first:
        known = _INPUT_DTYPES[network] = first, network.dtype
    return known[1]
