"""Rows of text to tokens with a real tokenizer: every layout, special tokens, cuts and every bad row."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from diffusion_align.data.text_encoding import TextEncoder, as_completion_message, eos_token_ids
from diffusion_align.data.text_rows import (
    LabelledRow,
    PreferenceRow,
    PromptRow,
    TextDataConfig,
    labelled_rows,
    preference_rows,
    prompt_rows,
)
from diffusion_align.errors import ConfigError
from diffusion_align.llm.policy import pack
from tests.helpers.characters import character_tokenizer
from tests.helpers.problems import assert_problem

BOS, EOS = 0, 1
MESSAGES = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</s>\n{% endfor %}"
CHATML = MESSAGES + "{% if add_generation_prompt %}<a>{% endif %}"


def make_tokenizer(*, bos="", template=None, also_eos=False):
    """A character a token; ``bos``: put before a text by default, a token that exists but is not put, or none."""
    known = ["<s>", "</s>", "<unk>", *(chr(i) for i in range(32, 127)), "\n", "\t", "é"]
    names = {"eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {})
    tokenizer = character_tokenizer(known, template=template, **names)
    if bos == "put":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if also_eos else "<s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    assert tokenizer.pad_token_id is None  # as GPT-2's
    return tokenizer


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer(template=CHATML)


def rows(load, source, tokenizer, *, max_completion_length=50, limits=None, **settings):
    config = TextDataConfig(source=source, **settings)
    return load(config, TextEncoder(tokenizer, max_completion_length=max_completion_length, **(limits or {})))


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def problems(load, source, tokenizer, **settings):
    with pytest.raises(ConfigError) as caught:
        rows(load, source, tokenizer, **settings)
    return caught.value.problems


def bad_rows(load, source, tokenizer, **settings):
    """The sentences about rows, but for the last, which says how to leave them out."""
    *found, hint = problems(load, source, tokenizer, **settings)
    assert "data.skip_bad_rows=true" in hint
    return found


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# Prompts


def test_prompts_with_their_other_columns(plain):
    source = [{"prompt": "2+2=", "answer": 4, "tags": ["a"]}, {"prompt": "hi"}]
    [first, second], truncation = rows(prompt_rows, source, plain)
    assert first == PromptRow("2+2=", plain("2+2=").input_ids, {"answer": 4, "tags": ["a"]})
    assert text(plain, first.ids) == "2+2="
    assert second == PromptRow("hi", plain("hi").input_ids, {"answer": None, "tags": None})
    assert (truncation.rows, truncation.prompts, truncation.completions, truncation.left_out) == (2, 0, 0, 0)


def test_bare_texts_and_sources_alone(plain, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "hi"}\n{"prompt": "ho"}\n')
    for config in (["hi", "ho"], str(path), path, {"source": str(path)}):
        config = TextDataConfig.model_validate(config)
        found = prompt_rows(config, TextEncoder(plain, max_completion_length=1)).rows
        assert [row.prompt for row in found] == ["hi", "ho"]


def test_the_first_rows_only(plain, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt\na\nb\nc\n")
    assert [row.prompt for row in rows(prompt_rows, str(path), plain, max_rows=2).rows] == ["a", "b"]
    assert [row.prompt for row in rows(prompt_rows, ["a", "b", ""], plain, max_rows=2).rows] == ["a", "b"]


def test_a_table_mapped_from_disk(chat, tmp_path):
    import datasets

    path = tmp_path / "a.parquet"
    source = [
        {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")], "score": 0.5},
        {"prompt": [user("ho")], "chosen": [assistant("yes")], "rejected": [assistant("no")], "score": None},
    ]
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(source).to_parquet(path)
    if not before:
        datasets.enable_progress_bars()
    assert rows(preference_rows, str(path), chat) == rows(preference_rows, source, chat)
    assert rows(preference_rows, str(path), chat).rows[1].columns == {"score": None}


@pytest.mark.parametrize(
    ("bos", "also_eos", "wanted"),
    [("put", False, [BOS]), ("put", True, [BOS]), ("there", False, []), ("", False, [])],
)
def test_bos_is_put_before_a_text_if_the_tokenizer_puts_it(bos, also_eos, wanted):
    tokenizer = make_tokenizer(bos=bos, also_eos=also_eos)
    bare = tokenizer("ab", add_special_tokens=False).input_ids
    assert rows(prompt_rows, ["ab"], tokenizer).rows[0].ids == wanted + bare
    given = rows(prompt_rows, ["<s>ab"], make_tokenizer(bos="put")).rows[0].ids
    assert given == [BOS, *bare]  # not twice
    [row] = rows(preference_rows, [{"prompt": "ab", "chosen": "c", "rejected": "d"}], tokenizer).rows
    assert row.ids == wanted + bare
    assert [row.chosen, *row.rejected] == [[*tokenizer(x, add_special_tokens=False).input_ids, EOS] for x in "cd"]


def test_before_a_conversation_only_the_template_puts_bos():
    for start, wanted in (("{{ bos_token }}", [BOS]), ("", [])):
        tokenizer = make_tokenizer(bos="put", template=start + CHATML)
        source = [{"prompt": [user("hi")], "completion": [assistant("yes")], "label": True}]
        [row] = rows(labelled_rows, source, tokenizer).rows
        assert row.ids == wanted + tokenizer("<u>hi</s>\n<a>", add_special_tokens=False).input_ids
        assert BOS not in row.completion
        whole = tokenizer.apply_chat_template([user("hi"), assistant("yes")], tokenize=True, return_dict=False)
        assert [*row.ids, *row.completion] == whole[:-1]  # but for the line end behind the last </s>


def test_a_conversation_that_asks_and_one_that_goes_on(chat):
    asked, going_on = rows(
        prompt_rows, [{"prompt": [user("hi")]}, {"prompt": [user("hi"), assistant("so ")]}], chat
    ).rows
    assert text(chat, asked.ids) == "<u>hi</s>\n<a>"
    assert text(chat, going_on.ids) == "<u>hi</s>\n<a>so "
    assert asked.prompt == [user("hi")]
    kept = rows(prompt_rows, [{"prompt": [user("hi") | {"name": None, "x": 1}]}], chat).rows[0]
    assert kept.prompt == [user("hi") | {"x": 1}]


# Preferences


def test_preferences_of_texts(plain):
    source = [
        {"prompt": "q:", "chosen": " yes", "rejected": " no", "label": 0.75, "score": 3},
        {"prompt": "r:", "chosen": " a</s>", "rejected": [" b", " c"], "label": 1},
    ]
    [first, second], truncation = rows(preference_rows, source, plain)
    ids = {key: plain(key).input_ids for key in ("q:", " yes", " no", "r:", " a", " b", " c")}
    assert first == PreferenceRow("q:", ids["q:"], [*ids[" yes"], EOS], [[*ids[" no"], EOS]], 0.75, {"score": 3})
    assert second.chosen == [*ids[" a"], EOS]
    assert second.rejected == [[*ids[" b"], EOS], [*ids[" c"], EOS]]
    assert second.label == 1.0
    assert (truncation.rows, truncation.prompts, truncation.completions) == (2, 0, 0)
    [unlabelled] = rows(preference_rows, [{"prompt": "q", "chosen": "a", "rejected": "b"}], plain).rows
    assert unlabelled.label == 1.0
    batch = pack([first.ids, second.ids], [first.chosen, second.chosen], pad=EOS)
    assert batch.mask.sum(1).tolist() == [5, 3]


def test_preferences_of_conversations_end_with_one_eos(chat):
    source = [{"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}]
    [row] = rows(preference_rows, source, chat).rows
    assert text(chat, row.ids) == "<u>hi</s>\n<a>"
    assert text(chat, row.chosen) == "yes</s>"
    assert text(chat, row.rejected[0]) == "no</s>"
    assert row.chosen.count(EOS) == 1
    without = make_tokenizer(template=CHATML.replace("</s>", "|"))
    [row] = rows(preference_rows, source, without).rows
    assert text(without, row.chosen) == "yes|\n</s>"


WHOLE = {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]}
SAME = {
    "implicit": WHOLE,
    "text beside conversations": WHOLE | {"prompt": "hi"},
    "prompt repeated": WHOLE | {"prompt": [user("hi")]},
    "answers as texts": {"prompt": [user("hi")], "chosen": "yes", "rejected": "no"},
    "answers in two forms": {"prompt": [user("hi")], "chosen": "yes", "rejected": [assistant("no")]},
    "several": {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [[assistant("no")]]},
    "several implicit": WHOLE | {"rejected": [WHOLE["rejected"]]},
}


@pytest.mark.parametrize("case", SAME)
def test_all_forms_of_one_preference(chat, case):
    plainly = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    assert rows(preference_rows, [SAME[case]], chat) == rows(preference_rows, [plainly], chat)


def test_longer_conversations_share_all_but_what_differs(chat):
    start = [user("1"), assistant("2"), user("3")]
    source = [
        {"chosen": [*start, assistant("a")], "rejected": [[*start, assistant("b")], [*start, assistant("c")]]},
        {"chosen": [user("1"), assistant("2")], "rejected": [user("1"), assistant("2"), user("3"), assistant("4")]},
    ]
    first, second = rows(preference_rows, source, chat, limits={"ends": ()}).rows  # a classifier reads all turns
    assert first.prompt == start
    assert [text(chat, ids) for ids in (first.ids, first.chosen, *first.rejected)] == [
        "<u>1</s>\n<a>2</s>\n<u>3</s>\n<a>",
        "a</s>",
        "b</s>",
        "c</s>",
    ]
    assert second.prompt == [user("1")]  # as in TRL, never all of a side
    assert text(chat, second.rejected[0]) == "2</s>\n<u>3</s>\n<a>4</s>"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: sky? A: blue", "Q: sky? A: green", "Q: sky? A:"),  # the space belongs to the answer, as in TRL
        ("Q: sky? A: it is blue", "Q: sky? A: it is black", "Q: sky? A: it is"),  # not inside a word
        ("Q\nyes", "Q\nno", "Q\n"),
        ("Q\tno way", "Q\tnot", "Q\t"),
        ("Q:yes", "Q:no", "Q:"),
        ("ab cd", "ab cd ef", "ab"),
        ("abc", ["abd", "aef"], "a"),
    ],
)
def test_texts_with_the_prompt_inside(plain, chosen, rejected, prompt):
    [row] = rows(preference_rows, [{"chosen": chosen, "rejected": rejected}], plain).rows
    assert row.prompt == text(plain, row.ids) == prompt
    assert prompt + text(plain, row.chosen) == chosen + "</s>"
    several = rejected if isinstance(rejected, list) else [rejected]
    assert [prompt + text(plain, ids) for ids in row.rejected] == [side + "</s>" for side in several]


def test_a_template_that_opens_an_answer_with_more_than_it_writes():
    """DeepSeek-R1 opens with a thought; TRL's remedy is the common beginning."""
    tokenizer = make_tokenizer(template=CHATML.replace("<a>{% endif %}", "<a><t>{% endif %}"))
    [row] = rows(preference_rows, [SAME["implicit"]], tokenizer).rows
    assert text(tokenizer, row.ids) == "<u>hi</s>\n<a>"
    assert text(tokenizer, row.chosen) == "yes</s>"
    [asked] = rows(prompt_rows, [{"prompt": [user("hi")]}], tokenizer).rows
    assert text(tokenizer, asked.ids) == "<u>hi</s>\n<a><t>"


