"""Whole runs with the settings that save memory end with the weights of runs without them, bit for bit (on a CPU), and
are resumed with or without them."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.errors import CheckpointError, RewardError, UserError
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline
from diffusion_align.pretrained import load_in_dtype
from diffusion_align.training.reading import load_yaml
from tests.helpers.hard_runs import newest
from tests.helpers.tiny_runs import IMAGE_RUN, TINY

PAIRS = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " ran"},
    {"prompt": "a dog", "chosen": "s", "rejected": "t"},
]
OF_TEXT = {name: value for name, value in TINY.items() if name != "sampler"} | {"max_completion_length": 6}
ONLINE = OF_TEXT | {"prompts": ["the cat", "a dog"], "reward": {"name": "length", "target": 4}}
RUNS = {
    "ddpo": IMAGE_RUN | {"kl_coef": 0.1, "sampler": {"steps": 3, "guidance_scale": 2.0}},
    "diffusion_dpo": IMAGE_RUN | {"method": "diffusion_dpo", "beta": 0.1, "group_size": 2},
    "grpo": ONLINE | {"method": "grpo", "group_size": 2, "kl_coef": 0.1},
    "ppo": ONLINE | {"method": "ppo"},
    "dpo": OF_TEXT | {"method": "dpo", "dataset": PAIRS, "beta": 0.1},
    "reward_model": OF_TEXT | {"method": "reward_model", "dataset": PAIRS},
}
DROPPING = {"rank": 2, "dropout": 0.3, "dora": True}
PLAIN = {"gradient_checkpointing": False}
SAVING = {"gradient_checkpointing": True}
PLAIN_IMAGES, SAVING_IMAGES = PLAIN | {"offload_text_encoders": False}, SAVING | {"offload_text_encoders": True}


@pytest.mark.parametrize(
    ("method", "lora"),
    [(method, lora) for method in RUNS for lora in ({"rank": 2}, None)]
    + [(method, DROPPING) for method in ("diffusion_dpo", "dpo", "reward_model")],
)
def test_no_bit_changes_and_a_run_is_resumed_without_them(method, lora, run_here, request, tmp_path, capfd):
    images = RUNS[method].get("model") == "emoji-sd"
    model = "emoji-sd" if images else str(request.getfixturevalue("tiny_language_model"))
    settings = RUNS[method] | {"model": model, "lora": lora, "learning_rate": 1e-3}

    def train(name, **changes):
        run_here(settings | {"output_dir": str(tmp_path / name)} | changes)
        return load_file(newest(tmp_path / name) / "trained.safetensors")

    without, with_them = (PLAIN_IMAGES, SAVING_IMAGES) if images else (PLAIN, SAVING)
    plain, saving = train("plain", epochs=2, **without), train("saving", epochs=2, **with_them)
    train("stopped", epochs=1, **with_them)
    capfd.readouterr()
    resumed = train("stopped", epochs=2, resume=True, **without)
    assert "results may differ" not in capfd.readouterr().err
    for other in (saving, resumed):
        assert plain.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in plain.items())


@pytest.mark.parametrize("fails", [False, True])
def test_align_gives_the_pipeline_back_as_it_was(fails, monkeypatch, tmp_path):
    """The networks keep their activations again, and the text encoders are where the UNet is."""
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd", device="cpu")
    encoder, moves = pipe.pipeline.text_encoder, []
    monkeypatch.setattr(encoder, "to", lambda place: moves.append(place) or encoder)
    epochs, attention = [], []

    def attention_used():
        return {type(processor).__name__ for processor in pipe.pipeline.unet.attn_processors.values()}

    before = attention_used()

    def reward(images, prompts, metadata):
        epochs.append(pipe.pipeline.unet.is_gradient_checkpointing)
        attention.append(attention_used())
        return images.mean(dim=(1, 2, 3)) if len(epochs) < 3 or not fails else 1 / 0

    settings = {name: value for name, value in IMAGE_RUN.items() if name not in ("model", "output_dir", "reward")}
    with pytest.raises(RewardError) if fails else nullcontext():
        changes = {"epochs": 2, "gradient_checkpointing": True, "attention": "eager"}
        pipe.align(reward=reward, output_dir=tmp_path / "run", **settings | changes)
    assert epochs[-1]
    assert not pipe.pipeline.unet.is_gradient_checkpointing
    assert attention[-1] == {"AttnProcessor"}
    assert attention_used() == before == {"AttnProcessor2_0"}
    assert moves[0] == "cpu"
    assert set(moves[1:]) == {pipe.pipeline.unet.device}


def test_text_encoders_are_beside_the_unet_after_a_run_that_failed_before_its_first_epoch(monkeypatch, tmp_path):
    pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd", device="cpu")
    encoder, moves = pipe.pipeline.text_encoder, []
    monkeypatch.setattr(encoder, "to", lambda place: moves.append(place) or encoder)
    settings = {name: value for name, value in IMAGE_RUN.items() if name not in ("model", "output_dir")}
    with pytest.raises(RewardError):
        pipe.align(output_dir=tmp_path / "run", **settings | {"reward": lambda *given: 1 / 0})
    assert moves == ["cpu", pipe.pipeline.unet.device]


@pytest.mark.parametrize("fails", [False, True])
def test_text_encoders_are_beside_the_unet_after_a_run_without_a_pipeline_of_ours(fails, run_here, tmp_path):
    pipeline, moves, calls = load_pipeline("emoji-sd"), [], []
    pipeline.text_encoder.to = lambda place: moves.append(place) or pipeline.text_encoder

    def reward(images, prompts, metadata):
        calls.append(list(moves))
        return images.mean(dim=(1, 2, 3)) if len(calls) < 3 or not fails else 1 / 0

    settings = IMAGE_RUN | {"output_dir": str(tmp_path / "run"), "reward": reward, "epochs": 2}
    with pytest.raises(RewardError) if fails else nullcontext():
        run_here(settings, pipeline=pipeline)
    assert calls[-1] == ["cpu"]
    assert moves == ["cpu", pipeline.unet.device]


def test_align_gives_the_language_model_back_as_it_was(tiny_language_model, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")
    given, checkpointed, attention = pipe.model, [], []
    before = given.config._attn_implementation

    def reward(completions, **columns):
        attention.append(given.config._attn_implementation)
        checkpointed.append(any("forward" in part.__dict__ for part in given.modules()))
        return [float(len(text)) for text in completions]

    run = RUNS["grpo"] | {"reward": reward, "gradient_checkpointing": True, "output_dir": tmp_path / "run"}
    pipe.align(**run, attention="eager")
    assert checkpointed[-1]
    assert attention[-1] == "eager" != before == pipe.model.config._attn_implementation
    assert not any("forward" in part.__dict__ for part in pipe.model.modules())


SPLIT = {"vae_slicing": True, "vae_tiling": True, "height": 96}
OF_IMAGES = {name: value for name, value in IMAGE_RUN.items() if name not in ("model", "output_dir")}


@pytest.fixture
def vae_of(monkeypatch):
    """``vae_of(pipeline)``: shapes of what the VAE's decoder and encoder are given from then on."""
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)

    def watch(pipeline):
        shapes = set()
        for part in (pipeline.vae.decoder, pipeline.vae.encoder):
            part.register_forward_pre_hook(lambda _, given: shapes.add(tuple(given[0].shape)))
        return shapes

    return watch


