"""What reaches a terminal: text that steers nothing, on streams that may end; unforeseen errors; Ctrl-C."""

import io
import os
import re
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import diffusion_align.report as reports
from diffusion_align import cli, inputs
from diffusion_align.cli import options
from diffusion_align.errors import UserError
from diffusion_align.pipelines import TextAlignmentPipeline
from diffusion_align.streams import LastingStreams, printable


@pytest.fixture
def as_stdout(monkeypatch):
    """A function: a descriptor becomes ``sys.stdout``, block-buffered as a pipe's is."""
    opened = []

    def set_it(descriptor, encoding="utf-8", errors="strict"):
        stream = os.fdopen(descriptor, "w", encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, "stdout", stream)
        opened.append(stream)
        return stream

    yield set_it
    for stream in opened:
        stream.close()  # which flushes, and raises if what it holds cannot go anywhere


def test_a_reader_that_has_gone(as_stdout):
    read, write = os.pipe()
    stream = as_stdout(write)
    streams = LastingStreams()
    print("first", flush=True)
    assert os.read(read, 100) == b"first\n"
    os.close(read)
    for _ in range(3):
        print("a line", flush=True)
    print("not flushed")
    sys.stdout.writelines(["x" * 100_000])
    from rich.console import Console

    Console().print("on")
    assert streams.close() is None
    assert sys.stdout is stream


def test_a_full_disk_is_told_at_the_end(as_stdout):
    as_stdout(os.open("/dev/full", os.O_WRONLY))
    streams = LastingStreams()
    print("a line", flush=True)
    print("another")
    assert streams.close() == "No space left on device"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_ascii_shows_what_it_lacks_by_its_number(as_stdout, errors):
    read, write = os.pipe()
    as_stdout(write, "ascii", errors)
    streams = LastingStreams()
    print("a lion ä 🦁 \udcff")
    assert streams.close() is None
    assert os.read(read, 100) == b"a lion \\xe4 \\U0001f981 \\udcff\n"
    os.close(read)


def test_streams_that_are_not_there_or_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    streams = LastingStreams()
    print("a line")
    print("another", file=sys.stderr)
    assert streams.close() is None
    assert (sys.stdout, sys.stderr) == (None, closed)


def test_descriptors_that_are_closed_are_not_given_to_files(tmp_path):
    """In a process of its own: the first file that is opened must not become standard output."""
    pid = os.fork()
    if pid == 0:
        try:
            os.close(1)
            streams = LastingStreams()
            number = os.open(tmp_path / "a", os.O_CREAT | os.O_WRONLY)
            os.write(1, b"for nobody")
            streams.close()
        finally:
            os._exit(number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) > 2
    assert (tmp_path / "a").read_bytes() == b""


def test_commands_end_quietly_and_say_what_was_lost(monkeypatch, as_stdout, capfd):
    monkeypatch.setattr(sys, "argv", ["diffusion-align", "list", "models"])
    read, write = os.pipe()
    os.close(read)
    as_stdout(write)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code, capfd.readouterr().err) == (0, "")
    as_stdout(os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = "error: the output could not be printed in full (No space left on device): make room where it is written\n"
    assert (stop.value.code, capfd.readouterr().err) == (2, said)


@pytest.mark.parametrize("code", [0, None, 3])
def test_code_that_exits_is_no_success(call_cli, monkeypatch, code):
    from diffusion_align.cli import listing

    def leave():
        sys.exit(code)

    monkeypatch.setitem(listing.LISTINGS, "models", leave)
    status, _, err = call_cli("list", "models")
    assert status == 2
    assert err == (f"error: sys.exit({code}) was called by code outside this package: let it raise an error instead\n")


STEERS = "\x1b]0;owned\x07\x1b[2J\u202ea\x9b\r\x08b"


def test_printable():
    assert printable(STEERS) == " ]0;owned  [2J a   b"
    assert printable("é 猫 🍎\n\tx", keep="\n\t") == "é 猫 🍎\n\tx"


def test_whoever_may_not_write_to_dev_may_write_to_stdout(monkeypatch):
    def denied(dir, prefix):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inputs.tempfile, "TemporaryFile", denied)
    options.check_output_file(Path("/dev/stdout"))
    with pytest.raises(UserError, match="--output: the folder /dev cannot be used: it is not writable: Permission"):
        options.check_output_file(Path("/dev/no-stream"))


def test_completions_and_prompts(monkeypatch, call_cli):
    def written(texts, **options):
        return SimpleNamespace(texts=[f"{STEERS}\n\tend" for _ in texts])

    monkeypatch.setattr(TextAlignmentPipeline, "from_pretrained", lambda *_: written)
    status, out, _ = call_cli("complete", "tiny-lm", "-p", f"a {STEERS}")
    assert (status, out) == (0, f"a {printable(STEERS)}{printable(STEERS)}\n        end\n")  # rich widens tabs


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "jpeg_compressibility", f"{STEERS}.png"],
        ["train", STEERS],
        ["train", "grpo_tiny", f"{STEERS}=1"],
        ["list", STEERS],
        ["report", STEERS],
        [STEERS],
    ],
)
def test_sentences_about_bad_input(monkeypatch, call_cli, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    status, out, err = call_cli(*arguments)
    assert status == 2
    assert "error: " in err
    assert all(c.isprintable() or c == "\n" for c in out + err)


def test_a_place_that_no_shell_has_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.to_path("~/a") == tmp_path / "a"
    assert options.to_path("a~/b") == Path("a~/b")


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


def test_how_to_resume_is_said_after_such_an_error_too(fail):
    error = RuntimeError("no device")
    error.add_note("For debugging consider CUDA_LAUNCH_BLOCKING=1\nand more")
    error.add_note("resume with: diffusion-align train quickstart resume=true")
    _, _, err = fail(error)
    assert err.endswith("(--debug prints it)\nresume with: diffusion-align train quickstart resume=true\n")
    assert "CUDA_LAUNCH" not in err


def test_what_was_noted_about_an_error_is_in_its_sentence(fail):
    error = UserError("grid.png cannot be written")
    error.add_note("B wins 3 of 4")
    error.add_note("resume with: diffusion-align pairs --resume")
    said = "error: grid.png cannot be written; B wins 3 of 4\nresume with: diffusion-align pairs --resume\n"
    assert fail(error) == (2, "", said)


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
