"""What networks cost, against published numbers, torch's own counter, and what real and fake tensors keep."""

import copy
import json
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffusion_align.assets import asset_path
from diffusion_align.diffusion.policy import LoRAConfig, peft_config
from diffusion_align.doctor.known_models import SD15, SD21, SDXL
from diffusion_align.doctor.memory import (
    GpuPass,
    decoder_cost,
    network_cost,
    parameter_counts,
    saved_bytes,
    storage_sizes,
)
from diffusion_align.models.families import family_of_network

EMOJI = json.loads((asset_path("emoji-sd") / "unet" / "config.json").read_text())
SMALL = {"train_batch": 2, "sample_batch": 2}


def unet_cost(config, lora, **options):
    return network_cost(family_of_network(config), config, lora, **options)


def forward(unet, batch, **options):
    """A pass of a UNet."""
    family = family_of_network(unet.config)
    return family.predict(unet, *family.zeros(unet.config, batch, **options))


def unet_on(device, config, lora=None):
    from diffusers import UNet2DConditionModel
    from peft import inject_adapter_in_model

    with torch.device(device):
        network = UNet2DConditionModel.from_config(dict(config)).requires_grad_(False)
        if lora is not None:
            inject_adapter_in_model(peft_config(lora, family_of_network(network.config)), network)
    return network.eval()


@pytest.mark.parametrize(
    ("configs", "millions"),
    [
        (SD15, {"unet": 859.52, "vae": 83.65, "text_encoder": 123.06}),
        (SD21, {"unet": 865.91, "vae": 83.65, "text_encoder": 340.39}),
        (SDXL, {"unet": 2567.46, "vae": 83.65, "text_encoder": 123.06, "text_encoder_2": 694.66}),
    ],
    ids=["sd15", "sd21", "sdxl"],
)
def test_published_numbers_of_parameters(configs, millions):
    counts = parameter_counts(family_of_network(configs["unet"]), configs)
    assert {name: round(count / 1e6, 2) for name, count in counts.items()} == millions


def test_stable_diffusion_15():
    """2 x 340 G multiply-adds outside attention, and all of what torch's counter sees; the LoRA of peft."""
    from torch.utils.flop_counter import FlopCounterMode

    cost = unet_cost(SD15["unet"], LoRAConfig(rank=16), **SMALL)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(unet_on("meta", SD15["unet"]), 1, device="meta")
    assert cost.flops == counter.get_total_flops()
    products = (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.convolution)
    outside = sum(counter.get_flop_counts()["Global"].get(product, 0) for product in products)
    assert outside == pytest.approx(2 * 340e9, rel=0.02)
    assert cost.trained == 3_188_736
    assert cost.frozen == pytest.approx(859.52e6, rel=1e-5)


def test_stable_diffusion_xl_is_counted_in_seconds():
    """2 x 2.99 T multiply-adds outside attention, whose own follow from its 70 layers at two sizes."""
    begun = time.process_time()
    cost = unet_cost(SDXL["unet"], LoRAConfig(rank=16), **SMALL, autocast=torch.bfloat16)
    assert time.process_time() - begun < 20
    attention = sum(
        layers * 4 * tokens * (tokens + 77) * width for layers, tokens, width in ((10, 64**2, 640), (60, 32**2, 1280))
    )
    assert cost.flops - attention == pytest.approx(5.98e12, rel=0.01)
    # Above all the bf16 copy of every float32 weight that autocast makes, which the backward pass needs.
    assert cost.kept > 2 * cost.frozen


def test_a_pass_in_closed_form():
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to("meta")
    x = torch.zeros(3, 4, device="meta")
    with torch.no_grad(), GpuPass(None, network.parameters()) as counted:
        y = network(x)
    assert counted.flops == 2 * 3 * (4 * 8 + 8 * 2)
    assert counted.peak == 4 * (3 * 4 + 3 * 8 + 3 * 2) - 4 * 3 * 4  # x was there before
    del y
    with torch.no_grad(), GpuPass(torch.bfloat16, network.parameters()) as counted:
        network(x)
    # The first layer: narrow copies of its input, weight and bias, and its output.
    assert counted.peak == 2 * (3 * 4 + 4 * 8 + 8 + 3 * 8)


def test_what_is_kept_in_closed_form():
    """Frozen, trained, frozen: the trained layer's input, and where it is narrowed the last layer's weight."""
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)).to("meta").requires_grad_(False)
    network[1].requires_grad_(True)
    x = torch.zeros(3, 4, device="meta")
    assert saved_bytes(network, lambda: network(x)) == 4 * 3 * 8
    assert saved_bytes(network, lambda: network(x), autocast=torch.bfloat16) == 2 * (3 * 8 + 2 * 8)


