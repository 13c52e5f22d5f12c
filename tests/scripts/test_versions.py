"""The bounds in pyproject.toml, the files in constraints/, and the scripts that install by them and by none."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import newest
import pytest
import versions

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOWEST, TESTED = (versions.pins(ROOT / "constraints" / f"{name}.txt") for name in ("lowest", "tested"))


def bounds(requirements):
    """Package -> (operator, version) of requirements with one bound or none."""
    parts = (re.fullmatch(r"([\w.-]+)(?:(>=|==)([\w.]+))?", requirement).groups() for requirement in requirements)
    return {versions.normalized(name): (operator, version) for name, operator, version in parts}


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version))


@pytest.mark.parametrize("name", ["lowest", "tested"])
def test_constraints_are_public_versions_each_once(name):
    lines = [line for line in (ROOT / "constraints" / f"{name}.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[0-9][\w.]*", line) for line in lines), "no local versions, hosts or markers"
    assert len({versions.normalized(line.partition("==")[0]) for line in lines}) == len(lines)


def test_the_lowest_versions_are_the_bounds_and_the_tested_ones_are_within():
    required = bounds(PROJECT["dependencies"])
    for name, (operator, version) in required.items():
        assert operator == ">=", name
        have, want = numbers(LOWEST[name]), numbers(version)
        # 4.57 is met by 4.57.1 where there never was a 4.57.0
        assert have[: len(want)] == want, f"{name}: {LOWEST[name]} for {version}"
        assert not any(have[len(want) :][1:]), f"{name}: {LOWEST[name]} for {version}"
        assert numbers(TESTED[name]) >= want
    for name, (_, version) in bounds(EXTRAS["dev"]).items():
        assert version is None or numbers(TESTED[name]) >= numbers(version), name


def test_the_readme_says_what_the_files_say():
    text = (ROOT / "README.md").read_text()
    text = " ".join(text[text.index("Tested with Python") :].split())
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft"):
        assert re.findall(rf"\b{package} ([\d.]+\d)", text) == [TESTED[package], LOWEST[package]]


def test_the_core_tests_exist():
    listed = [line for line in (ROOT / "tests" / "core.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    assert len(listed) > 10
    places = [line.removeprefix("--deselect=").partition("::")[0] for line in listed]
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_what_is_installed_is_compared_with_the_file_both_ways(tmp_path, monkeypatch, capsys):
    file = tmp_path / "pins.txt"
    file.write_text("# why\nTorch==2.8.0\nPy_YAML==6.0  # old\nnever-needed==1.0\n")
    assert versions.pins(file) == {"torch": "2.8.0", "py-yaml": "6.0", "never-needed": "1.0"}
    right = {"torch": "2.8.0+cpu", "py-yaml": "6.0", "pip": "1", "diffusion-align": "0.1.0"}
    monkeypatch.setattr(versions, "installed", lambda: right)
    assert versions.main(file) == 0
    assert "py-yaml 6.0, torch 2.8.0+cpu\n" in capsys.readouterr().out
    monkeypatch.setattr(versions, "installed", lambda: right | {"torch": "2.9.0", "numpy": "2.0"})
    assert versions.main(file) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: numpy 2.0 is installed, and no version of it is in the file",
        "error: torch 2.9.0 is installed, and 2.8.0 is in the file",
    ]


def test_a_failed_newest_install_is_one_line_with_packages_and_versions(monkeypatch, capsys):
    required = newest.dependencies(ROOT / "pyproject.toml")
    assert required[:2] == ["torch", "diffusers"]
    found, tested = {"torch": "2.15.0", "peft": "0.22.0", "tqdm": "5.0"}, {"torch": "2.15.0", "peft": "0.21.2"}
    line = newest.sentence("importing it", "ValueError: no", found, ["torch", "peft"], tested)
    assert line == ("unconstrained install failed at importing it with peft 0.22.0 (tested: 0.21.2): ValueError: no")
    assert "with torch 2.15.0, peft 0.22.0: x" in newest.sentence("a", "x", found, ["torch", "peft"], {})
    monkeypatch.setattr(newest, "install", lambda folder, until: Path(sys.executable))
    # An environment that lacks what the project needs, as an incompatible release would leave it.
    code = "import os; os.write(1, bytes([255, 10])); import no_such_module"
    monkeypatch.setattr(newest, "STEPS", {"importing it": ["-c", code]})
    assert newest.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("unconstrained install failed at importing it with ")
    assert error.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")
    assert len(error.splitlines()) == 1


def test_the_newest_install_ends_in_time(tmp_path):
    with pytest.raises(newest.Failure, match="not done after 600 s in all"):
        newest.run([sys.executable, "-c", "import time; time.sleep(30)"], tmp_path, 0)


@pytest.mark.parametrize("missing", ["uv", ""])
def test_where_uv_cannot_be_installed_pip_installs(tmp_path, missing):
    python, log = tmp_path / "bin" / "python", tmp_path / "log"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\nfor last; do :; done\n[ "$last" != "{missing}" ]\n')
    python.chmod(0o755)
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    command = 'set -euo pipefail; . scripts/environment.sh "[dev]"'
    for _ in range(2):  # the second finds the stamp
        subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, check=True, capture_output=True)
    installer = "-m pip install" if missing else "-m uv pip install"
    asked = log.read_text().splitlines()
    assert len(asked) == 2
    assert asked[0].endswith(" uv")
    assert asked[1].startswith(installer)
    assert asked[1].endswith(" -c constraints/tested.txt -e .[dev]")


def test_a_stopped_newest_install_leaves_nothing(tmp_path):
    """Stopped while a child of its child is writing into the environment."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    script = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "newest.py")], env=environment)
    try:
        until = time.monotonic() + 30
        while not list(tmp_path.glob("*/venv/lib/*/site-packages")):
            assert script.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.3)
        script.terminate()
        assert script.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        script.kill()
    time.sleep(0.3)
    assert list(tmp_path.iterdir()) == []


def test_the_newest_install_needs_no_uv(tmp_path, monkeypatch):
    ran = []

    def run(command, folder, until):
        ran.append(command[1:])
        if command[-1] == "uv":
            raise newest.Failure("no uv for this machine")

    monkeypatch.setattr(newest, "run", run)
    newest.install(tmp_path, 0)
    assert ran[-1][:3] == ["-m", "pip", "install"]
    assert ran[-1][-1] == str(tmp_path / "source")
