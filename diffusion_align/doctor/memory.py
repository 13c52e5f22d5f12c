"""What the networks of a text-to-image pipeline cost, counted from their configurations alone.

They are built and run on torch's meta device, which has shapes and dtypes but no data, so that a model needs neither
its weights nor their memory: forward, backward and, with gradient checkpointing, what is computed again. ``LiveBytes``
counts what is in use; ``AsOnGpu`` makes a pass on that device what it is on a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from diffusion_align.diffusion.policy import encoder_config, peft_config
from diffusion_align.diffusion.settings import LoRAConfig
from diffusion_align.models.families import ModelFamily
from diffusion_align.models.memory import checkpoint_activations, keep_activations

_NARROW = (functional.linear, functional.conv2d, functional.scaled_dot_product_attention, torch.bmm, torch.baddbmm)
_WIDE = (functional.group_norm, functional.layer_norm, functional.rms_norm, functional.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Passes:
    """How a network is run.

    Attributes:
        latent_size: (H, W).
        train_batch, sample_batch: samples in one pass with and without gradients, with guidance twice the images.
        tokens: of a prompt.
        dtype: of frozen weights; trained weights are float32.
        autocast: the dtype of mixed precision, None without.
        checkpointing: whether activations within a block are computed again in the backward pass.
        eager_attention: with attention matrices, as on a CPU; else fused.
        reference: whether the reference is called between the forward and the backward pass.
    """

    latent_size: tuple[int, int]
    train_batch: int
    sample_batch: int
    tokens: int = 77
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    eager_attention: bool = False
    reference: bool = False


@dataclass(frozen=True)
class NetworkCost:
    """The cost of the network that is trained; bytes in use exclude its weights and their gradients.

    Attributes:
        frozen, trained: numbers in its weights.
        flops: of a forward pass of one sample, 2 per multiply-add, with adapters. Attention is counted, which published
            numbers of multiply-adds often leave out.
        kept: bytes in use between a forward pass of ``train_batch`` samples and its backward pass.
        training: bytes in use at the peak of the two passes.
        sampling: bytes in use at the peak of a pass of ``sample_batch`` samples without gradients.
    """

    frozen: int
    trained: int
    flops: int
    kept: int
    training: int
    sampling: int


@dataclass(frozen=True)
class EncoderCost:
    """The cost of a text encoder with adapters.

    Attributes:
        trained: parameters.
        kept: bytes in use between the forward pass of one prompt and its backward pass, weights excluded.
    """

    trained: int
    kept: int


@dataclass(frozen=True)
class PassCost:
    """The cost of a pass without gradients: flops, and the bytes in use at the peak."""

    flops: int
    working: int


def network_cost(
    family: ModelFamily, config: Mapping[str, Any], lora: LoRAConfig | None, passes: Passes
) -> NetworkCost:
    """What training and sampling with a network of ``family`` costs.

    Args:
        family: of the model.
        config: the network's ``config.json``.
        lora: adapters to train; None trains the whole network.
        passes: how it is run.
    """
    import diffusers
    from peft import inject_adapter_in_model

    network = _on_meta(getattr(diffusers, family.network_class), config, passes.dtype)
    if passes.eager_attention:
        family.use_eager_attention(network)

    def forward(batch: int) -> Tensor:
        kind: Any = {"device": "meta", "dtype": passes.dtype}
        return family.predict(
            network, *family.zeros(config, batch, tokens=passes.tokens, latent_size=passes.latent_size, **kind)
        )

    if lora is None:
        network.requires_grad_(True)
    else:
        inject_adapter_in_model(peft_config(lora, family), network, low_cpu_mem_usage=True)
        network.eval()
    with torch.no_grad(), AsOnGpu(passes.autocast) as counted, LiveBytes(_tensors(network)) as sampling:
        forward(passes.sample_batch)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    beside = partial(forward, passes.train_batch) if passes.reference else None
    kept, training = training_bytes(network, partial(forward, passes.train_batch), passes, beside=beside)
    frozen, flops = _size(network) - trained, counted.flops // passes.sample_batch
    return NetworkCost(frozen, trained, flops, kept, training, sampling.peak)


def encoder_cost(family: ModelFamily, config: Mapping[str, Any], lora: LoRAConfig, passes: Passes) -> EncoderCost:
    """What training adapters on a text encoder costs.

    Args:
        family: of the model.
        config: the encoder's ``config.json``.
        lora: with ``text_encoder``.
        passes: of which ``tokens``, ``dtype`` and ``checkpointing`` count; the encoders run without mixed precision.
    """
    from peft import inject_adapter_in_model

    with torch.device("meta"):
        encoder = text_encoder_of(config).requires_grad_(False).eval().to(passes.dtype)
    inject_adapter_in_model(encoder_config(lora, family), encoder, low_cpu_mem_usage=True)
    if passes.checkpointing:
        checkpoint_activations(encoder)
    ids = torch.zeros(1, passes.tokens, dtype=torch.int64, device="meta")
    with AsOnGpu(None), LiveBytes([*encoder.parameters(), *encoder.buffers()]) as live:
        output = encoder(ids, output_hidden_states=True)
        kept = live.now
    del output
    return EncoderCost(sum(p.numel() for p in encoder.parameters() if p.requires_grad), kept)


def training_bytes(
    network: Any,
    forward: Callable[[], Tensor],
    passes: Passes,
    *,
    beside: Callable[[], Any] | None = None,
) -> tuple[int, int]:
    """Bytes in use, weights and gradients excluded: before the backward pass, and at the peak.

    Args:
        network: on any device; where it is no meta device, the pass is a real one.
        forward: the pass that is trained on.
        passes: of which ``autocast`` and ``checkpointing`` are looked at.
        beside: what runs without gradients before the backward pass.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # as from an earlier micro-batch
    as_on_gpu = AsOnGpu(passes.autocast)
    if passes.checkpointing:
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), as_on_gpu))
        network.enable_gradient_checkpointing(again)
    with LiveBytes([*_tensors(network), *(p.grad for p in trained)]) as live:
        with as_on_gpu:
            output = forward()
            kept = live.now
            if beside is not None:
                with torch.no_grad():
                    beside()
        torch.autograd.backward(output.float().sum())
    return kept, live.peak


