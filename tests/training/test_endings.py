"""How a run ends where something fails: a disk, a folder, a tracker, a reward that does not answer; on a toy."""

import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusion_align import interrupt, writing
from diffusion_align.errors import CheckpointError, Interrupted, TrainingError
from diffusion_align.rewards import RewardError
from diffusion_align.training import checkpoint, endings, savepoint
from diffusion_align.training import processes as training_processes
from diffusion_align.training.checkpoint import list_checkpoints, load_checkpoint
from diffusion_align.training.collection import BatchScores
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.reading import dump_config
from diffusion_align.training.resume import check_same_run
from diffusion_align.writing import WriteError, write_text
from tests.helpers.toy import Toy, brightness, resumed_with, score_of


@pytest.fixture(autouse=True)
def _short_report():
    with pytest.MonkeyPatch.context() as patch:
        report = "diffusion_align.report.write_report"
        patch.setattr(report, lambda folder: write_text(folder / "report.html", "done"))
        yield


def left_aside(folder):
    return [path for path in Path(folder).rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def notes(error):
    return getattr(error, "__notes__", [])


@pytest.fixture
def full_disk(monkeypatch):
    """A function: from now on, whatever has ``part`` in its path cannot be renamed into place or added to."""
    replace, append = os.replace, writing.append_line

    def fill(part):
        def no_room(source, target):
            if part in str(target):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        def no_row(path, line):
            with writing.writing(path):
                if part in str(path):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(path, line)

        monkeypatch.setattr(writing.os, "replace", no_room)
        monkeypatch.setattr("diffusion_align.training.callbacks.append_line", no_row)

    yield fill
    monkeypatch.undo()


WRITTEN = ["metrics.jsonl", "samples/epoch_0002", "checkpoints/step_00000004", "final"]


@pytest.mark.parametrize("part", WRITTEN)
def test_without_room_the_run_ends_in_a_sentence_and_its_checkpoint_stands(tmp_path, monkeypatch, full_disk, part):
    folder = tmp_path / "run"
    Toy(folder, epochs=1).train()
    full_disk(part)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        Toy(folder, resume=True, checkpoint_every=1).train()
    assert str(caught.value).startswith(f"{folder}/{part}")
    assert notes(caught.value) == [f"the last checkpoint stands; {resumed_with(folder)}"]
    assert left_aside(folder) == []
    load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    monkeypatch.undo()
    Toy(folder, resume=True, checkpoint_every=1).train()
    Toy(tmp_path / "calm").train()
    for name in ("final/weights.txt", "samples/epoch_0003.txt", "report.html"):
        assert (folder / name).read_text() == (tmp_path / "calm" / name).read_text()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 9


def test_without_room_at_the_start_there_is_nothing_to_resume(tmp_path, full_disk):
    full_disk("config.yaml")
    with pytest.raises(WriteError, match=r"config.yaml cannot be written") as caught:
        Toy(tmp_path / "run").train()
    assert notes(caught.value) == []
    assert left_aside(tmp_path) == []


class Diverging(Toy):
    """The loss of the second update is not a number."""

    def loss(self, batch, samples, actions):
        losses, statistics = super().loss(batch, samples, actions)
        return losses * (math.nan if self.step == 2 else 1), statistics


def test_a_run_that_fails_within_its_first_epoch_leaves_the_folder_to_the_next(tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match="the loss became nan at step 2") as caught:
        Diverging(tmp_path / "run").train()
    assert notes(caught.value) == []
    assert list(tmp_path.iterdir()) == []

    def read_only(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(checkpoint, "remove", read_only)
    with pytest.raises(TrainingError, match="the loss became nan at step 2"):  # the first failure is the one reported
        Diverging(tmp_path / "run").train()


def test_a_gradient_that_overflows_is_not_said_to_be_weights(tmp_path):
    """Each of its parts is finite, their norm is not, and clipped by that they are 0."""

    class Steep(Toy):
        def loss(self, batch, samples, actions):
            return (3e38 * self.weights.sum()).expand(len(samples)), {}

    with pytest.raises(TrainingError, match="the norm of the gradient is not finite at step 1: lower"):
        Steep(tmp_path / "run").train()


def test_what_a_killed_run_left_is_swept_at_the_next_start(tmp_path):
    Toy(tmp_path / "run", epochs=1).train()
    left = [".report.html.7.tmp", ".config.yaml.tmp", "samples/.epoch_0001.png.7.tmp", "checkpoints/.step_2.9.tmp"]
    for name in left:
        (tmp_path / "run" / name).write_text("half")
    Toy(tmp_path / "run", resume=True).train()
    assert left_aside(tmp_path) == []


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_folder_that_goes_away_is_noticed_and_not_made_anew(tmp_path, how):
    folder, calls = tmp_path / "run", []

    def reward(images):
        calls.append(1)
        if len(calls) == 3:
            folder.rename(tmp_path / "other") if how == "moved" else shutil.rmtree(folder)
        return brightness(images)

    with pytest.raises(WriteError, match=r"\(No such file or directory\)"):
        Toy(folder, reward).train()
    assert not folder.exists()
    assert (tmp_path / "other" / "config.yaml").is_file() == (how == "moved")


def test_a_reward_that_changes_the_working_directory_moves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def reward(images):
        os.chdir(tmp_path / "elsewhere")
        return brightness(images)

    assert Toy("run", reward).train() == tmp_path / "run"
    assert (tmp_path / "run" / "final").is_dir()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_images_of_pairs_are_found_wherever_a_reward_goes(tmp_path, monkeypatch):
    from PIL import Image

    from diffusion_align.data.image_pairs import PairsConfig, open_pairs

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    for name, grey in (("a.png", 10), ("b.png", 200)):
        Image.new("L", (8, 8), grey).save(tmp_path / "pairs" / name)
    row = {"prompt": "grey", "chosen": "a.png", "rejected": "b.png"}
    (tmp_path / "pairs" / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    sources = [open_pairs(PairsConfig(source=source)) for source in ("pairs", "pairs/pairs.jsonl")]
    monkeypatch.chdir("/")
    for pairs in sources:
        assert [int(255 * side.mean()) for side in pairs.images(0, (8, 8))] == [10, 200]


class Failing:
    """One of accelerate's trackers that fails in one of its methods."""

    name, requires_logging_directory, tracker = "failing", False, None

    def __init__(self, where):
        self.where, self.calls = where, []

    def __getattr__(self, name):
        def called(*_, **__):
            self.calls.append(name)
            if name == self.where:
                raise ConnectionError("no route to host\nand more")

        return called


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_dropped_with_one_line(tmp_path, monkeypatch, capsys, where):
    trackers = [Failing(where), Failing("nothing")]
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = [0, 1]

    def init_trackers(project, config):
        accelerator.trackers = [trackers[number] for number in accelerator.log_with]
        for tracker in accelerator.trackers:
            tracker.start()

    monkeypatch.setattr(accelerator, "init_trackers", init_trackers)
    Toy(tmp_path / "run", accelerator=accelerator, trackers=["tensorboard"]).train()
    assert (tmp_path / "run" / "final").is_dir()
    name = "0" if where == "start" else "failing"
    said = f"warning: the tracker {name} failed and is not used any more (ConnectionError: no route to host)\n"
    assert capsys.readouterr().err == said
    assert trackers[0].calls.count(where) == 1
    assert trackers[1].calls == ["start", *["log"] * 9, "finish"]


def test_real_trackers_start_log_and_end(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=tmp_path / "run")
    Toy(tmp_path / "run", accelerator=accelerator, trackers=["tensorboard"]).train()
    folder = next((tmp_path / "run").rglob("events.out.*")).parent
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    assert len(events.Scalars("loss")) == 6


def test_a_python_program_outlives_who_reads_its_progress(monkeypatch):
    from diffusion_align.training.progress import progress_bars

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with progress_bars() as bars:
            bars.update(bars.add_task("epochs", total=2), completed=1)
        bars.console.print("dropped")
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)


def test_a_checkpoint_is_due_after_minutes_and_changes_no_bit(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 7 * 60))  # seconds; the clock is read at the start, at each epoch's end and each save
    monkeypatch.setattr(savepoint, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # progress has its own
    settings = {"epochs": 4, "checkpoint_every": 100, "keep_checkpoints": 9}
    for name, minutes in (("often", 6), ("seldom", 13), ("never", None)):
        Toy(tmp_path / name, checkpoint_minutes=minutes, **settings).train()
    assert steps_of(tmp_path / "often") == [2, 4, 6, 8]
    assert steps_of(tmp_path / "seldom") == [4, 8]
    assert steps_of(tmp_path / "never") == [8]
    newest = [load_checkpoint(list_checkpoints(tmp_path / n / "checkpoints")[-1]) for n in ("often", "never")]
    assert torch.equal(*(weights["trained"]["weights"] for weights, _, _ in newest))
    assert len({(tmp_path / name / "final" / "weights.txt").read_text() for name in ("often", "seldom", "never")}) == 1


def test_fewer_epochs_than_are_finished_are_refused_and_change_nothing(tmp_path):
    Toy(tmp_path / "run", epochs=3).train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"^epochs=2, but 3 are finished: set epochs=3 or more$"):
        Toy(tmp_path / "run", epochs=2, resume=True).train()
    assert {path: path.read_bytes() for path in before} == before
    assert Toy(tmp_path / "run", epochs=3, resume=True).train() == tmp_path / "run"


def steps_of(folder):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder / "checkpoints")]


