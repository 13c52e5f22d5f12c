"""Loading: what works, and one sentence for everything that does not."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
from diffusion_align.diffusion.rollout import replay, rollout
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.errors import ConfigError, UserError, problems_of
from diffusion_align.models.image_pipelines import check_pipeline_name, load_pipeline, save_pipeline
from diffusion_align.pipelines.configuration import check_config
from tests.helpers.tiny_runs import edit_json

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def cut(path):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:-100])


def write(path, text):
    return lambda folder: (folder / path).write_text(text)


def remove(path):
    def change(folder):
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return change


DAMAGE = {
    "unet-cut": (cut(UNET), "could not be loaded"),
    "text-encoder-empty": (write(TEXT, ""), "could not be loaded"),
    "vae-weights-absent": (remove("vae/diffusion_pytorch_model.safetensors"), "no file named diffusion_pytorch_model"),
    "unet-absent": (remove("unet"), "no unet/"),
    "tokenizer-garbage": (write("tokenizer/tokenizer.json", "{"), "could not be loaded"),
    "scheduler-garbage": (write("scheduler/scheduler_config.json", "nope"), "not a valid JSON"),
    "index-absent": (remove("model_index.json"), "the folder has no model_index.json"),
    "index-list": (write("model_index.json", "[1]"), "not supported"),
    "another-class": (
        edit_json("model_index.json", _class_name="KandinskyPipeline"),
        "KandinskyPipeline, which is not",
    ),
    "another-width": (edit_json("unet/config.json", block_out_channels=[8, 24]), "expected shape"),
    "another-text-width": (edit_json("text_encoder/config.json", hidden_size=24), "could not be loaded"),
    "unknown-part": (edit_json("model_index.json", unet=["diffusers", "NoSuchModel"]), "NoSuchModel"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_gives_one_sentence(damage, tiny_sd, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    change, expected = DAMAGE[damage]
    if damage == "tokenizer-garbage" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 reads the tokenizer's other files")
    change(folder)
    [said] = problems_of(load_pipeline, str(folder))
    assert said.startswith(f"model={str(folder)!r}")
    assert expected in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("emoji_sd", "did you mean 'emoji-sd'"),
        ("emoji-clip", "not a text-to-image pipeline"),
        ("./nothing/here", "neither an embedded model, nor a folder"),
        ("/nothing/here", "neither an embedded model, nor a folder"),
        ("~no_such_user_here/model", "no user of that name"),
        ("a/b/c", "neither an embedded model, nor a folder"),
        ("x" * 300, "File name too long"),
        ("", "is empty"),
    ],
)
def test_a_name_that_is_nothing_gives_one_sentence_without_loading(model, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for read in (check_pipeline_name, load_pipeline):
        with pytest.raises(UserError, match=expected):
            read(model)


def test_a_hub_name_out_of_reach_gives_one_sentence():
    check_pipeline_name("nobody-at-all/no-such-model")  # only asking can tell
    with pytest.raises(UserError, match=r"^model='nobody-at-all/no-such-model' could not be loaded: .* the Hub"):
        load_pipeline("nobody-at-all/no-such-model")


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("tiny_sd", "StableDiffusionPipeline"),
        ("tiny_sd2", "StableDiffusionPipeline"),
        ("tiny_sdxl", "StableDiffusionXLPipeline"),
        ("emoji-sd", "StableDiffusionPipeline"),
    ],
)
def test_supported_pipelines_load(model, family, model_path):
    check_pipeline_name(model_path(model))
    pipeline = load_pipeline(model_path(model))
    assert type(pipeline).__name__ == family
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert getattr(pipeline, "safety_checker", None) is None
    assert getattr(pipeline, "watermark", None) is None


def test_a_folder_below_home_is_found(tiny_sd, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_sd.parent))
    check_pipeline_name("~/sd")
    assert load_pipeline("~/sd").unet.config.sample_size == 8


def test_a_folder_that_names_a_safety_checker_it_does_not_hold_loads(tiny_sd, tmp_path):
    """People delete it; it is not used here."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    edit_json("model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])(folder)
    assert load_pipeline(str(folder)).safety_checker is None


def renamed(folder, changes):
    """``folder`` with weight files under other names: pattern of the part -> replacement of ``.safetensors``."""
    for part, ending in changes.items():
        for path in list(folder.glob(f"{part}/*.safetensors")):
            path.rename(path.with_name(path.name.replace(".safetensors", ending)))
    return folder


@pytest.mark.parametrize(
    ("endings", "variant", "expected"),
    [
        ({}, "fp16", "leave it out$"),
        ({"*": ".fp16.safetensors"}, "bf16", "use one of fp16$"),
        ({"*": ".fp16.safetensors"}, "fp", "use one of fp16$"),
        ({"*": ".fp16.safetensors"}, None, "use one of fp16$"),
        ({"unet": ".fp16.safetensors", "vae": ".ema.safetensors"}, "fp16", "vae/ .* use one of ema$"),
        ({"*": ".fp16-00001-of-00002.safetensors"}, None, "use one of fp16$"),
    ],
)
def test_a_missing_variant_gives_one_sentence_without_loading(endings, variant, expected, tiny_sd, tmp_path):
    folder = renamed(shutil.copytree(tiny_sd, tmp_path / "model"), endings)
    for read in (check_pipeline_name, load_pipeline):
        with pytest.raises(UserError, match=f"weights_variant={variant!r}: .*{expected}") as caught:
            read(str(folder), variant=variant)
        assert "\n" not in str(caught.value)


