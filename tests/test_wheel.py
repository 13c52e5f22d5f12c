"""The wheel: one top-level name, every asset inside, and it works where it is installed, far from this repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from tiny_runs import IMAGE_RUN

ROOT = Path(__file__).parent.parent
INSIDE = [
    "__init__.py",
    "py.typed",
    "cli/__init__.py",
    "estimators/policy.py",
    "training/trainer.py",
    "diffusion/ddpo.py",
    "report/report.html.j2",
    "assets/NOTICE",
    "assets/emoji-concepts.tsv",
    "assets/prompts/emoji_concepts.txt",
    "assets/emoji-sd/model_index.json",
    "assets/emoji-sd/unet/diffusion_pytorch_model.safetensors",
    "assets/emoji-sd/vae/diffusion_pytorch_model.safetensors",
    "assets/emoji-sd/text_encoder/model.safetensors",
    "assets/emoji-sd/tokenizer/merges.txt",
    "assets/emoji-sd/scheduler/scheduler_config.json",
    "assets/emoji-clip/model.safetensors",
    "assets/emoji-clip/tokenizer/vocab.json",
    "assets/aesthetic_head.safetensors",
    "assets/tiny-lm/model.safetensors",
    "assets/tiny-lm/tokenizer.json",
    "assets/text-prompts/addition.jsonl",
    "assets/text-prompts/verses.txt",
    "llm/grpo.py",
    "rewards/base.py",
    "rewards/text/length.py",
    "rewards/jpeg.py",
    "pipelines/image.py",
    "pipelines/text.py",
    "configs/quickstart.yaml",
]
TINY = IMAGE_RUN | {"prompts": "emoji_concepts", "show_prompts": ["a cat"], "grid_every": 1}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as pip would build it, with what is installed here and no network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("diffusion_align", "pipelines", "rewards", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    built = subprocess.run([*command, "-w", target, source], capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs Python far away with the installed copy first on its path, and that copy's folder."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("rewards", "pipelines", "configs"):  # a user's own folders of the same names
        (elsewhere / name).mkdir()
        (elsewhere / name / "__init__.py").write_text("")
    environment = os.environ | {
        "PYTHONPATH": str(target),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    run.target, run.elsewhere = target, elsewhere
    return run


def test_one_top_level_name(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"diffusion_align"}


@pytest.mark.parametrize("name", INSIDE)
def test_is_inside(wheel, name):
    info = zipfile.ZipFile(wheel).getinfo(f"diffusion_align/{name}")
    assert info.file_size > 0 or name == "py.typed"


def test_every_file_of_the_package_is_inside(wheel):
    package = ROOT / "diffusion_align"
    wanted = set()
    for folder in (package, *(package / name for name in ("pipelines", "rewards", "configs"))):
        found = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted |= {path.relative_to(ROOT).as_posix() for path in found}
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_licences_are_in_the_metadata(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert any(n.endswith("NOTICE") and ".dist-info/licenses/" in n for n in names)
    metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Dist: torch" in text


def test_it_is_a_few_tens_of_megabytes_at_most(wheel):
    assert wheel.stat().st_size < 60e6


def test_the_installed_copy_is_what_runs_and_its_names_work_beside_a_users_folders(installed):
    result = installed(
        "-c",
        "import diffusion_align, diffusion_align.rewards as r, diffusion_align.pipelines as p, rewards\n"
        "print(diffusion_align.__file__, r.__file__, p.__file__, sep='\\n')\nprint(rewards.__file__)",
    )
    assert result.returncode == 0, result.stderr
    ours, users = result.stdout.splitlines()[:3], result.stdout.splitlines()[3]
    assert all(Path(path).is_relative_to(installed.target) for path in ours)
    assert Path(users).is_relative_to(installed.elsewhere)


def test_list(installed):
    result = installed("-m", "diffusion_align", "list")
    assert result.returncode == 0, result.stderr
    for name in ("quickstart", "emoji-sd", "emoji_concepts", "jpeg_compressibility"):
        assert name in result.stdout


def test_doctor_reads_a_shipped_recipe(installed):
    result = installed("-m", "diffusion_align", "doctor", "quickstart")
    assert result.returncode == 0, result.stderr
    assert "no problem found" in result.stdout


def test_a_training_run(installed):
    (installed.elsewhere / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    code = (
        "import sys, diffusion_align.training.trainer as loop\n"
        "from diffusion_align.cli import main\n"
        "print(loop.__file__)\nsys.argv = ['diffusion-align', 'train', 'tiny.yaml']\nmain()"
    )
    result = installed("-c", code)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.splitlines()[0]).is_relative_to(installed.target)
    run = installed.elsewhere / "run"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "final/pytorch_lora_weights.safetensors",
        "samples/before_after.png",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "checkpoints").glob("step_*"))