def test_runs_begun_before_these_settings_resume_and_may_change_them(tmp_path):
    folder = tmp_path / "run"
    trainer = Toy(folder, epochs=1)
    trainer.train()
    new = {"checkpoint_minutes", "interrupt_grace"}
    old = "".join(f"{line}\n" for line in dump_config(trainer.config).splitlines() if line.split(":")[0] not in new)
    (folder / "config.yaml").write_text(old)
    Toy(folder, resume=True, epochs=2, checkpoint_minutes=None, interrupt_grace=1).train()
    assert steps_of(folder)[-1] == 4


@pytest.fixture
def quick(monkeypatch):
    """Signals are taken as ever afterwards, and nothing of another test is still asked to stop."""
    monkeypatch.setattr(interrupt, "PATIENCE", 0.3)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests themselves run under nohup
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        assert signal.getsignal(number) is handler
    signal.signal(signal.SIGHUP, before)
    interrupt.left_behind = False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("background", [True, False])
def test_a_reward_that_hangs_is_left_after_the_grace_period(tmp_path, quick, number, background):
    folder, answer, calls, asked = tmp_path / "run", threading.Event(), [], []

    def reward(images):
        calls.append(1)
        if len(calls) == (4 if background else 2):
            asked.append(time.monotonic())
            os.kill(os.getpid(), number)
            answer.wait(60)
        return brightness(images)

    try:
        with pytest.raises(Interrupted) as caught:
            Toy(folder, reward, background=background, interrupt_grace=0.3, checkpoint_every=100).train()
    finally:
        answer.set()
    assert 0.3 < time.monotonic() - asked[0] < 20
    assert str(caught.value) == f"stopped after epoch 1 of 3\n{resumed_with(folder)}"
    assert interrupt.left_behind, "a thread of the reward would keep the process from ending"
    assert steps_of(folder) == [2]
    Toy(folder, resume=True).train()
    assert steps_of(folder)[-1] == 6


