"""Prompts, random streams, the metrics file and signals, each alone."""

import json
import os
import signal
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.interrupt import InterruptFlag
from diffusion_align.training.callbacks import MetricsLog, Trackers
from diffusion_align.training.processes import Processes
from diffusion_align.training.randomness import generator

SEVEN = [(f"prompt {i}", {"i": i}) for i in range(7)]


@pytest.mark.parametrize("count", [1, 3, 7, 10])
def test_each_pass_covers_the_whole_list_whatever_an_epoch_takes(count):
    stream = [p for epoch in range(21) for p in items_of_epoch(SEVEN, 0, epoch, count)]
    passes = [stream[i : i + 7] for i in range(0, len(stream) - 6, 7)]
    assert len(passes) >= 3
    assert all(Counter(text for text, _ in part) == Counter(text for text, _ in SEVEN) for part in passes)
    assert all(f"prompt {metadata['i']}" == text for text, metadata in stream)


def test_passes_differ_in_order_and_so_do_seeds():
    orders = {tuple(text for text, _ in items_of_epoch(SEVEN, seed, epoch, 7)) for seed in (0, 1) for epoch in range(5)}
    assert len(orders) == 10


def test_an_epochs_prompts_depend_on_nothing_before_it():
    assert items_of_epoch(SEVEN, 0, 5, 3) == items_of_epoch(SEVEN, 0, 5, 3)


def test_streams_are_named():
    def draw(*names):
        return torch.rand(4, generator=generator(*names)).tolist()

    assert draw(0, "noise", 1, 2) == draw(0, "noise", 1, 2)
    different = [(0, "noise", 1, 2), (0, "noise", 2, 1), (0, "noise", 12), (0, "noise1", 2)]
    different += [(1, "noise", 1, 2), (0, "order", 1, 2)]
    assert len({tuple(draw(*names)) for names in different}) == len(different)
    state = torch.get_rng_state()
    draw(0, "noise")
    assert torch.equal(state, torch.get_rng_state()), "the global state was touched"


class FakeAccelerator:
    """Also its only tracker."""

    is_main_process, num_processes, name = True, 1, "fake"

    def __init__(self):
        self.logged, self.trackers = [], [self]

    def log(self, values, step):
        self.logged.append((step, values))


def trainer_of(accelerator):
    return SimpleNamespace(processes=Processes(accelerator))


def test_the_metrics_file_forgets_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 2, 3, 4):
        log.write({"step": step, "reward": step / 3})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # a kill within a row
    log.rewind(2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": s, "reward": s / 3} for s in (1, 2, 2)]
    log.write({"step": 3, "reward": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    log.rewind(-1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_trackers_get_the_numbers_of_every_row():
    accelerator = FakeAccelerator()
    Trackers(accelerator).on_update(trainer_of(accelerator), {"step": 3, "reward": 0.5, "note": "text"})
    assert accelerator.logged == [(3, {"reward": 0.5})]


def test_only_the_main_process_writes(tmp_path):
    accelerator = FakeAccelerator()
    accelerator.is_main_process = False
    MetricsLog(tmp_path / "metrics.jsonl").on_update(trainer_of(accelerator), {"step": 1})
    Trackers(accelerator).on_update(trainer_of(accelerator), {"step": 1})
    assert not (tmp_path / "metrics.jsonl").exists()
    assert accelerator.logged == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_flag_and_the_second_acts_as_ever(number):
    class Seen(Exception):
        pass

    def usual(*_):
        raise Seen

    before = signal.signal(number, usual)
    try:
        with InterruptFlag() as flag:
            assert not flag.raised
            os.kill(os.getpid(), number)
            assert flag.raised
            with pytest.raises(Seen):
                os.kill(os.getpid(), number)
        with InterruptFlag() as flag:
            pass
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


def test_the_flag_is_harmless_in_another_thread():
    found = []

    def work():
        with InterruptFlag() as flag:
            found.append(flag.raised)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
