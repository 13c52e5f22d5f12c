"""What is found only with the model, the reward or a run folder at hand: one sentence each, exit 2, no half."""

import shutil

import pytest
import torch

from tests.helpers.problems import assert_problem
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


@pytest.mark.parametrize("function", ["too_short", "nan", "raises", "NoCall", "absent", "torch", "later"])
def test_a_reward_that_answers_nonsense(refused, golden, write_settings, tmp_path, function):
    """``later`` breaks the run at once: nothing is left, and it is not said that resume would help."""
    (tmp_path / "mine.py").write_text(REWARDS)
    golden(f"reward: {function}", refused("train", write_settings(reward=f"mine.py:{function}")))


@pytest.mark.parametrize("text", ["import no_such_package\n", "def f(images\n", "1 / 0\n"])
def test_a_reward_file_that_cannot_be_imported(refused, golden, write_settings, tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    golden(f"reward file: {text}", refused("train", write_settings(reward="mine.py:f")))


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()


def cut_weights(path):
    file = next((path / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


SCHEDULER = "scheduler/scheduler_config.json"
DAMAGES = {
    "no index": empty_folder,
    "another class": edit_json("model_index.json", _class_name="KandinskyPipeline"),
    "weights cut off": cut_weights,
    "vae missing": lambda p: shutil.rmtree(p / "vae"),
    "index broken": lambda p: (p / "model_index.json").write_text("{"),
    "prediction type": edit_json(SCHEDULER, prediction_type="flow"),
    "thresholding": edit_json(SCHEDULER, thresholding=True),
    "too few timesteps": edit_json(SCHEDULER, num_train_timesteps=1),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_model_folder_that_cannot_be_used(refused, golden, write_settings, model, case):
    DAMAGES[case](model)
    golden(f"model: {case}", refused("train", write_settings(model="model")))


def test_more_steps_than_the_model_was_trained_with(refused, write_settings):
    assert_problem(
        refused("train", write_settings(), "sampler.steps=1001"), "sampler.steps", "num_train_timesteps=1000"
    )


def test_models_of_another_kind(refused, golden, write_settings, tiny_inpainting, tiny_language_model):
    for model in (tiny_inpainting, tiny_language_model):
        golden(f"model: {model.name}", refused("train", write_settings(model=str(model))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp16_on_a_cpu(refused, write_settings):
    assert_problem(refused("train", write_settings(), "mixed_precision=fp16"), "mixed_precision", "needs a GPU")


# -- run folders -------------------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_used(refused, write_settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    config = write_settings()
    assert_problem(refused("train", config), "output_dir", "already used")
    assert_problem(refused("train", config, "resume=true"), "resume=true", "not a run folder")


@pytest.mark.parametrize("folder", ["tiny.yaml", "tiny.yaml/run", "/proc/nowhere/run", "x" * 300])
def test_an_output_folder_that_cannot_be_made(refused, golden, write_settings, folder):
    golden(f"output_dir: {folder}", refused("train", write_settings(output_dir=folder)))


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
    "override",
    [
        "learning_rate=0.1",
        "lora.rank=4",
        "seed=1",
        "model=emoji-sd",
        "lora=null",
        "reward=jpeg_incompressibility",
        "prompts=[a dog]",
        "sampler.steps=3",
        "ema_decay=0.9",
    ],
)
def test_resume_from_another_run(refused, golden, finished, override):
    golden(f"resume: {override}", refused("train", finished, "resume=true", "epochs=3", override))


def newest(tmp_path):
    return sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]


DAMAGED = "delete it to resume from the one before"


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
    assert_problem(refused("train", finished, "resume=true", "epochs=3"), f"checkpoint {file.parent}", DAMAGED)


def test_an_emptied_manifest(refused, finished, tmp_path):
    (newest(tmp_path) / "manifest.json").write_text("{}")
    (newest(tmp_path) / "tensors.pt").unlink()
    assert_problem(refused("train", finished, "resume=true", "epochs=3"), f"checkpoint {newest(tmp_path)}", DAMAGED)


def test_a_run_folder_whose_config_is_gone_or_broken(refused, finished, tmp_path):
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    assert_problem(refused("train", finished, "resume=true"), "resume=true", "config.yaml cannot be read")
    (tmp_path / "run" / "config.yaml").unlink()
    assert_problem(refused("train", finished, "resume=true"), "resume=true", "no config.yaml")


def test_resume_with_nothing_to_resume_starts(cli, write_settings, tiny_sd):
    outcome = cli("train", write_settings(model=str(tiny_sd)), "resume=true")
    assert outcome.status == 0, outcome.err
