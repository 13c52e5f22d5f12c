"""What a run is made of, by content: its model, data, images and rewards. Checkpoints hold it, and resume compares."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from diffusion_align.assets import EMBEDDED_MODELS, asset_path
from diffusion_align.data.image_pairs import PairSet
from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.ddpo import DDPOConfig
from diffusion_align.diffusion.dpo import DiffusionDPOConfig
from diffusion_align.diffusion.evaluation import Evaluation
from diffusion_align.errors import UserError
from diffusion_align.models.language_models import model_places
from diffusion_align.models.runs import ModelPlan, model_plan
from diffusion_align.references import module_of
from diffusion_align.rewards.resolve import IMAGES, TEXT, Kind, user_modules
from diffusion_align.training.digests import Identity, code_files, content_digest, file_digest, place_digest

Places = list[tuple[str, str | None]]


def image_identity(
    config: DDPOConfig | DiffusionDPOConfig,
    plan: ModelPlan,
    *,
    prompts: Sequence[Prompt],
    pairs: PairSet | None,
    evaluation: Evaluation | None,
    reward_places: Sequence[str],
    evaluation_places: Sequence[str],
) -> Identity:
    """Of a run on images.

    Args:
        config: checked settings.
        plan: of ``config.model``.
        prompts, pairs, evaluation: as the trainer has them.
        reward_places, evaluation_places: what the rewards were loaded from, by ``recorded``.
    """
    identity: Identity = {"model": _of_image_model(plan, config.base_config)}
    if prompts:
        identity["prompts"] = [_of_rows(config.prompts, prompts)]
    if pairs is not None:
        rows = (pairs.identity(i) for i in range(len(pairs)))
        identity["pairs"] = [_of_rows(getattr(config, "pairs", None), rows)]
    if config.reward is not None:
        identity["reward"] = _of_reward(config.reward, IMAGES, reward_places)
    if evaluation is not None and config.evaluation is not None:
        judged = _of_rows(config.evaluation.prompts or config.prompts, evaluation.prompts)
        identity["evaluation"] = [judged, *_of_reward(config.evaluation.reward, IMAGES, evaluation_places)]
    if ":" in config.sampler.name:
        identity["sampler"] = _of_code([module_of(config.sampler.name, "sampler")])
    return identity


def pairs_identity(model: str, judge: Any, judge_places: Sequence[str]) -> Identity:
    """Of pairs made by a model and chosen between by a judge; ``judge_places`` by ``recorded``."""
    plan = model_plan(model)
    return {"model": _of_image_model(plan, None), "judge": _of_reward(judge, IMAGES, judge_places)}


def text_identity(config: Any, data: dict[str, Sequence[Any]], reward_places: Sequence[str]) -> Identity:
    """Of a run on text.

    Args:
        config: checked settings of any text method.
        data: setting -> the rows read for it; those without rows are left out.
        reward_places: what the rewards were loaded from, by ``recorded``.
    """
    identity: Identity = {}
    for name in ("model", "reference_model"):
        if isinstance(model := getattr(config, name, None), str):
            identity[name] = _of_places(_language_model(model))
    identity |= {name: [_of_rows(getattr(config, name), rows)] for name, rows in data.items() if rows}
    if getattr(config, "reward", None) is not None:
        identity["reward"] = _of_reward(config.reward, TEXT, reward_places)
    return identity


def _of_image_model(plan: ModelPlan, base_config: str | None) -> Places:
    described = base_config or plan.base_config
    return _of_places([plan.base, *([described] if described else []), *map(str, plan.adapters)])


def _language_model(name: str) -> list[str]:
    try:
        return model_places(name)
    except UserError:  # a model in memory whose name leads nowhere
        return [name]


def _of_places(places: Iterable[str]) -> Places:
    return [(place, place_digest(asset_path(place) if place in EMBEDDED_MODELS else place)) for place in places]


def _of_rows(setting: Any, rows: Iterable[Any]) -> tuple[str, str]:
    """The rows as they are used: the same whatever kind of file, or list, they are read from."""
    source = getattr(setting, "source", None)
    return source if isinstance(source, str) else "the rows given", content_digest(rows)


def _of_reward(spec: Any, kind: Kind, places: Sequence[str]) -> Places:
    """The user's code, what the networks were loaded from, and files that options of the user's own rewards name.

    A function given in Python is known by its name alone: its source says nothing of the values it has closed over,
    bytecode differs between versions of Python, and a notebook defines it anew in every session.
    """
    others = [option for option in _texts(spec) if option not in places and _is_file(option)]
    return _of_code(user_modules(spec, kind)) + _of_places([*places, *others])


def _of_code(modules: Iterable[ModuleType]) -> Places:
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
