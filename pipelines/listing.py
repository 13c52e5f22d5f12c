"""What `diffusion-align list` and `doctor` say."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch

from diffusion_align import __version__
from diffusion_align.diffusion.ddpo import DDPOConfig
from diffusion_align.diffusion.loading import EMBEDDED_PIPELINES
from diffusion_align.pipelines.configuration import read_config, shipped_configs, shipped_prompts
from diffusion_align.rewards import describe_rewards
from diffusion_align.training.prompts import load_prompts

Entries = list[tuple[str, list[str]]]
"""(name, lines about it)."""

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
_EXTRAS = {"open-clip": "open_clip", "tensorboard": "tensorboard", "wandb": "wandb"}


def _configs() -> Entries:
    return [(name, [_first_comment(path)]) for name, path in shipped_configs().items()]


def _models() -> Entries:
    about = ["draws 64x64 emoji-like pictures of 294 concepts, small enough for a CPU"]
    return [
        *((name, about) for name in EMBEDDED_PIPELINES),
        ("any other", ["an SD1.x, SD2 or SDXL diffusers folder or hub id"]),
    ]


def _prompts() -> Entries:
    return [(name, [f"{len(load_prompts(path))} prompts"]) for name, path in shipped_prompts().items()]


def _rewards() -> Entries:
    return [
        (
            row["name"],
            [
                row["description"],
                *(f"{key}: {value}" for key, value in row.items() if key not in ("name", "description")),
            ],
        )
        for row in describe_rewards()
    ]


LISTINGS: dict[str, Callable[[], Entries]] = {
    "configs": _configs,
    "models": _models,
    "prompts": _prompts,
    "rewards": _rewards,
}


def describe_machine() -> list[tuple[str, str]]:
    """(name, value) lines about versions, devices and extras."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    lines = [("diffusion-align", __version__), ("python", platform.python_version())]
    lines += [(name, importlib.metadata.version(name)) for name in _PACKAGES]
    lines += [("device", ", ".join(gpus) or f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    for extra, module in _EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        lines.append((f"extra {extra}", "installed" if found else f"missing: pip install 'diffusion-align[{extra}]'"))
    return lines


def describe_config(source: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) lines about what a recipe would do; a ConfigError lists what is wrong with it."""
    config = cast(DDPOConfig, read_config(source, overrides))
    decisions = max(1, round(config.timestep_fraction * config.sampler.steps))
    pairs = config.samples_per_epoch * decisions
    guided = 2 if config.sampler.guidance_scale > 1 else 1
    local = config.model in EMBEDDED_PIPELINES or Path(config.model).expanduser().is_dir()
    return [
        ("model", f"{config.model} ({'here' if local else 'from the hub, downloaded or cached when training starts'})"),
        ("epochs", str(config.epochs)),
        ("pictures an epoch", f"{config.samples_per_epoch}, each {config.sampler.steps} steps"),
        ("optimizer steps an epoch", str(config.updates_per_epoch * config.inner_epochs)),
        (
            "decisions an update",
            f"{math.ceil(pairs / config.updates_per_epoch)} in micro-batches of {config.micro_batch_size}",
        ),
        (
            "UNet passes an epoch",
            f"{guided * config.samples_per_epoch * config.sampler.steps} forward while sampling, "
            f"{guided * pairs * config.inner_epochs} forward and backward while training",
        ),
        ("settings", "no problem found"),
    ]


def _first_comment(path: Path) -> str:
    first = path.read_text().splitlines()[0]
    return first.removeprefix("#").strip()