def test_a_reward_that_tries_again_for_ever_is_left_too(tmp_path, quick):
    calls = []

    def reward(images):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                try:
                    time.sleep(60)
                except Exception:
                    continue
        return brightness(images)

    with pytest.raises(Interrupted, match="stopped after epoch 1 of 3"):
        Toy(tmp_path / "run", reward, background=False, interrupt_grace=0.2).train()


def test_a_reward_that_fails_while_others_wait_in_line_ends_the_run(tmp_path):
    """A score that was cancelled before it began is not waited for: nobody would ever say that it is done."""
    started = threading.Event()

    def reward(images):
        started.wait(5)
        raise ValueError("no")

    trainer = Toy(tmp_path / "run", reward)

    def collect():
        with BatchScores(trainer.processes, RewardError) as scores:
            for _ in range(3):
                scores.submit([(True, partial(score_of, reward, torch.rand(2, 3, 4, 4)))])
            started.set()
            raise RewardError("another")

    with pytest.raises(RewardError, match="another"):
        collect()


def test_a_reward_that_hangs_before_the_first_epoch_is_left_too(tmp_path, quick, monkeypatch):
    def reward(images):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(Toy, "measures", True)
    with pytest.raises(Interrupted) as caught:
        Toy(tmp_path / "run", reward, interrupt_grace=0.2).train()
    assert str(caught.value) == f"stopped before epoch 1 ended\n{resumed_with(tmp_path / 'run')}"
    Toy(tmp_path / "run", resume=True).train()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 10


