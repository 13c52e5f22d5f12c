"""build_text_reward and declare: the forms of a spec, and one sentence for every wrong one."""

import re

import pytest
import torch
from rewarding import refusal

from diffusion_align.rewards import (
    IMAGES,
    REWARDS,
    TEXT,
    RewardError,
    build_reward,
    build_text_reward,
    call_text_reward,
    declare,
)
from diffusion_align.rewards.text.base import TrainerState, extras_of

CODE = """
def shout(completions, gain=1.0, **kwargs):
    return [gain * sum(c.isupper() for c in completion) for completion in completions]

def correct(prompts, completions, answer):
    return [None if a is None else float(a in c) for c, a in zip(completions, answer)]

def mute(prompts):
    return [0.0] * len(prompts)

def by_place(completions, /):
    return [0.0] * len(completions)

def picture(images, prompts, metadata):
    return [0.0] * len(images)

def graded(prompts, completions, answer):
    return [0.0] * len(completions)

class Judge:
    def __init__(self, *, device="nowhere", weight=1.0, model="none"):
        self.device, self.weight, self.model = device, weight, model

    def __call__(self, completions, level):
        return [self.weight * value for value in level]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def scores(reward, **columns):
    return call_text_reward(reward, ["p"] * 3, ["Ab", "CDe", ""], columns).tolist()


def test_functions_classes_and_options(file):
    assert scores(build_text_reward(f"{file}:shout")) == [1, 2, 0]
    louder = build_text_reward({"name": f"{file}:shout", "gain": 3.0})
    assert louder.name == "shout"
    assert scores(louder, gain=[0, 0, 0], other=[1, 2, 3]) == [3, 6, 0]
    fixed = build_text_reward({"name": f"{file}:correct", "answer": ["b", "x", None]})
    assert scores(fixed)[:2] == [1, 0]
    judge = build_text_reward({"name": f"{file}:Judge", "weight": 2.0, "model": "m"}, device="meta")
    assert (judge.device, judge.weight, judge.model) == ("meta", 2.0, "m")
    assert scores(judge, level=[1, 2, 3]) == [2, 4, 6]
    assert scores(build_text_reward(lambda completions: [1.0] * len(completions))) == [1, 1, 1]


def test_scale_turns_the_sign_keeps_none_and_passes_columns(file):
    reward = build_text_reward({"name": f"{file}:correct", "scale": -2})
    assert reward.name == "-2*correct"
    found = scores(reward, answer=["b", "x", None], unused=[1, 2, 3])
    assert found[:2] == [-2, 0]
    assert found[2] != found[2]
    with pytest.raises(RewardError, match=r"reward 'correct' needs 'answer', .* it has 'level'"):
        scores(reward, level=[1, 2, 3])


def test_a_scaled_reward_gets_what_the_one_inside_names(file):
    """And no more, so that nobody makes tokens for nothing."""

    def tokens(completion_ids, completions, **columns):
        assert columns == {"prompts": ["p"] * 3, "level": [1, 2, 3]}
        return [float(len(ids)) for ids in completion_ids]

    def steps(completions, trainer_state):
        return [float(trainer_state.global_step)] * len(completions)

    def call(spec, columns):
        reward = build_text_reward(spec)
        extras = {"completion_ids": [[1], [2, 3], []], "trainer_state": TrainerState(5, 0.0, 9)}
        return extras_of(reward), call_text_reward(reward, ["p"] * 3, ["a", "b", ""], columns, **extras).tolist()

    assert call({"name": tokens, "scale": -2}, {"level": [1, 2, 3]}) == (["completion_ids"], [-2, -4, 0])
    assert call({"name": steps, "scale": 2}, {"level": [1, 2, 3]}) == (["trainer_state"], [10, 10, 10])
    column = {"completion_ids": ["b", "x", "y"], "answer": ["a", "x", "y"]}
    assert call({"name": f"{file}:correct", "scale": 3}, column) == ([], [3, 0, 0])
    with pytest.raises(RewardError, match="reward '2\\*tokens' needs 'completion_ids'"):
        scores(build_text_reward({"name": tokens, "scale": 2}))

    def either(completions, completion_ids=None):
        return [float(len(c)) for c in completion_ids or completions]

    assert scores(build_text_reward({"name": either, "scale": 2})) == [4, 6, 0]


def test_scale_and_device_reach_a_wrapped_model():
    class Holder(torch.nn.Module):
        def forward(self, completions):
            return torch.ones(len(completions))

        def to(self, device):
            self.moved = device
            return self

    reward = build_text_reward({"name": Holder(), "scale": 3.0}, device="cpu")
    assert reward.reward.moved == "cpu"
    reward.to("meta")
    assert reward.reward.moved == "meta"
    assert scores(reward) == [3, 3, 3]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("lenght", "unknown reward 'lenght': did you mean 'length'. There are classifier, exact_match"),
        ("zzz", "unknown reward 'zzz': there are classifier, .* or your own as 'module:function'"),
        ("aesthetic", "reward 'aesthetic' scores images, not text: there are classifier"),
        ("{file}:mute", "'mute' must take the argument 'completions' by name"),
        ("{file}:by_place", "'by_place' must take the argument 'completions' by name"),
        ("{file}:picture", "'picture' takes 'images', so it scores images, not text"),
        ("{file}:shuot", "has no 'shuot': did you mean 'shout'"),
        (
            {"name": "{file}:correct", "anwser": 1},
            "has no option 'anwser': did you mean 'answer'. It takes answer, background, scale",
        ),
        ({"name": "{file}:Judge", "wieght": 1}, "did you mean 'weight'"),
        (3, "got int"),
    ],
)
def test_a_bad_spec_is_one_sentence(spec, sentence, file):
    if isinstance(spec, str):
        spec = spec.replace("{file}", str(file))
    elif isinstance(spec, dict):
        spec = {**spec, "name": spec["name"].replace("{file}", str(file))}
    assert re.search(sentence, refusal(build_text_reward, spec))


def test_a_text_reward_where_one_for_images_is_wanted(file):
    from diffusion_align.rewards.image.jpeg import JpegCompressibility
    from diffusion_align.rewards.text.length import Length

    there_are = ", ".join(REWARDS)
    assert refusal(declare, IMAGES, "length").startswith(
        f"reward 'length' scores text, not images: there are {there_are}"
    )
    assert "takes 'completions', so it scores text, not images" in refusal(declare, IMAGES, f"{file}:graded")
    assert "takes 'completions', so it scores text, not images" in refusal(declare, IMAGES, build_text_reward("length"))
    assert "takes 'images', so it scores images" in refusal(declare, TEXT, build_reward("jpeg_compressibility"))
    assert "scores text, not images: choose another" in refusal(declare, IMAGES, Length)
    assert "scores images, not text: choose another" in refusal(declare, TEXT, JpegCompressibility)
