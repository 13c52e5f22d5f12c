"""References to a user's own code, whatever they are for."""

import json
import os

import pytest

from diffusion_align.errors import RewardError, UserError
from diffusion_align.references import module_of, resolve


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


def test_a_new_version_of_a_file_is_run(file):
    first = module_of(f"{file}:Method", "method")
    file.write_text("class Method:\n    new = True\n")
    os.utime(file, ns=(1, 1))
    assert resolve(f"{file}:Method", "method").new
    assert not hasattr(first.Method, "new")


@pytest.mark.parametrize("reference", ["", "Method", ":Method", "mine:"])
def test_what_is_no_reference(reference):
    assert problem(reference, noun="Class") == (
        f"method '{reference}' must read 'package.module:Class' or 'path/to/file.py:Class'"
    )


def test_a_file_that_is_not_there(file):
    assert problem(f"{file.parent}/mime.py:Method") == (
        f"method file '{file.parent}/mime.py' does not exist: did you mean 'mine.py'?"
    )
    assert problem(f"{file.parent}/other.py:Method") == f"method file '{file.parent}/other.py' does not exist"


def test_a_folder_instead_of_a_file(tmp_path):
    (tmp_path / "folder.py").mkdir()
    assert problem(f"{tmp_path}/folder.py:Method").endswith(" is a folder: give a file")


def test_a_pipe_instead_of_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    assert problem(f"{tmp_path}/pipe.py:Method").endswith(" is a pipe: give a file")


def test_a_name_that_is_not_there(file):
    assert problem(f"{file}:Methos") == f"'{file}' has no 'Methos': did you mean 'Method'?"
    assert problem(f"{file}:nothing") == f"'{file}' has no 'nothing'"


def test_a_module_that_is_not_there_but_is_a_file_here(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert problem("mine:Method") == (
        "method 'mine:Method' cannot be imported (ModuleNotFoundError: No module named 'mine'); "
        "for a file in this folder write 'mine.py:Method'"
    )


@pytest.mark.parametrize("line", ["1 / 0", "import sys; sys.exit(0)", "def method(:"])
def test_code_that_raises(file, line):
    file.write_text(f"{line}\n")
    assert problem(f"{file}:Method").startswith(f"method '{file}:Method' cannot be imported (")
    assert problem(f"{file}:Method").endswith(")"), "not left half imported either"


def test_the_class_of_the_error(file):
    with pytest.raises(RewardError):
        resolve(f"{file}:nothing", "reward", error=RewardError)


def test_a_reward_error_is_a_users_error_and_a_value_error():
    assert issubclass(RewardError, UserError)
    assert issubclass(RewardError, ValueError)
