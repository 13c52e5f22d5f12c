"""Dropout of LoRA adapters: on in training passes alone, a stream for each row and layer, one mask for a pair."""

import pytest
import torch
from torch import nn

from diffusion_align.diffusion.ddpo_settings import DDPOConfig
from diffusion_align.diffusion.dpo import DiffusionDPOConfig
from diffusion_align.diffusion.settings import LoRAConfig
from diffusion_align.errors import ConfigError, UserError
from diffusion_align.llm.settings import DPOConfig, GRPOConfig, KTOConfig, PPOConfig
from diffusion_align.models.dropout import RowDropout, set_dropout
from diffusion_align.models.lora import lora_layers

PROMPTS = ["red apple", "a cat", "blue car"]


def dropped(x, seeds, probability=0.25, layer="a"):
    module = RowDropout(probability, layer)
    module.seeds = seeds
    return module(x)


def test_a_share_is_dropped_and_the_rest_keeps_the_mean():
    x = torch.ones(2, 400, 250)
    found = dropped(x, [1, 2])
    assert found.unique().tolist() == pytest.approx([0, 4 / 3])
    # 100 000 numbers per row: a standard error of 0.0014.
    assert (found == 0).float().mean((1, 2)).tolist() == pytest.approx([0.25, 0.25], abs=0.007)
    assert torch.equal(RowDropout(0.25, "a")(x), x)


def test_a_mask_is_of_its_row_and_layer_alone():
    x = torch.ones(3, 50, 8)
    masks = dropped(x, [1, 2, 1])
    assert torch.equal(masks, dropped(x, [1, 2, 1])), "a second pass has other masks"
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], dropped(x[:1], [2])[0]), "it depends on the batch"
    assert torch.equal(masks[:, :20], dropped(x[:, :20], [1, 2, 1])), "it depends on the padding"
    assert not torch.equal(masks, dropped(x, [1, 2, 1], layer="b"))
    both = dropped(torch.ones(6, 50, 8), [1, 2, 1])
    assert torch.equal(both, torch.cat([masks, masks]))
    state = torch.get_rng_state()
    dropped(x, [1, 2, 1])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rows", [4, 9])  # nine: three tokens of each sample, as OPT's feed-forward layers have them
def test_rows_that_cannot_be_told_apart_are_an_error(rows):
    with pytest.raises(UserError, match=r"cannot tell the samples of a's input apart: set lora\.dropout=0"):
        dropped(torch.ones(rows, 2), [1, 2, 3])


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def policies(request, make_policy):
    """The same policy without and with dropout."""
    kinds = [LoRAConfig(rank=2, layers="attention+convolutions", dora=request.param, dropout=p) for p in (0.0, 0.5)]
    return [make_policy("tiny_sd", lora=lora, noise=0.1) for lora in kinds]


def predicted(policy):
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return policy.predict(x_t, torch.tensor([1, 500, 999]), policy.encode(PROMPTS))


@torch.no_grad()
def test_only_inside_do_adapters_drop_out(policies):
    plain, policy = policies
    assert plain.dropout is None
    expected = predicted(plain)
    assert torch.equal(predicted(policy), expected)
    with policy.reference():
        reference = predicted(policy)
    with policy.dropout([1, 2, 3]):
        inside = predicted(policy)
        assert torch.equal(predicted(policy), inside)
        with policy.reference():
            assert torch.equal(predicted(policy), reference)
    with policy.dropout([4, 2, 3]):
        other = predicted(policy)
    assert ((inside - expected).abs().amax((1, 2, 3)) > 1e-3).all()
    torch.testing.assert_close(other[1:], inside[1:], atol=1e-5, rtol=0)
    assert (other[0] - inside[0]).abs().max() > 1e-3
    assert torch.equal(predicted(policy), expected)
    assert not any(module.training for module in policy.network.modules())


@torch.no_grad()
def test_an_adapter_is_given_what_is_left_of_its_input(make_policy):
    policy = make_policy("tiny_sd", lora=LoRAConfig(rank=2, alpha=6, dropout=0.5), noise=0.1)
    layer = next(iter(lora_layers(policy.network).values()))
    x = torch.randn(2, 5, layer.in_features)
    with policy.dropout([1, 2]):
        found = layer(x)
        kept = layer.lora_dropout["default"](torch.ones_like(x))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    adapter = nn.functional.linear(
        nn.functional.linear(x * kept, layer.lora_A["default"].weight), layer.lora_B["default"].weight
    )
    torch.testing.assert_close(found, layer.get_base_layer()(x) + 3 * adapter)


def test_checkpointing_sees_the_masks_again(make_policy):
    found = []
    for checkpointing in (False, True):
        lora = LoRAConfig(rank=2, layers="attention+feed_forward", dropout=0.5)
        policy = make_policy("tiny_sd", lora=lora, noise=0.1, gradient_checkpointing=checkpointing)
        with policy.dropout([1, 2, 3]):
            predicted(policy).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.trainable.values()]))
    assert found[0].norm() > 1e-3
    assert torch.equal(*found)


def test_an_adapter_that_is_trained_further_takes_the_settings_dropout(policies):
    _, policy = policies
    assert set_dropout(policy.network, LoRAConfig()) is None
    assert not any(isinstance(module, RowDropout) for module in policy.network.modules())


# -- methods -----------------------------------------------------------------------------------------------------------

IMAGES = {"prompts": ["a"], "reward": "jpeg_compressibility", "model": "emoji-sd"}
TEXT = {"prompts": ["a"], "reward": "length", "model": "tiny-lm"}


@pytest.mark.parametrize(("kind", "settings"), [(DDPOConfig, IMAGES), (GRPOConfig, TEXT), (PPOConfig, TEXT)])
def test_a_policy_gradient_refuses_it(tmp_path, kind, settings):
    with pytest.raises(ConfigError) as caught:
        kind(output_dir=tmp_path, lora={"dropout": 0.1}, **settings)
    assert caught.value.problems == [
        "lora.dropout=0.1 trains a different policy from the one that sampled, so ratios would not start at 1: "
        "leave it out"
    ]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(DiffusionDPOConfig, IMAGES | {"beta": 1.0}), (DPOConfig, TEXT), (KTOConfig, TEXT)],
)
def test_preferences_take_it(tmp_path, kind, settings):
    assert kind(output_dir=tmp_path, lora={"dropout": 0.1}, **settings).lora.dropout == 0.1
