"""Log-probs, entropy and KL of categorical actions against log_softmax, gather and torch.distributions."""

import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from diffusion_align import estimators
from diffusion_align.estimators import categorical_entropy, categorical_kl, linear_token_log_probs, token_log_probs
from tests.helpers import oracles
from tests.helpers.oracles import F64, FILLS, assert_same, identical, randn, refused, tensor

B, T, V, D = 2, 5, 23, 4
CHUNKS = [None, 1, 7, V, V + 5]
with_gradients = partial(oracles.with_gradients, weigh=True)
GARBAGE_TEMPERATURES = [0.0, -1.0, math.nan, math.inf]


def _labels(seed=0):
    """(B, T), a few of them -100."""
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))
    labels[0, 1] = labels[1, 3:] = -100
    return labels


def _scored(labels, **settings_):
    return lambda logits: token_log_probs(logits, labels, **settings_)


def _linear(labels, **settings_):
    return lambda hidden, weight: linear_token_log_probs(hidden, weight, labels, **settings_)


def _naive(logits, labels, temperature=1.0):
    scored = labels != -100
    index = torch.where(scored, labels, 0).unsqueeze(-1)
    return torch.where(scored, (logits / temperature).log_softmax(-1).gather(-1, index).squeeze(-1), 0.0)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_token_log_probs_are_log_softmax_and_gather(chunk_size, temperature, seed):
    logits, labels = 3 * randn(B, T, V, seed=seed), _labels(seed)
    got = with_gradients(_scored(labels, temperature=temperature, chunk_size=chunk_size), logits)
    assert_same(got, with_gradients(lambda x: _naive(x, labels, temperature), logits))


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_linear_form_is_the_output_layer_and_then_token_log_probs(chunk_size, temperature, seed):
    hidden, weight, labels = randn(B, T, D, seed=seed), randn(V, D, seed=seed + 10), _labels(seed)
    got = with_gradients(_linear(labels, temperature=temperature, chunk_size=chunk_size), hidden, weight)
    assert_same(got, with_gradients(lambda h, w: _naive(h @ w.T, labels, temperature), hidden, weight))
    assert_same(
        got, with_gradients(lambda h, w: token_log_probs(h @ w.T, labels, temperature=temperature), hidden, weight)
    )


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_linear_form_with_a_bias_and_its_entropy(chunk_size, temperature):
    inputs, labels = (randn(B, T, D), randn(V, D, seed=1), randn(V, seed=2)), _labels()
    settings_ = {"temperature": temperature, "chunk_size": chunk_size}

    def both(h, w, b):
        return estimators.linear_log_probs_and_entropy(h, w, labels, bias=b, **settings_)

    got = with_gradients(lambda *x: both(*x)[0], *inputs)
    assert_same(got, with_gradients(lambda h, w, b: _naive(h @ w.T + b, labels, temperature), *inputs))
    entropy = both(*(x.requires_grad_() for x in inputs))[1]
    assert not entropy.requires_grad
    exact = categorical_entropy(inputs[0] @ inputs[1].T + inputs[2], temperature=temperature)
    assert_same(entropy, torch.where(labels == -100, 0.0, exact.detach()))


@pytest.mark.parametrize("impossible", [slice(5, 6), slice(0, 7), slice(7, 14), slice(7, V), slice(0, 14)])
def test_actions_that_the_bias_forbids_count_nothing(impossible):
    hidden, weight, bias = randn(B, T, D), randn(V, D, seed=1), torch.zeros(V, dtype=F64)
    bias[impossible] = -math.inf
    labels = (bias != -math.inf).nonzero().squeeze(-1)[:1].expand(B, T)
    call = partial(estimators.linear_log_probs_and_entropy, labels=labels, bias=bias, chunk_size=7)
    logits = hidden @ weight.T + bias
    assert_same(list(call(hidden, weight)), [_naive(logits, labels), categorical_entropy(logits)])
    got = with_gradients(lambda h, w: call(h, w)[0], hidden, weight)
    assert_same(got, with_gradients(lambda h, w: _naive(h @ w.T + bias, labels), hidden, weight))


