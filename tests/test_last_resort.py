"""What the command line does about an error that nobody foresaw and about Ctrl-C."""

import re
import stat
from pathlib import Path

import pytest
import typer

import diffusion_align.report as reports


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.fixture
def fail(monkeypatch, call_cli, tmp_path):
    """``fail(error, *options)``: exit status, stdout, stderr of a command that raises ``error``."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def call(error, *arguments):
        def write_report(folder):
            raise error

        monkeypatch.setattr(reports, "write_report", write_report)
        return call_cli(*(arguments or ("report", "run")))

    return call


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("one\x1b[31m\ntwo"), "RuntimeError: one [31m"),
        (RecursionError(), "RecursionError: RecursionError"),
        (MemoryError("no room"), "MemoryError: no room"),
        (Unspeakable(), "Unspeakable"),
        (GeneratorExit(), "GeneratorExit: GeneratorExit"),
    ],
)
def test_it_is_one_sentence_and_the_traceback_is_in_a_file_of_ones_own(fail, tmp_path, error, sentence):
    status, out, err = fail(error)
    assert (status, out) == (1, "")
    found = re.fullmatch(r"error: unexpected (.*); the traceback is in (\S+) \(--debug prints it\)\n", err)
    assert found
    assert found[1] == sentence
    file = Path(found[2])
    assert file.parent == tmp_path
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert text.startswith("Traceback (most recent call last):")
    assert "in write_report" in text


def test_how_to_resume_is_said_here_too(fail):
    error = RuntimeError("no device")
    error.add_note("For debugging consider CUDA_LAUNCH_BLOCKING=1\nand more")
    error.add_note("go on with resume=true output_dir=run")
    _, _, err = fail(error)
    assert err.endswith("(--debug prints it); go on with resume=true output_dir=run\n")
    assert "CUDA_LAUNCH" not in err


@pytest.mark.parametrize("arguments", [("--debug", "report", "run"), ("report", "--debug", "run")])
def test_debug_prints_the_traceback_and_writes_no_file(fail, tmp_path, arguments):
    status, _, err = fail(KeyError("x"), *arguments)
    assert status == 1
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("error: unexpected KeyError: 'x'; the traceback is above\n")
    assert list(tmp_path.iterdir()) == []
    status, _, err = fail(ValueError("the folder holds no run"), *arguments)  # an error that a user can act on
    assert status == 2
    assert "Traceback" in err
    assert err.endswith("error: the folder holds no run\n")


def test_debug_as_a_value_stays_one(call_cli):
    status, _, err = call_cli("report", "--", "--debug")
    assert status == 2
    assert "Traceback" not in err


def test_where_no_file_can_be_written_the_traceback_is_printed(fail, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    status, _, err = fail(KeyError("x"))
    assert status == 1
    assert err.startswith("Traceback")
    assert err.endswith("; the traceback is above\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_an_interruption_is_130(fail, error):
    assert fail(error) == (130, "", "stopped\n")


def test_help_and_a_wrong_command_line_keep_their_status(call_cli):
    assert call_cli("--help")[0] == 0
    assert "--debug" in call_cli("--help")[1]
    assert call_cli()[0] == 2
    assert call_cli("no-such-command")[0] == 2
