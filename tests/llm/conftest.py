"""Tiny random language models of three families, and a tokenizer that knows nothing but its special tokens."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

VOCABULARY, EOS = 40, 3


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No report, which is tested elsewhere and takes seconds; and each test with an Accelerator of its own."""
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": EOS}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
FAMILIES = {"gpt2": GPT2 | {"bos_token_id": 1, "eos_token_id": EOS}, "llama": LLAMA, "qwen2": LLAMA}


@pytest.fixture
def tiny_lm():
    """``tiny_lm(family)``: a new model with random weights, larger than usual so that log-probs differ."""

    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family="llama"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
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
