"""LoRA adapters of a diffusers pipeline: read from files, put on, merged into the weights, taken off, written.

Of files diffusers', kohya's and peft's layouts are read, and diffusers' is written.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import textwrap
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffusion_align.errors import UserError, first_line, short
from diffusion_align.inputs import check_path
from diffusion_align.models.families import family_of
from diffusion_align.models.lora import (
    ADAPTER,
    adapter_state,
    carries_adapters,
    inject_lora,
    lora_layers,
    merge_lora,
    plain_config,
    remove_lora,
    some_of,
    unfit,
    write_tensors,
)
from diffusion_align.models.model_ref import LORA_FILE
from diffusion_align.writing import make_folder

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_HEADER = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"
_KEPT = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora", "lora_bias")
"""The peft settings that define what the weights mean; the others are about training."""


@dataclass(frozen=True)
class AdapterState:
    """The adapter of a network at some time.

    Attributes:
        weights: name -> copy of every weight.
        scales: layer -> its alpha and its scale.
        config: peft's settings.
    """

    weights: dict[str, Tensor]
    scales: dict[str, tuple[float, float]]
    config: Any


def adapted_parts(pipeline: Any) -> dict[str, nn.Module]:
    """Name -> network of those that carry adapters."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: network for name, network in networks.items() if carries_adapters(network)}


def trained_network(pipeline: Any) -> Any:
    """The network that is trained: a UNet or a transformer."""
    return getattr(pipeline, family_of(pipeline).network)


def adapter_names(pipeline: Any) -> set[str]:
    """What peft calls the adapters of all networks."""
    return {name for network in adapted_parts(pipeline).values() for name in network.peft_config}  # type: ignore[union-attr]


def frozen_dtype(pipeline: Any) -> torch.dtype:
    """The dtype of the trained network's own weights; an adapter's may be wider."""
    return next(p.dtype for name, p in trained_network(pipeline).named_parameters() if ".lora_" not in name)


def load_lora(pipeline: Any, lora: str | Path, model: str) -> None:
    """Load LoRA weights, from safetensors only, onto a pipeline without adapters; Args, Raises: as of ``read_lora``."""
    check_path(lora, f"lora={short(str(lora))}")
    for name, part in read_lora(lora, pipeline, model).items():
        try:
            inject_lora(getattr(pipeline, name), part.config, part.weights)
        except Exception as error:  # peft raises whatever settings of others lead to
            raise UserError(f"lora={str(lora)!r} could not be loaded into {model}: {first_line(error)}") from error


def merge_adapters(pipeline: Any) -> None:
    """Leave in the weights what the pipeline computes with its adapters; no adapter layers are left.

    Raises:
        UserError: of a kind that peft cannot merge; some are merged by then.
    """
    for name, network in adapted_parts(pipeline).items():
        try:
            merge_lora(network)
        except Exception as error:  # peft raises whatever an adapter of its many kinds cannot do
            raise UserError(
                f"the adapters of {name} cannot be merged into its weights ({first_line(error)}): unload them, or load "
                "others"
            ) from error


def unload_lora(pipeline: Any) -> None:
    """Leave the pipeline as it was before adapters were put on it."""
    for network in adapted_parts(pipeline).values():
        remove_lora(network)


def trained_parts(pipeline: Any) -> dict[str, Any]:
    """Name -> network of those that carry an adapter that was trained here, or can be trained further."""
    return {name: part for name, part in adapted_parts(pipeline).items() if ADAPTER in part.peft_config}  # type: ignore[operator]


def adapter_weights(pipeline: Any) -> dict[str, AdapterState]:
    """Name of a network -> a copy of its adapter, of ``trained_parts``."""
    return {name: _adapter_of(network) for name, network in trained_parts(pipeline).items()}


def _adapter_of(network: Any) -> AdapterState:
    named = network.named_parameters()
    weights = {name: p.detach().clone() for name, p in named if ".lora_" in name}
    layers = lora_layers(network).items()
    scales = {name: (layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER]) for name, layer in layers}
    return AdapterState(weights, scales, network.peft_config[ADAPTER])


@torch.no_grad()
def restore_lora(pipeline: Any, states: Mapping[str, AdapterState], untouched: Container[str] = ()) -> None:
    """Undo what has happened to the adapters since ``adapter_weights``; those put on since then are taken off.

    ``untouched``: names of networks to which nothing has happened.
    """
    for part, network in adapted_parts(pipeline).items():
        if part in states:
            _restore(network, states[part])
        elif part not in untouched:
            remove_lora(network)


def _restore(network: Any, state: AdapterState) -> None:
    network.peft_config[ADAPTER] = state.config
    for name, layer in lora_layers(network).items():
        layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = state.scales[name]
    for name, parameter in network.named_parameters():
        if name in state.weights:
            parameter.data = state.weights[name].to(parameter.device)


