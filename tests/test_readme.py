"""Every command and every Python block of the README runs as it is printed, only with fewer and shorter epochs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusion_align.assets import shipped_prompts
from diffusion_align.methods import method_of
from diffusion_align.pipelines.configuration import shipped_configs
from diffusion_align.report import plots
from diffusion_align.training.config import load_yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORT = ["samples_per_epoch=8", "updates_per_epoch=1", "mixed_precision=no", "grid_every=0"]
SHORT_PICTURES = [*SHORT, "sampler.steps=2", "group_size=4"]
SHORT_TEXTS = [*SHORT, "sample_batch_size=8", "max_completion_length=12"]
ELSEWHERE = ("bash scripts/test.sh", "pip install")  # what runs this test, and what installed it


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(ELSEWHERE)]


def shortened(words: list[str]) -> list[str]:
    if words[:2] == ["diffusion-align", "train"]:
        epochs = "epochs=2" if "resume=true" in words else "epochs=1"
        few = ["pairs.max_pairs=16"] if words[2:] == ["dpo_emoji_style"] else []
        image = method_of(load_yaml(shipped_configs()[words[2]])["method"]).model_kind == "image"
        short = SHORT_PICTURES if image else SHORT_TEXTS
        return [word for word in words if not word.startswith("epochs=")] + [epochs, *few, *short]
    if words[:2] == ["diffusion-align", "pairs"]:
        words = [*words, "--steps=2", "--guidance-scale=1"]
    return [*words, "epochs=1", *SHORT_PICTURES] if words[:2] == ["bash", "scripts/quickstart.sh"] else words


def few_prompts(words: list[str], folder: Path) -> list[str]:
    """The first few of the list after ``--prompts``."""
    if "--prompts" not in words:
        return words
    place = words.index("--prompts") + 1
    few = folder / f"{words[place]}.txt"
    few.write_text("\n".join(shipped_prompts()[words[place]].read_text().splitlines()[:6]))
    return [*words[:place], str(few), *words[place + 1 :]]


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
            words = few_prompts(shortened(shlex.split(command)), workplace)
            env = {
                "VIRTUAL_ENV": str(environment),
                "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
                "HOME": str(workplace),
            }
            if words[0] == "diffusion-align":
                run = forked(*words[1:], cwd=workplace, timeout=600, plots="--plot" in words)
                assert run.status == 0, f"{command}\n{run.outputs[0][-2000:]}\n{run.error[-2000:]}"
                continue
            done = subprocess.run(words, cwd=workplace, env=env, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    finally:
        if fresh:
            stamp.unlink()
    assert (workplace / "runs/quickstart/report.html").is_file()
    assert (workplace / "runs/quickstart/final/pytorch_lora_weights.safetensors").is_file()
    assert (workplace / "pictures/grid.png").is_file()
    figures = list((workplace / "figures").glob("*.png"))
    assert figures
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_every_python_block_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(plots, "figure_png", lambda figure: b"")  # seconds a run; the quickstart draws its own
    assert len(blocks("python")) >= 1
    for block in blocks("python"):
        short = block.replace('"steps": 10', '"steps": 2').replace("epochs=2", "epochs=1")
        exec(compile(short, "README.md", "exec"), {"__name__": "readme"})
    assert (workplace / "lion.png").is_file()
    assert (workplace / "runs/blue/merged/model_index.json").is_file()
    assert (workplace / "runs/brief/merged/model.safetensors").is_file()


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README links to {missing}"
