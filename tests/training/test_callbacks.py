"""Callbacks see a run as it is, may add to an epoch's row, end the run, and lose nothing where they fail."""

import json
from types import SimpleNamespace

import pytest
import torch

from diffusion_align.errors import UserError
from diffusion_align.training import processes
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.checkpoint import list_checkpoints
from diffusion_align.training.reading import load_yaml
from tests.helpers.problems import problem
from tests.helpers.toy import Toy, resumed_with


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)


class Noted(Callback):
    """Writes down what it is called with."""

    def __init__(self, stop_after=None, fail_at=None, adds=None):
        self.calls, self.stop_after, self.fail_at, self.adds = [], stop_after, fail_at, adds or {}

    def on_start(self, trainer):
        self.calls.append(("start", trainer.epoch, trainer.resumed))

    def on_update(self, trainer, row):
        self.calls.append(("update", row["step"]))
        if self.fail_at == ("update", row["step"]):
            raise RuntimeError("my own fault")

    def on_epoch_end(self, trainer, row):
        self.calls.append(("epoch", row["epoch"], trainer.epoch))
        if self.fail_at == trainer.epoch:
            raise RuntimeError("my own fault")
        row.update({"mine": torch.tensor(10.0 * row["epoch"])} | self.adds)
        return "enough" if self.stop_after == trainer.epoch else None

    def on_end(self, trainer):
        self.calls.append(("end", (trainer.folder / "final").is_dir()))

    def on_close(self, trainer):
        self.calls.append(("close",))


def epochs_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "time/epoch" in row]


def test_they_are_called_in_order_and_what_they_add_is_logged(tmp_path):
    noted = Noted()
    Toy(tmp_path / "run", epochs=2, callbacks=[noted]).train()
    assert load_yaml(tmp_path / "run" / "config.yaml")["method"] == "tests.helpers.toy:Toy"
    epochs = [[("update", 2 * n - 1), ("update", 2 * n), ("epoch", n, n)] for n in (1, 2)]
    assert noted.calls == [("start", 0, False), *epochs[0], *epochs[1], ("end", True), ("close",)]
    assert [row["mine"] for row in epochs_of(tmp_path / "run")] == [10.0, 20.0]


def test_a_reason_ends_the_run_which_is_then_finished(tmp_path):
    noted = Noted(stop_after=2)
    trainer = Toy(tmp_path / "run", epochs=5, callbacks=[noted])
    trainer.train()
    assert (trainer.epoch, trainer.stopped) == (2, "enough")
    assert noted.calls[-2:] == [("end", True), ("close",)]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000004"]


@pytest.mark.parametrize(
    ("faulty", "sentence"),
    [
        ({"fail_at": 2}, problem("callback Noted.on_epoch_end", "my own fault (test_callbacks.py, line ")),
        ({"fail_at": ("update", 3)}, problem("callback Noted.on_update", "my own fault")),
        ({"adds": {"many": torch.ones(2)}}, problem("the metric 'many'", "shape (2,)")),
    ],
)
def test_one_that_fails_loses_no_epoch(tmp_path, faulty, sentence):
    run = {"checkpoint_every": 100}
    with pytest.raises(UserError, match=sentence) as caught:
        Toy(tmp_path / "run", **run, callbacks=[Noted(**faulty)]).train()
    assert caught.value.__notes__ == [resumed_with(tmp_path / "run")]
    noted, epoch = Noted(), 1 if "adds" in faulty else 2
    Toy(tmp_path / "run", **run, resume=True, callbacks=[noted]).train()
    assert noted.calls[:2] == [("start", epoch, True), ("epoch", epoch, epoch)]  # which is made up for
    Toy(tmp_path / "calm", **run, callbacks=[Noted()]).train()
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "calm")]
    untimed = [[{k: v for k, v in json.loads(row).items() if "time/" not in k} for row in some] for some in rows]
    assert untimed[0] == untimed[1]
    weights = [(tmp_path / name / "final" / "weights.txt").read_text() for name in ("run", "calm")]
    assert weights[0] == weights[1]


def test_one_that_fails_on_a_process_fails_on_all(tmp_path, monkeypatch):
    own = [Noted(), Noted()]
    trainer = Toy(tmp_path / "run", callbacks=own)
    trainer.callbacks = own
    trainer.processes.accelerator, others = SimpleNamespace(num_processes=2), [None, "my own fault"]
    monkeypatch.setattr(processes, "gather_object", lambda mine: [*mine, (others.pop(0), False, False)])
    trainer._each("on_update", {"step": 1})
    assert [len(one.calls) for one in own] == [1, 1]
    assert str(trainer._failed_update) == "my own fault"
    others += ["it is not asked", "twice"]
    own[0].fail_at = 0
    with pytest.raises(UserError, match="my own fault"):
        trainer._each("on_epoch_end", {"epoch": 0})
    assert (len(own[1].calls), others, trainer.processes.failed_together) == (1, ["twice"], True)


def test_the_parts_of_an_epoch_can_be_called_on_a_fresh_trainer(tmp_path):
    trainer = Toy(tmp_path / "run")
    collected, metrics = trainer.collect()
    batch, plan, estimated = trainer.estimate(collected)
    assert metrics == estimated == {}
    losses, _ = trainer.loss(batch, plan.sample_indices, torch.zeros_like(plan.sample_indices))
    assert losses.shape == (4,)
    indices = torch.stack([plan.sample_indices, torch.zeros_like(plan.sample_indices)], dim=1)
    found = trainer.accumulate(batch, indices, 4).over_processes(trainer.accelerator)
    assert found["loss"] == pytest.approx(losses.mean().item())
    expected = torch.autograd.grad(losses.mean(), trainer.weights)[0]
    torch.testing.assert_close(trainer.weights.grad, expected)
    trainer.folder.mkdir()
    trainer.save()
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000000"]
