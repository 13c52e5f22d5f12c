"""A process that fails before the first collective fails on all, instead of leaving the others to wait for it."""

from types import SimpleNamespace

import pytest

from diffusion_align.errors import ConfigError, UserError
from diffusion_align.training import accelerator as machine


def raising(error):
    raise error


@pytest.fixture
def others(monkeypatch):
    """``others([sentence or None, ...])``: what the processes before this one say; returns what this one says."""

    def make(said):
        own = []
        monkeypatch.setattr(machine, "processes", lambda: SimpleNamespace(num_processes=1 + len(said)))
        monkeypatch.setattr(machine, "gather_object", lambda mine: own.extend(mine) or [*said, *mine])
        return own

    return make


def test_all_processes_raise_where_one_fails(others):
    own = others([None, None])
    assert machine.agreed(lambda: "rows") == "rows"
    assert own == [None]
    own = others([None, "data: row 3: the prompt is empty"])
    with pytest.raises(UserError, match=r"^process 1: data: row 3: the prompt is empty$"):
        machine.agreed(lambda: "rows")
    assert own == [None]
    for error in (ConfigError(["a: b", "c: d"]), ValueError("other"), KeyError("x")):
        own = others([None])
        with pytest.raises(type(error)) as caught:
            machine.agreed(lambda error=error: raising(error))
        assert caught.value is error
        assert own == [str(error).splitlines()[0]]


def test_one_process_alone_asks_nobody(monkeypatch):
    monkeypatch.setattr(machine, "gather_object", None)
    assert machine.agreed(lambda: 3) == 3
    with pytest.raises(ConfigError, match=r"^a$"):
        machine.agreed(lambda: raising(ConfigError(["a"])))
