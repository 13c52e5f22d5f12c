"""How a command was started is found out, and what is printed starts it once more."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_align import invocation
from diffusion_align.invocation import CommandLine, PythonCall, command_line, shown_path

ALIASES = {"num_train_epochs": "epochs"}


def test_settings_replace_those_that_were_typed_and_all_is_quoted_for_the_shell():
    words = ("train", "my recipe.yaml", "num_train_epochs=3", "prompts=[it's, a]", "resume=false")
    line = CommandLine(("diffusion-align",), words, ALIASES).again(resume=True, epochs=6, accept_changed=["a", "b"])
    assert shlex.split(line) == [
        *("diffusion-align", "train", "my recipe.yaml", "prompts=[it's, a]"),
        *("resume=true", "epochs=6", "accept_changed=[a, b]"),
    ]
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert echoed.stdout.splitlines() == shlex.split(line)


def test_a_command_with_options_is_given_them():
    words = ("pairs", "emoji-sd", "-o", "x=y", "--resume")
    assert (
        CommandLine(("diffusion-align",), words).again(resume=True) == "diffusion-align pairs emoji-sd -o x=y --resume"
    )


def test_options_are_given_before_two_dashes():
    line = CommandLine(("diffusion-align",), ("pairs", "-o", "x", "--", "-model")).again(resume=True)
    assert line == "diffusion-align pairs -o x --resume -- -model"


def test_a_call_in_python_is_a_line_of_it():
    call = PythonCall("align({})", {"output_dir": Path("it's")})
    assert call.again(resume=True) == """align(..., output_dir="it's", resume=True)"""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """``start(words, *parents)``: the program of a process with this command line and these parents, the nearest first;
    ``bin`` is on the PATH, with ``diffusion-align``, ``accelerate`` and ``python`` in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("bin", "other"):
        (tmp_path / name).mkdir()
        for program in ("diffusion-align", "accelerate", "python"):
            (tmp_path / name / program).write_text("#!/bin/sh\n")
            (tmp_path / name / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def program(words, *parents):
        words = shlex.split(words.replace("BIN", str(tmp_path / "bin")).replace("OTHER", str(tmp_path / "other")))
        monkeypatch.setattr(sys, "orig_argv", words)
        monkeypatch.setattr(sys, "argv", [words[0], *words[words.index("train") :]])
        lines = [shlex.split(line.replace("BIN", str(tmp_path / "bin"))) for line in parents]
        monkeypatch.setattr(invocation, "_parents", lambda: lines)
        line = command_line()
        assert line.arguments == ("train", "x", "a=1")
        return shlex.join(line.program)

    return program


@pytest.mark.parametrize(
    ("words", "parents", "program"),
    [
        ("BIN/python BIN/diffusion-align", ["bash"], "diffusion-align"),
        ("OTHER/python OTHER/diffusion-align", ["bash"], "other/diffusion-align"),  # which the PATH does not lead to
        ("python -m diffusion_align", ["bash"], "python -m diffusion_align"),
        ("other/python -X dev -m diffusion_align", ["bash"], "other/python -X dev -m diffusion_align"),
        (
            "BIN/python -u -m diffusion_align",
            ["BIN/python BIN/accelerate launch --num_processes 2 -m diffusion_align train x a=1", "bash"],
            "accelerate launch --num_processes 2 -m diffusion_align",
        ),
        (
            "BIN/python BIN/diffusion-align",
            ["uv run diffusion-align train x a=1", "mpirun uv run diffusion-align train x a=1", "bash train x a=1 b"],
            "mpirun uv run diffusion-align",
        ),
        ("BIN/python BIN/diffusion-align", ["bash -c 'diffusion-align train x a=1'"], "diffusion-align"),
    ],
)
def test_the_program_is_called_as_it_was(start, words, parents, program):
    assert start(f"{words} train x a=1", *parents) == program


def test_arguments_that_python_was_given_itself_are_the_commands_own(monkeypatch):
    """As under a server that forks, or a test."""
    monkeypatch.setattr(sys, "argv", ["anything", "train", "x"])
    assert command_line() == CommandLine(("diffusion-align",), ("train", "x"))


def test_the_processes_above_this_one_are_known():
    code = "import sys; sys.argv = ['', 'a', 'b']; from diffusion_align.invocation import command_line\n"
    code += "print(command_line().program)"
    python = [sys.executable, "-c", code, "a", "b"]
    alone = subprocess.run(python, capture_output=True, text=True, check=True).stdout
    assert "-c" in alone
    below = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    launched = subprocess.run([sys.executable, "-c", below, *python], capture_output=True, text=True, check=True).stdout
    assert "import subprocess" in launched


def test_paths_are_shown_from_the_current_folder(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert shown_path(tmp_path / "here" / "runs" / "a") == os.path.join("runs", "a")
    assert shown_path(tmp_path / "there") == str(tmp_path / "there")
