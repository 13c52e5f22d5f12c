"""Checkpoints: the old one or the new one, never half of one; and every bit of state comes back."""

import json
import random
import shutil

import numpy as np
import pytest
import torch

from diffusion_align.errors import CheckpointError
from diffusion_align.training import checkpoint
from diffusion_align.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint


def save(folder, step, value=1.0, keep=2):
    return save_checkpoint(
        folder,
        step,
        weights={"trained": {"a.b": torch.full((2, 3), value)}},
        tensors={
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}},
            "rng": [None, 1.5],
        },
        state={"step": step, "rewards": [0.1 + 0.2, 1e-17]},
        keep=keep,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    weights, tensors, state = load_checkpoint(save(tmp_path / "checkpoints", 7, 0.1))
    assert torch.equal(weights["trained"]["a.b"], torch.full((2, 3), 0.1))
    assert torch.equal(tensors["optimizer"]["state"][0]["exp_avg"], torch.ones(2))
    assert tensors["rng"] == [None, 1.5]
    assert state == {"step": 7, "rewards": [0.1 + 0.2, 1e-17]}


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 100, 30):
        save(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000030", "step_00000100"]
    save(tmp_path, 200, keep=1)
    assert names(tmp_path) == ["step_00000200"]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert list_checkpoints(tmp_path)[-1].name == "step_100000000"


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "place",
    ["writing.os.replace", "writing.os.fsync", "checkpoint.save_file", "checkpoint.torch.save", "checkpoint._sha256"],
)
def test_a_kill_while_writing_leaves_the_old_one(tmp_path, monkeypatch, place):
    save(tmp_path, 1, 1.0, keep=1)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"diffusion_align.{place}" if "writing" in place else f"diffusion_align.training.{place}", killed)
        with pytest.raises(Killed):
            save(tmp_path, 2, 2.0, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert load_checkpoint(tmp_path / "step_00000001")[0]["trained"]["a.b"][0, 0] == 1
    save(tmp_path, 2, 2.0, keep=1)  # a temporary folder left behind is not in the way
    assert names(tmp_path) == ["step_00000002"]
    assert load_checkpoint(tmp_path / "step_00000002")[0]["trained"]["a.b"][0, 0] == 2


def test_a_kill_after_the_rename_leaves_the_new_one(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "list_checkpoints", killed)
        with pytest.raises(Killed):
            save(tmp_path, 2, 2.0, keep=1)
    assert list_checkpoints(tmp_path)[-1].name == "step_00000002"
    load_checkpoint(tmp_path / "step_00000002")


def test_the_same_step_again_never_removes_what_is_there(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, *_, **__: removed.append(path.name))
    save(tmp_path, 1, keep=1)
    assert "step_00000001" not in removed
    load_checkpoint(tmp_path / "step_00000001")


def test_an_unfinished_folder_of_that_name_is_replaced(tmp_path):
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "trained.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    save(tmp_path, 1)
    load_checkpoint(tmp_path / "step_00000001")


@pytest.mark.parametrize("name", ["trained.safetensors", "tensors.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["one bit", "cut", "gone", "empty"])
def test_damage_is_noticed(tmp_path, name, how):
    path = save(tmp_path, 1)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes({"one bit": content, "cut": content[:-5], "empty": b"", "gone": b""}[how])
    if how == "gone":
        (path / name).unlink()
    with pytest.raises(CheckpointError, match=r"damaged .*delete it to resume from the one before") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_names_too_little_is_damage(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest:
        (path / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != name}))
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)


def draws():
    return (
        [random.random(), random.gauss(0, 1)],
        [*np.random.rand(3).tolist(), np.random.randn()],  # noqa: NPY002 - the global state is the subject
        torch.rand(3).tolist() + torch.randn(1).tolist(),
    )


def test_random_states_come_back_through_a_file(tmp_path):
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002 - the global state is the subject
    torch.manual_seed(3)
    draws()  # leaves half a Gaussian pair in Python's and numpy's state
    torch.save(checkpoint.rng_state(), tmp_path / "rng.pt")
    expected = draws()
    draws()
    checkpoint.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draws() == expected
