"""Language models compared, and preference pairs made from one: who wins, what is written, and that dpo reads it."""

import pytest
import torch

from diffusion_align.errors import ConfigError, UserError
from diffusion_align.models.language_models import model_kind
from diffusion_align.pipelines.compare import compare_texts
from diffusion_align.pipelines.pairs import PairsWritten, TextCandidates, make_pairs
from diffusion_align.pipelines.text import TextAlignmentPipeline
from diffusion_align.rewards import RewardError, text_of
from tests.helpers.rows_on_disk import read_rows

PROMPTS = ["the cat", "a dog is", "who?"]
FAST = {"max_new_tokens": 5, "seed": 7}


def length(completions):
    return [float(len(text_of(text))) for text in completions]


def wanted(completions, letter):
    return [float(text.count(one)) for text, one in zip(completions, letter)]


@pytest.fixture
def pipe(tiny_language_model):
    return TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")


@pytest.fixture
def other(tiny_language_model):
    """The same model, which ends a text more rarely."""
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return pipe


def test_a_language_model_against_itself_wins_half(pipe):
    result = compare_texts(pipe, pipe, PROMPTS, length, per_prompt=3, **FAST)
    assert (result.win_rate, result.pairs, result.mean_difference) == (0.5, 9, 0.0)
    assert [row["a"] for row in result.texts] == [row["b"] for row in result.texts]
    assert result.independent_pairs <= 9


def test_the_scores_are_those_of_the_texts_and_b_is_the_second(pipe, other, tmp_path):
    seen = []
    result = compare_texts(
        other, pipe, PROMPTS, length, per_prompt=4, output=tmp_path / "all.jsonl", on_samples=seen.append, **FAST
    )
    found = read_rows(tmp_path / "all.jsonl")
    assert found == [dict(row) for row in result.texts]
    assert seen == [8, 16, 20, 24]
    for i, row in enumerate(found):
        assert row["prompt"] == PROMPTS[i % 3]
        for side, model in (("a", other), ("b", pipe)):
            assert row[side] == model(row["prompt"], seed=7 + i, max_new_tokens=5).texts[0]
            assert row[f"score_{side}"] == len(row[side])
    wins = [(row["score_b"] > row["score_a"]) + 0.5 * (row["score_b"] == row["score_a"]) for row in found]
    assert result.win_rate == pytest.approx(sum(wins) / 12)
    assert result.low <= result.win_rate <= result.high


def test_a_table_of_the_pairs(pipe, other, tmp_path):
    result = pipe.compare(other, ["a | b <i>"], length, output=tmp_path / "new" / "pairs.md", **FAST)
    text = (tmp_path / "new" / "pairs.md").read_text()
    assert text.startswith("A ")
    assert "Wilson" in text.splitlines()[0]
    assert "| `a \\| b <i>` | `" in text
    assert "<table>" in result._repr_html_()
    assert "&lt;i&gt;" in result._repr_html_()


def test_the_judge_gets_the_columns_and_must_say_something(pipe):
    notes = [{"letter": "a"}, {"letter": "e"}, {"letter": "s"}]
    result = compare_texts(pipe, pipe, PROMPTS, wanted, metadata=notes, **FAST)
    assert result.texts[1]["score_a"] == result.texts[1]["a"].count("e")
    with pytest.raises(RewardError, match="every reward returned None for sample"):
        compare_texts(pipe, pipe, PROMPTS, lambda completions: [None] * len(completions), **FAST)
    with pytest.raises(UserError, match=r"must end in \.md or \.jsonl"):
        compare_texts(pipe, pipe, PROMPTS, length, output="x.png", **FAST)
    with pytest.raises(ConfigError, match="reward='lenght' is unknown"):
        compare_texts(pipe, "nothing", PROMPTS, "lenght", **FAST)


def test_best_and_worst_of_a_prompts_completions(pipe, tmp_path):
    made = pipe.make_pairs(
        PROMPTS,
        wanted,
        tmp_path / "pairs",
        per_prompt=5,
        metadata=[{"letter": "a"}, {"letter": "é"}, {"letter": " "}],
        **FAST,
    )
    found = read_rows(tmp_path / "pairs" / "pairs.jsonl")
    ties = read_rows(tmp_path / "pairs" / "ties.jsonl")
    assert [row["prompt"] for row in ties] == ["a dog is"]
    assert made == PairsWritten(2, 1, pytest.approx(sum(r["score_chosen"] - r["score_rejected"] for r in found) / 2))
    for place, row in zip((0, 2), found, strict=True):
        texts = pipe.sample_each([PROMPTS[place]] * 5, range(7 + 5 * place, 12 + 5 * place), max_new_tokens=5)
        scores = [text.count(row["letter"]) for text in texts]
        assert (row["score_chosen"], row["score_rejected"]) == (max(scores), min(scores))
        for side in ("chosen", "rejected"):
            assert row[side] == pipe(PROMPTS[place], seed=row[f"seed_{side}"], max_new_tokens=5).texts[0]


