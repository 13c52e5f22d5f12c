"""The environments that TRL runs in: made when first needed, outside the repository, and never this one.

Each sees the packages of the environment that makes it behind its own, so torch is the same build on both sides and
only what TRL needs in another version is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from diffusion_align.models.smollm2 import cache_folder

REQUIREMENTS = {
    "trl-0.23": ("trl==0.23.*", "diffusers<0.36", "transformers<5", "accelerate<1.12", "peft<0.18"),
    "trl-newest": ("trl",),
}
"""Environment -> what pip installs: the last TRL that has DDPO, with versions of its time; and the newest."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}


def default_folder() -> Path:
    """Beside converted models, in the user's cache."""
    return cache_folder() / "peers"


def python_of(name: str, folder: Path) -> Path:
    """The Python of environment ``name`` in ``folder``, made unless it is there as a whole."""
    place = folder / name
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    made, wanted = place / "requirements.txt", "\n".join(REQUIREMENTS[name])
    if made.is_file() and made.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {place}: pip install {' '.join(REQUIREMENTS[name])}", file=sys.stderr, flush=True)
    venv.create(place, clear=True, with_pip=True)
    own = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], encoding="utf-8"
    )
    seen = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (Path(own.strip()) / "seen.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")
    subprocess.run(install_command(python, name), check=True, env=environment())
    made.write_text(wanted, encoding="utf-8")  # last: without it the environment is made anew
    return python


def install_command(python: Path, name: str) -> list[str]:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-compile", "--no-warn-conflicts"]
    return [str(python), "-m", "pip", "install", *quiet, *REQUIREMENTS[name]]


def environment(**more: str) -> dict[str, str]:
    """Of a process that must not see this environment by other ways."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | more
