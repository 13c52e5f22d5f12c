"""Runs of Stable Diffusion 3 and FLUX.1 through the command line: resumed, loaded again, merged, sampled from."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.sampler_settings import SamplerConfig
from diffusion_align.errors import ConfigError, UserError
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.scoring import as_batch
from tests.helpers.flow_models import SIDE
from tests.helpers.tiny_runs import IMAGE_RUN

MODELS = ["tiny_sd3", "tiny_flux", "tiny_schnell"]
LORA = "final/pytorch_lora_weights.safetensors"


@pytest.fixture
def settings(model_path, tmp_path):
    """``settings(name, **changes)`` of a run of two epochs."""

    def made(name, **changes):
        sampler = {"steps": 3, "guidance_scale": 1.0 if name == "tiny_schnell" else 3.0}
        own = {"model": model_path(name), "resolution": SIDE, "max_sequence_length": 20, "sampler": sampler}
        more = {"epochs": 2, "learning_rate": 0.1, "output_dir": str(tmp_path / "run")}
        return IMAGE_RUN | own | more | changes

    return made


@pytest.fixture
def train(call_cli, tmp_path):
    """``train(settings, *overrides)`` by the command line, which has to succeed."""

    def run(settings, *overrides):
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
        status, _, errors = call_cli("train", tmp_path / "tiny.yaml", *overrides)
        assert status == 0, errors

    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_run_resumes_bit_for_bit_and_its_result_is_read_back(name, settings, train, call_cli, tmp_path):
    train(settings(name))
    moved = f"output_dir={tmp_path / 'resumed'}"
    train(settings(name), moved, "epochs=1")
    train(settings(name), moved, "resume=true")
    once, twice = (load_file(tmp_path / run / LORA) for run in ("run", "resumed"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert any(value.abs().max() > 0.01 for key, value in once.items() if "lora_B" in key)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["ratio/mean"] == 1.0 for row in rows if "ratio/mean" in row), "first pass over each sample"

    aligned = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu")
    plain = ImageAlignmentPipeline.from_pretrained(settings(name)["model"], device="cpu", max_sequence_length=20)
    plain.sampler, plain.height, plain.width = aligned.sampler, aligned.height, aligned.width
    images = [as_batch(pipe("red apple", eta=0).images) for pipe in (aligned, plain)]
    assert (images[0] - images[1]).abs().max() > 0.01
    lines = (tmp_path / "run/final/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(compile(lines, "README.md", "exec"), (names := {}))
    assert names["image"].size == (SIDE, SIDE)
    status, _, errors = call_cli("sample", tmp_path / "run", "--prompt", "red apple", "--output", tmp_path / "images")
    assert status == 0, errors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", [{"eta": 1.0}, {"eta": 0.0}, {"name": "flow_sde"}])
def test_the_pipelines_call_takes_the_steps_that_were_trained(name, sampler, model_path):
    """Stochastic samplers' too, with the noise of a rollout; FLUX's latents are packed in the call."""
    scale = 1.0 if name == "tiny_schnell" else 3.0
    pipe = ImageAlignmentPipeline.from_pretrained(model_path(name), device="cpu", max_sequence_length=20)
    pipe.sampler = SamplerConfig(steps=3, guidance_scale=scale, **sampler)
    sampled = as_batch(pipe(["red apple", "a cat"], seed=7, height=16, width=24).images)
    policy = DenoisingPolicy(pipe.pipeline, lora=None, guidance_scale=scale, height=16, width=24)
    schedule = pipe.sampler.schedule(pipe.pipeline.scheduler, policy.timesteps_setter()).to("cpu")
    noise = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    path = rollout(policy, schedule, policy.encode(["red apple", "a cat"]), noise)
    wanted = (255 * policy.decode(path.latents)).round().to(torch.uint8)
    torch.testing.assert_close(sampled, wanted.float() / 255, atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_all_of_the_network_can_be_trained(name, settings, train, tmp_path):
    from diffusers import DiffusionPipeline

    train(settings(name, lora=None, epochs=1, learning_rate=0.001, kl_coef=0.1))
    again = DiffusionPipeline.from_pretrained(tmp_path / "run/final").transformer.state_dict()
    before = load_file(f"{settings(name)['model']}/transformer/diffusion_pytorch_model.safetensors")
    assert again.keys() == before.keys()
    assert any(not torch.equal(again[key], before[key]) for key in before)
    assert ImageAlignmentPipeline.from_pretrained(tmp_path / "run")("a cat").images[0].size == (SIDE, SIDE)


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_what_saves_memory(name, settings, train, tmp_path):
    """bfloat16 weights below a float32 adapter, checkpointed layers, text encoders in main memory."""
    narrow = {"dtype": "bfloat16", "mixed_precision": "bf16", "gradient_checkpointing": True, "epochs": 1}
    train(settings(name, **narrow, offload_text_encoders=True, vae_slicing=True))
    tensors = load_file(tmp_path / "run" / LORA)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in tensors.values())


def test_without_t5(settings, train, model_path, tmp_path):
    """Training, the result, its card and what is merged."""
    from diffusers import DiffusionPipeline

    none = {"text_encoder_3": None, "tokenizer_3": None}
    shutil.copytree(model_path("tiny_sd3"), tmp_path / "sd3")
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / "sd3" / part)
    train(settings("tiny_sd3", model=str(tmp_path / "sd3"), t5=False, epochs=1))
    aligned = ImageAlignmentPipeline.from_pretrained(tmp_path / "run")
    assert aligned.pipeline.text_encoder_3 is None
    lines = (tmp_path / "run/final/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "text_encoder_3=None, tokenizer_3=None" in lines
    exec(compile(lines, "README.md", "exec"), {})
    aligned.save_pretrained(tmp_path / "merged")
    assert (
        DiffusionPipeline.from_pretrained(tmp_path / "merged", **none).text_encoder_3 is None
    )  # asked for by diffusers
    again = ImageAlignmentPipeline.from_pretrained(tmp_path / "merged", device="cpu", max_sequence_length=20)
    assert again.pipeline.tokenizer_3 is None
    again.sampler, again.height, again.width = aligned.sampler, aligned.height, aligned.width
    images = [as_batch(pipe("red apple").images) for pipe in (aligned, again)]
    torch.testing.assert_close(*images, atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_preferences_train_it_too(name, settings, train, tmp_path):
    given = {key: value for key, value in settings(name).items() if key not in ("prompts", "reward")}
    pairs = {"source": "emoji_style", "max_pairs": 4}
    train(given | {"method": "diffusion_dpo", "beta": 0.1, "pairs": pairs, "epochs": 1})
    assert any(value.any() for key, value in load_file(tmp_path / "run" / LORA).items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("tiny_schnell", {"sampler": {"steps": 3, "guidance_scale": 3.5}}, "guidance_scale=3.5 has no effect"),
        ("tiny_flux", {"negative_prompt": "blurry"}, "negative_prompt has no effect on FLUX"),
        (
            "tiny_sd3",
            {"resolution": 64},
            "resolution=64 is too large|height=width=64 is too large|height=64 is too large",
        ),
        ("tiny_sd3", {"channels_last": True}, "channels_last is for convolutions"),
        ("tiny_sd3", {"lora": {"layers": "convolutions"}}, "not of this model, a transformer: use attention"),
    ],
)
def test_what_a_flow_model_cannot_do_is_said_before_anything_is_loaded(name, change, sentence, settings):
    with pytest.raises(ConfigError, match=sentence):
        check_config(settings(name, **change))


def test_a_call_says_what_its_model_does_not_take(model_path):
    pipe = ImageAlignmentPipeline.from_pretrained(model_path("tiny_schnell"), device="cpu", max_sequence_length=20)
    assert pipe.sampler.guidance_scale == 1
    with pytest.raises(UserError, match="guidance_scale=2 has no effect on this model"):
        pipe("a cat", guidance_scale=2, height=16, width=16)
    with pytest.raises(UserError, match="negative_prompt"):
        pipe("a cat", negative_prompt="a dog", height=16, width=16)