def test_the_gradient_of_a_token_that_is_all_but_certain_does_not_cancel_out():
    weight, labels = torch.eye(64, dtype=F64), torch.tensor([[5]])
    hidden = 14 * weight[5].view(1, 1, 64)
    scored = partial(linear_token_log_probs, labels=labels, chunk_size=16)
    value, wanted, _ = with_gradients(lambda h, w: _naive(h @ w.T, labels), hidden, weight)
    assert -1e-3 < value.item() < 0
    _, got, _ = with_gradients(scored, hidden.float(), weight.float())
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


def test_gradcheck():
    labels = torch.tensor([[2, -100, 0], [10, 5, 5]])
    logits, hidden, weight = (x.requires_grad_() for x in (randn(2, 3, 11), randn(2, 3, 3), randn(11, 3, seed=1)))
    assert torch.autograd.gradcheck(_scored(labels, temperature=0.7, chunk_size=4), logits)
    assert torch.autograd.gradcheck(_linear(labels, temperature=0.7, chunk_size=4), (hidden, weight))


def test_a_second_derivative_is_refused_not_wrong():
    logits = randn(B, T, V).requires_grad_()
    loss = token_log_probs(logits, _labels(), chunk_size=7).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):  # noqa: PT012
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        (logits.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("trained", ["hidden", "weight", "neither"])
def test_linear_form_gives_a_gradient_to_what_asks_for_one(trained):
    labels = _labels()
    inputs = {"hidden": randn(B, T, D), "weight": randn(V, D, seed=1)}
    _, *both = with_gradients(_linear(labels, chunk_size=7), *inputs.values())
    for name, x in inputs.items():
        x.requires_grad_(name == trained)
    value = linear_token_log_probs(**inputs, labels=labels, chunk_size=7)
    assert value.requires_grad == (trained != "neither")
    if value.requires_grad:
        value.backward(randn(B, T, seed=99))
    for (name, x), gradient in zip(inputs.items(), both):
        assert torch.equal(x.grad, gradient) if name == trained else x.grad is None


def test_inputs_that_are_views_are_fine():
    labels = _labels()
    got = with_gradients(lambda x: token_log_probs(x.permute(2, 1, 0), labels, chunk_size=7), randn(V, T, B))
    assert_same(got, with_gradients(lambda x: _naive(x.permute(2, 1, 0), labels), randn(V, T, B)))
    row, weight = randn(1, 1, D), randn(D, V, seed=1)
    got = with_gradients(lambda h, w: linear_token_log_probs(h.expand(B, T, D), w.T, labels, chunk_size=7), row, weight)
    assert_same(got, with_gradients(lambda h, w: _naive(h.expand(B, T, D) @ w, labels), row, weight))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    logits, labels = randn(1, 2, 300), torch.tensor([[100, -100]])
    for chunk_size in (None, 7, 200):
        got = token_log_probs(logits, labels.to(dtype), chunk_size=chunk_size)
        assert torch.equal(got, token_log_probs(logits, labels, chunk_size=chunk_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_half_precision_logits_are_computed_in_float32(dtype, chunk_size):
    logits, labels = (5 * randn(B, T, V)).to(dtype), _labels()
    value, gradient = with_gradients(_scored(labels, temperature=0.7, chunk_size=chunk_size), logits)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    wide = with_gradients(_scored(labels, temperature=0.7, chunk_size=chunk_size), logits.float())
    assert identical([value, gradient], [wide[0], wide[1].to(dtype)])
    assert_same(
        wide,
        [x.float() for x in with_gradients(lambda x: _naive(x, labels, 0.7), logits.to(F64))],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_linear_form(dtype):
    hidden, weight, labels = randn(B, T, D).to(dtype), randn(V, D, seed=1).to(dtype), _labels()
    got = with_gradients(_linear(labels, chunk_size=7), hidden, weight)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    wide = with_gradients(lambda h, w: _naive(h @ w.T, labels), hidden.to(F64), weight.to(F64))
    assert_same([x.to(F64) for x in got], wide, rtol=0.02, atol=0.02)


def test_gradient_of_the_hidden_states_is_summed_over_chunks_in_float32():
    # 2047 of 2048 equal rows add 1/2048 each: a bfloat16 sum stops growing long before it is 1
    weight = torch.ones(2048, 1, dtype=torch.bfloat16)
    weight[0] = 0
    hidden = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_token_log_probs(hidden, weight, torch.tensor([[0]]), chunk_size=1).sum().backward()
    assert hidden.grad.item() == pytest.approx(-2047 / 2048, rel=0.01)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_is_the_same_as_bfloat16_inputs(backward_inside):
    hidden, weight = (x.float().requires_grad_() for x in (randn(B, T, 32), randn(V, 32, seed=1)))
    labels, upstream = _labels(), randn(B, T, seed=99).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_token_log_probs(hidden, weight, labels, chunk_size=7)
        if backward_inside:
            value.backward(upstream)
    if not backward_inside:
        value.backward(upstream)
    wanted = with_gradients(_linear(labels, chunk_size=7), hidden.bfloat16(), weight.bfloat16())
    assert identical([value, hidden.grad, weight.grad], [x.float() for x in wanted])


def test_a_backward_pass_under_autocast_belongs_to_its_forward_pass():
    hidden, weight, labels = randn(B, T, 32).float(), randn(V, 32, seed=1).float(), _labels()
    leaf = hidden.clone().requires_grad_()
    value = linear_token_log_probs(leaf, weight, labels, chunk_size=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value.backward(randn(B, T, seed=99).float())
    (_, wanted) = with_gradients(lambda h: linear_token_log_probs(h, weight, labels, chunk_size=7), hidden)
    assert_same(leaf.grad, wanted, rtol=1e-5, atol=1e-6)


def test_autocast_leaves_float64_as_it_is():
    hidden, weight, labels = randn(B, T, D), randn(V, D, seed=1), _labels()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_token_log_probs(hidden, weight, labels)
    assert_same(got, _naive(hidden @ weight.T, labels))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("linear", [False, True])
def test_ignored_positions_are_zero_whatever_they_hold_and_do_not_reach_the_weight(linear, chunk_size, fill):
    labels = _labels()
    ignored = labels == -100
    results = []
    for filler in (0.0, fill):
        features = torch.where(ignored.unsqueeze(-1), filler, randn(B, T, D if linear else V)).requires_grad_()
        weight = randn(V, D, seed=1).requires_grad_()
        inputs = (features, weight, labels) if linear else (features, labels)
        value = (linear_token_log_probs if linear else token_log_probs)(*inputs, chunk_size=chunk_size)
        value.backward(torch.where(ignored, filler, randn(B, T, seed=99)))
        assert (value[ignored] == 0).all()
        assert (features.grad[ignored] == 0).all()
        results.append([value.detach(), features.grad, *([weight.grad] if linear else [])])
    assert identical(*results)
    assert all(x.isfinite().all() for x in results[0])


def test_nothing_scored_is_zero_with_zero_gradients():
    labels = torch.full((B, T), -100)
    got = with_gradients(_scored(labels, chunk_size=7), torch.full((B, T, V), math.nan))
    got += with_gradients(_linear(labels, chunk_size=7), torch.full((B, T, D), math.nan, dtype=F64), randn(V, D))
    assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("impossible", [slice(5, 6), slice(0, 7), slice(7, 14), slice(7, V), slice(0, 14)])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_impossible_actions_count_nothing(impossible, chunk_size):
    logits = randn(B, T, V)
    logits[..., impossible] = -math.inf
    possible = logits[0, 0] != -math.inf
    among_possible = torch.randint(0, int(possible.sum()), (B, T), generator=torch.Generator().manual_seed(1))
    labels = possible.nonzero().squeeze(-1)[among_possible]
    value, gradient = with_gradients(_scored(labels, chunk_size=chunk_size), logits)
    assert (gradient[..., ~possible] == 0).all()
    without = with_gradients(lambda x: token_log_probs(x, among_possible), logits[..., possible])
    assert_same([value, gradient[..., possible]], without)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_an_impossible_label_scores_minus_infinity(chunk_size):
    logits, labels = randn(B, T, V), _labels()
    labels[0, 0] = 8
    logits[0, 0, 7:14] = -math.inf
    got = with_gradients(_scored(labels, chunk_size=chunk_size), logits)
    assert got[0][0, 0] == -math.inf
    assert got[1].isfinite().all()
    assert_same(got, with_gradients(lambda x: _naive(x, labels), logits))


_logits = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(_logits, st.data(), st.sampled_from([None, 1, 4]), st.sampled_from([0.5, 1.0, 20.0]))
def test_extreme_logits_stay_finite_in_float32(values, data, chunk_size, temperature):
    labels = torch.tensor([[data.draw(st.integers(0, len(values) - 1))]])
    logits = torch.tensor([[values]], dtype=torch.float32)
    got = with_gradients(_scored(labels, temperature=temperature, chunk_size=chunk_size), logits)
    assert all(x.isfinite().all() for x in got)
    wanted = with_gradients(lambda x: _naive(x, labels, temperature), logits.to(F64))
    assert_same([x.to(F64) for x in got], wanted, rtol=1e-6, atol=2e-2)  # 2e4 in float32 is known to 1e-3
    hidden = torch.ones(1, 1, 1)
    chunks = {"temperature": temperature, "chunk_size": chunk_size or len(values)}
    linear = with_gradients(_linear(labels, **chunks), hidden, logits[0].T)
    assert all(x.isfinite().all() for x in linear)
    assert_same([x.to(F64) for x in (linear[0], linear[2].T.unsqueeze(0))], wanted, rtol=1e-6, atol=2e-2)


@pytest.mark.parametrize("shape", [(0, T), (B, 0), (0, 0)])
@pytest.mark.parametrize("chunk_size", [1, 7, V + 5])
def test_empty_batches(shape, chunk_size):
    labels = torch.zeros(shape, dtype=torch.long)
    value, gradient = with_gradients(_scored(labels, chunk_size=chunk_size), randn(*shape, V))
    assert (value.shape, gradient.shape) == (shape, (*shape, V))
    value, d_hidden, d_weight = with_gradients(_linear(labels, chunk_size=chunk_size), randn(*shape, D), randn(V, D))
    assert (value.shape, d_hidden.shape) == (shape, (*shape, D))
    assert torch.equal(d_weight, torch.zeros(V, D, dtype=F64))


def test_the_only_action_is_certain():
    labels = torch.zeros(B, T, dtype=torch.long)
    got = with_gradients(_scored(labels), randn(B, T, 1))
    got += with_gradients(_linear(labels), randn(B, T, D), randn(1, D))
    assert all((x.abs() < 1e-15).all() for x in got)


def _calls():
    """Both forms as functions of the labels and the settings."""
    logits, hidden, weight = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(5, 4)
    return (
        lambda labels, **kw: token_log_probs(logits, labels, **kw),
        lambda labels, **kw: linear_token_log_probs(hidden, weight, labels, **kw),
    )


SHAPES = [
    (token_log_probs, [(2, 3, 5), (2, 4)]),
    (token_log_probs, [(2, 3, 5), (2, 1)]),
    (token_log_probs, [(2, 3, 5), (3,)]),
    (token_log_probs, [(2, 3, 5), (2, 3, 1)]),
    (token_log_probs, [(3, 5), (3,)]),
    (token_log_probs, [(3, 5), (3, 5)]),
    (token_log_probs, [(2, 3, 5, 7), (2, 3)]),
    (token_log_probs, [(2, 3, 0), (2, 3)]),
    (linear_token_log_probs, [(2, 3, 4), (5, 4), (2, 4)]),
    (linear_token_log_probs, [(2, 3, 4), (5, 4), (1, 3)]),
    (linear_token_log_probs, [(2, 3, 4), (4, 5), (2, 3)]),
    (linear_token_log_probs, [(2, 3, 4), (4,), (2, 3)]),
    (linear_token_log_probs, [(3, 4), (5, 4), (3,)]),
    (linear_token_log_probs, [(3, 4), (5,), (3, 4)]),
    (linear_token_log_probs, [(2, 3, 5, 4), (7, 5, 4), (2, 3)]),
    (linear_token_log_probs, [(2, 3, 4), (0, 4), (2, 3)]),
]


@pytest.mark.parametrize(("call", "shapes"), SHAPES)
def test_shapes_that_do_not_fit_are_all_named(call, shapes):
    *inputs, labels = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="expected") as error:
        call(*inputs, labels.long())
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize("call", _calls())
def test_labels_that_are_no_actions_are_refused(call):
    labels = torch.zeros(2, 3, dtype=torch.long)
    for dtype in (torch.float32, torch.bool):
        refused(f"labels must be integers, got {dtype}", call, labels.to(dtype))
    for bad in (5, -1, -99, -101):
        labels[1, 2] = bad
        refused(f"labels hold {bad}: only 0 to 4, or -100", call, labels)


@pytest.mark.parametrize("call", _calls())
def test_settings_out_of_range_are_named(call):
    labels = torch.zeros(2, 3, dtype=torch.long)
    for temperature in GARBAGE_TEMPERATURES:
        refused(f"temperature={temperature} is not allowed", call, labels, temperature=temperature)
    for chunk_size in (0, -1):
        refused(f"chunk_size={chunk_size} is not allowed", call, labels, chunk_size=chunk_size)


def _peak_bytes(call, path):
    """Most bytes that ``call`` held at once on the CPU, temporaries included, by the allocator's own account."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def test_memory_is_a_fraction_of_that_of_the_whole_logits(tmp_path):
    tokens, vocabulary, width = (4, 256), 50_000, 64
    labels = torch.randint(0, vocabulary, tokens)
    hidden, weight = torch.randn(*tokens, width).requires_grad_(), torch.randn(vocabulary, width).requires_grad_()

    def naive():
        logp = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.unsqueeze(-1))
        torch.autograd.grad(logp.sum(), (hidden, weight))

    def chunked():
        torch.autograd.grad(linear_token_log_probs(hidden, weight, labels).sum(), (hidden, weight))

    naive_peak, chunked_peak = (_peak_bytes(call, tmp_path / "trace.json") for call in (naive, chunked))
    assert naive_peak >= 3 * hidden[..., 0].numel() * vocabulary * 4  # the account sees logits and gradients
    assert chunked_peak >= weight.numel() * 4  # and here the weight's gradient
    assert naive_peak > 5 * chunked_peak


@pytest.mark.parametrize("vocabulary", [1, 2, 50])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_uniform_entropy_is_the_log_of_the_vocabulary(vocabulary, temperature):
    value, gradient = with_gradients(
        lambda x: categorical_entropy(x, temperature=temperature), torch.full((B, T, vocabulary), -7.0, dtype=F64)
    )
    assert_same(value, torch.full((B, T), math.log(vocabulary), dtype=F64))
    assert_same(gradient, torch.zeros_like(gradient))


def test_two_point_entropy_and_kl():
    p, q = 0.9, 0.25
    logits, logits_ref = (tensor(math.log(x), math.log(1 - x)) + 3 for x in (p, q))
    assert_same(estimators.categorical_log_probs(logits), tensor(p, 1 - p).log())
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert categorical_entropy(logits).item() == pytest.approx(entropy, abs=1e-13)
    assert categorical_kl(logits, logits_ref).item() == pytest.approx(kl, abs=1e-13)
    assert categorical_kl(logits_ref, logits).item() != pytest.approx(kl, abs=0.01)
    tempered = tensor(p**2, (1 - p) ** 2) / (p**2 + (1 - p) ** 2)
    assert categorical_entropy(logits, temperature=0.5).item() == pytest.approx(
        -(tempered * tempered.log()).sum().item(), abs=1e-13
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("shape", [(B, T, V), (V,), (0, V)])
def test_entropy_and_its_gradient(temperature, shape):
    logits = 3 * randn(*shape)

    def definition(x):
        p = (x / temperature).softmax(-1)
        return -(p * p.log()).sum(-1)

    got = with_gradients(lambda x: categorical_entropy(x, temperature=temperature), logits)
    assert_same(got, with_gradients(definition, logits))
    assert_same(got[0], Categorical(logits=logits / temperature, validate_args=False).entropy())


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("shape", [(B, T, V), (V,), (0, V)])
def test_kl_and_its_gradients(temperature, shape):
    logits, logits_ref = 3 * randn(*shape), 3 * randn(*shape, seed=1)

    def definition(x, y):
        p, q = (x / temperature).softmax(-1), (y / temperature).softmax(-1)
        return (p * (p / q).log()).sum(-1)

    got = with_gradients(lambda x, y: categorical_kl(x, y, temperature=temperature), logits, logits_ref)
    assert_same(got, with_gradients(definition, logits, logits_ref))
    policy, reference = (Categorical(logits=x / temperature, validate_args=False) for x in (logits, logits_ref))
    assert_same(got[0], kl_divergence(policy, reference))
    assert_same(got[2:], [(reference.probs - policy.probs) / temperature * randn(*shape[:-1], seed=99).unsqueeze(-1)])


def test_kl_to_itself_is_zero_with_zero_gradients():
    logits = 5 * randn(B, T, V)
    logits[0, 0, :4] = -math.inf
    value, *gradients = with_gradients(categorical_kl, logits, logits + 2)
    assert_same(value, torch.zeros(B, T, dtype=F64))
    for gradient in gradients:
        assert_same(gradient, torch.zeros_like(logits))


def test_entropy_and_kl_leave_impossible_actions_out():
    logits, logits_ref = randn(B, T, V), randn(B, T, V, seed=1)
    possible = torch.arange(V) % 3 > 0
    for x in (logits, logits_ref):
        x[..., ~possible] = -math.inf
    for call, inputs in ((categorical_entropy, [logits]), (categorical_kl, [logits, logits_ref])):
        value, *gradients = with_gradients(call, *inputs)
        assert all((gradient[..., ~possible] == 0).all() for gradient in gradients)
        without = with_gradients(call, *(x[..., possible] for x in inputs))
        assert_same([value, *(gradient[..., possible] for gradient in gradients)], without)


def test_a_policy_that_never_does_what_the_reference_does_has_a_finite_kl():
    logits, logits_ref = randn(B, T, V), randn(B, T, V, seed=1)
    logits[..., :4] = -math.inf
    value, d_logits, d_ref = with_gradients(categorical_kl, logits, logits_ref)
    assert all(x.isfinite().all() for x in (value, d_logits, d_ref))
    assert (d_logits[..., :4] == 0).all()
    assert_same(value, kl_divergence(Categorical(logits=logits), Categorical(logits=logits_ref)))


def test_kl_is_infinite_where_only_the_reference_rules_an_action_out():
    logits, logits_ref = randn(B, T, V), randn(B, T, V, seed=1)
    logits_ref[0, 0, 4] = -math.inf
    kl = categorical_kl(logits, logits_ref)
    assert kl[0, 0] == math.inf
    assert kl.flatten()[1:].isfinite().all()


def test_an_action_whose_probability_rounds_to_zero_is_no_nan_where_the_reference_rules_it_out():
    logits = torch.tensor([0.0, 1.0, -1e4])
    logits_ref = torch.tensor([1.0, 0.0, -math.inf])
    value, *gradients = with_gradients(categorical_kl, logits, logits_ref)
    wanted = with_gradients(categorical_kl, logits[:2], logits_ref[:2])
    assert_same([value, *(gradient[:2] for gradient in gradients)], wanted, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 2, st.booleans()), max_size=8), st.floats(0.1, 100))
def test_extreme_logits_have_finite_entropy_and_kl(rows, temperature):
    rows = [(1e4, -1e4, True), *rows]
    possible = torch.tensor([row[2] for row in rows])
    logits, logits_ref = (
        torch.where(possible, torch.tensor([row[i] for row in rows], dtype=torch.float32), -math.inf) for i in (0, 1)
    )
    entropy = with_gradients(lambda x: categorical_entropy(x, temperature=temperature), logits)
    kl = with_gradients(lambda x, y: categorical_kl(x, y, temperature=temperature), logits, logits_ref)
    assert all(x.isfinite().all() for x in (*entropy, *kl))
    assert -1e-6 <= entropy[0] <= math.log(len(rows)) + 1e-6
    assert kl[0] >= -1e-6
    logp, logp_ref = ((x[possible].to(F64) / temperature).log_softmax(-1) for x in (logits, logits_ref))
    wanted = torch.stack([-(logp.exp() * logp).sum(), (logp.exp() * (logp - logp_ref)).sum()])
    assert_same(torch.stack([entropy[0], kl[0]]).to(F64), wanted, rtol=1e-3, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropy_and_kl_of_half_precision_are_computed_in_float32(dtype):
    logits, logits_ref = randn(B, T, V).to(dtype), randn(B, T, V, seed=1).to(dtype)
    for call, inputs in ((categorical_entropy, [logits]), (categorical_kl, [logits, logits_ref])):
        value, *gradients = with_gradients(call, *inputs)
        assert value.dtype == torch.float32
        wide, *wide_gradients = with_gradients(call, *(x.float() for x in inputs))
        assert identical([value, *gradients], [wide, *(gradient.to(dtype) for gradient in wide_gradients)])


def test_entropy_and_kl_name_what_is_wrong():
    x = torch.zeros(2, 3, 5)
    for temperature in GARBAGE_TEMPERATURES:
        for call, inputs in ((categorical_entropy, [x]), (categorical_kl, [x, x])):
            refused(f"temperature={temperature} is not allowed", call, *inputs, temperature=temperature)
    for shape in ((2, 3, 4), (2, 1, 5), (3, 5)):
        with pytest.raises(ValueError, match="shape") as error:
            categorical_kl(x, torch.zeros(shape))
        assert all(str(s) in str(error.value) for s in ((2, 3, 5), shape))
    for empty in (torch.zeros(2, 0), torch.zeros(())):
        refused(r"V > 0, got \(", categorical_entropy, empty)
        refused(r"V > 0, got \(", categorical_kl, empty, empty)


def test_only_a_cpu_is_asked_for_the_range_of_the_labels():
    logits, labels = torch.zeros(1, 2, 3, device="meta"), torch.zeros(1, 2, dtype=torch.long, device="meta")
    assert token_log_probs(logits, labels, chunk_size=2).shape == (1, 2)


@pytest.mark.parametrize(("hidden", "weight"), [((4, 3), (5, 3)), ((2, 2, 3), (5, 1, 3)), ((2, 2, 3), (3,))])
def test_linear_form_names_shapes_of_other_dimensions(hidden, weight):
    with pytest.raises(ValueError, match="expected hidden"):
        linear_token_log_probs(torch.zeros(hidden), torch.zeros(weight), torch.zeros(2, 2, dtype=torch.long))
