"""What a reward's name or reference stands for, and which options it takes. Nothing here loads a model."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffusion_align.rewards.base import RewardError, describe_exception

# name: (module, function that builds it). The module says the rest in ABOUT[function].
REWARDS: dict[str, tuple[str, str]] = {
    "aesthetic": ("diffusion_align.rewards.aesthetic", "aesthetic"),
    "clip_score": ("diffusion_align.rewards.clip_score", "clip_score"),
    "jpeg_compressibility": ("diffusion_align.rewards.jpeg", "jpeg_compressibility"),
    "jpeg_incompressibility": ("diffusion_align.rewards.jpeg", "jpeg_incompressibility"),
}
CONTEXT = ("model", "device")  # given by build_reward to builders and classes that name them


def find(source: str) -> tuple[str, Any, Callable[..., str | None] | None]:
    """What a string names: label, object, and the function that checks its options (built-in rewards only)."""
    if source in REWARDS:
        module_name, function = REWARDS[source]
        module = importlib.import_module(module_name)
        return source, getattr(module, function), getattr(module, f"{function}_problem", None)
    place, colon, attribute = source.rpartition(":")
    if not colon:
        near = get_close_matches(source, REWARDS, n=1, cutoff=0.5)
        meant = f"did you mean '{near[0]}'? There are" if near else "there are"
        raise RewardError(
            f"unknown reward '{source}': {meant} {', '.join(REWARDS)}, "
            "or your own as 'module:function' or 'file.py:function'"
        )
    if not place or not attribute:
        raise RewardError(f"reward '{source}' must read 'package.module:function' or 'path/to/file.py:function'")
    try:
        module = _import_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except RewardError:
        raise
    except Exception as error:
        hint = f"; for a file in this folder write '{place}.py:{attribute}'" if Path(f"{place}.py").is_file() else ""
        raise RewardError(f"reward '{source}' cannot be imported ({describe_exception(error)}){hint}") from error
    target = getattr(module, attribute, None)
    if target is None:
        near = get_close_matches(attribute, [name for name in vars(module) if not name.startswith("_")], n=1)
        raise RewardError(f"'{place}' has no '{attribute}'" + (f": did you mean '{near[0]}'?" if near else ""))
    if not callable(target):
        raise RewardError(f"reward '{source}' is a {type(target).__name__}: name a function or a class")
    return attribute, target, None


def _import_file(path: Path) -> Any:
    """The module in a file, run once per version of the file: checking a spec and building it share it."""
    if not path.is_file():
        raise RewardError(f"reward file '{path}' does not exist")
    name = f"diffusion_align_reward_{path.stem}_{abs(hash((path.resolve(), path.stat().st_mtime_ns)))}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def is_builder(target: Any) -> bool:
    """Whether ``target`` makes a reward (a class, or one of our builders) rather than being one."""
    builders = {(module, function) for module, function in REWARDS.values()}
    return inspect.isclass(target) or (getattr(target, "__module__", ""), getattr(target, "__name__", "")) in builders


def check_options(label: str, target: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that ``target`` does not take, naming the nearest one that it does, and required ones left out."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not is_builder(target):
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) < 3 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise RewardError(
                f"reward '{label}' must take three arguments (images, prompts, metadata), it takes {len(positional)}"
            )
        named = [p for p in named if p not in positional[:3]]
    allowed = [p.name for p in named if p.name != "model" or inspect.isclass(target)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in options:
            if key not in allowed:
                near = get_close_matches(str(key), [*allowed, "scale"], n=1, cutoff=0.5)
                meant = f"did you mean '{near[0]}'? It takes" if near else "it takes"
                raise RewardError(
                    f"reward '{label}' has no option '{key}': {meant} {', '.join(sorted([*allowed, 'scale']))}"
                )
    missing = [p.name for p in named if p.default is p.empty and p.name not in options and p.name not in CONTEXT]
    if missing:
        raise RewardError(f"reward '{label}' needs the option '{missing[0]}'")
