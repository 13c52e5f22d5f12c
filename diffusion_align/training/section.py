"""``Section``: a group of settings, and the sentence that each thing wrong with one becomes."""

from __future__ import annotations

import functools
import math
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticUndefined

from diffusion_align.bounds import LARGEST
from diffusion_align.errors import ConfigError, short
from diffusion_align.training.aliases import aliases_of, are_settings, canonical
from diffusion_align.training.annotations import kinds_of, section_of
from diffusion_align.training.hints import hint
from diffusion_align.yaml_text import odd_number


def _finite_enough(value: float) -> float:
    if not (-LARGEST <= value <= LARGEST or value == math.inf):
        raise ValueError(f"it must lie below {LARGEST:g}, or be .inf for no bound")
    return value


OrInfinite = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_finite_enough)]
"""A bound that .inf takes away."""
Weight = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Absolute from the beginning: a reward may change the working directory.
Folder = Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(os.path.expanduser(path))))]
FIELDS_ALONE: dict[str, Any] = {"checks": ()}
"""The ``context`` for ``model_validate`` with which settings need not fit each other, nor name what can be used."""
WITHOUT_NAMES: dict[str, Any] = {"checks": ("cross_checks",)}
"""The one with which they need not name what can be used."""
_UNKNOWN = object()
"""Stands for the value of a setting that is wrong by itself, while the others are checked."""


