"""References to a user's own code, whatever they are for."""

import json
import os

import pytest

from diffusion_align.errors import RewardError, UserError
from diffusion_align.references import module_of, reference_to, resolve


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("RUNS = []\nclass Method:\n    pass\n")
    return path


def problem(reference, **settings):
    with pytest.raises(UserError) as caught:
        resolve(reference, "method", **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_object_is_itself():
    assert resolve(json.loads, "callback") is json.loads


def test_a_name_in_a_module_and_in_a_file(file, monkeypatch):
    assert resolve("json:loads", "callback") is json.loads
    found = resolve(f"{file}:Method", "method")
    monkeypatch.chdir(file.parent)
    assert resolve("mine.py:Method", "reward") is found, "a file is run once, whatever it is for"
    assert [reference_to(kind) for kind in (found, json.JSONDecoder)] == [f"{file}:Method", "json.decoder:JSONDecoder"]
    assert reference_to(type("Own", (), {"__module__": "run_by_exec"})) == "run_by_exec:Own"


def test_a_new_version_of_a_file_is_run(file):
    first = module_of(f"{file}:Method", "method")
    file.write_text("class Method:\n    new = True\n")
    os.utime(file, ns=(1, 1))
    assert resolve(f"{file}:Method", "method").new
    assert not hasattr(first.Method, "new")


FORM = "must read 'package.module:Class' or 'path/to/file.py:Class'"
SENTENCES = {
    "": f"method '' {FORM}",
    "Method": f"method 'Method' {FORM}",
    ":Method": f"method ':Method' {FORM}",
    "mine:": f"method 'mine:' {FORM}",
    "mime.py:Method": "method file 'mime.py' does not exist: did you mean 'mine.py'?",
    "zzz.py:Method": "method file 'zzz.py' does not exist",
    "folder.py:Method": "method file 'folder.py' is a folder: give a file",
    "pipe.py:Method": "method file 'pipe.py' is a pipe: give a file",
    "mine.py:Methos": "'mine.py' has no 'Methos': did you mean 'Method'?",
    "mine.py:nothing": "'mine.py' has no 'nothing'",
    "mine:Method": "method 'mine:Method' cannot be imported (ModuleNotFoundError: No module named 'mine'); "
    "for a file in this folder write 'mine.py:Method'",
}


@pytest.mark.parametrize("reference", SENTENCES)
def test_what_is_wrong_with_a_reference_is_one_sentence(reference, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    os.mkdir("folder.py")
    os.mkfifo("pipe.py")
    assert problem(reference, noun="Class") == SENTENCES[reference]


@pytest.mark.parametrize("line", ["1 / 0", "import sys; sys.exit(0)", "def method(:"])
def test_code_that_raises(file, line):
    file.write_text(f"{line}\n")
    assert problem(f"{file}:Method").startswith(f"method '{file}:Method' cannot be imported (")
    assert problem(f"{file}:Method").endswith(")"), "not left half imported either"


def test_the_class_of_the_error(file):
    with pytest.raises(RewardError):
        resolve(f"{file}:nothing", "reward", error=RewardError)
    assert issubclass(RewardError, UserError)
    assert issubclass(RewardError, ValueError)
