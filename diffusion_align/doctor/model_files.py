"""Which files of a text-to-image model are here and which would be downloaded. Reads configurations, never weights."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusion_align.assets import EMBEDDED_PIPELINES, asset_path
from diffusion_align.diffusion.settings import DenoisingConfig
from diffusion_align.doctor.known_models import PUBLISHED, PUBLISHED_IN_HALF
from diffusion_align.doctor.memory import parameter_counts
from diffusion_align.errors import UserError
from diffusion_align.models.families import (
    ModelFamily,
    StableDiffusion,
    family_of_class,
    family_of_network,
    find_family,
)
from diffusion_align.models.image_pipelines import WEIGHTS_FILE
from diffusion_align.models.model_ref import ModelRef, image_model_ref
from diffusion_align.models.pipeline_configurations import NETWORKS

_FLOATING = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class ModelFiles:
    """What is known of a model without loading or downloading it.

    Attributes:
        configs: part -> its configuration, of those that are known; also of a text encoder that is not loaded.
        lines: (name, value) about every part.
        problems: sentences about what is missing where nothing will be downloaded.
        here: whether all of it is on this machine.
        origin: of a run, what it was before anything was trained; rewards choose their CLIP by it.
        family: of the pipeline, as far as it is known.
        weights: part -> the files that are here of its weights.
    """

    configs: dict[str, dict[str, Any]]
    lines: list[tuple[str, str]]
    problems: list[str] = field(default_factory=list)
    here: bool = False
    origin: str | None = None
    family: ModelFamily = field(default_factory=StableDiffusion)
    weights: dict[str, list[Path]] = field(default_factory=dict)


def find_model(config: DenoisingConfig) -> ModelFiles:
    """The files of ``config.model``: embedded, a folder, one file, a Hub id in the cache or not, or a run's base."""
    model = config.model
    try:
        ref = image_model_ref(model)
    except UserError:  # which is among the settings' problems
        return ModelFiles({}, [("model", f"{model} (a run that cannot be used)")])
    if ref.run is not None and ref.base != model:
        return _under_a_run(config, ref)
    path = asset_path(model) if model in EMBEDDED_PIPELINES else Path(os.path.expanduser(model))
    where = "embedded" if model in EMBEDDED_PIPELINES else "a folder"
    if os.path.isdir(path):
        return _in_folder(config, path, where, complete=True)
    if model.endswith(".safetensors"):
        return _one_file(config, path)
    snapshot = cached_snapshot(model)
    if snapshot is not None:
        return _in_folder(config, snapshot, "Hub id, in the cache", complete=False)
    return _on_the_hub(config)


def cached_snapshot(model: str) -> Path | None:
    """The folder of a pipeline's Hub id in the local cache, whole or not."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if model.count("/") != 1:
        return None
    try:
        index = try_to_load_from_cache(model, "model_index.json", cache_dir=constants.HF_HUB_CACHE)
    except HFValidationError:  # a path, say
        return None
    return Path(index).parent if isinstance(index, str) else None


def cached_repositories() -> dict[str, int]:
    """Hub id -> bytes, of every model in the local cache."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError):  # none yet; ValueError where a file stands in its place
        return {}
    return {repository.repo_id: repository.size_on_disk for repository in found if repository.repo_type == "model"}


def gigabytes(count: float) -> str:
    """``count`` bytes to read: 1 GB is 10^9."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.{0 if count >= 1e7 else 1}f} MB"


def _under_a_run(config: DenoisingConfig, ref: ModelRef) -> ModelFiles:
    loaded = {
        "model": ref.base,
        "weights_variant": config.weights_variant or ref.variant,
        "base_config": config.base_config or ref.base_config,
        "family": config.family or ref.family,
    }
    base = find_model(config.model_copy(update=loaded))
    whole = f"a run that trained the whole {base.family.network_title}"
    what = f"a run: LoRA of {len(ref.adapters)} on its base" if ref.adapters else whole
    (_, first), *rest = base.lines
    return replace(base, lines=[("model", f"{config.model} ({what})"), ("base", first), *rest], origin=ref.origin)


def _in_folder(config: DenoisingConfig, folder: Path, where: str, *, complete: bool) -> ModelFiles:
    """Files in diffusers' layout: a ``complete`` folder, or a Hub snapshot whose missing files are downloaded later."""
    model, variant = config.model, config.weights_variant
    lines, problems = [("model", f"{model} ({where})")], []
    index = _read(folder / "model_index.json")
    family: ModelFamily = StableDiffusion()
    try:
        family = family_of_class(index.get("_class_name"), find_family(config.family), f"model={model!r}")
        family = family.with_settings(config.family_settings)
        family.check_network(f"model={model!r}", _read(folder / family.network / "config.json"))
    except UserError as error:
        problems += [str(error)] if index else []
    named = [name for name, part in index.items() if isinstance(part, list) and part[0]]
    parts = [name for name in named if name not in left_out(family)]
    files = {name: "scheduler_config.json" if name == "scheduler" else "config.json" for name in named}
    configs, here = {name: _read(folder / name / file) for name, file in files.items()}, bool(parts)
    sizes: dict[str, int] = {}
    held: dict[str, list[Path]] = {}
    for name in parts:
        weights = _weights(folder / name, variant)
        if (folder / name).is_dir() and (weights or name not in NETWORKS):
            held[name] = weights
            size = sum(file.stat().st_size for file in weights)
            kind = f", {variant}" if variant and any(f".{variant}" in file.name for file in weights) else ""
            lines.append((name, f"found, {gigabytes(size)}{kind}" if weights else "found"))
            continue
        here = False
        what = "safetensors weights" if (folder / name).is_dir() else "folder"
        if not complete and not sizes:
            sizes = _published_sizes(config)
        size_known = f", {gigabytes(sizes[name])}" if name in sizes else ""
        lines.append((name, f"missing: no {what}" if complete else f"missing{size_known}: it will be downloaded"))
        if complete:
            lack = f"{name}/ has no .safetensors file" if (folder / name).is_dir() else f"the folder has no {name}/"
            problems.append(f"model={model!r} is incomplete: {lack}")
    known = {} if complete else PUBLISHED.get(model, {})
    configs = known | {name: part for name, part in configs.items() if part}
    return ModelFiles(configs, lines, problems, here, family=family, weights=held)


