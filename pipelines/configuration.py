"""From a configuration file to checked settings: methods, shipped recipes, and every check that needs no model."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from diffusion_align.data.schemas import RowsConfig
from diffusion_align.data.sources import in_python, refuse_splits
from diffusion_align.errors import ConfigError, UserError, nearest, problems_of, short
from diffusion_align.folder_lock import LOCK_FILE, check_not_in_use
from diffusion_align.inputs import PROBE, check_output, check_path
from diffusion_align.methods import DEFAULT, method_name, outline_of
from diffusion_align.training.aliases import aliases_of, canonical, canonical_place, one_by_one
from diffusion_align.training.annotations import section_of
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.launch import check_launch, is_first_process
from diffusion_align.training.places import absolute_paths
from diffusion_align.training.reading import apply_overrides, load_yaml, parse_config, read_as
from diffusion_align.training.section import FIELDS_ALONE, WITHOUT_NAMES

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
    of_recipe, of_run = (_method_in(one) for one in (recipe, apply_overrides(recipe, overrides, unread=True)))
    section = _section_of(of_run)
    if of_run == of_recipe or section is None:
        return apply_overrides(recipe, overrides, unread=True, section=section) | of_run
    return _switched(canonical(_section_of(of_recipe) or section, recipe), overrides, section) | of_run


def _switched(recipe: dict[str, Any], overrides: Sequence[str], section: type[TrainingConfig]) -> dict[str, Any]:
    """The settings of a method that is not its recipe's: without those of the recipe that the method does not have.

    What it has, but not with that value, is left out as well; a line says what was.
    """
    # A setting there whose name is an alias here is another one.
    kept = {key: value for key, value in recipe.items() if key not in aliases_of(section)}
    raw = apply_overrides(kept, overrides, unread=True, section=section)
    typed = {_name(canonical_place(section, override.partition("=")[0].split("."))) for override in overrides}
    try:
        section.model_validate(read_as(section, raw), context=FIELDS_ALONE)
        problems = []
    except ValidationError as error:
        problems = error.errors()
    wrong = {_name(one["loc"]) for one in problems if one["loc"] and one["type"] != "missing"}
    unfit = {name for name in one_by_one(kept) if {name, name.partition(".")[0]} & (wrong - typed)} - typed
    left_out = [name for name in one_by_one(recipe) if name in unfit or name in aliases_of(section)]
    if left_out and is_first_process():
        print(f"method={raw['method']} does not use from the recipe: {', '.join(left_out)}", file=sys.stderr)
    return apply_overrides(_without(kept, unfit), overrides, unread=True, section=section)


def _name(place: Sequence[int | str]) -> str:
    """The setting at ``place``, of the section ``experimental`` by its dotted name."""
    return ".".join(map(str, place[: 2 if place[0] == "experimental" else 1]))


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """``settings`` without those of ``names``, which are as ``one_by_one`` has them."""
    left = {name: value for name, value in settings.items() if name not in names}
    if isinstance(rare := left.get("experimental"), Mapping):
        left["experimental"] = {name: value for name, value in rare.items() if f"experimental.{name}" not in names}
        if not left["experimental"]:  # of which the method may have none
            del left["experimental"]
    return left


def _method_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    return read_as(dict[str, Any], {key: settings[key] for key in ("method",) if key in settings})


def _section_of(named: Mapping[str, Any]) -> type[TrainingConfig] | None:
    """The settings of a method; None where there is none, which is reported where they are checked."""
    try:
        return outline_of(named.get("method", DEFAULT)).config_class
    except ConfigError:
        return None


def check_config(raw: Mapping[str, Any]) -> TrainingConfig:
    """Settings from a nested mapping, their paths absolute; ``method`` picks their model.

    Raises:
        ConfigError: with every problem that can be found without loading a model.
    """
    _refuse_splits(raw)
    method = outline_of(raw.get("method", DEFAULT))
    model, named = method.config_class, {"method": method_name(raw.get("method", DEFAULT))}
    given = {name: list(value) if isinstance(value, Iterator) else value for name, value in raw.items()}  # read twice
    raw = read_as(model, given | named)
    opened, problems = _opened(model, raw, method.dataset_kind)
    precision = raw.get("mixed_precision")
    problems += [*problems_of(check_launch, precision), *problems_of(_check_output_dir, raw)]
    # Without a kind a method loads its model, and whatever scores that, itself.
    context = WITHOUT_NAMES if method.model_kind is None else None
    parse_config(model, opened, problems=problems, context=context)  # of the paths as they were given
    return model.model_validate(absolute_paths(opened), context=FIELDS_ALONE)


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
        section, value = section_of(field.annotation), raw.get(name)
        if section is not None and issubclass(section, RowsConfig) and value is not None:
            if isinstance(value, Mapping) and "source" in value:  # a generator can be read once
                value = {**value, "source": in_python(value["source"])}
            result[name] = in_python(value)
            try:
                rows = section.model_validate(result[name])
                rows.open_ahead(name, name if name in section.column_schemas else dataset_kind)
                result[name] = rows.model_copy(update={"source": absolute_paths({name: rows.source})[name]})
            except ValidationError:
                pass  # reported where the whole configuration is read
            except ConfigError as error:
                problems += error.problems
        elif section is not None and isinstance(value, Mapping):
            result[name], found = _opened(section, value, dataset_kind)
            problems += [f"{name}.{problem}" for problem in found]
    return result, problems


def _check_output_dir(raw: Mapping[str, Any]) -> None:
    given = raw.get("output_dir")
    if not isinstance(given, str | Path):
        return  # reported where the whole configuration is read
    check_output(given, f"output_dir={short(os.path.expanduser(given), 320)}", "folder")
    folder = Path(os.path.expanduser(given))
    try:
        # Another process of this run may be probing the same folder.
        inside = [path.name for path in folder.iterdir()] if folder.exists() else []
        used = any(name != LOCK_FILE and not name.startswith(PROBE) for name in inside)
    except OSError as error:
        raise UserError(f"output_dir={str(folder)!r} is not readable: {error.strerror}") from None
    for problem in problems_of(check_not_in_use, folder):
        raise UserError(f"output_dir: {problem}")
    if used and raw.get("resume") is not True:
        raise UserError(
            f"output_dir={str(folder)!r} is already used: choose another, or set resume=true to resume that run"
        )
    if used:
        _check_resumed(folder, raw.get("method", DEFAULT))


def _check_resumed(folder: Path, method: str) -> None:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume=true, but output_dir={str(folder)!r} is not a run folder: it has no config.yaml")
    try:
        theirs = load_yaml(folder / "config.yaml")["method"]
    except (ConfigError, KeyError):
        raise UserError(f"resume=true, but {folder / 'config.yaml'} cannot be read: choose a new output_dir") from None
    if _unmoved(theirs) != _unmoved(absolute_paths({"method": method})["method"]):
        raise UserError(f"resume=true, but {folder} is a run of method={theirs!r}: choose a new output_dir")


def _unmoved(method: Any) -> Any:
    """The class alone of a file, which may lie elsewhere now: that it is the same is to be accepted on resume."""
    place, _, name = str(method).rpartition(":")
    return name if place.endswith(".py") else method
