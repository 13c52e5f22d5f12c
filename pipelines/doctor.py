"""What `diffusion-align doctor` says: this machine, and whether and how a recipe would run. Nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from diffusion_align import __version__
from diffusion_align.assets import LANGUAGE_MODELS
from diffusion_align.diffusion.ddpo import DDPOConfig, clip_nats, part_of_steps
from diffusion_align.diffusion.dpo import DiffusionDPOConfig
from diffusion_align.diffusion.footprint import (
    DecoderCost,
    UNetCost,
    decoder_cost,
    latent_shape,
    parameter_counts,
    unet_cost,
    unet_inputs,
)
from diffusion_align.diffusion.policy import _peft_config
from diffusion_align.diffusion.schedule import DiffusionSchedule, build_schedule, training_schedule
from diffusion_align.diffusion.step_weights import nats_per_squared_error
from diffusion_align.estimators import beta_in_nats
from diffusion_align.llm.data import TextDataConfig
from diffusion_align.pipelines.configuration import METHODS, read_config, shipped_configs
from diffusion_align.pipelines.machine import best_seconds
from diffusion_align.pipelines.model_files import ModelFiles, cached_repositories, find_model, gigabytes
from diffusion_align.rewards import REWARDS, reward_name, reward_problem
from diffusion_align.rewards.clip import is_emoji_sd
from diffusion_align.training.config import _number, apply_overrides, load_yaml
from diffusion_align.training.errors import ConfigError, UserError, first_line

Lines = list[tuple[str, str]]
"""(name, value); a name without a value is the heading of those that follow."""
ImageConfig = DDPOConfig | DiffusionDPOConfig

GPUS = {"RTX 4090": (24, 165e12), "A100": (80, 312e12), "H100": (80, 989e12)}
"""Name -> memory in GB and dense bf16 operations a second, float32 accumulation, from the makers' data sheets."""
SHARE_OF_PEAK = 0.4
TIMED_BELOW = 100e6
"""Parameters of a UNet: below, a pass is timed on a CPU, and a GPU would not be kept busy enough to estimate it."""
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
_EXTRAS = {
    "open-clip": ("open_clip",),
    "ocr": ("rapidocr", "onnxruntime"),
    "brisque": ("brisque",),
    "datasets": ("datasets",),
    "serve": ("fastapi", "uvicorn"),
    "text-rewards": ("vaderSentiment",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
_WEIGHTS = ("clip", "head", "weights", "tokenizer")
"""Options of rewards that name files or hub ids."""
_HUB_ID = re.compile(r"(?<![\w./-])[A-Za-z][\w.-]*/[A-Za-z][\w.-]*(?![\w/])")


@dataclass(frozen=True)
class Passes:
    """UNet passes of one sample in an epoch, by what they are for, and pictures decoded; evaluation on average."""

    sampling: int
    reference: int
    trained: int
    evaluation: float
    decoded: float

    @property
    def forward(self) -> float:
        return self.sampling + self.reference + self.evaluation


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU: what stays, and what each phase needs on top of it."""

    weights: int
    trained: int
    recorded: int
    training: int
    sampling: int
    decoding: int

    @property
    def peak(self) -> int:
        return self.weights + self.trained + self.recorded + max(self.training, self.sampling, self.decoding)


def describe_machine() -> Lines:
    """Lines about versions, devices and extras."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    lines = [("this machine", ""), ("diffusion-align", __version__), ("python", platform.python_version())]
    lines += [(name, importlib.metadata.version(name)) for name in _PACKAGES]
    lines += [("device", ", ".join(gpus) or f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    for extra, modules in _EXTRAS.items():
        found = all(importlib.util.find_spec(module) is not None for module in modules)
        lines.append((f"extra {extra}", "installed" if found else f"missing: pip install 'diffusion-align[{extra}]'"))
    return lines


def describe_config(source: str, overrides: Sequence[str]) -> tuple[Lines, list[str]]:
    """Lines about what a recipe would do, and sentences about what is wrong with it.

    With problems, the lines are about what is left of the recipe when the settings that cannot be read are left out.

    Raises:
        ConfigError: too little can be read.
    """
    problems: list[str] = []
    try:
        config: Any = read_config(source, overrides)
    except ConfigError as error:
        problems = error.problems
        config = _what_can_be_read(source, overrides)
        if config is None:
            raise
    if isinstance(config, DDPOConfig | DiffusionDPOConfig):
        lines, found = _describe_pictures(config)
        problems = list(dict.fromkeys(problems + found))
    else:
        lines = _describe_text(config)
    many = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return [*lines, ("verdict", ""), ("settings", f"{many}, see below" if problems else "no problem found")], problems


def _what_can_be_read(source: str, overrides: Sequence[str]) -> Any:
    """The settings without those that are not allowed; None where they cannot be read at all or name no model."""
    try:
        given = load_yaml(shipped_configs().get(source) or Path(source).expanduser())
        raw = _number(apply_overrides(given, overrides))
    except ConfigError:
        return None
    method = METHODS.get(str(raw.get("method", "ddpo")))
    if method is None:
        return None
    for _ in range(100):  # each time there is less to complain about
        try:
            return method.model_validate(raw)
        except ValidationError as error:
            for problem in error.errors():
                place, *below = problem["loc"] or ("model",)
                if problem["type"] != "missing":
                    _leave_out(raw, [place, *below])
                elif place == "model" or below:
                    return None
                else:
                    raw[str(place)] = {"output_dir": "runs", "prompts": ["-"]}.get(str(place))
    return None


def _leave_out(raw: dict[Any, Any], place: Sequence[Any]) -> None:
    """Delete the setting at ``place``, or the nearest section around it."""
    first, *below = place
    for key in [key for key in raw if str(key) == str(first)]:
        if below and isinstance(raw[key], dict) and raw[key].keys() & {below[0]}:
            _leave_out(raw[key], below)
        else:
            del raw[key]


def _describe_pictures(config: ImageConfig) -> tuple[Lines, list[str]]:
    model = find_model(config)
    lines: Lines = [("model", ""), *model.lines, *_rewards(config)]
    problems = list(model.problems)
    unet, vae = model.configs.get("unet"), model.configs.get("vae")
    schedule = None
    try:
        schedule = _schedule(config, model.configs["scheduler"]) if "scheduler" in model.configs else None
    except UserError as error:
        problems.append(str(error))
    steps = None if schedule is None else part_of_steps(schedule.stochastic_steps, config.timestep_range)
    if steps is not None and len(steps) == 0:
        problems.append(
            f"sampler.steps={config.sampler.steps} with timestep_range={list(config.timestep_range)} leaves no "
            "stochastic step to train on: use more steps or a wider range"
        )
    dimensions = math.prod(latent_shape(unet)) if unet else None
    decisions, epoch = _epoch(config, steps)
    passes = _passes(config, decisions)
    lines += [*epoch, *_nats(config, schedule, steps, dimensions)]
    if not unet or not vae:
        return [*lines, ("memory and time", "not estimated: the model's configuration is not here")], problems
    try:
        lines += _costs(config, model, passes, decisions)
    except Exception as error:  # a configuration of somebody's own may hold anything
        lines.append(("memory and time", f"not estimated: {first_line(error)}"))
    return lines, problems


# -- rewards -----------------------------------------------------------------------------------------------------------


def _rewards(config: ImageConfig) -> Lines:
    held_out = config.evaluation.reward if config.evaluation else None
    specs = [(spec, "") for spec in _reward_specs(config.reward)]
    specs += [(spec, ", held out") for spec in _reward_specs(held_out)]
    cached = cached_repositories() if specs else {}
    lines: Lines = [("reward", "")] if specs else []
    for spec, role in specs:
        source = spec.get("name") if isinstance(spec, Mapping) else spec
        name = source if isinstance(source, str) else reward_name(source)
        wrong = reward_problem(spec)
        install = re.search(r"pip install '[^']+'", wrong or "")
        state = f"missing: {install[0]}" if install else "cannot be built, see below" if wrong else "installed"
        lines.append((name, state + role))
        if name in REWARDS:
            options = spec if isinstance(spec, Mapping) else {}
            lines += _reward_model(name, options, config.model, cached)
    return lines


def _reward_specs(reward: Any) -> Iterator[Any]:
    """The rewards in a setting: one, a list, or those that a mapping combines."""
    if isinstance(reward, list | tuple):
        for one in reward:
            yield from _reward_specs(one)
    elif isinstance(reward, Mapping) and isinstance(reward.get("rewards"), list | tuple):
        yield from _reward_specs(reward["rewards"])
    elif reward is not None:
        yield reward


def _reward_model(name: str, options: Mapping[str, Any], model: str, cached: Mapping[str, int]) -> Lines:
    """The model of a built-in reward, as its module names it, and what of it is in the cache."""
    module, function = REWARDS[name]
    about = str(importlib.import_module(module).ABOUT.get(function, {}).get("model") or "")
    chosen = {k: v for k, v in options.items() if k in _WEIGHTS and isinstance(v, str)}
    given = {k: v for k, v in chosen.items() if os.path.exists(os.path.expanduser(v))}
    lines: Lines = [(f"  {key}", f"{value} (here)") for key, value in given.items()]
    named = [v for k, v in chosen.items() if k not in given and not v.startswith("open_clip:")]
    if not chosen:
        lines += [("  model", about)] if about else []
        embedded = is_emoji_sd(model) and "emoji" in about  # what a reward then takes by itself
        named += [] if embedded else [about]
    for hub_id in dict.fromkeys(match for text in named for match in _HUB_ID.findall(text)):
        state = f"in the cache, {gigabytes(cached[hub_id])}" if hub_id in cached else "not in the cache"
        lines.append(("  files", f"{hub_id}: {state}"))
    return lines


# -- what an epoch is --------------------------------------------------------------------------------------------------


def _schedule(config: ImageConfig, scheduler: Mapping[str, Any]) -> DiffusionSchedule:
    """The steps that are trained on, as the trainer builds them."""
    bare = SimpleNamespace(config=dict(scheduler))
    sampler = config.sampler
    drawing = build_schedule(bare, sampler.steps, sampler=sampler.name, eta=sampler.eta)
    logged = isinstance(config, DDPOConfig) or config.target == "logged"
    return drawing if logged else training_schedule(bare)


def _epoch(config: ImageConfig, steps: Tensor | None) -> tuple[int, Lines]:
    """Decisions in an epoch (for Diffusion-DPO of a pair), and lines about it."""
    samples = config.samples_per_epoch
    if isinstance(config, DDPOConfig):
        count = config.sampler.steps if steps is None else len(steps)
        decisions = samples * max(1, round(config.timestep_fraction * count))
        what = ("pictures an epoch", f"{samples}, each {config.sampler.steps} steps")
    else:
        pairs = samples // (config.group_size if config.online else 1)
        decisions = pairs * config.decisions_per_pair
        source = "" if config.pairs is None else config.pairs.source
        judged = f"the best and the worst of {config.group_size} pictures each"
        what = ("pairs an epoch", f"{pairs}, {judged}" if config.online else f"{pairs} from {source}")
    passes = _passes(config, decisions)
    used = [
        f"{passes.sampling} forward while sampling" if passes.sampling else "",
        f"{passes.reference} forward for the reference" if passes.reference else "",
        f"{passes.evaluation:g} forward for the evaluation" if passes.evaluation else "",
        f"{passes.trained} forward and backward while training",
    ]
    each = math.ceil(decisions / config.updates_per_epoch)
    return decisions, [
        ("an epoch", ""),
        ("epochs", str(config.epochs)),
        what,
        ("optimizer steps an epoch", str(config.updates_per_epoch * config.inner_epochs)),
        ("decisions an update", f"{each} of all processes together, its effective batch"),
        (
            "micro-batches an update",
            f"{math.ceil(each / config.micro_batch_size)} of {config.micro_batch_size}, their gradients added up; "
            "shared among the processes",
        ),
        ("UNet passes an epoch", ", ".join(part for part in used if part)),
    ]


def _passes(config: ImageConfig, decisions: int) -> Passes:
    guided = 2 if config.sampler.guidance_scale > 1 else 1
    drawn = guided * config.samples_per_epoch * config.sampler.steps
    seen = config.evaluation.pictures / config.evaluation.every if config.evaluation else 0
    evaluation = guided * config.sampler.steps * seen
    if isinstance(config, DDPOConfig):
        trained = guided * decisions
        reference = trained if config.kl_coef > 0 else 0
        return Passes(drawn, reference, trained * config.inner_epochs, evaluation, config.samples_per_epoch + seen)
    trained = 2 * decisions * (guided if config.target == "logged" else 1)
    # Where the reference is asked once for all inner epochs, so is the policy as it is at the epoch's beginning.
    looks = 2 if config.inner_epochs > 1 or config.old_refresh == "epoch" else 1
    decoded = seen + (config.samples_per_epoch if config.online else 0)
    drawn = drawn if config.online else 0
    return Passes(drawn, trained * looks, trained * config.inner_epochs, evaluation, decoded)


def _nats(
    config: ImageConfig, schedule: DiffusionSchedule | None, steps: Tensor | None, dimensions: int | None
) -> Lines:
    """What the clip or beta is in nats, which needs the model's resolution and for beta its noise schedule."""
    if dimensions is None:
        return []
    if isinstance(config, DDPOConfig):
        if config.objective != "ratio":
            return []
        nats = clip_nats(config, dimensions)
        return [("clip in nats", f"{nats:.3g}, the joint bound on a decision's {dimensions} dimensions")]
    if config.beta is not None:
        return [("beta in nats", f"{config.beta:.3g}")]
    if config.beta_dpo is None or schedule is None or steps is None or len(steps) == 0:
        return []
    weight_sum = float(nats_per_squared_error(schedule)[steps].sum())
    beta = beta_in_nats(config.beta_dpo, dimensions=dimensions, weight_sum=weight_sum)
    return [("beta in nats", f"{beta:.3g}, which beta_dpo={config.beta_dpo:g} is at this resolution and schedule")]


# -- memory and time ---------------------------------------------------------------------------------------------------


def _costs(config: ImageConfig, model: ModelFiles, passes: Passes, decisions: int) -> Lines:
    """Estimated memory on a GPU and time of an epoch."""
    unet, vae = model.configs["unet"], model.configs["vae"]
    dtype = getattr(torch, config.dtype)
    autocast = {"no": None, "fp16": torch.float16}.get(config.mixed_precision, torch.bfloat16)
    guided = 2 if config.sampler.guidance_scale > 1 else 1
    train_batch = config.micro_batch_size * guided
    if isinstance(config, DiffusionDPOConfig):
        train_batch = 2 * config.micro_batch_size * (guided if config.target == "logged" else 1)
    cost = unet_cost(
        unet,
        config.lora,
        train_batch=train_batch,
        sample_batch=config.sample_batch_size * guided,
        tokens=model.configs.get("text_encoder", {}).get("max_position_embeddings", 77),
        dtype=dtype,
        autocast=autocast,
    )
    vae_dtype = torch.float32 if vae.get("force_upcast", True) else dtype
    decoding = decoder_cost(vae, latent_shape(unet), config.sample_batch_size, vae_dtype)
    sizes = {name: n * dtype.itemsize for name, n in parameter_counts(model.configs).items() if name != "unet"}
    sizes["vae"] = sizes["vae"] // dtype.itemsize * vae_dtype.itemsize
    memory = _memory(config, cost, decoding, sizes, train_batch, guided, decisions, math.prod(latent_shape(unet)))
    factor = 2 if config.lora else 3
    flops: float = cost.flops * (passes.forward + factor * passes.trained)
    flops += decoding.flops / config.sample_batch_size * passes.decoded
    backward = (
        "a training pass counts as 2 forward passes: the weights below the LoRA need no gradient"
        if config.lora
        else "a training pass counts as 3 forward passes"
    )
    return [
        *_memory_lines(config, cost, memory, sizes, train_batch, guided),
        ("time an epoch, estimated", ""),
        ("operations", f"{_large(flops)}FLOPs, {_large(cost.flops)}FLOPs a UNet pass; {backward}"),
        *(_gpu_times(config, memory, flops) if cost.frozen + cost.trained > TIMED_BELOW else []),
        *_time_here(config, model, cost, passes, factor),
    ]


def _memory(
    config: ImageConfig,
    cost: UNetCost,
    decoding: DecoderCost,
    others: Mapping[str, int],
    train_batch: int,
    guided: int,
    decisions: int,
    dimensions: int,
) -> Memory:
    frozen = cost.frozen * getattr(torch, config.dtype).itemsize + (0 if config.lora else 4 * cost.trained)
    averaged = 4 * cost.trained if config.ema_decay else 0
    trained = (4 + 4 + 8) * cost.trained + averaged  # weights and gradients in float32, Adam's two moments
    # x_t and x_s of every decision; the noise of one, and the two pictures of a pair.
    logged = isinstance(config, DDPOConfig) or config.target == "logged"
    recorded = 4 * dimensions * (2 * decisions if logged else decisions + 2 * config.samples_per_epoch)
    a_sample = cost.working // (config.sample_batch_size * guided)
    return Memory(
        weights=frozen + sum(others.values()),
        trained=trained,
        recorded=recorded,
        training=cost.kept + a_sample * train_batch,
        sampling=cost.working,
        decoding=decoding.working,
    )


def _memory_lines(
    config: ImageConfig, cost: UNetCost, memory: Memory, others: Mapping[str, int], train_batch: int, guided: int
) -> Lines:
    unet = memory.weights - sum(others.values())
    what = f"UNet {gigabytes(unet)}" if config.lora else f"reference UNet {gigabytes(unet)}"
    parts = ", ".join([what, *(f"{name} {gigabytes(size)}" for name, size in others.items())])
    name = f"LoRA of rank {config.lora.rank}" if config.lora else "whole UNet"
    precision = {"no": "float32", "auto": "bf16"}.get(config.mixed_precision, config.mixed_precision)
    return [
        ("memory of a GPU, estimated", ""),
        ("frozen weights", f"{gigabytes(memory.weights)}: {parts}"),
        (
            "trained",
            f"{gigabytes(memory.trained)}: {name}, {cost.trained / 1e6:.1f} M parameters with gradients and Adam",
        ),
        ("recorded latents", f"{gigabytes(memory.recorded)} of an epoch, if one process draws them all"),
        (
            "training pass",
            f"{gigabytes(memory.training)} in {precision}, {train_batch} samples with their backward pass",
        ),
        ("sampling pass", f"{gigabytes(memory.sampling)}, {config.sample_batch_size * guided} samples"),
        ("decoding", f"{gigabytes(memory.decoding)}, {config.sample_batch_size} pictures"),
        ("at the peak", f"{gigabytes(memory.peak)}; CUDA itself (about 1 GB) and the reward's model come on top"),
    ]


def _gpu_times(config: ImageConfig, memory: Memory, flops: float) -> Lines:
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


def _epoch_time(config: ImageConfig, seconds: float, memory: Memory, size: float) -> str:
    fits = "" if memory.peak + 1e9 <= size else f"; more than its {gigabytes(size)}"
    return f"{_duration(seconds)}, {_duration(seconds * config.epochs)} for {config.epochs} epochs{fits}"


def _gpu_rate() -> float:
    """Operations a second of a large matrix product in bf16, the best of a few."""
    matrix = torch.ones(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        matrix @ matrix
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 2 * 8192**3 / min(seconds)


def _time_here(config: ImageConfig, model: ModelFiles, cost: UNetCost, passes: Passes, factor: int) -> Lines:
    """An epoch on this CPU, from a pass of a network of the model's shape that is timed now."""
    if torch.cuda.is_available() or not model.here:
        return []
    if cost.frozen + cost.trained > TIMED_BELOW:
        return [("this CPU", "not timed: with more than 100 M parameters a GPU is needed")]
    batch = config.sample_batch_size * (2 if config.sampler.guidance_scale > 1 else 1)
    choices = {"no": [False], "auto": [False, True]}.get(config.mixed_precision, [True])
    network = _random_unet(model.configs["unet"], config)
    tokens = model.configs.get("text_encoder", {}).get("max_position_embeddings", 77)
    inputs = unet_inputs(model.configs["unet"], batch, tokens=tokens, dtype=network.dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.num_threads or threads)
    try:
        seconds = min(best_seconds(lambda: network(**inputs), narrow) for narrow in choices)
    finally:
        torch.set_num_threads(threads)
    total = seconds / batch * (passes.forward + factor * passes.trained)
    return [
        ("this CPU", f"{_duration(total)}, {_duration(total * config.epochs)} for {config.epochs} epochs"),
        ("", f"from a pass of {batch} samples timed now: {seconds:.2g} s; without decoding and the reward"),
    ]


def _random_unet(unet: Mapping[str, Any], config: ImageConfig) -> Any:
    """A network as the trainer has it on a CPU, with random weights; the global generator is left as it was."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    with torch.random.fork_rng(devices=[]):
        network = UNet2DConditionModel.from_config(dict(unet))
        network.set_attn_processor(AttnProcessor())
        if config.lora is not None:
            network.add_adapter(_peft_config(config.lora))
    return network.eval()


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _large(count: float) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {prefix}" if count < 1000 * size else f"{count / size:.0f} {prefix}"
    return f"{count / 1e6:.3g} M"


# -- text --------------------------------------------------------------------------------------------------------------


def _describe_text(config: Any) -> Lines:
    local = config.model in LANGUAGE_MODELS or Path(config.model).expanduser().is_dir()
    samples, prompts = config.samples_per_epoch, getattr(config, "prompts", None)
    if prompts is None:
        what = f"{samples} rows of {_place(config.dataset)}"
    else:
        what = f"{samples} completions of at most {config.max_completion_length} tokens, of {_place(prompts)}"
    each = math.ceil(samples / config.updates_per_epoch)
    return [
        ("model", ""),
        ("model", f"{config.model} ({'here' if local else 'from the hub, downloaded or cached when training starts'})"),
        ("trained", "the whole model" if config.lora is None else f"LoRA of rank {config.lora.rank}"),
        ("an epoch", ""),
        ("epochs", str(config.epochs)),
        ("optimizer steps an epoch", str(config.updates_per_epoch * config.inner_epochs)),
        ("text an epoch", what),
        ("samples an update", f"{each} in micro-batches of {config.micro_batch_size}"),
    ]


def _place(data: TextDataConfig | None) -> str:
    if data is None:
        return "nothing"
    return data.source if isinstance(data.source, str) else f"{len(data.source)} given rows"