def test_a_stopped_run_of_pairs_ends_like_any_other(pipe, tmp_path):
    pipe.make_pairs(PROMPTS, length, tmp_path / "whole", per_prompt=3, **FAST)
    calls = []

    def fails_once(completions):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("gone")
        return length(completions)

    fails_once.__name__ = "length"
    with pytest.raises(RewardError, match="gone"):
        pipe.make_pairs(PROMPTS, fails_once, tmp_path / "cut", per_prompt=3, **FAST)
    with pytest.raises(UserError, match=r"was begun with temperature=1\.0, not .*temperature=0\.5"):
        pipe.make_pairs(PROMPTS, fails_once, tmp_path / "cut", per_prompt=3, temperature=0.5, resume=True, **FAST)
    pipe.make_pairs(PROMPTS, fails_once, tmp_path / "cut", per_prompt=3, resume=True, **FAST)
    assert read_rows(tmp_path / "cut" / "pairs.jsonl") == read_rows(tmp_path / "whole" / "pairs.jsonl")


@pytest.mark.parametrize("chat", [False, True])
def test_dpo_trains_on_the_pairs(tiny_language_model, tiny_chat_model, tmp_path, chat):
    pipe = TextAlignmentPipeline.from_pretrained(tiny_chat_model if chat else tiny_language_model, device="cpu")
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS] if chat else PROMPTS
    made = pipe.make_pairs(prompts, length, tmp_path / "pairs", per_prompt=6, **FAST)
    assert made.pairs >= 1
    settings = {"epochs": 1, "samples_per_epoch": 2, "sample_batch_size": 2, "lora": {"rank": 2}, "grid_every": 0}
    settings |= {"max_completion_length": 6, "updates_per_epoch": 1, "num_threads": 1}
    pipe.align("dpo", dataset=tmp_path / "pairs" / "pairs.jsonl", output_dir=tmp_path / "run", **settings)
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


def test_what_makes_no_pairs(pipe, tmp_path):
    with pytest.raises(ConfigError, match="must be at least 2: a pair needs two completions"):
        pipe.make_pairs(PROMPTS, length, tmp_path / "x", per_prompt=1)
    with pytest.raises(UserError, match="prompts and metadata must be lists of the same length: got 3 and 1"):
        pipe.make_pairs(PROMPTS, length, tmp_path / "x", metadata=[{}])
    with pytest.raises(ConfigError, match="reward='lenght' is unknown"):
        make_pairs(TextCandidates("tiny-lm"), [("a", {})], "lenght", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_kind_of_a_model(tiny_language_model, tiny_sd):
    assert model_kind(["tiny-lm", str(tiny_language_model)]) == "text"
    assert model_kind(["emoji-sd", str(tiny_sd)]) == "image"
    assert model_kind(["no/such-model-anywhere"]) == "image"
    assert model_kind(["tiny-lm", "owner/unknown"]) == "text"
    with pytest.raises(UserError, match="a text-to-image model and 'tiny-lm' a language model"):
        model_kind(["tiny-lm", "emoji-sd"])


def test_the_commands_find_out_the_kind_themselves(tiny_language_model, tmp_path, monkeypatch, call_cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "the cat", "letter": "a"}\n{"prompt": "who", "letter": "e"}\n')
    (tmp_path / "mine.py").write_text(
        "def wanted(completions, letter):\n    return [t.count(a) + len(t) / 99 for t, a in zip(completions, letter)]\n"
    )
    given = ["--judge", "mine.py:wanted", "--prompts", "p.jsonl", "--max-new-tokens", 4]
    status, out, err = call_cli("compare", tiny_language_model, "tiny-lm", *given, "--per-prompt", 2)
    assert (status, err) == (0, "")
    assert "of 4 pairs (95 % interval" in out
    assert out.endswith("; texts in compare.md\n")
    assert (tmp_path / "compare.md").read_text().count("\n| `") == 4
    status, out, err = call_cli("pairs", tiny_language_model, *given, "-o", "made")
    assert (status, err) == (0, "")
    assert "see made/pairs.jsonl" in out
    assert {row["letter"] for row in read_rows(tmp_path / "made" / "pairs.jsonl")} <= {"a", "e"}
    for arguments, expected in (
        (["pairs", "tiny-lm", *given, "-o", "x", "--steps", 3], "--steps is for image models: leave it out"),
        (["compare", "emoji-sd", "emoji-sd", *given], "--max-new-tokens is for language models: leave it out"),
        (["compare", "emoji-sd", "tiny-lm", *given], "give models of one kind"),
    ):
        status, _, err = call_cli(*arguments)
        assert (status, expected in err) == (2, True), err
