"""Z-Image: what the network is told, rollouts, decoding and LoRA files against diffusers' own pipelines."""

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
from diffusion_align.diffusion.rollout import replay, rollout
from diffusion_align.errors import ConfigError
from diffusion_align.models.adapters import LORA_FILE, load_lora
from diffusion_align.models.families import SHIPPED, family_of_network
from diffusion_align.models.image_pipelines import check_folder, load_pipeline
from tests.helpers.flow_models import DYNAMIC, SIDE, noisy_policy, schedule_of
from tests.helpers.plain_diffusers import initial

PROMPTS = ["red apple", "a cat"]
READS = {"max_sequence_length": 40}
MODELS = ["tiny_z_image"]
ALL_LAYERS = LoRAConfig(rank=4, layers="attention+feed_forward")
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def flow_policy(model_path):
    """``flow_policy(name, noise=0.1, **settings)``, see ``noisy_policy``."""
    return lambda name, **settings: noisy_policy(model_path(name), **({"reads": READS, "noise": 0.1} | settings))


def given(policy):
    torch.manual_seed(1)
    return torch.randn(2, *policy.latent_shape), torch.tensor([913.35, 20.5]), policy.encode(PROMPTS)


@EVERY_MODEL
@pytest.mark.parametrize("size", [(16, 16), (16, 24)], ids=["square", "wide"])
@pytest.mark.parametrize("scheduler", [{}, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize(("scale", "negative"), [(1.0, None), (4.0, None), (4.0, "a dark cave")])
def test_without_noise_a_rollout_is_diffusers_pipeline(name, size, scheduler, scale, negative, flow_policy, streams):
    """In float64; pipelines that know no negative prompt are given its embedding."""
    height, width = size
    more = {"height": height, "width": width, "guidance_scale": scale, "negative_prompt": negative}
    policy = flow_policy(name, scheduler=scheduler, dtype=torch.float64, noise=0, attention="sdpa", **more)
    for parameter in policy.trainable.values():
        parameter.data = parameter.data.double()
    schedule = schedule_of(policy, torch.float64, eta=0.0)
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(2))
    theirs = policy.pipeline(
        prompt=list(PROMPTS),
        latents=initial(streams, policy.latent_shape),
        num_inference_steps=4,
        height=height,
        width=width,
        output_type="latent",
        **policy.family.call_guidance(scale),
        **({} if negative is None else {"negative_prompt": [negative] * 2}),
        **READS,
    ).images
    torch.testing.assert_close(path.latents.double(), theirs.double(), rtol=0, atol=1e-6)
    assert torch.equal(schedule.table.timestep, policy.pipeline.scheduler.timesteps)
    assert torch.equal(schedule.table.sigma_t.float(), policy.pipeline.scheduler.sigmas[:-1])
    assert theirs.std() > 0.5


@EVERY_MODEL
def test_guidance_and_prompts_change_the_rollout(name, flow_policy):
    """So that the parity above is one of something."""
    policy = flow_policy(name)
    x_t, timestep, conditioning = given(policy)
    other = policy.encode(["the cave", "a dog and a pear"])
    with torch.no_grad():
        plain, guided = (policy.predict(x_t, timestep, conditioning, guidance_scale=scale) for scale in (1.0, 4.0))
        without = policy.predict(x_t, timestep, policy.encode(["", ""]), guidance_scale=1.0)
        elsewhere = policy.predict(x_t, timestep, other, guidance_scale=1.0)
    torch.testing.assert_close(guided, without + 4 * (plain - without), rtol=1e-4, atol=1e-4)
    assert (plain - guided).abs().max() > 0.01
    assert (plain - elsewhere).abs().max() > 0.01


@EVERY_MODEL
@pytest.mark.parametrize("sampler", [{"eta": 1.0}, {"eta": 0.3}, {"name": "flow_sde"}, {"name": "cps"}])
@pytest.mark.parametrize("kernels", ["float32", "bfloat16", "autocast"])
def test_replay_is_the_rollout(name, sampler, kernels, flow_policy, streams):
    """The ratio is exactly 1 at the rollout's batch, also where the prompts' lengths differ; one by one nearly."""
    import contextlib

    narrow = {"dtype": torch.bfloat16} if kernels == "bfloat16" else {}
    autocast = contextlib.nullcontext
    if kernels == "autocast":
        autocast = lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # noqa: E731
    policy = flow_policy(name, guidance_scale=3.0, autocast=autocast, **narrow)
    schedule = schedule_of(policy, **sampler)
    path = rollout(policy, schedule, policy.encode(["red apple", "a cat under a red tree"]), streams(2))
    both = torch.arange(2)
    for action in range(3):
        logp, _ = replay(policy, schedule, *path.at(both, torch.full((2,), action)))
        assert torch.equal(logp, path.logp_old[:, action])
        for sample in range(2):
            alone, _ = replay(policy, schedule, *path.at(both[[sample]], torch.tensor([action])))
            bound = 1e-4 if kernels == "float32" else 0.5
            assert (alone - path.logp_old[sample, action]).abs() <= bound


@EVERY_MODEL
def test_padding_changes_nothing(name, flow_policy):
    """A prompt's prediction is the same beside a longer one."""
    policy = flow_policy(name, dtype=torch.float64)
    x_t, timestep, _ = given(policy)
    x_t = x_t[:1].expand(2, -1, -1, -1)
    with torch.no_grad():
        together = policy.predict(x_t, timestep[:1].expand(2), policy.encode(["a cat", "a cat under a red tree"]))
        alone = policy.predict(x_t[:1], timestep[:1], policy.encode(["a cat"]))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


@EVERY_MODEL
def test_decoding_is_that_of_diffusers_and_undoes_encoding(name, flow_policy):
    policy = flow_policy(name)
    x_0, vae = torch.randn(2, *policy.latent_shape), policy.pipeline.vae
    with torch.no_grad():
        theirs = vae.decode(x_0 / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        images = torch.rand(2, 3, SIDE, SIDE)
        mode = vae.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(policy.decode(x_0), policy.pipeline.image_processor.denormalize(theirs))
    latents = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(policy.encode_images(images), latents)


@EVERY_MODEL
@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), ALL_LAYERS])
def test_plain_diffusers_loads_the_adapter_and_computes_the_same(name, lora, flow_policy, model_path, tmp_path):
    policy = flow_policy(name, lora=lora, attention="sdpa")  # as diffusers computes it
    inputs = given(policy)
    policy.save_lora(tmp_path)
    with torch.no_grad():
        ours = policy.predict(*inputs)
        with policy.reference():
            reference = policy.predict(*inputs)
    plain = DiffusionPipeline.from_pretrained(model_path(name))
    plain.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    held = {n for n, _ in plain.transformer.named_parameters() if ".lora_" in n}
    assert len(held) == len(policy.trainable)
    by_them = DenoisingPolicy.__new__(DenoisingPolicy)
    by_them.__dict__ |= policy.__dict__ | {"pipeline": plain}
    again = flow_policy(name, lora=None, attention="sdpa", noise=0)
    load_lora(again.pipeline, tmp_path, name)
    with torch.no_grad():
        assert torch.equal(ours, by_them.predict(*inputs))
        assert torch.equal(ours, again.predict(*inputs))
    assert (ours - reference).abs().max() > 0.01


