"""The wheel: one top-level name, every file inside; test_examples.py runs the commands of the installed copy."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.installed import build_wheel, environment_with, tree_without_links

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(unpacked, tmp_path_factory):
    """A function that runs Python far away with the installed copy first on its path, and that copy's folder."""
    target = unpacked
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


def test_every_file_of_the_package_is_inside(wheel):
    wanted = set()
    for name in ("", "pipelines", "rewards", "configs"):  # the folders themselves, whether or not the links are there
        folder = ROOT / (name or "diffusion_align")
        found = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted |= {(Path("diffusion_align") / name / path.relative_to(folder)).as_posix() for path in found}
    inside = {info.filename: info.file_size for info in zipfile.ZipFile(wheel).infolist()}
    assert [name for name, size in inside.items() if size == 0] == ["diffusion_align/py.typed"]
    links = {f"diffusion_align/{name}" for name in ("pipelines", "rewards", "configs")}  # files where there are none
    assert wanted - links <= inside.keys()
    assert not links & inside.keys()


def test_data_folders_hold_no_code_and_the_assets_cannot_be_imported(installed):
    for name in ("assets", "configs"):
        assert not list((installed.target / "diffusion_align" / name).rglob("*.py"))
    result = installed("-c", "import diffusion_align.assets.prompts")
    assert result.stderr.strip().endswith("'diffusion_align.assets' is not a package")


def places(python, cwd):
    """Where Python finds the package and two of its linked folders."""
    modules = ("diffusion_align", "diffusion_align.pipelines", "diffusion_align.rewards")
    code = f"from importlib.util import find_spec\nfor name in {modules}: print(find_spec(name).origin)"
    result = subprocess.run([python, "-I", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return [Path(line) for line in result.stdout.splitlines()]


def test_an_editable_installation_without_links_finds_the_folders_themselves(tmp_path):
    (tmp_path / "tree").mkdir()
    tree = tree_without_links(tmp_path / "tree")
    python = environment_with(tmp_path / "environment", "-e", tree)
    folders = ("diffusion_align", "pipelines", "rewards")
    assert places(python, tmp_path) == [tree / name / "__init__.py" for name in folders]


@pytest.mark.slow
@pytest.mark.parametrize("links", ["true", "false"])
@pytest.mark.parametrize("editable", [True, False])
def test_a_clone_installs_and_trains(links, editable, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "-c", f"core.symlinks={links}", ROOT, clone], check=True, timeout=60)
    assert (clone / "diffusion_align/pipelines").is_symlink() == (links == "true")
    if editable:
        python = environment_with(tmp_path / "environment", "-e", clone)
    else:
        (tmp_path / "wheel").mkdir()
        built = build_wheel(clone, tmp_path / "wheel")
        python = environment_with(tmp_path / "environment", built)
    assert places(python, tmp_path)[0].is_relative_to(clone if editable else tmp_path / "environment")
    command = [python, "-I", "-m", "diffusion_align", "train", "quickstart", "epochs=1", "output_dir=run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/final/pytorch_lora_weights.safetensors").is_file()


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
