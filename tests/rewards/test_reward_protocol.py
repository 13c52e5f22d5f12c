"""call_reward and check_reward: what they let through, and the sentence for everything else."""

import re
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from diffusion_align.rewards import RewardError, call_reward, check_reward, reward_name
from tests.helpers.rewarding import refusal

HERE = r"\(test_reward_protocol.py, line \d+\)"


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit


class Unreadable:
    def __float__(self):
        raise SystemExit


PROMPTS = ["a red apple", "a blue car", "a cat", "a dog"]


def images(count=4):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def call(answer, count=4, **options):
    def probe(images, prompts, metadata):
        if isinstance(answer, BaseException):
            raise answer
        return answer(images) if callable(answer) else answer

    return call_reward(probe, images(count), PROMPTS[:count], [{}] * count, **options)


WIDE, NARROW = torch.float64, torch.float32


@pytest.mark.parametrize(
    ("answer", "dtype"),
    [
        (torch.arange(4), WIDE),
        (torch.arange(4, dtype=torch.float64), WIDE),
        (torch.arange(4, dtype=torch.float32), NARROW),
        (torch.arange(4, dtype=torch.bfloat16), NARROW),
        ([0.0, 1.0, 2.0, 3.0], WIDE),
        ((0, 1, 2, 3), WIDE),
        ([torch.tensor(float(i)) for i in range(4)], NARROW),
        ([np.float64(i) for i in range(4)], WIDE),
        ([np.float32(i) for i in range(4)], NARROW),
        (np.arange(4)[::-1][::-1], WIDE),
        (np.arange(4, dtype=np.float16), NARROW),
        ([Decimal(i) for i in range(4)], WIDE),
        ([False, True, Fraction(4, 2), np.int8(3)], WIDE),
        ((torch.arange(4.0), {"raw": 1}), NARROW),
        (([0.0, 1.0, 2.0, 3.0], {}), WIDE),
    ],
)
def test_every_documented_answer_is_float32_or_wider_on_the_cpu(answer, dtype):
    scores = call(answer)
    assert scores.dtype == dtype
    assert scores.device.type == "cpu"
    assert scores.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([1.0, 2.0, 3.0], "returned 3 scores for 4 images"),
        ([1.0], "returned 1 score for 4 images.*not broadcast"),
        (torch.ones(1), "not broadcast"),
        (torch.tensor(1.0), r"returned shape \(\) for 4 images"),
        (torch.ones(4, 1), r"returned shape \(4, 1\) for 4 images.*shape \(4,\)"),
        (np.ones((4, 1)), r"returned shape \(4, 1\)"),
        ([[1.0], [2.0], [3.0], [4.0]], r"returned shape \(4, 1\)"),
        ([[1.0], [2.0, 3.0], [3.0], [4.0]], "unequal parts"),
        (1.0, "returned float"),
        (None, "returned NoneType"),
        ("good", "returned str"),
        (["good"] * 4, "not all numbers"),
        ([1.0, None, 2.0, 3.0], "returned None at index 1"),
        ({"reward": [1.0] * 4}, "returned dict"),
        ((torch.ones(3), {}), "returned 3 scores for 4 images"),
        (torch.ones(4, device="meta"), "returned a meta tensor"),
        ([torch.ones((), device="meta")] * 4, "returned a meta tensor"),
        (torch.ones(4).to_sparse(), "returned a sparse or nested tensor"),
        (np.ones(4, dtype=np.complex64), "complex"),
        ([1j] * 4, "complex"),
        ([Unreadable()] * 4, "not all numbers"),
        (Unreadable(), "returned Unreadable"),
        (3.4e38 * torch.ones(4, dtype=torch.float64) * 2, "returned 6.8e.38 for image 0"),
        (torch.ones(4, dtype=torch.complex64), "complex"),
        ([0.0, 1.0, float("nan"), float("inf")], r"returned nan for image 2 \(prompt 'a cat'\)"),
        ([0.0, float("-inf"), 2.0, 3.0], r"returned -inf for image 1 \(prompt 'a blue car'\)"),
        (np.array([0.0, 0.0, 0.0, 1e300]), "returned 1e.300 for image 3"),
        (KeyError("label"), "raised KeyError: 'label'"),
        (RuntimeError("first line\nsecond line"), rf"raised RuntimeError: first line {HERE}$"),
        (ZeroDivisionError(), f"raised ZeroDivisionError {HERE}$"),
        (SystemExit(0), f"raised SystemExit: 0 {HERE}$"),
        (SystemExit(), f"raised SystemExit {HERE}$"),
        (GeneratorExit(), f"raised GeneratorExit {HERE}$"),
        (StopIteration(3), f"raised StopIteration: 3 {HERE}$"),
        (Unprintable(), f"raised Unprintable, whose text cannot be read {HERE}$"),
    ],
)
def test_every_other_answer_is_refused_in_one_sentence_naming_the_reward(answer, sentence):
    said = refusal(call, answer)
    assert said.startswith("reward 'probe' ")
    assert re.search(sentence, said)


