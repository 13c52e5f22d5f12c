"""Stable Diffusion 3 and FLUX.1: encoding, prediction, decoding and LoRA files against diffusers' own pipelines."""

import json

import pytest
import torch
from safetensors import safe_open

from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
from diffusion_align.errors import ConfigError, UserError
from diffusion_align.models.adapters import LORA_FILE, load_lora
from diffusion_align.models.families import SHIPPED, family_of, family_of_network
from diffusion_align.models.families.flux import pack, positions, unpack
from diffusion_align.models.image_pipelines import check_folder, load_pipeline
from tests.helpers.flow_models import SIDE, noisy_policy

PROMPTS = ["red apple", "a cat"]
READS = {"max_sequence_length": 20}
MODELS = ["tiny_sd3", "tiny_flux", "tiny_schnell"]
ALL_LAYERS = LoRAConfig(rank=4, layers="attention+feed_forward")


@pytest.fixture
def flow_policy(model_path):
    """``flow_policy(name, noise=0, **settings)``, see ``noisy_policy``."""
    return lambda name, **settings: noisy_policy(model_path(name), **({"reads": READS} | settings))


def given(policy, seed=1):
    """x_t, timestep and conditioning of two samples."""
    torch.manual_seed(seed)
    return torch.randn(2, *policy.latent_shape), torch.tensor([913.35, 20.5]), policy.encode(PROMPTS)


def network_call(policy, run):
    """What the network was given, by name, in the calls that ``run`` makes of it."""
    calls = []
    hook = policy.network.register_forward_pre_hook(
        lambda _, given, named: calls.append({"hidden_states": given[0]} | named if given else named), with_kwargs=True
    )
    run()
    hook.remove()
    return calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_network_is_told_what_diffusers_pipeline_tells_it(name, scale, flow_policy):
    """At every step, the empty prompt's pooled state under guidance included."""
    if name == "tiny_schnell" and scale != 1:
        pytest.skip("it takes no guidance")
    policy = flow_policy(name, guidance_scale=scale, height=16, width=24)
    x_t, _, conditioning = given(policy)
    latents = pack(x_t) if policy.family.guidance == "embedded" else x_t
    options = {"num_inference_steps": 2, "guidance_scale": scale, "height": 16, "width": 24, "output_type": "latent"}
    theirs = network_call(policy, lambda: policy.pipeline(PROMPTS, latents=latents, **options, **READS))[0]
    timestep = policy.pipeline.scheduler.timesteps[:1].expand(2)
    (ours,) = network_call(policy, lambda: policy.predict(x_t, timestep, conditioning))
    assert {k for k, v in theirs.items() if v is not None} - {"joint_attention_kwargs"} == {
        k for k, v in ours.items() if v is not None
    }
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            # Encoded eight at a time, prompts round otherwise than two at a time.
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-5, msg=f"{key} differs")


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_guidance_changes_the_prediction(name, flow_policy):
    policy = flow_policy(name)
    x_t, timestep, conditioning = given(policy)
    with torch.no_grad():
        plain, guided = (policy.predict(x_t, timestep, conditioning, guidance_scale=scale) for scale in (1.0, 3.5))
        if name == "tiny_sd3":
            without = policy.predict(x_t, timestep, policy.encode(["", ""]), guidance_scale=1.0)
            torch.testing.assert_close(guided, without + 3.5 * (plain - without), rtol=1e-5, atol=1e-5)
    assert (plain - guided).abs().max() > 0.01


def test_packing_is_that_of_diffusers():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 5, 8, 12)
    theirs = FluxPipeline._pack_latents(latents, 2, 5, 8, 12)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, (8, 12)), latents)
    assert torch.equal(positions(latents), FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32))


@pytest.mark.parametrize("name", MODELS)
def test_decoding_is_that_of_diffusers_and_undoes_encoding(name, flow_policy):
    """Scale and shift of the VAE's configuration."""
    policy = flow_policy(name)
    x_0, vae = torch.randn(2, *policy.latent_shape), policy.pipeline.vae
    with torch.no_grad():
        theirs = vae.decode(x_0 / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        images = torch.rand(2, 3, SIDE, SIDE)
        mode = vae.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(policy.decode(x_0), policy.pipeline.image_processor.denormalize(theirs))
    latents = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(policy.encode_images(images), latents)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), ALL_LAYERS, LoRAConfig(rank=2, alpha=3)])