def test_all_images_of_a_run_are_decoded_in_parts_and_those_of_its_pipeline_too(vae_of, tmp_path):
    """Training, previews and evaluation; a call after it; and a pipeline loaded from the run."""
    pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd", device="cpu")
    shapes = vae_of(pipe.pipeline)
    judged = {"reward": "jpeg_compressibility", "samples": 3, "diversity": "pixels"}
    run = OF_IMAGES | SPLIT | {"grid_every": 1, "evaluation": judged}
    pipe.align(output_dir=tmp_path / "run", **run)
    tiles = {(1, 4, rows, 16) for rows in (16, 12)} | {(1, 4, rows, 4) for rows in (16, 12)}
    assert shapes
    assert shapes <= tiles
    shapes.clear()
    images = pipe(["a lion", "a cat"]).images
    assert images[0].size == (64, 96)
    assert shapes
    assert shapes <= tiles
    loaded = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu")
    assert loaded.pipeline.vae.use_slicing
    assert loaded.pipeline.vae.use_tiling


def test_pairs_are_encoded_in_parts(vae_of, tmp_path, run_here):
    pipeline = load_pipeline("emoji-sd")
    shapes = vae_of(pipeline)
    settings = {name: value for name, value in IMAGE_RUN.items() if name not in ("prompts", "reward")}
    settings |= {"method": "diffusion_dpo", "beta": 0.1, "pairs": {"source": "emoji_style", "max_pairs": 2}} | SPLIT
    run_here(settings | {"output_dir": str(tmp_path / "run")}, pipeline=pipeline)
    sizes = {shape[2:] for shape in shapes if shape[:2] == (1, 3)}
    assert sizes == {(rows, columns) for rows in (64, 48) for columns in (64, 16)}
    assert all(shape[0] == 1 for shape in shapes)


