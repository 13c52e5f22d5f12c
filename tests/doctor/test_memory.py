"""What networks cost, against published numbers, torch's own counter, and what passes of real and fake tensors use."""

import itertools
import json
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from diffusion_align.assets import asset_path
from diffusion_align.diffusion.policy import LoRAConfig, peft_config
from diffusion_align.doctor.known_models import FLUX_DEV, FLUX_SCHNELL, SD3, SD15, SD21, SD35_LARGE, SD35_MEDIUM, SDXL
from diffusion_align.doctor.memory import (
    AsOnGpu,
    LiveBytes,
    Passes,
    decoding_cost,
    differentiated_decoding_cost,
    encoder_cost,
    encoding_cost,
    network_cost,
    parameter_counts,
    training_bytes,
    vae_on_meta,
)
from diffusion_align.models.families import family_of_network
from diffusion_align.models.memory import checkpoint_activations, named_text_encoders

EMOJI = json.loads((asset_path("emoji-sd") / "unet" / "config.json").read_text())
SMALL = {"train_batch": 2, "sample_batch": 2}


SMALL_SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 24,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}
SMALL_FLUX = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 40,
    "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": True,
}


def cost_of(config, lora, **options):
    family = family_of_network(config)
    return network_cost(family, config, lora, Passes(**{"latent_size": family.latent_shape(config)[1:]} | options))


def forward(network, batch, **options):
    """A pass of a network."""
    family = family_of_network(network.config)
    return family.predict(network, *family.zeros(network.config, batch, **options))


def network_on(device, config, lora=None):
    import diffusers
    from peft import inject_adapter_in_model

    family = family_of_network(config)
    with torch.device(device):
        network = getattr(diffusers, family.network_class).from_config(dict(config)).requires_grad_(False)
        if lora is not None:
            inject_adapter_in_model(peft_config(lora, family), network)
    return network.eval()


THREE_ENCODERS = {"text_encoder": 123.65, "text_encoder_2": 694.66, "text_encoder_3": 4762.31}


@pytest.mark.parametrize(
    ("configs", "millions"),
    [
        (SD15, {"unet": 859.52, "vae": 83.65, "text_encoder": 123.06}),
        (SD21, {"unet": 865.91, "vae": 83.65, "text_encoder": 340.39}),
        (SDXL, {"unet": 2567.46, "vae": 83.65, "text_encoder": 123.06, "text_encoder_2": 694.66}),
        (SD3, {"transformer": 2084.95, "vae": 83.82, **THREE_ENCODERS}),
        (SD35_MEDIUM, {"transformer": 2469.66, "vae": 83.82, **THREE_ENCODERS}),
        (SD35_LARGE, {"transformer": 8146.28, "vae": 83.82, **THREE_ENCODERS}),
        (FLUX_DEV, {"transformer": 11901.41, "vae": 83.82, "text_encoder": 123.06, "text_encoder_2": 4762.31}),
        (FLUX_SCHNELL, {"transformer": 11891.18, "vae": 83.82, "text_encoder": 123.06, "text_encoder_2": 4762.31}),
    ],
    ids=["sd15", "sd21", "sdxl", "sd3", "sd35_medium", "sd35_large", "flux_dev", "flux_schnell"],
)
def test_published_numbers_of_parameters(configs, millions):
    """Of Stable Diffusion 3's transformers with the embeddings of positions, which their files hold too."""
    network = configs.get("unet") or configs["transformer"]
    counts = parameter_counts(family_of_network(network), configs)
    assert {name: round(count / 1e6, 2) for name, count in counts.items()} == millions


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_text_encoders_with_adapters(name, checkpointing, make_policy):
    """As many parameters as a policy trains, and the bytes that a pass of its own encoders holds."""
    lora = LoRAConfig(rank=2, text_encoder=True)
    policy = make_policy(name, lora=lora, gradient_checkpointing=checkpointing)
    passes = Passes(latent_size=(8, 8), **SMALL, checkpointing=checkpointing)
    for part, encoder in named_text_encoders(policy.pipeline).items():
        config = encoder.config.to_dict()
        passes = replace(passes, tokens=config["max_position_embeddings"])
        found = encoder_cost(policy.family, config, lora, passes)
        assert found.trained == sum(p.numel() for n, p in policy.trainable.items() if n.startswith(f"{part}."))
        ids = torch.zeros(1, passes.tokens, dtype=torch.int64)
        with LiveBytes([*encoder.parameters(), *encoder.buffers()]) as live:
            output = encoder(ids, output_hidden_states=True)
            held = live.now
        assert found.kept == pytest.approx(held, rel=0.15), output[0].shape


