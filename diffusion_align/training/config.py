"""Configuration: one pydantic model a method, read from YAML and ``key=value`` overrides, checked all at once."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from diffusion_align.interrupt import GRACE
from diffusion_align.training.errors import ConfigError

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
Beta = Annotated[float, Field(ge=0, lt=1)]
# Absolute from the beginning: a reward may change the working directory.
Folder = Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(os.path.expanduser(path))))]


class Section(BaseModel):
    """A group of settings; unknown keys are errors, and neither text nor true/false is taken for a number."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=True)

    @field_validator("*", mode="before")
    @classmethod
    def _only_numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = _flatten(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool | str) and {int, float} & set(wanted) and type(value) not in wanted:
            raise ValueError("it must be a number")
        return value


class TrainingConfig(Section):
    """What every trainer shares. Counts are global: with P processes each does a P-th of them."""

    model: str = Field(description="embedded name, folder or hub id of the model to align")
    output_dir: Folder = Field(description="the run folder; must be new or empty unless `resume` is set")
    resume: bool = Field(
        False, strict=True, description="continue the run in output_dir from its newest checkpoint, bit for bit"
    )
    accept_changed: list[
        Literal["model", "reference_model", "prompts", "dataset", "eval_dataset", "pairs", "reward", "evaluation"]
    ] = Field(default_factory=list, description="resume although the content of these is not what the run began with")
    seed: int = Field(0, ge=0, lt=2**32)
    epochs: int = Field(100, ge=1, description="rounds of collect, score, estimate, update")

    samples_per_epoch: int = Field(64, ge=1)
    sample_batch_size: int = Field(8, ge=1, description="samples a process draws at once")
    micro_batch_size: int = Field(8, ge=1, description="(sample, decision) pairs in one forward and backward pass")
    updates_per_epoch: int = Field(2, ge=1, description="optimizer steps in one pass over an epoch's samples")
    inner_epochs: int = Field(1, ge=1, description="passes over an epoch's samples")

    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="average the trained weights; used for grids and final/"
    )

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "no", description="of the network only, decisions stay float32; auto measures what is faster on this machine"
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of torch; its own default when not given"
    )
    checkpoint_every: int = Field(10, ge=1, description="epochs")
    checkpoint_minutes: float | None = Field(
        10.0,
        gt=0,
        le=525_600,
        description="since the last one: then one is due as well; null for never",
    )
    interrupt_grace: float = Field(
        GRACE, ge=0, le=86_400, description="seconds for a reward to answer once the run was asked to stop"
    )
    keep_checkpoints: int = Field(2, ge=1)
    grid_every: int = Field(1, ge=0, description="epochs between pictures (or texts) of the fixed prompts; 0 for none")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false

    def cross_checks(self) -> list[str]:
        """Sentences about settings that do not fit each other; subclasses add theirs."""
        problems = []
        if self.samples_per_epoch % self.sample_batch_size:
            problems.append(
                f"samples_per_epoch={self.samples_per_epoch} is not a multiple of "
                f"sample_batch_size={self.sample_batch_size}: change one of them"
            )
        if self.updates_per_epoch > self.samples_per_epoch:
            problems.append(
                f"updates_per_epoch={self.updates_per_epoch} is more than samples_per_epoch={self.samples_per_epoch}: "
                "each update needs at least one sample"
            )
        return problems


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a ConfigError with one sentence."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"there is no configuration file {path}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError([f"{path} is not valid YAML{where}: {_problem(error)}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError([f"{path} must hold a mapping of settings, not {type(raw).__name__}"])
    return raw


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``raw`` with ``dotted.key=value`` strings applied; values are parsed as YAML."""
    result = _copy(raw)
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            problems.append(f"{override!r} is not of the form key=value")
            continue
        try:
            value = as_numbers({key: yaml.safe_load(text)})[key]
        except yaml.YAMLError:
            problems.append(f"the value of {override!r} is not valid YAML")
            continue
        target = result
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None  # type: ignore[assignment]
            if not isinstance(target, dict):
                problems.append(f"{key!r} cannot be set: {parent!r} is not a section")
                break
        else:
            target[last] = value
    if problems:
        raise ConfigError(problems)
    return result


def parse_config(
    model: type[TrainingConfig],
    raw: Mapping[str, Any],
    *,
    checks: Sequence[Callable[[Mapping[str, Any]], list[str]]] = (),
) -> TrainingConfig:
    """``model`` filled from ``raw``; every problem is reported at once.

    Args:
        model: the method's configuration.
        raw: nested mapping, as YAML gives it.
        checks: functions of ``raw`` that name further problems (an unknown reward, a missing file).

    Raises:
        ConfigError: with one sentence for each problem.
    """
    problems: list[str] = []
    config = None
    try:
        config = model.model_validate(as_numbers(_copy(raw)))
    except ValidationError as error:
        problems += [_sentence(model, dict(e)) for e in error.errors()]
    if config is not None:
        problems += config.cross_checks()
    for check in checks:
        problems += check(raw)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    assert config is not None
    return config


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def nearest(word: str, known: Sequence[str]) -> str:
    """ ", did you mean 'x'?" or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def _sentence(model: type[BaseModel], error: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"unknown setting {name!r}: {nearest(path[-1], _known_keys(model, path[:-1]))}"
    if error["type"] == "missing":
        return f"{name} is missing: it has to be given"
    return f"{name}={error.get('input')!r} is not allowed: {error['msg'].removeprefix('Value error, ')}"


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        inner = [t for t in _flatten(field.annotation if field else None) if _is_model(t)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [t for arg in typing.get_args(annotation) for t in _flatten(arg)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return list(value) if isinstance(value, list) else value


def as_numbers(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` as text; people mean the number, but in prompts."""
    if isinstance(value, dict):
        return {k: v if k in ("prompts", "show_prompts") else as_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [as_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
