"""Sampling: the log-probs are those of the distribution drawn from, and no row depends on another."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_align.errors import TrainingError
from diffusion_align.estimators import importance_ratio
from diffusion_align.llm import rollout as rollout_file
from diffusion_align.llm.policy import LanguagePolicy, LoRAConfig
from diffusion_align.llm.rollout import _draw, _draw_fast, rollout

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20]]


def streams(n, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_the_ratio_is_1_on_the_first_pass(make_language_policy, family, lora, temperature):
    policy = make_language_policy(family, noise=0.1, lora=lora, temperature=temperature)
    sampled = rollout(policy, PROMPTS, streams(3), max_new_tokens=12)
    logp = policy.log_probs(policy.score(sampled.sequences))
    ratio = importance_ratio(logp, sampled.logp_old, mask=sampled.sequences.mask)
    assert (ratio - 1).abs().max() < 1e-5
    assert (sampled.logp_old[sampled.sequences.mask] < 0).all()


class Bigrams(torch.nn.Module):
    """Logits that depend on the last token only: the same ones with a cache and without, whatever the batch."""

    def __init__(self, config, dtype):
        super().__init__()
        self.config, self.table = config, 3 * torch.randn(64, 20_000, dtype=dtype)

    def forward(self, input_ids, attention_mask, use_cache, output_hidden_states=False, past_key_values=None):
        return SimpleNamespace(logits=self.table[input_ids % 64], past_key_values=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_and_replay_give_the_same_log_probs_bit_for_bit(make_language_policy, dtype):
    """Of equal logits, of a vocabulary that is scored in several parts."""
    policy = make_language_policy("llama", temperature=0.7)
    policy.model = Bigrams(policy.model.config, dtype)
    sampled = rollout(policy, PROMPTS, streams(3), max_new_tokens=12)
    assert torch.equal(sampled.logp_old, policy.log_probs(policy.score(sampled.sequences)))
    assert sampled.logp_old[sampled.sequences.mask].max() < 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_completion_depends_on_its_own_stream_only(make_language_policy, family):
    policy = make_language_policy(family, noise=0.1)
    together = rollout(policy, PROMPTS, streams(3), max_new_tokens=12).sequences
    for row, prompt in enumerate(PROMPTS):
        alone = rollout(policy, [prompt], streams(3)[row : row + 1], max_new_tokens=12).sequences
        count = int(alone.mask.sum())
        assert int(together.mask[row].sum()) == count
        assert torch.equal(alone.completions[0, :count], together.completions[row, :count])
    other = rollout(policy, PROMPTS, streams(3, seed=1), max_new_tokens=12).sequences
    assert other.ids.shape != together.ids.shape or not torch.equal(other.ids, together.ids)


def test_the_first_end_of_sequence_counts_and_ends(make_language_policy):
    policy = make_language_policy("llama")
    assert policy.pad == policy.eos
    with torch.no_grad():
        policy.model.lm_head.weight[policy.eos] *= 3  # so that some rows end early
    sampled = rollout(policy, [[5, 6]] * 40, streams(40), max_new_tokens=10)
    counts, tokens = sampled.sequences.mask.sum(1), sampled.sequences.completions
    assert 0 < sampled.finished.sum() < 40
    for row in range(40):
        own = tokens[row, : counts[row]].tolist()
        assert (own[-1] == policy.eos) == bool(sampled.finished[row])
        assert policy.eos not in own[:-1]
        assert sampled.finished[row] or counts[row] == 10
        assert (sampled.logp_old[row, counts[row] :] == 0).all()


def test_sampling_stops_when_all_have_ended(make_language_policy):
    policy = make_language_policy("llama")
    policy.model.lm_head.bias = torch.nn.Parameter(torch.zeros(40))
    with torch.no_grad():
        policy.model.lm_head.bias[policy.eos] = 1e4
    turns = []
    sampled = rollout(policy, PROMPTS, streams(3), max_new_tokens=10, on_token=lambda: turns.append(1))
    assert len(turns) == 1
    assert sampled.sequences.mask.tolist() == [[True]] * 3
    assert sampled.finished.all()


def test_frequencies_are_the_probabilities(make_language_policy):
    """Two tokens of a vocabulary of 40: the five likeliest pairs within 4.5 standard errors; a swap would be seen."""
    policy = make_language_policy("llama", noise=0.1, temperature=0.5)
    n = 4000
    sampled = rollout(policy, [[5, 6]] * n, streams(n), max_new_tokens=2)
    seen = [tuple(row[mask].tolist()) for row, mask in zip(sampled.sequences.completions, sampled.sequences.mask)]
    logp = sampled.logp_old.sum(1).double().exp()
    probabilities = {pair: float(p) for pair, p in zip(seen, logp)}
    likeliest = sorted(probabilities, key=probabilities.get)[-5:]
    for pair, p in ((pair, probabilities[pair]) for pair in likeliest):
        error = (p * (1 - p) / n) ** 0.5
        assert abs(seen.count(pair) / n - p) < 4.5 * error


def test_inversion_of_the_distribution_function():
    logp = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0]).log().expand(6, -1)
    chances = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 1e-16], dtype=torch.float64)
    assert _draw(logp, chances).tolist() == [0, 0, 2, 2, 3, 3]


def test_wrong_calls_are_refused(make_language_policy):
    policy = make_language_policy()
    for prompts, count, tokens in (([[]], 1, 4), ([[1]], 2, 4), ([[1]], 1, 0)):
        with pytest.raises(ValueError, match="one generator per prompt"):
            rollout(policy, prompts, streams(count), max_new_tokens=tokens)


def test_every_end_that_the_model_knows_ends_a_completion(make_language_policy):
    """Some models end a turn with a token that is not their tokenizer's end of sequence."""
    policy = make_language_policy(temperature=3.0, lora=None)
    assert policy.ends.tolist() == [3]
    plain = rollout(policy, [[5, 6]] * 8, streams(8), max_new_tokens=20)
    policy.model.generation_config.eos_token_id = [7, 8, 9, 10, 11, 12]
    several = type(policy).for_sampling(policy.model, policy.tokenizer, temperature=3.0)
    assert several.ends.tolist() == [3, 7, 8, 9, 10, 11, 12]
    found = rollout(several, [[5, 6]] * 8, streams(8), max_new_tokens=20)
    assert found.finished.sum() > plain.finished.sum()
    for row in range(8):
        tokens = found.sequences.completions[row][found.sequences.mask[row]]
        ends = torch.isin(tokens, several.ends)
        assert not ends[:-1].any()
        assert ends[-1] == found.finished[row]


