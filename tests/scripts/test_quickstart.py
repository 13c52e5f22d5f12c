"""``scripts/quickstart.sh`` runs where it is called, so that the commands it prints can be pasted there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("here", [True, False])
def test_it_runs_in_the_callers_folder_and_with_the_callers_path(tmp_path, here):
    clone, environment = tmp_path / "a clone", tmp_path / "env"
    for folder in (clone / "constraints", environment / "bin"):
        folder.mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    (clone / "pyproject.toml").touch()
    (clone / "constraints" / "tested.txt").touch()
    (environment / ".diffusion-align-").touch()  # there is nothing to install
    program = environment / "bin" / "diffusion-align"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$PATH" "$@"\n')
    program.chmod(0o755)
    folder = clone if here else tmp_path
    path = os.environ["PATH"]
    environ = {"VIRTUAL_ENV": str(environment), "PATH": path}
    command = ["bash", str((clone / "scripts" / "quickstart.sh").relative_to(folder)), "epochs=2"]
    run = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=True)
    output_dir = [] if here else [f"output_dir={clone}/runs/quickstart"]
    assert run.stdout.splitlines() == [str(folder), path, "train", "quickstart", *output_dir, "epochs=2"]
