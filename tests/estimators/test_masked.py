"""Masked reductions: values, gradients, and the emptiness of what does not count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.estimators import aggregate, masked_mean, masked_sum, masked_whiten
from tests.helpers.oracles import F64, FILLS, assert_same, randn, refused, tensor, unmoved_by

MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
LONG = {"mode": "fixed_length", "length": 10}
CALLS = {
    "sum": lambda x, m: masked_sum(x, m, 1),
    "mean": lambda x, m: masked_mean(x, m, 1),
    "mean of all": lambda x, m: masked_mean(x, m, (0, 1)),
    "whiten": lambda x, m: masked_whiten(x, m, 1),
    "whiten all": lambda x, m: masked_whiten(x, m, (0, 1)),
    "token": lambda x, m: aggregate(x, m),
    "sequence": lambda x, m: aggregate(x, m, "sequence"),
    "fixed_length": lambda x, m: aggregate(x, m, "fixed_length"),
    "fixed_length 10": lambda x, m: aggregate(x, m, **LONG),
}


def test_values_and_gradients_by_hand():
    x = tensor([1.0, 2.0, 9.0, 6.0], [9.0, 4.0, 9.0, 9.0], [9.0] * 4)
    third = [[1 / 3, 1 / 3, 0, 1 / 3], [0, 1, 0, 0], [0] * 4]
    expected = {
        "sum": ([9.0, 4.0, 0.0], MASK.double().tolist()),
        "mean": ([3.0, 4.0, 0.0], third),
        "mean of all": (13 / 4, (MASK / 4).tolist()),
        "token": (13 / 4, (MASK / 4).tolist()),
        "sequence": (7 / 3, (torch.tensor(third, dtype=F64) / 3).tolist()),
        "fixed_length": (13 / 12, (MASK / 12).tolist()),
        "fixed_length 10": (13 / 30, (MASK / 30).tolist()),
    }
    for name, (value, gradient) in expected.items():
        leaf = x.clone().requires_grad_()
        result = CALLS[name](leaf, MASK)
        result.sum().backward()
        assert_same(result.detach(), torch.tensor(value, dtype=F64))
        assert_same(leaf.grad, torch.tensor(gradient, dtype=F64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fill", FILLS)
def test_masked_entries_change_neither_value_nor_gradient(name, fill):
    def weighed(x):
        result = CALLS[name](x, MASK)
        return result * torch.arange(1.0, result.numel() + 1).reshape(result.shape)

    unmoved_by(fill, MASK, weighed, randn(3, 4))


@pytest.mark.parametrize("name", CALLS)
def test_nothing_that_counts_gives_zero_and_zero_gradient(name):
    for shape in ((2, 3), (0, 3), (2, 0)):
        x = torch.full(shape, 1e9, requires_grad=True)
        result = CALLS[name](x, torch.zeros(shape, dtype=torch.bool))
        result.sum().backward()
        assert (result == 0).all()
        assert (x.grad == 0).all()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "fixed_length"])
def test_padding_changes_nothing(name):
    x = randn(3, 4)
    padded, mask = torch.cat([x, randn(3, 2, seed=1)], 1), torch.cat([MASK, torch.zeros(3, 2).bool()], 1)
    result, wide = CALLS[name](x, MASK), CALLS[name](padded, mask)
    assert_same(wide[:, :4] if "whiten" in name else wide, result)


def test_whitened_entries_have_mean_zero_and_unit_population_std():
    x, mask = randn(4, 50, seed=3) * 7 + 3, randn(4, 50, seed=4) > 0
    for dim in (1, (0, 1)):
        white = masked_whiten(x, mask, dim)
        assert_same(masked_mean(white, mask, dim), torch.zeros_like(white).sum(dim))
        assert_same(masked_mean(white**2, mask, dim), 1 + torch.zeros_like(white).sum(dim))
        assert (white[~mask] == 0).all()
    kept = x[0][mask[0]]
    expected = (kept - kept.mean()) / kept.std(correction=0)
    assert_same(masked_whiten(x, mask, 1)[0][mask[0]], expected)


def test_whiten_has_the_gradient_of_its_formula():
    x = randn(3, 5).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    assert torch.autograd.gradcheck(lambda v: masked_whiten(v, mask, 1), (x,))
    assert torch.autograd.gradcheck(lambda v: masked_whiten(v, mask, (0, 1)), (x,))


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e9, 1e30])
@pytest.mark.parametrize("masked", [0, 1])
def test_equal_entries_whiten_to_exactly_zero_with_no_gradient(value, masked):
    mask = torch.tensor([[1] * (8 - masked) + [0] * masked] * 2).bool()
    for dim in (1, (0, 1)):
        x = torch.where(mask, value, 0.0).requires_grad_()
        white = masked_whiten(x, mask, dim)
        (white * torch.arange(8.0)).sum().backward()
        assert (white == 0).all()
        assert (x.grad == 0).all()


def test_a_spread_that_vanishes_in_the_dtype_is_a_std_of_zero_and_a_std_of_one_is_not():
    both = torch.ones(1, 2, dtype=torch.bool)
    x = torch.tensor([[0.0, 1e-30]], requires_grad=True)  # its square is 0 in float32
    white = masked_whiten(x, both, 1)
    white[0, 1].backward()
    assert white.tolist() == [[0.0, 0.0]]
    assert x.grad.tolist() == [[0.0, 0.0]]
    assert masked_whiten(torch.tensor([[1.0, 3.0]]), both, 1).tolist() == [[-1.0, 1.0]]


def test_aggregates_of_a_single_row_and_of_length_one():
    x, mask = torch.tensor([[2.0, 4.0, 9.0]]), torch.tensor([[True, True, False]])
    assert aggregate(x, mask, "token").item() == aggregate(x, mask, "sequence").item() == 3.0
    assert aggregate(x, mask, "fixed_length").item() == 2.0
    assert aggregate(x, mask, "fixed_length", length=1).item() == 6.0


def test_half_precision_becomes_float32():
    for name in CALLS:
        assert CALLS[name](torch.ones(3, 4, dtype=torch.float16), MASK).dtype == torch.float32


def test_wrong_shapes_and_settings_are_named():
    x = torch.zeros(2, 3)
    for call in CALLS.values():
        refused(r"\(2, 3\).*\(2, 1\)", call, x, torch.ones(2, 1, dtype=torch.bool))
        refused("mask must be a bool", call, x, torch.ones(2, 3))
    for call in (masked_sum, masked_mean, masked_whiten):
        for dim in (None, ()):
            refused("dim=", call, x, x.bool(), dim)
    refused("mode='mean'", aggregate, x, x.bool(), "mean")
    refused("length=0", aggregate, x, x.bool(), "fixed_length", length=0)
    refused(r"2 dimension.*x \(3,\), mask \(3,\)", aggregate, x[0], x[0].bool())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.booleans()), max_size=8), st.sampled_from(sorted(CALLS)))
def test_extreme_inputs_stay_finite(pairs, name):
    x = torch.tensor([p[0] for p in pairs], dtype=torch.float32).reshape(1, -1).requires_grad_()
    mask = torch.tensor([p[1] for p in pairs], dtype=torch.bool).reshape(1, -1)
    result = CALLS[name](x, mask)
    result.sum().backward()
    assert result.isfinite().all()
    assert x.grad.isfinite().all()
