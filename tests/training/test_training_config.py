"""Reading settings: YAML's numbers, dotted overrides, every problem at once, what is written back; descriptions and
bounds of every setting."""

import math
import types
import typing
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from diffusion_align.diffusion.ddpo import DDPOConfig
from diffusion_align.diffusion.dpo import DiffusionDPOConfig
from diffusion_align.errors import ConfigError, UserError, nearest
from diffusion_align.llm.grpo import GRPOConfig
from diffusion_align.methods import SHIPPED, method_of
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.reading import apply_overrides, dump_config, load_yaml, parse_config
from diffusion_align.training.section import Section
from tests.helpers.problems import assert_problem, assert_problems, problem


class Inner(Section):
    steps: int = Field(3, ge=1)
    scale: float = 1.0

    def cross_checks(self):
        if self.steps > 10 * max(self.scale, 1):
            yield f"steps={self.steps} is more than ten times scale={self.scale:g}: change one of them"


class Config(TrainingConfig):
    method: Literal["some"] = "some"
    inner: Inner = Field(default_factory=Inner)
    maybe: Inner | None = None


BASE = {"model": "emoji-sd", "output_dir": "run"}


def said(raw, **options):
    """What is said of settings from YAML and, unless others check too, of the same from Python."""
    found = []
    for make in [lambda: parse_config(Config, BASE | raw, **options), *[lambda: Config(**BASE | raw)][: not options]]:
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == "\n".join(caught.value.problems)
        assert isinstance(caught.value, UserError)
        found.append(caught.value.problems)
    assert found[0] == found[-1]
    return found[0]


def test_overrides_are_yaml_with_dotted_keys():
    raw = {"epochs": 2, "inner": {"steps": 1}}
    result = apply_overrides(
        raw,
        ["inner.steps=5", "inner.scale=1e-4", "new.a.b=[1, x]", "flag=true", "text=a: b".replace(": ", ":"), "none="],
    )
    assert result == {
        "epochs": 2,
        "inner": {"steps": 5, "scale": 1e-4},
        "new": {"a": {"b": [1, "x"]}},
        "flag": True,
        "text": "a:b",
        "none": None,
    }
    assert raw == {"epochs": 2, "inner": {"steps": 1}}, "the mapping given was changed"


def test_a_value_may_hold_an_equals_sign_and_a_later_override_wins():
    assert apply_overrides({}, ["model=a=b", "epochs=1", "epochs=2"]) == {"model": "a=b", "epochs": 2}


def test_every_wrong_override_is_named():
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"epochs": 1}, ["epochs", "epochs.a=1", "x=[", "=1", "fine=1"])
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.e-4", "1.0e-4"])
def test_exponents_are_numbers_in_files_and_in_overrides(text, tmp_path):
    (tmp_path / "a.yaml").write_text(f"model: m\noutput_dir: run\nlearning_rate: {text}\nadam_betas: [9e-1, 0.99]\n")
    raw = load_yaml(tmp_path / "a.yaml")
    config = parse_config(Config, apply_overrides(raw, [f"weight_decay={text}", f"inner.scale={text}"]))
    assert (config.learning_rate, config.weight_decay, config.inner.scale) == (1e-4, 1e-4, 1e-4)
    assert config.adam_betas == (0.9, 0.99)


def test_a_name_that_only_looks_a_little_like_a_number_stays_a_name():
    assert parse_config(Config, BASE | {"model": "1e-4x"}).model == "1e-4x"


def test_all_problems_at_once_and_each_only_once(golden):
    found = said(
        {"learning_rat": 1, "epochs": 0, "inner": {"step": 1}, "maybe": {"scal": 1}},
        problems=["a check failed", "a check failed", "another"],
    )
    golden("all at once", sorted(found))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("trackers", "wandb"),
        ("accept_changed", 3),
        ("adam_betas", [0.9, 0.9, 0.9]),
        ("lr_schedule", "step"),
        ("inner", 3),
        ("resume", "maybe"),
        ("epochs", 1.5),
        ("learning_rate", [1]),
        ("model", ["a"]),
        ("output_dir", 3),
    ],
)
def test_what_is_of_another_kind_is_said_in_words_of_settings(golden, setting, value):
    golden(f"{setting}={value!r}", said({setting: value}))


def test_missing_settings_are_named():
    with pytest.raises(ConfigError) as caught:
        parse_config(Config, {})
    assert_problems(caught, ("model", "required"), ("output_dir", "required"))


def test_cross_checks():
    found = said({"samples_per_epoch": 5, "sample_batch_size": 2, "updates_per_epoch": 6})
    assert_problems(found, ("samples_per_epoch", "multiple of sample_batch_size"), ("updates_per_epoch", "more than"))


