"""What is found only with the model, the reward or a run folder at hand: one sentence each, exit 2, no half."""

import shutil

import pytest
import torch

from tests.helpers.tiny_runs import IMAGE_RUN, edit_json

REWARDS = """
import torch

def too_short(images, prompts, metadata):
    return [1.0] * (len(images) - 1)

def nan(images, prompts, metadata):
    return torch.full((len(images),), float("nan"))

def raises(images, prompts, metadata):
    raise KeyError("label")

class NoCall:
    pass

def later(images, prompts, metadata):
    # The dummy batch before training is of three.
    return torch.ones(len(images)) if len(images) == 3 else torch.full((len(images),), float("nan"))
"""


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        ("too_short", "reward 'too_short' returned 2 scores for 3 images: return a tensor"),
        ("nan", "reward 'nan' returned nan for image 0"),
        ("raises", "reward 'raises' raised KeyError: 'label'"),
        ("NoCall", "reward 'NoCall' gives a NoCall, which is not callable"),
        ("absent", "'mine.py' has no 'absent'"),
        ("torch", "reward 'mine.py:torch' is a module: name a function or a class"),
    ],
)
def test_a_reward_that_answers_nonsense(refused, write_settings, tmp_path, function, wanted):
    (tmp_path / "mine.py").write_text(REWARDS)
    refused("train", write_settings(reward=f"mine.py:{function}"), wanted=wanted)


