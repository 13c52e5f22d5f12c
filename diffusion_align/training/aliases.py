"""Other names of settings: those of TRL and diffusers, and those of older versions.

A section declares them (``Section.aliases``). They are accepted wherever settings are given or read; what is checked,
compared on resume and written to ``config.yaml`` has the settings' own names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, BeforeValidator

from diffusion_align.training.annotations import section_of


@functools.cache
def aliases_of(section: type[BaseModel]) -> dict[str, str]:
    """Alias -> the setting of ``section`` or its bases, dotted where it is in a section below."""
    return {other: name for kind in reversed(section.__mro__) for other, name in vars(kind).get("aliases", {}).items()}


def are_settings(section: type[BaseModel], value: Any) -> bool:
    """Whether ``value`` is a mapping of settings, and not rows in a mapping of their own, as a ``DatasetDict`` is."""
    known = {*section.model_fields, *aliases_of(section)}
    return isinstance(value, Mapping) and (type(value) is dict or not known.isdisjoint(value))


def canonical(section: type[BaseModel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` of ``section`` and of the sections below under their own names.

    What is given under two names keeps both, which the section refuses.
    """
    result = dict(settings)
    for other, name in aliases_of(section).items():
        if other in result:
            _rename(result, other, name.split("."))
    for key in result.keys() & section.model_fields.keys():
        inner = section_of(section.model_fields[key].annotation)
        if inner is not None and are_settings(inner, result[key]):
            result[key] = canonical(inner, result[key])
    return result


def canonical_place(section: type[BaseModel], place: Sequence[str]) -> list[str]:
    """The keys that lead to a setting below ``section``, by its own name, from those that were typed."""
    first, *below = place
    first, *below = [*aliases_of(section).get(first, first).split("."), *below]
    field = section.model_fields.get(first)
    inner = section_of(field.annotation) if field and below else None
    return [first, *(below if inner is None else canonical_place(inner, below))]


def formerly_beside(experimental: type[BaseModel]) -> dict[str, str]:
    """For ``Section.aliases``: the settings of ``experimental`` stood beside that section in older versions."""
    return {name: f"experimental.{name}" for name in experimental.model_fields}


def one_by_one(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with those of the section ``experimental`` under their dotted names."""
    rare = settings.get("experimental")
    if not isinstance(rare, Mapping):  # of a user's method it may be something else
        return dict(settings)
    others = {name: value for name, value in settings.items() if name != "experimental"}
    return others | {f"experimental.{name}": value for name, value in rare.items()}


def other_words(**words: str) -> BeforeValidator:
    """For ``Annotated``: other words for a setting's value -> the value."""
    return BeforeValidator(lambda value: words.get(value, value) if isinstance(value, str) else value)


def _rename(settings: dict[str, Any], other: str, place: Sequence[str]) -> None:
    *parents, last = place
    target = settings
    for parent in parents:
        inner = target.get(parent, {})
        if isinstance(inner, BaseModel):
            inner = {key: getattr(inner, key) for key in inner.model_fields_set}
        if not isinstance(inner, Mapping):
            del settings[other]  # what stands in place of the section is the error
            return
        target[parent] = dict(inner)
        target = target[parent]
    if last not in target:
        target[last] = settings.pop(other)