@contextlib.contextmanager
def merged(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline's networks are copies with their adapters merged."""
    trained = adapted_parts(pipeline)
    for name, part in trained.items():
        setattr(pipeline, name, copy.deepcopy(part))
    try:
        merge_adapters(pipeline)
        yield
    finally:
        for name, part in trained.items():
            setattr(pipeline, name, part)


@dataclass(frozen=True)
class PartOfLoRA:
    """The adapter of one network of a pipeline: peft's ``LoraConfig``, and peft's names -> weights."""

    config: Any
    weights: dict[str, Tensor]


def save_lora(pipeline: Any, folder: Path) -> None:
    """Write the adapters of ``trained_parts``: ``pytorch_lora_weights.safetensors``, as diffusers' pipelines read it.

    Equal adapters give equal bytes. Scales other than 1 are multiplied into the weights, as many readers of this
    layout do not look into the header, which holds the settings.
    """
    # peft's names throughout: convert_state_dict_to_diffusers renames attention layers only, and of a file with names
    # of both kinds load_lora_weights drops the attention layers.
    layers: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, network in trained_parts(pipeline).items():
        state = adapter_state(network, baked=True)
        if part.startswith("text_encoder"):
            state = {_as_transformers_reads(name): weight for name, weight in state.items()}
        layers |= {f"{part}.{name}": weight for name, weight in state.items()}
        config = plain_config(network.peft_config[ADAPTER], baked=True)
        settings |= {f"{part}.{name}": value for name, value in config.items()}
    make_folder(folder, parents=True)
    header = json.dumps(settings, indent=2, sort_keys=True)
    write_tensors(folder / LORA_FILE, layers, {"format": "pt", _HEADER: header})


def read_lora(lora: str | Path, pipeline: Any, model: str) -> dict[str, PartOfLoRA]:
    """Name of a pipeline's network -> the adapter that a file or folder holds for it, at least one.

    Args:
        lora: a ``.safetensors`` file or a folder with one.
        pipeline: of diffusers, whose networks the weights have to fit, all of them.
        model: what the pipeline was loaded from, for errors.

    Raises:
        UserError: there is nothing to read, or some of it does not fit.
    """
    file, subject = _file(lora), f"lora={str(lora)!r} could not be loaded into {model}"
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict
        parts, left_out = _parts(tensors, header, file, pipeline)
    except Exception as error:  # diffusers and peft raise whatever names and settings of others lead to
        reason = " ".join(str(error).split())  # diffusers names what it cannot convert in lines of its own
        raise UserError(f"{subject}: {textwrap.shorten(reason, 300, placeholder=' …')}") from error
    for name, part in parts.items():
        shapes = {weight: tensor.shape for weight, tensor in part.weights.items()}
        for weight in unfit(getattr(pipeline, name), shapes):
            full = f"{name}.{weight}"
            left_out.append(full if full in tensors else weight)
    if left_out or not parts:
        nothing = len(left_out) >= sum(len(part.weights) for part in parts.values())
        raise UserError(
            f"{subject}: {'none' if nothing else 'not all'} of its {len(tensors)} tensors fit a layer, with "
            f"{some_of(left_out)} left over: use a LoRA made for this model"
        )
    return parts


def _file(lora: str | Path) -> Path:
    """The file that is meant by a file or folder."""
    path, subject = Path(lora).expanduser(), f"lora={str(lora)!r}"
    if not path.exists():
        raise UserError(f"{subject}: there is no such file or folder")
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise UserError(f"{subject} is not a .safetensors file: other formats are not read")
        return path
    for name in (LORA_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    files = [file for file in files if not re.search("scheduler|optimizer|checkpoint", file.name)] or files
    files = [file for file in files if file.name.endswith(LORA_FILE)] or files
    if len(files) == 1:
        return files[0]
    if not files:
        final = " (the weights of a run are in its final/)" if (path / "final").is_dir() else ""
        raise UserError(f"{subject}: the folder has no .safetensors file{final}: name a file, or a folder with one")
    raise UserError(f"{subject}: the folder has {some_of([file.name for file in files])} files: name one of them")


def _parts(
    tensors: dict[str, Tensor], header: Mapping[str, str], file: Path, pipeline: Any
) -> tuple[dict[str, PartOfLoRA], list[str]]:
    """The adapters in peft's names, and the tensors that no network of the pipeline is there for."""
    denoiser = family_of(pipeline).network
    if any(name.startswith(_PEFT_PREFIX) for name in tensors):
        given = file.parent / PEFT_CONFIG
        if not given.is_file():
            raise ValueError(f"it is in peft's layout, whose scale is in {PEFT_CONFIG}: put that file beside it")
        settings = json.loads(given.read_text(encoding="utf-8"))
        if settings.get("peft_type") != "LORA":
            raise ValueError(f"{PEFT_CONFIG} is of peft_type={settings.get('peft_type')!r}, and only LORA is read")
        weights = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        return {denoiser: PartOfLoRA(_config(settings), weights)}, []
    # diffusers drops these and applies the rest.
    dropped = [name for name in tensors if "dora_scale" in name]
    if dropped:
        return {}, dropped
    state, alphas = _in_diffusers_names(tensors, pipeline)
    settings = json.loads(header.get(_HEADER, "{}"))
    networks = [name for name in (denoiser, "text_encoder", "text_encoder_2") if getattr(pipeline, name, None)]
    if not any(name.startswith(tuple(f"{network}." for network in networks)) for name in state):
        # UNet2DConditionModel.save_lora_adapter writes no prefix.
        state = {f"{denoiser}.{name}": tensor for name, tensor in state.items()}
        settings = {f"{denoiser}.{name}": value for name, value in settings.items()}
    parts = {}
    for network in networks:
        own = _of(network, state)
        if not own:
            continue
        convert = _denoiser_names if network == denoiser else _text_encoder_names
        renamed = convert(getattr(pipeline, network), own)
        scales = convert(getattr(pipeline, network), {_as_weight(k): v for k, v in _of(network, alphas).items()})
        described = _of(network, settings)
        config = _config(described) if described else _config_of(renamed, {_layer(k): v for k, v in scales.items()})
        parts[network] = PartOfLoRA(config, renamed)
    prefixes = tuple(f"{network}." for network in networks)
    return parts, [name for name in state if not name.startswith(prefixes)]


def _in_diffusers_names(tensors: dict[str, Tensor], pipeline: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors with the name of a network before theirs, and the alphas of kohya's files."""
    if not hasattr(pipeline, "unet"):  # whose files have had names of their own
        return dict(tensors), {}
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "text_encoder_2") else {}
    state, alphas = pipeline.lora_state_dict(dict(tensors), **options)
    return state, alphas or {}


def _of(network: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(f"{network}."): v for k, v in named.items() if k.startswith(f"{network}.")}


def _as_weight(name: str) -> str:
    """An alpha's name, as diffusers gives it, as the name of a weight of its layer."""
    name = name.removesuffix(".alpha")
    return name if name.endswith(".weight") else f"{name}.lora.down.weight"


def _as_transformers_reads(name: str) -> str:
    """peft's name of a weight as transformers 5 wants it of a text encoder; DoRA's others it would leave random."""
    return f"{name}.weight" if name.endswith(_MAGNITUDE) else name


def _layer(name: str) -> str:
    return name.rpartition(".lora_")[0]


def _denoiser_names(network: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
    """The names of older diffusers and of kohya's files as peft's."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    return convert_unet_state_dict_to_peft(named)


def _text_encoder_names(network: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
    """As ``_denoiser_names``; transformers has put the layers of CLIP under text_model, and taken them from there."""
    from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_peft

    modules = dict(network.named_modules())
    # One file may hold names of both kinds, and diffusers left to itself converts those of one.
    older = {name: value for name, value in named.items() if "_lora." in name}
    newer = {name: value for name, value in named.items() if name not in older}
    named = convert_state_dict_to_peft(older, original_type=StateDictType.DIFFUSERS_OLD)
    named |= convert_state_dict_to_peft(newer, original_type=StateDictType.DIFFUSERS)

    def place(name: str) -> str:
        name = name.replace(f"{_MAGNITUDE}.weight", _MAGNITUDE)
        other = name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
        return other if _layer(name) not in modules and _layer(other) in modules else name

    return {place(name): value for name, value in named.items()}


def _config(settings: Mapping[str, Any]) -> Any:
    """peft's settings of written ones."""
    from peft import LoraConfig

    if "r" not in settings or "lora_alpha" not in settings:
        raise ValueError("its settings lack r or lora_alpha")
    return LoraConfig(**{name: settings[name] for name in _KEPT if name in settings})


def _config_of(weights: Mapping[str, Tensor], alphas: Mapping[str, float]) -> Any:
    """peft's settings of weights that come without: a layer's scale is its alpha over its rank, 1 without an alpha."""
    from peft import LoraConfig

    ups = {_layer(name): tensor for name, tensor in weights.items() if name.endswith(".lora_B.weight")}
    ranks = {layer: tensor.shape[1] for layer, tensor in ups.items() if tensor.ndim > 1}
    if not ranks:
        return LoraConfig(target_modules=["-"])
    of_layers = {layer: alphas.get(layer, rank) for layer, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, of_layers))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{layer}": value for layer, value in ranks.items() if value != rank},
        alpha_pattern={f"^{layer}": value for layer, value in of_layers.items() if value != alpha},
        target_modules=sorted(ranks),
        use_dora=any(".lora_magnitude_vector" in name for name in weights),
        lora_bias=any(name.endswith(".lora_B.bias") for name in weights),
    )