def test_a_single_image_still_needs_a_vector():
    assert call([1.5], count=1).tolist() == [1.5]
    with pytest.raises(RewardError, match="shape"):
        call(torch.tensor(1.5), count=1)


def test_the_original_exception_is_kept():
    with pytest.raises(RewardError) as caught:
        call(KeyError("label"))
    assert isinstance(caught.value.__cause__, KeyError)


def test_inputs_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="4 images, 3 prompts and 4 metadata"):
        call_reward(lambda i, p, m: [0.0] * 4, images(), PROMPTS[:3], [{}] * 4)
    with pytest.raises(ValueError, match=r"float \(B, 3, H, W\)"):
        call_reward(lambda i, p, m: [0.0] * 4, images()[:, 0], PROMPTS, [{}] * 4)
    with pytest.raises(ValueError, match="uint8"):
        call_reward(lambda i, p, m: [0.0] * 4, images().to(torch.uint8), PROMPTS, [{}] * 4)


def test_the_answer_is_a_copy():
    buffer = torch.zeros(4)
    scores = call(lambda images: buffer)
    buffer += 1
    assert scores.tolist() == [0, 0, 0, 0]


class Brightness:
    name = "brightness"
    differentiable = True

    def __call__(self, images, prompts, metadata):
        self.grad_enabled = torch.is_grad_enabled()
        return images.mean(dim=(1, 2, 3))


def test_gradients_are_off_in_a_worker_thread_unless_asked_for():
    reward, pixels = Brightness(), images().requires_grad_()
    answers = {}

    def work():
        answers["off"] = call_reward(reward, pixels, PROMPTS, [{}] * 4), reward.grad_enabled
        answers["on"] = call_reward(reward, pixels, PROMPTS, [{}] * 4, differentiable=True), reward.grad_enabled

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers["off"][1] is False
    assert not answers["off"][0].requires_grad
    assert answers["on"][1] is True
    answers["on"][0].sum().backward()
    torch.testing.assert_close(pixels.grad, torch.full_like(pixels, 1 / (3 * 8 * 8)))


def test_asking_a_reward_for_gradients_it_has_not_is_refused():
    with pytest.raises(RewardError, match="'probe' is not differentiable"):
        call(lambda images: images.mean(dim=(1, 2, 3)), differentiable=True)

    class Liar(Brightness):
        def __call__(self, images, prompts, metadata):
            return super().__call__(images, prompts, metadata).detach()

    with pytest.raises(RewardError, match="says it is differentiable but"):
        call_reward(Liar(), images().requires_grad_(), PROMPTS, [{}] * 4, differentiable=True)


@pytest.mark.parametrize("size", [8, (8, 12)])
def test_check_reward_shows_a_flat_image_a_ramp_and_noise(size):
    seen = {}

    def spy(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata)
        return images.std(dim=(1, 2, 3))

    before = torch.get_rng_state()
    scores = check_reward(spy, image_size=size, metadata=[{"label": "apple"}])
    assert torch.equal(before, torch.get_rng_state())
    height, width = (8, 8) if size == 8 else size
    assert seen["images"].shape == (3, 3, height, width)
    assert 0 <= seen["images"].min() < seen["images"].max() <= 1
    assert scores[0] == 0
    assert scores[1:].min() > 0.1
    assert seen["metadata"] == [{"label": "apple"}] * 3
    assert all(isinstance(prompt, str) for prompt in seen["prompts"])


def test_check_reward_refuses_what_call_reward_refuses():
    with pytest.raises(RewardError, match="raised KeyError: 'label'"):
        check_reward(lambda images, prompts, metadata: [m["label"] for m in metadata], image_size=8)
    with pytest.raises(RewardError, match="returned 1 score for 3 images"):
        check_reward(lambda images, prompts, metadata: [0.0], image_size=8)
    with pytest.raises(RewardError, match="nan for image 0"):  # correlation with a flat image
        check_reward(lambda images, prompts, metadata: images.std((1, 2, 3)) / images.std((1, 2, 3)), image_size=8)
    with pytest.raises(RewardError, match="must be callable, got int"):
        check_reward(3, image_size=8)


def test_names():
    import functools

    def mine(images, prompts, metadata): ...

    assert reward_name(mine) == "mine"
    assert reward_name(functools.partial(mine, metadata=[])) == "mine"
    assert reward_name(Brightness()) == "brightness"
    assert reward_name(object()) == "object"


def test_without_gradients_a_reward_sees_what_a_file_holds():
    """So training, a served reward and a score of the saved files are one number."""
    seen = []

    def look(pixels, prompts, metadata):
        seen.append(pixels)
        return [0.0] * len(pixels)

    look.differentiable = True
    exact = images() * 1.2 - 0.1
    call_reward(look, exact, [""] * 4, [{}] * 4)
    levels = (exact.clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(seen[0], levels.float() / 255)
    assert (seen[0] - exact.clamp(0, 1)).abs().max() > 1e-4
    call_reward(look, exact, [""] * 4, [{}] * 4, differentiable=True)
    assert torch.equal(seen[1], exact)
