"""What a plain install gives today still works: the newest versions in a fresh environment, a few steps of each kind.

Imports, a text epoch with LoRA and one without, an image epoch. A failure is one line that names the packages and their
versions. The environment is removed afterwards, also where this is stopped. Run it with any Python:
``python scripts/newest.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from versions import normalized, pins

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # for all of it
FEW = ["epochs=1", "samples_per_epoch=8", "updates_per_epoch=1", "grid_every=0"]
TEXT = ["grpo_tiny", *FEW, "sample_batch_size=8", "max_completion_length=16"]
STEPS = {
    "importing it": ["-c", "import diffusion_align.pipelines, diffusion_align.estimators, diffusion_align.cli"],
    "a text epoch with LoRA": ["-m", "diffusion_align", "train", *TEXT, "output_dir=lora"],
    "a text epoch without LoRA": ["-m", "diffusion_align", "train", *TEXT, "output_dir=full", "lora=null"],
    "an image epoch": ["-m", "diffusion_align", "train", "quickstart", *FEW, "sampler.steps=3", "output_dir=image"],
}
_LIST = """
import importlib.metadata, json
print(json.dumps({found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}))
"""


class Failure(Exception):
    """A command failed; the text says what it printed that matters, in one line."""


def dependencies(project: Path) -> list[str]:
    """The names of the packages that pyproject.toml requires, without extras."""
    required = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [normalized(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in required]


def sentence(step: str, cause: str, found: dict[str, str], required: list[str], tested: dict[str, str]) -> str:
    """One line: the step, the required packages that are not at their tested version (all, if each is), the cause."""
    differ = {name: version for name, version in found.items() if name in tested and version != tested[name]}
    named = [f"{name} {version} (tested: {tested[name]})" for name, version in sorted(differ.items())]
    if not named:
        named = [f"{name} {found[name]}" for name in required if name in found]
    return f"unconstrained install failed at {step} with {', '.join(named) or 'nothing installed'}: {cause}"


def last_line(output: str) -> str:
    """What a command said last: its error, or a traceback's."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def run(command: list[str], folder: Path, until: float) -> str:
    """The output of a command in ``folder``, which ends by the time ``until``; Failure where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "", "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(until - time.monotonic(), 1))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # its children too, which would go on writing
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failure(f"not done after {SECONDS} s in all") from None
            raise
    if process.returncode:
        raise Failure(last_line(output))
    return output


def install(folder: Path, until: float) -> Path:
    """The Python of a new environment with this project and whatever versions its bounds allow today."""
    source, python = folder / "source", folder / "venv" / "bin" / "python"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("diffusion_align", "pipelines", "rewards", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "venv", str(folder / "venv")], folder, until)
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    try:
        run([str(python), *pip, "uv"], folder, until)
        run([str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python), str(source)], folder, until)
    except Failure:  # uv is not there for every machine and does not read pip's settings (an index of one's own)
        run([str(python), *pip, str(source)], folder, until)
    return python


def main() -> int:
    start = time.monotonic()
    until, step, found = start + SECONDS, "installing it", dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="diffusion-align-newest-", ignore_cleanup_errors=True) as name:
        try:
            python = install(Path(name), until)
            print(f"unconstrained install: {time.monotonic() - start:.0f} s", flush=True)
            listed = json.loads(run([str(python), "-c", _LIST], Path(name), until))
            found = {normalized(package): version for package, version in listed.items()}
            required = dependencies(ROOT / "pyproject.toml")
            print(", ".join(f"{package} {found[package]}" for package in required), flush=True)
            for step, arguments in STEPS.items():
                begin = time.monotonic()
                run([str(python), *arguments], Path(name), until)
                print(f"{step}: {time.monotonic() - begin:.0f} s", flush=True)
        except Failure as failure:
            tested, required = pins(ROOT / "constraints" / "tested.txt"), dependencies(ROOT / "pyproject.toml")
            print(sentence(step, str(failure), found, required, tested), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
