"""LoRA on any network, by peft alone: put on, switched off and on, merged, taken off, written and read.

transformers and diffusers wrap the same calls, but each ties them to a version of peft of its own choosing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from diffusion_align.errors import UserError, first_line
from diffusion_align.writing import make_folder, write_bytes, write_text

ADAPTER = "default"
"""peft's name of the only adapter that a network carries here."""
_WITHOUT = {"lora_dropout": "use lora.dropout=0", "use_dora": "use lora.dora=false"}
"""peft's name of a setting that some layers cannot have, as of experts -> what to do."""


def add_lora(network: Any, config: Any) -> None:
    """Put a new adapter of peft's ``LoraConfig`` on ``network``, switched on; the rest of the network is frozen.

    Raises:
        UserError: peft knows no layers of such a network, or cannot adapt them.
    """
    from peft import inject_adapter_in_model

    unknown = config.target_modules is None  # peft may set it before it finds that out
    try:
        inject_adapter_in_model(config, network, ADAPTER)
    except (ValueError, TypeError, NotImplementedError) as error:
        if unknown:
            raise UserError(
                f"peft does not know the attention layers of a {type(network).__name__}: use lora.layers=all-linear"
            ) from error
        remedies = (remedy for setting, remedy in _WITHOUT.items() if setting in str(error))
        remedy = next(remedies, "use lora=null to train all of it")
        raise UserError(
            f"peft cannot put adapters on a {type(network).__name__}: {remedy} ({first_line(error)})"
        ) from error
    for weight, dora in _narrow_dora(network):  # peft has rounded it
        dora.weight.data = dora.get_weight_norm(weight, torch.zeros((), device=weight.device), 1.0)
    _tell(network, True)


def inject_lora(network: Any, config: Any, weights: Mapping[str, Tensor]) -> None:
    """Put an adapter of given weights on ``network``, in their own dtype.

    Args:
        network: without adapters.
        config: peft's ``LoraConfig``, which gives ranks and scales; the layers are those of ``weights``.
        weights: peft's names without the adapter's -> weight, of layers that ``unfit`` finds nothing wrong with.

    Raises:
        ValueError: a weight has no place, or a place gets none.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    weights = dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are more layers of the same names, without weights
        inject_adapter_in_model(config, network, ADAPTER, low_cpu_mem_usage=True, state_dict=weights)
        found = set_peft_model_state_dict(network, weights, ADAPTER, low_cpu_mem_usage=True)
    lacking = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if found.unexpected_keys or lacking:
        raise ValueError(
            f"the model has no layer for {found.unexpected_keys[:1]}, the adapter no weight for {lacking[:1]}"
        )
    for _ in _narrow_dora(network):
        pass
    _tell(network, True)


def unfit(network: nn.Module, names: Mapping[str, Sequence[int]]) -> list[str]:
    """Those of the weights ``names`` (peft's name -> shape) that are of no layer of ``network``."""
    modules = dict(network.named_modules())

    def fits(name: str) -> bool:
        layer, _, kind = name.rpartition(".lora_")
        weight = getattr(modules.get(layer), "weight", None)
        if not isinstance(weight, Tensor) or not kind:
            return False
        shape = list(names[name])
        rows, columns = weight.shape[0], list(weight.shape[1:])
        if kind == "A.weight":
            return shape[1:] == columns and f"{layer}.lora_B.weight" in names
        if kind == "B.weight":
            down = names.get(f"{layer}.lora_A.weight")
            return down is not None and shape[:2] == [rows, down[0]]
        return kind == "B.bias" or kind.startswith("magnitude_vector")

    return [name for name in names if not fits(name)]


def adapter_layers(network: nn.Module) -> list[Any]:
    """peft's layers of a network: those with adapters, and the modules that are trained whole beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in network.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def carries_adapters(network: nn.Module) -> bool:
    """Whether there are adapter layers; peft's settings may outlive the layers where an adapter was merged."""
    return getattr(network, "peft_config", None) is not None and bool(adapter_layers(network))


@contextlib.contextmanager
def switched_off(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, the network computes what it did before the adapters of ``layers``, from ``adapter_layers``."""
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_lora(network: Any) -> None:
    """Leave in the weights of a network, in place, what it computes with its adapters; no adapter layers are left.

    Those that are active count, at their scales; switched-off ones are dropped, and merged ones stay merged.
    """
    for layer in _unwrap(network):
        # In a merged layer peft ignores whatever was activated since.
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge()


def forget_adapters(network: Any) -> None:
    """Remove what peft and the libraries above it note about adapters on a network whose layers carry none."""
    if hasattr(network, "peft_config"):
        del network.peft_config
    _tell(network, False)


def remove_lora(network: Any) -> None:
    """Take the adapters off a network, which is then as it was before them."""
    for _ in _unwrap(network):
        pass


@torch.no_grad()
def rescale_lora(network: Any, alpha: float) -> None:
    """Express an adapter of one rank with another alpha: the network computes the same, up to rounding."""
    settings = network.peft_config[ADAPTER]
    network.peft_config[ADAPTER] = replace(settings, lora_alpha=alpha, alpha_pattern={}, use_rslora=False)
    for layer in lora_layers(network).values():
        scale = alpha / layer.r[ADAPTER]
        for parameter in layer.lora_B[ADAPTER].parameters():
            parameter.mul_(layer.scaling[ADAPTER] / scale)
        layer.scaling[ADAPTER], layer.lora_alpha[ADAPTER] = scale, alpha


def save_peft(network: Any, folder: Path) -> None:
    """Write the adapter as peft does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Equal adapters give equal bytes. The scale stays in ``lora_alpha`` of the configuration, without which no reader
    of this layout can put the weights on a model.
    """
    make_folder(folder, parents=True)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in adapter_state(network).items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    text = json.dumps(plain_config(network.peft_config[ADAPTER]), indent=2, sort_keys=True)
    write_text(folder / "adapter_config.json", text)


def load_peft(model: Any, folder: Path, **options: Any) -> Any:
    """peft's model of ``model`` with the adapter in ``folder`` on it, all of whose weights found their place.

    Raises:
        ValueError: weights that are of no layer of the model, or of which the adapter lacks some.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder), **options)
    # Once more, as the first time peft keeps to itself what it left out.
    found = PeftModel.load_adapter(adapted, str(folder), ADAPTER, **options)
    if found.unexpected_keys:
        names = [name.replace(f".{ADAPTER}.", ".") for name in found.unexpected_keys]
        raise ValueError(f"{some_of(names)} of the adapter's weights fit no layer of the model")
    lacking = [name for name in found.missing_keys if ".lora_" in name]
    if lacking:
        raise ValueError(f"the adapter lacks weights of the layers it names: {some_of(lacking)}")
    return adapted


