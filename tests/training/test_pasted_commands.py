"""What a run prints when it ends too early is pasted into a shell, and the run ends as one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_align.yaml_text import dump
from tests.helpers.hard_runs import HARD_RUN, NOISY, assert_same_run

FAILS = """
    from pathlib import Path
    log = Path(__file__).parent / "it's a run" / "metrics.jsonl"
    if log.is_file() and log.read_text().count('"time/epoch"') == 2:
        raise ValueError("out of order")
"""
BROKEN = NOISY.replace("metadata):\n", f"metadata):{FAILS}")


@pytest.fixture(scope="module")
def calm(left_alone, tiny_sd):
    """The folder of a run that was left alone."""
    changes = {"model": str(tiny_sd)}
    return left_alone(lambda scratch, _: HARD_RUN | changes | {"reward": f"{scratch}/noisy.py:noisy"})(None)[1]


def pasted(line, folder):
    """Run in a shell of its own, with this interpreter's programs and this checkout on its paths."""
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(Path.cwd())}
    environment = os.environ | paths | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, "a reward that fails in epoch 3"])
def test_the_printed_command_resumes_to_the_same_end(forked, calm, tiny_sd, tmp_path, end):
    fails = isinstance(end, str)
    (tmp_path / "noisy.py").write_text(BROKEN if fails else NOISY)
    (tmp_path / "a recipe.yaml").write_text(dump(HARD_RUN | {"model": str(tiny_sd), "reward": "noisy.py:noisy"}))
    folder = tmp_path / "it's a run"
    pids = forked.start("train", "a recipe.yaml", f"output_dir={folder.name}", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not fails and not list(folder.glob("checkpoints/step_*4")) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not fails:
        os.kill(pids[0], end)
    run = forked.wait(pids)
    assert run.status == (2 if fails else 130), run
    said, how = run.error.strip().splitlines()[-2:]
    assert ("raised ValueError: out of order" if fails else "stopped after epoch ") in said
    assert how.startswith("resume with: diffusion-align train 'a recipe.yaml' ")
    (tmp_path / "noisy.py").write_text(NOISY)
    resumed = pasted(how.removeprefix("resume with: "), tmp_path)
    assert resumed.returncode == 0, (how, resumed.stderr)
    before = resumed.stderr + resumed.stdout.partition("\nepoch ")[0]
    assert len(before.splitlines()) <= (3 if fails else 2), before  # of ours alone
    assert_same_run(folder, calm)
