"""LoRA layers launch what they compute and no more, and compute peft's bits."""

import contextlib
import copy
import pickle
from collections import Counter

import diffusers
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_align.diffusion.policy import DenoisingPolicy, peft_config
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.diffusion.settings import LoRAConfig
from diffusion_align.doctor.known_models import SD15, SDXL
from diffusion_align.models.families import SHIPPED
from diffusion_align.models.lora import ADAPTER, add_lora, lora_layers
from diffusion_align.models.lora_passes import CastWeights, cast_norms_once

EVERYWHERE = {"layers": "attention+feed_forward+convolutions"}
LORAS = [LoRAConfig(rank=2, **EVERYWHERE), LoRAConfig(rank=2, alpha=5, **EVERYWHERE), LoRAConfig(rank=2, dora=True)]
PROMPTS = ["red apple", "a cat"]


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def by_peft(policy):
    """The same policy with peft's own layers."""
    for layer in lora_layers(policy.network).values():
        layer.__class__ = layer.__class__.__mro__[1] if layer.__class__.__name__ == "Lean" else layer.__class__
    return policy


def results(policy, *, kept):
    """Outputs and gradients of two updates of two passes each, and of a pass without gradients."""
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    told, found = policy.encode(PROMPTS), []
    for _ in range(2):
        with policy.weights_cast_once() if kept else contextlib.nullcontext():
            outputs = [policy.predict(x_t, torch.tensor([3, t]), told) for t in (500, 900)]
            (outputs[0].square().sum() + outputs[1].sum()).backward()
            with torch.no_grad():
                outputs.append(policy.predict(x_t, torch.tensor([1, 2]), told))
        found += [output.detach() for output in outputs]
        for parameter in policy.trainable.values():
            found.append(parameter.grad.clone())
            with torch.no_grad():
                parameter.sub_(1e-3 * parameter.grad)
            parameter.grad = None
    return found