# Labelled completions


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        *[(True, True), (False, False), (1, True), (0, False), (1.0, True)],
        *[(np.bool_(True), True), (np.bool_(False), False), (np.int64(1), True), (np.float32(0), False)],
        *[(torch.tensor(True), True), (np.array(0), False)],
    ],
)
def test_labelled_completions(plain, label, wanted):
    [row], _ = rows(labelled_rows, [{"prompt": "q", "completion": "a", "label": label, "x": 1}], plain)
    assert row == LabelledRow("q", plain("q").input_ids, [*plain("a").input_ids, EOS], wanted, {"x": 1})
    assert type(row.desirable) is bool


def test_labels_of_a_csv_file(plain, tmp_path):
    (tmp_path / "a.csv").write_text(
        "prompt,completion,label\n" + "".join(f"q,a,{x}\n" for x in ("1", "0", "True", "false"))
    )
    found = rows(labelled_rows, str(tmp_path / "a.csv"), plain).rows
    assert [row.desirable for row in found] == [True, False, True, False]


def test_completion_of():
    assert as_completion_message("yes", "hi") == "yes"
    assert as_completion_message("yes", [user("hi")]) == [assistant("yes")]


# Lengths


def test_prompts_keep_their_end_and_bos():
    for bos in ("put", "there"):
        tokenizer = make_tokenizer(bos=bos)
        found, truncation = rows(prompt_rows, ["abcdefgh", "abc"], tokenizer, limits={"max_prompt_length": 4})
        long, short = (text(tokenizer, row.ids) for row in found)
        assert (long, short) == (("<s>fgh", "<s>abc") if bos == "put" else ("efgh", "abc"))
        assert (truncation.prompts, truncation.completions) == (1, 0)
        assert found[0].prompt == "abcdefgh"  # the reward sees all of it
    [row] = rows(prompt_rows, ["abc"], make_tokenizer(), limits={"max_prompt_length": 1}).rows
    assert row.ids == make_tokenizer()("c").input_ids


