"""Printing to nobody, to a full disk, or what an encoding lacks: the command goes on to its end."""

import io
import os
import sys

import pytest

from diffusion_align.streams import LastingStreams


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
    os.close(read)
    streams = LastingStreams()
    for _ in range(3):
        print("a line", flush=True)
    sys.stdout.writelines(["x" * 100_000])
    from rich.console import Console

    Console().print("on")
    assert streams.close() is None
    assert sys.stdout is stream


def test_a_reader_that_goes_after_one_line(as_stdout):
    read, write = os.pipe()
    as_stdout(write)
    streams = LastingStreams()
    print("first", flush=True)
    assert os.read(read, 100) == b"first\n"
    os.close(read)
    print("second", flush=True)
    print("third")
    assert streams.close() is None


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
    from diffusion_align.cli import main

    monkeypatch.setattr(sys, "argv", ["diffusion-align", "list", "models"])
    read, write = os.pipe()
    os.close(read)
    as_stdout(write)
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, capfd.readouterr().err) == (0, "")
    as_stdout(os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(SystemExit) as stop:
        main()
    said = "error: what was printed was cut off (No space left on device): make room where it goes\n"
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
