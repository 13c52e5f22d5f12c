"""Settings that save a GPU's memory: what each saves, and that images, ratios and gradients are as without it."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from diffusion_align.assets import asset_path
from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
from diffusion_align.diffusion.rollout import replay, rollout
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.errors import UserError
from diffusion_align.models.families import find_family
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.models.memory import on_device, split_decoding, text_encoders
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.references import resolve
from tests.helpers.saved_tensors import storage_sizes

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ["a red apple", "a cat"]
NETWORKS = ["tiny_sd", "tiny_sdxl", "pixart", "emoji-sd"]


@pytest.fixture(scope="module")
def policy_of(model_path, tmp_path_factory):
    """``policy_of(name, **settings)``: with adapters off zero; ``pixart`` is the tiny one of the examples."""
    pixart = tmp_path_factory.mktemp("tiny") / "pixart"
    resolve(f"{EXAMPLES / 'tiny_pixart.py'}:tiny_pixart", "example")().save_pretrained(pixart)

    def make(name, **settings):
        family = find_family(f"{EXAMPLES / 'pixart.py'}:PixArt") if name == "pixart" else None
        pipeline = load_pipeline(str(pixart) if name == "pixart" else model_path(name), family=family)
        torch.manual_seed(0)
        policy = DenoisingPolicy(pipeline, **({"lora": LoRAConfig(rank=4), "guidance_scale": 2.0} | settings))
        with torch.no_grad():
            for parameter in policy.trainable.values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return policy

    return make


def kept_bytes(policy, *given):
    """What a pass keeps for the backward pass beside the parameters, and the gradient of a sum of squares."""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(storage_sizes(policy.network, sizes), lambda kept: kept):
        output = policy.predict(*given)
    gradients = torch.autograd.grad(output.square().sum(), list(policy.trainable.values()))
    return sum(sizes.values()), gradients


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_keeps_fewer_activations_and_gives_the_same_gradients(name, lora, policy_of):
    found = []
    for checkpointed in (False, True):
        policy = policy_of(name, lora=lora, gradient_checkpointing=checkpointed)
        policy.network.double()
        assert not any(part.training for part in policy.network.modules())
        noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        found.append(kept_bytes(policy, noise, torch.tensor([3, 500]), policy.encode(PROMPTS)))
    (whole, expected), (some, gradients) = found
    assert some < 0.5 * whole
    assert all(a.dtype == torch.float64 for a in gradients)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_replay_through_checkpointed_layers_gives_the_log_probs_of_the_rollout_bit_for_bit(name, policy_of, streams):
    policy = policy_of(name, gradient_checkpointing=True)
    schedule = build_schedule(policy.pipeline.scheduler, 3).to("cpu")
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(2))
    for action in range(path.steps.shape[1]):
        logp, _ = replay(policy, schedule, *path.at(torch.arange(2), torch.full((2,), action)))
        assert logp.requires_grad
        assert torch.equal(logp, path.logp_old[:, action])


def test_sampling_computes_nothing_twice(policy_of, streams, monkeypatch):
    """Without gradients no layer is checkpointed; with them each of these is run once more by the backward pass."""
    calls = []
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda f, *a, **kw: calls.append(f) or f(*a))
    policy = policy_of("tiny_sd", gradient_checkpointing=True)
    schedule = build_schedule(policy.pipeline.scheduler, 2).to("cpu")
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(2))
    assert not calls
    replay(policy, schedule, *path.at(torch.arange(2), torch.zeros(2, dtype=torch.int64)))
    assert calls


def test_no_dropout_becomes_active(policy_of):
    """It would make ratios differ from 1."""
    policy = policy_of("tiny_sd", gradient_checkpointing=True)
    dropouts = [part for part in policy.network.modules() if isinstance(part, nn.Dropout)]
    assert dropouts
    for part in dropouts:
        part.p = 0.5
    given = torch.ones(1, *policy.latent_shape), torch.tensor([500]), policy.encode(PROMPTS[:1])
    state = torch.get_rng_state()
    first, second = (kept_bytes(policy, *given)[1] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_network_that_cannot_be_checkpointed_is_refused(policy_of, monkeypatch):
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(UNet2DConditionModel, "_supports_gradient_checkpointing", False)
    with pytest.raises(UserError) as refusal:
        policy_of("tiny_sd", gradient_checkpointing=True)
    sentence = "UNet2DConditionModel does not support gradient checkpointing: set gradient_checkpointing=false"
    assert str(refusal.value) == sentence


@pytest.fixture
def elsewhere(monkeypatch):
    """bfloat16 is the device: the text encoders' dtype says where they are. ``elsewhere(pipeline)`` lists the parts
    that run, each with the dtypes of the encoders at that time."""
    monkeypatch.setattr(
        "diffusion_align.diffusion.policy.on_device", lambda networks, _: on_device(networks, torch.bfloat16)
    )
    seen = []

    def watch(pipeline):
        encoders = text_encoders(pipeline)
        for module in (module for encoder in encoders for module in encoder.modules()):
            for name in [
                name for name, buffer in module.named_buffers(recurse=False) if not buffer.is_floating_point()
            ]:
                module.__dict__[name] = module._buffers.pop(name)  # places, which stay whole numbers
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                inner = part.decoder if name == "vae" else part
                inner.register_forward_pre_hook(lambda *_, n=name: seen.append((n, {e.dtype for e in encoders})))
        return seen

    return watch


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "pixart"])
def test_an_offloaded_encoder_is_on_the_device_only_while_it_encodes(name, policy_of, streams, elsewhere):
    policy = policy_of(name, offload_text_encoders=True)
    encoders = text_encoders(policy.pipeline)
    assert len(encoders) == (2 if name == "tiny_sdxl" else 1)
    before = {p: (p.data_ptr(), p.clone()) for e in encoders for p in e.parameters()}
    seen = elsewhere(policy.pipeline)
    schedule = build_schedule(policy.pipeline.scheduler, 3).to("cpu")
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(2))
    policy.decode(path.latents)
    with torch.no_grad(), policy.reference():
        replay(policy, schedule, *path.at(torch.arange(2), torch.zeros(2, dtype=torch.int64)))
    places = {name: {dtype for n, dtypes in seen if n == name for dtype in dtypes} for name, _ in seen}
    there, away = {torch.bfloat16}, {torch.float32}
    assert places == {n: there if n.startswith("text_encoder") else away for n in places}
    assert {"vae", policy.family.network, "text_encoder"} <= places.keys()
    assert len(seen) == 2 * len(encoders) + 4 + 1  # prompts, no prompt; steps and a replay; images
    for parameter, (address, value) in before.items():
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)


def test_prompts_of_several_image_sizes_need_one_copy_of_the_encoders(policy_of, monkeypatch):
    policy, moves = policy_of("tiny_sdxl", offload_text_encoders=True), []
    monkeypatch.setattr(
        "diffusion_align.diffusion.policy.on_device", lambda parts, device: moves.append(parts) or nullcontext()
    )
    sizes = [(16, 16), (8, 24), (16, 16), (24, 8)]
    together = policy.encode(["a cat", "a cat", "a dog", ""], sizes)
    assert [bool(parts) for parts in moves] == [True]
    assert together["time_ids"].tolist() == [[*size, 0, 0, *size] for size in sizes]
    policy.encode(["a dog", "a cat"], [(16, 16), (8, 24)])
    assert [bool(parts) for parts in moves] == [True, False]  # both are known


def test_an_encoder_that_fails_is_taken_off_the_device(policy_of, elsewhere, monkeypatch):
    policy = policy_of("tiny_sd", offload_text_encoders=True)
    elsewhere(policy.pipeline)
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda *a, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.encode(PROMPTS)
    assert policy.pipeline.text_encoder.dtype == torch.float32


def test_all_other_parts_go_to_the_device(model_path):
    for offloaded in (True, False):
        pipeline = load_pipeline(model_path("tiny_sdxl"))
        DenoisingPolicy(pipeline, lora=LoRAConfig(), device="meta", offload_text_encoders=offloaded)
        places = {name: p.device.type for name, p in pipeline.components.items() if isinstance(p, nn.Module)}
        encoders = dict.fromkeys(("text_encoder", "text_encoder_2"), "cpu" if offloaded else "meta")
        assert places == {"unet": "meta", "vae": "meta"} | encoders


def test_what_guidance_leads_away_from_is_not_forgotten_for_other_prompts(policy_of, streams, monkeypatch):
    """With more prompts than are kept, those go that were used longest ago; no encoder comes back while sampling."""
    monkeypatch.setattr("diffusion_align.diffusion.policy.CACHED_PROMPTS", 3)
    policy = policy_of("tiny_sd", offload_text_encoders=True)
    passes = []
    policy.pipeline.text_encoder.register_forward_pre_hook(lambda *_: passes.append(1))
    given = torch.zeros(2, *policy.latent_shape), torch.tensor([3, 500])
    first = policy.encode(PROMPTS)
    policy.predict(*given, first)
    for other in ("a dog", "a tree", "a house"):
        policy.encode([other])
        policy.predict(*given, first)
    assert len(passes) == 2 + 3
    assert torch.equal(policy.encode(PROMPTS)["encoder_hidden_states"], first["encoder_hidden_states"])
    assert len(passes) == 2 + 3 + 1


def decoded_parts(vae):
    """Shapes of what the decoder, and the encoder, are given from now on."""
    shapes = {"decoder": [], "encoder": []}
    for name, found in shapes.items():
        getattr(vae, name).register_forward_pre_hook(lambda _, given, f=found: f.append(tuple(given[0].shape)))
    return shapes


def test_a_vae_in_slices_takes_one_image_at_a_time(policy_of):
    policy = policy_of("tiny_sd")
    latents, images = torch.randn(3, *policy.latent_shape), torch.rand(3, 3, *policy.image_size)
    whole = policy.decode(latents), policy.encode_images(images)
    split_decoding(policy.pipeline.vae, slices=True, tiles=False)
    shapes = decoded_parts(policy.pipeline.vae)
    for expected, found in zip(whole, (policy.decode(latents), policy.encode_images(images))):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert shapes == {"decoder": [(1, 4, 8, 8)] * 3, "encoder": [(1, 3, 16, 16)] * 3}


def test_a_vae_in_tiles_decodes_larger_images_in_parts_and_its_own_size_at_once(policy_of, streams):
    """As diffusers does: overlapping by a quarter and blended, each normalized by a mean and variance of its own."""
    policy = policy_of("emoji-sd", height=128, width=96)
    vae, schedule = policy.pipeline.vae, build_schedule(policy.pipeline.scheduler, 10, eta=0.0).to("cpu")
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    latents = rollout(policy, schedule, policy.encode(PROMPTS), streams(2), record=nothing).latents
    assert latents.shape == (2, 4, 32, 24)
    small = latents[..., :16, :16]
    whole, alone = policy.decode(latents), policy.decode(small)
    encoded = policy.encode_images(whole)
    split_decoding(vae, slices=False, tiles=True)
    shapes = decoded_parts(vae)
    tiled, again = policy.decode(latents), policy.encode_images(whole)
    assert len(shapes["decoder"]) == len(shapes["encoder"]) == 3 * 2
    assert max(shapes["decoder"]) == (2, 4, 16, 16)
    assert max(shapes["encoder"]) == (2, 3, 64, 64)
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().mean() < 0.02
    assert 0 < (again - encoded).abs().mean() < 0.1 * encoded.std()
    shapes["decoder"].clear()
    assert torch.equal(policy.decode(small), alone)
    assert shapes["decoder"] == [(2, 4, 16, 16)]


def test_tiles_are_those_of_plain_diffusers_bit_for_bit(policy_of):
    """As ``vae.enable_tiling()`` decodes; not as a VAE without tiles does, which docs/ddpo.md says in numbers."""
    policy = policy_of("emoji-sd", height=128, width=96)
    vae = AutoencoderKL.from_pretrained(asset_path("emoji-sd"), subfolder="vae").eval()
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    split_decoding(policy.pipeline.vae, slices=False, tiles=True)
    vae.enable_tiling()
    parts = [decoded_parts(policy.pipeline.vae), decoded_parts(vae)]
    found, again = policy.decode(latents), policy.encode_images(policy.decode(latents))
    scale = torch.tensor(1 / vae.config.scaling_factor)  # a product, which rounds unlike diffusers' quotient
    with torch.no_grad():
        images = (vae.decode(latents * scale).sample / 2 + 0.5).clamp(0, 1)
        vae.decode(latents * scale)
        encoded = vae.encode(images * 2 - 1).latent_dist.mode() / scale
    assert torch.equal(found, images)
    assert torch.equal(again, encoded)
    assert parts[0] == parts[1]
    assert len(parts[0]["decoder"]) == 2 * 6
    assert len(parts[0]["encoder"]) == 6


def test_a_pipeline_that_moves_its_parts_itself_is_refused(model_path):
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipeline = load_pipeline(model_path("tiny_sd"))
    add_hook_to_module(pipeline.unet, ModelHook())
    with pytest.raises(UserError, match=r"call its remove_all_hooks\(\) and to\(device\) first"):
        DenoisingPolicy(pipeline, lora=LoRAConfig())
    pipeline.remove_all_hooks()
    DenoisingPolicy(pipeline, lora=LoRAConfig())


def test_settings_of_a_run_are_named_where_a_model_is_loaded():
    with pytest.raises(UserError, match="no argument vae_slicing: give it to align, or call"):
        ImageAlignmentPipeline.from_pretrained("emoji-sd", vae_slicing=True)
    with pytest.raises(UserError, match="no argument gradient_checkpointing: give it to align"):
        ImageAlignmentPipeline.from_pretrained("emoji-sd", gradient_checkpointing=True)
