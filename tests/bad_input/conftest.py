"""The command line called in this process, its exit status and what it printed; settings that would train."""

import dataclasses
import sys

import pytest
import yaml
from tiny_runs import IMAGE_RUN as SETTINGS


@dataclasses.dataclass
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def sentences(self):
        """What was said after ``error:``, one entry a sentence."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def cli(tmp_path, monkeypatch, call_cli):
    """``cli("train", "tiny.yaml", ...)`` in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    yield lambda *arguments: Outcome(*call_cli(*arguments))
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def write_settings(tmp_path):
    """Write ``SETTINGS`` with changes (a value of ``...`` drops the key) to tiny.yaml and return its path."""

    def write(name="tiny.yaml", **changes):
        settings = {k: v for k, v in (SETTINGS | changes).items() if v is not ...}
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture
def tree(tmp_path):
    """A function: every path below the scratch folder with its content."""

    def snapshot():
        return {
            p: p.read_bytes() if p.is_file() else None
            for p in sorted(tmp_path.rglob("*"))
            if "__pycache__" not in str(p)
        }

    return snapshot
