"""A model in one file with the original names is the model of the folder, to the bit; and what cannot be loaded."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_align.errors import UserError, problems_of
from diffusion_align.models import image_pipelines
from diffusion_align.models.image_pipelines import check_pipeline_name, load_pipeline
from diffusion_align.models.model_ref import check_image_model
from diffusion_align.pipelines.configuration import check_config

NAMES = ["sd15", "sd2", "sdxl"]


def networks(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@torch.no_grad()
def outputs(pipeline):
    """What each network makes of fixed inputs."""
    for network in networks(pipeline).values():
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()  # a file's tensors are not aligned, and kernels sum by alignment
    generator = torch.Generator().manual_seed(0)
    latents, images = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, 3, 64, 64, generator=generator)
    texts = {"prompt": ["a red apple", "a cat"], "device": "cpu", "do_classifier_free_guidance": False}
    states, _, *pooled = pipeline.encode_prompt(num_images_per_prompt=1, **texts)
    results = {
        "text": states,
        "decoded": pipeline.vae.decode(latents).sample,
        "encoded": pipeline.vae.encode(images).latent_dist.parameters,
    }
    added = {}
    if pooled:
        results["pooled"] = pooled[0]
        added = {"added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": torch.full((2, 6), 64.0)}}
    return results | {"noise": pipeline.unet(latents, torch.tensor([10, 900]), states, **added).sample}


@pytest.fixture(scope="module")
def pairs(published):
    """``pairs(name)``: the pipelines of the folder and of the file."""
    made = {}

    def load(name):
        if name not in made:
            folder, file = str(published(name)), str(published(name, "file"))
            made[name] = load_pipeline(folder), load_pipeline(file, base_config=folder)
        return made[name]

    return load


@pytest.mark.parametrize("name", NAMES)
def test_its_weights_and_outputs_are_those_of_the_folder(name, pairs):
    folder, file = pairs(name)
    assert type(file) is type(folder)
    assert set(networks(file)) == set(networks(folder))
    for part, network in networks(folder).items():
        expected, actual = network.state_dict(), getattr(file, part).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
        assert not getattr(file, part).training
    expected = outputs(folder)
    for part, actual in outputs(file).items():
        assert torch.equal(actual, expected[part]), part
        assert actual.std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_and_scheduler_are_those_of_base_config(name, pairs):
    folder, file = pairs(name)
    assert type(file.scheduler) is type(folder.scheduler)
    assert file.scheduler.config == folder.scheduler.config
    assert file.scheduler.config.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")
    for part in ("tokenizer", "tokenizer_2"):
        if getattr(folder, part, None) is not None:
            assert getattr(file, part)("a red apple").input_ids == getattr(folder, part)("a red apple").input_ids
    assert getattr(file, "safety_checker", None) is None
    assert getattr(file, "watermark", None) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_loads_in_any_dtype(dtype, published, tmp_path):
    state = {name: value.half() if value.is_floating_point() else value for name, value in read(published).items()}
    file = write(tmp_path, state)
    for wanted in (torch.float32, dtype):
        pipeline = load_pipeline(str(file), base_config=str(published("sd15")), dtype=wanted)
        assert pipeline.unet.dtype == pipeline.text_encoder.dtype == wanted
        assert pipeline.vae.dtype == torch.float32
        weight = state["model.diffusion_model.input_blocks.0.0.weight"].to(wanted)
        assert torch.equal(pipeline.unet.conv_in.weight, weight)


def read(published, name="sd15"):
    return load_file(published(name, "file"))


def write(folder, state):
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def without(prefix):
    return lambda state: {name: value for name, value in state.items() if not name.startswith(prefix)}


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
ORIGINAL = "does not hold a UNet, a VAE and the text encoders of Stable Diffusion 1, 2 or XL under their original names"
HOLES = "the file lacks weights of it"
LAST_LAYER = TEXT + "transformer.text_model.encoder.layers.2."
WIDER = {UNET + "out.2.weight": torch.zeros(4, 24, 3, 3)}
DEEPER = {UNET + "middle_block.1.transformer_blocks.9.norm1.weight": torch.zeros(16)}
DAMAGE = {  # name of the model, change of its tensors, sentence
    "no UNet": ("sd15", without(UNET), ORIGINAL),
    "no VAE": ("sd15", without(VAE), ORIGINAL),
    "no text encoder": ("sd15", without(TEXT), ORIGINAL),
    "no first text encoder": ("sdxl", without("conditioner.embedders.0."), ORIGINAL),
    "no second text encoder": ("sdxl", without("conditioner.embedders.1."), ORIGINAL),
    "UNet with a hole": ("sd15", without(UNET + "middle_block.1"), HOLES),
    "UNet without its end": ("sd15", without(UNET + "out."), HOLES),
    "XL without its size embedding": ("sdxl", without(UNET + "label_emb"), "could not be loaded with base_config="),
    "VAE without its decoder": ("sd15", without(VAE + "decoder"), HOLES),
    "text without its layers": ("sd15", without(LAST_LAYER), HOLES),
    "another width": ("sd15", lambda state: state | WIDER, "conv_out.weight expected shape"),
    "a deeper UNet": ("sdxl", lambda state: state | DEEPER, "tensors of a UNet, not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_lacks_or_exceeds_what_it_should_hold_gives_one_sentence(damage, published, tmp_path):
    name, change, expected = DAMAGE[damage]
    file = write(tmp_path, change(read(published, name)))
    [said] = problems_of(load_pipeline, str(file), base_config=str(published(name)))
    assert expected in said
    assert said.startswith(f"model={str(file)!r}")
    assert "\n" not in said


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_size_is_checked_by_base_config_before_weights_are_read(name, published, monkeypatch):
    file, folder = str(published(name, "file")), str(published(name))
    monkeypatch.setattr(image_pipelines, "load_single_file", lambda *given, **named: pytest.fail("it is read"))
    for read in (check_image_model, functools.partial(load_pipeline, to_train=True)):
        with pytest.raises(UserError, match=r"^height=21 must be a multiple of \d+ for this model"):
            read(file, base_config=folder, height=21)
    check_image_model(file, base_config=folder, height=32)


@pytest.mark.parametrize(("name", "base"), [("sd15", "sd2"), ("sd2", "sd15"), ("sd15", "sdxl"), ("sdxl", "sd15")])
def test_a_configuration_of_another_model_is_refused_or_said_to_be_another(name, base, published):
    """Where both are "Stable Diffusion", only a shape or a tensor too many can tell; the tiny ones have some alike."""
    if "sdxl" in (name, base):
        with pytest.raises(UserError, match=r"^base_config=.* is a StableDiffusion.*Pipeline, but model=.* a Stable"):
            load_pipeline(str(published(name, "file")), base_config=str(published(base)))
    else:
        with pytest.raises(UserError, match=r"proj_in.weight expected shape .*; set base_config to a local folder"):
            load_pipeline(str(published(name, "file")), base_config=str(published(base)))


def test_without_base_config_and_hub_one_sentence_says_what_to_give(published):
    for name in ("sd15", "sdxl"):
        file = str(published(name, "file"))
        check_pipeline_name(file)
        with pytest.raises(UserError, match=r"diffusers guesses: .*; set base_config to a local folder") as caught:
            load_pipeline(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^base_config='nobody-at-all/none' could not be loaded: "):
        load_pipeline(file, base_config="nobody-at-all/none")


def test_which_prediction_a_stable_diffusion_2_makes_is_not_guessed(published):
    with pytest.raises(UserError, match="the noise or v: set base_config"):
        check_pipeline_name(str(published("sd2", "file")))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.ckpt", b"", "is a pickle, which can run code when it is read"),
        ("x.ckpt", None, "is a pickle"),
        ("owner/x.bin", None, "is a pickle"),
        ("x.safetensors", None, "there is no such file"),
        ("models/x.safetensors", None, "there is no such file"),
        ("x.safetensors", b"", "could not be read"),
        ("x.safetensors", b"\x80\x02not safetensors", "could not be read"),
        ("x.gguf", b"GGUF", "does not end in .safetensors"),
    ],
)
def test_other_files_are_refused_before_anything_is_loaded(name, content, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    [said] = problems_of(check_pipeline_name, name)
    assert expected in said
    assert "\n" not in said
    with pytest.raises(UserError):
        load_pipeline(name, base_config="emoji-sd")


def test_a_file_of_the_diffusers_layout_or_of_something_else_is_refused(published):
    unet = published("sd15") / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=ORIGINAL):
        check_pipeline_name(str(unet))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("./nothing/here", "base_config='./nothing/here' is neither an embedded model, nor a folder"),
        ("tiny-lm", "base_config='tiny-lm' is a language model"),
        ("x.safetensors", "base_config='x.safetensors' is a file"),
    ],
)
def test_a_base_config_that_is_none_gives_one_sentence(base, expected, published):
    with pytest.raises(UserError, match=f"^{expected}"):
        check_pipeline_name(str(published("sd15", "file")), base_config=base)


def test_an_incomplete_base_config_is_refused(published, tmp_path):
    shutil.copytree(published("sd15"), tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "tokenizer")
    with pytest.raises(UserError, match=r"^base_config=.*incomplete.*no tokenizer/"):
        load_pipeline(str(published("sd15", "file")), base_config=str(tmp_path / "base"))


def test_base_config_needs_no_weights(published, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(published("sdxl"), base, ignore=shutil.ignore_patterns("*.safetensors"))
    assert load_pipeline(str(published("sdxl", "file")), base_config=str(base)).unet.config.sample_size == 8


def test_settings_that_do_not_fit_the_kind_of_model_are_said_together(published, tmp_path):
    common = {"method": "ddpo", "prompts": ["a"], "reward": "jpeg_compressibility", "output_dir": tmp_path / "run"}
    folder, file = str(published("sd15")), str(published("sd15", "file"))
    for settings, expected in (
        ({"model": folder, "base_config": folder}, "is for a model in one .safetensors file"),
        ({"model": file, "weights_variant": "fp16"}, "weights_variant='fp16' is for a folder or a Hub id"),
        ({"model": "x.ckpt"}, "is a pickle"),
    ):
        problems = problems_of(check_config, common | settings | {"epochs": 0})
        assert sorted(expected in problem for problem in problems) == [False, True], "epochs, and the model"
    config = check_config(common | {"model": file, "base_config": folder})
    assert json.loads(config.model_dump_json())["base_config"] == folder