def test_folders_that_are_not_used_need_no_weights_of_the_variant(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.fp16.safetensors").write_bytes(b"")
    check_pipeline_name(str(folder))


def test_a_variant_is_chosen_part_by_part(tiny_sd, tmp_path):
    """Of a part that has none its usual weights are read."""
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    weights = load_file(folder / UNET)
    save_file({name: 2 * value for name, value in weights.items()}, (folder / UNET).with_suffix(".double.safetensors"))
    plain, double = load_pipeline(str(folder)), load_pipeline(str(folder), variant="double")
    assert torch.equal(double.unet.conv_in.weight, 2 * plain.unet.conv_in.weight)
    assert torch.equal(double.vae.decoder.conv_in.weight, plain.vae.decoder.conv_in.weight)


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_a_vae_that_overflows_in_half_precision_stays_wide(dtype, model, model_path):
    pipeline, wide = load_pipeline(model_path(model), dtype=dtype), load_pipeline(model_path(model))
    assert pipeline.unet.dtype == dtype
    weights = wide.vae.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.vae.state_dict().items())
    # diffusers' pipelines hand it latents in the dtype of the UNet
    latents, pixels = torch.randn(1, 4, 8, 8).to(dtype), torch.rand(1, 3, 16, 16).to(dtype)
    with torch.no_grad():
        assert torch.equal(pipeline.vae.decode(latents).sample, wide.vae.decode(latents.float()).sample)
        assert torch.equal(
            pipeline.vae.encode(pixels).latent_dist.mode(), wide.vae.encode(pixels.float()).latent_dist.mode()
        )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=2, output_type="pt").images.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_a_vae_that_needs_no_float32_is_as_narrow_as_the_rest(dtype, tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    edit_json("vae/config.json", force_upcast=False)(folder)
    assert load_pipeline(str(folder), dtype=dtype).vae.dtype == dtype
    upcast = load_pipeline(str(folder), dtype=dtype, upcast_vae=True)
    wide = load_pipeline(str(folder)).vae.state_dict()
    assert all(torch.equal(value, wide[name]) for name, value in upcast.vae.state_dict().items())  # never rounded
    assert upcast.unet.dtype == dtype
    assert upcast.vae.decode(torch.randn(1, 4, 8, 8).to(dtype)).sample.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_a_vae_that_needs_float32_can_be_narrow_all_the_same(dtype, tiny_sdxl):
    assert load_pipeline(str(tiny_sdxl), dtype=dtype).vae.dtype == torch.float32
    assert load_pipeline(str(tiny_sdxl), dtype=dtype, upcast_vae=False).vae.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, True), (torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2", "tiny_sdxl"])
def test_only_frozen_weights_are_narrow_and_the_first_ratio_is_one(model, dtype, autocast, model_path, streams):
    policy = DenoisingPolicy(
        load_pipeline(model_path(model), dtype=dtype),
        lora=LoRAConfig(rank=2, layers="attention+convolutions"),
        guidance_scale=3.0,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    )
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trained = {id(parameter) for parameter in policy.trainable.values()}
    assert {p.dtype for p in policy.network.parameters() if id(p) in trained} == {torch.float32}
    assert {p.dtype for p in policy.network.parameters() if id(p) not in trained} == {dtype}
    schedule = build_schedule(policy.pipeline.scheduler, 3, eta=1.0)
    conditioning = policy.encode(["a red apple", "a cat"])
    path = rollout(policy, schedule, conditioning, streams(2))
    second = (path.x_t[:, 1], path.x_s[:, 1], path.steps[:, 1], conditioning)
    logp, now = replay(policy, schedule, *second)
    assert torch.equal(logp, path.logp_old[:, 1])
    assert torch.finfo(path.x_t.dtype).bits >= 32
    assert torch.finfo(logp.dtype).bits >= 32
    logp.sum().backward()
    assert {p.grad.dtype for p in policy.trainable.values()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in policy.trainable.values())
    assert sum(p.grad.norm() for p in policy.trainable.values()) > 0
    with policy.reference(), torch.no_grad():
        assert not torch.equal(replay(policy, schedule, *second)[1].mean, now.mean)
    assert policy.decode(path.latents).dtype == torch.float32


def test_the_reference_of_a_whole_unet_is_as_wide_as_what_is_trained(tiny_sd):
    policy = DenoisingPolicy(load_pipeline(str(tiny_sd), dtype=torch.bfloat16), lora=None)
    latents = torch.randn(1, 4, 8, 8)
    prediction = [policy.predict(latents, torch.tensor([500]), policy.encode(["a cat"]))]
    with policy.reference():
        prediction.append(policy.predict(latents, torch.tensor([500]), policy.encode(["a cat"])))
    assert torch.equal(*prediction)
    assert {p.dtype for p in policy.trainable.values()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_what_a_cpu_cannot_mix_is_refused_before_loading(precision, tiny_sd, tmp_path):
    settings = {"model": str(tiny_sd), "prompts": ["a"], "reward": "jpeg_compressibility", "output_dir": tmp_path / "a"}
    check_config(settings | {"dtype": "float16"})
    with pytest.raises(ConfigError, match=f"^dtype=float16 with mixed_precision={precision} needs a GPU"):
        check_config(settings | {"dtype": "float16", "mixed_precision": precision})


def test_a_pipeline_that_is_written_and_read_back_is_sampled_at_the_same_timesteps(tiny_sd, tmp_path):
    """Euler's spacing is another than DDIM's; a default of its class is none of the model."""
    from diffusers import EulerDiscreteScheduler

    pipeline = load_pipeline(str(tiny_sd))
    pipeline.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012)
    save_pipeline(pipeline, tmp_path / "written")
    again = load_pipeline(str(tmp_path / "written"))
    assert again.scheduler.config.timestep_spacing == "linspace"
    steps = [build_schedule(one.scheduler, 5, eta=1.0).table.timestep.tolist() for one in (pipeline, again)]
    assert steps[0] == steps[1]
