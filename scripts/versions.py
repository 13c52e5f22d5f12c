"""Print the installed packages and fail unless FILE names every one of them at its version: python versions.py FILE."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

UNPINNED = {"pip", "diffusion-align"}  # what came with the environment, and the project itself


def normalized(name: str) -> str:
    """A package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: Path) -> dict[str, str]:
    """Package -> version of the lines ``name==version`` of a constraints file."""
    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return {normalized(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def installed() -> dict[str, str]:
    """Package -> version of everything in this environment."""
    return {normalized(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}


def differences(found: dict[str, str], pinned: dict[str, str]) -> list[str]:
    """A sentence for every installed package that is not at its pinned version; of "1.0+cpu", 1.0 is the version."""
    return [
        f"{name} {version} is installed, and {pinned.get(name, 'no version of it')} is in the file"
        for name, version in sorted(found.items())
        if name not in UNPINNED and version.partition("+")[0] != pinned.get(name)
    ]


def main(file: Path) -> int:
    found = installed()
    print(f"{file} with Python {sys.version.split()[0]}:")
    print(", ".join(f"{name} {version}" for name, version in sorted(found.items()) if name not in UNPINNED))
    wrong = differences(found, pins(file))
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
