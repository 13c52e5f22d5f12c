"""Guidance, conditioning and decoding against diffusers' own pipelines, which are run as they come."""

import json
import re
import shutil

import pytest
import torch

from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.doctor.known_models import PUBLISHED
from diffusion_align.errors import UserError
from diffusion_align.models.families import family_of_network
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.models.model_ref import check_image_model
from tests.helpers.plain_diffusers import captured, initial, plain_pipeline

MODELS = ["tiny_sd", "tiny_sd2", "tiny_sdxl", "emoji-sd"]
PROMPTS = ["red apple", "a cat"]


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("model", MODELS)
def test_sampling_and_decoding_equal_diffusers(model, scale, model_path, make_policy, streams):
    policy = make_policy(model, guidance_scale=scale)
    schedule = build_schedule(policy.pipeline.scheduler, 4, eta=0.0).to("cpu")
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(2))
    x_T = initial(streams, policy.latent_shape)
    options = {"num_inference_steps": 4, "guidance_scale": scale}
    images, latents, calls = captured(plain_pipeline(model_path(model)), PROMPTS, x_T, **options)
    assert len(calls) == 4
    torch.testing.assert_close(path.latents, latents, atol=1e-4, rtol=1e-5)
    ours = policy.decode(path.latents)
    assert ours.shape == (2, 3, *policy.image_size)
    torch.testing.assert_close(ours, images, atol=1e-4, rtol=0)
    assert (ours[0] - ours[1]).abs().max() > 0.01


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_stochastic_sampling_equals_diffusers_with_the_same_noise(model, model_path, make_policy, streams):
    """eta 1: diffusers draws from the same generators in the same order, so even the noisy image is the same."""
    policy = make_policy(model, guidance_scale=3.0)
    schedule = build_schedule(policy.pipeline.scheduler, 5, eta=1.0).to("cpu")
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(2))
    pipeline = plain_pipeline(model_path(model))
    result = pipeline(
        PROMPTS, num_inference_steps=5, guidance_scale=3.0, eta=1.0, generator=streams(2), output_type="latent"
    ).images
    torch.testing.assert_close(path.latents, result, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_guided_prediction_is_uncond_plus_scale_times_difference(model, make_policy):
    policy = make_policy(model, noise=0.05)
    conditioning, empty = policy.encode(PROMPTS), policy.encode(["", ""])
    x_t, timestep = torch.randn(2, *policy.latent_shape), torch.tensor([900, 20])
    with torch.no_grad():
        cond, uncond = (policy.predict(x_t, timestep, c) for c in (conditioning, empty))
        for scale in (1.5, 7.5):
            policy.guidance_scale = scale
            guided = policy.predict(x_t, timestep, conditioning)
            torch.testing.assert_close(guided, uncond + scale * (cond - uncond), atol=1e-5 * scale, rtol=0)
    assert (cond - uncond).abs().max() > 1e-4


def test_no_guidance_runs_the_unet_on_the_prompts_only(make_policy):
    policy = make_policy("tiny_sd")
    sizes = []
    policy.pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    x_t, timestep, conditioning = torch.randn(2, 4, 8, 8), torch.tensor([900, 20]), policy.encode(PROMPTS)
    policy.predict(x_t, timestep, conditioning)
    policy.guidance_scale = 2.0
    policy.predict(x_t, timestep, conditioning)
    assert sizes == [2, 4]


def test_sdxl_conditioning_is_what_diffusers_gives_its_unet(tiny_sdxl, make_policy, streams):
    policy = make_policy("tiny_sdxl")
    x_T = initial(streams, policy.latent_shape)
    pipeline = plain_pipeline(str(tiny_sdxl))
    _, _, calls = captured(pipeline, PROMPTS, x_T, num_inference_steps=1, guidance_scale=5.0)
    given = calls[0][1]
    conditioning, empty = policy.encode(PROMPTS), policy.encode(["", ""])
    for name, theirs in [
        ("encoder_hidden_states", given["encoder_hidden_states"]),
        ("text_embeds", given["added_cond_kwargs"]["text_embeds"]),
        ("time_ids", given["added_cond_kwargs"]["time_ids"]),
    ]:
        torch.testing.assert_close(torch.cat([empty[name], conditioning[name]]), theirs, atol=1e-6, rtol=0)
    assert conditioning["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert not empty["encoder_hidden_states"].any()
    assert not empty["text_embeds"].any()
    assert conditioning["text_embeds"].any()


def test_sdxl_without_forced_zeros_encodes_the_empty_prompt(tiny_sdxl, make_policy, streams):
    policy = make_policy("tiny_sdxl", guidance_scale=5.0)
    policy.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert policy.encode([""])["text_embeds"].any()
    pipeline = plain_pipeline(str(tiny_sdxl))
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    schedule = build_schedule(policy.pipeline.scheduler, 3, eta=0.0).to("cpu")
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(2))
    _, latents, _ = captured(
        pipeline, PROMPTS, initial(streams, policy.latent_shape), num_inference_steps=3, guidance_scale=5.0
    )
    torch.testing.assert_close(path.latents, latents, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_conditioning_is_independent_of_company(model, make_policy):
    """To the bit: a resumed run encodes in other company than the run that was interrupted."""
    policy, other = make_policy(model), make_policy(model)
    prompts = ["a cat", "", "red apple", "a cat", *(f"{i} red cars" for i in range(9))]
    together = policy.encode(prompts)
    for i, prompt in enumerate(prompts):
        for name, value in other.encode([prompt]).items():
            assert torch.equal(together[name][[i]], value)


def test_a_prompt_is_encoded_once(make_policy, monkeypatch):
    policy = make_policy("tiny_sd")
    seen = []
    encode = policy.family.encode
    monkeypatch.setattr(policy.family, "encode", lambda *given: (seen.append(given[1]), encode(*given))[1])
    for _ in range(2):
        policy.encode(["a cat", "red apple", "a cat"])
    policy.encode(["red apple", "a dog"])
    assert [list(dict.fromkeys(batch)) for batch in seen] == [["a cat", "red apple"], ["a dog"]]
    policy.encode([f"{i} cats" for i in range(9)])
    assert [len(batch) for batch in seen] == [8] * 4  # one shape for all


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_a_full_prompt_cache_forgets_what_was_used_longest_ago(model, make_policy, monkeypatch):
    monkeypatch.setattr("diffusion_align.diffusion.policy.CACHED_PROMPTS", 3)
    policy, other = make_policy(model), make_policy(model)
    for prompts in (["a", "b"], ["c", "d"], ["a", "b", "c", "", "d"], ["", "e"], ["f", "g", ""]):
        found = policy.encode(prompts)
        for i, prompt in enumerate(prompts):
            expected = other.family.encode(other.pipeline, [prompt], other.image_size)
            assert all(torch.allclose(found[k][[i]], expected[k], atol=1e-6) for k in found)


def test_text_encoders_get_no_gradient_and_the_network_is_in_evaluation_mode(make_policy):
    policy = make_policy("tiny_sd", guidance_scale=2.0)
    conditioning = policy.encode(PROMPTS)
    assert not conditioning["encoder_hidden_states"].requires_grad
    assert not any(m.training for m in policy.pipeline.unet.modules())
    assert policy.predict(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), conditioning).requires_grad
    assert not policy.decode(torch.randn(2, 4, 8, 8)).requires_grad


@pytest.mark.parametrize(
    "changes",
    [{"scaling_factor": 0.18}, {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}],
    ids=["scale", "mean-and-std"],
)
def test_vae_settings_are_followed_as_sdxl_does(changes, tiny_sdxl, make_policy, streams):
    policy = make_policy("tiny_sdxl", guidance_scale=1.0)
    policy.pipeline.vae.register_to_config(**changes)
    pipeline = plain_pipeline(str(tiny_sdxl))
    pipeline.vae.register_to_config(**changes)
    images, latents, _ = captured(
        pipeline, PROMPTS, initial(streams, policy.latent_shape), num_inference_steps=2, guidance_scale=1.0
    )
    torch.testing.assert_close(policy.decode(latents), images, atol=1e-5, rtol=0)


def test_other_pipelines_and_inpainting_networks_are_refused(tiny_sd, tiny_inpainting):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**load_pipeline(str(tiny_sd)).components, requires_safety_checker=False)
    with pytest.raises(UserError, match="is a StableDiffusionImg2ImgPipeline, which is not supported"):
        DenoisingPolicy(other, lora=None)
    with pytest.raises(UserError, match="inpainting"):
        DenoisingPolicy(load_pipeline(str(tiny_inpainting)), lora=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time_cond_proj_dim", 256),  # of latent consistency models: the guidance
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("addition_embed_type", "text_image"),
        ("addition_embed_type", "text_time"),  # which a StableDiffusionPipeline does not feed
        ("encoder_hid_dim_type", "image_proj"),
    ],
)
def test_a_network_with_inputs_that_are_not_fed_is_refused_before_its_weights_are_read(tiny_sd, tmp_path, name, value):
    """Without them it would compute something else, or end in a traceback."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {name: value}))
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    wanted = f"has a UNet with {name}={value!r}, an input that training does not feed: use a plain Stable Diffusion"
    for read in (check_image_model, lambda model: load_pipeline(model, to_train=True)):
        with pytest.raises(UserError, match="^" + re.escape(f"model={str(folder)!r} {wanted}")):
            read(str(folder))
    check_image_model(str(folder), to_train=False)
    pipeline = load_pipeline(str(tiny_sd))
    pipeline.unet.register_to_config(**{name: value})
    with pytest.raises(UserError, match="^the model " + re.escape(wanted)):
        DenoisingPolicy(pipeline, lora=LoRAConfig())


def test_the_published_families_have_no_input_that_is_not_fed(tiny_sd, tiny_sd2, tiny_sdxl):
    for folder in (tiny_sd, tiny_sd2, tiny_sdxl, "emoji-sd"):
        check_image_model(str(folder))
    for model, configs in PUBLISHED.items():
        network = configs.get("unet") or configs["transformer"]
        family = family_of_network(network)
        assert family.network in configs
        family.check_network(model, network)


def test_an_adapter_that_is_there_is_trained_on_and_another_one_refused(make_policy, model_path):
    pipeline = make_policy("tiny_sd", lora=LoRAConfig(rank=2)).pipeline
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    again = DenoisingPolicy(pipeline, lora=LoRAConfig(rank=2))
    assert all(torch.equal(value, before[name]) for name, value in again.network.state_dict().items())
    with pytest.raises(UserError, match="rank 2"):
        DenoisingPolicy(pipeline, lora=LoRAConfig(rank=4))
    with pytest.raises(UserError, match="merge or unload"):
        DenoisingPolicy(pipeline, lora=None)


def test_the_dtype_of_the_network_is_searched_for_once_and_again_when_it_has_changed(make_policy, monkeypatch):
    from diffusers.models import modeling_utils

    policy, searched, search = make_policy("tiny_sd"), [], modeling_utils.get_parameter_dtype
    monkeypatch.setattr(modeling_utils, "get_parameter_dtype", lambda part: (searched.append(part), search(part))[1])
    x_t, conditioning = torch.zeros(1, *policy.latent_shape), policy.encode(["a cat"])
    searched.clear()
    for _ in range(3):
        policy.predict(x_t, torch.tensor([1]), conditioning)
    assert searched == [policy.network]
    policy.network.double()
    assert policy.predict(x_t, torch.tensor([1]), conditioning).dtype == torch.float64
    assert searched == [policy.network] * 2
