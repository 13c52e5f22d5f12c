"""Which files of the project are on the way to a first update."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "frames.py"


@pytest.mark.slow
def test_files_on_the_way_to_the_first_update():
    command = [sys.executable, SCRIPT, "--trace", "grpo_tiny"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    found, inside = (part.split() for part in output.rsplit("\n\n", 1))
    assert {"diffusion_align/llm/grpo.py", "diffusion_align/llm/rollout.py"} <= set(inside) <= set(found)
    assert "pipelines/run.py" in set(found) - set(inside)
    assert not any(name.startswith(("diffusion_align/diffusion", "scripts")) for name in inside)


def test_lines_are_counted_once_although_folders_are_linked():
    script = runpy.run_path(str(SCRIPT))
    paths = script["sources"](*script["PACKAGE"])
    assert len({path.resolve() for path in paths}) == len(paths) > 100
    assert script["lines"](paths[:1]) == len(paths[0].read_text().splitlines())
