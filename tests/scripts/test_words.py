"""scripts/words.py: nothing retired is left, and each kind of word is found where it is and not where it is not."""

import pytest
import words


def test_no_retired_word_is_left():
    assert list(words.left(words.places())) == []


@pytest.mark.parametrize(
    "line",
    [
        "the pictures of an epoch",
        "one decision per step",
        "a gold reward",
        "a data set",
        "load it from the hub",
        "line 3: mend it",
        "go on with the run",
        "it is written aside",
        "the field's default",
        "0.02 nats a step",
        "one thread a run",
        "one step a sample",
        "256 pairs a file",
        "it was said above",
        "the setting has to be given",
    ],
)
def test_a_retired_word_is_found(line):
    assert len(list(words.left(iter([("docs/page.md", 3, line)])))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "`gold` rises",
        "on the Hub",
        "the least a step needs",
        "load a batch a second time",
        "what a run leaves",
        "emend",
    ],
)
def test_other_words_are_not(line):
    assert list(words.left(iter([("docs/page.md", 3, line)]))) == []


def test_what_is_allowed_is_there():
    """An exception that nothing needs any more goes."""
    found = [(name, line) for name, _, line in words.places()]
    for one in words.ALLOWED:
        assert any(
            words.fnmatch.fnmatch(name, one.files) and words.re.search(one.pattern, line) for name, line in found
        )
