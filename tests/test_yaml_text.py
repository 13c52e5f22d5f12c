"""YAML as settings are written in it: what is refused, and words that are text where text is wanted."""

import math
from typing import Any, Literal

import pytest
import yaml

from diffusion_align import yaml_text
from diffusion_align.data.prompts import PromptsConfig
from diffusion_align.errors import ConfigError
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.reading import read_as
from diffusion_align.yaml_text import Unread, YamlProblem, parse

REFUSED = {
    "tag": ("a: !!int x", "the tag 'tag:yaml.org,2002:int' is not read"),
    "python": ("a: !!python/object/apply:os.system [ls]", "is not read: leave tags"),
    "own tag": ("a: !mine 3", "is not read: leave tags"),
    "a plain exclamation mark": ("a: ! x", "the tag '!' is not read"),
    "alias": ("a: &x 1\nb: *x", "aliases"),
    "anchor alone": ("a: &x 1", "aliases"),
    "laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
    "twice": ("a: 1\nb: 2\na: 3", "the key 'a' is given twice"),
    "twice below": ("s:\n  a: 1\n  a: 1", "the key 'a' is given twice"),
    "twice, quoted": ("no: 1\n'no': 2", "the key 'no' is given twice"),
    "list as a key": ("? [a]\n: 1", "a key must be a text"),
    "deep": ("[" * 4000, "nested more than 50"),
    "deep mappings": ("".join(" " * i + "a:\n" for i in range(200)), "nested more than 50"),
    "octal": ("a: 010", "010 can mean more than one number"),
    "new octal": ("a: 0o10", "more than one number"),
    "hexadecimal": ("a: 0x1F", "more than one number"),
    "binary": ("a: 0b11", "more than one number"),
    "underscores": ("a: 1_000", "more than one number"),
    "sexagesimal": ("a: 1:10", "more than one number"),
    "sexagesimal of three": ("a: 190:20:30.15", "more than one number"),
    "too many digits": ("a: " + "9" * 5000, "too large or too long"),
    "control": ("a: \0", "special characters are not allowed"),
    "two documents": ("a: 1\n---\na: 2", "single document"),
    "bracket": ("a: [1", "expected"),
}


@pytest.mark.parametrize(("text", "wanted"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_a_reason(text, wanted):
    with pytest.raises(YamlProblem, match=wanted.replace("(", r"\(")) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("content", "wanted", "line"),
    [
        (b"\xff\xfea\0:\0 \0", "UTF-8", 1),
        (b"a: 1\nb: \xe4\n", "UTF-8", 2),
        (b"#" * 11_000_000, "10,000,000 bytes", None),
    ],
)
def test_files_that_are_no_text(tmp_path, content, wanted, line):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(YamlProblem, match=wanted) as caught:
        yaml_text.read(tmp_path / "a.yaml")
    assert caught.value.line == line


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.yaml").write_bytes("\ufeffa: ä\n".encode())
    assert yaml_text.read(tmp_path / "a.yaml") == {"a": "ä"}


def test_words_read_as_they_look():
    text = (
        "{a: 3, b: -2.5, c: 1e-4, d: .inf, e: true, f: no, g: 2024-13-45, h: '010', i: , j: ~, k: a:b, l: 09.5, m: .5}"
    )
    wanted = [3, -2.5, 1e-4, math.inf, True, False, "2024-13-45", "010", None, None, "a:b", 9.5, 0.5]
    assert parse(text) == dict(zip("abcdefghijklm", wanted, strict=True))
    assert parse("<<: {a: 1}\non: 2") == {"<<": {"a": 1}, "on": 2}


@pytest.mark.parametrize(
    "word", ["no", "7e10", "123", "1.0", "2024-11-30", "010", "1:10", "1_000", "true", "2024_11_30"]
)
def test_text_stays_text_where_text_is_wanted(word):
    unread = parse(f"a: {word}", unread=True)["a"]
    assert read_as(str, unread) == word
    assert read_as(str | None, unread) == word
    assert read_as(Literal["no", "yes"], unread) == word
    assert read_as(list[str], [unread, "x"]) == [word, "x"]
    assert read_as(dict[str, str], {"k": unread}) == {"k": word}
    assert read_as(PromptsConfig, {"source": unread}) == {"source": word}
    assert read_as(PromptsConfig, unread) == word


@pytest.mark.parametrize("word", ["no", "No", "NO", "off", "Off", "false", "False"])
def test_every_word_for_no_is_no_where_no_is_a_choice(word):
    raw = parse(f"{{mixed_precision: {word}, output_dir: {word}}}", unread=True)
    assert read_as(TrainingConfig, raw) == {"mixed_precision": "no", "output_dir": word}


def test_numbers_are_numbers_where_numbers_are_wanted():
    raw = parse("{a: 1e3, b: 12, c: no, d: 010, e: .nan, f: ''}", unread=True)
    assert read_as(dict[str, float], raw | {"e": 1.5}) == {"a": 1e3, "b": 12, "c": False, "d": "010", "e": 1.5, "f": ""}
    assert read_as(tuple[float, float], parse("[1e-4, 2]", unread=True)) == [1e-4, 2]
    assert read_as(float, "1e-4") == 1e-4
    assert read_as(str, "1e-4") == "1e-4"
    assert read_as(int | None, parse("a:", unread=True)["a"]) is None


def test_rows_keep_words_and_plain_numbers():
    rows = parse("[no, 10:30, 1e5, 3, 2024-11-30, true, {prompt: x, n: 2, s: 1e5}]", unread=True)
    wanted = ["no", "10:30", "1e5", 3, "2024-11-30", True, {"prompt": "x", "n": 2, "s": "1e5"}]
    assert read_as(PromptsConfig, rows) == wanted
    with pytest.raises(ConfigError, match=r"010 can mean more than one number.* \(line 1\)"):
        read_as(Any, [{"answer": Unread("010", 1)}])


@pytest.mark.parametrize(
    "text", ["1e5", "010", "1:10", "no", "0o7", "1_0", "123", "", "~", "a: b", "- a", "# x", "é\n\ud800"]
)
def test_what_is_written_is_read_back(text):
    written = yaml_text.dump({"model": text, text: 1e-5})
    assert parse(written) == {"model": text, text: 1e-5}
    if "\ud800" not in text:
        assert yaml.safe_load(written) == {"model": text, text: 1e-5}
