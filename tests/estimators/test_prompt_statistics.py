"""Per-prompt reward history: a hand-computed example, the batch fallback, and an exact round trip through JSON."""

import json
import math

import torch
from oracles import F64, assert_same, refused, tensor

from diffusion_align.estimators import PromptStatistics


def _standardised(rewards, history):
    history = torch.tensor(history, dtype=F64)
    return (torch.tensor(rewards, dtype=F64) - history.mean()) / history.std(correction=0)


def test_batch_statistics_until_min_count_and_the_prompts_own_afterwards():
    statistics = PromptStatistics(buffer_size=3, min_count=3)
    # Mean 3, population std sqrt(5): nobody has three rewards yet.
    first = statistics.update(["a", "b", "a", "b"], tensor(0.0, 2.0, 4.0, 6.0))
    assert_same(first, tensor(-3.0, -1.0, 1.0, 3.0) / math.sqrt(5))
    # a: the new reward counts: 0, 4, 8. b: three arrive, the two oldest drop out: 1, 2, 9. c: the batch's.
    rewards = [8.0, 1.0, 2.0, 9.0, 5.0]
    second = statistics.update(["a", "b", "b", "b", "c"], torch.tensor(rewards, dtype=F64))
    assert_same(second[:1], tensor(4.0 / math.sqrt(32 / 3)))
    assert_same(second[1:4], _standardised(rewards[1:4], [1.0, 2.0, 9.0]))
    assert_same(second[4:], _standardised([5.0], rewards))
    assert statistics.state_dict() == {"history": {"a": [0.0, 4.0, 8.0], "b": [1.0, 2.0, 9.0], "c": [5.0]}}


def test_defaults_are_a_buffer_of_32_and_16_rewards():
    statistics = PromptStatistics()
    assert (statistics.buffer_size, statistics.min_count) == (32, 16)
    statistics.update(["a"] * 14, torch.arange(14.0))
    batch = statistics.update(["a", "b"], torch.tensor([1.0, 3.0]))  # 15 rewards: still the batch's
    torch.testing.assert_close(batch, torch.tensor([-1.0, 1.0]))
    own = statistics.update(["a", "b"], torch.tensor([100.0, 3.0]))  # the 16th reward counts itself
    expected = _standardised([100.0], [*range(14), 1.0, 100.0])
    torch.testing.assert_close(own[:1], expected.float())


def test_equal_rewards_give_exactly_zero():
    statistics = PromptStatistics(buffer_size=8, min_count=2)
    for rewards in (torch.full((7,), 0.1, dtype=F64), torch.full((7,), 0.1)):
        assert (PromptStatistics(8, 2).update(["a"] * 7, rewards) == 0).all()
        assert (PromptStatistics(8, 8).update(["a"] * 7, rewards) == 0).all()
    assert statistics.update(["a"], torch.tensor([0.1])).item() == 0
    assert statistics.update([], torch.zeros(0)).shape == (0,)


def test_large_offset_does_not_cost_precision():
    rewards = tensor(0.0, 1.0, 2.0, 5.0)
    plain, offset = (PromptStatistics(4, 4).update(["a"] * 4, rewards + c) for c in (0.0, 2.0**40))
    assert_same(offset, plain)


def test_a_json_round_trip_continues_bit_for_bit():
    statistics, generator = PromptStatistics(4, 3), torch.Generator().manual_seed(0)
    prompts = ["a", 'b "quoted" é', "a", "c"]
    for _ in range(3):
        statistics.update(prompts, torch.randn(4, generator=generator))
    resumed = PromptStatistics(4, 3)
    resumed.load_state_dict(json.loads(json.dumps(statistics.state_dict())))
    assert resumed.state_dict() == statistics.state_dict()
    rewards = torch.randn(4, generator=generator)
    assert torch.equal(resumed.update(prompts, rewards), statistics.update(prompts, rewards))
    smaller = PromptStatistics(2, 2)
    smaller.load_state_dict(statistics.state_dict())
    assert smaller.state_dict()["history"]["a"] == statistics.state_dict()["history"]["a"][-2:]
    smaller.update(["a"], torch.zeros(1))
    assert len(smaller.state_dict()["history"]["a"]) == 2


def test_result_has_no_gradient_and_float32_or_wider():
    result = PromptStatistics(2, 1).update(["a", "b"], torch.tensor([1.0, 2.0], requires_grad=True).half())
    assert not result.requires_grad
    assert result.dtype == torch.float32


def test_bad_input_is_named_and_leaves_the_history_alone():
    statistics = PromptStatistics(4, 2)
    statistics.update(["a"], torch.ones(1))
    before = statistics.state_dict()
    refused(r"got 2 and \(3,\)", statistics.update, ["a", "b"], torch.zeros(3))
    refused(r"got 2 and \(2, 1\)", statistics.update, ["a", "b"], torch.zeros(2, 1))
    refused("B prompts", statistics.update, "ab", torch.zeros(2))
    refused("not finite", statistics.update, ["a", "b"], torch.tensor([1.0, math.nan]))
    assert statistics.state_dict() == before
    refused(r"got \{.stats.: \{\}\}", statistics.load_state_dict, {"stats": {}})
    for bad in (None, [], {"history": [1.0]}):
        refused("expected the result of", statistics.load_state_dict, bad)
    assert statistics.state_dict() == before
    for buffer_size, min_count in ((4, 5), (4, 0), (0, 0)):
        refused("min_count=", PromptStatistics, buffer_size, min_count)


def test_the_state_has_a_bound_and_resumes_exactly():
    """Every prompt new, as of a prompt list that no epoch repeats: the prompts seen last are kept."""
    statistics, generator = PromptStatistics(4, 2), torch.Generator().manual_seed(0)
    for start in range(0, 25_600, 3200):
        statistics.update([f"prompt {i}" for i in range(start, start + 3200)], torch.randn(3200, generator=generator))
    assert list(statistics.state_dict()["history"]) == [f"prompt {i}" for i in range(25_600 - 4096, 25_600)]
    assert len(json.dumps(statistics.state_dict(), indent=1)) < 200_000

    few = PromptStatistics(4, 2, max_prompts=3)
    for prompts in (["a", "b"], ["c", "a"], ["d"]):  # b is the one not seen for longest
        few.update(prompts, torch.randn(len(prompts), generator=generator))
    assert list(few.state_dict()["history"]) == ["c", "a", "d"]
    resumed = PromptStatistics(4, 2, max_prompts=3)
    resumed.load_state_dict(json.loads(json.dumps(few.state_dict())))
    for prompts in (["c", "e"], ["a", "d"], ["c", "e", "a", "d"]):
        rewards = torch.randn(len(prompts), generator=generator)
        assert torch.equal(resumed.update(prompts, rewards), few.update(prompts, rewards))
        assert list(resumed.state_dict()["history"].items()) == list(few.state_dict()["history"].items())
    refused("max_prompts=0", PromptStatistics, 4, 2, max_prompts=0)
    assert PromptStatistics(4, 2, max_prompts=1).max_prompts == 1  # the least that is allowed


def test_an_old_state_with_more_prompts_is_cut():
    statistics = PromptStatistics(4, 2, max_prompts=2)
    statistics.load_state_dict({"history": {"a": [1.0], "b": [2.0], "c": [3.0]}})
    assert statistics.state_dict()["history"] == {"b": [2.0], "c": [3.0]}
