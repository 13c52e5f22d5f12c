"""The last lines of a run: its result, and commands that run when they are pasted."""

import shlex

import pytest

from diffusion_align.yaml_text import dump
from tests.helpers.tiny_runs import IMAGE_RUN

TEXT_RUN = {
    **{"method": "grpo", "model": "tiny-lm", "reward": "length", "prompts": ["And the king said", "It's"]},
    **{"output_dir": "run", "epochs": 2, "samples_per_epoch": 4, "group_size": 2, "sample_batch_size": 4},
    **{"max_completion_length": 4, "lora": {"rank": 2}, "grid_every": 0, "num_threads": 1},
}
SCORES = {"model": "tiny-lm", "method": "reward_model", "epochs": 1, "samples_per_epoch": 2, "lora": {"rank": 2}}
PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}
SCORES |= {"dataset": [PAIR] * 2, "sample_batch_size": 2, "updates_per_epoch": 1, "output_dir": "run", "grid_every": 0}


@pytest.fixture
def last_lines(forked, tmp_path):
    """``last_lines(settings)``: what a run in ``tmp_path`` prints behind its epochs."""

    def train(settings):
        (tmp_path / "a recipe.yaml").write_text(dump(settings))
        run = forked.finish("train", "a recipe.yaml", "output_dir=it's a run", cwd=tmp_path)
        lines = run.outputs[0].splitlines()
        return lines[[line.startswith(("finished ", "stopped ")) for line in lines].index(True) :]

    return train


def verbs(lines):
    words = [shlex.split(line) for line in lines]
    return [line[1] if line[0] == "diffusion-align" else line[0] for line in words]


@pytest.mark.parametrize(
    ("settings", "commands"),
    [
        (IMAGE_RUN | {"epochs": 2}, ["xdg-open", "sample", "compare", "export", "train"]),
        (
            TEXT_RUN,
            ["xdg-open", "complete", "compare", "export", "train"],
        ),
    ],
)
def test_every_command_runs(last_lines, forked, tmp_path, settings, commands):
    end, result, weights, *lines = last_lines(settings)
    assert (end, weights) == ("finished 2 epochs", "the weights are in it's a run/final; next:")
    assert result.startswith("reward ")
    assert result.endswith("(samples trained on in epochs 1 and 2)")
    assert verbs(lines) == commands
    assert all(line.startswith("  ") for line in lines)
    page, *others = (shlex.split(line) for line in lines)
    assert (tmp_path / page[1]).is_file()
    for words in others:
        run = forked(*words[1:], cwd=tmp_path)
        assert run.status == 0, (words, run.error)
    assert (tmp_path / "model" / ("model_index.json" if "sample" in commands else "config.json")).is_file()
    assert "finished 4 epochs" in run.outputs[0]


def test_what_cannot_be_pasted_is_not_offered(last_lines):
    """A judge that is no name; more epochs under a schedule that has an end; samples of a reward model."""
    reward = {"name": "jpeg_compressibility", "scale": 2.0}
    lines = last_lines(IMAGE_RUN | {"reward": reward, "lr_schedule": "cosine"})
    assert lines[:2] == ["finished 1 epoch", "the weights are in it's a run/final; next:"]
    assert verbs(lines[2:]) == ["xdg-open", "sample", "export"]


def test_a_reward_model_is_neither_sampled_nor_compared(last_lines):
    assert verbs(last_lines(SCORES)[2:]) == ["xdg-open", "train"]


STOP = """
from diffusion_align.training.callbacks import Callback

class Stop(Callback):
    def on_epoch_end(self, trainer, row):
        return "enough"
"""


def test_a_run_that_was_stopped_says_why_and_does_not_go_on(last_lines, tmp_path):
    (tmp_path / "stop.py").write_text(STOP)
    lines = last_lines(IMAGE_RUN | {"epochs": 9, "callbacks": ["stop.py:Stop"]})
    assert lines[0] == "stopped after epoch 1 of 9: enough"
    assert "train" not in verbs(lines[2:])
