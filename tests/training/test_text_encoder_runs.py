"""Runs that train adapters on text encoders: they move, resume bit for bit, and are what is written and loaded."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusion_align import ImageAlignmentPipeline
from diffusion_align.diffusion.ddpo_settings import DDPOConfig
from diffusion_align.diffusion.dpo_settings import DiffusionDPOConfig
from diffusion_align.errors import CheckpointError, ConfigError, UserError
from diffusion_align.models.adapters import adapter_weights
from tests.helpers.tiny_runs import TINY

LORA = {"rank": 2, "text_encoder": True}
RUN = TINY | {"learning_rate": 1e-2, "lora": LORA, "sampler": {"steps": 2, "guidance_scale": 2.0}}
PROMPTS = ["a red apple", "a cat"]
DDPO = RUN | {"method": "ddpo", "reward": "jpeg_compressibility", "prompts": PROMPTS, "negative_prompt": "dark"}
DDPO |= {"updates_per_epoch": 2, "samples_per_epoch": 4}
DPO = RUN | {"method": "diffusion_dpo", "beta": 0.5, "lora": LORA | {"dora": True}, "micro_batch_size": 1}
OFFLINE = DPO | {"pairs": {"source": "emoji_style", "max_pairs": 4}, "caption_dropout": 0.5, "bucket_step": 8}
ONLINE = DPO | {"reward": "jpeg_compressibility", "prompts": PROMPTS, "group_size": 2, "samples_per_epoch": 4}
ONLINE |= {"experimental": {"target": "logged"}, "inner_epochs": 2}
FAMILY = """
from diffusion_align.models.families import {base}
class Mine({base}):
    pipelines = ("StableDiffusionPipeline",)
    {body}