def test_a_failed_run_leaves_the_vae_as_it_was(vae_of, tmp_path):
    pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd", device="cpu")
    pipe.pipeline.vae.enable_slicing()
    with pytest.raises(RewardError):
        pipe.align(output_dir=tmp_path / "run", **OF_IMAGES | {"reward": lambda *given: 1 / 0, "vae_tiling": True})
    assert pipe.pipeline.vae.use_slicing
    assert not pipe.pipeline.vae.use_tiling


def test_what_cannot_be_returned_to_a_full_gpu_hides_no_failure(vae_of, tmp_path, monkeypatch):
    pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd", device="cpu")

    def fails(images, prompts, metadata):
        def full(*given, **settings):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(pipe.pipeline.text_encoder, "to", full)
        raise ValueError("what went wrong first")

    with pytest.raises(RewardError, match="what went wrong first"):
        pipe.align(output_dir=tmp_path / "run", **OF_IMAGES | {"reward": fails})


def test_slices_may_change_on_resume_and_tiles_not(run_here, tmp_path, capfd):
    settings = IMAGE_RUN | {"output_dir": str(tmp_path / "run"), "height": 96}
    run_here(settings)
    with pytest.raises(CheckpointError, match="vae_tiling was False and is True"):
        run_here(settings | {"epochs": 2, "resume": True, "vae_tiling": True})
    run_here(settings | {"epochs": 2, "resume": True, "vae_slicing": True})
    assert "resumed with vae_slicing=True (was False): from here on, results may differ" in capfd.readouterr().err


def test_a_float32_vae_is_a_matter_of_loading(tmp_path, vae_of, tiny_sd):
    pipe = ImageAlignmentPipeline.from_pretrained(tiny_sd, dtype="bfloat16", device="cpu", upcast_vae=False)
    assert pipe.pipeline.vae.dtype == torch.bfloat16
    settings = OF_IMAGES | {"output_dir": tmp_path / "run"}
    with pytest.raises(UserError, match="upcast_vae=True is for loading a model: give upcast_vae to from_pretrained"):
        pipe.align(**settings, upcast_vae=True)
    pipe.align(**settings)
    assert load_yaml(tmp_path / "run" / "config.yaml")["upcast_vae"] is False
    loaded = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", dtype="bfloat16", device="cpu")
    assert loaded.pipeline.vae.dtype == torch.bfloat16
    wide = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", dtype="bfloat16", device="cpu", upcast_vae=True)
    assert wide.pipeline.vae.dtype == torch.float32


@pytest.mark.parametrize(("force_upcast", "written"), [(True, False), (False, None)])
def test_the_vae_of_a_pipeline_in_memory_keeps_its_dtype_on_resume(force_upcast, written, tmp_path, vae_of, tiny_sd):
    from diffusers import StableDiffusionPipeline

    pipeline = load_in_dtype(StableDiffusionPipeline.from_pretrained, tiny_sd, dtype=torch.bfloat16)
    pipeline.vae.register_to_config(force_upcast=force_upcast)
    ImageAlignmentPipeline.from_pipe(pipeline).align(**OF_IMAGES, output_dir=tmp_path / "run")
    assert load_yaml(tmp_path / "run" / "config.yaml")["upcast_vae"] is written
