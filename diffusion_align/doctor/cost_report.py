"""What an epoch of a diffusion recipe costs, estimated from the configurations of its model: GPU memory and time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_align.diffusion.policy import peft_config
from diffusion_align.diffusion.settings import DenoisingConfig
from diffusion_align.doctor.memory import NetworkCost, decoder_cost, network_cost, parameter_counts
from diffusion_align.doctor.model_files import ModelFiles, gigabytes
from diffusion_align.models.lora import add_lora
from diffusion_align.training.context import EpochCost, Lines
from diffusion_align.training.launch import time_forward
from diffusion_align.training.optimizers import STATE_BYTES
from diffusion_align.training.precision import Machine, with_precision

GPUS = {"RTX 4090": (24, 165e12), "A100": (80, 312e12), "H100": (80, 989e12)}
"""Name -> memory in GB and dense bf16 operations per second, float32 accumulation, from the makers' data sheets."""
SHARE_OF_PEAK = 0.4
TIMED_BELOW = 100e6
"""Parameters of the network: below, a pass is timed on a CPU, and a GPU would not be busy enough to estimate it."""


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU: what stays, and what each phase needs on top of it."""

    weights: int
    trained: int
    recorded: int
    training: int
    sampling: int
    decoding: int

    @property
    def peak(self) -> int:
        return self.weights + self.trained + self.recorded + max(self.training, self.sampling, self.decoding)


def describe_costs(config: DenoisingConfig, model: ModelFiles, epoch: EpochCost) -> Lines:
    """Estimated memory per GPU and time per epoch, of settings that are left to the machine as on a GPU with bf16."""
    here, config = config, with_precision(config, Machine(gpu=True, bf16=True))
    family, vae = model.family, model.configs["vae"]
    network = model.configs[family.network]
    dtype = getattr(torch, str(config.dtype))
    autocast = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[str(config.mixed_precision)]
    guided = 2 if config.sampler.guidance_scale > 1 else 1
    train_batch = config.micro_batch_size * epoch.width
    cost = network_cost(
        family,
        network,
        config.lora,
        train_batch=train_batch,
        sample_batch=config.sample_batch_size * guided,
        tokens=family.prompt_tokens(model.configs),
        dtype=dtype,
        autocast=autocast,
    )
    vae_dtype = torch.float32 if vae.get("force_upcast", True) else dtype
    latents = family.latent_shape(network)
    decoding = decoder_cost(vae, latents, config.sample_batch_size, vae_dtype)
    counts = parameter_counts(family, model.configs)
    sizes = {name: n * dtype.itemsize for name, n in counts.items() if name != family.network}
    sizes["vae"] = sizes["vae"] // dtype.itemsize * vae_dtype.itemsize
    frozen = cost.frozen * dtype.itemsize + (0 if config.lora else 4 * cost.trained)
    averaged = 4 * cost.trained if config.ema_decay and not config.ema_offload else 0
    memory = Memory(
        weights=frozen + sum(sizes.values()),
        trained=(4 + 4 + STATE_BYTES[config.optimizer]) * cost.trained + averaged,  # weights and gradients in float32
        recorded=4 * math.prod(latents) * epoch.recorded,
        training=cost.kept + cost.working // (config.sample_batch_size * guided) * train_batch,
        sampling=cost.working,
        decoding=decoding.working,
    )
    forward = epoch.sampling + epoch.reference + epoch.probed + epoch.estimated + evaluation_passes(config)
    passes = forward + (2 if config.lora else 3) * epoch.trained
    flops = cost.flops * passes + decoding.flops / config.sample_batch_size * (epoch.decoded + _evaluated(config))
    backward = (
        "a training pass counts as 2 forward passes: the weights below the LoRA need no gradient"
        if config.lora
        else "a training pass counts as 3 forward passes"
    )
    return [
        *_memory_lines(config, family.network_title, cost, memory, sizes, train_batch, guided),
        ("time per epoch, estimated", ""),
        ("operations", f"{_large(flops)}FLOPs, {_large(cost.flops)}FLOPs per {family.network_title} pass; {backward}"),
        *(_gpu_times(config, memory, flops) if cost.frozen + cost.trained > TIMED_BELOW else []),
        *_time_here(here, model, cost, passes),
    ]


def evaluation_passes(config: DenoisingConfig) -> float:
    """Forward passes of the network for evaluations, per epoch on average."""
    return (2 if config.sampler.guidance_scale > 1 else 1) * config.sampler.steps * _evaluated(config)


def _evaluated(config: DenoisingConfig) -> float:
    """Images sampled for evaluations, per epoch on average."""
    return config.evaluation.samples / config.evaluation.every if config.evaluation else 0


def _memory_lines(
    config: DenoisingConfig,
    network: str,
    cost: NetworkCost,
    memory: Memory,
    others: Mapping[str, int],
    train_batch: int,
    guided: int,
) -> Lines:
    own = gigabytes(memory.weights - sum(others.values()))
    what = f"{network} {own}" if config.lora else f"reference {network} {own}"
    parts = ", ".join([what, *(f"{name} {gigabytes(size)}" for name, size in others.items())])
    name = f"LoRA of rank {config.lora.rank}" if config.lora else f"whole {network}"
    precision = {"no": "float32"}.get(str(config.mixed_precision), config.mixed_precision)
    return [
        ("memory per GPU, estimated", ""),
        ("frozen weights", f"{gigabytes(memory.weights)}: {parts}"),
        (
            "trained",
            f"{gigabytes(memory.trained)}: {name}, {cost.trained / 1e6:.1f} M parameters with gradients and Adam",
        ),
        ("recorded latents", f"{gigabytes(memory.recorded)} per epoch, if one process samples them all"),
        (
            "training pass",
            f"{gigabytes(memory.training)} in {precision}, {train_batch} samples with their backward pass",
        ),
        ("sampling pass", f"{gigabytes(memory.sampling)}, {config.sample_batch_size * guided} samples"),
        ("decoding", f"{gigabytes(memory.decoding)}, {config.sample_batch_size} images"),
        ("at the peak", f"{gigabytes(memory.peak)}; CUDA itself (about 1 GB) and the reward's model come on top"),
    ]


def _gpu_times(config: DenoisingConfig, memory: Memory, flops: float) -> Lines:
    lines = []
    for name, (size, peak) in GPUS.items():
        lines.append(
            (f"one {name}, {size} GB", _epoch_time(config, flops / (SHARE_OF_PEAK * peak), memory, size * 1e9))
        )
    lines.append(("", f"at {SHARE_OF_PEAK:.0%} of their peak in bf16, without the reward"))
    if torch.cuda.is_available():
        size, rate = torch.cuda.get_device_properties(0).total_memory, _gpu_rate()
        lines.append(("the GPU here", _epoch_time(config, flops / (SHARE_OF_PEAK * rate), memory, size)))
        lines.append(("", f"at {SHARE_OF_PEAK:.0%} of its {rate / 1e12:.0f} TFLOPS in a matrix product in bf16"))
    return lines


def _epoch_time(config: DenoisingConfig, seconds: float, memory: Memory, size: float) -> str:
    fits = "" if memory.peak + 1e9 <= size else f"; more than its {gigabytes(size)}"
    return f"{duration(seconds)}, {duration(seconds * config.epochs)} for {config.epochs} epochs{fits}"


def _gpu_rate() -> float:
    """Operations per second of a large matrix product in bf16, the best of a few."""
    matrix = torch.ones(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        matrix @ matrix
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 2 * 8192**3 / min(seconds)


def _time_here(config: DenoisingConfig, model: ModelFiles, cost: NetworkCost, passes: float) -> Lines:
    """An epoch on this CPU, from a pass of a network of the model's shape that is timed now."""
    if torch.cuda.is_available() or not model.here:
        return []
    if cost.frozen + cost.trained > TIMED_BELOW:
        return [("this CPU", "not timed: with more than 100 M parameters a GPU is needed")]
    batch = config.sample_batch_size * (2 if config.sampler.guidance_scale > 1 else 1)
    choices = {None: [False], "no": [False], "auto": [False, True]}.get(config.mixed_precision, [True])
    family, network = model.family, _random_network(model, config)
    inputs = family.zeros(network.config, batch, tokens=family.prompt_tokens(model.configs), dtype=network.dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.num_threads or threads)
    try:
        seconds = min(time_forward(lambda: family.predict(network, *inputs), use_bf16) for use_bf16 in choices)
    finally:
        torch.set_num_threads(threads)
    total = seconds / batch * passes
    return [
        ("this CPU", f"{duration(total)}, {duration(total * config.epochs)} for {config.epochs} epochs"),
        ("", f"from a pass of {batch} samples timed now: {seconds:.2g} s; without decoding and the reward"),
    ]


def _random_network(model: ModelFiles, config: DenoisingConfig) -> Any:
    """A network as the trainer has it on a CPU, with random weights; the global generator is left as it was."""
    import diffusers

    family = model.family
    with torch.random.fork_rng(devices=[]):
        network = getattr(diffusers, family.network_class).from_config(dict(model.configs[family.network]))
        family.use_eager_attention(network)
        if config.lora is not None:
            add_lora(network, peft_config(config.lora, family))
    return network.eval()


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _large(count: float) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {prefix}" if count < 1000 * size else f"{count / size:.0f} {prefix}"
    return f"{count / 1e6:.3g} M"
