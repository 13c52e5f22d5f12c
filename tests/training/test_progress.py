"""What a run shows of its progress: bars on a terminal, elsewhere a line per epoch, by the main process."""

import contextlib
import io
import math
import os
import re
import sys
import threading

import pytest
from rich.console import Console

from diffusion_align.training import progress
from diffusion_align.training.lines import clock, duration, epoch_line, start_lines
from diffusion_align.training.progress import Bars, can_draw
from tests.helpers.toy import Toy

ROW = {"epoch": 3, "reward": 0.0812, "reward_stderr": 0.2391, "kl_path": 0.4, "time/epoch": 11.2}


def test_an_epoch_is_a_line():
    line = epoch_line(ROW, epochs=16, headline="reward", left=140.4)
    assert line == "epoch 3/16  reward 0.08 ± 0.24  KL 0.4 nats  11 s  left 2:20"


@pytest.mark.parametrize(
    ("row", "headline", "line"),
    [
        ({"epoch": 16, "time/epoch": 0.123}, "reward", "epoch 16/16  0.12 s"),
        ({"reward": -0.5, "reward_stderr": math.nan, "kl_path": None}, "reward", "epoch 3/16  reward -0.5"),
        (
            {"reward": 1, "gold": 0.25, "gold_stderr": 0.031},
            "reward",
            "epoch 3/16  reward 1  held-out reward 0.250 ± 0.031",
        ),
        ({"rewards/accuracies": 0.75}, "rewards/accuracies", "epoch 3/16  implicit accuracy 0.75"),
        ({"accuracy": 0.75, "eval/accuracy": 0.5}, "accuracy", "epoch 3/16  accuracy 0.75  held-out accuracy 0.5"),
        ({"mine": 2.5}, "mine", "epoch 3/16  mine 2.5"),
        ({"gold": 2.5}, "gold", "epoch 3/16  held-out reward 2.5"),
    ],
)
def test_values_that_are_missing_are_left_out(row, headline, line):
    given = {"epoch": 3, "time/epoch": 7200} | row
    rest = "" if "time/epoch" in row else "  2:00:00  left 1:01:01"
    assert epoch_line(given, epochs=16, headline=headline, left=3661) == line + rest


def test_times():
    assert [duration(s) for s in (0.0312, 2.04, 9.9, 9.97, 119.4, 120, 4000)] == [
        *("0.031 s", "2 s", "9.9 s", "10 s", "119 s", "2:00", "1:06:40"),
    ]
    assert [clock(s) for s in (0, 59.6, 140, 3599.6, 100_000)] == ["0:00", "1:00", "2:20", "1:00:00", "27:46:40"]


def test_a_run_says_what_it_does_where_it_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Toy(tmp_path / "runs" / "a", epochs=9).config
    assert start_lines(config, done=0, device="cpu", processes=1) == (
        "training toy with tests.helpers.toy:Toy: 9 epochs, cpu, mixed_precision=no",
        "report: runs/a/report.html",
    )
    elsewhere = config.model_copy(update={"model": str(tmp_path / "base"), "method": "ddpo"})
    said = start_lines(elsewhere, done=4, device="cuda", processes=2)[0]
    assert said == "training base with ddpo: epochs 5 to 9, 2 processes on cuda, mixed_precision=no"
    said = start_lines(config, done=9, device="cpu", processes=1)[0]
    assert said.endswith(": 9 epochs, all finished before, cpu, mixed_precision=no")


def lines_of(text):
    """The numbers of the epochs that have a line."""
    return [int(number) for number in re.findall(r"^epoch (\d+)/", text, flags=re.MULTILINE)]


def test_off_a_terminal_an_epoch_prints_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    Toy(tmp_path / "run", epochs=4).train()
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == [
        "training toy with tests.helpers.toy:Toy: 4 epochs, cpu, mixed_precision=no",
        f"report: {tmp_path}/run/report.html",
    ]
    assert lines_of(out) == [1, 2, 3, 4]
    assert len(out.splitlines()) == 6
    assert ("left" in out.splitlines()[4], "left" in out.splitlines()[5]) == (True, False)
    assert "\x1b" not in out
    assert err == ""
    Toy(tmp_path / "run", epochs=6, resume=True).train()
    out = capsys.readouterr().out
    assert "epochs 5 to 6" in out
    assert lines_of(out) == [5, 6]


def test_short_epochs_print_a_line_per_second_and_the_first_and_the_last(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) / 4)  # read once or twice per epoch
    bars = Bars()
    for epoch in range(1, 12):
        bars.print_epoch(f"epoch {epoch}/11", always=epoch in (1, 11))
    assert lines_of(capsys.readouterr().out) == [1, 5, 9, 11]


def test_a_run_prints_its_first_and_its_last_epoch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", math.inf)
    Toy(tmp_path / "run", epochs=4).train()
    assert lines_of(capsys.readouterr().out) == [1, 4]


def test_a_line_is_there_when_its_epoch_is_done(tmp_path, monkeypatch):
    """Not when a buffer is full."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        seen = []

        class Looks(Toy):
            def collect(self):
                seen.append(os.read(read, 10_000).decode())
                return super().collect()

        Looks(tmp_path / "run", epochs=2).train()
        monkeypatch.undo()
    os.close(read)
    assert [lines_of(text) for text in seen] == [[], [1]]


def test_nobody_reads_them(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        Toy(tmp_path / "run").train()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)
        monkeypatch.undo()
    assert (tmp_path / "run" / "final").is_dir()


def test_disabled_nothing_is_shown(capsys):
    bars = Bars(disable=True)
    bars.print_start("a")
    bars.print_epoch("b", always=True)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """``shown(TERM="dumb")``: what a terminal is written by a run of three epochs."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def run(**environment):
        for name, value in ({"TERM": "xterm-256color"} | environment).items():
            monkeypatch.setenv(name, value)
        ours, theirs = os.openpty()
        written = []

        def read():  # a terminal that nobody reads lets nobody write
            with contextlib.suppress(OSError):
                while part := os.read(ours, 1 << 16):
                    written.append(part)

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(theirs, "w") as stream, contextlib.redirect_stdout(stream):
            Toy(tmp_path / "run").train()
        reader.join()
        os.close(ours)
        return b"".join(written).decode()

    return run


HIDDEN_CURSOR = "\x1b[?25l"


def test_on_a_terminal_bars_are_drawn(shown):
    text = shown()
    assert "\x1b[2Ktraining toy with " in text
    assert HIDDEN_CURSOR in text
    assert "\x1b[32m3/3" in text
    assert lines_of(text) == []


def test_without_colour(shown):
    text = shown(NO_COLOR="1")
    assert HIDDEN_CURSOR in text
    assert not re.search("\x1b\\[[0-9;]*3[0-9]m", text)


@pytest.mark.parametrize("changes", [{"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(shown, monkeypatch, changes):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    text = shown(**changes)
    assert lines_of(text) == [1, 2, 3]
    assert "\x1b" not in text


def test_colour_that_is_forced_makes_no_terminal_of_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not can_draw(Console(file=io.StringIO()))
    closed = io.StringIO()
    closed.close()
    assert not can_draw(Console(file=closed))