def test_plain_diffusers_loads_the_adapter_and_computes_the_same(name, lora, flow_policy, model_path, tmp_path):
    from diffusers import DiffusionPipeline

    policy = flow_policy(name, noise=0.1, lora=lora, attention="sdpa")  # as diffusers computes it
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
    again = flow_policy(name, lora=None, attention="sdpa")
    load_lora(again.pipeline, tmp_path, name)
    with torch.no_grad():
        theirs, read = by_them.predict(*inputs), again.predict(*inputs)
    if lora.alpha is None:  # a scale of 1, so that nothing is rounded on the way
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, read)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, read)
    assert (ours - reference).abs().max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_on_the_attention_of_image_and_text(name, flow_policy):
    policy = flow_policy(name)
    adapted = {n for n, m in policy.network.named_modules() if hasattr(m, "lora_A")}
    wanted = {
        n
        for n, m in policy.network.named_modules()
        if ".attn" in n and isinstance(m, torch.nn.Linear) and ".lora_" not in n
    }
    assert {n.removesuffix(".base_layer") for n in wanted} == adapted
    more = flow_policy(name, lora=ALL_LAYERS)
    layers = {n for n, m in more.network.named_modules() if hasattr(m, "lora_A")} - adapted
    assert layers
    assert all(".ff" in n or n.endswith("proj_mlp") for n in layers)
    assert any(".ff_context." in n for n in layers)


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_and_attention_change_no_gradient(name, flow_policy):
    def gradients(**settings):
        policy = flow_policy(name, noise=0.1, **settings)
        policy.predict(*given(policy)).square().sum().backward()
        return {n: p.grad for n, p in policy.trainable.items()}

    plain = gradients(attention="sdpa")
    unused = "transformer_blocks.2.attn.add_q_proj"  # the last block of SD3 drops the text's tokens
    assert all(value.abs().max() > 0 for n, value in plain.items() if not (name == "tiny_sd3" and unused in n))
    for found in (gradients(attention="sdpa", gradient_checkpointing=True), gradients(attention="eager")):
        assert found.keys() == plain.keys()
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3 * value.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_keeps_less(name, flow_policy):
    def kept(**settings):
        policy, tensors = flow_policy(name, **settings), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x.numel()) or x, lambda x: x):
            policy.predict(*given(policy))
        return sum(tensors)

    assert kept(gradient_checkpointing=True) < 0.5 * kept()


def test_without_t5_its_states_are_zeros(flow_policy, model_path):
    with_t5, without = (flow_policy("tiny_sd3", reads={**READS, "t5": t5}) for t5 in (True, False))
    assert without.pipeline.text_encoder_3 is without.pipeline.tokenizer_3 is None
    full, less = with_t5.encode(PROMPTS), without.encode(PROMPTS)
    clip = full["encoder_hidden_states"].shape[1] - 20
    assert full["encoder_hidden_states"].shape == less["encoder_hidden_states"].shape
    assert torch.equal(full["encoder_hidden_states"][:, :clip], less["encoder_hidden_states"][:, :clip])
    assert full["encoder_hidden_states"][:, clip:].abs().min() > 0
    assert not less["encoder_hidden_states"][:, clip:].any()
    assert torch.equal(full["pooled_projections"], less["pooled_projections"])


def test_a_folder_without_t5_is_whole_without_it(model_path, tmp_path):
    import shutil

    folder = tmp_path / "sd3"
    shutil.copytree(model_path("tiny_sd3"), folder)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    with pytest.raises(UserError, match="is incomplete: the folder has no t"):
        load_pipeline(str(folder))
    assert load_pipeline(str(folder), settings={"t5": False}).text_encoder_3 is None


def test_the_pipelines_own_number_of_tokens_is_the_default(flow_policy):
    for name, tokens in (("tiny_sd3", 256), ("tiny_flux", 512)):
        policy = flow_policy(name, reads={})
        clip = policy.pipeline.tokenizer.model_max_length if name == "tiny_sd3" else 0
        assert policy.encode(["a cat"])["encoder_hidden_states"].shape[1] == clip + tokens


