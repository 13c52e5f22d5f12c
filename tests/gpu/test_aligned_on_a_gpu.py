"""Every method, and both kinds of model, aligned on a GPU in every precision. Run with -m gpu."""

import pytest
import torch

from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


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


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["grpo", "ppo", "dpo", "kto"])
def test_aligned_on_a_gpu_the_pipeline_writes_and_saves(method, precision, tmp_path):
    pipe = TextAlignmentPipeline.from_pretrained("tiny-lm")
    pipe.align(
        method=method,
        reward={"name": "length", "target": 5},
        prompts=["And he said", "In the morning"],
        output_dir=tmp_path / "run",
        mixed_precision=precision,
        epochs=2,
        samples_per_epoch=16,
        num_generations=4,
        max_completion_length=24,
    )
    written = pipe(["And he said"], seed=1, temperature=0.01).texts
    pipe.save_pretrained(tmp_path / "merged")
    again = TextAlignmentPipeline.from_pretrained(tmp_path / "merged")
    assert again(["And he said"], seed=1, temperature=0.01).texts == written


def test_offloaded_text_encoders_are_on_the_gpu_only_while_they_encode(tmp_path):
    pipe, places = ImageAlignmentPipeline.from_pretrained("emoji-sd"), {}
    encoder = pipe.pipeline.text_encoder
    for name, part in (("encoder", encoder), ("unet", pipe.pipeline.unet), ("vae", pipe.pipeline.vae.decoder)):
        part.register_forward_pre_hook(lambda *_, n=name: places.setdefault(n, set()).add(encoder.device.type))
    pipe.align(
        reward="jpeg_compressibility",
        prompts=["a lion", "a rocket"],
        output_dir=tmp_path / "run",
        gradient_checkpointing=True,
        epochs=2,
        samples_per_epoch=16,
        sampler={"steps": 4, "guidance_scale": 2.0},
    )
    assert places == {"encoder": {"cuda"}, "unet": {"cpu"}, "vae": {"cpu"}}
    assert encoder.device.type == "cuda"
