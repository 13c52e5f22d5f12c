"""Names and values of earlier versions still work, and mean what today's do."""

import importlib

import pytest
import torch

from diffusion_align.estimators import clipped_surrogate, importance_ratio
from diffusion_align.methods import method_of


@pytest.mark.parametrize(
    ("module", "former", "name"),
    [
        ("pipelines.image", "DrawnImages", "SampledImages"),
        ("estimators", "several_rewards_advantages", "multi_reward_advantages"),
    ],
)
def test_a_former_name_is_the_same_object(module, former, name):
    found = importlib.import_module(f"diffusion_align.{module}")
    assert getattr(found, former) is getattr(found, name)


@pytest.mark.parametrize(
    ("former", "place", "names"),
    [
        ("diffusion.trainer", "diffusion.settings", ["DenoisingConfig"]),
        ("diffusion.policy", "diffusion.settings", ["LoRAConfig"]),
        ("diffusion.schedule", "diffusion.sampler_settings", ["SamplerConfig"]),
        ("diffusion.evaluation", "diffusion.settings", ["ImageEvaluationConfig", "ImageStopConfig"]),
        ("llm.policy", "llm.settings", ["LoRAConfig"]),
        ("llm.trainer", "llm.settings", ["OnlineConfig", "TextConfig", "TextEvaluationConfig"]),
        ("training.evaluation", "training.settings", ["EvaluationConfig", "StopConfig"]),
    ],
)
def test_settings_are_still_found_where_they_were(former, place, names):
    before, now = (importlib.import_module(f"diffusion_align.{module}") for module in (former, place))
    assert all(getattr(before, name) is getattr(now, name) for name in names)


@pytest.mark.parametrize("former", ["decision", "token"])
def test_the_former_level_of_a_ratio_is_that_of_an_action(former):
    logp, logp_old, advantages = torch.randn(3, 2, 4).unbind()
    assert torch.equal(importance_ratio(logp, logp_old, level=former), importance_ratio(logp, logp_old))
    losses = [clipped_surrogate(logp, logp_old, advantages, clip=0.1, level=level) for level in (former, "action")]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("method", "settings", "name", "value"),
    [
        ("grpo", {"model": "tiny-lm", "prompts": ["a"], "reward": "length"}, "ratio_level", ("decision", "token")),
        (
            "diffusion_dpo",
            {"model": "emoji-sd", "pairs": "emoji_style", "beta_dpo": 1000},
            "weighting",
            ("share", "snr_share"),
        ),
    ],
)
def test_a_former_value_is_read_and_written_as_todays(method, settings, name, value, tmp_path):
    former, current = value
    config = method_of(method).config_class(output_dir=tmp_path, **settings, **{name: former})
    assert config.model_dump()[name] == current
