"""Golden files: what fails, what is rewritten and what is left alone; and how a refusal is asserted."""

import re

import pytest

from diffusion_align.errors import ConfigError
from tests.helpers.golden import FOLDER, Golden, read, write
from tests.helpers.problems import assert_problem, assert_problems, problem

NO_PATH = re.compile("(?!)")
CASES = {"a=1": "a=1 is not allowed\nb: see a", "c: []": "indented\n\n  lines"}


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "some.txt", CASES)
    return tmp_path / "some.txt"


def test_a_file_is_read_as_written_and_is_readable(path):
    assert read(path) == CASES
    assert path.read_text() == "a=1\n    a=1 is not allowed\n    b: see a\n\nc: []\n    indented\n\n      lines\n"


def test_another_text_a_new_case_and_a_stale_one_fail(path):
    golden = Golden(path, NO_PATH, {}, update=False)
    golden("a=1", ["a=1 is not allowed", "b: see a"])
    for case, text in {"a=1": "a=1 is allowed", "new": "text"}.items():
        with pytest.raises((pytest.fail.Exception, AssertionError)):
            golden(case, text)
    golden.finish(whole=False)
    with pytest.raises(pytest.fail.Exception, match=r"no test asks for: \['c: \[\]'\]"):
        golden.finish(whole=True)


@pytest.mark.parametrize("whole", [True, False])
def test_an_update_keeps_what_did_not_run(path, whole):
    golden = Golden(path, re.compile(r"/tmp/\w+"), {}, update=True)
    golden("a=1\0", "in /tmp/x7/run with 1.2.3", version="1.2.3")
    golden.finish(whole=whole)
    assert read(path) == {"a=1\\x00": "in <tmp>/run with <version>"} | ({} if whole else CASES)


def test_there_are_few_golden_files_and_each_has_its_tests():
    names = {file.stem.removeprefix("test_") for file in FOLDER.parent.rglob("test_*.py")}
    found = {file.stem for file in FOLDER.glob("*.txt")}
    assert found <= names
    assert len(found) <= 20


def test_a_problem_begins_with_the_whole_name_of_its_setting():
    error = ConfigError(["lora.rank=0 is not allowed: it must be 1 or more", "reward is empty: give one"])
    assert_problems(error, ("reward", "empty"), ("lora.rank", "1 or more"))
    for wrong in [("lora", "1 or more"), ("lora.rank", "2 or more"), ("rank", "1 or more")]:
        with pytest.raises(AssertionError, match="not said"):
            assert_problems(error, wrong, ("reward", "empty"))
    with pytest.raises(AssertionError, match="not expected"):
        assert_problem(error, "reward", "empty")
    with pytest.raises(AssertionError, match="not expected"):
        assert_problem(ConfigError(["reward is empty: give one"] * 2), "reward", "empty")
    assert re.search(problem("reward", "give"), "reward: give one. Or two")