def test_cross_checks_of_what_is_valid_stand_beside_what_is_wrong_by_itself(golden):
    found = said({"epochs": "x", "updates_per_epoch": 100, "inner": {"steps": 40}, "maybe": {"step": 1}})
    golden("wrong by themselves and together", found)


def test_nothing_is_said_of_the_default_of_a_setting_that_is_wrong_by_itself():
    wrong = {"samples_per_epoch": 0, "sample_batch_size": 7, "updates_per_epoch": 100}
    assert_problem(said(wrong), "samples_per_epoch", "not allowed")
    with pytest.raises(ConfigError) as caught:
        DiffusionDPOConfig(**BASE, pairs={"sourc": "a"}, samples_per_epoch=6, sample_batch_size=6, beta=1)
    assert_problems(caught, ("pairs.source", "required"), ("unknown setting 'pairs.sourc'", "did you mean 'source'"))
    with pytest.raises(ConfigError) as caught:
        DDPOConfig(**BASE | wrong, prompts=["a"], reward="aesthetic", sampler={"eta": 0})
    assert_problems(caught, ("samples_per_epoch", "not allowed"), ("sampler.eta", "deterministic"))
    with pytest.raises(ConfigError) as caught:
        Needy(**BASE | {"limit": None, "at": 5, "updates_per_epoch": 100})
    assert_problems(caught, ("limit", "not allowed"), ("updates_per_epoch", "more than"))


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (DDPOConfig, {"model": "a/b/c", "reward": "aesthtic", "evaluation": {"reward": "length", "diversity": "/no"}}),
        (
            DiffusionDPOConfig,
            {
                "reward": ["jpeg_compressibility"] * 2,
                "reward_weights": [1.0],
                "mixed_precision": "fp16",
                "dtype": "float16",
            },
        ),
        (
            GRPOConfig,
            {"reward": ["length", "x", None, {"name": "regex"}], "reference_model": "./gone", "beta": 0.1},
        ),
    ],
)
def test_names_are_checked_in_python_as_in_yaml(golden, tmp_path, config_class, settings):
    raw = BASE | {"output_dir": tmp_path / "run", "prompts": ["a"]} | settings
    with pytest.raises(ConfigError) as in_yaml:
        check_config({"method": config_class.model_fields["method"].default} | raw)
    with pytest.raises(ConfigError) as in_python:
        config_class(**raw)
    found = in_python.value.problems
    assert found == in_yaml.value.problems
    golden(f"names: {config_class.__name__}", found)


def test_a_method_is_that_of_its_settings():
    with pytest.raises(ConfigError, match=problem("method", "does not fit DDPOConfig")):
        DDPOConfig(**BASE, prompts=["a"], reward="aesthetic", method="grpo")
    raw = BASE | {"prompts": ["a"], "reward": "aesthetic"}
    assert check_config(raw | {"method": method_of("ddpo")}).method == "ddpo"
    assert check_config(raw | {"method": Mine}).method == f"{__name__}:Mine"


def test_what_can_be_gone_through_once_is_kept(tmp_path):
    raw = BASE | {"output_dir": tmp_path / "run", "prompts": iter("ab"), "reward": "aesthetic"}
    config = check_config(raw | {"show_prompts": (one for one in "ab"), "callbacks": map(str, ["a:B"])})
    assert (config.show_prompts, config.callbacks, config.prompts.source) == (["a", "b"], ["a:B"], ["a", "b"])


class Mine(method_of("ddpo")):
    pass


class Needy(Config):
    limit: int
    at: int

    def cross_checks(self):
        if self.at > self.limit:
            yield "at is more than limit"


def test_a_mistake_in_a_rule_itself_is_not_hidden():
    class Broken(Config):
        def cross_checks(self):
            yield str(self.nothing)

    with pytest.raises(AttributeError, match="nothing"):
        Broken(**BASE)


def test_a_section_made_in_python_is_checked_too():
    with pytest.raises(ConfigError, match="unknown setting 'step'"):
        Inner(step=3)
    with pytest.raises(ConfigError, match=problem("steps", "ten times")):
        Inner(steps=30)
    config = Config(**BASE, inner=Inner(steps=4))
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_nearest():
    assert nearest("epoch", ["epochs", "seed"]) == "did you mean 'epochs'?"
    assert nearest("zzz", ["b", "a"]) == "known are a, b"


def test_what_is_written_is_read_back_the_same(tmp_path):
    config = parse_config(Config, BASE | {"maybe": {"steps": 2}, "ema_decay": 0.5, "learning_rate": 1e-5})
    (tmp_path / "a.yaml").write_text(dump_config(config))
    assert parse_config(Config, load_yaml(tmp_path / "a.yaml")) == config


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_config(Config, BASE | {"output_dir": "~/run"}).output_dir == tmp_path / "run"


