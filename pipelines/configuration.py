"""From a configuration file to checked settings: methods, shipped recipes, and every check that needs no model."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from diffusion_align.data.schemas import RowsConfig
from diffusion_align.data.sources import in_python, refuse_splits
from diffusion_align.errors import ConfigError, UserError, problems_of, short
from diffusion_align.inputs import PROBE, check_output, check_path
from diffusion_align.methods import DEFAULT, method_of
from diffusion_align.models.language_models import language_model_ref
from diffusion_align.models.model_ref import check_image_model
from diffusion_align.rewards import reward_problem, text_reward_problem
from diffusion_align.rewards.image.clip import check_clip
from diffusion_align.training.config import (
    TrainingConfig,
    apply_overrides,
    load_yaml,
    nearest,
    parse_config,
    read_as,
    section_of,
)
from diffusion_align.training.launch import check_launch, is_first_process
from diffusion_align.training.places import absolute_paths
from diffusion_align.training.run_folder import LOCK_FILE, check_not_in_use

_CONFIGS = Path(__file__).parent.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted(_CONFIGS.glob("*.yaml"))}


def read_config(source: str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The settings of a shipped recipe or a YAML file, with ``key=value`` overrides.

    Raises:
        ConfigError: with every problem that can be found without loading a model.
    """
    config = check_config(read_settings(source, overrides))
    folder = Path(os.path.abspath(os.path.expanduser(source))).parent
    given = any(override.startswith("output_dir=") for override in overrides)
    if config.resume and not given and (folder / "checkpoints").is_dir() and not config.output_dir.exists():
        was = short(str(config.output_dir), 320)
        raise ConfigError([f"resume=true, but output_dir={was} is not there: if it was moved, set output_dir={folder}"])
    return config


