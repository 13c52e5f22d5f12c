"""Models built as the published ones are, in every form they are shared in: loaded, trained, saved, loaded again.

Plain diffusers and this package have to draw what the trained policy drew, from what a run leaves behind.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from diffusion_align.pipelines.configuration import check_config, read_config
from diffusion_align.pipelines.image import ImageAlignmentPipeline
from diffusion_align.pipelines.run import run
from diffusion_align.pretrained import load_in_dtype
from diffusion_align.report import read_metrics
from tests.helpers.tiny_runs import TINY

HEAD = Path(__file__).resolve().parents[3] / "shared/data/aesthetic/sac+logos+ava1-l14-linearMSE.pth"
PROMPTS = ["a red apple", "a cat"]
FORMS = {  # what is loaded -> settings that say so
    "folder": {},
    "fp16": {"weights_variant": "fp16", "dtype": "float16"},
    "bf16": {"dtype": "bfloat16", "mixed_precision": "auto"},
    "file": {},
}
SETTINGS = TINY | {
    "method": "ddpo",
    "reward": "jpeg_compressibility",
    "prompts": PROMPTS,
    "show_prompts": PROMPTS[:1],
    "learning_rate": 0.3,
    "sampler": {"steps": 2, "guidance_scale": 3.0},
}


def settings_of(name, form, published):
    model = {"model": str(published(name, form))}
    return model | ({"base_config": str(published(name))} if form == "file" else {}) | FORMS[form]


def plainly(name, form, published):
    """What people write who have never heard of this package."""
    dtype = getattr(torch, FORMS[form].get("dtype", "float32"))
    if form == "file":
        kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
        source, config = str(published(name, form)), str(published(name))
        return load_in_dtype(kind.from_single_file, source, config=config, dtype=dtype)
    variant = FORMS[form].get("weights_variant")
    return load_in_dtype(DiffusionPipeline.from_pretrained, published(name, form), dtype=dtype, variant=variant)


def draw_plainly(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config({"clip_sample": False, **pipeline.scheduler.config})
    streams = [torch.Generator().manual_seed(i) for i in range(2)]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "eta": 1.0, "generator": streams}
    return pixels(pipeline(PROMPTS, **options).images)


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])


def draw(pipe):
    """The images of an ImageAlignmentPipeline in their 8 bits."""
    return pixels(pipe(PROMPTS, seed=0, steps=2, guidance_scale=3.0, eta=1.0).images)


@pytest.mark.parametrize(
    ("name", "form"),
    [("sd15", "fp16"), ("sd15", "file"), ("sd2", "folder"), ("sd2", "file")]
    + [("sdxl", form) for form in ("folder", "bf16", "file")],  # and "fp16" by Diffusion-DPO
)
def test_ddpo_trains_saves_and_what_is_saved_draws_the_same(name, form, published, tmp_path):
    settings = settings_of(name, form, published)
    config = check_config(SETTINGS | settings | {"output_dir": tmp_path / "run"})
    trainer = run(config)
    policy, dtype = trainer.policy, getattr(torch, trainer.config.dtype)
    assert policy.network.dtype == policy.pipeline.text_encoder.dtype == dtype
    assert policy.pipeline.vae.dtype == torch.float32
    assert {parameter.dtype for parameter in policy.trainable.values()} == {torch.float32}
    assert trainer.schedule.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")
    row = next(row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row)
    assert row["ratio/first_pass_deviation"] == 0
    assert row["grad_norm"] > 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {key: saved[key] for key in ("model", "base_config", "weights_variant", "dtype")} == {
        "base_config": None,
        "weights_variant": None,
        "dtype": "float32",
    } | {key: value for key, value in settings.items() if key != "mixed_precision"}

    trained = draw(ImageAlignmentPipeline(policy.pipeline, model="trained", sampler=config.sampler))
    plain = plainly(name, form, published)
    change = abs(draw_plainly(plain) - trained).mean()
    plain.load_lora_weights(tmp_path / "run" / "final", weight_name="pytorch_lora_weights.safetensors")
    again = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", dtype=dtype, device="cpu")
    assert again.pipeline.scheduler.config.prediction_type == trainer.schedule.prediction_type
    for images in (draw(again), draw_plainly(plain)):
        if dtype == torch.float32:
            assert abs(images - trained).max() <= 1  # of 255 levels
        else:  # diffusers rounds adapters to the dtype of the UNet, and attention sums in another order
            assert abs(images - trained).mean() < 0.2 * change
    assert change > 3


def test_the_whole_unet_of_a_file_is_trained_and_saved_as_a_folder(published, tmp_path):
    settings = SETTINGS | settings_of("sd2", "file", published) | {"lora": None, "learning_rate": 0.01}
    settings |= {"stop_when": {"kl_above": math.inf}}  # which keeps a reference
    trainer = run(check_config(settings | {"output_dir": tmp_path / "run"}))
    trained = draw(ImageAlignmentPipeline(trainer.policy.pipeline, model="trained"))
    with trainer.policy.reference():
        assert abs(draw(ImageAlignmentPipeline(trainer.policy.pipeline, model="untrained")) - trained).mean() > 3
    plain = DiffusionPipeline.from_pretrained(tmp_path / "run" / "final")
    assert plain.scheduler.config.prediction_type == "v_prediction"
    again = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu")
    for images in (draw(again), draw_plainly(plain)):
        assert abs(images - trained).max() <= 1


@pytest.mark.parametrize("form", ["folder", "fp16"])
def test_diffusion_dpo_takes_a_step_on_xl(form, published, tmp_path):
    noise = np.random.default_rng(0)
    for place in ("chosen", "rejected"):
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{place}.png")
    row = {"prompt": PROMPTS[0], "chosen": "chosen.png", "rejected": "rejected.png"}
    (tmp_path / "pairs.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    settings = {key: value for key, value in SETTINGS.items() if key not in ("reward", "prompts")}
    settings |= {"method": "diffusion_dpo", "pairs": str(tmp_path / "pairs.jsonl"), "beta_dpo": 5000}
    settings |= settings_of("sdxl", form, published) | {"epochs": 2, "learning_rate": 0.01}
    trainer = run(check_config(settings | {"output_dir": tmp_path / "run"}))
    first, second = (row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)  # the policy is its reference
    assert first["rewards/accuracies"] == 0.5
    assert first["grad_norm"] > 0
    assert second["loss"] != first["loss"]
    again = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu")
    layers = {name: p for name, p in again.pipeline.unet.named_parameters() if ".lora_" in name}
    assert layers.keys() == trainer.policy.trainable.keys()
    assert all(torch.equal(layers[name], p) for name, p in trainer.policy.trainable.items())


@pytest.mark.skipif(not HEAD.is_file(), reason="the published head is not in ../shared/data/aesthetic")
def test_the_shipped_recipe_with_the_published_aesthetic_head(published, clip_768, tmp_path):
    reward = f"{{name: aesthetic, variant: v2, head: {HEAD}, clip: {clip_768}}}"
    sizes = ["epochs=2", "samples_per_epoch=8", "sampler.steps=2", "history_min_count=2", "num_threads=1"]
    overrides = [f"model={published('sd15')}", f"reward={reward}", "show_prompts=[a cat, a dog]", *sizes]
    run(read_config("ddpo_sd15_aesthetic", [f"output_dir={tmp_path / 'run'}", *overrides]))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    updates = [row for row in rows if "loss" in row]
    assert len(updates) == 4
    assert updates[0]["ratio/first_pass_deviation"] == 0
    assert all(row["grad_norm"] > 0 for row in updates)
    scores = [row["reward"] for row in rows if "reward" in row]
    assert len(scores) == 2
    assert all(-10 < score < 20 for score in scores)  # real images lie between 1.66 and 5.75, noise may not
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["mixed_precision"], saved["prompts"], saved["lora"]["rank"]) == ("bf16", "animals", 16)
    assert "aesthetic" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "samples" / "before_after.png").is_file()
    plain = DiffusionPipeline.from_pretrained(published("sd15"))
    before = draw_plainly(plain)
    plain.load_lora_weights(tmp_path / "run" / "final", weight_name="pytorch_lora_weights.safetensors")
    assert abs(draw_plainly(plain) - before).max() > 0