def test_stable_diffusion_15():
    """2 x 340 G multiply-adds outside attention, and all of what torch's counter sees; the LoRA of peft."""
    from torch.utils.flop_counter import FlopCounterMode

    cost = cost_of(SD15["unet"], LoRAConfig(rank=16), **SMALL)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(network_on("meta", SD15["unet"], LoRAConfig(rank=16)), 1, device="meta")
    assert cost.flops == counter.get_total_flops()
    products = (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.convolution)
    outside = sum(counter.get_flop_counts()["Global"].get(product, 0) for product in products)
    assert outside == pytest.approx(2 * 340e9, rel=0.02)
    assert cost.trained == 3_188_736
    assert cost.frozen == pytest.approx(859.52e6, rel=1e-5)


def test_stable_diffusion_xl_is_counted_in_seconds():
    """2 x 2.99 T multiply-adds outside attention, whose own follow from its 70 layers at two sizes."""
    begun = time.process_time()
    cost = cost_of(SDXL["unet"], LoRAConfig(rank=16), **SMALL, autocast=torch.bfloat16)
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
    there = [*network.parameters(), x]
    with torch.no_grad(), AsOnGpu(None) as counted, LiveBytes(there) as live:
        y = network(x)
    assert counted.flops == 2 * 3 * (4 * 8 + 8 * 2)
    assert (live.now, live.peak) == (4 * 3 * 2, 4 * (3 * 8 + 3 * 2))
    del y
    assert live.now == 0
    network.requires_grad_(False)
    with torch.no_grad(), AsOnGpu(torch.bfloat16), LiveBytes(there) as live:
        network(x)
    # The first layer: narrow copies of its input, weight and bias, and its output.
    assert live.peak == 2 * (3 * 4 + 4 * 8 + 8 + 3 * 8)


def test_training_in_closed_form():
    """Frozen, trained, frozen: the trained layer's input, and where it is narrowed the last layer's weight."""
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)).to("meta").requires_grad_(False)
    network[1].requires_grad_(True)
    passes = Passes((1, 1), 3, 3)
    y = 4 * 3 * 2
    kept, peak = training_bytes(network, lambda: network(torch.zeros(3, 4, device="meta")), passes)
    assert kept == 4 * 3 * 8 + y
    # Beside input and y: the gradients of weight, bias and the layer's output; the loss, and the one number its is.
    assert peak == 4 * (3 * 8) + y + 4 * (8 * 8 + 8 + 3 * 8) + 4 + 4
    narrow = replace(passes, autocast=torch.bfloat16)
    kept, _ = training_bytes(network, lambda: network(torch.zeros(3, 4, device="meta")), narrow)
    # The layer's input and the last one's weight, its own copies as long as autocast lasts, and the output.
    assert kept == 2 * (3 * 8 + 2 * 8 + 8 * 8 + 8 + 3 * 2)


