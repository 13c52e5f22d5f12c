"""Several rewards as one, and a reward whose model stays in main memory."""

import pytest
import torch

from diffusion_align.rewards import RewardError, build_reward, call_reward
from diffusion_align.rewards.base import part_weights, reward_parts

IMAGES = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


def wide(images, prompts, metadata):
    return [1000.0 * float(image[1].mean()) for image in images]


red.differentiable = True


def score(reward, **options):
    return call_reward(reward, IMAGES, [""] * 4, [{}] * 4, **options)


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        ([red, wide], [1.0, 1.0]),
        ({"name": "combine", "rewards": [red, wide], "weights": [2, -0.5]}, [2.0, -0.5]),
        ([{"name": red, "scale": 2.0}, {"name": wide, "scale": -0.5}], [2.0, -0.5]),
        ([{"name": "combine", "rewards": [red], "weights": [2.0]}, {"name": wide, "scale": -0.5}], [2.0, -0.5]),
    ],
)
def test_the_sum_of_the_parts(spec, weights):
    expected = weights[0] * score(red) + weights[1] * score(wide)
    torch.testing.assert_close(score(build_reward(spec)), expected)
    torch.testing.assert_close(score(build_reward({"name": "combine", "rewards": [spec], "scale": 3.0})), 3 * expected)


def test_parts_are_asked_one_by_one_and_keep_their_own_scale():
    reward = build_reward({"name": "combine", "rewards": [red, wide, red], "weights": [1, 2, 3]})
    assert list(reward_parts(reward)) == ["red", "wide", "red_2"]
    assert part_weights(reward).tolist() == [1, 2, 3]
    for part, own in zip(reward_parts(reward).values(), (red, wide, red), strict=True):
        torch.testing.assert_close(score(part), score(own))
    assert list(reward_parts(red)) == ["red"]
    assert part_weights(red).tolist() == [1]


def test_a_part_that_fails_is_named():
    def broken(images, prompts, metadata):
        return [1.0]

    with pytest.raises(RewardError, match="reward 'broken' returned 1 score for 4 images"):
        score(reward_parts(build_reward([red, broken]))["broken"])
    with pytest.raises(RewardError, match="reward 'broken' returned 1 score for 4 images"):
        score(build_reward([red, broken]))


def test_a_gradient_flows_if_it_flows_through_every_part():
    both = build_reward({"name": "combine", "rewards": [red, red], "weights": [1.0, 2.0]})
    images = IMAGES.clone().requires_grad_()
    call_reward(both, images, [""] * 4, [{}] * 4, differentiable=True).sum().backward()
    torch.testing.assert_close(images.grad[:, 0], torch.full((4, 8, 8), 3 / 64))
    assert images.grad[:, 1:].abs().max() == 0
    with pytest.raises(RewardError, match="reward 'combine' is not differentiable"):
        score(build_reward([red, wide]), differentiable=True)


class Movable:
    differentiable = True

    def __init__(self, device=None):
        self.places = []

    def to(self, device):
        self.places.append(str(device))
        return self

    def __call__(self, images, prompts, metadata):
        assert self.places[-1] == "meta"
        if prompts[0] == "fail":
            raise OSError("no")
        return images.mean((1, 2, 3))


def test_an_offloaded_model_is_on_its_device_only_while_it_scores():
    reward = build_reward({"name": Movable(), "offload": True}, device="meta")
    inner = reward.reward
    assert inner.places[-1] == "cpu"
    torch.testing.assert_close(score(reward), IMAGES.mean((1, 2, 3)))
    assert inner.places[-2:] == ["meta", "cpu"]
    with pytest.raises(RewardError, match="raised OSError: no"):
        call_reward(reward, IMAGES, ["fail"] * 4, [{}] * 4)
    assert inner.places[-1] == "cpu"
    assert not reward.differentiable, "its weights would be gone before the backward pass"
    torch.testing.assert_close(
        score(build_reward({"name": Movable(), "offload": True, "scale": 2}, device="meta"))[0], 2 * IMAGES[0].mean()
    )
    assert build_reward({"name": Movable, "offload": True, "device": 0}, device="meta").device == 0, "the first GPU"
    with pytest.raises(RewardError, match="has no to"):
        build_reward({"name": red, "offload": True})


def test_parts_and_weights_of_a_reward_of_ones_own_are_its_own():
    class Own:
        parts, weights = ["a", "b"], torch.tensor([0.5, 2.0])

        def __call__(self, images, prompts, metadata):
            return red(images, prompts, metadata)

    own = Own()
    assert list(reward_parts(own).values()) == [own]
    assert part_weights(own).tolist() == [1.0]


def test_functions_inside_a_sum_can_be_written_to_a_configuration():
    from diffusion_align.diffusion.ddpo import DDPOConfig

    spec = {"name": "combine", "rewards": [red, {"name": wide, "scale": 2.0}], "weights": [1.0, 2.0]}
    config = DDPOConfig(model="emoji-sd", output_dir="x", prompts=["a"], reward=spec, evaluation={"reward": spec})
    written = config.model_dump(mode="json")
    assert written["reward"]["rewards"] == [f"{__name__}:red", {"name": f"{__name__}:wide", "scale": 2.0}]
    assert written["evaluation"]["reward"] == written["reward"]
