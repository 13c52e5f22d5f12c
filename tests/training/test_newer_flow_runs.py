"""Runs of Z-Image through the command line: loaded again, sampled from as it was trained, by diffusers alone too."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.sampler_settings import SamplerConfig
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.pipelines.scoring import as_batch
from tests.helpers.flow_models import SIDE
from tests.helpers.tiny_runs import IMAGE_RUN

MODELS = ["tiny_z_image"]
CALLED_WITH = {"tiny_z_image": 2.0}
"""What diffusers calls a guidance of 3."""
READS = {"max_sequence_length": 40}


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_loaded_again_and_sampled_from(name, model_path, call_cli, tmp_path):
    """By its card's lines too, which name the guidance as the pipeline's own call counts it."""
    sampler = {"steps": 3, "guidance_scale": 3.0}
    settings = IMAGE_RUN | {"model": model_path(name), "resolution": SIDE, "sampler": sampler, **READS}
    settings |= {"learning_rate": 0.01, "output_dir": str(tmp_path / "run")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    status, _, errors = call_cli("train", tmp_path / "tiny.yaml")
    assert status == 0, errors
    adapter = load_file(tmp_path / "run/final/pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0.001 for key, value in adapter.items() if "lora_B" in key)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert next(row["ratio/mean"] for row in rows if "ratio/mean" in row) == 1.0

    aligned = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu")
    plain = ImageAlignmentPipeline.from_pretrained(settings["model"], device="cpu", **READS)
    plain.sampler, plain.height, plain.width = aligned.sampler, aligned.height, aligned.width
    images = [as_batch(pipe("red apple", eta=0).images) for pipe in (aligned, plain)]
    assert (images[0] - images[1]).abs().max() > 0.01
    lines = (tmp_path / "run/final/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(compile(lines, "README.md", "exec"), (names := {}))
    assert names["image"].size == (SIDE, SIDE)
    assert f"guidance_scale={CALLED_WITH[name]}, " in lines
    status, _, errors = call_cli("sample", tmp_path / "run", "--prompt", "red apple", "--output", tmp_path / "images")
    assert status == 0, errors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", [{"eta": 1.0}, {"eta": 0.0}, {"name": "flow_sde"}])
def test_the_pipelines_call_takes_the_steps_that_were_trained(name, sampler, model_path):
    pipe = ImageAlignmentPipeline.from_pretrained(model_path(name), device="cpu", **READS)
    pipe.sampler = SamplerConfig(steps=3, guidance_scale=3.0, **sampler)
    sampled = as_batch(pipe(["red apple", "a cat"], seed=7, height=16, width=24).images)
    policy = DenoisingPolicy(pipe.pipeline, lora=None, guidance_scale=3.0, height=16, width=24)
    schedule = pipe.sampler.schedule(pipe.pipeline.scheduler, policy.timesteps_setter()).to("cpu")
    noise = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    path = rollout(policy, schedule, policy.encode(["red apple", "a cat"]), noise)
    wanted = (255 * policy.decode(path.latents)).round().to(torch.uint8)
    torch.testing.assert_close(sampled, wanted.float() / 255, atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_doctor_knows_what_it_costs(name, model_path, call_cli, tmp_path):
    settings = IMAGE_RUN | {"model": model_path(name), "resolution": SIDE, **READS}
    settings["sampler"] = {"steps": 3, "guidance_scale": 3.0}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    status, printed, errors = call_cli("doctor", tmp_path / "tiny.yaml")
    assert status == 0, errors
    assert "as many in the files as the configurations describe" in printed
    assert "per image and 40 per prompt" in printed
