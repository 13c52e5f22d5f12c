"""Tiny random language models of three families, and a tokenizer that knows nothing but its special tokens."""

from types import SimpleNamespace

import pytest
import torch

VOCABULARY, EOS = 40, 3


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=EOS
        )
    )


def _llama_like(config, model):
    return model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            eos_token_id=EOS,
        )
    )


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return _llama_like(LlamaConfig, LlamaForCausalLM)


def _qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _llama_like(Qwen2Config, Qwen2ForCausalLM)


FAMILIES = {"gpt2": _gpt2, "llama": _llama, "qwen2": _qwen2}


@pytest.fixture
def tiny_lm():
    """``tiny_lm(family)``: a new model with random weights, larger than usual so that log-probs differ."""

    def make(family="llama"):
        torch.manual_seed(0)
        model = FAMILIES[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def tokenizer():
    """As GPT-2's and SmolLM2's: no padding token of its own. The text of a token is its number."""

    def decode(ids, skip_special_tokens=True):
        return " ".join(str(i) for i in ids if i != EOS or not skip_special_tokens)

    return SimpleNamespace(eos_token_id=EOS, pad_token_id=None, decode=decode, save_pretrained=lambda folder: None)


@pytest.fixture
def make_language_policy(tiny_lm, tokenizer):
    """``make(family, noise=0, **settings)``: a LanguagePolicy; ``noise`` moves what is trained."""
    from diffusion_align.llm.policy import LanguagePolicy, LoRAConfig

    def make(family="llama", *, noise=0.0, dtype=torch.float32, **settings):
        policy = LanguagePolicy(tiny_lm(family), tokenizer, **({"lora": LoRAConfig(rank=4)} | settings))
        with torch.no_grad():
            for parameter in policy.trainable.values() if noise else ():
                parameter.add_(noise * torch.randn_like(parameter))
        policy.model.to(dtype)
        return policy

    return make
