"""Completions as they stand behind their prompts, with tokenizers of SentencePiece's kind and byte-level ones; what a
chat template must not leave out; and the forms in which words are given."""

import itertools
import json
import shutil
import time
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from diffusion_align.assets import asset_path
from diffusion_align.data.schemas import MOST_CHARACTERS, BadRow
from diffusion_align.data.text_encoding import TextEncoder, checked_text, context_length, continuation_tokens, tokenize
from diffusion_align.data.text_rows import TextDataConfig, preference_rows, prompt_rows
from diffusion_align.errors import ConfigError, UserError
from diffusion_align.models.language_models import load_ends, load_tokenizer
from diffusion_align.pipelines.text import read_prompts
from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.networks import token_limit
from diffusion_align.rewards.text.base import text_of, words_left_out
from diffusion_align.rewards.text.classifier import layout

SPECIALS = ["<unk>", "<s>", "</s>", "<0x0A>", "[INST]", "[/INST]"]
WORDS = [
    "▁",
    "▁Write",
    "▁a",
    "▁word",
    ".",
    "blue",
    "▁blue",
    "▁yes",
    "yes",
    "com",
    ".com",
    "▁Q",
    ":",
    "▁A",
    "▁green",
    "green",
]
PROMPT = "Write a word.\n"


def _wrapped(backend, **names):
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "[INST]", "[/INST]")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _unigram():
    """What SentencePiece makes: words, letters, and bytes for all else."""
    letters = sorted(set("".join(WORDS) + "abcdefghijklmnopqrstuvwxyzI ") - {" "})
    known = [*SPECIALS, *WORDS, *(x for x in letters if x not in WORDS)]
    scores = [(token, -1.0 if token in WORDS else -10.0) for token in known]
    scores += [(f"<0x{byte:02X}>", -20.0) for byte in range(256) if byte != 10]
    return Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))


def legacy():
    """As LlamaTokenizer: a space is put before a text by a normalizer, behind special tokens too."""
    backend = _unigram()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(backend)


def metaspace():
    """As newer conversions: a space is put before the first word of a text only."""
    backend = _unigram()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(backend)