def test_logits_that_are_not_finite_are_an_error_and_not_tokens(make_language_policy):
    policy = make_language_policy("llama")
    streams = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        next(iter(policy.trainable.values())).fill_(torch.nan)
    with pytest.raises(TrainingError, match="the language model gives log-probs that are not finite: use bfloat16"):
        rollout(policy, [[4, 5], [6]], streams, max_new_tokens=3)


GROUPS = [[5, 6, 7]] * 4 + [[8, 9, 10, 11]] * 4 + [[20]] * 4


def shapes_of(model, seen):
    """A hook that notes the shape of what each pass is given."""
    return model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("cached", [True, False])
def test_fast_sampling_gives_the_same_completions_and_reads_a_prompt_once(
    make_language_policy, family, cached, monkeypatch
):
    """Of random numbers of their own; in float64, where rounding chooses no other token."""
    if not cached:
        monkeypatch.setattr(LanguagePolicy, "keeps_cache", False)
    found, passes = {}, {"plain": [], "fast": []}
    for sampling in ("plain", "fast"):
        policy = make_language_policy(family, noise=0.1, dtype=torch.float64, temperature=1.5, sampling=sampling)
        policy.ends = torch.arange(3, 6)  # any of three tokens of 40
        shapes_of(policy.model, passes[sampling])
        found[sampling] = rollout(policy, GROUPS, streams(12), max_new_tokens=20)
    plain, fast = found["plain"], found["fast"]
    assert torch.equal(plain.sequences.ids, fast.sequences.ids)
    assert torch.equal(plain.sequences.mask, fast.sequences.mask)
    assert torch.equal(plain.finished, fast.finished)
    assert 0 < plain.finished.sum() < 12
    torch.testing.assert_close(fast.logp_old, plain.logp_old, rtol=0, atol=1e-10)
    assert len(passes["plain"]) == len(passes["fast"]) == plain.logp_old.shape[1]
    assert passes["fast"][0][0] == (3 if cached else 12)
    rows = [shape[0] for shape in passes["fast"][1:]]
    assert rows == sorted(rows, reverse=True)
    assert {shape[0] for shape in passes["plain"]} == {12}
    assert rows[-1] < 9


@pytest.mark.parametrize("sampling", ["plain", "fast"])
def test_looking_seldom_at_which_rows_are_finished_changes_nothing(make_language_policy, sampling, monkeypatch):
    policy = make_language_policy(noise=0.1, dtype=torch.float64, temperature=3.0, sampling=sampling)
    policy.ends = torch.arange(3, 12)
    found = []
    for every in (1, 5):
        monkeypatch.setattr(rollout_file, "_checked_every", lambda device, every=every: every)
        found.append(rollout(policy, [[5, 6]] * 3, streams(3), max_new_tokens=60))
    a, b = found
    assert a.finished.all()
    assert a.logp_old.shape[1] % 5  # so that the second goes on for a while
    assert torch.equal(a.sequences.ids, b.sequences.ids)
    assert torch.equal(a.sequences.mask, b.sequences.mask)
    torch.testing.assert_close(a.logp_old, b.logp_old, rtol=0, atol=1e-10)


def test_no_token_waits_for_the_device(make_language_policy, monkeypatch):
    """A number is read every 16 tokens, beside what a rollout reads once."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **kwargs or {})

    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -torch.inf  # no end
    monkeypatch.setattr(rollout_file, "_checked_every", lambda device: 16)
    monkeypatch.setattr(rollout_file._Cached, "next_logits", lambda self, token: logits)
    policy, counts = make_language_policy(sampling="fast"), []
    for tokens in (16, 32, 47):
        with Reads() as reads:
            rollout(policy, [[5]] * 4, streams(4), max_new_tokens=tokens)
        counts.append(reads.count)
    assert counts == [counts[0], counts[0] + 1, counts[0] + 1]


def test_fast_draws_are_those_of_the_distribution_function(make_language_policy):
    policy = make_language_policy(sampling="fast", temperature=0.7)
    logits = 3 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 290:] = -torch.inf
    logits[:25, :130] = -torch.inf
    logp = (logits / 0.7).log_softmax(-1)
    for chance in (0.0, 0.1, 0.5, 0.9, 1 - 2**-53):
        chances = torch.full((50,), chance, dtype=torch.float64)
        token, chosen = _draw_fast(policy, logits, chances)
        assert torch.equal(token, _draw(logp, chances))
        torch.testing.assert_close(chosen, logp.gather(1, token[:, None]).squeeze(1))
        assert chosen.isfinite().all()
    with torch.no_grad():
        found, _ = _draw_fast(policy, torch.full((2, 300), torch.nan), torch.full((2,), 0.5, dtype=torch.float64))
    assert found.max() < 300
