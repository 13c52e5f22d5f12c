"""Models whose files are damaged or hold nonsense: one sentence that names the file or the setting, and soon."""

import shutil
import time

import pytest

from diffusion_align.errors import UserError
from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline
from tests.helpers.problems import problems
from tests.helpers.tiny_runs import edit_json


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def drop(file):
    return lambda folder: shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()


UNET, VAE, TEXT, INDEX = "unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json"
TOKENIZER, SCHEDULER = "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGE = {
    "sample_size null": edit_json(UNET, sample_size=None),
    "sample_size a text": edit_json(UNET, sample_size="8"),
    "sample_size negative": edit_json(UNET, sample_size=-8),
    "sample_size a fraction": edit_json(UNET, sample_size=8.5),
    "sample_size endless": edit_json(UNET, sample_size=10**9),
    "channels a text": edit_json(UNET, in_channels="4"),
    "channels missing": edit_json(UNET, block_out_channels=...),
    "no list of channels": edit_json(UNET, block_out_channels=5),
    "width a text": edit_json(UNET, cross_attention_dim="16"),
    "width endless": edit_json(UNET, cross_attention_dim=10**12),
    "width of 400 digits": edit_json(UNET, cross_attention_dim=10**400),
    "no heads": edit_json(UNET, attention_head_dim=0),
    "unet a list": write(UNET, b"[]"),
    "unet null": write(UNET, b"null"),
    "unet cut off": write(UNET, b'{"a'),
    "unet deep": write(UNET, b'{"a":' * 5000),
    "unet no text": write(UNET, b"\xff\xfe"),
    "unet gone": drop(UNET),
    "weights empty": write(f"unet/{WEIGHTS}", b""),
    "weights noise": write(f"unet/{WEIGHTS}", b"\xff" * 8),
    "weights gone": drop(f"unet/{WEIGHTS}"),
    "scaling a text": edit_json(VAE, scaling_factor="0.5"),
    "scaling null": edit_json(VAE, scaling_factor=None),
    "vae channels": edit_json(VAE, latent_channels=8),
    "vae a list": write(VAE, b"[]"),
    "a billion layers": edit_json(TEXT, num_hidden_layers=10**9),
    "hidden size a text": edit_json(TEXT, hidden_size="16"),
    "text positions": edit_json(TEXT, max_position_embeddings=5),
    "text a list": write(TEXT, b"[]"),
    "text activation": edit_json(TEXT, hidden_act="nothing"),
    "timesteps a text": edit_json(SCHEDULER, num_train_timesteps="1000"),
    "no timesteps": edit_json(SCHEDULER, num_train_timesteps=0),
    "timesteps endless": edit_json(SCHEDULER, num_train_timesteps=10**12),
    "beta a text": edit_json(SCHEDULER, beta_start="x"),
    "beta above 1": edit_json(SCHEDULER, beta_end=5),
    "beta nan": edit_json(SCHEDULER, beta_start=float("nan")),
    "schedule unknown": edit_json(SCHEDULER, beta_schedule="foo"),
    "betas a text": edit_json(SCHEDULER, trained_betas="x"),
    "two betas": edit_json(SCHEDULER, trained_betas=[0.1, 0.2]),
    "offset": edit_json(SCHEDULER, steps_offset=10**6),
    "spacing": edit_json(SCHEDULER, timestep_spacing="foo"),
    "scheduler a list": write(SCHEDULER, b"[]"),
    "tokenizer gone": drop("tokenizer"),
    "tokenizer a list": write(TOKENIZER, b"[]"),
    "no length": edit_json(TOKENIZER, model_max_length=10**30),
    "negative length": edit_json(TOKENIZER, model_max_length=-1),
    "index a list": write(INDEX, b"[]"),
    "index of code": edit_json(INDEX, unet=["os", "system"]),
    "index without lists": edit_json(INDEX, unet=[]),
    "index of nothing": edit_json(INDEX, _class_name=3),
}
CONFIG = "config.json"
LANGUAGE = {
    "hidden size a text": edit_json(CONFIG, hidden_size="32"),
    "hidden size endless": edit_json(CONFIG, hidden_size=10**9),
    "a billion layers": edit_json(CONFIG, num_hidden_layers=10**9),
    "a billion layers, as others call them": edit_json(CONFIG, n_layers=10**9),
    "of its text": edit_json(CONFIG, text_config={"num_layers": 10**9}),
    "no layers": edit_json(CONFIG, num_hidden_layers=-1),
    "no heads": edit_json(CONFIG, num_attention_heads=0),
    "vocabulary": edit_json(CONFIG, vocab_size=10**9),
    "activation": edit_json(CONFIG, hidden_act="foo"),
    "type": edit_json(CONFIG, model_type=3),
    "a list": write(CONFIG, b"[]"),
    "cut off": write(CONFIG, b'{"a'),
    "deep": write(CONFIG, b'{"a":' * 5000),
    "no text": write(CONFIG, b"\xff\xfe"),
    "weights empty": write("model.safetensors", b""),
    "weights noise": write("model.safetensors", b"\xff" * 8),
    "weights gone": drop("model.safetensors"),
    "end a text": edit_json("generation_config.json", eos_token_id="x"),
    "tokenizer gone": drop("tokenizer.json"),
    "tokenizer empty": write("tokenizer.json", b"{}"),
    "tokenizer a list": write("tokenizer_config.json", b"[]"),
    "length a text": edit_json("tokenizer_config.json", model_max_length="x"),
}


