"""Families of causal language models: ragged prompts sampled left-padded with a cache, scored right-padded, and each
row alone without either give the same log-probs; and so does an adapter trained, loaded and merged."""

import copy

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from diffusion_align.errors import UserError
from diffusion_align.llm.policy import LanguagePolicy, LoRAConfig, merged, pack
from diffusion_align.llm.rollout import rollout
from diffusion_align.models.lora import load_peft
from diffusion_align.training.randomness import generator

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
TINY |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {"shared_expert_intermediate_size": 32}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
FAMILIES = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "gptj": OLD | {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_bigcode": OLD,
    "codegen": OLD | {"rotary_dim": 4},
    "falcon": {"head_dim": None},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "phi": {},
    "phi3": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen2_moe": EXPERTS | SHARED,
    "qwen3_next": EXPERTS
    | SHARED
    | {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "cohere2": {"sliding_window": 4},
    "starcoder2": {},
    "stablelm": {},
    "smollm3": {},
    "glm4": {},
    "nemotron": {},
    "helium": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
    | {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "bamba": STATES | {"attn_layer_indices": [1]},
    "falcon_h1": STATES | {"mamba_d_ssm": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "biogpt": {},
    "persimmon": {},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    | {"moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8}
    | {"kv_lora_rank": 8, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    | {"num_key_value_heads": 4},
    "ernie4_5": {},
    "llama4_text": {"num_local_experts": 2, "num_experts_per_tok": 1}
    | {"intermediate_size_mlp": 64, "attention_chunk_size": 16},
}
WITHOUT_CACHE = {  # sampled with all tokens in every pass
    "mamba": {"state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "embedding_dim": 32},  # and it gives a logit for every token
    "openai-gpt": OLD,
}
PROMPTS = [[1, 5, 9], [1, 7, 3, 4, 11, 12, 13, 20, 33], [1, 8, 22, 31, 6, 9, 14]]


class Tokens:
    eos_token_id, pad_token_id = 2, 0

    def save_pretrained(self, folder):
        pass


def model_of(family, options):
    """Weights so large that padding that is seen, or a place that is off, changes log-probs by whole nats."""
    settings = {key: value for key, value in (TINY | options).items() if value is not None}
    try:
        config = AutoConfig.for_model(family, **settings)
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def policy_of(family, options):
    return LanguagePolicy(model_of(family, options), Tokens(), lora=None, temperature=0.9, needs_reference=False)


@torch.no_grad()
def check(family, options):
    policy = policy_of(family, options)
    sampled = rollout(policy, PROMPTS, [generator(0, "family", i) for i in range(3)], max_new_tokens=7)
    scored = policy.log_probs(policy.score(sampled.sequences))
    assert scored.abs().max() > 3
    torch.testing.assert_close(sampled.logp_old, scored, rtol=0, atol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        ids = sampled.sequences.ids[row, : len(prompt) + int(sampled.sequences.mask[row].sum())]
        logits = policy.model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        alone = (logits.double() / 0.9).log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
        torch.testing.assert_close(scored[row, : len(alone)].double(), alone, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_cache_change_no_log_prob(family):
    check(family, FAMILIES[family])


@pytest.mark.parametrize("family", WITHOUT_CACHE)
def test_families_whose_state_sees_the_padding_are_sampled_without_it(family):
    if family == "recurrent_gemma" and transformers.__version__.startswith("4."):
        with pytest.raises(UserError, match="transformers 4 keeps the states of RecurrentGemma's last batch"):
            policy_of(family, WITHOUT_CACHE[family])
        return
    assert not policy_of(family, WITHOUT_CACHE[family]).keeps_cache
    check(family, WITHOUT_CACHE[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_CACHE])
def test_an_adapter_gives_the_same_trained_loaded_and_merged(family, tmp_path):
    """And every weight of it has a gradient, and switched off it changes nothing."""
    model = model_of(family, (FAMILIES | WITHOUT_CACHE)[family])
    bare, loaded = copy.deepcopy(model), copy.deepcopy(model)
    some = pack([[5, 6], [7, 8, 9]], [[9, 3, 4], [10, 11]], pad=0)
    policy = LanguagePolicy(model, Tokens(), lora=LoRAConfig(rank=2))

    def log_probs(model):
        policy.model = model
        return policy.log_probs(policy.score(some))

    log_probs(model).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable.values())
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        trained = log_probs(model)
        with policy.reference():
            off = policy.log_probs(policy.score(some))
        policy.save(tmp_path / "adapter")
        torch.testing.assert_close(log_probs(bare), off, rtol=0, atol=1e-5)
        assert (trained - off).abs().max() > 0.01
        adapted = load_peft(loaded, tmp_path / "adapter")
        for other in (adapted, adapted.merge_and_unload(safe_merge=True), merged(model)):
            torch.testing.assert_close(log_probs(other), trained, rtol=0, atol=5e-5)
