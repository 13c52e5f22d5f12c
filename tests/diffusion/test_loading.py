"""Loading: what works, and one sentence for everything that does not."""

import json
import shutil

import pytest
import torch

from diffusion_align.diffusion.loading import load_pipeline, model_problem
from diffusion_align.training.errors import UserError

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


def edit(path, **changes):
    def change(folder):
        settings = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(settings | changes))

    return change


DAMAGE = {
    "unet-cut": (cut(UNET), "could not be loaded"),
    "unet-garbage": (write(UNET, "hello"), "could not be loaded"),
    "text-encoder-cut": (cut(TEXT), "could not be loaded"),
    "text-encoder-empty": (write(TEXT, ""), "could not be loaded"),
    "vae-weights-absent": (remove("vae/diffusion_pytorch_model.safetensors"), "no file named diffusion_pytorch_model"),
    "unet-absent": (remove("unet"), "no unet/"),
    "tokenizer-absent": (remove("tokenizer"), "no tokenizer/"),
    "scheduler-absent": (remove("scheduler"), "no scheduler/"),
    "tokenizer-garbage": (write("tokenizer/tokenizer.json", "{"), "could not be loaded"),
    "scheduler-garbage": (write("scheduler/scheduler_config.json", "nope"), "not a valid JSON"),
    "index-absent": (remove("model_index.json"), "the folder has no model_index.json"),
    "index-garbage": (write("model_index.json", "{"), "not a valid JSON"),
    "index-list": (write("model_index.json", "[1]"), "not supported"),
    "index-empty": (write("model_index.json", "{}"), "not supported"),
    "another-class": (
        edit("model_index.json", _class_name="FluxPipeline"),
        "is a FluxPipeline, which is not supported",
    ),
    "another-width": (edit("unet/config.json", block_out_channels=[8, 24]), "expected shape"),
    "another-text-width": (edit("text_encoder/config.json", hidden_size=24), "could not be loaded"),
    "unknown-part": (edit("model_index.json", unet=["diffusers", "NoSuchModel"]), "NoSuchModel"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_gives_one_sentence(damage, tiny_sd, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    change, expected = DAMAGE[damage]
    change(folder)
    with pytest.raises(UserError, match=expected) as caught:
        load_pipeline(str(folder))
    assert str(caught.value).startswith(f"model={str(folder)!r}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("emoji_sd", "did you mean 'emoji-sd'"),
        ("emoji-clip", "not a text-to-image pipeline"),
        ("./nothing/here", "neither an embedded model, nor a folder"),
        ("/nothing/here", "neither an embedded model, nor a folder"),
        ("~no_such_user_here/model", "neither an embedded model, nor a folder"),
        ("a/b/c", "neither an embedded model, nor a folder"),
        ("x" * 300, "neither an embedded model, nor a folder"),
        ("", "no model_index.json"),
    ],
)
def test_a_name_that_is_nothing_gives_one_sentence_without_loading(model, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert expected in model_problem(model)
    with pytest.raises(UserError, match=expected):
        load_pipeline(model)


def test_a_hub_name_out_of_reach_gives_one_sentence():
    assert model_problem("nobody-at-all/no-such-model") is None  # only asking can tell
    with pytest.raises(UserError, match=r"^model='nobody-at-all/no-such-model' could not be loaded: .+$"):
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
    assert model_problem(model_path(model)) is None
    pipeline = load_pipeline(model_path(model))
    assert type(pipeline).__name__ == family
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert getattr(pipeline, "safety_checker", None) is None
    assert getattr(pipeline, "watermark", None) is None


def test_a_folder_below_home_is_found(tiny_sd, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_sd.parent))
    assert model_problem("~/sd") is None
    assert load_pipeline("~/sd").unet.config.sample_size == 8


def test_a_folder_that_names_a_safety_checker_it_does_not_hold_loads(tiny_sd, tmp_path):
    """People delete it; it is not used here."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    edit("model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])(folder)
    assert load_pipeline(str(folder)).safety_checker is None


def test_a_missing_variant_gives_one_sentence(tiny_sd):
    with pytest.raises(UserError, match="could not be loaded"):
        load_pipeline(str(tiny_sd), variant="fp16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_that_overflows_in_half_precision_stays_wide(dtype, tiny_sd):
    pipeline = load_pipeline(str(tiny_sd), dtype=dtype)
    assert pipeline.unet.dtype == dtype
    assert pipeline.vae.dtype == torch.float32
