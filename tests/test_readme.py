"""Every command and every Python block of the README runs as it is printed, only with fewer and shorter epochs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.printed import SHORT_IMAGES, UNCOUNTED, blocks, shorter, shorter_code

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ELSEWHERE = ("bash scripts/test.sh", "pip install")  # what runs this test, and what installed it


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for _, block in blocks(README, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_every_command_runs(workplace: Path, forked: Any) -> None:
    found = commands()
    assert any(c.startswith("bash scripts/quickstart.sh") for c in found)
    assert sum(c.startswith("diffusion-align") for c in found) >= 7
    environment = Path(sys.prefix)
    stamp = environment / ".diffusion-align-"  # the environment is this one: nothing to install
    fresh = not stamp.exists()
    stamp.touch()
    try:
        for command in found:
            words = shlex.split(command)
            env = {
                "VIRTUAL_ENV": str(environment),
                "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
                "HOME": str(workplace),
                "OMP_NUM_THREADS": "1",  # several would wait for each other beside other tests
            }
            if words[0] == "diffusion-align":
                doctor = UNCOUNTED if words[1] == "doctor" else ""
                run = forked(*shorter(words[1:], workplace), cwd=workplace, timeout=600, prelude=doctor)
                assert run.status == 0, f"{command}\n{run.outputs[0][-2000:]}\n{run.error[-2000:]}"
                continue
            words += ["epochs=1", *SHORT_IMAGES] if words[1] == "scripts/quickstart.sh" else []
            done = subprocess.run(words, cwd=workplace, env=env, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    finally:
        if fresh:
            stamp.unlink()
    assert (workplace / "runs/quickstart/report.html").is_file()
    assert (workplace / "runs/quickstart/final/pytorch_lora_weights.safetensors").is_file()
    assert (workplace / "images/grid.png").is_file()
    figures = list((workplace / "figures").glob("*.png"))
    assert figures
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_every_python_block_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert blocks(README, "python")
    for _, block in blocks(README, "python"):
        exec(compile(shorter_code(block), "README.md", "exec"), {"__name__": "readme"})
    assert (workplace / "lion.png").is_file()
    assert (workplace / "runs/blue/merged/model_index.json").is_file()
    assert (workplace / "runs/brief/merged/model.safetensors").is_file()


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README links to {missing}"
