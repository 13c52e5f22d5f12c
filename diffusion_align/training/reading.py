"""From YAML and ``key=value`` overrides to checked settings, and back to YAML."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ValidationError,
)

from diffusion_align import yaml_text
from diffusion_align.errors import ConfigError, short
from diffusion_align.inputs import check_path
from diffusion_align.training.aliases import canonical, canonical_place
from diffusion_align.training.annotations import kinds_of, section_of
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.section import sentences
from diffusion_align.yaml_text import EXPONENT, Unread, YamlProblem, odd_number

_ROWS = ("prompts", "dataset", "eval_dataset", "pairs")
"""Settings of which a source alone stands for a section, see ``RowsConfig``."""


def load_yaml(path: Path, *, unread: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file, or a ConfigError with one sentence; ``unread`` as in ``yaml_text.parse``."""
    check_path(path, short(str(path)), "file", error=ConfigError)
    try:
        raw = yaml_text.read(path, unread=unread)
    except FileNotFoundError:
        raise ConfigError([f"there is no configuration file {path}"]) from None
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from None
    except YamlProblem as error:
        raise ConfigError([f"{path} is not valid YAML{error.where}: {error}"]) from None
    if raw is None:
        raise ConfigError([f"{path} holds no settings: write a mapping of them, as in epochs: 3"])
    if not isinstance(raw, dict):
        kind = "text" if isinstance(raw, Unread | str) else f"a {type(raw).__name__}"
        raise ConfigError([f"{path} must hold a mapping of settings, not {kind}"])
    return raw


def apply_overrides(
    raw: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    unread: bool = False,
    section: type[BaseModel] | None = None,
) -> dict[str, Any]:
    """``raw`` with ``dotted.key=value`` strings applied; values are YAML, ``unread`` as in ``yaml_text.parse``.

    Where rows are given by their source alone (``prompts: verses``), ``prompts.max_rows=8`` is set beside it.

    Args:
        section: whose settings they are, if it is known: what an override names by an alias replaces the setting.

    Raises:
        ConfigError: an override is not of the form, its value is not YAML, or two name a setting in different ways.
    """
    result = _copy(raw if section is None else canonical(section, raw))
    typed: dict[str, str] = {}
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            problems.append(f"{short(override)} is not of the form key=value")
            continue
        place = key.split(".") if section is None else canonical_place(section, key.split("."))
        if (before := typed.setdefault(".".join(place), key)) != key:
            problems.append(f"{short(before)} and {short(key)} are one setting: give one of them")
            continue
        *parents, last = place
        try:
            value = yaml_text.parse(text, unread=True)
            if not unread:
                value = yaml_text.natural({last: value})[last]
        except YamlProblem as error:
            problems.append(f"the value of {short(override)} is not valid YAML: {error}")
            continue
        target = result
        for parent in parents:
            given = target.get(parent) if isinstance(target, dict) else None
            if parent in _ROWS and given is not None and not isinstance(given, dict):
                target[parent] = {"source": given}
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None  # type: ignore[assignment]
            if not isinstance(target, dict):
                problems.append(f"{short(key)} cannot be set: {short(parent)} is not a section")
                break
        else:
            target[last] = value
    if problems:
        raise ConfigError(problems)
    return result


def read_as(wanted: Any, value: Any) -> Any:
    """``value`` with every ``Unread`` word in it text, a number, true or false, as what is wanted says.

    Settings of a ``Section`` come under their own names.

    Args:
        wanted: a type as annotations have it, or a ``Section``.
        value: from ``load_yaml(..., unread=True)``. Of what is read already, texts like 1e-4 become numbers where
            numbers are wanted.

    Raises:
        ConfigError: a word in a place of which no type is known may be read as more than one number.
    """
    section = section_of(wanted)
    if section is not None and isinstance(value, Mapping):
        value = canonical(section, value)
    try:
        return _read_as(wanted, value)
    except YamlProblem as error:
        raise ConfigError([f"{'.'.join(error.place)}: {error}{error.where}".removeprefix(": ")]) from None


def parse_config(
    model: type[TrainingConfig],
    raw: Mapping[str, Any],
    *,
    problems: Sequence[str] = (),
    context: Mapping[str, Any] | None = None,
) -> TrainingConfig:
    """``model`` filled from ``raw``; every problem is reported at once.

    Args:
        model: the method's configuration.
        raw: nested mapping, as YAML gives it.
        problems: what else is known to be wrong (a missing file).
        context: None, ``WITHOUT_NAMES`` or ``FIELDS_ALONE``.

    Raises:
        ConfigError: with one sentence for each problem.
    """
    try:
        config = model.model_validate(read_as(model, raw), context=context)
    except ValidationError as error:
        problems = [*sentences(model, error), *problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML."""
    return yaml_text.dump(config.model_dump(mode="json"), sort_keys=False)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return list(value) if isinstance(value, list) else value


def _read_as(wanted: Any, value: Any) -> Any:
    kinds = kinds_of(wanted)
    section = section_of(wanted)
    if isinstance(value, Mapping):
        if section is not None:
            fields = section.model_fields
            return {k: _read_below(fields[k].annotation if k in fields else Any, k, v) for k, v in value.items()}
        inner = next((typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict), Any)
        if inner is Any:
            return yaml_text.natural(_copy(value))
        return {k: _read_below(inner, k, v) for k, v in value.items()}
    if section is not None and section.stands_for is not None and isinstance(value, Unread | list):
        return _read_as(section.model_fields[section.stands_for].annotation, value)
    if isinstance(value, list):
        return _read_list(kinds, value)
    if isinstance(value, str):
        exponent = {int, float} & set(kinds) and EXPONENT.fullmatch(value)
        number = Unread(value, 0).number() if exponent else None
        return value if number is None else number
    if not isinstance(value, Unread):
        return value
    if value.is_null:
        return None
    if {int, float} & set(kinds):
        number = value.number()
        return value.text if number is None and odd_number(value.text) else value.natural()
    if bool not in kinds and any(_is_text(kind) for kind in kinds):
        # YAML 1.1 has several words for `no`.
        is_no = value.is_false and any("no" in typing.get_args(kind) for kind in kinds)
        return "no" if is_no else value.text
    return value.natural()


def _read_below(wanted: Any, key: Any, value: Any) -> Any:
    try:
        return _read_as(wanted, value)
    except YamlProblem as problem:
        problem.place.insert(0, str(key))
        raise


def _read_list(kinds: list[Any], value: list[Any]) -> list[Any]:
    for kind in kinds:
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is list and inner[0] is Any:
            return list(yaml_text.natural(value, rows=True))
        if typing.get_origin(kind) is list:
            return [_read_as(inner[0], item) for item in value]
        if typing.get_origin(kind) is tuple and Ellipsis not in inner:
            return [_read_as(inner[i] if i < len(inner) else inner[-1], item) for i, item in enumerate(value)]
    return list(yaml_text.natural(value))


def _is_text(kind: Any) -> bool:
    literal = typing.get_origin(kind) is Literal
    return kind in (str, Path) or (literal and all(isinstance(one, str) for one in typing.get_args(kind)))