def some_of(names: Sequence[str]) -> str:
    """How many, and the first few."""
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def adapter_state(network: Any, *, baked: bool = False) -> dict[str, Tensor]:
    """peft's name -> weight, of the adapter and of the modules trained whole beside it.

    Args:
        network: with an adapter.
        baked: multiply every ``lora_B`` by its layer's scale, for readers that assume a scale of 1.
    """
    from peft import get_peft_model_state_dict

    # Embeddings are never resized here; "auto" would ask the Hub about it.
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    if baked:
        for name, layer in lora_layers(network).items():
            for kind in ("weight", "bias"):
                if (key := f"{name}.lora_B.{kind}") in state:
                    state[key] = state[key] * layer.scaling[ADAPTER]
    return state


def plain_config(config: Any, *, baked: bool = False) -> dict[str, Any]:
    """peft's settings for JSON; sets, whose order changes from process to process, are sorted.

    Args:
        config: a ``LoraConfig``.
        baked: those of weights whose scale is 1: every alpha is its rank.
    """
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    if baked:
        plain |= {"lora_alpha": config.r, "alpha_pattern": dict(config.rank_pattern), "use_rslora": False}
    return plain


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on nothing else: safetensors itself shuffles the metadata."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=dict(metadata))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)  # the tensors begin at a multiple of 8
    write_bytes(path, len(ordered).to_bytes(8, "little") + ordered + content[8 + size :])


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Name -> layer with an adapter."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def _unwrap(network: Any) -> Iterator[Any]:
    """Each layer with adapters, which afterwards is replaced by the layer below it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        yield layer
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    forget_adapters(network)


def _narrow_dora(network: nn.Module) -> Iterator[tuple[Tensor, Any]]:
    """The weight and DoRA's part of each layer in bf16 or fp16, whose size DoRA then measures in float32.

    peft does so in the narrow dtype, with which a new adapter would not leave the network as it is.
    """
    for layer in lora_layers(network).values():
        weight, sizes = layer.get_base_layer().weight, layer.lora_magnitude_vector
        if sizes and weight.dtype in (torch.bfloat16, torch.float16):
            dora = sizes[ADAPTER]
            dora.get_weight_norm = functools.partial(_norm_in_float32, dora.get_weight_norm)
            yield weight.detach(), dora


def _norm_in_float32(
    norm: Callable[..., Tensor], weight: Tensor, lora_weight: Tensor, *given: Any, **named: Any
) -> Tensor:
    return norm(weight.float(), lora_weight.float(), *given, **named)


def _tell(network: Any, adapted: bool) -> None:
    """Set what transformers and diffusers ask before they write, merge or checkpoint a network with adapters."""
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = adapted
