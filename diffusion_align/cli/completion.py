"""What a shell completes: names that are known without torch, and the files and run folders at hand.

Each function gets the command line so far and what was typed of a word, and gives the words, or (word, help) pairs,
that it may become; typer leaves out those that do not begin with it. ``options.completed_by`` names them.
"""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import Any, Literal

import typer
from pydantic import BaseModel

from diffusion_align import yaml_text
from diffusion_align.assets import EMBEDDED_PIPELINES, LANGUAGE_MODELS, shipped_prompts, shipped_text_prompts
from diffusion_align.cli.listing import LISTINGS, default_of, describe_recipe, grouped_settings
from diffusion_align.methods import DEFAULT, SHIPPED, outline_of, plug_ins
from diffusion_align.pipelines.configuration import shipped_configs
from diffusion_align.rewards import REWARDS, TEXT_REWARDS
from diffusion_align.training.annotations import section_of
from diffusion_align.training.reading import load_yaml

Words = list[str | tuple[str, str]]


def recipes(context: typer.Context, typed: str) -> Words:
    """Shipped recipes, YAML files, and folders on the way to some."""
    shipped: Words = [(name, describe_recipe(path)) for name, path in shipped_configs().items()]
    return shipped + [place for place in _places(typed) if place.endswith((".yaml", ".yml", "/"))]


def runs(context: typer.Context, typed: str) -> Words:
    """Run folders, which hold config.yaml: those here, those in runs/, and those in the folder typed so far."""
    here = [place.rstrip("/") for place in (*_places(typed), *_places("runs/"))]
    # Not Path.is_file, which raises of a folder that may not be entered.
    return [place for place in dict.fromkeys(here) if os.path.isfile(os.path.expanduser(f"{place}/config.yaml"))]


def models(context: typer.Context, typed: str) -> Words:
    """Embedded models and run folders."""
    return [*EMBEDDED_PIPELINES, *LANGUAGE_MODELS, *runs(context, typed)]


def image_rewards(context: typer.Context, typed: str) -> Words:
    return list(REWARDS)


def rewards(context: typer.Context, typed: str) -> Words:
    return [*REWARDS, *TEXT_REWARDS]


def prompt_lists(context: typer.Context, typed: str) -> Words:
    """Shipped lists of prompts; where none begins like this, a shell completes files by itself."""
    return [*shipped_prompts(), *shipped_text_prompts()]


def listings(context: typer.Context, typed: str) -> Words:
    return [*LISTINGS, "settings"]


def listed_names(context: typer.Context, typed: str) -> Words:
    """What may follow `list settings` and `list rewards`."""
    what = context.params.get("what")
    return rewards(context, typed) if what == "rewards" else [*SHIPPED, *plug_ins()] if what == "settings" else []


def overrides(context: typer.Context, typed: str) -> Words:
    """``key=`` of the settings of CONFIG, and behind it what it is now and its choices.

    bash takes ``key``, ``=`` and the value for three words, other shells for one.
    """
    before = list(context.params.get("overrides") or [])
    recipe, section = _recipe(str(context.params.get("config")), before)
    if before and before[-1] == "=":
        return _values(recipe, section, before[-2])
    if before and "=" not in before[-1]:
        return _values(recipe, section, before[-1])
    key, equals, _ = typed.partition("=")
    if equals:
        return [f"{key}={value}" for value in _values(recipe, section, key)]
    names = {row.name: row.text for group in grouped_settings(section, "") for row in group.rows}
    found: Words = [(f"{name}=", about) for name, about in names.items() if name.startswith(key)]
    if len(found) == 1:  # beside a second word that goes on, a shell adds no space behind "="
        name = found[0][0].rstrip("=")
        found += [f"{name}={value}" for value in _values(recipe, section, name)]
    return found


def _recipe(config: str, before: list[str]) -> tuple[dict[str, Any], type[BaseModel]]:
    """What a configuration holds, and the settings of its method, or of the one that was typed."""
    recipe = load_yaml(shipped_configs().get(config) or Path(config).expanduser())
    typed = [word.removeprefix("method=") for word in before if word.startswith("method=")]
    return recipe, outline_of((typed or [recipe.get("method", DEFAULT)])[-1]).config_class


def _values(recipe: dict[str, Any], section: type[BaseModel], key: str) -> Words:
    """What ``key`` is in the recipe or by default, and its choices, as YAML on one line."""
    *path, last = key.split(".")
    now: Any = recipe
    for name in path:
        inner = section_of(section.model_fields[name].annotation)
        if inner is None:
            return []
        section, now = inner, (now or {}).get(name)
    field = section.model_fields[last]
    is_set = last in (now or {})
    first = yaml_text.dump(now[last], default_flow_style=True).splitlines()[0] if is_set else default_of(field)
    choices: tuple[Any, ...] = ("true", "false") if field.annotation is bool else ()
    if typing.get_origin(field.annotation) is Literal:
        choices = typing.get_args(field.annotation)
    if key == "method":
        choices = tuple(SHIPPED)
    return list(dict.fromkeys([*([] if first is None else [first]), *map(str, choices)]))


def _places(typed: str) -> list[str]:
    """Files and folders (with "/" at the end) that begin with ``typed``, written as it is."""
    folder, name = os.path.split(typed)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
        for entry in found
        if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith("."))
    ]
