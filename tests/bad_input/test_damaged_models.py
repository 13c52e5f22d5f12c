"""Models whose files are damaged or hold nonsense: one sentence that names the file or the setting, and soon."""

import shutil
import time

import pytest

from diffusion_align.errors import UserError
from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline
from tests.helpers.tiny_runs import edit_json


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def drop(file):
    return lambda folder: shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()


UNET, VAE, TEXT, INDEX = "unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json"
TOKENIZER, SCHEDULER = "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGE = {
    "sample_size null": (edit_json(UNET, sample_size=None), "unet/config.json: sample_size=None must be the side"),
    "sample_size a text": (edit_json(UNET, sample_size="8"), "sample_size='8' must be"),
    "sample_size negative": (edit_json(UNET, sample_size=-8), "sample_size=-8 must be"),
    "sample_size a fraction": (edit_json(UNET, sample_size=8.5), "sample_size=8.5 must be"),
    "sample_size endless": (edit_json(UNET, sample_size=10**9), "sample_size=1000000000 is too large"),
    "channels a text": (edit_json(UNET, in_channels="4"), "could not be loaded"),
    "channels missing": (edit_json(UNET, block_out_channels=...), "could not be loaded"),
    "no list of channels": (edit_json(UNET, block_out_channels=5), "could not be loaded"),
    "width a text": (edit_json(UNET, cross_attention_dim="16"), "could not be loaded"),
    "width endless": (edit_json(UNET, cross_attention_dim=10**12), "cross_attention_dim=1000000000000 is too large"),
    "width of 400 digits": (edit_json(UNET, cross_attention_dim=10**400), "cross_attention_dim=1000.* is too large"),
    "no heads": (edit_json(UNET, attention_head_dim=0), "could not be loaded"),
    "unet a list": (write(UNET, b"[]"), "unet/config.json holds no JSON object"),
    "unet null": (write(UNET, b"null"), "unet/config.json holds no JSON object"),
    "unet cut off": (write(UNET, b'{"a'), "unet/config.json is not a valid JSON file"),
    "unet deep": (write(UNET, b'{"a":' * 5000), "unet/config.json is not a valid JSON file"),
    "unet no text": (write(UNET, b"\xff\xfe"), "unet/config.json is not a valid JSON file"),
    "unet gone": (drop(UNET), "could not be loaded"),
    "weights empty": (write(f"unet/{WEIGHTS}", b""), "could not be loaded"),
    "weights noise": (write(f"unet/{WEIGHTS}", b"\xff" * 8), "could not be loaded"),
    "weights gone": (drop(f"unet/{WEIGHTS}"), "could not be loaded"),
    "scaling a text": (edit_json(VAE, scaling_factor="0.5"), "vae/config.json: scaling_factor='0.5' must be a number"),
    "scaling null": (edit_json(VAE, scaling_factor=None), "scaling_factor=None must be a number"),
    "vae channels": (edit_json(VAE, latent_channels=8), "could not be loaded"),
    "vae a list": (write(VAE, b"[]"), "vae/config.json holds no JSON object"),
    "a billion layers": (edit_json(TEXT, num_hidden_layers=10**9), "num_hidden_layers=1000000000 is too large"),
    "hidden size a text": (edit_json(TEXT, hidden_size="16"), "could not be loaded: .*hidden_size"),
    "text positions": (edit_json(TEXT, max_position_embeddings=5), "shapes of its weights are not those"),
    "text a list": (write(TEXT, b"[]"), "text_encoder/config.json holds no JSON object"),
    "text activation": (edit_json(TEXT, hidden_act="nothing"), "could not be loaded"),
    "timesteps a text": (
        edit_json(SCHEDULER, num_train_timesteps="1000"),
        "num_train_timesteps='1000' must be a whole",
    ),
    "no timesteps": (edit_json(SCHEDULER, num_train_timesteps=0), "num_train_timesteps=0 must be"),
    "timesteps endless": (
        edit_json(SCHEDULER, num_train_timesteps=10**12),
        "num_train_timesteps=1000000000000 must be",
    ),
    "beta a text": (edit_json(SCHEDULER, beta_start="x"), "beta_start='x' must be a number from 0 to 1"),
    "beta above 1": (edit_json(SCHEDULER, beta_end=5), "beta_end=5 must be"),
    "beta nan": (edit_json(SCHEDULER, beta_start=float("nan")), "beta_start=nan must be"),
    "schedule unknown": (edit_json(SCHEDULER, beta_schedule="foo"), "could not be loaded"),
    "betas a text": (edit_json(SCHEDULER, trained_betas="x"), "trained_betas='x' must be"),
    "two betas": (edit_json(SCHEDULER, trained_betas=[0.1, 0.2]), "trained_betas=.* must be"),
    "offset": (edit_json(SCHEDULER, steps_offset=10**6), "steps_offset=1000000 must be"),
    "spacing": (edit_json(SCHEDULER, timestep_spacing="foo"), "timestep_spacing='foo' must be one of leading"),
    "scheduler a list": (write(SCHEDULER, b"[]"), "scheduler_config.json holds no JSON object"),
    "tokenizer gone": (drop("tokenizer"), "the folder has no tokenizer/"),
    "tokenizer a list": (write(TOKENIZER, b"[]"), "could not be loaded"),
    "no length": (
        edit_json(TOKENIZER, model_max_length=10**30),
        "tokenizer: model_max_length=10.* must be a whole number",
    ),
    "negative length": (edit_json(TOKENIZER, model_max_length=-1), "tokenizer: model_max_length=-1 must be"),
    "index a list": (write(INDEX, b"[]"), "model='"),
    "index of code": (edit_json(INDEX, unet=["os", "system"]), "its unet is of 'os', of which nothing is loaded"),
    "index without lists": (edit_json(INDEX, unet=[]), "could not be loaded"),
    "index of nothing": (edit_json(INDEX, _class_name=3), "is a 3, which is not supported"),
}
CONFIG = "config.json"
LANGUAGE = {
    "hidden size a text": (edit_json(CONFIG, hidden_size="32"), "could not be loaded: .*hidden_size"),
    "hidden size endless": (edit_json(CONFIG, hidden_size=10**9), "shapes of its weights are not those"),
    "a billion layers": (edit_json(CONFIG, num_hidden_layers=10**9), "has 1000000000 layers, not 1 to"),
    "a billion layers, as others call them": (edit_json(CONFIG, n_layers=10**9), "has 1000000000 layers, not 1 to"),
    "of its text": (edit_json(CONFIG, text_config={"num_layers": 10**9}), "has 1000000000 layers, not 1 to"),
    "no layers": (edit_json(CONFIG, num_hidden_layers=-1), "has -1 layers"),
    "no heads": (edit_json(CONFIG, num_attention_heads=0), "could not be loaded"),
    "vocabulary": (edit_json(CONFIG, vocab_size=10**9), "shapes of its weights are not those"),
    "activation": (edit_json(CONFIG, hidden_act="foo"), "could not be loaded"),
    "type": (edit_json(CONFIG, model_type=3), "not a causal language model"),
    "a list": (write(CONFIG, b"[]"), "config.json holds no JSON object"),
    "cut off": (write(CONFIG, b'{"a'), "config.json cannot be read"),
    "deep": (write(CONFIG, b'{"a":' * 5000), "config.json cannot be read"),
    "no text": (write(CONFIG, b"\xff\xfe"), "config.json cannot be read"),
    "weights empty": (write("model.safetensors", b""), "could not be loaded"),
    "weights noise": (write("model.safetensors", b"\xff" * 8), "could not be loaded"),
    "weights gone": (drop("model.safetensors"), "could not be loaded"),
    "end a text": (edit_json("generation_config.json", eos_token_id="x"), "eos_token_id='x' of generation_config.json"),
    "tokenizer gone": (drop("tokenizer.json"), "could not be loaded"),
    "tokenizer empty": (write("tokenizer.json", b"{}"), "could not be loaded"),
    "tokenizer a list": (write("tokenizer_config.json", b"[]"), "could not be loaded"),
    "length a text": (
        edit_json("tokenizer_config.json", model_max_length="x"),
        "model_max_length='x' of its tokenizer",
    ),
}


