"""Named copies of a policy's trained weights: what they hold, how they move, and the policy as one of them."""

import pytest
import torch

from diffusion_align.diffusion.policy import LoRAConfig
from diffusion_align.diffusion.snapshots import Snapshots
from diffusion_align.errors import CheckpointError


@pytest.fixture
def policy(make_policy):
    return make_policy("tiny_sd", lora=LoRAConfig(rank=2), noise=0.1)


def change(policy, seed):
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))


def predicted(policy):
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
    return policy.predict(x_t, torch.tensor([100, 700]), policy.encode(["a", "b"]))


def test_after_k_blends_it_is_the_decayed_average_and_neither_the_weights_nor_the_reference(policy):
    policy.snapshots.take("old")
    expected = {name: p.detach().double() for name, p in policy.trainable.items()}
    for k, decay in enumerate((0.9, 0.5, 0.75)):
        change(policy, k)
        policy.snapshots.blend("old", decay)
        expected = {n: decay * v + (1 - decay) * policy.trainable[n].detach().double() for n, v in expected.items()}
    (kept,) = policy.snapshots.weights().values()
    for name, value in kept.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)
    with policy.as_snapshot("old"):
        old = predicted(policy)
    with torch.no_grad(), policy.reference():
        reference = predicted(policy)
    assert not torch.equal(old, predicted(policy))
    assert not torch.equal(old, reference)


def test_the_policy_as_a_snapshot_predicts_what_it_did_and_is_itself_again(policy):
    with torch.no_grad():
        before = predicted(policy)
    policy.snapshots.take("old")
    change(policy, 0)
    now = predicted(policy)
    with policy.as_snapshot("old"):
        assert torch.equal(predicted(policy), before)
        assert not torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), policy.as_snapshot("old"):
        raise ZeroDivisionError
    assert torch.equal(predicted(policy), now)


def test_a_backward_pass_may_follow_a_pass_of_the_snapshot(policy):
    """Its graph holds the weights, which are others meanwhile."""
    policy.snapshots.take("old")
    change(policy, 0)
    parameters = list(policy.trainable.values())
    alone = torch.autograd.grad(predicted(policy).square().sum(), parameters)
    loss = predicted(policy).square().sum()
    with policy.as_snapshot("old"):
        predicted(policy)
    assert all(map(torch.equal, torch.autograd.grad(loss, parameters), alone))


def test_text_encoders_are_those_of_the_snapshot_too(make_policy):
    policy = make_policy("tiny_sd", lora=LoRAConfig(rank=2, text_encoder=True), noise=0.1)
    policy.snapshots.take("old")
    with torch.no_grad():
        before = predicted(policy)
    change(policy, 0)
    with torch.no_grad(), policy.weights_kept():
        assert not torch.equal(predicted(policy), before)
        with policy.as_snapshot("old"):
            assert torch.equal(predicted(policy), before)


def test_what_was_saved_is_loaded_and_other_files_are_left_alone(policy):
    policy.snapshots.take("old")
    saved = {stem: {n: v.clone() for n, v in named.items()} for stem, named in policy.snapshots.weights().items()}
    another = Snapshots(policy.trainable)
    change(policy, 0)
    another.load({"trained": dict(policy.trainable), **saved}, ["old"])
    with pytest.raises(CheckpointError, match="lacks snapshot_first"):
        another.load(saved, ["first"])
    assert "old" in another
    assert "trained" not in another
    assert all(torch.equal(v, saved["snapshot_old"][n]) for n, v in another.weights()["snapshot_old"].items())