def byte_level():
    """As GPT-2's and SmolLM2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["Write a word.\nblue green", "The king said they are 12 34 years\n\n old", "Answer: yes it's blue"] * 4
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="module", params=[legacy, metaspace])
def sentencepiece(request):
    return request.param()


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def encoded(tokenizer, prompt, *completions):
    return TextEncoder(tokenizer, max_completion_length=50).encode(prompt, completions)


def test_a_completion_behind_a_line_break_begins_with_no_space(sentencepiece):
    found = encoded(sentencepiece, PROMPT, "blue", " blue", "blue\nblue")
    assert tokens(sentencepiece, found.ids) == ["▁Write", "▁a", "▁word", ".", "<0x0A>"]
    assert [tokens(sentencepiece, ids) for ids in found.completions] == [
        ["blue", "</s>"],
        ["▁blue", "</s>"],
        ["blue", "<0x0A>", "blue", "</s>"],
    ]
    for ids, text in zip(found.completions, ("blue", " blue", "blue\nblue")):
        assert sentencepiece.decode([*found.ids, *ids], skip_special_tokens=True) == PROMPT + text


@pytest.mark.parametrize(
    ("prompt", "completion", "alone", "wanted"),
    [
        ("Q: ", "blue", ["▁Q", ":", "▁"], ["blue"]),  # "▁blue" would cross the border
        ("a.", "com", ["▁a", "."], ["com"]),
        ("Q:", " blue", ["▁Q", ":"], ["▁blue"]),
        ("Q:", "blue", ["▁Q", ":"], ["blue"]),
        ("Q: ", "\nblue", ["▁Q", ":", "▁"], ["<0x0A>", "blue"]),
    ],
)
def test_a_prompt_keeps_the_tokens_that_are_sampled_from(sentencepiece, prompt, completion, alone, wanted):
    found = encoded(sentencepiece, prompt, completion)
    assert tokens(sentencepiece, found.ids) == alone == tokens(sentencepiece, encoded(sentencepiece, prompt).ids)
    assert tokens(sentencepiece, found.completions[0]) == [*wanted, "</s>"]
    assert sentencepiece.decode([*found.ids, *found.completions[0][:-1]]) == prompt + completion


def test_an_answer_behind_a_chat_template(sentencepiece):
    user, assistant = "[INST] {{ m.content }} [/INST]", " {{ m.content }}</s>"
    turn = "{% if m.role == 'user' %}" + user + "{% else %}" + assistant + "{% endif %}"
    sentencepiece.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    asked, answer = [{"role": "user", "content": "Q"}], [{"role": "assistant", "content": "yes"}]
    found = encoded(sentencepiece, asked, answer)
    whole = sentencepiece.apply_chat_template(asked + answer, tokenize=True, return_dict=False)
    assert [*found.ids, *found.completions[0]] == whole
    assert tokens(sentencepiece, found.completions[0])[-2:] in (["▁yes", "</s>"], ["yes", "</s>"])
    assert encoded(sentencepiece, asked).ids == found.ids


def test_tokens_of_an_answer_that_was_given_are_those_of_one_that_is_sampled(sentencepiece):
    encoder = TextEncoder(sentencepiece, max_completion_length=1)
    assert tokens(sentencepiece, encoder.answer_ids(PROMPT, "blue")) == ["blue", "</s>"]
    assert tokens(sentencepiece, encoder.answer_ids(PROMPT, "")) == ["</s>"]
    assert tokens(sentencepiece, encoder.answer_ids(PROMPT, "blue</s>green")) == ["blue", "</s>"]
    sentencepiece.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert tokens(sentencepiece, encoder.answer_ids([{"role": "user", "content": "a"}], "blue")) == ["blue", "</s>"]
    sentencepiece.chat_template = None
    assert encoder.answer_ids([{"role": "user", "content": "a"}], "blue")[-1:] == [sentencepiece.eos_token_id]


def test_byte_level_tokens_stay_as_they_were():
    """What they are apart is what they are together, or the border is crossed and the prompt decides."""
    ours, (embedded, _) = byte_level(), load_tokenizer("tiny-lm")
    prompts = ["Write a word.\n", "Write a word. ", "The king said", "Answer:", "the", "12", "\n\n", "it"]
    completions = ["blue", " blue", "y are", "34 years", "\n\n old", "'s blue", "\nblue "]
    for tokenizer, prompt, completion in itertools.product((ours, embedded), prompts, completions):
        if tokenizer is ours and completion[0] == "'" and not prompt[-1].isalpha():
            continue  # GPT-2's rule for 's reads what stands before it
        assert continuation_tokens(tokenizer, prompt, completion) == tokenize(tokenizer, completion)
        found = encoded(tokenizer, prompt, completion)
        assert found.ids == encoded(tokenizer, prompt).ids
        assert found.completions == [[*tokenize(tokenizer, completion), tokenizer.eos_token_id]]
    assert tokenize(ours, "a. blue") != tokenize(ours, "a. ") + tokenize(ours, "blue")  # a border is crossed


# Chat templates


DEAF = "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}"
"""SmolVLM's way: of a text it writes nothing, as no letter has a text of its own."""


def test_a_template_that_leaves_words_out_is_refused():
    tokenizer = byte_level()
    tokenizer.chat_template = DEAF
    asked = [{"role": "user", "content": "the king"}]
    pair = {"prompt": asked, "chosen": "blue", "rejected": "green"}
    encoder = TextEncoder(tokenizer, max_completion_length=9)
    for load, row in ((prompt_rows, {"prompt": asked}), (preference_rows, pair)):
        with pytest.raises(ConfigError, match=r"^data: row 0: .*leaves .* out \('the king'\): set another"):
            load(TextDataConfig(source=[row]), encoder)
    with pytest.raises(RewardError, match=r"leaves .* out \('the king'\): give one"):
        layout(tokenizer, [asked], [[{"role": "assistant", "content": "blue"}]], "joined")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content | trim }}\n{% endif %}{% endfor %}"
    )
    assert encoder.encode([{"role": "user", "content": " the \n king "}], [])
    with pytest.raises(BadRow, match="'be brief'"):
        encoder.encode([{"role": "system", "content": "be brief"}, *asked], [])


def test_what_counts_as_left_out():
    thought = {"role": "assistant", "content": "<think>hm</think>yes"}
    user = {"role": "user", "content": "a b"}
    assert words_left_out([user], "<u>a\nb") is None
    assert words_left_out([user], "<u>a c") == "a b"
    assert words_left_out([user, thought, user], "a b yes a b") is None  # as Qwen3's and DeepSeek-R1's templates do
    assert words_left_out([user, thought], "a b yes") is None
    assert words_left_out([user, thought], "a b yes", in_full=1) == "<think>hm</think>yes"
    assert words_left_out([user, thought], "a b <think>\nhm\n</think>\n\nyes", in_full=1) is None
    assert words_left_out([user, thought], "a b no") == "<think>hm</think>yes"
    assert words_left_out([{"role": "tool", "content": '{"x": "é"}'}], r'"{\"x\": \"é\"}"') is None
    assert words_left_out([{"role": "user", "content": [{"type": "text", "text": "a b"}]}], "a b") is None


