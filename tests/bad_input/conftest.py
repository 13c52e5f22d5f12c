"""The command line called in this process, its exit status and what it printed; settings that would train."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.problems import assert_one_sentence
from tests.helpers.tiny_runs import IMAGE_RUN as SETTINGS


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
    """``cli("train", "tiny.yaml", ...)`` in a fresh folder; the few runs that are finished write no report."""
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    yield lambda *arguments: Outcome(*call_cli(*arguments))
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _uncounted(monkeypatch):
    """doctor neither counts nor times a network, which takes seconds and finds nothing wrong."""
    from diffusion_align.doctor import cost_report, estimate
    from diffusion_align.doctor.memory import NetworkCost

    monkeypatch.setattr(estimate, "network_cost", lambda *_: NetworkCost(10, 10, 10, 10, 10, 10))
    monkeypatch.setattr(cost_report, "_time_here", lambda *_: [])


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


@pytest.fixture
def refused(cli, tree):
    """The sentences with which a command is refused: exit 2, nothing else on stderr, and nothing written."""

    def check(*arguments):
        before = tree()
        outcome = cli(*arguments)
        assert outcome.status == 2, outcome.err
        errors = [line for line in outcome.err.splitlines() if "had the prompt cut" not in line]
        assert len(outcome.sentences) == len(errors) > 0, outcome.err
        for sentence in outcome.sentences:
            assert_one_sentence(sentence)
        assert tree() == before
        return outcome.sentences

    return check


@pytest.fixture
def no_model(monkeypatch):
    """No weights are read: whatever would read them fails the test."""
    import transformers
    from diffusers import DiffusionPipeline

    def load(*arguments, **options):
        pytest.fail("a model was loaded")  # no Exception, which would be put into a sentence

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load)
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel", "CLIPModel"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", load)


@pytest.fixture
def model(tmp_path, tiny_sd):
    """A copy of a tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


@pytest.fixture(scope="module")
def finish(tmp_path_factory):
    """Train with some settings; the run folder and the settings."""
    from accelerate.state import AcceleratorState

    from diffusion_align.pipelines.configuration import check_config
    from diffusion_align.pipelines.run import run

    def make(settings):
        folder = tmp_path_factory.mktemp("finished") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusion_align.report.write_report", lambda folder: None)
            run(check_config(settings | {"output_dir": str(folder)}))
        AcceleratorState._reset_state(reset_partial_state=True)
        return folder, settings

    return make
