"""build_reward, build_text_reward and declare: names, references, options, scale; every refusal is one sentence."""

import os

import pytest
import torch

from diffusion_align.rewards import (
    IMAGES,
    TEXT,
    RewardError,
    build_reward,
    build_text_reward,
    call_text_reward,
    declare,
)
from diffusion_align.rewards.base import reward_parts
from diffusion_align.rewards.build import user_modules
from diffusion_align.rewards.text.base import TrainerState, extras_of
from tests.helpers.rewarding import levels, refusal, score

CODE = """
calls = 0

def redness(images, prompts, metadata, gain=1.0):
    return (gain * images[:, 0].mean(dim=(1, 2))).tolist()

def one(images):
    return [0.0] * len(images)

def needy(images, prompts, metadata, *, target):
    return [target] * len(images)

class Judge:
    def __init__(self, *, model, device="nowhere", weight=1.0):
        self.model, self.device, self.weight = model, device, weight

    def __call__(self, images, prompts, metadata):
        return [self.weight] * len(images)

class Mute:
    pass

class Broken:
    def __init__(self):
        raise OSError("no such weights")

table = {}

def shout(completions, gain=1.0, **kwargs):
    return [gain * sum(c.isupper() for c in completion) for completion in completions]

def correct(prompts, completions, answer):
    return [None if a is None else float(a in c) for c, a in zip(completions, answer)]

def without_completions(prompts):
    return [0.0] * len(prompts)

def by_place(completions, /):
    return [0.0] * len(completions)

def image(images, prompts, metadata):
    return [0.0] * len(images)

def graded(prompts, completions, answer):
    return [0.0] * len(completions)

class TextJudge:
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


def scores(reward):
    return score(reward, levels(3), ["a", "b", "c"])


def text_scores(reward, **columns):
    return call_text_reward(reward, ["p"] * 3, ["Ab", "CDe", ""], columns).tolist()


def test_a_file_a_function_and_its_options(file):
    expected = levels(3)[:, 0].mean(dim=(1, 2))
    torch.testing.assert_close(scores(build_reward(f"{file}:redness")).float(), expected)
    doubled = build_reward({"name": f"{file}:redness", "gain": 2.0})
    torch.testing.assert_close(scores(doubled).float(), 2 * expected)
    assert doubled.name == "redness"


def test_scale_turns_the_sign_of_any_reward(file):
    flipped = build_reward({"name": f"{file}:redness", "scale": -1.0})
    torch.testing.assert_close(scores(flipped).float(), -levels(3)[:, 0].mean(dim=(1, 2)))
    assert flipped.name == "-1*redness"
    compress, bloat = build_reward("jpeg_compressibility"), build_reward("jpeg_incompressibility")
    assert torch.equal(scores(build_reward({"name": "jpeg_compressibility", "scale": -1})), scores(bloat))
    assert torch.equal(scores(compress), -scores(bloat))


def test_scale_does_not_hide_a_wrong_answer():
    single = build_reward({"name": lambda images, prompts, metadata: [1.0], "scale": -1.0})
    with pytest.raises(RewardError, match="not broadcast"):
        scores(single)


def test_a_class_is_built_with_its_options_and_the_context(file):
    judge = build_reward({"name": f"{file}:Judge", "weight": 3.0}, model="emoji-sd", device="cpu")
    assert (judge.model, judge.device, judge.weight) == ("emoji-sd", "cpu", 3.0)
    assert build_reward({"name": f"{file}:Judge", "device": "meta"}).device == "meta"
    assert scores(judge).tolist() == [3.0] * 3


def test_a_module_reference_and_a_callable():
    from diffusion_align.rewards.base import as_scores

    assert build_reward("diffusion_align.rewards.base:as_scores") is as_scores
    reward = build_reward(lambda images, prompts, metadata: [0.5] * len(images))
    assert scores(reward).tolist() == [0.5] * 3


def test_our_own_builder_as_a_callable_is_built():
    from diffusion_align.rewards.image.jpeg import JpegCompressibility

    assert torch.equal(scores(build_reward(JpegCompressibility)), scores(build_reward("jpeg_compressibility")))


def test_a_file_runs_once_for_check_and_build_and_again_when_it_changed(file, tmp_path):
    file.write_text(CODE + f"\nwith open({str(tmp_path / 'log')!r}, 'a') as log: log.write('x')\n")
    declare(IMAGES, f"{file}:redness")
    build_reward(f"{file}:redness")
    assert (tmp_path / "log").read_text() == "x"
    file.write_text("def redness(images, prompts, metadata):\n    return [7.0] * len(images)\n")
    os.utime(file, ns=(1, 1))  # another time than before, however coarse the clock is
    assert scores(build_reward(f"{file}:redness")).tolist() == [7.0] * 3


def test_a_model_held_by_a_callable_is_moved():
    class Holder(torch.nn.Module):
        def forward(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

        def to(self, device):
            self.moved = device
            return self

    holder = Holder()
    assert build_reward(holder, device="cpu") is holder
    assert holder.moved == "cpu"


def test_text_functions_classes_and_options(file):
    assert text_scores(build_text_reward(f"{file}:shout")) == [1, 2, 0]
    louder = build_text_reward({"name": f"{file}:shout", "gain": 3.0})
    assert louder.name == "shout"
    assert text_scores(louder, gain=[0, 0, 0], other=[1, 2, 3]) == [3, 6, 0]
    fixed = build_text_reward({"name": f"{file}:correct", "answer": ["b", "x", None]})
    assert text_scores(fixed)[:2] == [1, 0]
    judge = build_text_reward({"name": f"{file}:TextJudge", "weight": 2.0, "model": "m"}, device="meta")
    assert (judge.device, judge.weight, judge.model) == ("meta", 2.0, "m")
    assert text_scores(judge, level=[1, 2, 3]) == [2, 4, 6]
    assert text_scores(build_text_reward(lambda completions: [1.0] * len(completions))) == [1, 1, 1]


def test_scale_turns_the_sign_keeps_none_and_passes_columns(file):
    reward = build_text_reward({"name": f"{file}:correct", "scale": -2})
    assert reward.name == "-2*correct"
    found = text_scores(reward, answer=["b", "x", None], unused=[1, 2, 3])
    assert found[:2] == [-2, 0]
    assert found[2] != found[2]
    with pytest.raises(RewardError, match=r"reward 'correct' needs 'answer', but the data has 'level': set"):
        text_scores(reward, level=[1, 2, 3])


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
        text_scores(build_text_reward({"name": tokens, "scale": 2}))

    def either(completions, completion_ids=None):
        return [float(len(c)) for c in completion_ids or completions]

    assert text_scores(build_text_reward({"name": either, "scale": 2})) == [4, 6, 0]


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
    assert text_scores(reward) == [3, 3, 3]


def test_a_text_reward_where_one_for_images_is_wanted(file):
    from diffusion_align.rewards.image.jpeg import JpegCompressibility
    from diffusion_align.rewards.text.length import Length

    for spec in ("length", f"{file}:graded", build_text_reward("length"), Length):
        assert "scores text, not images" in refusal(declare, IMAGES, spec)
    for spec in ("aesthetic", f"{file}:image", build_reward("jpeg_compressibility"), JpegCompressibility):
        assert "scores images, not text" in refusal(declare, TEXT, spec)


BAD: list = ["jpeg_compresibility", "clipscore", "zzz", "", ":f", "module:", "no_such_module_here:f", "os.path:joim"]
BAD += ["os:environ", "nowhere/x.py:f", "{file}:rednes", "{file}:one", "{file}:needy", 3, None, {"quality": 3}]
BAD += [{"name": 3}, {"name": "{file}:redness", "gian": 2.0}, {"name": "{file}:Judge", "wieght": 2.0}]
BAD_TEXT: list = ["lenght", "zzz", "aesthetic", *(f"{{file}}:{name}" for name in ("without_completions", "by_place"))]
BAD_TEXT += ["{file}:image", {"name": "{file}:correct", "anwser": 1}, {"name": "{file}:TextJudge", "wieght": 1}]


@pytest.mark.parametrize(
    ("build", "spec"), [*((build_reward, spec) for spec in BAD), *((build_text_reward, spec) for spec in BAD_TEXT)]
)
def test_a_bad_spec_is_one_sentence(build, spec, file, golden):
    def placed(value):
        return value.replace("{file}", str(file)) if isinstance(value, str) else value

    given = {key: placed(value) for key, value in spec.items()} if isinstance(spec, dict) else placed(spec)
    golden(f"{build.__name__}({spec!r})", refusal(build, given))


def test_a_file_that_fails_is_one_sentence_and_is_forgotten(tmp_path):
    path = tmp_path / "failing.py"
    path.write_text("import no_such_module_here\n")
    for _ in range(2):
        assert "ModuleNotFoundError" in refusal(declare, IMAGES, f"{path}:f")
    path.write_text("def f(:\n")
    assert "SyntaxError" in refusal(declare, IMAGES, f"{path}:f")


def test_a_module_name_for_a_file_here_gets_the_hint(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert "for a file in this folder write 'mine.py:redness'" in refusal(declare, IMAGES, "mine:redness")
    declare(IMAGES, "mine.py:redness")


def test_what_fails_while_building_names_the_reward(file):
    with pytest.raises(RewardError, match=r"reward 'Broken' .*OSError: no such weights"):
        build_reward(f"{file}:Broken")
    with pytest.raises(RewardError, match="'Mute' is a Mute, which is not callable: define __call__"):
        build_reward(f"{file}:Mute")


def test_every_part_of_a_sum_has_its_own_name():
    def make(name):
        def reward(images, prompts, metadata):
            return [0.0] * len(images)

        reward.__name__ = name
        return reward

    parts = reward_parts(build_reward([make("a"), make("a"), make("a_2"), make("a")]))
    assert list(parts) == ["a", "a_2", "a_2_2", "a_3"]


def test_an_option_called_rewards_is_one_of_a_sum_alone(file):
    """Of your own reward it is whatever you make of it: no module is looked for in it."""
    ours = f"{file}:redness"
    (module,) = user_modules(ours)
    assert user_modules({"name": "combine", "rewards": [ours, "jpeg_compressibility"]}) == [module]
    for value in (3, ["http://127.0.0.1:9/x"], None):
        assert user_modules({"name": ours, "rewards": value}) == [module]