@pytest.mark.parametrize(
    ("lora", "attention"),
    [(LoRAConfig(rank=4), "fused"), (LoRAConfig(rank=4, layers="attention+convolutions"), "eager"), (None, "fused")],
)
def test_what_real_tensors_keep_for_the_backward_pass(lora, attention):
    """Eager attention keeps its matrices; a CPU's fused one keeps as little as a GPU's."""
    from diffusers.models.attention_processor import AttnProcessor

    networks = [unet_on(device, EMOJI, lora).requires_grad_(lora is None) for device in ("cpu", "meta")]
    for network in networks:
        if lora is not None:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(".lora_" in name)
        if attention == "eager":
            network.set_attn_processor(AttnProcessor())
    real, counted = networks
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(storage_sizes(real, sizes), lambda tensor: tensor):
        output = forward(real, 3, tokens=24)
    del output
    found = saved_bytes(counted, lambda: forward(counted, 3, tokens=24, device="meta"))
    assert found == pytest.approx(sum(sizes.values()), rel=1e-3)
    if attention == "fused":
        cost = unet_cost(EMOJI, lora, train_batch=3, sample_batch=3, tokens=24)
        assert cost.kept == found


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 needs a driver for fake CUDA tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_a_gpu(monkeypatch, dtype):
    """Fake CUDA tensors go through torch's own autocast, on a machine without a GPU too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fused(query, key, value, **_):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    lora = LoRAConfig(rank=4, layers="attention+convolutions")
    network = unet_on("meta", EMOJI, lora)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        parameter.data = parameter.data.to(torch.float32 if ".lora_" in name else dtype)
    given = {"device": "meta", "dtype": dtype}
    counted = saved_bytes(network, lambda: forward(network, 3, **given), autocast=torch.bfloat16)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", fused)
    sizes = {}
    with FakeTensorMode():
        weights = {
            name: torch.empty(p.shape, dtype=p.dtype, device="cuda").requires_grad_(p.requires_grad)
            for name, p in network.named_parameters()
        }
        own = nn.ParameterList()
        own.parameters = lambda: weights.values()
        family = family_of_network(EMOJI)
        x_t, timestep, conditioning = family.zeros(EMOJI, 3, device="cuda", dtype=dtype)
        inputs = family.inputs(timestep, conditioning, dtype)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with torch.autograd.graph.saved_tensors_hooks(storage_sizes(own, sizes), lambda tensor: tensor):
                output = torch.func.functional_call(network, weights, (x_t,), inputs)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    del output
    assert counted == pytest.approx(sum(sizes.values()), rel=1e-3)


@pytest.mark.parametrize(
    ("model", "layers"),
    [("tiny_sd", "attention"), ("tiny_sd2", "attention+convolutions"), ("tiny_sdxl", "attention+feed_forward")],
)
def test_what_is_trained_is_what_the_policy_trains(make_policy, model, layers):
    lora = LoRAConfig(rank=4, layers=layers)
    policy = make_policy(model, lora=lora)
    config = dict(policy.network.config)
    cost = unet_cost(config, lora, **SMALL)
    assert cost.trained == sum(p.numel() for p in policy.trainable.values())
    assert cost.frozen + cost.trained == sum(p.numel() for p in policy.network.parameters())
    assert family_of_network(config).latent_shape(config) == policy.latent_shape
    whole = unet_cost(config, None, **SMALL)
    assert (whole.frozen, whole.trained, whole.flops) == (0, cost.frozen, cost.flops)
    assert whole.working == cost.working


def test_memory_grows_with_the_batch_and_shrinks_with_the_dtype():
    def cost(batch, **options):
        return unet_cost(EMOJI, LoRAConfig(rank=4), train_batch=batch, sample_batch=batch, **options)

    two, four = (cost(batch) for batch in (2, 4))
    assert four.kept == pytest.approx(2 * two.kept, rel=0.01)
    assert four.working == pytest.approx(2 * two.working, rel=0.05)
    assert two.flops == four.flops
    mixed = cost(4, autocast=torch.bfloat16)
    half = cost(4, autocast=torch.bfloat16, dtype=torch.bfloat16)
    assert four.kept > mixed.kept - 2 * four.frozen > 0  # without the copies of the weights
    assert half.kept < mixed.kept


def test_decoding_needs_memory_in_proportion_to_the_images():
    config = copy.deepcopy(SD15["vae"])
    one, two = (decoder_cost(config, (4, 64, 64), batch, torch.float32) for batch in (1, 2))
    assert two.working == 2 * one.working
    assert two.flops == 2 * one.flops
    largest = 4 * 256 * 512 * 512  # the last block's input at full resolution
    assert 2 * largest < one.working < 5 * largest