@pytest.mark.parametrize("text", ["import no_such_package\n", "def f(images\n", "1 / 0\n"])
def test_a_reward_file_that_cannot_be_imported(refused, write_settings, tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    refused("train", write_settings(reward="mine.py:f"), wanted="reward 'mine.py:f' cannot be imported")


def test_a_reward_that_breaks_at_once_leaves_nothing(refused, write_settings, tmp_path):
    """Nor is it said that resume would help."""
    (tmp_path / "mine.py").write_text(REWARDS)
    wanted = r"reward 'later' returned nan for image 0 \(prompt '.*'\): every score must be finite$"
    refused("train", write_settings(reward="mine.py:later"), wanted=wanted)


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()


def cut_weights(path):
    file = next((path / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


SCHEDULER = "scheduler/scheduler_config.json"
DAMAGES = {
    "no index": (empty_folder, "model='model': the folder has no model_index.json"),
    "another class": (
        edit_json("model_index.json", _class_name="FluxPipeline"),
        "/model' is a FluxPipeline, which is not supported: use one of StableDiffusionPipeline",
    ),
    "weights cut off": (cut_weights, "/model' could not be loaded: "),
    "vae missing": (lambda p: shutil.rmtree(p / "vae"), "/model' is incomplete: the folder has no vae/"),
    "index broken": (lambda p: (p / "model_index.json").write_text("{"), "/model' could not be loaded: "),
    "prediction type": (edit_json(SCHEDULER, prediction_type="flow"), "prediction_type='flow' is not one of"),
    "thresholding": (edit_json(SCHEDULER, thresholding=True), "dynamic thresholding"),
    "too few timesteps": (edit_json(SCHEDULER, num_train_timesteps=1), "steps=2 must lie between 1 and num_train_time"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_model_folder_that_cannot_be_used(refused, write_settings, model, case):
    damage, wanted = DAMAGES[case]
    damage(model)
    refused("train", write_settings(model="model"), wanted=wanted)


def test_more_steps_than_the_model_was_trained_with(refused, write_settings):
    wanted = "steps=1001 must lie between 1 and num_train_timesteps=1000"
    refused("train", write_settings(), "sampler.steps=1001", wanted=wanted)


def test_models_of_another_kind(refused, write_settings, tiny_inpainting, tiny_language_model):
    refused("train", write_settings(model=str(tiny_inpainting)), wanted="inpainting")
    wanted = "model='.*'.* the folder has no model_index.json: .* a language model needs a text method such as grpo"
    refused("train", write_settings(model=str(tiny_language_model)), wanted=wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp16_on_a_cpu(refused, write_settings):
    refused("train", write_settings(), "mixed_precision=fp16", wanted="mixed_precision='fp16' needs a GPU")


# -- run folders -------------------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_used(refused, write_settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    config = write_settings()
    refused("train", config, wanted="output_dir='run' is already used: choose another, or set resume=true")
    refused("train", config, "resume=true", wanted="resume=true, but output_dir='run' is not a run folder")


@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        ("tiny.yaml", "output_dir='tiny.yaml' cannot be made: tiny.yaml is a file"),
        ("tiny.yaml/run", "output_dir='tiny.yaml/run' cannot be made: tiny.yaml is a file"),
        ("/proc/nowhere/run", "output_dir='/proc/nowhere/run' is not writable: "),
        ("x" * 300, "is not writable: File name too long"),
    ],
    ids=["a file", "below a file", "read-only", "name too long"],
)
def test_an_output_folder_that_cannot_be_made(refused, write_settings, folder, wanted):
    refused("train", write_settings(output_dir=folder), wanted=wanted)


def test_a_home_relative_output_folder_is_not_made_here(cli, write_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    outcome = cli("train", write_settings(output_dir="~/run"))
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "home" / "run" / "final").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.fixture(scope="module")
def finished_run(tiny_sd, finish):
    """A run of two epochs with a checkpoint after each, and its settings."""
    return finish(IMAGE_RUN | {"model": str(tiny_sd), "epochs": 2, "checkpoint_every": 1})


@pytest.fixture
def finished(finished_run, write_settings, tmp_path):
    """The configuration of a finished run of which run/ is a copy."""
    folder, settings = finished_run
    shutil.copytree(folder, tmp_path / "run")
    return write_settings(**settings)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("learning_rate=0.1", "belongs to another run: learning_rate was 0.0003 and is 0.1; put it back or choose"),
        ("lora.rank=4", "belongs to another run: lora was .*'rank': 2.* and is .*'rank': 4"),
        ("seed=1", "belongs to another run: seed was 0 and is 1"),
        ("model=emoji-sd", "belongs to another run: model was .* and is 'emoji-sd'"),
        ("lora=null", "belongs to another run: lora was .* and is None"),
        ("reward=jpeg_incompressibility", "belongs to another run: reward was 'jpeg_compressibility'"),
        ("prompts=[a dog]", "belongs to another run: prompts was .* and is .'a dog'"),
        ("sampler.steps=3", "belongs to another run: sampler was"),
        ("ema_decay=0.9", "belongs to another run: ema_decay was None and is 0.9"),
    ],
)
def test_resume_from_another_run(refused, finished, override, wanted):
    refused("train", finished, "resume=true", "epochs=3", override, wanted=wanted)


def newest(tmp_path):
    return sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]


@pytest.mark.parametrize("name", ["trained.safetensors", "tensors.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint(cli, refused, finished, tmp_path, name, how):
    file = newest(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    if (name, how) == ("manifest.json", "gone"):  # not a finished checkpoint: the one before serves
        outcome = cli("train", finished, "resume=true", "epochs=3")
        assert outcome.status == 0, outcome.err
        return
    wanted = "is damaged .*delete it to resume from the one before"
    refused("train", finished, "resume=true", "epochs=3", wanted=wanted)


def test_an_emptied_manifest(refused, finished, tmp_path):
    (newest(tmp_path) / "manifest.json").write_text("{}")
    (newest(tmp_path) / "tensors.pt").unlink()
    refused("train", finished, "resume=true", "epochs=3", wanted="is damaged")


def test_a_run_folder_whose_config_is_gone_or_broken(refused, finished, tmp_path):
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    refused("train", finished, "resume=true", wanted="config.yaml cannot be read: choose a new output_dir")
    (tmp_path / "run" / "config.yaml").unlink()
    refused("train", finished, "resume=true", wanted="is not a run folder: it has no config.yaml")


def test_resume_with_nothing_to_resume_starts(cli, write_settings, tiny_sd):
    outcome = cli("train", write_settings(model=str(tiny_sd)), "resume=true")
    assert outcome.status == 0, outcome.err