def test_a_reward_that_answers_in_time_is_waited_for(tmp_path, quick):
    def reward(images):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        answered.append(1)
        return brightness(images)

    answered = []
    with pytest.raises(Interrupted, match="stopped after epoch 1 of 3"):
        Toy(tmp_path / "run", reward, background=False, interrupt_grace=30, epochs=3).train()
    assert answered == [1]
    assert not interrupt.left_behind


def test_code_that_python_cannot_reach_ends_the_process_with_a_checkpoint(tmp_path, quick):
    folder, calls = tmp_path / "run", []

    def reward(images):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            library.pthread_mutex_lock(lock)
            library.pthread_mutex_lock(lock)  # for ever, and no signal is handled
        return brightness(images)

    trainer = Toy(folder, reward, background=False, interrupt_grace=0.2, checkpoint_every=100)
    pid = os.fork()
    if pid == 0:
        try:
            sys.stderr = (tmp_path / "said").open("w")
            trainer.train()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(done[1]) == 130
    assert steps_of(folder) == [2]
    assert (tmp_path / "said").read_text() == (
        f"stopped, as something did not answer; the newest checkpoint is step_00000002\n{resumed_with(folder)}\n"
    )


@pytest.mark.parametrize("waits", [True, False])
def test_only_a_process_that_waits_for_others_in_vain_is_ended(quick, monkeypatch, waits):
    """Work of our own, an epoch's last batch say, may take as long as it does."""
    monkeypatch.setattr(interrupt, "PATIENCE_WITH_OTHERS", 0.2)
    left = threading.Event()
    with interrupt.InterruptFlag(0.05, left.set) as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        with interrupt.waiting_for_others() if waits else contextlib.nullcontext():
            assert left.wait(10 if waits else 0.6) is waits
        assert flag.raised
        assert flag.overdue


def test_a_hangup_that_is_ignored_stays_ignored(quick):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interrupt.InterruptFlag() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not flag.raised
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("ends", ["in time", "by a signal"])
def test_nothing_else_is_done_while_a_process_that_must_end_saves(tmp_path, monkeypatch, ends):
    """Its main thread may come back from foreign code just then: to train on what is being written, or to save too."""
    trainer, begun, done = Toy(tmp_path / "run"), threading.Event(), []

    def write(rng):
        begun.set()
        done.append("begins")
        time.sleep(0.2)
        done.append("ends")

    monkeypatch.setattr(trainer, "_write_checkpoint", write)
    monkeypatch.setattr(endings, "os", SimpleNamespace(_exit=lambda status: done.append(f"left with {status}")))
    trainer._savepoint.rng = None
    leaving = threading.Thread(target=trainer._leave)
    with contextlib.suppress(Interrupted), trainer._checkpoint_on_failure():
        leaving.start()
        assert begun.wait(10)
        if ends == "by a signal":
            raise Interrupted
    done.append("trains")
    leaving.join()
    assert [what for what in done if "left" not in what] == ["begins", "ends"] * (1 + (ends != "in time")) + ["trains"]
    assert "left with 130" in done


@pytest.mark.parametrize(("ema_decay", "saves"), [(0.5, 0), (None, 1)])
def test_a_process_that_must_end_saves_no_averaged_weights(tmp_path, monkeypatch, ema_decay, saves):
    trainer, saved = Toy(tmp_path / "run", ema_decay=ema_decay), []
    monkeypatch.setattr(trainer, "_write_checkpoint", saved.append)
    with trainer._checkpoint_on_failure(), trainer.ema_weights():
        trainer._savepoint.save_if_intact(trainer._write_checkpoint)
    assert len(saved) == saves


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_only_what_helps_is_advised_where_trained_weights_are_not_fit(tmp_path, monkeypatch, precision):
    """They will be no fitter the next time, but for other numbers."""

    class Unfit(Toy):
        def collect(self):
            if self.epoch == 1:
                monkeypatch.setattr(Accelerator, "mixed_precision", precision)
                raise TrainingError("the latents are not finite")
            return super().collect()

    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match="not finite") as caught:
        Unfit(folder).train()
    advice = [resumed_with(folder, mixed_precision="no").replace("Toy(", "Unfit(")]
    assert notes(caught.value) == (advice if precision == "fp16" else [])
    assert steps_of(folder) == [2]


