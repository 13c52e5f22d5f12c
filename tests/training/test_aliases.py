"""Other names of settings: given, overridden and read under any, checked and written under their own."""

from typing import Annotated, ClassVar, Literal

import pytest
import yaml
from accelerate import Accelerator
from pydantic import Field

from diffusion_align.cli.listing import grouped_settings
from diffusion_align.diffusion.ddpo_settings import DDPOConfig
from diffusion_align.diffusion.dpo_settings import DiffusionDPOConfig
from diffusion_align.errors import CheckpointError, ConfigError
from diffusion_align.pipelines.configuration import read_config
from diffusion_align.training.aliases import other_words
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.processes import Processes
from diffusion_align.training.reading import apply_overrides, dump_config, parse_config
from diffusion_align.training.resume import check_same_run
from diffusion_align.training.section import Section
from diffusion_align.yaml_text import parse


class Rare(Section):
    clip: float = Field(1.0, gt=0, description="a clip")
    mode: Literal["a", "b"] = Field("a", description="a mode")


class Looks(Section):
    aliases: ClassVar = {"pictures": "images"}
    images: int = Field(8, ge=1, description="how many")


class Base(TrainingConfig):
    aliases: ClassVar = {"beta": "kl_coef", "kl_penalty": "kl_coef"}
    kl_coef: float = Field(0.0, ge=0, description="price")
    looks: Looks = Field(default_factory=Looks, description="looks")
    level: Annotated[Literal["action", "sequence"], other_words(decision="action")] = Field("action", description="of")


class Config(Base):
    aliases: ClassVar = {"loser_clip": "experimental.clip", "mode": "experimental.mode"}
    experimental: Rare = Field(default_factory=Rare, description="rarely used")

    def cross_checks(self):
        if self.mode == "b" and self.beta == 0:
            yield "experimental.mode=b needs kl_coef"


BASE = {"model": "emoji-sd", "output_dir": "run"}
OLD = {"beta": 0.5, "looks": {"pictures": 3}, "loser_clip": 2.0, "mode": "b", "level": "decision"}
NEW = {"kl_coef": 0.5, "looks": {"images": 3}, "experimental": {"clip": 2.0, "mode": "b"}, "level": "action"}


def problems(make):
    with pytest.raises(ConfigError) as caught:
        make()
    return caught.value.problems


def test_settings_are_taken_under_any_name_and_written_under_their_own():
    text = yaml.safe_dump(BASE | OLD)
    wanted = Config(**BASE | NEW)
    for config in (
        Config(**BASE | OLD),
        parse_config(Config, yaml.safe_load(text)),
        parse_config(Config, parse(text, unread=True)),
        Config(**BASE | NEW | {"looks": Looks(pictures=3)}),
        Config(**BASE | OLD | {"experimental": Rare()}),
    ):
        assert config == wanted
        assert yaml.safe_load(dump_config(config)).items() >= NEW.items()
    assert not {"beta", "mode", "loser_clip"} & set(yaml.safe_load(dump_config(wanted)))


def test_settings_are_read_under_any_name():
    config = Config(**BASE | NEW)
    read = (config.beta, config.kl_penalty, config.looks.pictures, config.loser_clip, config.mode)
    assert read == (0.5, 0.5, 3, 2.0, "b")
    with pytest.raises(AttributeError):
        _ = config.pictures
    assert not hasattr(config, "betas")


def test_settings_are_copied_and_assigned_under_any_name():
    config = Config(**BASE | OLD)
    copied = config.model_copy(update={"beta": 0.1, "loser_clip": 3.0, "mode": "a", "seed": 1})
    assert copied == Config(**BASE | NEW | {"kl_coef": 0.1, "experimental": Rare(clip=3.0), "seed": 1})
    assert config == Config(**BASE | NEW), "the copy has changed what it was made of"
    config.kl_penalty, config.mode = 0.1, "a"
    assert config == Config(**BASE | NEW | {"kl_coef": 0.1, "experimental": Rare(clip=2.0)})
    with pytest.raises(ValueError, match="no field"):
        config.betas = 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"beta": 1, "kl_coef": 1}, "beta is another name of kl_coef: give one of them"),
        ({"beta": 1, "kl_penalty": 1}, "kl_penalty is another name of kl_coef: give one of them"),
        (
            {"looks": {"pictures": 1, "images": 2}},
            "looks.pictures is another name of looks.images: give one of them",
        ),
        (
            {"mode": "a", "experimental": {"mode": "a"}},
            "mode is another name of experimental.mode: give one of them",
        ),
        (
            {"mode": "a", "experimental": Rare(mode="a")},
            "mode is another name of experimental.mode: give one of them",
        ),
        ({"mode": "a", "experimental": 3}, "experimental=3 is not allowed: it must be a section of settings"),
        ({"beta": -1}, "kl_coef=-1 is not allowed"),
        ({"mode": "c"}, "experimental.mode='c' is not allowed"),
        ({"mode": "b"}, "experimental.mode=b needs kl_coef"),
        ({"loser_clop": 1}, "unknown setting 'loser_clop': did you mean 'loser_clip'?"),
        ({"looks": {"picture": 1}}, "unknown setting 'looks.picture': did you mean 'pictures'?"),
    ],
)
def test_one_sentence_about_what_is_wrong(given, sentence):
    for make in (lambda: Config(**BASE | given), lambda: parse_config(Config, BASE | given)):
        (found,) = problems(make)
        assert found.startswith(sentence)