def test_a_table_of_positions_is_there_before_the_pass():
    """Of which a network takes a part, without a copy."""
    network = nn.Linear(4, 8)
    network.register_buffer("table", torch.zeros(1000, 4))
    network.to("meta")
    x = torch.zeros(3, 4, device="meta")
    kept, _ = training_bytes(network, lambda: network(x + network.table[:3]), Passes((1, 1), 3, 3))
    assert kept == 4 * (3 * 4 + 3 * 8)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("config", "lora", "attention"),
    [
        (EMOJI, LoRAConfig(rank=4), "fused"),
        (EMOJI, LoRAConfig(rank=4, layers="attention+convolutions"), "eager"),
        (EMOJI, None, "eager"),
        *itertools.product([SMALL_SD3, SMALL_FLUX], [LoRAConfig(rank=4), None], ["fused", "eager"]),
    ],
)
def test_what_a_pass_of_real_tensors_uses(config, lora, attention, checkpointing):
    """Eager attention keeps its matrices; a CPU's fused one keeps as little as a GPU's."""
    passes = Passes((16, 16), 3, 3, checkpointing=checkpointing, eager_attention=attention == "eager")
    found = []
    for device in ("cpu", "meta"):
        network = network_on(device, config, lora).requires_grad_(lora is None)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(lora is None or ".lora_" in name)
        if attention == "eager":
            family_of_network(config).use_eager_attention(network)
        kind = {"tokens": 24, "latent_size": (16, 16), "device": device}
        found.append(training_bytes(network, partial(forward, network, 3, **kind), passes))
    real, counted = found
    assert counted == pytest.approx(real, rel=0.01)
    cost = cost_of(config, lora, **vars(passes) | {"tokens": 24})
    assert (cost.kept, cost.training) == counted


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_decoding_with_a_gradient_really_uses(checkpointing):
    """Twice, with one backward pass; and what the backward pass needs, as torch itself tells it."""
    from diffusers import AutoencoderKL

    config = json.loads((asset_path("emoji-sd") / "vae" / "config.json").read_text())
    vae = AutoencoderKL.from_config(config).requires_grad_(False).eval()
    if checkpointing:
        checkpoint_activations(vae)
    latents = (config["latent_channels"], 8, 8)
    given = torch.randn(3, *latents, requires_grad=True)
    weights, saved = [*vae.parameters(), *vae.buffers()], {}
    there = {tensor.untyped_storage()._cdata for tensor in weights}

    def keep(tensor):
        if (storage := tensor.untyped_storage())._cdata not in there:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with LiveBytes([*weights, given]) as live, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        images = [vae.decode(given, return_dict=False)[0] for _ in range(2)]
        kept = live.now
        sum(one.sum() for one in images).backward()
    passes = Passes((8, 8), 3, 3, checkpointing=checkpointing)
    counted = [
        differentiated_decoding_cost(vae_on_meta(config, torch.float32), latents, 3, passes, times=n) for n in (1, 2)
    ]
    assert counted[1] == pytest.approx(live.peak, rel=0.02)
    assert counted[1] - counted[0] == pytest.approx(kept / 2, rel=0.02)
    if not checkpointing:  # whose hooks are its own
        beside = sum(one.nbytes for one in images) + given.nbytes
        assert kept <= sum(saved.values()) + beside
        assert kept == pytest.approx(sum(saved.values()), rel=0.05)


def test_checkpointing_saves_what_lies_within_blocks():
    lora = LoRAConfig(rank=16)
    kind = SMALL | {"dtype": torch.bfloat16, "autocast": torch.bfloat16}
    plain, checkpointed = (cost_of(SD15["unet"], lora, **kind, checkpointing=on) for on in (False, True))
    assert checkpointed.kept < plain.kept / 5
    assert checkpointed.training < plain.training / 3
    assert checkpointed.training > 1.2 * checkpointed.kept  # a block is computed again
    assert checkpointed.sampling == plain.sampling