def parameters_in(files: list[Path]) -> tuple[int, set[str]] | None:
    """How many numbers the heads of safetensors files name, and of which dtypes; None if one cannot be read.

    Whole numbers, such as positions, are no parameters.
    """
    from safetensors import SafetensorError, safe_open

    count, dtypes = 0, set()
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
            floating = [tensor for tensor in tensors if tensor.get_dtype() in _FLOATING]
            count += sum(math.prod(tensor.get_shape()) for tensor in floating)
            dtypes |= {_FLOATING[tensor.get_dtype()] for tensor in floating}
    except (OSError, SafetensorError):
        return None
    return count, dtypes


def _one_file(config: DenoisingConfig, path: Path) -> ModelFiles:
    """Files of a single-file checkpoint, whose configuration is stored elsewhere."""
    if not path.is_file():
        return ModelFiles({}, [("model", f"{config.model} (missing)")])
    line = ("model", f"{config.model} (one file, {gigabytes(path.stat().st_size)})")
    if config.base_config is None:
        return ModelFiles({}, [line, ("base_config", "not given: diffusers looks it up on the Hub")], here=True)
    base = find_model(config.model_copy(update={"model": config.base_config}))
    found = f"{config.base_config} ({'found' if base.configs else 'not here: looked up on the Hub'})"
    return ModelFiles(base.configs, [line, ("base_config", found)], here=True, family=base.family)


def _on_the_hub(config: DenoisingConfig) -> ModelFiles:
    from huggingface_hub import constants

    if config.model.count("/") != 1 or config.model.startswith((".", "~", "/")):
        return ModelFiles({}, [("model", f"{config.model} (missing)")])
    offline = ", but HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    model, configs = config.model, PUBLISHED.get(config.model, {})
    chosen: ModelFamily | None = None
    with suppress(UserError):  # which is among the settings' problems
        chosen = find_family(config.family)
    if not configs:
        lines = [("model", f"{model} (Hub id)"), ("files", f"missing, size unknown{offline}")]
        return ModelFiles({}, lines, family=chosen or StableDiffusion())
    sizes = _published_sizes(config)
    total = f"missing: {gigabytes(sum(sizes.values()))} will be downloaded{offline}"
    parts = [(name, f"missing, {gigabytes(size)}") for name, size in sizes.items()]
    lines = [("model", f"{model} (Hub id)"), ("files", total), *parts]
    return ModelFiles(dict(configs), lines, family=chosen or _published_family(config))


def _published_family(config: DenoisingConfig) -> ModelFamily:
    """The family of ``config.model``, one of the published models."""
    configs = PUBLISHED[config.model]
    network = next(configs[name] for name in NETWORKS if name in configs)
    return family_of_network(network).with_settings(config.family_settings)


def _published_sizes(config: DenoisingConfig) -> dict[str, int]:
    """Part -> bytes of the weights that would be downloaded."""
    if config.model not in PUBLISHED:
        return {}
    width = 2 if config.weights_variant == "fp16" or config.model in PUBLISHED_IN_HALF else 4
    family = _published_family(config)
    counts = parameter_counts(family, PUBLISHED[config.model])
    return {name: width * count for name, count in counts.items() if name not in left_out(family)}


def left_out(family: ModelFamily) -> set[str]:
    """Parts of a pipeline that ``family`` does not load."""
    return {name for name, given in family.load_options.items() if given is None}


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """The files that diffusers would load from a part's folder: of the variant if it has any, else the plain ones."""
    held: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.is_file() and (match := WEIGHTS_FILE.fullmatch(file.name)):  # a broken link is no file
            held.setdefault(match["variant"], []).append(file)
    return held.get(variant) or held.get(None, [])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
