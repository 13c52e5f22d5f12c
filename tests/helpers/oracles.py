"""What tests of mathematics share: numbers in float64, values with their gradients, comparisons, refusals."""

import math

import pytest
import torch

F64 = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-12}
FILLS = [1e9, -1e9, math.inf, -math.inf, math.nan]  # what padding may hold


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def with_gradients(call, *inputs, weigh=False):
    """[value, a gradient for each input] of the value's sum, or with ``weigh`` of a random linear function of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = call(*leaves)
    upstream = randn(*value.shape, seed=99).to(value.dtype) if weigh else torch.ones_like(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def assert_same(found, wanted, **tolerance):
    """Two tensors, or two lists of as many."""
    torch.testing.assert_close(found, wanted, **(EXACT | tolerance))


def identical(found, wanted):
    return len(found) == len(wanted) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted))


def refused(match, call, *arguments, **settings):
    """``call`` raises a ValueError that says ``match``."""
    with pytest.raises(ValueError, match=match):
        call(*arguments, **settings)


def unmoved_by(fill, masks, call, *clean, trained=1):
    """[value, gradients of the first ``trained`` inputs]: the same bits whether masked inputs hold 0 or ``fill``.

    ``masks``: one for each input, or one for all; where it is False the gradient is 0.
    """
    masks, results = masks if isinstance(masks, list) else [masks] * len(clean), []
    for filler in (0.0, fill):
        inputs = [torch.where(mask, x, filler) for mask, x in zip(masks, clean)]
        leaves = [x.requires_grad_() for x in inputs[:trained]]
        value = call(*inputs)
        gradients = torch.autograd.grad(value.sum(), leaves) if value.requires_grad else []
        assert all((gradient[~mask] == 0).all() for mask, gradient in zip(masks, gradients))
        results.append([value.detach(), *gradients])
    assert identical(*results)
    return results[1]


def assert_compiles(call, logp, *arguments, **settings):
    """Without a graph break, to what it is: the value, and the gradient of ``logp``."""
    torch._dynamo.reset()  # each form is a graph of its own, and their number is limited
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    eager, graph = (with_gradients(lambda x, f=f: f(x, *arguments, **settings), logp) for f in (call, compiled))
    assert_same(graph, eager)