class Section(BaseModel):
    """A group of settings; unknown keys are errors, and neither text nor true/false is taken for a number.

    Whoever makes one is told of everything that is wrong at once, ``cross_checks`` included: ``Section(...)`` raises a
    ConfigError with the sentences that YAML gets, ``model_validate`` pydantic's own error with the same problems.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())
    stands_for: ClassVar[str | None] = None
    """The field that a bare word or list in its place is, if there is one."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Another name of a setting -> the setting, dotted where it is in a section below; a class adds to its bases'.

    A setting may be given, overridden, read (``config.alias``), assigned and copied under either name; ``config.yaml``
    has its own.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for other in aliases_of(cls).keys() & cls.model_fields.keys():
            name = aliases_of(cls)[other]
            remedy = f"choose another name, or define {name} to change its default"
            raise ConfigError([f"{cls.__name__}.{other} is another name of {name}: {remedy}"])

    def cross_checks(self) -> Iterator[str]:
        """A generator of sentences about settings that do not fit each other; each begins with a setting's name.

        A class states only its own rules; those of its bases are checked as well. A setting that is wrong by itself
        reads as its default, or None; the next sentence after it was read is not reported.
        """
        return iter(())

    def name_checks(self) -> Iterator[str]:
        """The same about models and rewards that settings name and a run could not load."""
        return iter(())

    if not TYPE_CHECKING:

        def __init__(self, /, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ConfigError(sentences(type(self), error)) from None

        __init__.__pydantic_base_init__ = True  # sections within others are not made by it: theirs are one error

        def __getattr__(self, name: str) -> Any:
            if (place := aliases_of(type(self)).get(name)) is not None:
                return functools.reduce(getattr, place.split("."), self)
            unknown = self.__dict__.get("_unknown", {})
            if name not in unknown:
                return super().__getattr__(name)
            self.__dict__["_asked"] = True
            return unknown[name]

        def __setattr__(self, name: str, value: Any) -> None:
            *sections, name = aliases_of(type(self)).get(name, name).split(".")
            super(Section, functools.reduce(getattr, sections, self)).__setattr__(name, value)

        def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
            changes, aliases = dict(update or {}), aliases_of(type(self))
            for other in aliases.keys() & changes.keys():
                name, _, below = aliases[other].partition(".")
                value = changes.pop(other)
                section = changes.get(name, getattr(self, name))
                changes[name] = section.model_copy(update={below: value}) if below else value
            return super().model_copy(update=changes, deep=deep)

    @model_validator(mode="wrap")
    @classmethod
    def _everything_at_once(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Self:
        errors: list[InitErrorDetails] = []
        if are_settings(cls, value):
            value = canonical(cls, value)
            twice = {other: name for other, name in aliases_of(cls).items() if other in value}
            errors = [
                _again({"type": _TWICE, "msg": name, "loc": (other,), "input": value.pop(other)})
                for other, name in twice.items()
            ]
        config: Self | None
        try:
            config = handler(value)
        except ValidationError as error:
            config, errors = cls._without(error, value, handler), [*errors, *(_again(one) for one in error.errors())]
        if config is not None:
            wanted = (info.context or {}).get("checks", ("cross_checks", "name_checks"))
            rules = [sentence for checks in wanted for sentence in config._broken_rules(checks)]
            errors += [_again({"type": _RULE, "msg": rule, "loc": (), "input": None}) for rule in rules]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        assert config is not None
        return config

    @classmethod
    def _without(cls, error: ValidationError, value: Any, handler: ValidatorFunctionWrapHandler) -> Self | None:
        """The settings of ``value`` that are allowed, the others unknown; None if they cannot be told apart."""
        errors = [(one["type"], one["loc"]) for one in error.errors()]
        if not isinstance(value, Mapping) or any(not place for _, place in errors):
            return None
        extra = {place[0] for kind, place in errors if kind == "extra_forbidden" and len(place) == 1}
        wrong = {place[0]: _UNKNOWN for _, place in errors if place[0] not in extra}
        try:
            config: Self = handler({name: one for name, one in value.items() if name not in extra} | wrong)
        except Exception:  # a validator of somebody's own that cannot take what is no value
            return None
        instead = {}
        for name in [name for name, one in config.__dict__.items() if one is _UNKNOWN]:
            default = cls.model_fields[name].get_default(call_default_factory=True)
            instead[name] = None if default is PydanticUndefined else default
            del config.__dict__[name]  # so that __getattr__ is called
        config.__dict__["_unknown"] = instead
        return config

    def _broken_rules(self, checks: str) -> Iterator[str]:
        for kind in reversed(type(self).__mro__):
            self.__dict__.pop("_asked", None)
            rules = iter(vars(kind)[checks](self) if checks in vars(kind) else ())
            while True:
                try:
                    sentence = next(rules)
                except StopIteration:
                    break
                except Exception:
                    if "_asked" not in self.__dict__:
                        raise
                    break  # of None, in place of a setting that is not known
                if not self.__dict__.pop("_asked", False):
                    yield sentence

    @field_validator("*", mode="wrap")
    @classmethod
    def _only_numbers_are_numbers(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if value is _UNKNOWN:
            return value
        wanted = kinds_of(cls.model_fields[str(info.field_name)].annotation)
        words = [word for kind in wanted if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
        numeric, is_one = {int, float} & set(wanted), type(value) in wanted or value in words
        if isinstance(value, bool | str) and numeric and not is_one:
            odd = odd_number(value) if isinstance(value, str) else None
            raise ValueError(odd or " or ".join(["it must be a number", *words]))
        return handler(value)


_REQUIRED = " is required: set it"
_RULE = "settings_do_not_fit"
"""pydantic's type of the errors that ``cross_checks`` makes."""
_TWICE = "given_under_two_names"
"""The type of the error that a setting is given under its own name and under another."""


def _again(error: Any) -> InitErrorDetails:
    """One of ``ValidationError.errors()`` as what another is made of."""
    kind = PydanticCustomError(error["type"], "{sentence}", error.get("ctx", {}) | {"sentence": error["msg"]})
    return InitErrorDetails(type=kind, loc=error["loc"], input=error["input"])


def sentences(model: type[BaseModel], error: ValidationError, *, section: str | None = None) -> list[str]:
    """One about each thing that is wrong with the settings of ``model``, which are those of ``section``.

    What was given under a wrong name is not reported as missing, too.
    """
    found = list(dict.fromkeys(_sentence(model, dict(one), section) for one in error.errors()))
    hints = {one.rpartition(": ")[2] for one in found if one.startswith("unknown setting ")}
    missing = {one: one.removesuffix(_REQUIRED) for one in found if one.endswith(_REQUIRED)}
    return [
        one
        for one in found
        if one not in missing or hints.isdisjoint((f"set {missing[one]}", f"did you mean {missing[one]!r}?"))
    ]


def _sentence(model: type[BaseModel], error: dict[str, Any], section: str | None) -> str:
    path, kind = [str(part) for part in error["loc"]], error["type"]
    known = _fields_at(model, path[:-1])
    length = None
    if kind == "missing" and isinstance(error["loc"][-1], int):
        *path, _ = path
        length = len(typing.get_args(_fields_at(model, path[:-1])[path[-1]].annotation))
    name = ".".join(path if section is None else [section, *path])
    if kind == _RULE:
        return f"{name}.{error['msg']}" if name else error["msg"]
    if kind == "extra_forbidden":
        below = [f"{key}.{inner}" for key in known for inner in _fields_at(model, [*path[:-1], key])]
        section_there = _section_at(model, path[:-1])
        others = [] if section_there is None else list(aliases_of(section_there))
        return f"unknown setting {short(name)}: {hint(path[-1], list(known), below, others)}"
    if kind == _TWICE:
        return f"{name} is another name of {'.'.join([*name.split('.')[:-1], error['msg']])}: give one of them"
    if kind == "missing" and length is None:
        return f"{name}{_REQUIRED}"
    reason = _reason(name, error) if length is None else f"it must be a list of {length}"
    return f"{name}={short(error.get('input'), 200)} is not allowed: {reason}"


def _reason(name: str, error: dict[str, Any]) -> str:
    """What pydantic says, in words of settings where it has those of Python."""
    kind, value = error["type"], error.get("input")
    if kind == "list_type" and isinstance(value, str):
        return f"it must be a list, as in {name}=[{short(value)[1:-1]}]"
    if kind in ("model_type", "dict_type"):
        return "it must be a section of settings, as in {key: value}"
    if kind == "too_long" and isinstance(value, list | tuple):
        return f"it must be a list of {error['ctx']['max_length']}"
    if kind == "too_short":
        return f"it must be a list of at least {error['ctx']['min_length']}"
    return _REASONS.get(kind) or _SUBJECT.sub("it must", error["msg"]).removeprefix("Value error, ")


_SUBJECT = re.compile(r"^[A-Z]\w+ should")
"""How pydantic begins: Input should, String should, Keys should, ..."""
_REASONS = {
    "list_type": "it must be a list",
    "tuple_type": "it must be a list",
    "string_type": "it must be text",
    "path_type": "it must be a path",
    "bool_type": "it must be true or false",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "invalid_key": "the name of a setting must be text",
}


def _section_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The section at ``path`` below ``model``, if it is one."""
    found: type[BaseModel] | None = model
    for part in path:
        field = found.model_fields.get(part) if found else None
        found = section_of(field.annotation) if field else None
    return found


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> dict[str, FieldInfo]:
    """Its settings; {} if there is none."""
    found = _section_at(model, path)
    return {} if found is None else found.model_fields