@EVERY_MODEL
def test_adapters_are_on_all_layers_of_their_kinds(name, flow_policy):
    policy = flow_policy(name, lora=ALL_LAYERS)
    linear = {
        n.removesuffix(".base_layer") for n, m in policy.network.named_modules() if isinstance(m, torch.nn.Linear)
    }
    blocks = {n for n in linear if (".attention." in n or ".feed_forward." in n) and ".lora_" not in n}
    assert {n for n, m in policy.network.named_modules() if hasattr(m, "lora_A")} == blocks


@EVERY_MODEL
def test_checkpointing_and_attention_change_no_gradient(name, flow_policy):
    def gradients(**settings):
        policy = flow_policy(name, **settings)
        policy.predict(*given(policy)).square().sum().backward()
        return {n: p.grad for n, p in policy.trainable.items()}

    plain = gradients(attention="sdpa")
    assert all(value.abs().max() > 0 for value in plain.values())
    for found in (gradients(attention="sdpa", gradient_checkpointing=True), gradients(attention="eager")):
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3 * value.abs().max().item())


@EVERY_MODEL
def test_a_network_names_its_family(name, model_path):
    pipeline = load_pipeline(model_path(name))
    family = SHIPPED[type(pipeline).__name__]
    config = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
    assert family_of_network(config) is family
    assert type(pipeline.transformer).__name__ == family.network_class


@EVERY_MODEL
def test_the_pipelines_own_number_of_tokens_is_the_default(name, flow_policy):
    assert flow_policy(name, reads={}).encode(["a cat"])["encoder_hidden_states"].shape[1] == 512


REFUSED = {"t5": (False, "t5=false is for Stable Diffusion 3"), "attention": ("xformers", "xformers is for UNets")}


@EVERY_MODEL
@pytest.mark.parametrize("setting", REFUSED)
def test_settings_of_other_families_are_refused_before_anything_is_loaded(name, setting, model_path):
    value, sentence = REFUSED[setting]
    with pytest.raises(ConfigError, match=sentence):
        check_folder(model_path(name), settings={setting: value})


def test_sizes_that_z_image_can_have(model_path):
    check_folder(model_path("tiny_z_image"), height=16, width=24)
    with pytest.raises(ConfigError, match=r"width=20 must be a multiple of 8 .*set 16 or 24"):
        check_folder(model_path("tiny_z_image"), height=16, width=20)
    assert SHIPPED["ZImagePipeline"].latent_size({"in_channels": 16}, {"block_out_channels": [1] * 4}) == (128, 128)
