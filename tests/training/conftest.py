"""Very small runs, on the command line of processes of its own or in this process."""

import functools
import json

import pytest
import yaml
from accelerate.state import AcceleratorState

from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.run import run
from diffusion_align.yaml_text import dump
from tests.helpers.hard_runs import HARD_RUN, NOISY


@pytest.fixture
def settings(tmp_path):
    """Write ``HARD_RUN`` with changes to tiny.yaml in the scratch folder, with ``noisy.py`` beside it."""
    (tmp_path / "noisy.py").write_text(NOISY)

    def write(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(HARD_RUN | changes))
        return path

    return write


@pytest.fixture(scope="module")
def left_alone(forked, tmp_path_factory):
    """``left_alone(settings, prelude="")``: kind -> a configuration of ``settings(scratch, kind)``, with
    ``noisy.py``, and the folder of its run, which nobody disturbed; one for all tests."""

    def runs(settings, prelude=""):
        @functools.cache
        def run_of(kind):
            scratch = tmp_path_factory.mktemp("calm")
            (scratch / "noisy.py").write_text(NOISY)
            config = scratch / "tiny.yaml"
            config.write_text(dump({"output_dir": "run"} | settings(scratch, kind)))
            forked.finish("train", config, f"output_dir={scratch}/run", prelude=prelude)
            return config, scratch / "run"

        return run_of

    return runs


@pytest.fixture
def run_here(monkeypatch):
    """``run_here(settings)``: the finished trainer of a run in this process, without a report."""
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)

    def train(settings, **loaded):
        AcceleratorState._reset_state(reset_partial_state=True)
        return run(check_config(settings) if isinstance(settings, dict) else settings, **loaded)

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train(run_here, tiny_sd, tmp_path):
    """``train(settings, name="run", **changes)``: the same on a tiny model, and its rows."""

    def here(settings, name="run", **changes):
        folder = tmp_path / name
        trainer = run_here(settings | {"model": str(tiny_sd), "output_dir": str(folder)} | changes)
        return trainer, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return here
