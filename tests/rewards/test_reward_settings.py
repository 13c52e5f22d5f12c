"""Options declared in a class: check, builder and listing come from it, for shipped rewards and a user's."""

import subprocess
import sys

import pytest
import torch

from diffusion_align.llm.settings import TextEvaluationConfig
from diffusion_align.rewards import (
    REWARDS,
    TEXT_REWARDS,
    RewardError,
    RewardSettings,
    build_reward,
    build_text_reward,
    call_reward,
    call_text_reward,
    declare,
    describe_rewards,
    describe_text_rewards,
)
from diffusion_align.rewards.base import runs_in_background
from diffusion_align.rewards.build import IMAGES, TEXT, find
from diffusion_align.rewards.image.jpeg import JpegCompressibility
from diffusion_align.rewards.settings import describe_options
from diffusion_align.rewards.text.length import Length
from tests.helpers.rewarding import refusal

CODE = '''
from typing import Literal

from pydantic import Field, field_validator

from diffusion_align.rewards import RewardError, RewardSettings


class Brightness(RewardSettings):
    """How close the mean brightness is to a target."""

    target: float = Field(0.5, ge=0, le=1, description="wanted brightness")
    channel: Literal["red", "green"] = Field("red", description="which is looked at")

    def __call__(self, images, prompts, metadata):
        return -(images[:, ["red", "green"].index(self.channel)].mean((1, 2)) - self.target).abs()


class Loaded(RewardSettings):
    size: int = Field(gt=0, description="of its network")

    @field_validator("size")
    @classmethod
    def _even(cls, size):
        if size == 7:
            raise RewardError("sevens are never even")
        if size % 2:
            raise ValueError("it must be even")
        return size if 1 / (size - 2) else 0

    def build(self, *, model=None, device="cpu"):
        network = lambda images, prompts: [float(self.size)] * len(images)
        network.came_with = (model, device)
        return network


class Shout(RewardSettings):
    gain: float = Field(1.0, description="per capital")

    def __call__(self, completions, level, **columns):
        return [self.gain * sum(map(str.isupper, text)) + more for text, more in zip(completions, level)]


def quiet(completions):
    return [0.0] * len(completions)
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def scores(reward):
    images = torch.full((2, 3, 8, 8), 0.4)
    return call_reward(reward, images, ["a", "b"], [{}, {}]).tolist()


def test_a_class_that_can_be_called_is_the_reward(file):
    assert scores(build_reward(f"{file}:Brightness")) == pytest.approx([-0.1, -0.1])
    reward = build_reward({"name": f"{file}:Brightness", "target": 0, "scale": 2.0})
    assert scores(reward) == pytest.approx([-0.8, -0.8])
    assert reward.name == "2*Brightness"
    temporary = build_reward({"name": f"{file}:Brightness", "background": True})
    assert runs_in_background(temporary)
    assert scores(temporary) == pytest.approx([-0.1, -0.1])


def test_a_class_that_builds_gets_the_model_and_the_device(file):
    reward = build_reward({"name": f"{file}:Loaded", "size": 4}, model="emoji-sd", device="cpu")
    assert scores(reward) == [4, 4]
    assert reward.came_with == ("emoji-sd", "cpu")


def test_a_text_reward_with_settings(file):
    reward = build_text_reward({"name": f"{file}:Shout", "gain": 3})
    assert call_text_reward(reward, ["p", "p"], ["AbC", ""], {"level": [1, 2]}).tolist() == [7, 2]
    said = refusal(build_text_reward, {"name": f"{file}:Shout", "gain": "much"})
    assert "gain='much' is not allowed" in said


WRONG = [("Brightness", {"target": value}) for value in (2, True, 10**400)]
WRONG += [("Brightness", {"chanel": "red"}), ("Brightness", {"channel": "blue"}), ("Loaded", {})]
WRONG += [("Loaded", {"size": size}) for size in (2, 3, 7)]


@pytest.mark.parametrize(("name", "options"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_one_sentence(name, options, file, golden):
    golden(f"{name} {options}", refusal(build_reward, {"name": f"{file}:{name}", **options}))


def test_from_python_the_sentences_are_the_same():
    spec = {"name": "jpeg_compressibility", "quality": 0}
    assert refusal(JpegCompressibility, quality=0) == refusal(build_reward, spec)
    ours = build_reward(JpegCompressibility(quality=30))
    assert scores(ours) == scores(build_reward({"name": "jpeg_compressibility", "quality": 30}))


def test_settings_that_are_no_reward_are_built(file):
    settings = find(f"{file}:Loaded", IMAGES)[1](size=6)
    assert scores(build_reward(settings)) == [6, 6]


def test_settings_take_no_options_beside_them():
    with pytest.raises(RewardError, match=r"has its own options: give target to it"):
        build_text_reward({"name": Length(), "target": 4})


def test_options_are_described_with_their_values(file, golden):
    for name in ("Brightness", "Loaded"):
        described = describe_options(find(f"{file}:{name}", IMAGES)[1])
        golden(f"options of {name}", [f"{option} {values}" for option, values in described.items()])
    [jpeg] = [row for row in describe_rewards() if row["name"] == "jpeg_compressibility"]
    assert jpeg["options"] == describe_options(JpegCompressibility)


DOWNLOADED = {"pick_score": "yuvalkirstain/PickScore_v1", "hps_v2": "xswu/HPSv2", "image_reward": "zai-org/ImageReward"}


@pytest.mark.parametrize(("name", "kind"), [*((n, IMAGES) for n in REWARDS), *((n, TEXT) for n in TEXT_REWARDS)])
def test_every_shipped_reward_declares_and_describes_itself(name, kind):
    _, settings = find(name, kind)
    assert issubclass(settings, RewardSettings)
    assert settings.name == name
    assert all(field.description for field in settings.model_fields.values())
    [row] = [row for row in describe_rewards() + describe_text_rewards() if row["name"] == name]
    about = {"range", "needs", "extra", "licence", *(("model", "cost", "differentiable") if kind is IMAGES else ())}
    assert set(row) == {"name", "description", *about, "options"}
    assert row["description"].endswith(".")
    assert list(row["options"]) == list(settings.model_fields)
    assert DOWNLOADED.get(name, "") in row.get("model", ""), "which doctor looks for"
    if kind is IMAGES and name != "combine":
        assert declare(kind, name).label == name


def test_importing_declaring_and_describing_is_light_and_reaches_no_trainer():
    heavy = ["transformers", "open_clip", "diffusers", "peft", "vaderSentiment", "sentence_transformers"]
    heavy += [f"diffusion_align.{name}" for name in ("diffusion", "llm", "training.trainer")]
    code = (
        "import sys, diffusion_align.rewards as r; r.declare(r.IMAGES, 'clip_score'); r.declare(r.TEXT, 'sentiment');"
        "r.describe_rewards(); r.describe_text_rewards(); r.build_text_reward('numeric_match');"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_settings_are_written_as_a_name_and_options(file):
    own = find(f"{file}:Shout", TEXT)[1](gain=3)
    given = [Length(target=3), Length(), {"name": Length(target=4), "scale": 2}, own, find(f"{file}:quiet", TEXT)[1]]
    written = TextEvaluationConfig(reward=given).model_dump()["reward"]
    named = {"name": "length"}
    ours = [named | {"target": 3.0}, named, named | {"target": 4.0, "scale": 2}]
    assert written == [*ours, {"name": f"{file}:Shout", "gain": 3.0}, f"{file}:quiet"]
