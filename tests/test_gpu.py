"""What only a GPU can show. Run with -m gpu."""

import pytest
import torch

from diffusion_align.pipelines import ImageAlignmentPipeline


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_aligned_on_a_gpu_the_pipeline_draws_and_saves(precision, tmp_path):
    pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd")
    pipe.align(
        reward="aesthetic",
        prompts=["a lion", "a rocket"],
        output_dir=tmp_path / "run",
        mixed_precision=precision,
        epochs=2,
        samples_per_epoch=16,
        group_size=8,
        advantages="group",
        clip_range=0.01,
        sampler={"steps": 4, "guidance_scale": 2.0},
    )
    drawn = pipe(["a lion"], seed=1).images[0]
    pipe.save_pretrained(tmp_path / "merged")
    again = ImageAlignmentPipeline.from_pretrained(tmp_path / "merged")
    again.sampler = pipe.sampler
    pixels = [
        torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).float()
        for i in (drawn, again(["a lion"], seed=1).images[0])
    ]
    assert (pixels[0] - pixels[1]).abs().mean() < 2