@pytest.mark.parametrize("ends", [None, ()])
def test_a_completion_that_was_cut_has_no_end(plain, ends):
    source = [
        {"prompt": "q", "chosen": "abcdefgh", "rejected": ["abc", "xyzuvw", "xyzuvw</s>"]},
        {"prompt": "q", "chosen": "abc", "rejected": "abd"},
    ]
    found, truncation = rows(preference_rows, source, plain, max_completion_length=4, limits={"ends": ends})
    kept = [text(plain, ids) for ids in (found[0].chosen, *found[0].rejected)]
    assert kept == ["abcd", "abc</s>", "xyzu", "xyzu"]
    assert (truncation.rows, truncation.prompts, truncation.completions) == (2, 0, 1)


def test_chosen_and_rejected_differ_in_the_tokens_that_are_trained_on(plain, chat, golden):
    long = {"prompt": "q", "chosen": "b" * 80 + "c", "rejected": ["a", "b" * 80 + "d"]}
    both = [PAIR | {"label": 1.0}, long | {"label": 1.0}]
    golden("the same up to the limit", bad_rows(preference_rows, both, plain, max_completion_length=64))
    assert len(rows(preference_rows, [long], plain, max_completion_length=81).rows) == 1
    later = {"prompt": [user("1")], "chosen": [assistant("2")], "rejected": [assistant("2"), user("3"), assistant("4")]}
    golden("the same up to the first end", bad_rows(preference_rows, [PAIR, later], chat))
    deaf = [PAIR, PAIR | {"chosen": "yes", "rejected": "yes</s>"}]
    golden("the same tokens of two texts", bad_rows(preference_rows, deaf, plain))


