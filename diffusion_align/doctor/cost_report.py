"""What an epoch of a diffusion recipe costs, estimated from the configurations of its model: GPU memory and time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_align.diffusion.policy import peft_config
from diffusion_align.diffusion.settings import DenoisingConfig
from diffusion_align.doctor.estimate import (
    CPU,
    CUDA,
    GB,
    GPU,
    Estimate,
    Estimator,
    Saving,
    evaluated,
    smallest_card,
    training_passes,
)
from diffusion_align.doctor.memory import NetworkCost
from diffusion_align.doctor.model_files import ModelFiles, gigabytes, parameters_in
from diffusion_align.models.lora import add_lora
from diffusion_align.training.context import EpochCost, Lines
from diffusion_align.training.launch import time_forward
from diffusion_align.training.precision import with_precision

GPUS = {"RTX 4090": (24, 165e12), "A100": (80, 312e12), "H100": (80, 989e12)}
"""Name -> memory in GB and dense bf16 operations per second, float32 accumulation, from the makers' data sheets."""
SHARE_OF_PEAK = 0.4
TIMED_BELOW = 100e6
"""Parameters of the network: below, a pass is timed on a CPU, and a GPU would not be busy enough to estimate it."""


@dataclass(frozen=True)
class RewardModels:
    """Bytes of the networks of rewards whose size is known, and whether there are others."""

    known: int = 0
    others: bool = False


def describe_costs(config: DenoisingConfig, model: ModelFiles, epoch: EpochCost, rewards: RewardModels) -> Lines:
    """Estimated memory per GPU and time per epoch, of settings that are left to the machine as on a GPU with bf16."""
    estimator = Estimator(model, epoch)
    on_gpu, found = with_precision(config, GPU), estimator.estimate(config)
    passes, flops = estimator.forward_passes(config), _flops(config, estimator, found)
    large = found.network.frozen + found.network.trained > TIMED_BELOW
    on, would = estimator.savings(config) if large else ([], [])
    title = model.family.network_title
    what = f"{_large(flops)}FLOPs, {_large(found.network.flops)}FLOPs per {title} pass; {_of_training(config)}"
    return [
        *_memory_lines(on_gpu, title, found, rewards),
        *(_fits(found, rewards, would) if large else []),
        *_on_cpu(config, model, estimator),
        *_checked(model, estimator.counts),
        *_saving_lines(on, would),
        ("time per epoch, estimated", ""),
        ("operations", what),
        *(_gpu_times(config, found.peak + CUDA + rewards.known, flops) if large else []),
        *_time_here(config, model, found.network, passes),
    ]


def _flops(config: DenoisingConfig, estimator: Estimator, found: Estimate) -> float:
    """Operations of an epoch, rewards left out."""
    backward = 2 + config.gradient_checkpointing  # to the latents: the decoder's weights need no gradient
    decoded = estimator.epoch.decoded + backward * estimator.epoch.differentiated + evaluated(config)
    decoding = found.decoding.flops / config.sample_batch_size * decoded
    return found.network.flops * estimator.forward_passes(config) + decoding


def _of_training(config: DenoisingConfig) -> str:
    why = ["the weights below the LoRA need no gradient"] if config.lora else []
    why += ["gradient_checkpointing computes one again"] if config.gradient_checkpointing else []
    counts = f"a training pass counts as {training_passes(config)} forward passes"
    return f"{counts}: {', and '.join(why)}" if why else counts


def _memory_lines(config: DenoisingConfig, title: str, found: Estimate, rewards: RewardModels) -> Lines:
    named = {"reference": f"reference {title}", "unet": title, "transformer": title}
    parts = ", ".join(f"{named.get(name, name)} {gigabytes(size)}" for name, size in found.weights.items())
    name = f"LoRA of rank {config.lora.rank}" if config.lora else f"whole {title}"
    name += " on the text encoders too" if config.lora and config.lora.text_encoder else ""
    precision = {"no": "float32"}.get(str(config.mixed_precision), config.mixed_precision)
    counted = f"{found.parameters / 1e6:.1f} M parameters with gradients and {config.optimizer}"
    needs = {
        "training": f" in {precision}, {found.passes.train_batch} samples with their backward pass",
        "sampling": f", {found.passes.sample_batch} samples",
        "decoding": f", {config.sample_batch_size} images",
        "decoding, with gradient": f", {config.micro_batch_size} images and what the network keeps for its own",
        "encoding images": f" of {config.sample_batch_size} pairs, before the first epoch",
        "encoding prompts": ", the text encoders on the GPU",
    }
    titles = {"training": "training pass", "sampling": "sampling pass"}
    comes = ["CUDA itself (about 1 GB)"]
    comes += [f"the reward's model ({gigabytes(rewards.known)})"] if rewards.known else []
    comes += ["the reward's model"] if rewards.others and not rewards.known else []
    kept = "1 prompt" if found.prompts == 1 else f"{found.prompts} prompts"
    return [
        ("memory per GPU, estimated", ""),
        ("frozen weights", f"{gigabytes(sum(found.weights.values()))}: {parts}"),
        ("trained", f"{gigabytes(found.trained)}: {name}, {counted}"),
        ("recorded latents", f"{gigabytes(found.recorded)} per epoch, if one process samples them all"),
        ("prompt embeddings", f"{gigabytes(found.embeddings)} at most, of {kept}"),
        *((titles.get(phase, phase), f"{gigabytes(size)}{needs[phase]}") for phase, size in found.phases.items()),
        ("at the peak", f"{gigabytes(found.peak)}; {' and '.join(comes)} come{'s' * (len(comes) == 1)} on top"),
    ]


