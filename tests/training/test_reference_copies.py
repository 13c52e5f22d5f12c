"""Training all weights keeps a second copy of the network only where a setting asks for the reference."""

import gc

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.diffusion.ddpo import DDPOTrainer
from diffusion_align.diffusion.ddpo_settings import DDPOConfig
from diffusion_align.diffusion.dpo_settings import DiffusionDPOConfig
from tests.helpers.tiny_runs import TINY

RUN = TINY | {
    "reward": "jpeg_compressibility",
    "prompts": ["a red apple", "a cat"],
    "lora": None,
    "learning_rate": 1e-3,
}
ASKED = {"kl_coef": {"kl_coef": 0.1}, "kl_above": {"stop_when": {"kl_above": float("inf")}}}


def parameters_alive():
    gc.collect()
    return sum(one.numel() for one in gc.get_objects() if type(one) is torch.nn.Parameter)


@pytest.mark.parametrize("kind", ["none", *ASKED])
def test_parameters_alive(make_policy, train, kind):
    make_policy("tiny_sd").network  # noqa: B018, what the first one makes besides
    before = parameters_alive()
    trainer, rows = train(RUN | {"epochs": 2} | ASKED.get(kind, {}))
    whole = sum(p.numel() for p in trainer.policy.network.parameters())
    parts = trainer.policy.pipeline.components.values()
    once = sum(p.numel() for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters())
    assert parameters_alive() - before == once + (0 if kind == "none" else whole)
    assert trainer.policy.has_reference == trainer.config.has_reference == (kind != "none")
    assert any("kl_path" in row for row in rows) == (kind != "none")
    if kind == "none":
        with pytest.raises(ValueError, match="made without a reference"), trainer.policy.reference():
            pass


def test_what_needs_one():
    settings = RUN | {"model": "emoji-sd", "output_dir": "run"}
    assert not DDPOConfig(**settings).needs_reference
    assert DDPOConfig(**settings | {"lora": {"rank": 2}}).has_reference
    pairs = {name: value for name, value in settings.items() if name not in ("reward", "prompts")}
    assert DiffusionDPOConfig(**pairs, pairs="emoji_style", beta=1.0).needs_reference


def test_the_same_weights_and_images_before_and_after_without_one(train, tmp_path):
    settings = RUN | {"epochs": 2, "grid_every": 1}
    alone, rows = train(settings, "alone")
    train(settings | ASKED["kl_above"], "compared")
    folders = [tmp_path / name for name in ("alone", "compared")]
    with_reference, without = (load_file(f / "final/unet/diffusion_pytorch_model.safetensors") for f in folders)
    assert all(torch.equal(value, without[name]) for name, value in with_reference.items())
    assert all((folder / "samples/before_after.png").is_file() for folder in folders)
    assert not (folders[1] / "samples/before.safetensors").exists()
    before, after = alone.previews.before_after(folders[0] / "samples")
    assert (before - after).abs().max() > 1e-4
    assert "kl_path" not in {name for row in rows for name in row}
    cost = DDPOTrainer.epoch_cost(alone.config)
    assert (cost.probed, cost.reference) == (0, 0)


def test_resumed_bit_for_bit_without_one(train, tmp_path):
    settings = RUN | {"epochs": 2, "grid_every": 1}
    train(settings, "whole")
    train(settings | {"epochs": 1}, "harried")
    train(settings | {"resume": True}, "harried")
    for file in ("final/unet/diffusion_pytorch_model.safetensors", "samples/before.safetensors"):
        whole, harried = (load_file(tmp_path / name / file) for name in ("whole", "harried"))
        assert all(torch.equal(value, harried[name]) for name, value in whole.items())
    assert (tmp_path / "whole/samples/before_after.png").read_bytes() == (
        tmp_path / "harried/samples/before_after.png"
    ).read_bytes()