def decoding_cost(vae: Any, latents: tuple[int, int, int], batch: int) -> PassCost:
    """What it costs on a GPU to decode ``batch`` latents of shape (C, H, W) with a VAE of ``vae_on_meta``."""
    return _vae_cost(vae, vae.decode, (batch, *latents))


def differentiated_decoding_cost(
    vae: Any, latents: tuple[int, int, int], batch: int, passes: Passes, *, times: int = 1
) -> int:
    """Bytes in use at the peak of decoding ``batch`` latents so many ``times``, with one backward pass to all of them.

    Of ``passes`` only ``checkpointing`` is looked at.
    """
    given = torch.zeros((batch, *latents), dtype=vae.dtype, device="meta", requires_grad=True)
    plain = replace(passes, autocast=None)
    kept, peak = training_bytes(vae, lambda: vae.decode(given, return_dict=False)[0], plain)
    keep_activations(vae)
    return (times - 1) * kept + peak


def encoding_cost(vae: Any, image_size: Sequence[int], batch: int) -> PassCost:
    """What it costs on a GPU to encode ``batch`` images of (height, width) pixels."""
    return _vae_cost(vae, vae.encode, (batch, vae.config.in_channels, *image_size))


def vae_on_meta(config: Mapping[str, Any], dtype: torch.dtype, *, slicing: bool = False, tiling: bool = False) -> Any:
    """A VAE of configuration ``config``, which takes its images one by one (slicing), or in parts (tiling)."""
    from diffusers import AutoencoderKL

    vae = _on_meta(AutoencoderKL, config, dtype)
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    return vae


def _vae_cost(vae: Any, run: Callable[[Tensor], Any], shape: tuple[int, ...]) -> PassCost:
    given = torch.zeros(shape, dtype=vae.dtype, device="meta")
    with torch.no_grad(), AsOnGpu(None) as counted, LiveBytes([*_tensors(vae), given]) as live:
        run(given)
    return PassCost(counted.flops, live.peak)


def parameter_counts(family: ModelFamily, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Part -> parameters, of the networks among the configurations of a pipeline of ``family``."""
    import diffusers

    counts = {}
    with torch.device("meta"):
        for name, config in configs.items():
            if name == family.network:
                counts[name] = _size(getattr(diffusers, family.network_class).from_config(dict(config)))
            elif name == "vae":
                counts[name] = _size(diffusers.AutoencoderKL.from_config(dict(config)))
            elif name.startswith("text_encoder"):
                counts[name] = _size(text_encoder_of(config))
    return counts


def text_encoder_of(config: Mapping[str, Any]) -> Any:
    """A text encoder of transformers of configuration ``config``, with random weights."""
    import transformers

    encoder = getattr(transformers, (config.get("architectures") or ["CLIPTextModel"])[0])
    return encoder(encoder.config_class(**config))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, on any device, for as long as their storage lives.

    What an operation uses within itself is not seen: workspaces of convolutions, say.

    Args:
        there: tensors that are not counted.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor) or (storage := tensor.untyped_storage())._cdata in self._sizes:
                continue
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata)
        return made

    def _free(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


class AsOnGpu(TorchFunctionMode):
    """Runs meta tensors as CUDA tensors would run: fused attention, autocast's dtypes; counts flops.

    The meta device has no autocast, and its attention keeps the matrices. Of autocast's lists, what our networks
    call is here: matrix products narrow, normalisations in float32; everything else promotes by itself. Narrow copies
    of trained weights are kept until the context is left.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast, self.flops = autocast, 0
        self._copies: dict[int, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        self._copies.clear()
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self.autocast is not None and function in _NARROW + _WIDE:
            dtype = self.autocast if function in _NARROW else torch.float32
            args, named = [self._cast(a, dtype) for a in args], {k: self._cast(v, dtype) for k, v in named.items()}
        if function is functional.scaled_dot_product_attention:
            query, key, value = [*args, *(named[name] for name in ("query", "key", "value") if name in named)][:3]
            self.flops += 4 * query.numel() * key.shape[-2]
            if query.is_meta and torch.backends.cuda.flash_sdp_enabled():  # which eager attention switches off
                return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        output = function(*args, **named)
        if function in (functional.linear, functional.conv2d):
            self.flops += 2 * output.numel() * args[1][0].numel()
        elif function in (torch.bmm, torch.baddbmm):
            self.flops += 2 * output.numel() * args[-2].shape[-1]
        return output

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]


def _on_meta(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A frozen network of a diffusers class, in evaluation mode."""
    with torch.device("meta"):
        network = kind.from_config(dict(config)).requires_grad_(False).eval()
    # diffusers' own .to() warns of a cast, whatever it is.
    for tensor in [*network.parameters(), *_stored_buffers(network)]:
        tensor.data = tensor.data.to(dtype)
    return network


def _size(network: nn.Module) -> int:
    """Numbers in the file of a network: parameters and, in Stable Diffusion 3, the embeddings of positions."""
    return sum(tensor.numel() for tensor in [*network.parameters(), *_stored_buffers(network)])


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _stored_buffers(network: nn.Module) -> list[Tensor]:
    stored = network.state_dict()
    return [buffer for name, buffer in network.named_buffers() if name in stored and buffer.is_floating_point()]