@pytest.mark.parametrize("autocast", [contextlib.nullcontext, bf16], ids=["float32", "bf16"])
@pytest.mark.parametrize("lora", LORAS, ids=["plain", "scaled", "dora"])
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_have_pefts_bits(frozen, lora, autocast, make_policy):
    if autocast is contextlib.nullcontext and frozen == torch.bfloat16 and lora.dora:
        pytest.skip("one that falls back to peft is enough")
    found = []
    for theirs in (False, True):
        policy = make_policy("tiny_sd", noise=0.1, lora=lora, autocast=autocast, guidance_scale=3.0)
        for name, parameter in policy.network.named_parameters():
            parameter.data = parameter.data if ".lora_" in name else parameter.data.to(frozen)
        found.append(results(by_peft(policy) if theirs else policy, kept=not theirs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointed_layers_have_pefts_bits(make_policy):
    found = []
    for theirs in (False, True):
        policy = make_policy("tiny_sd", noise=0.1, autocast=bf16, gradient_checkpointing=True)
        found.append(results(by_peft(policy) if theirs else policy, kept=not theirs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- casts -----------------------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """``seen``: sizes of what is cast to bfloat16 by an operation of its own, or by one for many."""

    def __init__(self):
        super().__init__()
        self.seen, self.together = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.seen.append(args[0].data_ptr())
        self.together += function is torch.ops.aten._foreach_copy_.default
        return function(*args, **kwargs or {})

    def of(self, policy):
        return len({p.data_ptr() for p in policy.trainable.values()} & set(self.seen))


def test_trained_weights_are_cast_once_per_batch_that_is_sampled_and_per_update(make_policy, streams):
    policy = make_policy("tiny_sd", noise=0.1, autocast=bf16, guidance_scale=3.0)
    schedule = build_schedule(policy.pipeline.scheduler, 4).to("cpu")
    told = policy.encode(PROMPTS)
    with Casts() as sampled:
        rollout(policy, schedule, told, streams(2))
    assert (sampled.of(policy), sampled.together) == (0, 1)
    x_t = torch.randn(2, *policy.latent_shape)
    with Casts() as trained, policy.weights_cast_once():
        for _ in range(3):
            policy.predict(x_t, torch.tensor([1, 2]), told).sum().backward()
    assert (trained.of(policy), trained.together) == (0, 1)
    with Casts() as alone:
        policy.predict(x_t, torch.tensor([1, 2]), told)
    assert alone.of(policy) == len(policy.trainable)


def test_other_weights_are_never_taken_for_those_that_are_kept(make_policy):
    policy = make_policy("tiny_sd", noise=0.1, autocast=bf16)
    x_t, told = torch.randn(2, *policy.latent_shape), policy.encode(PROMPTS)

    def predicted():
        return policy.predict(x_t, torch.tensor([1, 500]), told).detach()

    policy.snapshots.take("old")
    old = predicted()
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.data.add_(0.1)  # as EMA writes: no version tells of it
    new = predicted()
    assert not torch.equal(old, new)
    with policy.weights_cast_once():
        assert torch.equal(predicted(), new)
        with policy.as_snapshot("old"):
            assert torch.equal(predicted(), old)
            with policy.weights_kept():
                assert torch.equal(predicted(), old)
        assert torch.equal(predicted(), new)
    with policy.as_snapshot("old"):
        assert torch.equal(predicted(), old)


def test_layers_can_be_copied_pickled_and_given_to_another_policy(make_policy):
    policy = make_policy("tiny_sd", noise=0.1, autocast=bf16)
    x_t, told = torch.randn(2, *policy.latent_shape), policy.encode(PROMPTS)
    expected = policy.predict(x_t, torch.tensor([1, 500]), told)
    second = DenoisingPolicy(policy.pipeline, lora=policy.lora, autocast=bf16)
    with Casts() as seen, second.weights_cast_once():
        assert torch.equal(second.predict(x_t, torch.tensor([1, 500]), told), expected)
    assert (seen.of(second), seen.together) == (0, 1)
    for alone in (copy.deepcopy(policy.network), pickle.loads(pickle.dumps(policy.network))):
        assert {type(layer).__module__ for layer in lora_layers(alone).values()} == {"peft.tuners.lora.layer"}
        policy.pipeline.unet = alone
        assert torch.equal(policy.predict(x_t, torch.tensor([1, 500]), told), expected)


def test_layers_that_lose_the_trained_adapter_compute_what_pefts_do(make_policy):
    policy = make_policy("tiny_sd", noise=0.1)
    x_t, told = torch.randn(2, *policy.latent_shape), policy.encode(PROMPTS)
    with policy.reference():
        expected = policy.predict(x_t, torch.tensor([1, 500]), told)
    policy.network.add_adapter(peft_config(policy.lora, policy.family), "other")  # which changes nothing at first
    policy.network.delete_adapters(ADAPTER)
    policy.network.set_adapter("other")
    assert torch.equal(policy.predict(x_t, torch.tensor([1, 500]), told), expected)


def test_layers_that_a_model_keeps_out_of_autocast_take_their_own_weights(make_policy):
    found = []
    for theirs in (False, True):
        policy = make_policy("tiny_sd", noise=0.1, autocast=bf16)
        attention = policy.network.mid_block.attentions[0]
        forward = attention.forward

        def wide(x, *given, forward=forward, **named):
            with torch.autocast("cpu", enabled=False):
                named["encoder_hidden_states"] = named["encoder_hidden_states"].float()
                return forward(x.float(), *given, **named)

        attention.forward = wide
        found.append(results(by_peft(policy) if theirs else policy, kept=not theirs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- operations ------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """How many operations that are no views, and casts of what is in ``frozen``."""

    def __init__(self, frozen):
        super().__init__()
        self.count, self.frozen, self.casts = 0, {id(p) for p in frozen}, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        self.count += function.namespace == "aten" and not is_view and "view" not in function._schema.name
        self.casts["frozen"] += function is torch.ops.aten._to_copy.default and id(args[0]) in self.frozen
        return function(*args, **kwargs or {})


class FusedAttention(TorchFunctionMode):
    """One operation, as on a GPU; fake tensors would take a dozen."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            return args[0] * 1
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def on_a_gpu():
    """Inside, tensors are fake ones of a GPU, and its autocast is on."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def network_of(config, lora, family):
    """On the meta device, with frozen weights in bfloat16, and adapters in float32 if ``lora``."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            network = diffusers.UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    if lora is not None:
        add_lora(network, peft_config(lora, family))
    return network


def operations(config, family, *, lora=None, grad=False):
    """Of one pass, and how many layers are adapted."""
    network = network_of(config, lora, family)
    with on_a_gpu(), torch.set_grad_enabled(grad):
        frozen = []
        for name, given in list(network.named_parameters()):
            trained, (part, _, kind) = ".lora_" in name, name.rpartition(".")
            dtype = torch.float32 if trained else given.dtype
            parameter = nn.Parameter(torch.empty(given.shape, dtype=dtype), requires_grad=trained)
            network.get_submodule(part)._parameters[kind] = parameter
            frozen += [] if trained else [parameter]
        cast_weights = CastWeights(network)
        cast_norms_once(network)
        x_t, timestep, told = family.zeros(network.config, 2, device="cuda", dtype=torch.bfloat16)
        with cast_weights.kept():
            for _ in range(2):  # the first one casts what is kept
                with Operations(frozen) as found, FusedAttention(), cast_weights.in_pass():
                    family.predict(network, x_t, timestep, told)
        return found, len(lora_layers(network))


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 needs a driver for fake CUDA tensors")
@pytest.mark.parametrize(
    ("model", "family"),
    [(SD15, SHIPPED["StableDiffusionPipeline"]), (SDXL, SHIPPED["StableDiffusionXLPipeline"])],
    ids=["SD1.5", "SDXL"],
)
def test_an_adapted_layer_adds_at_most_four_operations_and_no_frozen_weight_is_cast(model, family):
    """Three where its input is in bfloat16 or nothing has a gradient: A, B and the sum; and one cast of the input."""
    bare, _ = operations(model["unet"], family)
    for grad in (False, True):
        found, layers = operations(model["unet"], family, lora=LoRAConfig(rank=16), grad=grad)
        assert layers >= 128
        assert found.count <= bare.count + (4 if grad else 3) * layers
        assert found.casts["frozen"] == bare.casts["frozen"] == 0
