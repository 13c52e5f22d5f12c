"""Forward-process training in two processes: the same draws, gradients, rows and old policy as in one."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.hard_runs import rows_of
from tests.helpers.two_processes import PLAIN_STEPS, assert_same_gradients, assert_same_weights, run_both

FORWARD = {
    "method": "forward",
    "advantages": "group",
    "group_size": 2,
    "epochs": 2,
    "updates_per_epoch": 2,
    "old_decay": 0.5,
    "consistency_images": 3,
    "learning_rate": 1.0,
    "sampler": {"steps": 3},
    "mixed_precision": "no",
}


def test_two_processes_train_as_one_does(forked, settings, tmp_path):
    folders, gradients = run_both(forked, settings(**FORWARD), tmp_path, PLAIN_STEPS)
    assert_same_gradients(gradients, 1e-6)
    trained = assert_same_weights(folders)
    newest = [sorted((folder / "checkpoints").iterdir())[-1] / "snapshot_old.safetensors" for folder in folders]
    old, again = map(load_file, newest)
    for name, value in old.items():
        torch.testing.assert_close(value, again[name], atol=1e-6, rtol=0)
    assert any((old[name] - trained[name]).abs().max() > 1e-4 for name in old)
    one, two = (rows_of(folder) for folder in folders)
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert sum("kl_path" in row for row in one) == 2
