"""Group, leave-one-out, per-prompt and GAE advantages: worked numbers, identities, degenerate groups."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.estimators import (
    PromptStatistics,
    gae,
    group_advantages,
    leave_one_out_advantages,
    multi_reward_advantages,
    reward_to_go,
    softmax_weights,
)
from tests.helpers.oracles import F64, FILLS, assert_same, randn, refused, tensor

IDS = torch.tensor([7, 3, 7, 3, 7, 9])


@pytest.mark.parametrize(("floor", "size"), [(0.0, 0.8660254038), (0.1, 1e-4), (0.01, 1e-3), (0.001, 1e-2)])
def test_noise_is_blown_up_without_a_floor_and_not_with_one(floor, size):
    rewards = tensor(0.99999, 1.00001, 0.99999, 1.00001)
    advantages = group_advantages(rewards, torch.zeros(4, dtype=torch.long), clip_std=(floor, math.inf))
    assert_same(advantages, size * tensor(-1.0, 1, -1, 1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("ddof", [0, 1])
def test_each_scale_equals_its_formula_in_any_order_of_groups(ddof):
    rewards = randn(6)
    mean, std = torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64)
    for i in IDS.unique():
        rows = i == IDS
        mean[rows] = rewards[rows].mean()
        std[rows] = rewards[rows].std(correction=ddof) if rows.sum() > 1 else math.inf
    for scale, divisor in (("group", std), ("batch", rewards.std(correction=ddof)), ("none", 1.0)):
        result = group_advantages(rewards, IDS, scale=scale, ddof=ddof)
        assert_same(result, (rewards - mean) / divisor)
        assert result[5] == 0
    high = group_advantages(rewards, IDS, clip_std=(0.0, 1e-3))
    assert_same(high, (rewards - mean) / 1e-3)


def test_a_group_of_two_is_plus_and_minus_one_over_root_two():
    result = group_advantages(tensor(0.3, 4.0), torch.zeros(2, dtype=torch.long))
    assert_same(result, tensor(-1.0, 1.0) / math.sqrt(2))


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1.0, 20.0])
def test_softmax_weights_are_the_formula_in_any_order_of_groups(temperature):
    rewards = randn(6)
    found = softmax_weights(rewards, IDS, temperature=temperature)
    for i in IDS.unique():
        rows = i == IDS
        of_group = rewards[rows]
        z = (of_group - of_group.mean()) / of_group.std() if rows.sum() > 1 else torch.zeros(1, dtype=F64)
        assert_same(found[rows], rows.sum() * torch.softmax(z / temperature, dim=0))
    assert_same(softmax_weights(3 * rewards - 7, IDS, temperature=temperature), found, rtol=1e-9, atol=0)
    assert_same(softmax_weights(tensor(0.0, 2), torch.zeros(2, dtype=torch.long)).log().diff(), tensor(math.sqrt(2)))


def test_hot_softmax_weights_are_one_plus_the_advantage_over_the_temperature():
    """So reward-weighted regression is then imitation of everything plus a policy gradient."""
    rewards = randn(6)
    weights = softmax_weights(rewards, IDS, temperature=1e4)
    assert_same(1e4 * (weights - 1), group_advantages(rewards, IDS), rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 + 0.1, -1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equal_rewards_and_single_ones_give_exactly_zero(scale, ddof, value, dtype):
    ids = torch.tensor([0] * 7 + [1])
    rewards = torch.tensor([value] * 7 + [5.0], dtype=dtype)
    assert (group_advantages(rewards, ids, scale=scale, ddof=ddof) == 0).all()
    assert (leave_one_out_advantages(rewards, ids) == 0).all()
    assert (softmax_weights(rewards, ids, temperature=1e-9) == 1).all()
    assert (group_advantages(rewards[:1], ids[:1], scale=scale, ddof=ddof) == 0).all()


def test_leave_one_out_subtracts_the_mean_of_the_others():
    rewards = randn(6)
    expected = torch.zeros(6, dtype=F64)
    for i in range(5):
        others = (IDS[i] == IDS) & (torch.arange(6) != i)
        expected[i] = rewards[i] - rewards[others].mean()
    assert_same(leave_one_out_advantages(rewards, IDS), expected)


@pytest.mark.parametrize("settings_", [{}, {"scale": "batch"}, {"scale": "none", "ddof": 0}, {"clip_std": (0.5, 2.0)}])
def test_several_rewards_are_normalised_one_by_one_and_then_weighed(settings_):
    rewards, weights = randn(6, 3), tensor(1.0, -0.5, 2.0)
    columns = [group_advantages(rewards[:, k], IDS, **settings_) for k in range(3)]
    result = multi_reward_advantages(rewards, IDS, weights, **settings_)
    assert_same(result, columns[0] - 0.5 * columns[1] + 2 * columns[2])
    ones = multi_reward_advantages(rewards, IDS, **settings_)
    assert_same(ones, columns[0] + columns[1] + columns[2])
    assert torch.equal(ones, multi_reward_advantages(rewards, IDS, torch.ones(3, dtype=F64), **settings_))
    assert torch.equal(multi_reward_advantages(rewards[:, :1], IDS, **settings_), columns[0])


def test_several_rewards_less_the_mean_of_the_others_that_have_something_to_say():
    rewards, weights = randn(6, 2), tensor(1.5, -2.0)
    rewards[0, 0] = math.nan
    said = torch.arange(6) > 0
    first = torch.zeros(6, dtype=F64)
    first[said] = leave_one_out_advantages(rewards[said, 0], IDS[said])
    result = multi_reward_advantages(rewards, IDS, weights, estimator=leave_one_out_advantages)
    assert_same(result, 1.5 * first - 2 * leave_one_out_advantages(rewards[:, 1], IDS))


def test_several_rewards_by_hand_and_whatever_their_units():
    ids, root = torch.zeros(2, dtype=torch.long), math.sqrt(0.5)
    rewards = tensor([0.0, 500.0, 3.0], [1.0, 100.0, 3.0])
    assert multi_reward_advantages(rewards, ids).tolist() == pytest.approx([0, 0], abs=1e-15)
    weights = tensor(3.0, 1.0, 9.0)  # the third never differs and has no say
    assert multi_reward_advantages(rewards, ids, weights).tolist() == pytest.approx([-2 * root, 2 * root])
    rewards = randn(6, 2)
    units = tensor(1e-3, 1e4)
    other = multi_reward_advantages(units * rewards + 7, IDS)
    assert_same(other, multi_reward_advantages(rewards, IDS), rtol=1e-9, atol=1e-9)
    together = group_advantages((units * rewards).sum(1), IDS)
    assert (other - together).abs().max() > 0.1


@pytest.mark.parametrize("settings_", [{}, {"scale": "batch"}, {"scale": "none"}, {"ddof": 0, "clip_std": (0.7, 2.0)}])
def test_a_reward_with_nothing_to_say_is_left_out_of_its_group(settings_):
    rewards, weights = randn(6, 2), tensor(1.5, -2.0)
    rewards[[0, 1, 3, 5], [1, 1, 1, 1]] = math.nan
    ddof, (low, high) = settings_.get("ddof", 1), settings_.get("clip_std", (0.0, math.inf))
    second = torch.zeros(6, dtype=F64)
    said = rewards[[2, 4], 1]  # group 7 has these two left, group 3 and group 9 have none
    std = 1.0 if settings_.get("scale") == "none" else said.std(correction=ddof).clamp(low, high)
    second[[2, 4]] = (said - said.mean()) / std
    first = group_advantages(rewards[:, 0], IDS, **settings_)
    result = multi_reward_advantages(rewards, IDS, weights, **settings_)
    assert_same(result, 1.5 * first - 2 * second)
    assert multi_reward_advantages(torch.full((6, 2), math.nan), IDS, **settings_).tolist() == [0.0] * 6


def test_a_batch_is_scaled_by_the_rewards_that_were_given():
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    rewards = tensor(1.0, 3.0, math.nan, 10.0, math.nan, 14.0)
    std = tensor(1.0, 3.0, 10.0, 14.0).std()
    expected = tensor(-1.0, 1.0, 0.0, -2.0, 0.0, 2.0) / std
    assert_same(multi_reward_advantages(rewards[:, None], ids, scale="batch"), expected)


def test_several_rewards_errors_types_and_empty_batches():
    rewards, weights = randn(6, 2).requires_grad_(), randn(2, seed=1).requires_grad_()
    assert not multi_reward_advantages(rewards, IDS, weights).requires_grad
    for dtype, expected in ((torch.int64, torch.float32), (torch.float16, torch.float32), (F64, F64)):
        assert multi_reward_advantages(rewards.to(dtype), IDS).dtype == expected
    for bad, bad_weights in (
        (rewards[:, 0], None),
        (rewards[:, :0], None),
        (rewards[None], None),
        (rewards, torch.ones(1)),
        (rewards, torch.ones(2, 1)),
        (rewards, torch.ones(6)),
        (rewards, torch.tensor(1.0)),
    ):
        with pytest.raises(ValueError, match=r"expected rewards \(B, K\) with K > 0 and weights \(K,\) or None"):
            multi_reward_advantages(bad, IDS, bad_weights)
    refused(r"\(6,\).*\(5,\)", multi_reward_advantages, rewards, IDS[:5])
    for bad in (math.inf, -math.inf, 1e200):
        values = torch.tensor([[0.0, math.nan]] * 5 + [[0.0, bad]], dtype=F64)
        refused(r"hold 1 value\(s\) that are not finite", multi_reward_advantages, values, IDS)
    refused("scale='std'", multi_reward_advantages, rewards, IDS, scale="std")
    assert multi_reward_advantages(torch.zeros(0, 2), IDS[:0], torch.ones(2)).shape == (0,)
    assert multi_reward_advantages(rewards[:1], IDS[:1]).tolist() == [0.0]


def test_results_carry_no_gradient_and_the_dtype_of_the_rewards():
    rewards = randn(6).requires_grad_()
    assert not group_advantages(rewards, IDS).requires_grad
    assert not leave_one_out_advantages(rewards, IDS).requires_grad
    assert not gae(rewards[None], rewards[None], torch.ones(1, 6).bool())[0].requires_grad
    for dtype, expected in ((torch.int64, torch.float32), (torch.float16, torch.float32), (F64, F64)):
        assert group_advantages(rewards.to(dtype), IDS).dtype == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("call", [group_advantages, leave_one_out_advantages])
def test_bad_rewards_and_shapes_are_named(call, bad):
    refused(r"\(6,\) hold 1 value", call, torch.tensor([1.0, 2, 3, 4, 5, bad]), IDS)
    refused(r"\(5,\).*\(6,\)", call, torch.zeros(5), IDS)
    refused(r"1 dimension.*\(1, 6\)", call, torch.zeros(1, 6), IDS[None])
    refused("must be integers", call, torch.zeros(6), IDS.float())


def test_bad_settings_are_named():
    for settings_ in ({"clip_std": (1.0, 0.5)}, {"clip_std": (-1.0, 1.0)}, {"clip_std": (math.nan, 1.0)}, {"ddof": 2}):
        refused("clip_std=", group_advantages, torch.zeros(6), IDS, **settings_)
    refused("scale='std'", group_advantages, torch.zeros(6), IDS, scale="std")
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for gamma, lam in ((-0.1, 1.0), (1.1, 1.0), (1.0, -0.1), (1.0, 1.1), (math.nan, 1.0), (1.0, math.nan)):
        refused("gamma=", gae, x, x, mask, gamma=gamma, lam=lam)
    for gamma, lam in ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)):
        assert gae(x, x, mask, gamma=gamma, lam=lam)[0].isfinite().all()
    for call in (lambda m: gae(x, x, m), lambda m: reward_to_go(x, m)):
        refused(r"mask \(2, 1\)", call, mask[:, :1])
        refused("mask must be a bool", call, mask.float())
    refused(r"rewards \(2, 3\), values \(2, 2\)", gae, x, x[:, :2], mask)
    refused("2 dimension", reward_to_go, x[0])


def test_gae_worked_numbers():
    rewards, values = torch.tensor([[[0, 0, 1.0]], [[0.5, 0.6, 0.8]]], dtype=F64)
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.99, lam=0.95)
    expected = tensor([0.45148405, 0.3801, 0.2])
    assert_same(advantages, expected)
    assert_same(returns, expected + values)


def test_gae_limits_are_return_minus_value_and_the_one_step_error():
    rewards, values, mask = randn(4, 6), randn(4, 6, seed=1), torch.ones(4, 6, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert_same(advantages, reward_to_go(rewards) - values)
    assert_same(returns, reward_to_go(rewards))
    for default, stated in zip(gae(rewards, values, mask), gae(rewards, values, mask, gamma=1.0, lam=0.95)):
        assert torch.equal(default, stated)
    discounted = sum(0.9**k * rewards[:, k] for k in range(6))
    assert_same(gae(rewards, values, mask, gamma=0.9, lam=1.0)[1][:, 0], discounted)
    following = torch.cat([values[:, 1:], torch.zeros(4, 1, dtype=F64)], 1)
    one_step = rewards + 0.9 * following - values
    assert_same(gae(rewards, values, mask, gamma=0.9, lam=0.0)[0], one_step)


@pytest.mark.parametrize("fill", FILLS)
def test_masked_entries_are_skipped_wherever_they_stand(fill):
    rewards, values = randn(1, 3), randn(1, 3, seed=1)
    dense = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.8)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 0]]).bool()
    wide = torch.full((2, 1, 7), fill, dtype=F64)
    wide[:, mask] = torch.stack([rewards, values])[:, 0]
    for result, expected in zip(gae(*wide, mask, gamma=0.9, lam=0.8), dense):
        assert_same(result[mask], expected[0])
        assert (result[~mask] == 0).all()
    x = wide[0].clone().requires_grad_()
    to_go = reward_to_go(x, mask)
    assert_same(to_go[mask], reward_to_go(rewards)[0])
    to_go.sum().backward()
    assert to_go[~mask].tolist() == [0.0] * 4
    assert x.grad.tolist() == [[0, 1, 0, 0, 2, 3, 0]]  # the k-th that counts is in k sums


def test_reward_to_go_by_hand_with_its_gradient():
    x = torch.tensor([[1.0, 10, 100]], requires_grad=True)
    result = reward_to_go(x)
    assert result.tolist() == [[111, 110, 100]]
    result.sum().backward()
    assert x.grad.tolist() == [[1, 2, 3]]


def test_empty_batches_are_empty():
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for scale in ("group", "batch", "none"):
        assert group_advantages(none, ids, scale=scale).shape == (0,)
    assert leave_one_out_advantages(none, ids).shape == (0,)
    for shape in ((0, 3), (2, 0)):
        x = torch.zeros(shape)
        assert gae(x, x, x.bool())[0].shape == gae(x, x, x.bool())[1].shape == reward_to_go(x).shape == shape


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.floats(-1e30, 1e30), st.integers(0, 2)), max_size=8),
    st.sampled_from(["group", "batch", "none"]),
    st.sampled_from([0, 1]),
)
def test_extreme_rewards_stay_finite_and_centred(pairs, scale, ddof):
    rewards = torch.tensor([p[0] for p in pairs], dtype=F64)
    ids = torch.tensor([p[1] for p in pairs], dtype=torch.long)
    result = group_advantages(rewards, ids, scale=scale, ddof=ddof)
    assert result.isfinite().all()
    assert leave_one_out_advantages(rewards, ids).isfinite().all()
    for i in ids.unique():
        group = result[ids == i]
        assert abs(group.sum()) <= 1e-9 * (1 + group.abs().max())
        if len(group) == 1 or rewards[ids == i].unique().numel() == 1:
            assert (group == 0).all()


def test_one_fixed_std_and_the_largest_rewards_are_allowed():
    rewards, group = tensor(1.0, 3.0), torch.zeros(2, dtype=torch.long)
    assert group_advantages(rewards, group, clip_std=(4.0, 4.0)).tolist() == [-0.25, 0.25]
    assert group_advantages(rewards * 1e149, group).isfinite().all()
    for large in (1.5e150, -1.5e150):
        refused("not finite", group_advantages, tensor(large, 0.0), group)


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