def test_epochs_in_which_all_is_masked_say_so_and_what_to_do(tmp_path, capsys):
    class Masked(Toy):
        none_left = "every completion was cut off at max_completion_length"

        def estimate(self, collected):
            return collected, TrainingPlan(torch.arange(0)), {}

    with pytest.raises(TrainingError, match="raise max_completion_length"):
        Masked(tmp_path / "run").train()
    assert "equal rewards" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "content", "accepted", "advised"),
    [
        ({"prompts": "b.txt"}, "a", [], "[prompts]"),
        ({"prompts": "b.txt"}, "b", [], "[prompts, reward]"),
        ({}, "b", [], "[reward]"),
        ({"prompts": "b.txt"}, "b", ["prompts"], "[prompts, reward]"),  # what is accepted already is still to be
        ({"prompts": "b.txt"}, "b", ["reward", "prompts"], None),
        ({"learning_rate": 1.0}, "a", [], ""),
        ({"learning_rate": 1.0, "prompts": "b.txt"}, "b", [], ""),
        ({"model": "another"}, "a", [], ""),
    ],
)
def test_all_that_has_to_be_accepted_is_named_at_once(tmp_path, settings, content, accepted, advised):
    class WithPrompts(TrainingConfig):
        prompts: str = "a.txt"

    config = WithPrompts(model="toy", output_dir=tmp_path / "run", accept_changed=accepted)
    theirs = config.model_dump(mode="json") | settings
    asked = []
    together = SimpleNamespace(raise_together=lambda failure, kind: asked.append(failure), is_main=True)
    mine, was = ({"reward": [("mine.py", content)]} for content in (content, "a"))
    check_same_run(config, mine, theirs, was, tmp_path, together)
    [failure] = asked  # one process alone would leave the others waiting
    if advised is None:
        assert failure is None
    elif advised:
        assert f"accept_changed={advised}" in str(failure)
    else:
        assert "put it back" in str(failure)
        assert "accept_changed" not in str(failure)


def test_no_process_waits_to_save_what_another_says_is_not_fit(tmp_path, monkeypatch):
    """At the first epoch, of latents that are not finite on one process: the others have another kind of error."""
    told = []
    monkeypatch.setattr(training_processes, "gather_object", lambda mine: told.extend(mine) or list(told))
    trainers = [Toy(tmp_path / "run") for _ in range(2)]
    for trainer, failure in zip(trainers, (TrainingError("not finite"), None), strict=True):
        trainer.processes.accelerator = SimpleNamespace(num_processes=2, is_main_process=False)
        monkeypatch.setattr(trainer.processes, "from_main", lambda _: pytest.fail("waits for the first process"))
        wanted = pytest.raises(TrainingError if failure else RewardError, match="not finite")
        with wanted, trainer._checkpoint_on_failure():
            trainer.processes.raise_together(failure, RewardError)


def test_a_step_that_a_fused_optimizer_skips_trains_nothing(tmp_path, monkeypatch):
    """As on a GPU in fp16, where the scaler leaves the skipping to the optimizer."""

    class Steep(Toy):
        def loss(self, batch, samples, actions):
            losses, statistics = super().loss(batch, samples, actions)
            return 1e4 * losses, statistics

    make = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **more: make(*args, fused=True, **more))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer = Steep(tmp_path / "run", accelerator=accelerator, ema_decay=0.5)
    trainer.train()
    assert not trainer.weights.any()
    assert (trainer.step, trainer.optimization.steps, trainer.optimization.ema_steps) == (6, 0, 0)
    assert [row["untrained_epochs"] for row in trainer.log.rows() if "time/epoch" in row] == [1, 2, 3]