def test_a_prompt_that_looks_like_a_number_stays_a_text():
    assert apply_overrides({}, ["prompts=[1e5, 2e3]", "rate=1e-4"]) == {"prompts": ["1e5", "2e3"], "rate": 1e-4}


@pytest.mark.parametrize("source", ["verses", ["a", "b"]])
def test_a_setting_beside_a_source_that_stands_alone(source):
    """As errors advise: "set prompts.skip_bad_rows=true"."""
    raw = {"prompts": source, "evaluation": {"prompts": source}}
    assert apply_overrides(raw, ["prompts.skip_bad_rows=true", "evaluation.prompts.max_rows=2"]) == {
        "prompts": {"source": source, "skip_bad_rows": True},
        "evaluation": {"prompts": {"source": source, "max_rows": 2}},
    }
    assert raw["prompts"] == source


# -- every setting of every method -------------------------------------------------------------------------------------

# Bounds and limits that .inf takes away.
MAY_BE_INFINITE = {"max_grad_norm", "stop_when.kl_above", "clip_range_nats", "advantage_clip", "value_clip"}
MAY_BE_INFINITE |= {"kl_bound_nats"}
MAY_BE_INFINITE |= {f"experimental.{name}" for name in ("clip_std", "loser_clip", "max_winner_error")}


def numbers(model, path=""):
    """(dotted name, the numeric type with its constraints) of every number in a settings class and its sections."""
    for name, field in model.model_fields.items():
        whole = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        for kind in kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numbers(kind, f"{path}{name}.")
            elif kind in (int, float):
                yield f"{path}{name}", whole, lambda value: value
            elif typing.get_origin(kind) in (tuple, list):
                inner = typing.get_args(kind)
                if {int, float} & {one for arg in inner for one in kinds(arg)}:
                    count = 1 if typing.get_origin(kind) is list else len(inner)
                    yield f"{path}{name}", whole, lambda value, count=count: [value] * count


def kinds(annotation):
    if typing.get_origin(annotation) is Annotated:
        return kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for arg in typing.get_args(annotation) for kind in kinds(arg)]
    return [annotation]


CASES = {
    f"{method}.{name}": (kind, wrap)
    for method in SHIPPED
    for name, kind, wrap in numbers(method_of(method).config_class)
}


def allowed(kind, value):
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def sections_of(model):
    inner = [kind for field in model.model_fields.values() for kind in kinds(field.annotation)]
    return [model, *(one for kind in inner if _is_section(kind) for one in sections_of(kind))]


def _is_section(kind):
    return isinstance(kind, type) and issubclass(kind, Section)


@pytest.mark.parametrize("method", SHIPPED)
def test_every_setting_has_a_description(method):
    classes = sections_of(method_of(method).config_class)
    assert len(classes) > 2
    fields = [(one.__name__, name, field) for one in classes for name, field in one.model_fields.items()]
    assert [(section, name) for section, name, field in fields if not field.description] == []


def test_the_walk_finds_numbers_of_every_depth():
    assert {"ddpo.epochs", "ddpo.sampler.eta", "grpo.lora.rank", "dpo.experimental.dynamic_beta.hidden"} <= CASES.keys()
    assert {"ddpo.adam_betas", "grpo.reward_weights", "ppo.group_size", "kto.dataset.max_rows"} <= CASES.keys()
    assert len(CASES) > 150


@pytest.mark.parametrize("case", CASES)
def test_every_number_has_two_finite_bounds(case):
    kind, wrap = CASES[case]
    for value in (1e300, -1e300, 10**12, -(10**12), 10**5000, math.nan, -math.inf):
        assert not allowed(kind, wrap(value)), value
    name = case.partition(".")[2]
    assert allowed(kind, wrap(math.inf)) == (name in MAY_BE_INFINITE)


@pytest.mark.parametrize("method", SHIPPED)
def test_neither_text_nor_a_number_is_true_or_false(method):
    kind = method_of(method).config_class
    sections = {"lora": kind.model_fields["lora"].annotation} if "lora" in kind.model_fields else {}
    found = 0
    for prefix, section in {
        "": kind,
        **{f"{name}.": typing.get_args(one)[0] for name, one in sections.items()},
    }.items():
        for name, field in section.model_fields.items():
            if field.annotation not in (bool, bool | None):
                continue
            found += 1
            for value in ("yes", 1):
                given = {name: value} if not prefix else {prefix[:-1]: {name: value}}
                with pytest.raises(ConfigError) as raised:
                    kind(**BASE | {"method": method} | given)
                expected = f"{prefix}{name}={value!r} is not allowed: it must be true or false"
                assert expected in raised.value.problems
    assert found > 2