def test_offloaded_encoders_include_t5(flow_policy):
    policy = flow_policy("tiny_sd3", offload_text_encoders=True)
    assert policy.pipeline.text_encoder_3 in policy._offloaded
    assert len(policy._offloaded) == 3


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", *MODELS])
def test_a_network_names_its_family(name, model_path):
    pipeline = load_pipeline(model_path(name))
    family = SHIPPED[type(pipeline).__name__]
    network = getattr(pipeline, family.network)
    assert family_of_network(network.config) is family
    assert family_of_network({k: v for k, v in network.config.items() if not k.startswith("_")}) is family
    assert type(family_of(pipeline)) is type(family)
    assert type(network).__name__ == family.network_class


REFUSED = {
    "schnell has no guidance": (
        "tiny_schnell",
        {"guidance_scale": 3.5},
        "guidance_scale=3.5 has no effect .*set it to 1",
    ),
    "no negative prompt for FLUX": (
        "tiny_flux",
        {"negative_prompt": "blurry"},
        "negative_prompt has no effect on FLUX",
    ),
    "xformers": ("tiny_sd3", {"attention": "xformers"}, "attention=xformers is for UNets.*set attention=sdpa"),
    "channels last": ("tiny_flux", {"channels_last": True}, "channels_last is for convolutions"),
    "FLUX without T5": ("tiny_flux", {"t5": False}, "t5=false is for Stable Diffusion 3"),
    "a UNet without T5": ("tiny_sd", {"t5": False}, "t5=false is for Stable Diffusion 3: leave it out"),
    "no tokens": ("tiny_sd3", {"max_sequence_length": 0}, "max_sequence_length=0 must lie between 1 and 512"),
    "many tokens": ("tiny_flux", {"max_sequence_length": 513}, "max_sequence_length=513 must lie between 1 and 512"),
    "a UNet's T5": ("tiny_sdxl", {"max_sequence_length": 77}, "max_sequence_length=77 is for models .* T5"),
}


@pytest.mark.parametrize(("name", "settings", "sentence"), REFUSED.values(), ids=REFUSED)
def test_settings_of_other_families_are_refused_before_anything_is_loaded(name, settings, sentence, model_path):
    with pytest.raises(ConfigError, match=sentence):
        check_folder(model_path(name), settings=settings)
    with pytest.raises(ConfigError, match=sentence):
        load_pipeline(model_path(name), settings=settings)


def test_sizes_of_the_positions_that_a_model_knows(model_path):
    check_folder(model_path("tiny_sd3"), height=48, width=16)
    with pytest.raises(ConfigError, match="height=56 is too large: this model knows images of up to 48 pixels"):
        check_folder(model_path("tiny_sd3"), height=56, width=16)
    with pytest.raises(ConfigError, match=r"width=20 must be a multiple of 8 .*set 16 or 24"):
        check_folder(model_path("tiny_flux"), height=16, width=20)
    family, published = SHIPPED["FluxPipeline"], {"in_channels": 64}
    assert family.latent_size(published, {"block_out_channels": [1] * 4}) == (128, 128)
    assert family.latent_shape(published) == (16, 128, 128)
    with pytest.raises(ConfigError, match="height=1000 must be a multiple of 16"):
        family.latent_size(published, {"block_out_channels": [1] * 4}, height=1000)


BAD_SCHEDULERS = {
    "shift=0": "shift=0 must be a number above 0",
    "max_shift=a": "max_shift='a' must be a number above 0",
    "base_image_seq_len=4096": "base_image_seq_len=4096 must be a whole number, and max_image_seq_len=4096 a larger",
    "shift_terminal=1": "shift_terminal=1 must be null, or a number from 0 to below 1",
    "num_train_timesteps=0": "num_train_timesteps=0 must be a whole number",
}


@pytest.mark.parametrize("change", BAD_SCHEDULERS)
def test_a_schedulers_configuration_is_looked_at_before_weights_are_read(change, model_path, tmp_path):
    import shutil

    import yaml

    shutil.copytree(model_path("tiny_flux"), tmp_path / "flux")
    file, (key, _, value) = tmp_path / "flux/scheduler/scheduler_config.json", change.partition("=")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: yaml.safe_load(value)}))
    with pytest.raises(UserError, match=BAD_SCHEDULERS[change]):
        load_pipeline(str(tmp_path / "flux"))


def test_the_adapters_file_names_the_transformer(flow_policy, tmp_path):
    flow_policy("tiny_flux", lora=ALL_LAYERS).save_lora(tmp_path)
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        assert all(name.startswith("transformer.") for name in file.keys())  # noqa: SIM118
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.r"] == 4
