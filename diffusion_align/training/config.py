"""Configuration: one pydantic model a method, read from YAML and ``key=value`` overrides, checked all at once."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticUndefined

from diffusion_align import yaml_text
from diffusion_align.bounds import HIGHEST_RANK, LARGEST, MOST
from diffusion_align.errors import ConfigError, short
from diffusion_align.inputs import check_path
from diffusion_align.interrupt import GRACE
from diffusion_align.training.aliases import aliases_of, are_settings, canonical, canonical_place
from diffusion_align.training.annotations import kinds_of, section_of
from diffusion_align.training.hints import hint
from diffusion_align.yaml_text import EXPONENT, Unread, YamlProblem, odd_number


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

Content = Literal[
    "method",
    "model",
    "reference_model",
    "prompts",
    "dataset",
    "eval_dataset",
    "pairs",
    "reward",
    "evaluation",
    "sampler",
    "family",
]
"""Settings that name what lies elsewhere and may change there."""


PLUG_INS = "diffusion_align.methods"
"""Group of the entry points by which installed packages bring methods."""
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
        if isinstance(value, bool | str) and {int, float} & set(wanted) and type(value) not in wanted:
            odd = odd_number(value) if isinstance(value, str) else None
            raise ValueError(odd or "it must be a number")
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


def multiple_checks(config: TrainingConfig, divisor: str, processes: int = 1) -> Iterator[str]:
    """A sentence if ``samples_per_epoch`` is not a multiple of the setting ``divisor``, in each of ``processes``."""
    count, size = config.samples_per_epoch, getattr(config, divisor)
    if count % (size * processes):
        each = f"{divisor}={size}" if processes == 1 else f"{processes} processes x {divisor}={size}"
        yield f"samples_per_epoch={count} is not a multiple of {each}: change one of them"


class TrainingConfig(Section):
    """What every trainer shares. Counts are global: with P processes each does a P-th of them."""

    model_kind: ClassVar[Literal["image", "text", "classifier"] | None] = None
    """What is loaded for the method to train; None: it loads that itself."""
    dataset_kind: ClassVar[Literal["preferences", "labels"]] = "preferences"
    """What a row of its ``dataset`` says."""

    method: str = Field("", description="what trains: a shipped method's name, module:Class or file.py:Class")
    model: str = Field(description="embedded name, folder or Hub id of the model to align")
    output_dir: Folder = Field(description="the run folder; must be new or empty unless `resume` is set")
    resume: bool = Field(
        False, strict=True, description="continue the run in output_dir from its newest checkpoint, bit for bit"
    )
    accept_changed: list[Content] = Field(
        default_factory=list, description="settings whose content may have changed since the run began"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of all randomness: the same seed gives the same run")
    epochs: int = Field(100, ge=1, le=MOST, description="rounds of collect, score, estimate, update")

    samples_per_epoch: int = Field(64, ge=1, le=MOST, description="samples per epoch, of all processes together")
    sample_batch_size: int = Field(8, ge=1, le=MOST, description="samples that each process generates at once")
    micro_batch_size: int = Field(
        8, ge=1, le=MOST, description="samples, or (sample, step) indices of images, per forward and backward pass"
    )
    updates_per_epoch: int = Field(2, ge=1, le=MOST, description="optimizer steps in one pass over an epoch's samples")
    inner_epochs: int = Field(1, ge=1, le=MOST, description="passes over an epoch's samples")

    learning_rate: float = Field(3e-4, gt=0, le=1000, description="AdamW's learning rate, after the warm-up")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="schedule after the warm-up: linear and cosine fall to 0 at the last update"
    )
    warmup_steps: int = Field(0, ge=0, le=MOST, description="updates in which the learning rate rises from 0")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of AdamW's two moments per update")
    weight_decay: float = Field(1e-4, ge=0, le=1000, description="AdamW's weight decay, decoupled from the gradient")
    max_grad_norm: OrInfinite = Field(
        1.0, gt=0, description="largest gradient norm; longer gradients are scaled down; .inf for none"
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="average the trained weights; used for grids and final/"
    )

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "no",
        description="precision of the network; log-probs stay float32; auto measures what is faster on this machine",
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="torch's CPU threads; its own default if not given"
    )
    checkpoint_every: int = Field(10, ge=1, le=MOST, description="epochs between checkpoints")
    checkpoint_minutes: float | None = Field(
        10.0,
        gt=0,
        le=525_600,
        description="minutes after the last checkpoint when one is written in any case; null for never",
    )
    interrupt_grace: float = Field(
        GRACE, ge=0, le=86_400, description="seconds for a reward to answer after the run received an interrupt"
    )
    keep_checkpoints: int = Field(2, ge=1, le=MOST, description="number of newest checkpoints to keep")
    grid_every: int = Field(
        1, ge=0, le=MOST, description="epochs between images (or texts) of the fixed prompts; 0 for none"
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="where metrics are logged besides metrics.jsonl"
    )
    callbacks: Annotated[list[Any], PlainSerializer(lambda given: [one for one in given if isinstance(one, str)])] = (
        Field(default_factory=list, description="module:Class or file.py:Class of each; in Python also objects")
    )

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false

    def cross_checks(self) -> Iterator[str]:
        own = type(self).model_fields["method"].default
        if own and self.method != own and ":" not in self.method and not entry_points(group=PLUG_INS, name=self.method):
            yield f"method={short(self.method)} does not fit {type(self).__name__}, which is for {own!r}: leave it out"
        if self.mixed_precision == "fp16":
            import torch

            if not torch.cuda.is_available():
                yield "mixed_precision='fp16' needs a GPU: use no, bf16 or auto"
        for name in self.trackers:
            if importlib.util.find_spec(name) is None:
                yield f"trackers: {name} is not installed: pip install 'diffusion-align[{name}]'"
        yield from multiple_checks(self, "sample_batch_size")
        if self.updates_per_epoch > self.samples_per_epoch:
            yield (
                f"updates_per_epoch={self.updates_per_epoch} is more than samples_per_epoch={self.samples_per_epoch}: "
                "each update needs at least one sample"
            )


class LoRASettings(Section):
    """Low-rank adapters; a policy's own ``LoRAConfig`` says on which layers."""

    rank: int = Field(8, ge=1, le=HIGHEST_RANK, description="rank of every adapter")
    alpha: int | None = Field(None, ge=1, le=MOST, description="scale is alpha / rank; alpha is the rank if not given")


class PolicyConfig(TrainingConfig):
    """What every method that trains a diffusion model or a language model has."""

    show_prompts: list[Any] | None = None
    lora: LoRASettings | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="dtype of frozen weights: bfloat16 or float16 halves their memory; trained weights are float32",
    )

    def cross_checks(self) -> Iterator[str]:
        if self.show_prompts is not None and not self.show_prompts:
            yield "show_prompts is empty: leave it out, or set grid_every=0 for no samples"
        if self.dtype != "float32" and self.lora is None:
            yield f"dtype={self.dtype} is for frozen weights, but lora=null trains all weights: leave one of them out"


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
