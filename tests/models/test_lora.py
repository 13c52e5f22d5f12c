"""LoRA by peft alone: put on, switched and written without transformers' and diffusers' wrappers; read in full."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import diffusion_align
from diffusion_align.errors import UserError
from diffusion_align.models.lora import (
    adapter_layers,
    add_lora,
    carries_adapters,
    load_peft,
    merge_lora,
    remove_lora,
    save_peft,
)

WRAPPERS = re.compile(
    r"(add|delete|set)_adapters?|disable_adapters|(disable|enable|fuse)_lora|get_adapter_state_dict"
    r"|(load|save)_lora_(adapter|weights)|unload_lora(_weights)?"
)
"""Methods of transformers' models and diffusers' pipelines that ask for a version of peft of their own choosing."""


def test_no_wrapper_with_its_own_demands_on_peft_is_called():
    called = {
        (file.stem, node.func.attr)
        for file in Path(diffusion_align.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert ("language_models", "get_input_embeddings") in called
    assert not {(file, name) for file, name in called if WRAPPERS.fullmatch(name)}


@pytest.fixture
def model():
    """A tiny Llama and its token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()


def config_of(**settings):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False} | settings)


@torch.no_grad()
def logits(model):
    return model(torch.arange(6)[None]).logits


def test_an_adapter_is_taken_off_without_a_trace(model):
    before, names = logits(model), list(model.state_dict())
    add_lora(model, config_of())
    assert carries_adapters(model)
    assert (logits(model) - before).abs().max() > 1e-3
    remove_lora(model)
    assert not carries_adapters(model)
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), before)


def test_a_merged_model_carries_no_adapters(model, tmp_path):
    """peft's settings may stay on it: peft 0.17 leaves them."""
    add_lora(model, config_of())
    adapted = logits(model)
    settings = model.peft_config
    merge_lora(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-4)
    assert not hasattr(model, "peft_config")
    model.peft_config = settings
    assert not carries_adapters(model)
    add_lora(model, config_of())
    assert carries_adapters(model)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_reference_is_switched_to_without_a_walk_over_the_modules(kind, model, make_policy, monkeypatch):
    if kind == "image":
        policy = make_policy("tiny_sd", noise=0.1)
    else:
        from types import SimpleNamespace

        from diffusion_align.llm.policy import LanguagePolicy, LoRAConfig

        tokens = SimpleNamespace(eos_token_id=3, pad_token_id=None)
        policy = LanguagePolicy(model, tokens, lora=LoRAConfig(rank=2))
    network = policy.network if kind == "image" else policy.model
    layers = adapter_layers(network)
    assert layers

    def walk(*_, **__):
        raise AssertionError("every module was looked at")

    monkeypatch.setattr(type(network), "named_modules", walk)
    with policy.reference():
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers)
    assert all(p.requires_grad for layer in layers for n, p in layer.named_parameters() if ".lora_" in f".{n}")


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_written_is_read_by_peft(model, tmp_path, whole, dora):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model.save_pretrained(tmp_path / "base")
    settings = {"lora_alpha": 8, "modules_to_save": ["lm_head"]} if whole else {"lora_alpha": 8}
    add_lora(model, config_of(base_model_name_or_path=str(tmp_path / "base"), use_dora=dora, **settings))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    if whole:
        nn.init.normal_(model.lm_head.modules_to_save["default"].weight)
    save_peft(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model))
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    written = json.loads(text)
    assert text == json.dumps(written, indent=2, sort_keys=True)
    assert written["target_modules"] == sorted(written["target_modules"])
    assert (written["lora_alpha"], written["r"]) == (8, 2)
    ours = load_peft(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(model))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda tensors: {k.removeprefix("base_model.model."): v for k, v in tensors.items()}, r"^28 \(model\."),
        (
            lambda tensors: tensors | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(2, 16)},
            r"^1 \(base_model\.model\.model\.layers\.7\.mlp\.up_proj\.lora_A\.weight\) of the adapter's weights fit no",
        ),
        (
            lambda tensors: {k: v for k, v in tensors.items() if ".layers.1." not in k},
            r"lacks weights of the layers it names: 14 \(base_model",
        ),
    ],
    ids=["all", "one", "half"],
)
def test_an_adapter_of_which_not_all_fits_is_an_error(model, tmp_path, change, wanted):
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM(model.config)
    add_lora(model, config_of())
    save_peft(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=wanted):
        load_peft(base, tmp_path)


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("lora.ParamWrapper does not work with lora_dropout != 0.", "use lora.dropout=0"),
        ("lora.ParamWrapper does not work with use_dora=True.", "use lora.dora=false"),
        ("Target module Strange() is not supported.", "use lora=null to train all of it"),
    ],
)
def test_what_layers_cannot_have_is_left_out(model, monkeypatch, reason, remedy):
    """Experts of peft's newer versions have neither."""

    def refuse(*given):
        raise ValueError(reason)

    monkeypatch.setattr("peft.inject_adapter_in_model", refuse)
    with pytest.raises(UserError) as refusal:
        add_lora(model, config_of())
    assert str(refusal.value).startswith(f"peft cannot put adapters on a LlamaForCausalLM: {remedy} (")


def test_layers_that_peft_does_not_know_are_said(model, monkeypatch):
    monkeypatch.setattr(type(model.config), "model_type", "mine")
    with pytest.raises(UserError, match=r"attention layers of a LlamaForCausalLM: use lora\."):
        add_lora(model, config_of(target_modules=None))
    with pytest.raises(UserError, match="adapters on a LlamaForCausalLM: use lora=null"):
        add_lora(model, config_of(target_modules=["nothing"]))
