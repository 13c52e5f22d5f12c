"""Configurations of image pipelines, which people edit and downloads cut off: looked at before weights are read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_align.errors import UserError, short
from diffusion_align.models.families import family_of
from diffusion_align.models.families.flow_matching import is_flow

_DENOISERS = ("unet", "transformer")
NETWORKS = (*_DENOISERS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
LARGEST_FILE = 10_000_000
MOST = 1_000_000
"""No number in the configuration of a network is larger; a billion layers would be built one by one."""
MOST_TIMESTEPS = 100_000
LARGEST_LATENT = 4096
_SPACINGS = ("leading", "trailing", "linspace")


def check_configurations(subject: str, folder: Path) -> None:
    """UserError about the first configuration file of a pipeline's folder that cannot be used."""
    for part in (*NETWORKS, "scheduler"):
        name = f"{part}/{'scheduler_config.json' if part == 'scheduler' else 'config.json'}"
        if not os.path.isfile(folder / name):
            continue  # which the loading says
        try:
            with (folder / name).open("rb") as file:
                content = json.loads(file.read(LARGEST_FILE))
        except (OSError, ValueError, RecursionError):
            raise UserError(f"{subject}: {name} is not a valid JSON file: download it again") from None
        if not isinstance(content, dict):
            raise UserError(f"{subject}: {name} holds no JSON object: download it again")
        _check(f"{subject}: {name}", part, content)


def check_loaded(subject: str, pipeline: Any) -> None:
    """The same of a pipeline that is loaded, wherever its configuration comes from; and of its tokenizers."""
    for part in (family_of(pipeline).network, "vae", "scheduler"):
        _check(f"{subject}: {part}", part, dict(getattr(pipeline, part).config))
    for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizer, network = getattr(pipeline, name, None), getattr(pipeline, encoder, None)
        if tokenizer is None or network is None:
            continue
        if not network.config.model_type.startswith("clip"):  # others read as many as the pipeline chooses
            continue
        length, most = tokenizer.model_max_length, network.config.max_position_embeddings
        if not isinstance(length, int) or not 1 <= length <= most:
            raise UserError(
                f"{subject}: {name}: model_max_length={short(length)} must be a whole number from 1 to the {most} "
                f"tokens that {encoder} reads"
            )


def _check(subject: str, part: str, config: Mapping[str, Any]) -> None:
    for wrong in _wrong(part, config):
        raise UserError(f"{subject}: {wrong}")


def _wrong(part: str, config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the settings of one part; whoever wants one stops there."""
    for key, value in _numbers(config) if part in NETWORKS else ():  # a scheduler may be infinite on purpose
        if abs(value) > MOST or not math.isfinite(value):  # whole numbers may be beyond what a float holds
            yield f"{key}={short(value)} is too large"
    if part in _DENOISERS:
        size = config.get("sample_size", None if part == "unet" else 1)  # FLUX has none
        sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
        if not all(_is_whole(side, 1, LARGEST_LATENT) for side in sides):
            yield (
                f"sample_size={short(size)} must be the side of its latents, a whole number from 1 to {LARGEST_LATENT} "
                "(64 for images of 512 pixels)"
            )
    if part == "vae":
        factor = config.get("scaling_factor", 0.18215)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
            yield f"scaling_factor={short(factor)} must be a number above 0"
    if part == "scheduler":
        yield from _wrong_with_scheduler(config)


def _wrong_with_scheduler(config: Mapping[str, Any]) -> Iterator[str]:
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in _SPACINGS:
        yield f"timestep_spacing={short(spacing)} must be one of {', '.join(_SPACINGS)}"
    count = config.get("num_train_timesteps", 1000)
    if not _is_whole(count, 1, MOST_TIMESTEPS):
        yield f"num_train_timesteps={short(count)} must be a whole number from 1 to {MOST_TIMESTEPS}"
    if is_flow({"shift": 1.0, **config}):
        yield from _wrong_with_flow_scheduler(config)
        return
    for key in ("beta_start", "beta_end"):
        beta = config.get(key, 0.01)
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
            yield f"{key}={short(beta)} must be a number from 0 to 1"
    if not _is_whole(offset := config.get("steps_offset", 0), 0, count):
        yield f"steps_offset={short(offset)} must be a whole number from 0 to num_train_timesteps={count}"
    betas = config.get("trained_betas")
    if betas is not None and not (
        isinstance(betas, list | tuple)
        and len(betas) == count
        and all(isinstance(beta, int | float) and 0 <= beta <= 1 for beta in betas)
    ):
        yield f"trained_betas={short(betas)} must be null, or num_train_timesteps={count} numbers from 0 to 1"
    limit = config.get("clip_sample_range", 1.0)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        yield f"clip_sample_range={short(limit)} must be a number above 0"


def _wrong_with_flow_scheduler(config: Mapping[str, Any]) -> Iterator[str]:
    for key, usual in (("shift", 1.0), ("base_shift", 0.5), ("max_shift", 1.15)):
        if not _is_number(shift := config.get(key, usual)) or not 0 < shift <= MOST:
            yield f"{key}={short(shift)} must be a number above 0"
    tokens = [config.get(key, usual) for key, usual in (("base_image_seq_len", 256), ("max_image_seq_len", 4096))]
    if not all(_is_whole(count, 1, MOST) for count in tokens) or tokens[0] >= tokens[1]:
        yield (
            f"base_image_seq_len={short(tokens[0])} must be a whole number, and max_image_seq_len={short(tokens[1])} a "
            "larger one"
        )
    last = config.get("shift_terminal")
    if last is not None and (not _is_number(last) or not 0 <= last < 1):
        yield f"shift_terminal={short(last)} must be null, or a number from 0 to below 1"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in a configuration, with the key that it is under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
