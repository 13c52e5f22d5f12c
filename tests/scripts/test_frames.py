"""Which files of the project are on the way to a first update."""

import subprocess
import sys

import frames
import pytest


@pytest.mark.slow
def test_files_on_the_way_to_the_first_update():
    command = [sys.executable, frames.__file__, "--trace", "grpo_tiny"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    found, inside = (part.split() for part in output.rsplit("\n\n", 1))
    assert {"diffusion_align/llm/grpo.py", "diffusion_align/llm/rollout.py"} <= set(inside) <= set(found)
    assert "pipelines/run.py" in set(found) - set(inside)
    assert not any(name.startswith(("diffusion_align/diffusion", "scripts")) for name in inside)


def test_lines_are_counted_once_although_folders_are_linked():
    paths = frames.sources(*frames.PACKAGE)
    assert len({path.resolve() for path in paths}) == len(paths) > 100
    assert frames.lines(paths[:1]) == len(paths[0].read_text().splitlines())
