"""What `diffusion-align list` prints."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from diffusion_align import yaml_text
from diffusion_align.assets import LANGUAGE_MODELS, shipped_prompts, shipped_text_prompts
from diffusion_align.data.image_pairs import EMBEDDED, PairsConfig, open_pairs
from diffusion_align.data.prompts import Prompt, load_prompts
from diffusion_align.data.sources import FILES, TableSource, open_table
from diffusion_align.methods import describe_methods, method_of
from diffusion_align.models.image_pipelines import EMBEDDED_PIPELINES
from diffusion_align.pipelines.configuration import shipped_configs
from diffusion_align.rewards import describe_rewards, describe_text_rewards
from diffusion_align.training.aliases import aliases_of
from diffusion_align.training.config import section_of

Entries = list[tuple[str, list[str]]]
"""(name, lines about it)."""


def _configs() -> Entries:
    return [(name, [_first_comment(path)]) for name, path in shipped_configs().items()]


def _models() -> Entries:
    about = {
        "emoji-sd": "images: samples 64x64 emoji-like images of 294 concepts, small enough for a CPU",
        "tiny-lm": "text: generates English sentences letter by letter, small enough for a CPU",
        "smollm2": "text: SmolLM2-135M-Instruct, from a wheel; see the README",
    }
    return [
        *((name, [about[name]]) for name in (*EMBEDDED_PIPELINES, *LANGUAGE_MODELS)),
        ("any other", ["an SD1.x, SD2 or SDXL diffusers folder or Hub id, or a causal language model's"]),
    ]


def _prompts() -> Entries:
    images = [(name, _for_images(load_prompts(path))) for name, path in shipped_prompts().items()]
    texts = [
        (name, f"{len(open_table(TableSource('prompts', str(path), lines='prompt')))} prompts for text")
        for name, path in shipped_text_prompts().items()
    ]
    return [(name, [about]) for name, about in images + texts]


def _for_images(prompts: Sequence[Prompt]) -> str:
    keys = ", ".join(dict.fromkeys(key for _, metadata in prompts for key in metadata))
    return f"{len(prompts)} prompts for images" + (f", with the metadata {keys}" if keys else "")


def _pairs() -> Entries:
    counts = " and ".join(f"{len(open_pairs(PairsConfig(source=EMBEDDED, split=s)))} {s}" for s in ("train", "heldout"))
    return [
        (EMBEDDED, [f"{counts} pairs of drawings of one concept: shaded 3-D, chosen, and flat"]),
        ("any other", [FILES]),
    ]


def _rewards() -> Entries:
    entries = []
    for row in describe_rewards() + describe_text_rewards():
        shown = {key: value for key, value in row.items() if key not in ("name", "description", "options")}
        about = [f"{key}: {value}" for key, value in shown.items() if value is not None]
        options = [f"option {name} {option}" for name, option in row["options"].items()]
        entries.append((row["name"], [row["description"], *about, *options]))
    return entries


def settings_of(method: str) -> Entries:
    """The settings of a method: what they mean, their choices and defaults; those of a section by dotted names."""
    return _settings_of(method_of(method).config_class, "")


def _settings_of(section: type[BaseModel], prefix: str) -> Entries:
    entries = []
    others = aliases_of(section)
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        notes = [] if inner is None else ["a section, or null" if field.default is None else "a section"]
        if typing.get_origin(field.annotation) is Literal:
            notes.append(" | ".join(typing.get_args(field.annotation)))
        if field.is_required():
            notes.append("required")
        elif inner is None:
            default = to_jsonable_python(field.get_default(call_default_factory=True), inf_nan_mode="constants")
            notes.append("default " + yaml_text.dump(default, default_flow_style=True).splitlines()[0])
        if also := [other for other, place in others.items() if place == name]:
            notes.append("also: " + ", ".join(also))
        entries.append((prefix + name, [f"{field.description} ({'; '.join(notes)})"]))
        entries += [] if inner is None else _settings_of(inner, f"{prefix}{name}.")
    return entries


LISTINGS: dict[str, Callable[[], Entries]] = {
    "methods": describe_methods,
    "configs": _configs,
    "models": _models,
    "prompts": _prompts,
    "pairs": _pairs,
    "rewards": _rewards,
}


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
