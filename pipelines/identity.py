"""What a run is made of, by content: its model, data, images and rewards. Checkpoints hold it, and resume compares."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

from diffusion_align.assets import EMBEDDED_MODELS, asset_path
from diffusion_align.errors import UserError
from diffusion_align.models.language_models import model_places
from diffusion_align.models.model_ref import ModelRef, image_model_ref
from diffusion_align.rewards.build import IMAGES, TEXT, Kind, user_modules
from diffusion_align.training.digests import Identity, code_files, content_digest, file_digest, place_digest

Places = list[tuple[str, str | None]]


def pairs_identity(model: str, judge: Any, judge_places: Sequence[str], kind: Literal["image", "text"]) -> Identity:
    """Of pairs made by a model and chosen between by a judge; ``judge_places`` by ``recorded``."""
    if kind == "text":
        return {"model": language_model_content(model), "judge": reward_content(judge, TEXT, judge_places)}
    plan = image_model_ref(model)
    return {"model": image_model_content(plan, None), "judge": reward_content(judge, IMAGES, judge_places)}


def image_model_content(plan: ModelRef, base_config: str | None) -> Places:
    described = base_config or plan.base_config
    return _of_places([plan.base, *([described] if described else []), *map(str, plan.adapters)])


def language_model_content(name: str) -> Places:
    try:
        return _of_places(model_places(name))
    except UserError:  # a model in memory whose name leads nowhere
        return _of_places([name])


def _of_places(places: Iterable[str]) -> Places:
    return [(place, place_digest(asset_path(place) if place in EMBEDDED_MODELS else place)) for place in places]


def rows_content(setting: Any, rows: Iterable[Any]) -> tuple[str, str]:
    """The rows as they are used: the same whatever kind of file, or list, they are read from."""
    source = getattr(setting, "source", None)
    return source if isinstance(source, str) else "the rows given", content_digest(rows)


def reward_content(spec: Any, kind: Kind, places: Sequence[str]) -> Places:
    """The user's code, what the networks were loaded from, and files that options of the user's own rewards name.

    A function given in Python is known by its name alone: its source says nothing of the values it has closed over,
    bytecode differs between versions of Python, and a notebook defines it anew in every session.
    """
    others = [option for option in _texts(spec) if option not in places and _is_file(option)]
    return code_content(user_modules(spec)) + _of_places([*places, *others])


def code_content(modules: Iterable[ModuleType]) -> Places:
    """The user's own files that ``modules`` are made of."""
    files = dict.fromkeys(file for module in modules for file in code_files(module))
    return [(str(file), file_digest(file)) for file in files]


def _texts(spec: Any) -> list[str]:
    """Every text in a reward's setting but for names of rewards."""
    if isinstance(spec, Mapping):
        return [text for key, value in spec.items() if key != "name" for text in _texts(value)]
    if isinstance(spec, list | tuple):
        return [text for value in spec for text in _texts(value)]
    return [spec] if isinstance(spec, str) else []


def _is_file(text: str) -> bool:
    try:
        return os.path.isabs(text) and os.path.isfile(text)
    except ValueError:
        return False
