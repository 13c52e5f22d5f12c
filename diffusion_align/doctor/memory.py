"""What the networks of a text-to-image pipeline cost, counted from their configurations alone.

They are built and run on torch's meta device, which has shapes and dtypes but no data, so that a model needs neither
its weights nor their memory. ``GpuPass`` makes a pass on that device what it is on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from diffusion_align.diffusion.policy import peft_config
from diffusion_align.diffusion.settings import LoRAConfig
from diffusion_align.models.families import ModelFamily

_NARROW = (functional.linear, functional.conv2d, functional.scaled_dot_product_attention)
_WIDE = (functional.group_norm, functional.layer_norm)


@dataclass(frozen=True)
class NetworkCost:
    """The cost of the network that is trained.

    Attributes:
        frozen, trained: parameters.
        flops: of a forward pass of one sample, 2 per multiply-add, without adapters. Attention is counted, which
            published numbers of multiply-adds often leave out.
        kept: bytes that a forward pass of ``train_batch`` samples keeps for the backward pass, parameters excluded.
        working: bytes that a pass of ``sample_batch`` samples without gradients has in use at its peak.
    """

    frozen: int
    trained: int
    flops: int
    kept: int
    working: int


@dataclass(frozen=True)
class DecoderCost:
    """The cost of decoding a batch with a VAE: flops, and the bytes in use at the peak."""

    flops: int
    working: int


def network_cost(
    family: ModelFamily,
    config: Mapping[str, Any],
    lora: LoRAConfig | None,
    *,
    train_batch: int,
    sample_batch: int,
    tokens: int = 77,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> NetworkCost:
    """What training and sampling with a network of ``family`` costs on a GPU.

    Args:
        family: of the model.
        config: the network's ``config.json``.
        lora: adapters to train; None trains the whole network.
        train_batch, sample_batch: samples in one pass, with guidance twice the images.
        tokens: of a prompt.
        dtype: of frozen weights; trained weights are float32.
        autocast: the dtype of mixed precision, None without.
    """
    import diffusers
    from peft import inject_adapter_in_model

    network = _on_meta(getattr(diffusers, family.network_class), config, dtype)
    shape: Any = {"tokens": tokens, "device": "meta", "dtype": dtype}
    inputs = family.zeros(config, sample_batch, **shape)
    with torch.no_grad(), GpuPass(autocast, network.parameters()) as sampling:
        family.predict(network, *inputs)
    if lora is None:
        network.requires_grad_(True)
    else:
        inject_adapter_in_model(peft_config(lora, family), network, low_cpu_mem_usage=True)
        network.eval()
    frozen, trained = (
        sum(p.numel() for p in network.parameters() if p.requires_grad is wanted) for wanted in (False, True)
    )
    inputs = family.zeros(config, train_batch, **shape)
    kept = saved_bytes(network, lambda: family.predict(network, *inputs), autocast=autocast)
    return NetworkCost(frozen, trained, sampling.flops // sample_batch, kept, sampling.peak)


def decoder_cost(vae: Mapping[str, Any], latents: tuple[int, int, int], batch: int, dtype: torch.dtype) -> DecoderCost:
    """What a VAE of configuration ``vae`` costs on a GPU that decodes ``batch`` latents of shape (C, H, W)."""
    from diffusers import AutoencoderKL

    network = _on_meta(AutoencoderKL, vae, dtype)
    states = torch.zeros(batch, *latents, dtype=dtype, device="meta")
    with torch.no_grad(), GpuPass(None, network.parameters()) as decoding:
        network.decode(states)
    return DecoderCost(decoding.flops, decoding.peak)


def parameter_counts(family: ModelFamily, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Part -> parameters, of the networks among the configurations of a pipeline of ``family``."""
    import diffusers
    import transformers

    counts = {}
    with torch.device("meta"):
        for name, config in configs.items():
            if name == family.network:
                counts[name] = _size(getattr(diffusers, family.network_class).from_config(dict(config)))
            elif name == "vae":
                counts[name] = _size(diffusers.AutoencoderKL.from_config(dict(config)))
            elif name.startswith("text_encoder"):
                encoder = getattr(transformers, (config.get("architectures") or ["CLIPTextModel"])[0])
                counts[name] = _size(encoder(encoder.config_class(**config)))
    return counts


def saved_bytes(network: nn.Module, forward: Callable[[], Any], *, autocast: torch.dtype | None = None) -> int:
    """Bytes that a pass on the meta device keeps for the backward pass, the parameters of ``network`` excluded."""
    saved: dict[int, int] = {}
    with (
        torch.autograd.graph.saved_tensors_hooks(storage_sizes(network, saved), lambda tensor: tensor),
        GpuPass(autocast),
    ):
        output = forward()  # alive until counted, so that no storage's address is used again
    del output
    return sum(saved.values())


def storage_sizes(network: nn.Module, sizes: dict[int, int]) -> Callable[[Tensor], Tensor]:
    """A hook for saved tensors that notes the bytes of every storage but the parameters' in ``sizes``, each once."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    return note


class GpuPass(TorchFunctionMode):
    """Runs meta tensors as CUDA tensors would run: fused attention, autocast's dtypes; counts flops and bytes in use.

    The meta device has no autocast, and its attention keeps the matrices. Of autocast's lists, what a UNet calls is
    here: matrix products narrow, normalisations in float32; everything else promotes by itself.
    """

    def __init__(self, autocast: torch.dtype | None, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.autocast, self.flops, self.peak, self._now = autocast, 0, 0, 0
        self._sizes = {w.untyped_storage()._cdata: 0 for w in weights}  # there anyway

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self.autocast is not None and function in _NARROW + _WIDE:
            dtype = self.autocast if function in _NARROW else torch.float32
            args, named = [self._cast(a, dtype) for a in args], {k: self._cast(v, dtype) for k, v in named.items()}
        if function is functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
            self.flops += 4 * query.numel() * key.shape[-2]
        else:
            output = function(*args, **named)
            if function in (functional.linear, functional.conv2d):
                self.flops += 2 * output.numel() * args[1][0].numel()
        self._count(output)
        return output

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        self._count(cast := value.to(dtype))
        return cast

    def _count(self, made: Any) -> None:
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor) or (storage := tensor.untyped_storage())._cdata in self._sizes:
                continue
            self._sizes[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, storage: int) -> None:
        self._now -= self._sizes.pop(storage)


def _on_meta(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A frozen network of a diffusers class, in evaluation mode."""
    with torch.device("meta"):
        network = kind.from_config(dict(config)).requires_grad_(False).eval()
    for parameter in network.parameters():  # diffusers' own .to() warns of a cast, whatever it is
        parameter.data = parameter.data.to(dtype)
    return network


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
