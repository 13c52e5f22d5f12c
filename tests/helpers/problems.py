"""Refusals, asserted by the setting's name and the kind of problem instead of by whole sentences."""

import re


def problems(error):
    """The sentences of a UserError, of ``pytest.raises``' record of one, of a list, or of what a command wrote."""
    if isinstance(error, list):
        return error
    error = getattr(error, "value", error)
    if isinstance(error, str):
        lines = [line.removeprefix("error: ") for line in error.splitlines()]
        return [line for line in lines if not line.startswith("resume with: ")]
    return list(getattr(error, "problems", [str(error)]))


def problem(setting, kind=""):
    """A pattern, for ``match=``: the sentence begins with ``setting``, whole and dotted, and says ``kind`` later."""
    return rf"^{re.escape(setting)}(?!\w|\.\w).*{re.escape(kind)}"


def assert_problems(error, *expected):
    """``error`` holds a sentence for each (setting, kind) of ``expected``, and no others."""
    found, missing = list(problems(error)), []
    for setting, kind in expected:
        fitting = [sentence for sentence in found if re.search(problem(setting, kind), sentence, re.IGNORECASE)]
        missing += [] if fitting else [(setting, kind)]
        for sentence in fitting[:1]:
            found.remove(sentence)  # once: a sentence that is said twice is one too many
    assert (missing, found) == ([], []), f"not said: {missing}; said and not expected: {found}"


def assert_problem(error, setting, kind):
    """``error`` is one sentence, which begins with ``setting`` and says ``kind``."""
    assert_problems(error, (setting, kind))


def assert_one_sentence(text):
    """Of a line, without a full stop or anything that only Python says."""
    assert 0 < len(text.strip()) == len(text) < 1000, text[:1200]  # the longest lists every setting
    assert text.isprintable(), text
    assert not text.endswith("."), text
    assert not re.search(r"Traceback|pydantic|<class|<function|object at 0x", text), "a repr is not a sentence"