# The forms of words


def test_content_in_parts():
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "king", "image": None}]
    assert checked_text([{"role": "user", "content": parts}], "x") == [{"role": "user", "content": "the king"}]
    assert checked_text([{"role": "user", "content": tuple(parts), "name": None}], "x") == [
        {"role": "user", "content": "the king"}
    ]
    for wrong in ([*parts, {"type": "image", "text": None}], [], ["the king"], [{"type": "text"}], [parts]):
        with pytest.raises(BadRow, match="neither a text nor messages"):
            checked_text([{"role": "user", "content": wrong}], "x")
    with pytest.raises(BadRow, match="is empty"):
        checked_text([{"role": "user", "content": [{"type": "text", "text": " "}]}], "x")
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    plain, in_parts = (
        {
            "prompt": [{"role": "user", "content": c("the king")}],
            "chosen": [{"role": "assistant", "content": c("yes")}],
            "rejected": [{"role": "assistant", "content": c("no")}],
        }
        for c in (str, lambda text: [{"type": "text", "text": text}])
    )
    encoder = TextEncoder(tokenizer, max_completion_length=50)
    found = [preference_rows(TextDataConfig(source=[row]), encoder).rows for row in (plain, in_parts)]
    assert found[0] == found[1]


def test_a_text_of_megabytes_is_refused_before_it_is_tokenized():
    encoder = TextEncoder(byte_level(), max_completion_length=9, max_prompt_length=9)
    long = "the king " * 400_000
    pair = {"prompt": "a", "chosen": "blue", "rejected": long}
    begun = time.process_time()
    for load, row, what in (
        (prompt_rows, {"prompt": long}, "the prompt"),
        (prompt_rows, {"prompt": [{"role": "user", "content": long}]}, "the prompt"),
        (preference_rows, pair, "rejected"),
    ):
        with pytest.raises(ConfigError, match=f"row 0: {what} has {len(long)} characters, more than {MOST_CHARACTERS}"):
            load(TextDataConfig(source=[row]), encoder)
    assert time.process_time() - begun < 1


def test_a_mapping_in_place_of_a_text():
    with pytest.raises(BadRow, match=r"^x is a mapping, \{'a sign': 'stop'\}"):
        checked_text({"a sign": "stop"}, "x")


# The ends of a model


def test_the_ends_are_those_that_the_loaded_model_has(tmp_path):
    from transformers import GenerationConfig, LlamaConfig

    tokenizer, _ = load_tokenizer("tiny-lm")
    eos = tokenizer.eos_token_id
    assert load_ends("tiny-lm", tokenizer) == [eos]
    LlamaConfig(vocab_size=len(tokenizer), eos_token_id=7, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert load_ends(str(tmp_path), tokenizer) == sorted({eos, 7})
    GenerationConfig(eos_token_id=[eos, 9]).save_pretrained(tmp_path)
    assert load_ends(str(tmp_path), tokenizer) == sorted({eos, 9})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["seven"]}')
    with pytest.raises(UserError, match=r": eos_token_id=\['seven'\] of generation_config.json"):
        load_ends(str(tmp_path), tokenizer)


# What a tokenizer and a configuration need not say


@pytest.mark.parametrize("limit", [None, 1e30, 10**30, -1, 0, "512", [3]])
def test_a_tokenizer_with_any_limit_of_its_own(tmp_path, limit):
    shutil.copytree(asset_path("tiny-lm"), tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"model_max_length": limit}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if isinstance(limit, str | list):
        with pytest.raises(UserError, match=r"model_max_length=.*tokenizer_config\.json$"):
            load_tokenizer(str(tmp_path))
        return
    tokenizer, context = load_tokenizer(str(tmp_path))
    assert len(encoded(tokenizer, "the king " * 200, "said").ids) > 512
    assert (context, token_limit(tokenizer, SimpleNamespace(max_position_embeddings=context), None)) == (512, 512)
    assert token_limit(tokenizer, SimpleNamespace(), None) is None


@pytest.mark.parametrize(("said", "found"), [(64, 64), (None, None), (-1, None), (0, None), ("64", None)])
def test_a_configuration_may_say_nothing_about_its_context(said, found):
    config = SimpleNamespace(max_position_embeddings=said)
    config.get_text_config = lambda: config
    assert context_length(config) == found
    assert context_length(SimpleNamespace(get_text_config=SimpleNamespace)) is None


def test_complete_reads_content_in_parts(tmp_path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "king"}]}]
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": parts}]))
    [(prompt, _)] = read_prompts(str(tmp_path / "a.json"))
    assert text_of(prompt[-1:]) == "the king"