def _fits(found: Estimate, rewards: RewardModels, would: list[Saving]) -> Lines:
    """The smallest card, and the one with all settings that would save something."""
    needed = found.peak + rewards.known
    now, then = (smallest_card(needed - less) for less in (0, sum(one.saved for one in would)))
    fits = "none" if now is None else f"{now} GB"
    reward = " and the reward's model" if rewards.known else ""
    less = "" if then == now else f"; with the settings below {then} GB"
    return [("fits a card of", f"{fits}: {gigabytes(needed + CUDA)} with CUDA{reward}{less}")]


def _saving_lines(on: list[Saving], would: list[Saving]) -> Lines:
    def named(one: Saving, says: str) -> tuple[str, str]:
        longer = f"; an epoch takes {one.slower:.0%} longer" if one.slower else ""
        return one.setting, f"{one.value} {says} {gigabytes(one.saved)}{longer}"

    lines = [named(one, "saves") for one in on]
    lines += [named(one, "would save" if i == 0 else "would then save another") for i, one in enumerate(would)]
    return [("what saves memory, estimated", ""), *lines] if lines else []


def _on_cpu(config: DenoisingConfig, model: ModelFiles, estimator: Estimator) -> Lines:
    """The peak where there is no GPU."""
    if torch.cuda.is_available() or not model.here:
        return []
    found = estimator.estimate(config, CPU)
    matrices = ", with attention matrices" if found.passes.eager_attention else ""
    return [("on this CPU", f"{gigabytes(found.peak)} at the peak{matrices}; Python and its libraries come on top")]


def _checked(model: ModelFiles, counts: Mapping[str, int]) -> Lines:
    """Whether the weights that are here are as many as the configurations describe, by the heads of their files."""
    held = {name: parameters_in(model.weights.get(name, [])) for name in counts}
    found = {name: one for name, one in held.items() if one is not None and one[0]}
    if not found:
        return []
    others = [name for name, (count, _) in found.items() if count != counts[name]]
    if others:
        name = others[0]
        here, told = (f"{count / 1e6:.1f} M" for count in (found[name][0], counts[name]))
        return [("parameters", f"{name} has {here}, and its config.json describes {told}: download it again")]
    kinds = sorted({kind for _, kinds in found.values() for kind in kinds})
    return [("parameters", f"as many in the files as the configurations describe, in {' and '.join(kinds)}")]


def _gpu_times(config: DenoisingConfig, needed: int, flops: float) -> Lines:
    lines = []
    for name, (size, peak) in GPUS.items():
        seconds = flops / (SHARE_OF_PEAK * peak)
        lines.append((f"one {name}, {size} GB", _epoch_time(config, seconds, needed, size * GB)))
    lines.append(("", f"at {SHARE_OF_PEAK:.0%} of their peak in bf16, without the reward"))
    if torch.cuda.is_available():
        size, rate = torch.cuda.get_device_properties(0).total_memory, _gpu_rate()
        lines.append(("the GPU here", _epoch_time(config, flops / (SHARE_OF_PEAK * rate), needed, size)))
        lines.append(("", f"at {SHARE_OF_PEAK:.0%} of its {rate / 1e12:.0f} TFLOPS in a matrix product in bf16"))
    return lines


def _epoch_time(config: DenoisingConfig, seconds: float, needed: int, size: float) -> str:
    fits = "" if needed <= size else f"; more than its {gigabytes(size)}"
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
    batch = config.sample_batch_size * config.sampler.passes
    choices = {None: [False], "no": [False], "auto": [False, True]}.get(config.mixed_precision, [True])
    family, network = model.family, _random_network(model, config)
    tokens, size = family.prompt_tokens(model.configs), {"height": config.height, "width": config.width}
    latent_size = family.latent_size(network.config, model.configs["vae"], **size)
    inputs = family.zeros(network.config, batch, tokens=tokens, latent_size=latent_size, dtype=network.dtype)
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
        family.use_attention(network, family.cpu_attention)
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
