"""The built-in text rewards that need no network: length, regex, exact_match, numeric_match, sentiment."""

import math
from decimal import Decimal

import pytest

from diffusion_align.rewards import RewardError, build_text_reward, call_text_reward
from diffusion_align.rewards.text.numeric_match import numbers_in


def score(spec, *completions, **columns):
    """Scores of plain completions, None for nan, after checking that messages score the same."""
    reward = build_text_reward(spec)
    plain = call_text_reward(reward, ["p"] * len(completions), list(completions), columns)
    chats = [[{"role": "assistant", "content": completion}] for completion in completions]
    chat = call_text_reward(reward, [[{"role": "user", "content": "p"}]] * len(chats), chats, columns)
    assert plain.nan_to_num(-99).tolist() == chat.nan_to_num(-99).tolist()
    return [None if math.isnan(value) else pytest.approx(value, abs=1e-6) for value in plain.tolist()]


def test_length():
    texts = ("one two  three\n", "", "äö ")
    assert score("length", *texts) == [3, 0, 1]
    assert score({"name": "length", "unit": "chars"}, *texts) == [15, 0, 3]
    assert score({"name": "length", "target": 2}, *texts) == [-0.5, -1, -0.5]
    assert score({"name": "length", "target": 2.5, "unit": "chars"}, "abc", "a" * 10) == [-0.2, -3]


@pytest.mark.parametrize(
    ("mode", "scores"),
    [("search", [1, 1, 0, 0]), ("full", [1, 0, 0, 0]), ("count", [1, 2, 0, 0]), ("share", [1, 5 / 8, 0, 0])],
)
def test_regex(mode, scores):
    assert score({"name": "regex", "pattern": r"\d+", "mode": mode}, "123", "12 x 345", "none", "") == scores


def test_regex_flags_stand_in_the_pattern():
    assert score({"name": "regex", "pattern": "(?is)<think>.*</think>", "mode": "full"}, "<THINK>a\nb</think>") == [1]


def test_exact_match():
    answers = ["Paris", "a  b", 42, ["one", "1"], None, ["x"]]
    said = ("Paris", " a b\n", "42", "1", "anything", "y")
    assert score("exact_match", *said, answer=answers) == [1, 1, 1, 1, None, 0]
    loose = {"name": "exact_match", "ignore_case": True, "ignore_punctuation": True, "column": "gold"}
    assert score("exact_match", "paris.", answer=["Paris"]) == [0]
    assert score(loose, "paris.", "it's", "STRASSE", gold=["Paris", "it s", "straße"]) == [1, 1, 1]
    assert score("exact_match", "cafe\u0301", answer=["caf\u00e9"]) == [1]


def test_exact_match_of_a_part():
    spec = {"name": "exact_match", "extract": "(?s)<answer>(.*?)</answer>"}
    said = ("<answer>3</answer> no <answer>\n4 </answer>", "4", "<answer></answer>")
    assert score(spec, *said, answer=["4", "4", "4"]) == [1, 0, 0]
    assert score({**spec, "extract": "[A-D]"}, "A, no: B.", answer=["B"]) == [1]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("-3.5 and +1", ["-3.5", "1"]),
        (".5 or -.25", ["0.5", "-0.25"]),
        ("1,234,567.8", ["1234567.8"]),
        ("$1,000, -$5, -7 %", ["1000", "-5", "-7"]),
        ("6.02e23 1E-3", ["6.02E+23", "0.001"]),
        ("\u22125", ["-5"]),
        ("5-3=2, (5)-3, x=-5", ["5", "3", "2", "5", "3", "-5"]),
        ("1/2, 50%, 10-20", ["1", "2", "50", "10", "20"]),
        ("3,14", ["3", "14"]),
        ("1,2,3", ["1", "2", "3"]),
        ("12345,678", ["12345", "678"]),
        ("H2O v1.2.3 x_4", []),
        ("#### 18", ["18"]),
        (r"\boxed{42}. **7**.", ["42", "7"]),
        ("18kg", ["18"]),
        ("", []),
        ("1e5000", ["1"]),
    ],
)
def test_numbers_in_a_text(text, numbers):
    assert numbers_in(text) == [Decimal(number) for number in numbers]


def test_numeric_match():
    said = ("first 3, so 1,200.0", "-1200", "no number", "5", "", "5")
    assert score("numeric_match", *said, answer=["1200", 1200, 3, None, 1, "unknown"]) == [1, 0, 0, None, 0, None]
    assert score("numeric_match", "so it is 18", answer=["2 and 9 make 18\n#### 18"]) == [1]
    first = {"name": "numeric_match", "which": "first", "column": "gold"}
    assert score(first, "3, not 4", "4, not 3", gold=[3, 3]) == [1, 0]


def test_numeric_tolerance_is_exact_at_its_ends():
    spec = {"name": "numeric_match", "tolerance": 0.01}
    assert 1.01 - 1.00 > 0.01  # what floats would say
    assert score(spec, "1.01", "0.99", "1.0100001", "-1.0", answer=["1.00"] * 4) == [1, 1, 0, 0]
    assert score("numeric_match", "0.3", "0.30000000000000001", answer=[0.3, 0.3]) == [1, 0]


def test_a_column_that_is_not_there_is_named():
    for name, column in (("exact_match", "answer"), ("numeric_match", "answer")):
        with pytest.raises(RewardError, match=f"reward '{name}' needs the column '{column}', but the data has 'gold'"):
            score(name, "x", gold=["x"])


def test_sentiment_is_vaders_compound():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    texts = ("I love this wonderful day!", "This is terrible, I hate it.", "A table has four legs.", "")
    found = score("sentiment", *texts)
    expected = [vader.SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in texts]
    assert found == expected
    assert expected[0] > 0.8
    assert expected[1] < -0.7
    assert expected[2:] == [0, 0]