def test_nothing_stands_behind_the_first_end(chat):
    """As in Gemma, whose template ends a turn with another token than the tokenizer's end of sequence."""
    gemma = make_tokenizer(template=CHATML.replace("</s>", "~"))  # "~" plays <end_of_turn>
    turn = gemma.convert_tokens_to_ids("~")
    source = [{"prompt": [user("hi")], "completion": [assistant("yes")], "label": 1}]
    [row], cut = rows(labelled_rows, source, gemma, limits={"ends": [EOS, turn]})
    assert text(gemma, row.ids) == "<u>hi~\n<a>"
    assert (text(gemma, row.completion), cut.completions) == ("yes~", 0)
    turns = [{"prompt": [user("1")], "completion": [assistant("2"), user("3"), assistant("4")], "label": 1}]
    for tokenizer, ends, end in ((chat, None, "</s>"), (gemma, [EOS, turn], "~")):
        [row], cut = rows(labelled_rows, turns, tokenizer, limits={"ends": ends})
        assert (text(tokenizer, row.completion), cut.completions) == (f"2{end}", 1)
    texts = [{"prompt": "q", "completion": x, "label": 1} for x in ("yes~\n", "yes", "yes</s>no")]
    found, cut = rows(labelled_rows, texts, gemma, limits={"ends": [EOS, turn]})
    assert [text(gemma, row.completion) for row in found] == ["yes~", "yes</s>", "yes</s>"]
    assert cut.completions == 1


