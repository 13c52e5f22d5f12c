"""What is moved, cast and kept where on a GPU; run with -m gpu."""

import importlib.util
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.settings import LoRAConfig
from diffusion_align.errors import ConfigError
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.launch import make_accelerator
from diffusion_align.training.optimization import Optimization
from diffusion_align.training.processes import Processes

pytestmark = pytest.mark.gpu


class Casts(TorchDispatchMode):
    """The tensors that were copied to another dtype, by their address."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and made.dtype != args[0].dtype:
            self.addresses.add(args[0].data_ptr())
        return made


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_no_frozen_weight_in_bfloat16_is_cast_in_every_pass(device, request, model):
    folder = str(request.getfixturevalue(model))
    policy = DenoisingPolicy(
        load_pipeline(folder, dtype=torch.bfloat16),
        lora=LoRAConfig(rank=4),
        device=device,
        autocast=partial(torch.autocast, device.type, torch.bfloat16),
    )
    frozen = {p.data_ptr(): n for n, p in policy.network.named_parameters() if not p.requires_grad}
    x_t = torch.randn(2, *policy.latent_shape, device=device)
    conditioning, timestep = policy.encode(["a cat", "a tree"]), torch.full((2,), 500, device=device)
    policy.predict(x_t, timestep, conditioning)  # normalizations are cast once
    with Casts() as casts:
        policy.predict(x_t, timestep, conditioning).sum().backward()
    assert {p.dtype for p in policy.network.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert [frozen[address] for address in casts.addresses & frozen.keys()] == []


def _settings(folder, **changes):
    return TrainingConfig(model="toy", output_dir=folder, learning_rate=1e-2, **changes)


def _trained(device, config, steps=4):
    """Weights of one matrix and one vector after some steps with fixed gradients, and what trained them."""
    stream = torch.Generator().manual_seed(0)
    shapes = {"matrix": (96, 64), "vector": (5,)}
    weights = {n: nn.Parameter(torch.randn(s, generator=stream).to(device)) for n, s in shapes.items()}
    optimization = Optimization(weights, config, Processes(make_accelerator()))
    for step in range(steps):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=stream).to(device)
        optimization.step(step)
    return weights, optimization


def test_an_average_in_main_memory_is_that_of_the_gpu(device, tmp_path):
    found = {}
    for offload in (False, True):
        weights, optimization = _trained(device, _settings(tmp_path, ema_decay=0.9, ema_offload=offload))
        average = optimization.weights()["ema"]
        assert {one.device.type for one in average.values()} == {"cpu" if offload else device.type}
        assert all(one.is_pinned() for one in average.values()) or not offload or device.type == "cpu"
        with optimization.ema_weights():
            assert {one.device.type for one in weights.values()} == {device.type}
            found[offload] = {name: one.detach().cpu().clone() for name, one in weights.items()}
        assert not torch.equal(found[offload]["matrix"], weights["matrix"].detach().cpu())
    for name, average in found[False].items():
        torch.testing.assert_close(found[True][name], average, rtol=1e-6, atol=1e-7)


def test_the_optimizer_in_8_bits_keeps_its_moments_in_8_bits(device, tmp_path):
    pytest.importorskip("bitsandbytes")
    weights, optimization = _trained(device, _settings(tmp_path, optimizer="adamw_8bit"))
    states = optimization.tensors()["optimizer"]["state"]
    kinds = {
        value.dtype
        for state in states.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() == weights["matrix"].numel()
    }
    assert kinds == {torch.uint8}
    plain, _ = _trained(device, _settings(tmp_path))
    torch.testing.assert_close(weights["matrix"], plain["matrix"], rtol=0.1, atol=0.02)


def test_xformers_samples_as_torch_does_or_a_sentence_says_that_it_is_absent(device, tmp_path, tiny_sd):
    if importlib.util.find_spec("xformers") is None:
        settings = {"method": "ddpo", "model": str(tiny_sd), "prompts": ["a cat"], "reward": "jpeg_compressibility"}
        with pytest.raises(ConfigError) as raised:
            check_config(settings | {"output_dir": tmp_path / "run", "attention": "xformers"})
        assert raised.value.problems == [
            "attention=xformers is not installed: pip install xformers, or set attention=sdpa"
        ]
        return
    found = []
    for attention in ("sdpa", "xformers"):
        policy = DenoisingPolicy(load_pipeline(str(tiny_sd)), lora=None, device=device, attention=attention)
        x_t = torch.ones(2, *policy.latent_shape, device=device)
        with torch.no_grad():
            conditioning = policy.encode(["a cat", "a tree"])
            found.append(policy.predict(x_t, torch.full((2,), 500, device=device), conditioning))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)
