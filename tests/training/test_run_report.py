"""What the report of a run says while it runs and after whatever ended it; on a toy."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffusion_align import writing
from diffusion_align.errors import Interrupted, UserError
from diffusion_align.folder_lock import LOCK_FILE, FolderLock
from diffusion_align.invocation import RESUME_WITH
from diffusion_align.report import write_report
from diffusion_align.report.notebook import RunReport
from diffusion_align.report.status import STATUS_FILE
from diffusion_align.rewards import RewardError
from diffusion_align.training.callbacks import Callback, Report
from tests.helpers.html_page import Page
from tests.helpers.toy import Toy, brightness, resumed_with

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _written_after_every_epoch(monkeypatch):
    monkeypatch.setattr(Report, "share", 1e9)


def text_of(folder):
    """What the page shows, its white space as one blank."""
    return " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).text.split())


def resume_command(trainer):
    return trainer.run_folder.how_to_resume().removeprefix(RESUME_WITH)


def in_epoch(number, act):
    """A reward that does ``act`` the first time that it is called in epoch ``number``, counted from 1."""
    calls = []

    def reward(images):
        calls.append(1)
        if len(calls) == 2 * number - 1:
            act()
        return brightness(images)

    return reward


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_report_that_says_so_and_how_to_resume(tmp_path, number, monkeypatch):
    folder = tmp_path / "run & run"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests themselves run under nohup
    trainer = Toy(folder, in_epoch(3, lambda: os.kill(os.getpid(), number)), epochs=9)
    try:
        with pytest.raises(Interrupted) as caught:
            trainer.train()
    finally:
        signal.signal(signal.SIGHUP, before)
    shown = text_of(folder)
    assert trainer.epoch in (2, 3), "a moment later it may be finished"
    assert f"Interrupted by {number.name} {trainer.epoch} of 9 epochs" in shown
    command = resume_command(trainer)
    assert f"stopped after epoch {trainer.epoch} of 9 Resume with {command}" in shown
    assert command in str(caught.value)
    assert "location.reload" not in shown, "it does not change any more"
    Toy(folder, resume=True, epochs=9).train()
    assert "Finished 9 of 9 epochs" in text_of(folder)
    assert "Resume with" not in text_of(folder).split("Configuration")[0]


def test_an_interrupt_while_the_first_previews_fail_says_how_to_resume(tmp_path, monkeypatch):
    def show(self, name):
        os.kill(os.getpid(), signal.SIGTERM)
        self.processes.raise_together(UserError("not finite"), UserError)

    closed = []
    monkeypatch.setattr(Toy, "show", show)
    monkeypatch.setattr(Toy, "_close", lambda self: closed.append(self))
    trainer = Toy(tmp_path / "run")
    with pytest.raises(Interrupted) as caught:
        trainer.train()
    assert str(caught.value) == f"stopped before epoch 1 ended\n{RESUME_WITH}{resume_command(trainer)}"
    assert "Interrupted by SIGTERM 0 of 3 epochs" in text_of(tmp_path / "run")
    assert f"Resume with {resume_command(trainer)}" in text_of(tmp_path / "run")
    assert closed == [trainer]


def test_a_reward_that_fails_in_epoch_3_leaves_a_report_that_says_so(tmp_path):
    def fail():
        raise ValueError("no <b>room</b>")

    trainer = Toy(tmp_path / "run", in_epoch(3, fail), epochs=9)
    with pytest.raises(RewardError, match="no <b>room</b>") as caught:
        trainer.train()
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    shown = text_of(tmp_path / "run")
    assert "Failed 2 of 9 epochs" in shown
    assert " ".join(str(caught.value).split()) in shown
    assert f"Resume with {resume_command(trainer)}" in shown


@pytest.mark.parametrize("method", ["collect", "estimate"])
def test_a_gpu_without_memory_says_what_to_lower_and_how_to_resume(tmp_path, monkeypatch, method):
    """While it samples, where a checkpoint is written, and afterwards."""

    def fail(self, *given):
        if self.epoch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *given)

    original = getattr(Toy, method)
    monkeypatch.setattr(Toy, method, fail)
    trainer = Toy(tmp_path / "run", checkpoint_every=1)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    notes = sorted(caught.value.__notes__)
    assert notes[0] == "lower micro_batch_size or sample_batch_size, or set gradient_checkpointing=true"
    assert [note.partition(RESUME_WITH)[2] for note in notes[1:]] == [resume_command(trainer)]
    assert "Failed 2 of 3 epochs" in text_of(tmp_path / "run")
    assert f"Resume with {resume_command(trainer)}" in text_of(tmp_path / "run")


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_else_ends_a_run_is_in_its_report(tmp_path, monkeypatch, error):
    def estimate(self, collected):
        if self.epoch == 1:
            raise error
        return original(self, collected)

    original = Toy.estimate
    monkeypatch.setattr(Toy, "estimate", estimate)
    with pytest.raises(type(error)) as caught:
        Toy(tmp_path / "run").train()
    notes = getattr(caught.value, "__notes__", [])
    assert notes == ([resumed_with(tmp_path / "run")] if isinstance(error, KeyboardInterrupt) else [])
    shown = text_of(tmp_path / "run")
    assert ("Interrupted" if isinstance(error, KeyboardInterrupt) else "Failed") in shown
    assert type(error).__name__ in shown


def test_a_rule_that_ends_a_run_early_is_in_its_report(tmp_path):
    class Enough(Callback):
        def on_epoch_end(self, trainer, row):
            return "it is enough" if trainer.epoch == 2 else None

    Toy(tmp_path / "run", epochs=9, callbacks=[Enough()]).train()
    shown = text_of(tmp_path / "run")
    assert "Stopped early 2 of 9 epochs" in shown
    assert shown.count("it is enough") == 1


def test_a_run_that_leaves_no_folder_leaves_no_report(tmp_path):
    def fail():
        raise ValueError

    with pytest.raises(RewardError):
        Toy(tmp_path / "run", in_epoch(1, fail)).train()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_may_not_begin_leaves_the_report_of_the_one_before(tmp_path):
    Toy(tmp_path / "run").train()
    before = (tmp_path / "run" / "report.html").read_bytes()
    with pytest.raises(UserError):
        Toy(tmp_path / "run", resume=True, samples_per_epoch=8).train()
    assert (tmp_path / "run" / "report.html").read_bytes() == before


def test_while_it_runs_the_page_says_so_and_loads_itself_again(tmp_path):
    pages = []

    class Look(Callback):
        def on_update(self, trainer, row):
            pages.append((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))

    Toy(tmp_path / "run", callbacks=[Look()]).train()
    assert [f"epoch {n} of 3" in " ".join(Page(pages[2 * n - 1]).text.split()) for n in (1, 2, 3)] == [True] * 3
    assert all("location.reload" in page and "Running" in page for page in pages)
    assert "<script" not in (tmp_path / "run" / "report.html").read_text()


KILLED = """
import os, signal, sys
from diffusion_align.training.callbacks import Report
from tests.helpers.toy import Toy, brightness
Report.share = 0.0
calls = []
def reward(images):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return brightness(images)
Toy(sys.argv[1], reward).train()
"""


def test_a_killed_run_is_told_from_one_that_lives(tmp_path):
    folder = tmp_path / "run"
    subprocess.run([sys.executable, "-c", KILLED, folder], cwd=ROOT, timeout=120, capture_output=True, check=False)
    assert "Running epoch 1 of 3" in text_of(folder), "written at its start, as there was no time for more"
    with FolderLock(folder):  # a process that holds it
        write_report(folder)
        assert "Running epoch 3 of 3" in text_of(folder), "the epochs are those of the metrics"
    (folder / LOCK_FILE).touch()  # as a killed one leaves it
    assert "Ended without notice" in " ".join(Page(RunReport(folder).path.read_text()).text.split())
    shown = text_of(folder)
    assert "2 of 3 epochs" in shown
    assert "was killed" in shown
    assert f"Resume with {resume_command(Toy(folder))}" in shown
    assert "location.reload" not in (folder / "report.html").read_text()


def test_without_locks_a_run_is_not_taken_for_dead(tmp_path):
    (tmp_path / "config.yaml").write_text("method: ddpo\nepochs: 3\n")
    (tmp_path / STATUS_FILE).write_text(json.dumps({"state": "running", "at": time.time() - 3600, "locked": False}))
    write_report(tmp_path)
    assert "Running" in text_of(tmp_path)


@pytest.mark.parametrize("damaged", ["", "[1]", '{"state": ', '{"epoch": 3}', '{"state": "running", "at": "x"}'])
def test_a_damaged_status_is_as_none(tmp_path, damaged):
    (tmp_path / "config.yaml").write_text("method: ddpo\nepochs: 3\n")
    (tmp_path / STATUS_FILE).write_text(damaged)
    write_report(tmp_path)
    assert "Not finished there is no final/ folder" in text_of(tmp_path)


def test_a_report_that_cannot_be_written_is_one_warning_and_ends_nothing(tmp_path, monkeypatch, capsys):
    replace = os.replace

    def no_room(source, target):
        if Path(target).name in ("report.html", STATUS_FILE):
            raise OSError(28, os.strerror(28))
        replace(source, target)

    monkeypatch.setattr(writing.os, "replace", no_room)
    Toy(tmp_path / "run").train()
    assert (tmp_path / "run" / "final").is_dir()
    warning = (
        f"warning: {tmp_path}/run/{STATUS_FILE} cannot be written (No space left on device): make room on that disk"
    )
    assert capsys.readouterr().err == f"{warning}; the run continues without its report\n"


def test_writing_keeps_to_its_share_of_the_time(tmp_path, monkeypatch):
    """Each takes 1 s and each epoch 10 s: with a tenth of the time, one in the first 20 s and then one per epoch."""
    clock, written = [0.0], []

    class Epoch(Callback):
        def on_epoch_end(self, trainer, row):
            clock[0] += 10

    def write(folder):
        clock[0] += 1
        written.append(trainer.epoch)

    monkeypatch.setattr(Report, "share", 0.1)
    monkeypatch.setattr("diffusion_align.report.write_report", write)
    monkeypatch.setattr("diffusion_align.training.callbacks.time.perf_counter", lambda: clock[0])
    trainer = Toy(tmp_path / "run", epochs=12, callbacks=[Epoch()])
    trainer.train()
    assert written[0] == 0
    assert written[-1] == 12
    assert len(written) == 12, "the start and the end, and what a tenth of 120 s allows"


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("diffusion_align.report.write_report", written.append)
    trainer = Toy(tmp_path / "run")
    monkeypatch.setattr(type(trainer.processes), "is_main", False)
    (tmp_path / "run").mkdir()
    report = Report()
    report._began = time.time()
    for call in (report.on_start, lambda t: report.on_epoch_end(t, {}), report.on_end):
        call(trainer)
    report.on_failure(trainer, KeyError("x"))
    assert written == []
    assert list((tmp_path / "run").iterdir()) == []