def assert_refused(load, source, folder, damage, wanted):
    shutil.copytree(source, folder)
    damage(folder)
    started = time.process_time()
    with pytest.raises(UserError, match=wanted) as caught:
        load(folder)
    assert time.process_time() - started < 10
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + 2 * len(str(folder))


@pytest.mark.parametrize("case", IMAGE)
def test_an_image_model(tiny_sd, tmp_path, case):
    assert_refused(ImageAlignmentPipeline.from_pretrained, tiny_sd, tmp_path / "model", *IMAGE[case])


@pytest.mark.parametrize("case", LANGUAGE)
def test_a_language_model(tiny_language_model, tmp_path, case):
    assert_refused(TextAlignmentPipeline.from_pretrained, tiny_language_model, tmp_path / "model", *LANGUAGE[case])


@pytest.mark.parametrize(
    ("lora", "wanted"), [("nowhere", "there is no such file or folder"), ("", "could not be loaded into emoji-sd")]
)
def test_a_lora_of_another_model(tmp_path, lora, wanted):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=wanted) as caught:
        ImageAlignmentPipeline.from_pretrained("emoji-sd", lora=tmp_path / lora)
    assert "\n" not in str(caught.value)


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

    from diffusion_align.pipelines.image import DrawnImages

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
            DrawnImages([Image.new("RGB", (8, 8))], ["a"]).save(path)
    assert list(tmp_path.iterdir()) == []
