"""A language model with 4 tokens and completions of 2: all 16 can be listed, so expectations are sums."""

import itertools
from types import SimpleNamespace

import torch

from diffusion_align.llm.policy import LanguagePolicy, pack

TOKENS, PROMPT = 4, [0, 3, 1]
COMPLETIONS = [list(pair) for pair in itertools.product(range(TOKENS), repeat=2)]
REWARDS = torch.tensor([0.3, 1.0, -0.5, 0.2, 0.9, 0.0, 0.4, -1.0, 0.1, 0.6, -0.2, 0.8, -0.7, 0.5, 1.2, -0.1]).double()


def enumerable_policy(seed=0, noise=0.1):
    """In float64, moved away from its reference; nothing ends a completion early."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    # GPT-2's layers are float64 throughout when asked; those of the Llama family pass through float32.
    sizes = {"vocab_size": TOKENS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokenizer = SimpleNamespace(eos_token_id=99, pad_token_id=0, decode=lambda ids, **_: " ".join(map(str, ids)))
    policy = LanguagePolicy(model.double(), tokenizer, lora=None)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(noise * torch.randn_like(parameter))
    return policy


def log_tables(policy):
    """log pi of the first token (4,), and of the second given the first (4, 4); with a gradient."""
    prefixes = [PROMPT, *([*PROMPT, token] for token in range(TOKENS))]
    logits = [policy.model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in prefixes]
    rows = [(row / policy.temperature).log_softmax(-1) for row in logits]
    return rows[0], torch.stack(rows[1:])


def token_log_probs(tables):
    """(16, 2): of both tokens of every completion."""
    first, second = tables
    return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in COMPLETIONS])


def reference_tables(policy):
    with torch.no_grad(), policy.reference():
        return log_tables(policy)


def per_state_kl(tables, reference):
    """KL of the first token (,), and of the second given the first (4,)."""
    return tuple((now.exp() * (now - old)).sum(-1) for now, old in zip(tables, reference, strict=True))


def sequences_of(indices):
    return pack([PROMPT] * len(indices), [COMPLETIONS[i] for i in indices], pad=0)


def gradient(value, policy):
    """Flat gradient with respect to all that is trained."""
    parameters = list(policy.trainable.values())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found)])