def test_the_ends_of_a_model(plain):
    def ends(eos):
        return eos_token_ids(plain, SimpleNamespace(eos_token_id=eos))

    assert eos_token_ids(plain) == ends(None) == [EOS]
    assert ends(5) == [EOS, 5]
    assert ends([5, EOS, 4]) == [EOS, 4, 5]


def test_what_truncation_says(plain, golden):
    source = [{"prompt": "abcd", "completion": "abcd", "label": 1}, {"prompt": "", "completion": "a", "label": 1}]
    limits = {"max_prompt_length": 2}
    truncation = rows(
        labelled_rows, source, plain, max_completion_length=3, limits=limits, skip_bad_rows=True
    ).truncation
    golden("truncation", str(truncation))


def test_a_prompt_without_room_for_a_completion(plain, golden):
    limits, texts = {"context_length": 10}, ["abcdef", "abcdefg"]
    golden("no room", bad_rows(prompt_rows, texts, plain, max_completion_length=4, limits=limits))
    cut = rows(prompt_rows, texts, plain, max_completion_length=4, limits=limits | {"max_prompt_length": 6})
    assert [len(row.ids) for row in cut.rows] == [6, 6]
    # What is known of a completion counts, not how long it might have been.
    pairs = [
        {"prompt": "abcdefg", "chosen": "ab", "rejected": "c"},
        {"prompt": "abcdefg", "chosen": "a", "rejected": "xyz"},
    ]
    golden("no room", bad_rows(preference_rows, pairs, plain, max_completion_length=4, limits=limits))
    assert len(rows(preference_rows, pairs[:1], plain, max_completion_length=4, limits=limits).rows) == 1


def test_limits_that_cannot_be(plain, golden):
    nothing = {"limits": {"max_prompt_length": 0}, "max_completion_length": 0}
    golden("limits of 0, and no file", problems(prompt_rows, "no.jsonl", plain, **nothing))
    full = {"limits": {"context_length": 8}, "max_completion_length": 8}
    golden("no room for any prompt", problems(prompt_rows, ["a"], plain, **full))
    bare = make_tokenizer()
    bare.eos_token = None
    golden("a tokenizer without an end", problems(prompt_rows, ["a"], bare))


