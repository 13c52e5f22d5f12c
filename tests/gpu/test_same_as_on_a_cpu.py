"""A GPU gets the noise of a CPU, samples its images and trains weights that a CPU loads; run with -m gpu."""

import numpy as np
import pytest
import torch

from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.pipelines import ImageAlignmentPipeline

pytestmark = pytest.mark.gpu
SHORT = {
    "reward": "jpeg_compressibility",
    "prompts": ["a lion", "a rocket"],
    "epochs": 1,
    "samples_per_epoch": 8,
    "sample_batch_size": 4,
    "micro_batch_size": 4,
    "grid_every": 0,
    "sampler": {"steps": 3, "guidance_scale": 2.0},
    "timestep_range": (0.0, 1.0),
}


def levels(images):
    """Of 256, as float32."""
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


def _path(folder, device, streams):
    """A rollout of a network that predicts no noise at all: what is left is what was sampled."""
    policy = DenoisingPolicy(load_pipeline(folder), lora=None, needs_reference=False, device=device)
    policy.predict = lambda x_t, *arguments, **options: torch.zeros_like(x_t)
    schedule = build_schedule(policy.pipeline.scheduler, 3, sampler="ddim", eta=1.0).to(device)
    return rollout(policy, schedule, policy.encode(["a cat", "a tree"]), streams(2))


def test_noise_is_that_of_the_cpu(device, tiny_sd, streams):
    here, there = (_path(str(tiny_sd), torch.device(kind), streams) for kind in ("cpu", device.type))
    assert there.x_t.device.type == device.type
    assert torch.equal(there.x_t[:, 0].cpu(), here.x_t[:, 0])  # drawn
    torch.testing.assert_close(there.x_s.cpu(), here.x_s, rtol=1e-5, atol=1e-5)  # and added in each step


def test_images_of_a_seed_are_those_of_the_cpu(device):
    here, there = (
        levels(ImageAlignmentPipeline.from_pretrained("emoji-sd", device=kind)(["a lion", "a pizza"], seed=3).images)
        for kind in ("cpu", device)
    )
    assert here.std() > 20  # no flat images
    assert np.abs(here - there).mean() < 2


def test_lora_that_was_trained_here_loads_on_a_cpu(device, tmp_path):
    pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd", device=device)
    pipe.align(output_dir=tmp_path / "run", **SHORT)
    pipe.save_lora(tmp_path / "lora")
    again = ImageAlignmentPipeline.from_pretrained("emoji-sd", lora=tmp_path / "lora", device="cpu")
    again.sampler = pipe.sampler
    here, there = (levels(one(["a lion"], seed=1).images) for one in (again, pipe))
    assert np.abs(here - there).mean() < 2


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("model", ["emoji-sd", "emoji-flow"])
def test_the_ratio_is_1_before_any_update_in_bfloat16(device, tmp_path, model, channels_last):
    if model == "emoji-flow" and channels_last:
        pytest.skip("a transformer has no convolutions to reorder")
    pipe = ImageAlignmentPipeline.from_pretrained(model, device=device, dtype="bfloat16")
    pipe.align(output_dir=tmp_path / "run", mixed_precision="bf16", channels_last=channels_last, **SHORT)
    [deviation] = [row["ratio/first_pass_deviation"] for row in pipe.metrics if "ratio/first_pass_deviation" in row]
    assert deviation == 0
