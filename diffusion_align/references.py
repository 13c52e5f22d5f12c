"""References to a user's own code, ``package.module:name`` or ``path/to/file.py:name``: rewards, methods, callbacks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusion_align.errors import UserError, did_you_mean, foreign_code, short
from diffusion_align.inputs import check_path

_OF_FILES = "diffusion_align_file_"
"""What the names of modules begin with that are files of the user's."""


def resolve(reference: Any, what: str, *, noun: str = "function", error: type[UserError] = UserError) -> Any:
    """The object that a reference names; anything but text is that object itself.

    Args:
        reference: ``package.module:name``, ``path/to/file.py:name`` (``~`` is expanded), or an object.
        what: what it is for, as sentences begin: "reward", "method", "callback".
        noun: what sentences call the object, such as "function" or "Class".
        error: what is raised.

    Raises:
        UserError: an ``error`` of one sentence: no such file, module or name in it, or its code raised.
    """
    if not isinstance(reference, str):
        return reference
    module = module_of(reference, what, noun=noun, error=error)
    place, _, name = reference.rpartition(":")
    found = getattr(module, name, None)
    if found is None:
        public = (one for one in vars(module) if not one.startswith("_"))
        raise error(f"'{place}' has no '{name}'{_near(name, public)}")
    return found


def module_of(reference: str, what: str, *, noun: str = "function", error: type[UserError] = UserError) -> ModuleType:
    """The module that a reference leads to; see ``resolve``."""
    if reference:
        check_path(reference, f"{what} {short(reference)}", error=error)
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise error(f"{what} '{reference}' must read 'package.module:{noun}' or 'path/to/file.py:{noun}'")
    if not place.endswith(".py"):
        here = f"; for a file in this folder write '{place}.py:{name}'" if Path(f"{place}.py").is_file() else ""
        with foreign_code(f"{what} '{reference}' cannot be imported (", f"){here}", error=error):
            return importlib.import_module(place)
    path = Path(place).expanduser()
    check_path(place, f"{what} file {short(place)}", "file", error=error)
    if not path.is_file():
        near = _near(path.name, (one.name for one in path.parent.glob("*.py")))
        raise error(f"{what} file '{path}' does not exist{near}")
    with foreign_code(f"{what} '{reference}' cannot be imported (", ")", error=error):
        return _run_once(path)


def reference_to(kind: type) -> str:
    """What ``resolve`` finds a class by."""
    return f"{place_of(kind.__module__)}:{kind.__qualname__}"


def place_of(module: str) -> str:
    """What stands in a reference for the module of this name: the file, if it is one of the user's."""
    return str(sys.modules[module].__file__) if module.startswith(_OF_FILES) else module


def _run_once(path: Path) -> ModuleType:
    """The module in a file, run once per version of the file: whoever refers to it shares it."""
    name = f"{_OF_FILES}{path.stem}_{abs(hash((path.resolve(), path.stat().st_mtime_ns)))}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _near(name: str, known: Iterable[str]) -> str:
    meant = did_you_mean(name, known, cutoff=0.7)
    return f": {meant}" if meant else ""