# Bad rows and columns


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
ADDED = {"prompt": [user("q")], "rejected": [user("q"), assistant("b")]}
BAD_PAIRS: dict[str, dict] = {
    "empty prompt": {"prompt": " "},
    "no prompt": {"prompt": None},
    "no messages": {"prompt": []},
    "blank messages": {"prompt": [user("")]},
    "number": {"prompt": 3},
    "empty chosen": {"chosen": ""},
    "empty rejected": {"rejected": None},
    "none rejected": {"rejected": []},
    "one of several empty": {"rejected": ["b", ""]},
    "several chosen": {"chosen": ["a", "c"]},
    "no content": {"chosen": [{"role": "user"}]},
    "same": {"rejected": "a"},
    "same among several": {"rejected": ["b", "a"]},
    "two forms": {"rejected": [assistant("b")]},
    "nothing alike": {"chosen": [assistant("a")], "rejected": [assistant("b")]},
    "nothing added": ADDED | {"chosen": [user("q"), assistant("")]},
    "the prompt again": ADDED | {"chosen": [user("q")]},
    "label high": {"label": 1.5},
    "label nan": {"label": float("nan")},
    "label text": {"label": "good"},
    "label none": {"label": None},
    "half a character": {"chosen": "\ud800"},
    "system last": {"prompt": [{"role": "system", "content": "s"}]},
    "nothing but an end": {"chosen": "</s>"},
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_bad_pair_is_named_and_can_be_left_out(chat, case, golden):
    good = PAIR | {"label": 1.0}
    source = [good, good, good | BAD_PAIRS[case], good | {"label": 0.5}]
    [problem] = bad_rows(preference_rows, source, chat)
    golden(case, problem)
    assert problem.startswith("data: row 2: ")
    found, truncation = rows(preference_rows, source, chat, skip_bad_rows=True)
    assert [row.label for row in found] == [1.0, 1.0, 0.5]
    assert (truncation.rows, truncation.left_out) == (3, 1)


@pytest.mark.parametrize("label", ["yes", 2, 0.5, None, [1], float("nan"), ""])
def test_labels_that_are_neither_true_nor_false(plain, label):
    source = [{"prompt": "q", "completion": "a", "label": x} for x in (True, label)]
    assert_problem(*bad_rows(labelled_rows, source, plain), "data", f"row 1: label is {label!r}, not true")


def test_a_text_that_yaml_took_for_a_mapping(plain, golden):
    source = yaml.safe_load("[the cat, {prompt: a dog}, a sign: stop, at: 10]")
    golden("mappings", bad_rows(prompt_rows, source, plain))
    columns = {"columns": {"prompt": "q"}}
    assert [row.prompt for row in rows(prompt_rows, ["a", {"q": "b"}], plain, **columns).rows] == ["a", "b"]
    assert "row 1: the prompt is a mapping" in problems(prompt_rows, ["a", {"a: b": "c"}], plain, **columns)[0]


def test_a_text_with_a_conversation_behind(chat, golden):
    both = [PAIR | {"completion": x, "label": 1} for x in ("a", [assistant("a")])]
    golden("a conversation behind a text", bad_rows(labelled_rows, both, chat))


def test_all_bad_rows_at_once_and_ten_of_them_shown(plain, golden):
    golden("two bad rows", problems(prompt_rows, ["a", "", 3 * " "], plain))
    golden("thirteen bad rows", problems(prompt_rows, [""] * 13, plain))


def test_no_rows(plain, tmp_path, golden):
    (tmp_path / "a.jsonl").write_text("")
    golden("an empty file", problems(prompt_rows, str(tmp_path / "a.jsonl"), plain))


def test_conversations_without_a_template(plain, golden):
    for load in (prompt_rows, preference_rows):
        golden("no template", problems(load, [WHOLE | {"prompt": [user("hi")]}] * 3, plain))


def test_a_template_that_refuses(golden):
    strict = make_tokenizer(template="{{ raise_exception('roles must alternate.') }}")
    golden("a template that refuses", bad_rows(prompt_rows, ["a", {"prompt": [user("a")]}], strict))


def test_a_prompt_without_a_known_token(golden):
    class Deaf(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__(text.replace("é", ""), **options)

    tokenizer = Deaf(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="</s>")
    golden("no known token", bad_rows(prompt_rows, ["é", "a"], tokenizer))


def test_columns(plain):
    source = [{"question": "q", "prompt": "other", "answer": "a"}]
    [row] = rows(prompt_rows, source, plain, columns={"prompt": "question"}).rows
    assert (row.prompt, row.columns) == ("q", {"prompt": "other", "answer": "a"})
    pairs = [{"q": "q", "good": "a", "bad": "b", "p": 0.25, "label": "x"}]
    names = {"prompt": "q", "chosen": "good", "rejected": "bad", "label": "p"}
    [row] = rows(preference_rows, pairs, plain, columns=names).rows
    assert (row.prompt, row.label, row.columns) == ("q", 0.25, {"label": "x"})


def test_wrong_columns(plain, golden):
    source, loads = [{"question": "q", "answer": "a"}], (prompt_rows, preference_rows, labelled_rows)
    golden("columns that are needed", [problem for load in loads for problem in problems(load, source, plain)])
    for columns in ({"label": "p"}, {"promt": "question"}):
        golden(f"columns={columns}", problems(preference_rows, source, plain, columns=columns))
    with pytest.raises(ConfigError, match=r"^prompts\.columns: the column prompt is needed"):
        prompt_rows(TextDataConfig(source=source), TextEncoder(plain, max_completion_length=1), name="prompts")


def problems_ahead(config, kind, name="data"):
    try:
        config.open_ahead(name, kind)
    except ConfigError as error:
        return error.problems
    return []


def test_columns_are_checked_without_a_tokenizer(monkeypatch, golden):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", None)  # a download would fail
    pairs = TextDataConfig(source=[{"prompt": "q", "chosen": "a", "rejected": ""}])
    assert problems_ahead(pairs, "preferences") == problems_ahead(pairs, "prompts") == []
    golden("columns that are needed, ahead", problems_ahead(pairs, "labels", name="dataset"))
    assert len(problems_ahead(TextDataConfig(source="no.csv", columns={"promt": "x"}), "prompts")) == 2
    assert problems_ahead(TextDataConfig(source="some/rows"), "prompts") == []
    misspelled = problems_ahead(TextDataConfig(source="some/rows", columns={"promt": "x"}), "prompts")
    assert_problem(misspelled, "data.columns", "did you mean 'prompt'")
    part = problems_ahead(TextDataConfig(source="a/b", split="a[1:]", max_rows=1), "prompts")
    assert_problem(part, "data.split", "without [...]")


def test_settings_are_said_with_their_place(golden):
    from diffusion_align.training.config import TrainingConfig
    from diffusion_align.training.reading import parse_config

    class Config(TrainingConfig):
        data: TextDataConfig

    def said(data):
        with pytest.raises(ConfigError) as caught:
            parse_config(Config, {"model": "m", "output_dir": "o", "data": data})
        return caught.value.problems

    for data in ("", {"source": "a", "max_rows": 0}, {"source": "a", "colums": {}}):
        golden(f"data={data!r}", said(data))
    config = parse_config(Config, {"model": "m", "output_dir": "o", "data": ["hi", {"prompt": "ho"}]})
    assert json.loads(config.model_dump_json())["data"]["source"] == ["hi", {"prompt": "ho"}]


def test_long_texts_are_tokenized_in_silence(capfd, caplog):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 5
    rows(preference_rows, [{"prompt": "a" * 50, "chosen": "b" * 40, "rejected": "c"}], tokenizer)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("one two\n\n three \n \n")
    config = TextDataConfig(source=str(tmp_path / "prompts.txt"))
    rows, _ = prompt_rows(config, TextEncoder(make_tokenizer(), max_completion_length=4))
    assert [row.prompt for row in rows] == ["one two", " three "]  # a blank at the end is part of what is completed
    assert problems_ahead(config, "preferences") != []
