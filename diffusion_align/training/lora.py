"""LoRA on any network, by peft alone: put on, switched off and on, merged, written.

transformers and diffusers wrap the same calls, but each ties them to a version of peft of its own choosing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

ADAPTER = "default"
"""peft's name of the only adapter that a network carries here."""


def add_lora(network: Any, config: Any) -> None:
    """Put a new adapter of peft's ``LoraConfig`` on ``network``, switched on and in training mode.

    Everything else of the network is frozen by peft.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, network, ADAPTER)
    _tell(network, True)


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
    """Add the adapters of a network to its weights, in place; no adapter layers are left."""
    from peft.tuners.lora import LoraLayer

    for name, module in [pair for pair in network.named_modules() if isinstance(pair[1], LoraLayer)]:
        module.merge()
        _replace(network, name, module.get_base_layer())
    forget_adapters(network)


def forget_adapters(network: Any) -> None:
    """Remove what peft and the libraries above it note about adapters on a network whose layers carry none."""
    if hasattr(network, "peft_config"):
        del network.peft_config
    _tell(network, False)


def save_peft(network: Any, folder: Path) -> None:
    """Write the adapter as peft does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Equal adapters give equal bytes. The scale stays in ``lora_alpha`` of the configuration, without which no reader
    of this layout can put the weights on a model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapter_state(network).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(plain_config(network.peft_config[ADAPTER]), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def adapter_state(network: Any) -> dict[str, Tensor]:
    """peft's name -> weight, of the adapter and of the modules trained whole beside it."""
    from peft import get_peft_model_state_dict

    # Embeddings are never resized here; "auto" would ask the Hub about it.
    return get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)


def plain_config(config: Any) -> dict[str, Any]:
    """peft's settings for JSON; sets, whose order changes from process to process, are sorted."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _tell(network: Any, adapted: bool) -> None:
    """Set what transformers and diffusers ask before they write, merge or checkpoint a network with adapters."""
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = adapted