def read_settings(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same as they are written: words in them are ``Unread``, but for the method.

    Raises:
        ConfigError: there is no such file or recipe, or it or an override cannot be read.
    """
    shipped = shipped_configs().get(source)
    if shipped is None:
        check_path(source, f"config {short(source)}", error=ConfigError)
    path = shipped or Path(os.path.expanduser(source))
    if not path.is_file():
        hint = nearest(source, list(shipped_configs()))
        raise ConfigError([f"config {short(source)} is neither a file nor a shipped recipe: {hint}"])
    recipe = load_yaml(path, unread=True)
    raw = apply_overrides(recipe, overrides, unread=True)
    of_recipe, of_run = (read_as(dict[str, Any], {k: one[k] for k in ("method",) if k in one}) for one in (recipe, raw))
    raw |= of_run
    if of_run == of_recipe:
        return raw
    typed = {override.partition("=")[0].partition(".")[0] for override in overrides}
    return _switched(raw, recipe.keys() - typed)


def _switched(raw: dict[str, Any], of_recipe: Set[str]) -> dict[str, Any]:
    """``raw``, whose method is not its recipe's, without the settings ``of_recipe`` that the method does not have.

    What it has, but not with that value, is left out as well; a line says what was.
    """
    model, problems = method_of(raw["method"]).config_class, []
    try:
        model.model_validate(read_as(model, raw))
    except ValidationError as error:
        problems = error.errors()
    wrong = {str(one["loc"][0]) for one in problems if one["loc"] and one["type"] != "missing"}
    left_out = [key for key in raw if key in wrong and key in of_recipe]
    if left_out and is_first_process():
        print(f"method={raw['method']} leaves out of the recipe: {', '.join(left_out)}", file=sys.stderr)
    return {key: value for key, value in raw.items() if key not in left_out}


def check_config(raw: Mapping[str, Any]) -> TrainingConfig:
    """Settings from a nested mapping, their paths absolute; ``method`` picks their model.

    Raises:
        ConfigError: with every problem that can be found without loading a model.
    """
    _refuse_splits(raw)
    method = method_of(raw.get("method", DEFAULT))
    raw = read_as(method.config_class, raw)
    checks, problems = [_check_precision, _check_trackers, _check_output_dir], []
    if method.model_kind == "image":
        checks, problems = [_check_reward, _check_evaluation, *checks], _check_model(raw)
    elif method.model_kind is not None:  # without one it loads its model, and whatever scores that, itself
        checks, problems = [_check_text_rewards, _check_text_evaluation, *checks], _check_language_model(raw)
    opened, of_rows = _opened(method.config_class, raw, method.dataset_kind)
    problems += [*of_rows, *(problem for check in checks for problem in check(raw))]  # of the paths as they were given
    return parse_config(method.config_class, absolute_paths(opened), problems=problems)


def _refuse_splits(raw: Mapping[str, Any]) -> None:
    for name, value in raw.items():
        try:
            refuse_splits(value)
        except ValueError as error:
            raise ConfigError([f"{name}: {error}"]) from None
        if isinstance(value, Mapping):
            _refuse_splits(value)


def _opened(sections: type[BaseModel], raw: Mapping[str, Any], dataset_kind: str) -> tuple[dict[str, Any], list[str]]:
    """``raw`` with its sources of rows opened, and what is wrong with the rows."""
    result, problems = dict(raw), []
    for name, field in sections.model_fields.items():
        names = [name, *getattr(field.validation_alias, "choices", ())]
        key = next((one for one in names if raw.get(one) is not None), name)
        section, value = section_of(field.annotation), raw.get(key)
        if section is not None and issubclass(section, RowsConfig) and value is not None:
            if isinstance(value, Mapping) and "source" in value:  # a generator can be read once
                value = {**value, "source": in_python(value["source"])}
            result[key] = in_python(value)
            try:
                rows = section.model_validate(result[key])
                rows.open_ahead(key, name if name in section.layouts else dataset_kind)
                result[key] = rows.model_copy(update={"source": absolute_paths({key: rows.source})[key]})
            except ValidationError:
                pass  # said where the whole configuration is read
            except ConfigError as error:
                problems += error.problems
        elif section is not None and isinstance(value, Mapping):
            result[key], found = _opened(section, value, dataset_kind)
            problems += [f"{key}.{problem}" for problem in found]
    return result, problems


def _check_model(raw: Mapping[str, Any]) -> list[str]:
    model, variant, base_config = (raw.get(name) for name in ("model", "weights_variant", "base_config"))
    problems = []
    if isinstance(model, str) and isinstance(variant, str | None) and isinstance(base_config, str | None):
        problems += problems_of(check_image_model, model, variant=variant, base_config=base_config)
    precision = raw.get("mixed_precision")
    # torch's normalization layers for CPUs do not take bf16 activations with fp16 weights.
    if raw.get("dtype") == "float16" and precision in ("bf16", "auto") and not torch.cuda.is_available():
        problems.append(
            f"dtype=float16 with mixed_precision={precision} needs a GPU: use dtype=bfloat16, or mixed_precision=no"
        )
    return problems


def _check_language_model(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in ("model", "reference_model"):
        model = raw.get(name)
        kinds = ("causal", "classifier") if method_of(raw["method"]).model_kind == "classifier" else ("causal",)
        found = problems_of(language_model_ref, model, kinds) if isinstance(model, str) else []
        problems += [problem.replace("model=", f"{name}=", 1) for problem in found]
    return problems


def _check_text_rewards(raw: Mapping[str, Any]) -> list[str]:
    given = raw.get("reward")
    if given is None:
        return []
    problems = [text_reward_problem(spec) for spec in (given if isinstance(given, list | tuple) else [given])]
    return [problem for problem in problems if problem]


def _check_text_evaluation(raw: Mapping[str, Any]) -> list[str]:
    given = raw.get("evaluation")  # what is no mapping is said where the whole configuration is read
    return [f"evaluation.{problem}" for problem in _check_text_rewards(given)] if isinstance(given, Mapping) else []


def _check_reward(raw: Mapping[str, Any]) -> list[str]:
    problem = None if raw.get("reward") is None else reward_problem(raw["reward"])
    return [problem] if problem else []


def _check_evaluation(raw: Mapping[str, Any]) -> list[str]:
    given = raw.get("evaluation")
    if not isinstance(given, Mapping):
        return []  # said where the whole configuration is read
    problems = []
    if given.get("reward") is not None and (problem := reward_problem(given["reward"])):
        problems.append(f"evaluation.{problem}")
    clip = given.get("diversity", "clip")
    try:
        if clip not in ("clip", "pixels"):
            check_clip(clip)
    except UserError as error:
        problems.append(f"evaluation.diversity: {error}")
    return problems


def _check_trackers(raw: Mapping[str, Any]) -> list[str]:
    trackers = raw.get("trackers")
    names = [t for t in trackers if t in ("tensorboard", "wandb")] if isinstance(trackers, list) else []
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return [f"trackers: {name} is not installed: pip install 'diffusion-align[{name}]'" for name in missing]


def _check_precision(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    try:
        check_launch(raw.get("mixed_precision", "no"))
    except ConfigError as error:
        problems += error.problems
    if raw.get("mixed_precision") == "fp16" and not torch.cuda.is_available():
        problems.append("mixed_precision='fp16' needs a GPU: use no, bf16 or auto")
    return problems


def _check_output_dir(raw: Mapping[str, Any]) -> list[str]:
    if not isinstance(raw.get("output_dir"), str | Path):
        return []
    shown = short(os.path.expanduser(raw["output_dir"]), 320)
    if problems := problems_of(check_output, raw["output_dir"], f"output_dir={shown}", "folder"):
        return problems
    folder = Path(os.path.expanduser(raw["output_dir"]))
    try:
        # Another process of this run may be probing the same folder.
        inside = [path.name for path in folder.iterdir()] if folder.exists() else []
        used = any(name != LOCK_FILE and not name.startswith(PROBE) for name in inside)
    except OSError as error:
        return [f"output_dir={str(folder)!r} is not readable: {error.strerror}"]
    try:
        check_not_in_use(folder)
    except UserError as error:
        return [f"output_dir: {error}"]
    if used:
        if raw.get("resume") is True:
            if not (folder / "config.yaml").is_file():
                return [f"resume=true, but output_dir={str(folder)!r} is not a run folder: it has no config.yaml"]
            return _resume_problems(folder, raw)
        return [
            f"output_dir={str(folder)!r} is already used: choose another, or set resume=true to go on with that run"
        ]
    return []


def _resume_problems(folder: Path, raw: Mapping[str, Any]) -> list[str]:
    try:
        method = load_yaml(folder / "config.yaml")["method"]
    except (ConfigError, KeyError):
        return [f"resume=true, but {folder / 'config.yaml'} cannot be read: choose a new output_dir"]
    if _unmoved(method) != _unmoved(absolute_paths({"method": raw.get("method", DEFAULT)})["method"]):
        return [f"resume=true, but {folder} is a run of method={method!r}: choose a new output_dir"]
    return []


def _unmoved(method: Any) -> Any:
    """The class alone of a file, which may lie elsewhere now: that it is the same is to be accepted on resume."""
    place, _, name = str(method).rpartition(":")
    return name if place.endswith(".py") else method
