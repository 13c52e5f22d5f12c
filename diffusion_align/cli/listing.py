"""What `diffusion-align list` prints."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from diffusion_align import yaml_text
from diffusion_align.assets import EMBEDDED_PIPELINES, LANGUAGE_MODELS, shipped_prompts, shipped_text_prompts
from diffusion_align.cli.terminal import Entry, Group, Table
from diffusion_align.data.image_pairs import EMBEDDED, PairsConfig, open_pairs
from diffusion_align.data.prompts import Prompt, load_prompts
from diffusion_align.data.sources import FILES, TableSource, open_table
from diffusion_align.errors import UserError, nearest, short
from diffusion_align.methods import describe_methods, outline_of
from diffusion_align.pipelines.configuration import shipped_configs
from diffusion_align.rewards import describe_rewards, describe_text_rewards
from diffusion_align.training.aliases import aliases_of
from diffusion_align.training.annotations import section_of
from diffusion_align.training.config import TrainingConfig


def _methods() -> list[Group]:
    return [Group("methods", [Entry(name, "; ".join(about)) for name, about in describe_methods()])]


def _configs() -> list[Group]:
    return [Group("configs", [Entry(name, describe_recipe(path)) for name, path in shipped_configs().items()])]


def describe_recipe(path: Path) -> str:
    """What the comment at the top of a recipe says up to how it is launched: what it trains and what it needs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    header = " ".join(line.removeprefix("#").strip() for line in lines[:end])
    return header.partition("Launch:")[0].strip()


def _models() -> list[Group]:
    about = {
        "emoji-sd": "images: samples 64x64 emoji-like images of 294 concepts, small enough for a CPU",
        "emoji-flow": "images: the same concepts with a flow-matching transformer like Stable Diffusion 3's",
        "tiny-lm": "text: generates English sentences letter by letter, small enough for a CPU",
        "smollm2": "text: SmolLM2-135M-Instruct, from a Python package; docs/text.md says how to install it",
    }
    embedded = [Entry(name, about[name]) for name in (*EMBEDDED_PIPELINES, *LANGUAGE_MODELS)]
    other = (
        "a diffusers folder or Hub id of Stable Diffusion 1.x, 2, XL, 3 or 3.5, FLUX.1 or Z-Image, or one of a causal "
        "language model"
    )
    return [Group("models", [*embedded, Entry("any other", other)])]


def _prompts() -> list[Group]:
    images = [Entry(name, _for_images(load_prompts(path))) for name, path in shipped_prompts().items()]
    texts = [
        Entry(name, f"{len(open_table(TableSource('prompts', str(path), lines='prompt')))} prompts for text")
        for name, path in shipped_text_prompts().items()
    ]
    return [Group("prompts", images + texts)]


def _for_images(prompts: Sequence[Prompt]) -> str:
    keys = ", ".join(dict.fromkeys(key for _, metadata in prompts for key in metadata))
    return f"{len(prompts)} prompts for images" + (f", with the metadata {keys}" if keys else "")


def _pairs() -> list[Group]:
    counts = " and ".join(f"{len(open_pairs(PairsConfig(source=EMBEDDED, split=s)))} {s}" for s in ("train", "heldout"))
    embedded = f"{counts} pairs of drawings of one concept: shaded 3-D, chosen, and flat"
    return [Group("pairs", [Entry(EMBEDDED, embedded), Entry("any other", FILES)])]


def _rewards() -> list[Table]:
    header = ("name", "scores (more is better)", "range", "needs")
    kinds = {"images": describe_rewards(), "text": describe_text_rewards()}
    return [Table(f"rewards for {kind}", header, [_row(reward) for reward in rows]) for kind, rows in kinds.items()]


