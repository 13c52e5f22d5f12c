"""What `diffusion-align list` and `doctor` say."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion_align import __version__
from diffusion_align.assets import LANGUAGE_MODELS
from diffusion_align.diffusion.ddpo import DDPOConfig
from diffusion_align.diffusion.dpo import DiffusionDPOConfig
from diffusion_align.diffusion.loading import EMBEDDED_PIPELINES
from diffusion_align.diffusion.pairs import EMBEDDED, PairsConfig, open_pairs
from diffusion_align.llm.data import TextDataConfig
from diffusion_align.pipelines.configuration import (
    read_config,
    shipped_configs,
    shipped_prompts,
    shipped_text_prompts,
)
from diffusion_align.rewards import describe_rewards, describe_text_rewards
from diffusion_align.training.prompts import Prompt, load_prompts
from diffusion_align.training.tables import TableSource, open_table

Entries = list[tuple[str, list[str]]]
"""(name, lines about it)."""

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
_EXTRAS = {
    "open-clip": "open_clip",
    "datasets": "datasets",
    "text-rewards": "vaderSentiment",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


def _configs() -> Entries:
    return [(name, [_first_comment(path)]) for name, path in shipped_configs().items()]


def _models() -> Entries:
    about = {
        "emoji-sd": "pictures: draws 64x64 emoji-like pictures of 294 concepts, small enough for a CPU",
        "tiny-lm": "text: writes English sentences letter by letter, small enough for a CPU",
        "smollm2": "text: SmolLM2-135M-Instruct, from a wheel; see the README",
    }
    return [
        *((name, [about[name]]) for name in (*EMBEDDED_PIPELINES, *LANGUAGE_MODELS)),
        ("any other", ["an SD1.x, SD2 or SDXL diffusers folder or hub id, or a causal language model's"]),
    ]


def _prompts() -> Entries:
    pictures = [(name, _for_pictures(load_prompts(path))) for name, path in shipped_prompts().items()]
    texts = [
        (name, f"{len(open_table(TableSource('prompts', str(path), lines='prompt')))} prompts for text")
        for name, path in shipped_text_prompts().items()
    ]
    return [(name, [about]) for name, about in pictures + texts]


def _for_pictures(prompts: Sequence[Prompt]) -> str:
    keys = ", ".join(dict.fromkeys(key for _, metadata in prompts for key in metadata))
    return f"{len(prompts)} prompts for pictures" + (f", with the metadata {keys}" if keys else "")


def _pairs() -> Entries:
    counts = " and ".join(f"{len(open_pairs(PairsConfig(source=EMBEDDED, split=s)))} {s}" for s in ("train", "heldout"))
    return [
        (EMBEDDED, [f"{counts} pairs of drawings of one concept: shaded 3-D, chosen, and flat"]),
        ("any other", ["a .jsonl, .csv or .parquet file, a folder, or the hub id of a data set"]),
    ]


def _rewards() -> Entries:
    return [
        (
            row["name"],
            [
                row["description"],
                *(f"{key}: {value}" for key, value in row.items() if key not in ("name", "description")),
            ],
        )
        for row in describe_rewards() + describe_text_rewards()
    ]


LISTINGS: dict[str, Callable[[], Entries]] = {
    "configs": _configs,
    "models": _models,
    "prompts": _prompts,
    "pairs": _pairs,
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
    config: Any = read_config(source, overrides)
    embedded = (*EMBEDDED_PIPELINES, *LANGUAGE_MODELS)
    local = config.model in embedded or Path(config.model).expanduser().is_dir()
    describe: Callable[[Any], list[tuple[str, str]]] = _describe_text
    if isinstance(config, DDPOConfig | DiffusionDPOConfig):
        describe = _describe_ddpo if isinstance(config, DDPOConfig) else _describe_dpo
    return [
        ("model", f"{config.model} ({'here' if local else 'from the hub, downloaded or cached when training starts'})"),
        ("epochs", str(config.epochs)),
        ("optimizer steps an epoch", str(config.updates_per_epoch * config.inner_epochs)),
        *describe(config),
        ("settings", "no problem found"),
    ]


def _describe_ddpo(config: DDPOConfig) -> list[tuple[str, str]]:
    decisions = config.samples_per_epoch * max(1, round(config.timestep_fraction * config.sampler.steps))
    guided = 2 if config.sampler.guidance_scale > 1 else 1
    return [
        ("pictures an epoch", f"{config.samples_per_epoch}, each {config.sampler.steps} steps"),
        _decisions_an_update(config, decisions),
        (
            "UNet passes an epoch",
            f"{guided * config.samples_per_epoch * config.sampler.steps} forward while sampling, "
            f"{guided * decisions * config.inner_epochs} forward and backward while training",
        ),
    ]


def _describe_dpo(config: DiffusionDPOConfig) -> list[tuple[str, str]]:
    guided = 2 if config.sampler.guidance_scale > 1 else 1
    pairs = config.samples_per_epoch // (config.group_size if config.online else 1)
    decisions = pairs * config.decisions_per_pair
    drawing = guided * config.samples_per_epoch * config.sampler.steps
    passes = 2 * decisions * (guided if config.target == "logged" else 1)
    # Where the reference is asked once for all inner epochs, so is the policy as it is at the epoch's beginning.
    looks = 2 if config.inner_epochs > 1 or config.old_refresh == "epoch" else 1
    source = (
        f"{pairs}, the best and the worst of {config.group_size} pictures each"
        if config.pairs is None
        else f"{pairs} from {config.pairs.source}"
    )
    return [
        ("pairs an epoch", source),
        _decisions_an_update(config, decisions),
        (
            "UNet passes an epoch",
            (f"{drawing} forward while sampling, " if config.online else "")
            + f"{passes * looks} forward for the reference, "
            f"{passes * config.inner_epochs} forward and backward while training",
        ),
    ]


def _describe_text(config: Any) -> list[tuple[str, str]]:
    samples, prompts = config.samples_per_epoch, getattr(config, "prompts", None)
    if prompts is None:
        what = f"{samples} rows of {_place(config.dataset)}"
    else:
        what = f"{samples} completions of at most {config.max_completion_length} tokens, of {_place(prompts)}"
    each = math.ceil(samples / config.updates_per_epoch)
    return [
        ("text an epoch", what),
        ("samples an update", f"{each} in micro-batches of {config.micro_batch_size}"),
        ("trained", "the whole model" if config.lora is None else f"LoRA of rank {config.lora.rank}"),
    ]


def _place(data: TextDataConfig) -> str:
    return data.source if isinstance(data.source, str) else f"{len(data.source)} given rows"


def _decisions_an_update(config: DDPOConfig | DiffusionDPOConfig, decisions: int) -> tuple[str, str]:
    each = math.ceil(decisions / config.updates_per_epoch)
    return "decisions an update", f"{each} in micro-batches of {config.micro_batch_size}"


def _first_comment(path: Path) -> str:
    first = path.read_text().splitlines()[0]
    return first.removeprefix("#").strip()
