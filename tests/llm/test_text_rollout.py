"""Sampling: the log-probs are those of the distribution drawn from, and no row depends on another."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_align.errors import TrainingError
from diffusion_align.estimators import importance_ratio
from diffusion_align.llm.policy import LoRAConfig
from diffusion_align.llm.rollout import _draw, rollout

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
