"""Reading settings: YAML's numbers, dotted overrides, every problem at once, what is written back."""

from typing import Literal

import pytest
from pydantic import Field

from diffusion_align.errors import ConfigError, UserError
from diffusion_align.training.config import (
    Section,
    TrainingConfig,
    apply_overrides,
    dump_config,
    load_yaml,
    nearest,
    parse_config,
)


class Inner(Section):
    steps: int = Field(3, ge=1)
    scale: float = 1.0


class Config(TrainingConfig):
    method: Literal["some"] = "some"
    inner: Inner = Field(default_factory=Inner)
    maybe: Inner | None = None


BASE = {"model": "m", "output_dir": "run"}


def problems(raw, **options):
    with pytest.raises(ConfigError) as caught:
        parse_config(Config, BASE | raw, **options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert isinstance(caught.value, UserError)
    return caught.value.problems


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


def test_all_problems_at_once_and_each_only_once():
    found = problems(
        {"learning_rat": 1, "epochs": 0, "inner": {"step": 1}, "maybe": {"scal": 1}},
        checks=[lambda raw: ["a check failed"], lambda raw: ["a check failed", "another"]],
    )
    assert sorted(found) == sorted(
        [
            "unknown setting 'learning_rat': did you mean 'learning_rate'?",
            "epochs=0 is not allowed: Input should be greater than or equal to 1",
            "unknown setting 'inner.step': did you mean 'steps'?",
            "unknown setting 'maybe.scal': did you mean 'scale'?",
            "a check failed",
            "another",
        ]
    )


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("trackers", "wandb", "it must be a list, as in trackers=[wandb]"),
        ("accept_changed", "reward", "it must be a list, as in accept_changed=[reward]"),
        ("accept_changed", 3, "it must be a list"),
        ("adam_betas", 0.9, "it must be a list"),
        ("inner", 3, "it must be a section of settings, as in {key: value}"),
        ("resume", "maybe", "it must be true or false"),
        ("epochs", 1.5, "it must be a whole number"),
        ("epochs", None, "it must be a whole number"),
        ("learning_rate", [1], "it must be a number"),
        ("model", ["a"], "it must be text"),
        ("output_dir", 3, "it must be a path"),
    ],
)
def test_what_is_of_another_kind_is_said_in_words_of_settings(setting, value, reason):
    assert problems({setting: value}) == [f"{setting}={value!r} is not allowed: {reason}"]


def test_missing_settings_are_named():
    with pytest.raises(ConfigError) as caught:
        parse_config(Config, {})
    assert caught.value.problems == [
        "model is missing: it has to be given",
        "output_dir is missing: it has to be given",
    ]


def test_cross_checks():
    found = problems({"samples_per_epoch": 5, "sample_batch_size": 2, "updates_per_epoch": 6})
    assert [text.split(":")[0] for text in found] == [
        "samples_per_epoch=5 is not a multiple of sample_batch_size=2",
        "updates_per_epoch=6 is more than samples_per_epoch=5",
    ]


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