def test_overrides_replace_what_a_recipe_set_under_another_name():
    def overridden(*overrides, of=NEW):
        return apply_overrides(of, overrides, section=Config)

    for recipe in (OLD, NEW):
        result = overridden("beta=0.1", "looks.pictures=5", "mode=a", "experimental.clip=3", of=recipe)
        assert Config(**BASE | result) == Config(**BASE | {"kl_coef": 0.1, "looks": {"images": 5}, "loser_clip": 3})
        assert "beta" not in result
        assert "mode" not in result
    assert overridden("kl_coef=1", "kl_coef=2")["kl_coef"] == 2
    both = "'beta' and 'kl_coef' are one setting: give one of them"
    assert problems(lambda: overridden("beta=1", "kl_coef=1")) == [both]
    place = "'looks.pictures' and 'looks.images' are one setting: give one of them"
    assert problems(lambda: overridden("looks.pictures=1", "looks.images=1")) == [place]
    assert overridden("looks.=1")["looks"] == {"images": 3, "": 1}, "a key that ends in a dot was taken for another"


def test_a_class_cannot_use_an_alias_for_another_setting():
    def declare():
        class Own(Config):
            beta: float = 0.1

    remedy = "choose another name, or define kl_coef to change its default"
    assert problems(declare) == [f"Own.beta is another name of kl_coef: {remedy}"]


def test_the_page_of_settings_shows_other_names():
    page = {name: (text, note) for group in grouped_settings(Config, "some") for name, text, note in group.rows}
    assert page["kl_coef"] == ("price", "default 0.0; also: beta, kl_penalty")
    assert page["looks.images"] == ("how many", "default 8; also: pictures")
    assert page["experimental.mode"] == ("a mode", "a | b; default a")


def test_experimental_settings_are_listed_last_and_a_section_that_comes_twice_once():
    class Twice(Config):
        more: Looks = Field(default_factory=Looks, description="looks again")

    groups = grouped_settings(Twice, "some")
    assert groups[-1].title.startswith("experimental: ")
    page = {name: note for group in groups for name, _, note in group.rows}
    assert page["more"] == "a section like looks"
    assert "more.images" not in page


def test_a_recipe_is_overridden_by_the_names_of_other_libraries_and_of_older_versions(tmp_path):
    config = read_config(
        "grpo_tiny", ["num_generations=4", "beta=0.5", "credit=to_go", "ratio_level=decision", f"output_dir={tmp_path}"]
    )
    assert (config.group_size, config.kl_coef, config.experimental.credit, config.ratio_level) == (
        4,
        0.5,
        "to_go",
        "token",
    )
    image = {"model": "emoji-sd", "output_dir": tmp_path, "prompts": ["a"], "reward": "jpeg_compressibility"}
    config = DDPOConfig(**image, beta=0.5, epsilon=0.2, num_generations=2, evaluation={"pictures": 3})
    assert (config.kl_coef, config.clip_range, config.group_size, config.evaluation.samples) == (0.5, 0.2, 2, 3)


def test_a_run_of_an_older_version_is_the_same_run(tmp_path):
    settings = {"model": "emoji-sd", "output_dir": tmp_path, "pairs": "emoji_style", "beta_dpo": 2000}
    rare = {"reward_mode": "signed_kl", "loser_weight": 0.5}
    config = DiffusionDPOConfig(**settings, variant="corrected", steps_per_pair=2, experimental=rare)
    theirs = yaml.safe_load(dump_config(config))
    theirs |= theirs.pop("experimental") | {"decisions_per_pair": theirs.pop("steps_per_pair")}
    here = Processes(Accelerator(cpu=True))
    check_same_run(config, {}, theirs, None, tmp_path / "config.yaml", here)
    with pytest.raises(CheckpointError, match=r"another run: experimental\.loser_weight was 0\.7 and is 0\.5;"):
        check_same_run(config, {}, theirs | {"loser_weight": 0.7}, None, tmp_path / "config.yaml", here)


def test_how_often_a_run_is_evaluated_may_change_and_nothing_else_of_its_evaluation(tmp_path):
    settings = {"model": "emoji-sd", "output_dir": tmp_path, "prompts": ["a lion"], "reward": "jpeg_compressibility"}
    config = DDPOConfig(**settings, evaluation={"samples": 4, "diversity": "pixels"})
    assert config.evaluation is not None
    assert config.evaluation.every == 10
    place, here = tmp_path / "config.yaml", Processes(Accelerator(cpu=True))
    theirs = yaml.safe_load(dump_config(config))
    check_same_run(config, {}, theirs | {"evaluation": theirs["evaluation"] | {"every": 1}}, None, place, here)
    with pytest.raises(CheckpointError, match="another run: evaluation was"):
        check_same_run(config, {}, theirs | {"evaluation": theirs["evaluation"] | {"samples": 5}}, None, place, here)


def test_a_section_called_experimental_may_be_anything_in_a_method_of_ones_own(tmp_path):
    class Own(TrainingConfig):
        experimental: bool = False

    config = Own(model="emoji-sd", output_dir=tmp_path, method="own:Trainer", experimental=True)
    theirs, place, here = config.model_dump(mode="json"), tmp_path / "config.yaml", Processes(Accelerator(cpu=True))
    check_same_run(config, {}, theirs, None, place, here)
    with pytest.raises(CheckpointError, match="another run: experimental was False and is True;"):
        check_same_run(config, {}, theirs | {"experimental": False}, None, place, here)
