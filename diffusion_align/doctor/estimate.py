"""How much memory a diffusion recipe needs on a GPU, phase by phase, and what its settings save of it.

Nothing is measured: bytes are those of tensors, as ``memory`` counts them. A card of 24 GB has 24 GiB; the 7 % between
them are left to an allocator's gaps and to what operations use within themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from diffusion_align.assets import shipped_prompts
from diffusion_align.data.prompts import load_prompts
from diffusion_align.diffusion.policy import cached_prompts
from diffusion_align.diffusion.settings import DenoisingConfig
from diffusion_align.doctor.memory import (
    EncoderCost,
    NetworkCost,
    PassCost,
    Passes,
    decoding_cost,
    differentiated_decoding_cost,
    encoder_cost,
    encoding_cost,
    network_cost,
    parameter_counts,
    vae_on_meta,
)
from diffusion_align.doctor.model_files import ModelFiles, left_out
from diffusion_align.training.context import EpochCost
from diffusion_align.training.optimizers import STATE_BYTES
from diffusion_align.training.precision import Machine, with_precision

GB = 10**9
CARDS = (12, 16, 24, 40, 48, 80)
"""GB of memory that GPUs have."""
CUDA = GB
"""What CUDA takes for itself, about."""
GPU, CPU = Machine(gpu=True, bf16=True), Machine(gpu=False, bf16=False)
_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAVING: dict[str, tuple[Any, Any]] = {
    "gradient_checkpointing": (True, False),
    "vae_slicing": (True, False),
    "vae_tiling": (True, False),
    "offload_text_encoders": (True, False),
    "dtype": ("bfloat16", "float32"),
    "optimizer": ("adamw_8bit", "adamw"),
    "ema_offload": (True, False),
    "t5": (False, True),
}
"""Settings that need less memory at the first value than at the second."""
_WORTH_IT = 0.02
"""Share of the peak that a setting must save to be named."""


@dataclass(frozen=True)
class Estimate:
    """Bytes per process, and what they were counted from.

    Attributes:
        weights: part of the pipeline -> its frozen weights; "reference" is the frozen copy of a network that is trained
            whole.
        trained: weights that are trained, their gradients, the optimizer's state and their average.
        parameters: so many are trained.
        recorded: latents of an epoch, if one process samples them all.
        embeddings: what the text encoders made of the prompts used last, of which there are at most ``prompts``.
        phases: what each needs beside all that, one after the other.
        network, decoding: costs of the network and of decoding a batch.
        passes: how the network is run.
    """

    weights: Mapping[str, int]
    trained: int
    parameters: int
    recorded: int
    embeddings: int
    prompts: int
    phases: Mapping[str, int]
    network: NetworkCost
    decoding: PassCost
    passes: Passes

    @property
    def peak(self) -> int:
        always = sum(self.weights.values()) + self.trained + self.recorded + self.embeddings
        return always + max(self.phases.values())


@dataclass(frozen=True)
class Saving:
    """What a setting of this value saves at the peak, in bytes, and the share by which it makes an epoch longer."""

    setting: str
    value: str
    saved: int
    slower: float


@dataclass
class Estimator:
    """Estimates recipes for one model; what its network costs is counted once for each way to run it."""

    model: ModelFiles
    epoch: EpochCost
    _counted: dict[tuple[Any, ...], NetworkCost] = field(default_factory=dict)

    def estimate(self, config: DenoisingConfig, machine: Machine = GPU) -> Estimate:
        """What ``config`` needs on ``machine``: on a GPU with fused attention, on a CPU with its ``cpu_attention``."""
        config = with_precision(config, machine)
        family, configs = self.model.family.with_settings(config.family_settings), self.model.configs
        network, vae = configs[family.network], configs["vae"]
        size = family.latent_size(network, vae, height=config.height, width=config.width)
        latents = family.latent_shape(network, size)
        guided = config.sampler.passes
        attention = family.cpu_attention if config.attention == "auto" and not machine.gpu else None
        dtype = getattr(torch, str(config.dtype))
        passes = Passes(
            latent_size=size,
            train_batch=config.micro_batch_size * self.epoch.width,
            sample_batch=config.sample_batch_size * guided,
            tokens=family.prompt_tokens(configs),
            dtype=dtype,
            autocast=_DTYPES.get(str(config.mixed_precision)),
            checkpointing=config.gradient_checkpointing,
            eager_attention="eager" in (config.attention, attention),
            reference=self.epoch.reference > 0 and config.inner_epochs == 1,
        )
        cost = self._network_cost(config, passes)
        upcast = vae.get("force_upcast", True) if config.upcast_vae is None else config.upcast_vae
        vae_dtype = torch.float32 if upcast else dtype
        on_meta = vae_on_meta(vae, vae_dtype, slicing=config.vae_slicing, tiling=config.vae_tiling)
        decoding = decoding_cost(on_meta, latents, config.sample_batch_size)
        encoders = self._encoder_costs(config, passes)
        # In a training pass each of its prompts is encoded once, and the one that guidance leads away from.
        encoded = config.micro_batch_size + guided - 1
        graphs, beside = self.epoch.graphs, encoded * sum(encoder.kept for encoder in encoders)
        training = cost.training + (graphs - 1) * cost.kept + beside
        phases = {"training": training, "sampling": cost.sampling}
        if self.epoch.decoded or not self.epoch.differentiated:
            phases["decoding"] = decoding.working
        if self.epoch.differentiated:  # the passes of the network wait for their own backward pass meanwhile
            given = on_meta, latents, config.micro_batch_size, passes
            decodings = differentiated_decoding_cost(*given, times=self.epoch.differentiated // self.epoch.units)
            phases["decoding, with gradient"] = graphs * cost.kept + beside + decodings
        if getattr(config, "pairs", None) is not None:
            pixels = [side * family.vae_factor(vae) for side in size]
            phases["encoding images"] = encoding_cost(on_meta, pixels, 2 * config.sample_batch_size).working
        weights = {family.network: cost.frozen * dtype.itemsize} if cost.frozen else {}
        if config.lora is None and config.needs_reference:
            weights["reference"] = 4 * cost.trained
        for name, count in self.counts.items():
            if name == family.network or name in left_out(family):
                continue
            size_of_part = count * (vae_dtype if name == "vae" else dtype).itemsize
            offloaded = machine.gpu and config.offload_text_encoders and not encoders
            if name.startswith("text_encoder") and offloaded:
                phases["encoding prompts"] = phases.get("encoding prompts", 0) + size_of_part
            else:
                weights[name] = size_of_part
        averaged = 4 if config.ema_decay and not config.ema_offload else 0
        copies = averaged + 4 * self.epoch.snapshots
        state = STATE_BYTES[config.optimizer]
        trained = cost.trained + sum(encoder.trained for encoder in encoders)
        embedding = family.zero_conditioning(network, 1, passes.tokens, device="meta", dtype=dtype)
        prompts = min(cached_prompts(embedding), different_prompts(config, self.epoch))
        return Estimate(
            weights=weights,
            trained=(4 + 4 + state + copies) * trained,  # weights and gradients are float32
            parameters=trained,
            recorded=4 * math.prod(latents) * self.epoch.recorded,
            embeddings=prompts * sum(part.nbytes for part in embedding.values()),
            prompts=prompts,
            phases=phases,
            network=cost,
            decoding=decoding,
            passes=passes,
        )

    def savings(self, config: DenoisingConfig) -> tuple[list[Saving], list[Saving]]:
        """What the settings that are on save, each by itself; and what those that are off would save, the one that
        saves most first, each on top of those before it. Those that save next to nothing are left out."""
        now = self.estimate(config)
        on, off = [], []
        for name, (saving, costly) in _SAVING.items():
            if not self._applies(config, name):
                continue
            if getattr(config, name) != saving:
                off.append((name, saving))
                continue
            saved = self.estimate(config.model_copy(update={name: costly})).peak - now.peak
            if saved >= _WORTH_IT * now.peak:
                on.append(self._saving(config, name, saving, saved))
        would: list[Saving] = []
        while off:
            each = [(now.peak - self.estimate(config.model_copy(update={n: v})).peak, (n, v)) for n, v in off]
            saved, (name, value) = max(each, key=lambda one: one[0])
            if saved < _WORTH_IT * now.peak:
                break
            would.append(self._saving(config, name, value, saved))
            config = config.model_copy(update={name: value})
            now = self.estimate(config)
            off.remove((name, value))
        return on, would

    def forward_passes(self, config: DenoisingConfig) -> float:
        """What an epoch's passes of the network on one sample cost, in forward passes; those of evaluations too."""
        epoch = self.epoch
        beside = epoch.reference + epoch.old + epoch.probed + epoch.estimated
        forward = epoch.sampling + beside + evaluation_passes(config)
        return forward + training_passes(config) * epoch.trained

    def _saving(self, config: DenoisingConfig, name: str, value: Any, saved: int) -> Saving:
        """Of what is named here only gradient checkpointing takes time that counts."""
        slower = 0.0
        if name == "gradient_checkpointing":
            kept, again = (
                self.forward_passes(config.model_copy(update={"gradient_checkpointing": on})) for on in (False, True)
            )
            slower = again / kept - 1
        return Saving(name, str(value).lower(), saved, slower)

    def _applies(self, config: DenoisingConfig, name: str) -> bool:
        """Whether a setting of ``_SAVING`` could be set."""
        if name == "dtype":
            return config.lora is not None
        if name == "optimizer":
            return config.lora is None
        if name == "offload_text_encoders":
            return config.lora is None or not config.lora.text_encoder
        if name == "t5":
            return "text_encoder_3" in self.counts
        return name != "ema_offload" or config.ema_decay is not None

    @cached_property
    def counts(self) -> dict[str, int]:
        """Part -> its parameters, as its configuration describes it."""
        return parameter_counts(self.model.family, self.model.configs)

    def _network_cost(self, config: DenoisingConfig, passes: Passes) -> NetworkCost:
        family, lora = self.model.family, config.lora
        key = (passes, None if lora is None else lora.model_dump_json())
        if key not in self._counted:
            self._counted[key] = network_cost(family, self.model.configs[family.network], lora, passes)
        return self._counted[key]

    def _encoder_costs(self, config: DenoisingConfig, passes: Passes) -> list[EncoderCost]:
        """Of each text encoder that is trained."""
        lora = config.lora
        if lora is None or not lora.text_encoder:
            return []
        named = self.model.configs.items()
        return [encoder_cost(self.model.family, one, lora, passes) for name, one in named if "text_encoder" in name]


