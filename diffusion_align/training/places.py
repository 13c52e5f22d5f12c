"""Names of models, data and code in settings: which are paths, and where a path leads whoever reads it later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_align.assets import embedded_names

BASE = "base"
"""The folder of a run with the model it was trained on, where that was in no folder."""
_MODELS = ("model", "reference_model", "base_config")
_CODE = ("method", "callbacks", "reward", "sampler", "family")
_DATA = ("prompts", "dataset", "eval_dataset", "pairs")
# Options of rewards that name a file or a folder; of others a value with a separator in it does, where it is there.
_REWARD_PLACES = {"weights", "head", "clip", "model", "base", "encoder", "token_file", "cache"}


def is_base_of_run(model: str) -> bool:
    """Whether ``model`` is what a run has written to its ``base/``."""
    place = Path(os.path.expanduser(model))
    return place.name == BASE and os.path.isfile(place.parent / "config.yaml")


def looks_like_path(name: str) -> bool:
    """Whether ``name`` can be no Hub id ("owner/name"), nor a bare name."""
    return os.path.isabs(os.path.expanduser(name)) or name.startswith((".", "~")) or name.count("/") > 1


def found_from(run: Path, name: str) -> str | None:
    """What ``name`` in the configuration of ``run`` stands for.

    An embedded name or an absolute path is itself, but that the run's own ``base/`` moves with it. A relative path, as
    older versions wrote, is looked for around the run, in its parents from the nearest on, and only then in the current
    folder. What is nowhere is a Hub id, or None if it cannot be one.
    """
    path = os.path.expanduser(name)
    if os.path.isabs(path) and os.path.basename(path) == BASE and not _exists(path):
        path = next((str(place / BASE) for place in (run, run.parent) if _exists(place / BASE)), path)
    if name in embedded_names() or os.path.isabs(path):
        return path if os.path.isabs(path) else name
    for parent in run.resolve().parents:
        if _exists(parent / path):
            return str(parent / path)
    if _exists(path):
        return os.path.abspath(path)
    return None if looks_like_path(name) else name


def absolute_paths(settings: Mapping[str, Any], run: Path | None = None) -> dict[str, Any]:
    """Settings, as YAML or Python give them, whose paths lead to the same place from every folder.

    Embedded and shipped names, Hub ids and what is not there stay as they are.

    Args:
        settings: of any method.
        run: the run folder, if they are from a configuration that was written by another process: see ``found_from``.
    """

    def absolute(name: Any) -> Any:
        if not isinstance(name, str | os.PathLike) or not os.fspath(name) or os.fspath(name) in embedded_names():
            return name
        text = os.fspath(name)
        if run is not None:
            return found_from(run, text) or text
        return os.path.abspath(os.path.expanduser(text)) if _exists(os.path.expanduser(text)) else name

    def of_data(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {**value, "source": absolute(value["source"])} if "source" in value else value
        return absolute(value)

    def of_reward(value: Any) -> Any:
        if isinstance(value, str):
            place, colon, attribute = value.strip().rpartition(":")
            return f"{absolute(place)}:{attribute}" if colon and place.endswith(".py") else value
        if isinstance(value, list | tuple):
            return [of_reward(one) for one in value]
        if isinstance(value, Mapping):
            return {key: of_option(key, inner) for key, inner in value.items()}
        return value

    def of_option(key: Any, value: Any) -> Any:
        if key in ("name", "rewards"):
            return of_reward(value)
        if isinstance(value, str) and (key in _REWARD_PLACES or os.sep in value):
            return absolute(value)
        return value

    def of_section(section: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(section)
        result |= {name: absolute(section[name]) for name in (*_MODELS, "diversity") if name in section}
        result |= {name: of_data(section[name]) for name in _DATA if name in section}
        result |= {name: of_reward(section[name]) for name in _CODE if name in section}
        if isinstance(section.get("evaluation"), Mapping):
            result["evaluation"] = of_section(section["evaluation"])
        return result

    result = of_section(settings)
    if isinstance(settings.get("output_dir"), str | os.PathLike) and os.fspath(settings["output_dir"]) and run is None:
        result["output_dir"] = os.path.abspath(os.path.expanduser(settings["output_dir"]))
    return result


def _exists(path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a NUL in it
        return False