class Predicting(nn.Module):
    def __init__(self, network, family):
        super().__init__()
        self.network, self.family = network, family

    def forward(self, *inputs):
        return self.family.predict(self.network, *inputs)


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 needs a driver for fake CUDA tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "layers"),
    [(EMOJI, "attention+convolutions"), (SMALL_SD3, "attention"), (SMALL_FLUX, "attention+feed_forward")],
    ids=["unet", "sd3", "flux"],
)
def test_autocast_is_that_of_a_gpu(monkeypatch, dtype, config, layers):
    """Fake CUDA tensors go through torch's own autocast, on a machine without a GPU too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fused(query, key, value, *_, **__):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    family = family_of_network(config)
    network = network_on("meta", config, LoRAConfig(rank=4, layers=layers))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        parameter.data = parameter.data.to(torch.float32 if ".lora_" in name else dtype)
    for buffer in network.buffers():
        buffer.data = buffer.data.to(dtype)
    inputs = family.zeros(config, 3, latent_size=(16, 16), device="meta", dtype=dtype)
    there = [*network.parameters(), *network.buffers(), *tree_leaves(inputs)]
    with LiveBytes(there) as counted, AsOnGpu(torch.bfloat16):
        output = family.predict(network, *inputs)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", fused)
    with FakeTensorMode():
        weights = {
            f"network.{name}": torch.empty(one.shape, dtype=one.dtype, device="cuda").requires_grad_(one.requires_grad)
            for name, one in [*network.named_parameters(), *network.named_buffers()]
        }
        inputs = family.zeros(config, 3, latent_size=(16, 16), device="cuda", dtype=dtype)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with LiveBytes([*weights.values(), *tree_leaves(inputs)]) as live:
                output = torch.func.functional_call(Predicting(network, family), weights, inputs)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    assert counted.peak == pytest.approx(live.peak, rel=1e-2)
    del output


@pytest.mark.parametrize(
    ("model", "layers"),
    [("tiny_sd", "attention"), ("tiny_sd2", "attention+convolutions"), ("tiny_sdxl", "attention+feed_forward")],
)
def test_what_is_trained_is_what_the_policy_trains(make_policy, model, layers):
    lora = LoRAConfig(rank=4, layers=layers)
    policy = make_policy(model, lora=lora)
    config = dict(policy.network.config)
    cost = cost_of(config, lora, **SMALL)
    assert cost.trained == sum(p.numel() for p in policy.trainable.values())
    assert cost.frozen + cost.trained == sum(p.numel() for p in policy.network.parameters())
    assert family_of_network(config).latent_shape(config) == policy.latent_shape
    whole = cost_of(config, None, **SMALL)
    assert (whole.frozen, whole.trained) == (0, cost.frozen)
    assert whole.flops < cost.flops  # by the adapters'


def test_memory_grows_with_the_batch_and_shrinks_with_the_dtype():
    def cost(batch, **options):
        return cost_of(EMOJI, LoRAConfig(rank=4), train_batch=batch, sample_batch=batch, **options)

    two, four = (cost(batch) for batch in (2, 4))
    assert four.kept == pytest.approx(2 * two.kept, rel=0.01)
    assert four.training == pytest.approx(2 * two.training, rel=0.01)
    assert four.sampling == pytest.approx(2 * two.sampling, rel=0.05)
    assert two.flops == four.flops
    mixed = cost(4, autocast=torch.bfloat16)
    half = cost(4, autocast=torch.bfloat16, dtype=torch.bfloat16)
    assert four.kept > mixed.kept - 2 * four.frozen > 0  # without the copies of the weights
    assert half.kept < mixed.kept


@pytest.mark.parametrize(
    ("cost", "small", "large"),
    [(decoding_cost, (4, 64, 64), (4, 128, 128)), (encoding_cost, (512, 512), (1024, 1024))],
)
def test_a_vae_needs_memory_in_proportion_to_the_images(cost, small, large):
    vae = vae_on_meta(SD15["vae"], torch.float32)
    one, two = (cost(vae, small, batch) for batch in (1, 2))
    assert two.working == pytest.approx(2 * one.working, rel=0.01)
    assert two.flops == 2 * one.flops
    largest = 4 * 128 * 512 * 512  # of the features at full resolution
    assert 3 * largest < one.working < 8 * largest
    sliced = cost(vae_on_meta(SD15["vae"], torch.float32, slicing=True), small, 4)
    assert sliced.working < 1.1 * one.working
    tiled = cost(vae_on_meta(SD15["vae"], torch.float32, tiling=True), large, 1)
    assert tiled.working < cost(vae, large, 1).working / 3