def training_passes(config: DenoisingConfig) -> int:
    """What a forward and a backward pass cost, in forward passes: weights below a LoRA need no gradient."""
    return (2 if config.lora else 3) + config.gradient_checkpointing


def evaluation_passes(config: DenoisingConfig) -> float:
    """Forward passes of the network for evaluations, per epoch on average."""
    return config.sampler.passes * config.sampler.steps * evaluated(config)


def evaluated(config: DenoisingConfig) -> float:
    """Images sampled for evaluations, per epoch on average."""
    return config.evaluation.samples / config.evaluation.every if config.evaluation else 0


def different_prompts(config: DenoisingConfig, epoch: EpochCost) -> int:
    """At most so many prompts are encoded in a run, as far as that is known without reading the user's files."""
    pairs, prompts = getattr(config, "pairs", None), getattr(config, "prompts", None)
    most = [epoch.units * config.epochs]
    if pairs is not None and pairs.max_pairs is not None:
        most.append(pairs.max_pairs)
    source = None if prompts is None else prompts.source
    if isinstance(source, list) or (isinstance(source, str) and source in shipped_prompts()):
        most.append(len(load_prompts(source)))
    return min(most)


def smallest_card(needed: float) -> int | None:
    """GB of the smallest of ``CARDS`` that holds ``needed`` bytes and CUDA, None if there is none."""
    return next((card for card in CARDS if needed + CUDA <= card * GB), None)
