"""What is saved loads in plain diffusers and peft, and draws the same images."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.pipelines.image import ImageAlignmentPipeline

PROMPTS = ["red apple", "a cat"]
LORAS = {
    "attention": LoRAConfig(rank=4),
    "alpha": LoRAConfig(rank=4, alpha=10),
    "convolutions": LoRAConfig(rank=3, alpha=1, layers="attention+convolutions"),
    "feed-forward": LoRAConfig(rank=3, alpha=2, layers="attention+feed_forward"),
    "DoRA": LoRAConfig(rank=3, alpha=1, layers="attention+feed_forward+convolutions", dora=True),
}
MODELS = ["tiny_sd", "tiny_sd2", "tiny_sdxl"]
EACH = [
    *((MODELS[0], lora) for lora in LORAS),
    *((model, lora) for model in MODELS[1:] for lora in ("convolutions", "DoRA")),
]


def draw(policy, streams):
    schedule = build_schedule(policy.pipeline.scheduler, 3, eta=0.0).to("cpu")
    return policy.decode(rollout(policy, schedule, policy.encode(PROMPTS), streams(2)).latents)


def draw_plainly(pipeline, streams, scale=1.0):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config({"clip_sample": False, **pipeline.scheduler.config})
    options = {"num_inference_steps": 3, "guidance_scale": scale, "generator": streams(2), "output_type": "pt"}
    return pipeline(PROMPTS, **options).images


@pytest.mark.parametrize(("model", "lora"), EACH)
def test_lora_loads_in_plain_diffusers(model, lora, tmp_path, model_path, make_policy, streams):
    policy = make_policy(model, lora=LORAS[lora], noise=0.1, guidance_scale=3.0)
    policy.save_lora(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline = DiffusionPipeline.from_pretrained(model_path(model))
    untrained = draw_plainly(pipeline, streams, 3.0)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    theirs = draw_plainly(pipeline, streams, 3.0)
    torch.testing.assert_close(draw(policy, streams), theirs, atol=1e-4, rtol=0)
    assert (theirs - untrained).abs().max() > 0.01


@pytest.mark.parametrize(("model", "lora"), [*((model, "convolutions") for model in MODELS), (MODELS[0], "DoRA")])
def test_a_loaded_lora_is_trained_further(model, lora, tmp_path, model_path, make_policy, streams):
    policy = make_policy(model, lora=LORAS[lora], noise=0.1)
    policy.save_lora(tmp_path)
    again = ImageAlignmentPipeline.from_pretrained(model_path(model), lora=tmp_path, device="cpu")
    going_on = DenoisingPolicy(again.pipeline, lora=LORAS[lora])
    assert set(going_on.trainable) == set(policy.trainable)
    for name, parameter in going_on.trainable.items():
        torch.testing.assert_close(parameter, policy.trainable[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(draw(going_on, streams), draw(policy, streams), atol=1e-5, rtol=0)
    assert {p.dtype for p in going_on.trainable.values()} == {torch.float32}
    with going_on.reference(), policy.reference():
        torch.testing.assert_close(draw(going_on, streams), draw(policy, streams), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model", "lora"), EACH)
def test_merged_pipeline_loads_in_plain_diffusers(model, lora, tmp_path, model_path, make_policy, streams):
    policy = make_policy(model, lora=LORAS[lora], noise=0.1, guidance_scale=3.0)
    before = draw(policy, streams)
    ImageAlignmentPipeline(policy.pipeline, model=model).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert not getattr(pipeline.unet, "peft_config", None)
    plain = DiffusionPipeline.from_pretrained(model_path(model))
    assert set(pipeline.unet.state_dict()) == set(plain.unet.state_dict())
    assert type(pipeline.scheduler) is type(plain.scheduler)
    torch.testing.assert_close(draw_plainly(pipeline, streams, 3.0), before, atol=1e-4, rtol=0)
    assert torch.equal(draw(policy, streams), before)  # saving has not touched the live pipeline
    with policy.reference():
        untrained = draw(policy, streams)
    assert (untrained - before).abs().max() > 0.01
    torch.testing.assert_close(draw_plainly(plain, streams, 3.0), untrained, atol=1e-4, rtol=0)


def test_images_of_the_pipeline_are_those_of_the_policy(make_policy, streams):
    policy = make_policy("tiny_sd", noise=0.1, guidance_scale=3.0)
    pipe = ImageAlignmentPipeline(policy.pipeline, model="tiny")
    scheduler = pipe.pipeline.scheduler
    saved = pipe(PROMPTS, seed=0, steps=3, guidance_scale=3.0).images
    assert pipe.pipeline.scheduler is scheduler
    for image, ours in zip(saved, draw(policy, streams), strict=True):
        pixels = torch.tensor(list(image.convert("RGB").tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
        torch.testing.assert_close(pixels, ours, atol=1.01 / 255, rtol=0)