def _row(reward: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A reward in a few words: its description up to the mark where explanations begin."""
    required = [f"option {name}" for name, about in reward["options"].items() if "required" in about.partition(")")[0]]
    download = re.findall(r"[\d.]+ GB(?= to download)", reward.get("cost", ""))
    extra = [f"extra {_start(reward['extra'])}"] if reward["extra"] else []
    needs = [*required, *extra, *(f"{size} download" for size in download)]
    needs += [reward["needs"]] if reward["needs"] else []
    scores = reward["description"].partition(":")[0].rstrip(".")
    return reward["name"], scores, _start(reward["range"]), ", ".join(needs)


def _start(phrase: str) -> str:
    return re.split(r"[:,;(]", phrase)[0].strip()


def reward_called(name: str) -> list[Group]:
    """All that is known of a shipped reward, and its options.

    Raises:
        UserError: there is no reward of this name.
    """
    rewards = {row["name"]: row for row in describe_rewards() + describe_text_rewards()}
    if name not in rewards:
        raise UserError(f"there is no reward {short(name)} to list: {nearest(name, list(rewards))}")
    about = {"scores" if key == "description" else key: value for key, value in rewards[name].items()}
    options = about.pop("options")
    facts = [Entry(key, str(value)) for key, value in about.items() if key != "name" and value is not None]
    return [
        Group(f"reward {name}", facts),
        Group(f"options of {name}", [Entry(option, text) for option, text in options.items()]),
    ]


def settings_of(method: str) -> list[Group]:
    """The settings of a method in groups: what they mean, their choices and defaults."""
    return grouped_settings(outline_of(method).config_class, method)


def grouped_settings(config: type[BaseModel], method: str) -> list[Group]:
    """First those of the method, its sections by dotted names, those of every method, and experimental ones last."""
    homes = _homes(config)
    own, shared = (
        [
            _setting(config, name, field, homes)
            for name, field in config.model_fields.items()
            if (name in TrainingConfig.model_fields) is of_every_method
        ]
        for of_every_method in (False, True)
    )
    sections = [
        Group(
            f"{home.name}: {home.about}",
            [_setting(section, key, field, homes, f"{home.name}.") for key, field in section.model_fields.items()],
        )
        for section, home in homes.items()
    ]
    groups = [Group(f"settings of {method}", own), *sections, Group("settings of every method", shared)]
    return sorted(groups, key=lambda group: group.title.startswith("experimental"))


class _Home(NamedTuple):
    """The dotted name under which a section is listed, and what it is."""

    name: str
    about: str


def _homes(config: type[BaseModel]) -> dict[type[BaseModel], _Home]:
    """Of each section below ``config``, the uppermost first; one that is found again is listed once."""
    found: dict[type[BaseModel], _Home] = {}
    sections = [("", config)]
    for prefix, section in sections:  # which grow on the way
        for key, field in section.model_fields.items():
            inner = section_of(field.annotation)
            if inner is not None and inner not in found:
                found[inner] = _Home(prefix + key, field.description or "")
                sections.append((f"{prefix}{key}.", inner))
    return found


def _setting(
    section: type[BaseModel], name: str, field: FieldInfo, homes: dict[type[BaseModel], _Home], prefix: str = ""
) -> Entry:
    notes = []
    inner = section_of(field.annotation)
    if inner is not None:
        like = "" if homes[inner].name == prefix + name else f" like {homes[inner].name}"
        notes.append(f"a section{like}{', or null' if field.default is None else ''}")
    if typing.get_origin(field.annotation) is Literal:
        notes.append(" | ".join(typing.get_args(field.annotation)))
    if field.is_required():
        notes.append("required")
    elif inner is None:
        notes.append(f"default {default_of(field)}")
    if also := [other for other, place in aliases_of(section).items() if place == name]:
        notes.append("also: " + ", ".join(also))
    return Entry(prefix + name, field.description or "", "; ".join(notes))


def default_of(field: FieldInfo) -> str | None:
    """The default of a setting as YAML on one line; None where it is required."""
    if field.is_required():
        return None
    default = to_jsonable_python(field.get_default(call_default_factory=True), inf_nan_mode="constants")
    return yaml_text.dump(default, default_flow_style=True).splitlines()[0]


LISTINGS: dict[str, Callable[[], Sequence[Group | Table]]] = {
    "methods": _methods,
    "configs": _configs,
    "models": _models,
    "prompts": _prompts,
    "pairs": _pairs,
    "rewards": _rewards,
}
