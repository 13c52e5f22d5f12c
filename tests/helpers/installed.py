"""An installed copy of the package: the wheel that pip builds with what is installed here, and no network."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PIP = [sys.executable, "-m", "pip"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation", "-q"]


def tree_without_links(target: Path) -> Path:
    """The sources as ``git clone -c core.symlinks=false`` writes them: a link is a small file that names its target."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("diffusion_align", "pipelines", "rewards", "configs"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pipelines", "rewards", "configs"):
        link = target / "diffusion_align" / name
        link.unlink()
        link.write_text(f"../{name}")
    return target


def build_wheel(source: Path, target: Path) -> Path:
    """Build as pip does; returns the file."""
    command = [*PIP, "wheel", *OFFLINE, "-w", target, source]
    built = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stderr
    return next(target.glob("*.whl"))


def environment_with(folder: Path, *requirements: object) -> Path:
    """The Python of a virtual environment of its own that has what is installed here, but for this project itself."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    python = folder / "bin" / "python"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (next(folder.glob("lib/*/site-packages")) / "theirs.pth").write_text("\n".join(packages))
    command = [
        python,
        "-I",
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        *OFFLINE,
        "--force-reinstall",
        *requirements,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return python