"""


def saved(folder):
    return load_file(folder / "final" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("settings", [DDPO, OFFLINE, ONLINE], ids=["ddpo", "pairs", "online"])
def test_the_adapters_move_and_a_run_resumes_bit_for_bit(train, tmp_path, model_path, settings, model):
    settings, changes = settings | {"epochs": 2, "ema_decay": 0.5}, {"model": model_path(model)}
    trainer, rows = train(settings, "whole", **changes)
    assert all(row["ratio/first_pass_deviation"] == 0 for row in rows if "ratio/first_pass_deviation" in row)
    train(settings | {"epochs": 1}, "harried", **changes)
    train(settings | {"resume": True, "gradient_checkpointing": True}, "harried", **changes)
    whole, harried = saved(tmp_path / "whole"), saved(tmp_path / "harried")
    assert whole.keys() == harried.keys()
    assert all(torch.equal(value, harried[name]) for name, value in whole.items())
    parts = [part for part in ("unet", "text_encoder", "text_encoder_2") if hasattr(trainer.policy.pipeline, part)]
    for part in parts:
        moved = [value for name, value in whole.items() if name.startswith(f"{part}.") and "lora_B" in name]
        assert sum(value.abs().max() > 1e-4 for value in moved) >= len(moved) // 2  # see SDXL's first encoder


def test_the_result_is_loaded_compared_and_trained_further(run_here, tiny_sd, tmp_path):
    settings = {k: v for k, v in DDPO.items() if k not in ("method", "num_threads")} | {"inner_epochs": 2}
    settings |= {"evaluation": {"reward": "jpeg_incompressibility", "samples": 2, "every": 1, "diversity": "pixels"}}
    pipe = ImageAlignmentPipeline.from_pretrained(str(tiny_sd), device="cpu")
    plain = pipe(PROMPTS, seed=0).images
    pipe.align(output_dir=tmp_path / "a", **settings)
    own = pipe(PROMPTS, seed=0).images
    assert [image.tobytes() for image in own] != [image.tobytes() for image in plain]
    loaded = ImageAlignmentPipeline.from_pretrained(tmp_path / "a", device="cpu")
    assert adapter_weights(loaded.pipeline).keys() == {"unet", "text_encoder"}
    card = (tmp_path / "a" / "final" / "README.md").read_text()
    assert "A LoRA adapter for the UNet and the text encoders of" in card
    theirs = DiffusionPipeline.from_pretrained(tiny_sd)
    theirs.load_lora_weights(tmp_path / "a" / "final", weight_name="pytorch_lora_weights.safetensors")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        states = [one.text_encoder(ids)[0] for one in (pipe.pipeline, loaded.pipeline, theirs)]
    assert torch.equal(states[1], states[2])
    torch.testing.assert_close(states[0], states[1], atol=1e-6, rtol=0)
    # Its own run resumes, and another starts from it with the whole model as its reference.
    loaded.align(output_dir=tmp_path / "a", **settings | {"epochs": 2, "resume": True})
    assert saved(tmp_path / "a").keys() == load_file(tmp_path / "a/best/pytorch_lora_weights.safetensors").keys()
    before = adapter_weights(loaded.pipeline)["text_encoder"].weights
    with pytest.raises(ConfigError):
        loaded.align(output_dir=tmp_path / "b", **settings | {"epochs": 0})
    again = ImageAlignmentPipeline.from_pretrained(str(tiny_sd), lora=tmp_path / "a" / "final", device="cpu")
    kept = adapter_weights(again.pipeline)["text_encoder"].weights
    with pytest.raises(UserError, match=r"also changes text_encoder, .* or set lora\.text_encoder=true"):
        again.align(output_dir=tmp_path / "c", **settings | {"lora": {"rank": 2}})
    again.align(output_dir=tmp_path / "d", **settings)
    after = adapter_weights(again.pipeline)["text_encoder"].weights
    assert all(torch.equal(before[name], kept[name]) for name in before if "lora_A" in name)
    assert any((after[name] - kept[name]).abs().max() > 1e-4 for name in kept)
    again.save_lora(tmp_path / "e")
    assert (tmp_path / "e/pytorch_lora_weights.safetensors").read_bytes() == (
        tmp_path / "d/final/pytorch_lora_weights.safetensors"
    ).read_bytes()


def test_a_run_that_fails_leaves_the_pipeline_as_it_was(run_here, tiny_sd, tmp_path):
    pipe = ImageAlignmentPipeline.from_pretrained(str(tiny_sd), device="cpu")
    settings = {k: v for k, v in DDPO.items() if k not in ("method", "num_threads")}

    def fails(images, prompts, metadata):
        if len(images) == 2:
            raise RuntimeError("no answer")
        return images.mean(dim=(1, 2, 3))

    with pytest.raises(UserError, match="no answer"):
        pipe.align(output_dir=tmp_path / "a", **settings | {"reward": fails})
    assert adapter_weights(pipe.pipeline) == {}
    assert not any("lora_" in name for name, _ in pipe.pipeline.text_encoder.named_parameters())

    pipe.align(output_dir=tmp_path / "b", **settings | {"lora": {"rank": 2}})  # whose result the next one begins from
    before = pipe("a cat").images[0].tobytes()
    with pytest.raises(UserError, match="no answer"):
        pipe.align(output_dir=tmp_path / "c", **settings | {"reward": fails})
    assert list(adapter_weights(pipe.pipeline)) == ["unet"]
    assert pipe("a cat").images[0].tobytes() == before


def test_a_run_without_them_is_another_run(train):
    train(DDPO | {"lora": {"rank": 2}})
    with pytest.raises(CheckpointError, match="belongs to another run: lora was"):
        train(DDPO | {"epochs": 2, "resume": True})


def test_what_cannot_be_trained_is_refused_in_a_sentence(tmp_path, run_here, tiny_sd):
    given = {"model": "emoji-sd", "output_dir": tmp_path / "x", "beta": 1.0, "pairs": "emoji_style"}
    with pytest.raises(ConfigError) as caught:
        DiffusionDPOConfig(**given, lora={"text_encoder": True, "dropout": 0.1})
    assert caught.value.problems == [
        "lora.dropout=0.1 is of each sample, but with text_encoder=true a prompt is encoded once for all its samples: "
        "leave one of them out"
    ]
    with pytest.raises(ConfigError, match=r"unknown setting 'train_text_encoder': set lora\.text_encoder"):
        DDPOConfig(**given | {"train_text_encoder": True})
    with pytest.raises(ConfigError, match=r"lora\.text_encoder=true is not of this model"):  # before it loads
        DDPOConfig(**TINY | {"reward": "jpeg_compressibility", "prompts": PROMPTS, "model": "emoji-flow", "lora": LORA})
    file = tmp_path / "family.py"
    file.write_text(FAMILY.format(base="StableDiffusion", body="text_encoder_layers = ()"))
    settings = DDPO | {"model": str(tiny_sd), "output_dir": str(tmp_path / "run"), "family": f"{file}:Mine"}
    with pytest.raises(ConfigError, match=r"lora\.text_encoder=true is not of this model, whose family Mine names no"):
        run_here(settings)
    body = """
    def encode(self, pipeline, prompts, image_size):
        import torch
        with torch.no_grad():
            return super().encode(pipeline, prompts, image_size)
    """
    other = tmp_path / "other.py"
    other.write_text(FAMILY.format(base="StableDiffusion", body=body))
    with pytest.raises(UserError, match="Mine': encode gives no gradient to the text encoders"):
        run_here(settings | {"family": f"{other}:Mine"})