def refusal(load, source, folder, damage):
    """The sentence with which ``load`` soon refuses a damaged copy of ``source``."""
    shutil.copytree(source, folder)
    damage(folder)
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        load(folder)
    assert time.process_time() - started < 10
    (sentence,) = problems(caught)
    assert "\n" not in sentence
    assert len(sentence) < 600 + 2 * len(str(folder))
    return sentence


@pytest.mark.parametrize("case", IMAGE)
def test_an_image_model(golden, tiny_sd, tmp_path, case):
    load = ImageAlignmentPipeline.from_pretrained
    golden(f"image: {case}", refusal(load, tiny_sd, tmp_path / "model", IMAGE[case]))


@pytest.mark.parametrize("case", LANGUAGE)
def test_a_language_model(golden, tiny_language_model, tmp_path, case):
    load = TextAlignmentPipeline.from_pretrained
    golden(f"text: {case}", refusal(load, tiny_language_model, tmp_path / "model", LANGUAGE[case]))


@pytest.mark.parametrize("lora", ["nowhere", ""])
def test_a_lora_of_another_model(golden, tmp_path, lora):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError) as caught:
        ImageAlignmentPipeline.from_pretrained("emoji-sd", lora=tmp_path / lora)
    golden(f"lora: {lora}", problems(caught))


@pytest.mark.parametrize("load", [ImageAlignmentPipeline.from_pretrained, TextAlignmentPipeline.from_pretrained])
@pytest.mark.parametrize("device", ["cuda:99", "toaster", "meta", 3.5])
def test_a_device_that_is_not_there(load, device, monkeypatch):
    for module in ("image.load_pipeline", "text.load_language_model"):
        monkeypatch.setattr(f"diffusion_align.pipelines.{module}", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"device='.*' (cannot be used|is)"):
        load("emoji-sd", device=device)


@pytest.mark.parametrize("path", ["", "a\0b", "~nobody-is-called-so/x", "x" * 5000])
def test_a_path_in_python(path, tmp_path, monkeypatch):
    from PIL import Image

    from diffusion_align.pipelines.image import SampledImages

    monkeypatch.chdir(tmp_path)
    pipe = ImageAlignmentPipeline(None, model="emoji-sd")
    pipe.run = tmp_path / "earlier"
    with pytest.raises(UserError, match="output_dir="):
        pipe.align(reward="jpeg_compressibility", prompts=["a cat"], output_dir=path)
    with pytest.raises(UserError, match="model="):
        ImageAlignmentPipeline.from_pretrained(path)
    with pytest.raises(UserError, match="model="):
        TextAlignmentPipeline.from_pretrained(path)
    if path:
        with pytest.raises(UserError, match="the folder"):
            SampledImages([Image.new("RGB", (8, 8))], ["a"]).save(path)
    assert list(tmp_path.iterdir()) == []
