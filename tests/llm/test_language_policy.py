"""Scoring completions: against a plain forward pass, whatever the padding; the reference; what is saved."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_align.errors import UserError
from diffusion_align.llm.policy import LanguagePolicy, LoRAConfig, Sequences, pack

FAMILIES = ["gpt2", "llama", "qwen2"]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20]]
COMPLETIONS = [[30, 31], [14], [21, 22, 23, 24, 25, 3]]


def plain_log_probs(model, prompt, completion, temperature):
    """Of one completion, by a forward pass without padding."""
    ids = torch.tensor([prompt + completion])
    logp = (model(ids).logits[0].double() / temperature).log_softmax(-1)
    return torch.stack([logp[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_a_plain_forward_pass(make_language_policy, family, lora):
    policy = make_language_policy(family, noise=0.1, lora=lora, temperature=0.7, dtype=torch.float64)
    sequences = pack(PROMPTS, COMPLETIONS, pad=policy.pad)
    found = policy.log_probs(policy.score(sequences))
    assert found.shape == sequences.mask.shape == (3, 6)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        expected = plain_log_probs(policy.model, prompt, completion, 0.7)
        torch.testing.assert_close(found[row, : len(completion)], expected, atol=1e-10, rtol=0)
        assert (found[row, len(completion) :] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_padding_nor_the_batch_changes_a_gradient(make_language_policy, family):
    policy = make_language_policy(family, noise=0.1, dtype=torch.float64)

    def gradient(*batches):
        for sequences in batches:
            policy.log_probs(policy.score(sequences)).sum().backward()
        found = torch.cat([p.grad.flatten() for p in policy.trainable.values()])
        policy.model.zero_grad()
        return found

    together = gradient(pack(PROMPTS, COMPLETIONS, pad=policy.pad))
    alone = gradient(*(pack([p], [c], pad=policy.pad) for p, c in zip(PROMPTS, COMPLETIONS)))
    other_pad = gradient(pack(PROMPTS, COMPLETIONS, pad=0))
    assert together.abs().max() > 1e-3
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(together, other_pad, atol=1e-10, rtol=1e-8)


def test_the_head_sees_no_position_before_the_first_completion(make_language_policy, monkeypatch):
    policy = make_language_policy("llama")
    seen = []
    head = policy.model.lm_head.forward
    monkeypatch.setattr(policy.model.lm_head, "forward", lambda x: seen.append(x.shape[1]) or head(x))
    policy.score(pack([[5] * 20, [6] * 22], [[7, 8], [9, 3]], pad=policy.pad))
    assert seen == [4]  # from position 19 on, of 24, the last of which predicts nothing


def test_extreme_log_probs_leave_gradients_finite(make_language_policy):
    policy = make_language_policy("llama", noise=0.1)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1e5)
    (-policy.log_probs(policy.score(pack(PROMPTS, COMPLETIONS, pad=policy.pad))).sum()).backward()
    assert all(p.grad.isfinite().all() for p in policy.trainable.values())


def test_rows_are_cut_to_the_longest_that_is_left(make_language_policy):
    policy = make_language_policy("qwen2", noise=0.1)
    sequences = pack(PROMPTS, COMPLETIONS, pad=policy.pad)
    some = sequences[torch.tensor([1, 0])]
    assert some.ids.shape == (2, 7)
    assert some.mask.tolist() == [[True, False], [True, True]]
    whole = policy.log_probs(policy.score(sequences))
    torch.testing.assert_close(policy.log_probs(policy.score(some)), whole[[1, 0], :2], atol=1e-5, rtol=0)


def test_completions_are_read_back():
    sequences = pack(PROMPTS, COMPLETIONS, pad=3)
    for row, completion in enumerate(COMPLETIONS):
        assert sequences.completions[row][sequences.mask[row]].tolist() == completion
    lengths = [len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS)]
    assert sequences.attention_mask.sum(1).tolist() == lengths


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), None], ids=["lora", "full"])
def test_the_reference_is_the_model_before_training(make_language_policy, tiny_lm, lora):
    policy = make_language_policy("llama", noise=0.1, lora=lora)
    sequences = pack(PROMPTS, COMPLETIONS, pad=policy.pad)
    before = LanguagePolicy(tiny_lm("llama"), policy.tokenizer, lora=None, needs_reference=False)
    expected = before.log_probs(before.score(sequences))
    now = policy.log_probs(policy.score(sequences))
    with policy.reference():
        found = policy.log_probs(policy.score(sequences))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (now - found).abs().max() > 1e-3
    torch.testing.assert_close(policy.log_probs(policy.score(sequences)), now, atol=0, rtol=0)


def test_hidden_states_are_those_the_head_is_given(make_language_policy):
    policy = make_language_policy("llama", noise=0.1)
    scored = policy.score(pack(PROMPTS, COMPLETIONS, pad=policy.pad), with_hidden=True)
    torch.testing.assert_close(policy.model.lm_head(scored.hidden), scored.logits, atol=1e-5, rtol=0)


def test_an_adapter_loads_in_plain_transformers_with_peft(make_language_policy, tiny_lm, tmp_path):
    from peft import PeftModel

    policy = make_language_policy("llama", noise=0.1)
    policy.tokenizer.save_pretrained = lambda folder: None
    policy.save(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_lm("llama"), tmp_path)
    ids = torch.tensor([PROMPTS[1]])
    torch.testing.assert_close(loaded(ids).logits, policy.model(ids).logits, atol=1e-5, rtol=0)


def test_a_trained_model_loads_in_plain_transformers(make_language_policy, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = make_language_policy("gpt2", noise=0.1, lora=None)
    policy.tokenizer.save_pretrained = lambda folder: None
    policy.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.use_cache, "training must not slow down the saved model's generation"
    ids = torch.tensor([PROMPTS[1]])
    torch.testing.assert_close(loaded(ids).logits, policy.model(ids).logits, atol=1e-6, rtol=0)


def test_what_cannot_be_trained_is_refused_with_one_sentence(tiny_lm, tokenizer, make_language_policy):
    with pytest.raises(UserError, match="no end-of-sequence token"):
        LanguagePolicy(tiny_lm(), SimpleNamespace(eos_token_id=None, pad_token_id=0), lora=None)
    with pytest.raises(UserError, match="carries adapters already"):
        LanguagePolicy(make_language_policy().model, tokenizer, lora=LoRAConfig(rank=2))
    policy = make_language_policy(lora=None, needs_reference=False)
    with pytest.raises(ValueError, match="without a reference"), policy.reference():
        pass
    for prompts, completions in (([[]], [[1]]), ([[1]], [])):
        with pytest.raises(ValueError, match="give as many, and no empty prompt"):
            pack(prompts, completions, pad=0)


def test_an_empty_completion_counts_nothing(make_language_policy):
    policy = make_language_policy()
    sequences = pack([[5, 6], [7]], [[], [8, 9]], pad=policy.pad)
    assert isinstance(sequences, Sequences)
    assert policy.log_probs(policy.score(sequences))[0].tolist() == [0, 0]


def test_another_model_can_be_the_reference(make_language_policy, tiny_lm):
    other = tiny_lm()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    sequences = pack(PROMPTS, COMPLETIONS, pad=3)
    expected = other(sequences.ids, attention_mask=sequences.attention_mask, use_cache=False).logits
    for lora in (None, LoRAConfig(rank=2)):
        policy = make_language_policy(lora=lora, reference=other, noise=0.1)
        trained = policy.model
        with policy.reference():
            scored = policy.score(sequences)
        first = int(sequences.starts.min()) - 1
        torch.testing.assert_close(scored.logits, expected[:, first:-1], atol=1e-5, rtol=1e-5)
        assert policy.model is trained
        assert not any(p.requires_grad for p in other.parameters())
        assert (policy.log_probs(policy.score(sequences)) - policy.log_probs(scored)).abs().max() > 1e-3


def test_a_reference_with_other_tokens_is_refused(make_language_policy, tiny_lm):
    other = tiny_lm()
    other.resize_token_embeddings(44)
    with pytest.raises(UserError, match="the reference has a vocabulary of 44 tokens and the model one of 40: use a"):
        make_language_policy(reference=other)


@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None])
def test_settings_of_generation_are_saved_as_they_are(lora, make_language_policy, tmp_path):
    """Those of some published models are ones that transformers refuses to save: after hours of training."""
    from transformers import GenerationConfig

    policy = make_language_policy(lora=lora)
    settings = policy.model.generation_config = GenerationConfig(temperature=0.9, eos_token_id=[3, 5])
    policy.save(tmp_path / "final")
    assert policy.model.generation_config is settings
    found = GenerationConfig.from_pretrained(tmp_path / "final")
    assert (found.temperature, found.eos_token_id) == (0.9, [3, 5])


FAMILIES = {
    "llama4_text": {"intermediate_size_mlp": 16, "num_local_experts": 2, "interleave_moe_layer_step": 1},
    "falcon_h1": {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1}
    | {"mamba_d_state": 4, "mamba_chunk_size": 4},
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 4, "state_size": 4, "n_groups": 1, "chunk_size": 4},
    "falcon": {},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize(
    ("family", "layers", "wanted"),
    [
        ("llama4_text", "all-linear", {"q_proj", "o_proj"}),
        ("falcon_h1", "all-linear", {"q_proj", "o_proj"}),
        ("mamba", "all-linear", {"in_proj", "x_proj"}),
        ("mamba2", "all-linear", {"in_proj"}),
        ("falcon", "all-linear", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("mixtral", "attention", {"q_proj", "v_proj"}),
    ],
)
def test_layers_that_their_model_does_not_just_call_get_no_adapter(family, layers, wanted, tmp_path):
    """Llama 4's router returns more than a product, and the kernel of a Mamba block takes the weight of out_proj.

    Falcon's own linear layers are linear layers, and peft itself does not find the attention of a mixture of experts.
    """
    from types import SimpleNamespace

    from peft import PeftModel
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1} | ({} if family == "falcon" else {"head_dim": 8})
    config = CONFIG_MAPPING[family](**sizes | FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    tokens = SimpleNamespace(eos_token_id=3, pad_token_id=None, save_pretrained=lambda _: None)
    policy = LanguagePolicy(model, tokens, lora=LoRAConfig(rank=2, layers=layers))
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in policy.trainable}
    assert wanted <= adapted
    assert not adapted & {"router", "out_proj", "dt_proj"}
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    some = pack([[5, 6], [7, 8]], [[9, 3], [10, 11]], pad=3)
    logp = policy.log_probs(policy.score(some))
    logp.sum().backward()
    assert all(p.grad is not None for p in policy.trainable.values())
    with torch.no_grad(), policy.reference():
        assert (policy.log_probs(policy.score(some)) - logp).abs().max() > 1e-3
    policy.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy.model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(policy.log_probs(policy.score(some)), logp)
