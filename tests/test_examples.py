"""docs/extending.md as a stranger follows it: the files of examples/ far from the repository, the package installed."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.helpers.forked_cli import ForkedCli
from tests.helpers.printed import SHORT, UNCOUNTED, blocks, shorter_code

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
FAST = ["epochs=1", *SHORT]
FAST_TEXTS = [*FAST, "sample_batch_size=8"]
SCRIPT = """import runpy, sys
before, sys.argv = sys.argv, {0}
runpy.run_path(sys.argv[0], run_name='__main__')
sys.argv = before"""
ENTRY_POINT = re.search(r"^```toml\n\[project.entry-points.\"(.+)\"\]\n(.*?)\n```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A stranger's folder, and a plug-in of theirs that is installed."""
    folder = tmp_path_factory.mktemp("stranger")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    information = folder / "plug_in" / "rloo-0.1.dist-info"
    information.mkdir(parents=True)
    shutil.copy(ROOT / "examples/rloo.py", folder / "plug_in")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: rloo\nVersion: 0.1\n")
    group, points = ENTRY_POINT.groups()
    (information / "entry_points.txt").write_text(f"[{group}]\n{points.replace(chr(34), '')}\n")
    return folder


@pytest.fixture(scope="module")
def installed(unpacked, elsewhere, tmp_path_factory):
    path = [unpacked, elsewhere / "plug_in"]
    with ForkedCli(tmp_path_factory.mktemp("installed"), path=path) as client:
        yield lambda *words, **options: client(*words, cwd=elsewhere, timeout=300, **options)


def shortened(words):
    """The words of a command, for a run of seconds."""
    if words[0] != "train":
        return words
    if "resume=true" in words:
        return [*words[:-1], "epochs=2"]
    if words[1] not in ("quickstart", "ddpo_emoji_aesthetic"):
        return [*words, *FAST_TEXTS]
    return [*words, *FAST, "sampler.steps=2", "group_size=4"]


def test_the_installed_copy_is_what_runs(installed, unpacked):
    done = installed("--help", prelude="import diffusion_align, sys\nprint(diffusion_align.__file__, file=sys.stderr)")
    assert Path(done.error.strip()).is_relative_to(unpacked)


def test_an_installed_plug_in_is_listed_and_trains(installed, elsewhere):
    done = installed("list", "methods")
    assert done.status == 0, done.error
    assert re.search(r"^  rloo  REINFORCE", done.outputs[0], re.MULTILINE)
    done = installed("train", "grpo_tiny", "method=rloo", "output_dir=runs/plug_in", *FAST_TEXTS)
    assert done.status == 0, done.error
    assert yaml.safe_load((elsewhere / "runs/plug_in/config.yaml").read_text())["method"] == "rloo"


@pytest.mark.parametrize("section", SECTIONS)
def test_a_file_of_ones_own_runs_through_every_command(section, installed, elsewhere):
    (_, commands), (_, code) = printed = blocks(SECTIONS[section], "bash|python")
    assert [language for language, _ in printed] == ["bash", "python"]
    lines = [shlex.split(line) for line in commands.splitlines()]
    called = [words[1] for words in lines if words[0] == "diffusion-align"]
    assert called[:4] == ["doctor", "train", "report", "train"]
    before = set((elsewhere / "runs").glob("*"))
    for words in lines:
        if words[0] == "python":
            done = installed("--help", prelude=SCRIPT.format(words[1:]))
        else:
            # Of one's own, a family alone decides what doctor counts; other sections' doctor need not.
            counted = words[1] == "doctor" and section != "A model family"
            done = installed(*shortened(words[1:]), prelude=UNCOUNTED if counted else "")
        assert done.status == 0, f"{shlex.join(words)}\n{done.outputs[0][-2000:]}\n{done.error[-2000:]}"
    done = installed("--help", prelude=shorter_code(code))
    assert done.status == 0, done.error[-2000:]

    one, two = sorted(set((elsewhere / "runs").glob("*")) - before)
    for run, epochs in ((one, [1, 2]), (two, [1])):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows if "time/epoch" in row] == epochs
        assert (run / "report.html").stat().st_size > 1000
        assert list((run / "final").glob("*.safetensors"))


def test_the_page_shows_every_example():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(
        re.findall(r"\(\.\./examples/(\w+\.py)\)", PAGE)
    )
