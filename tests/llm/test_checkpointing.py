"""Gradient checkpointing of language models: fewer activations kept, and the same log-probs, values and gradients."""

import copy

import pytest
import torch
from torch import nn

from diffusion_align.errors import UserError
from diffusion_align.llm.policy import LanguagePolicy, LoRAConfig, pack
from diffusion_align.llm.reward_model import RewardModel
from diffusion_align.llm.rollout import rollout
from diffusion_align.models.memory import keep_activations
from diffusion_align.training.randomness import generator
from tests.helpers.saved_tensors import storage_sizes
from tests.llm.test_families import FAMILIES, WITHOUT_CACHE, Tokens, model_of

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
COMPLETIONS = [[30, 31], [14, 15, 16]]


def kept_bytes(model, parameters, value):
    """What ``value()`` keeps for the backward pass beside the parameters, the value and its gradients."""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(storage_sizes(model, sizes), lambda kept: kept):
        result = value()
    gradients = torch.autograd.grad(result.square().sum(), parameters, allow_unused=True)
    return sum(sizes.values()), result.detach(), [g for g in gradients if g is not None]


def assert_same(plain, checkpointed, *, tolerance=0.0):
    (whole, value, gradients), (some, same, others) = plain, checkpointed
    assert some < 0.6 * whole
    assert torch.equal(value, same)
    assert len(gradients) == len(others) > 0
    for a, b in zip(gradients, others):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_fewer_activations_and_the_same_gradients(make_language_policy, family, lora):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        policy = make_language_policy(
            family, noise=0.1, lora=lora, dtype=torch.float64, gradient_checkpointing=checkpointed
        )
        sequences = pack(PROMPTS, COMPLETIONS, pad=policy.pad)

        def value(policy=policy, sequences=sequences):  # with the states that PPO's value head reads
            scored = policy.score(sequences, with_hidden=True)
            return torch.cat([policy.log_probs(scored).flatten(), scored.hidden.flatten()])

        found.append(kept_bytes(policy.model, list(policy.trainable.values()), value))
    assert_same(*found, tolerance=1e-12)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in ("mixtral", "gpt_oss", "opt", "mamba") else pytest.mark.slow)
        for family in [*FAMILIES, *WITHOUT_CACHE]
    ],
)
def test_every_family(family):
    model = model_of(family, (FAMILIES | WITHOUT_CACHE)[family])

    def passes(**settings):
        policy = LanguagePolicy(model, Tokens(), lora=None, needs_reference=False, **settings)
        sequences = pack(PROMPTS, COMPLETIONS, pad=0)
        return kept_bytes(model, list(model.parameters()), lambda: policy.log_probs(policy.score(sequences)))

    plain = passes()
    if family == "openai-gpt":
        with pytest.raises(UserError) as refusal:
            passes(gradient_checkpointing=True)
        sentence = "OpenAIGPTLMHeadModel does not support gradient checkpointing: set gradient_checkpointing=false"
        assert str(refusal.value) == sentence
        return
    assert_same(plain, passes(gradient_checkpointing=True), tolerance=1e-6)
    assert not any(part.training for part in model.modules())
    keep_activations(model)
    assert passes()[0] == plain[0]


def test_ratio_is_one_and_sampling_computes_nothing_twice(make_language_policy, monkeypatch):
    policy = make_language_policy(noise=0.1, gradient_checkpointing=True)
    plain, calls = torch.utils.checkpoint.checkpoint, []
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **kw: calls.append(a) or plain(*a, **kw))
    streams = [generator(0, "test", i) for i in range(2)]
    sampled = rollout(policy, PROMPTS, streams, max_new_tokens=6)
    with torch.no_grad():
        logp_old = policy.log_probs(policy.score(sampled.sequences))
    assert not calls
    logp = policy.log_probs(policy.score(sampled.sequences))
    assert logp.requires_grad
    assert len(calls) == 2  # layers
    assert torch.equal(logp, logp_old)


def test_no_dropout_becomes_active(make_language_policy):
    """GPT-2's is 0.1 everywhere."""
    policy = make_language_policy("gpt2", noise=0.1, gradient_checkpointing=True)
    assert any(part.p == 0.1 for part in policy.model.modules() if isinstance(part, nn.Dropout))
    sequences, state = pack(PROMPTS, COMPLETIONS, pad=policy.pad), torch.get_rng_state()
    passes = [
        kept_bytes(policy.model, list(policy.trainable.values()), lambda: policy.log_probs(policy.score(sequences)))
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(passes[0][1], passes[1][1])
    assert all(torch.equal(a, b) for a, b in zip(passes[0][2], passes[1][2], strict=True))


def test_a_copy_of_a_checkpointed_model_runs_its_own_layers(make_language_policy):
    policy = make_language_policy(noise=0.1, gradient_checkpointing=True)
    sequences = pack(PROMPTS, COMPLETIONS, pad=policy.pad)
    before = policy.log_probs(policy.score(sequences)).detach()
    copied = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.zero_()
    policy.model = copied
    assert torch.equal(policy.log_probs(policy.score(sequences)).detach(), before)


def test_reward_model(tokenizer):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from tests.llm.conftest import LLAMA

    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **LLAMA, num_labels=1))
        rewards = RewardModel(model, tokenizer, lora=LoRAConfig(rank=4), gradient_checkpointing=checkpointed)
        model.double()
        sequences = pack(PROMPTS, COMPLETIONS, pad=rewards.pad)
        found.append(kept_bytes(model, list(rewards.trainable.values()), lambda r=rewards, s=sequences: r.score(s)))
    assert_same(*found, tolerance=1e-12)
