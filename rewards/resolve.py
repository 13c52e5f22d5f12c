"""What a reward's name or reference stands for, and which options it takes. Nothing here loads a model.

Rewards for images and for text differ by their table of names and by how they are called; both are a `Kind`.
"""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from diffusion_align.errors import RewardError, short
from diffusion_align.inputs import check_path
from diffusion_align.references import module_of, resolve
from diffusion_align.rewards.base import metadata_place, parameters_of

# name: (module, the class of its settings), see ``settings.RewardSettings``.
REWARDS: dict[str, tuple[str, str]] = {
    "aesthetic": ("diffusion_align.rewards.image.aesthetic", "AestheticSettings"),
    "brisque": ("diffusion_align.rewards.image.brisque", "BrisqueSettings"),
    "clip_score": ("diffusion_align.rewards.image.clip_score", "ClipSettings"),
    "combine": ("diffusion_align.rewards.combine", "Combine"),
    "hps_v2": ("diffusion_align.rewards.image.hps_v2", "HpsV2Settings"),
    "image_reward": ("diffusion_align.rewards.image.image_reward", "ImageRewardSettings"),
    "jpeg_compressibility": ("diffusion_align.rewards.image.jpeg", "JpegCompressibility"),
    "jpeg_incompressibility": ("diffusion_align.rewards.image.jpeg", "JpegIncompressibility"),
    "ocr": ("diffusion_align.rewards.image.ocr", "Ocr"),
    "pick_score": ("diffusion_align.rewards.image.pick_score", "PickScoreSettings"),
    "remote": ("diffusion_align.rewards.remote", "RemoteSettings"),
    "vlm_judge": ("diffusion_align.rewards.image.vlm_judge", "VlmJudgeSettings"),
}
TEXT_REWARDS: dict[str, tuple[str, str]] = {
    "classifier": ("diffusion_align.rewards.text.classifier", "ClassifierSettings"),
    "exact_match": ("diffusion_align.rewards.text.exact_match", "ExactMatch"),
    "length": ("diffusion_align.rewards.text.length", "Length"),
    "numeric_match": ("diffusion_align.rewards.text.numeric_match", "NumericMatch"),
    "regex": ("diffusion_align.rewards.text.regex", "Regex"),
    "sentiment": ("diffusion_align.rewards.text.sentiment", "Sentiment"),
    "similarity": ("diffusion_align.rewards.text.similarity", "SimilaritySettings"),
}


@dataclass(frozen=True)
class Kind:
    """What tells rewards for images from rewards for text where they are looked up and checked.

    Attributes:
        subject: what is scored, for sentences.
        table: the built-in ones.
        arguments: what every call passes; ``key`` is the one that the other kind has not.
        by_name: whether arguments are passed by name, the columns of the data among them (text), or by position.
        context: given at building to classes that name them.
        for_all: the options that every reward takes.
    """

    subject: str
    table: Mapping[str, tuple[str, str]]
    arguments: tuple[str, ...]
    key: str
    by_name: bool
    context: tuple[str, ...]
    for_all: tuple[str, ...]


_ARGUMENTS, _FOR_ALL = ("images", "prompts", "metadata"), ("background", "scale")
IMAGES = Kind("images", REWARDS, _ARGUMENTS, "images", False, ("model", "device"), (*_FOR_ALL, "offload"))
TEXT = Kind("text", TEXT_REWARDS, ("prompts", "completions"), "completions", True, ("device",), _FOR_ALL)


def find(source: str, kind: Kind) -> tuple[str, Any]:
    """What a string names: label and object; of a built-in reward the class of its settings."""
    if source in kind.table:
        module, settings = kind.table[source]
        return source, getattr(importlib.import_module(module), settings)
    if source:
        check_path(source, f"reward {short(source)}", error=RewardError)
    if ":" not in source:
        ours = f"{', '.join(kind.table)}, or your own as 'module:function' or 'file.py:function'"
        other = _other(kind)
        if source in other.table:
            raise RewardError(f"reward '{source}' scores {other.subject}, not {kind.subject}: there are {ours}")
        near = get_close_matches(source, kind.table, n=1, cutoff=0.5)
        meant = f"did you mean '{near[0]}'? There are" if near else "there are"
        raise RewardError(f"unknown reward '{source}': {meant} {ours}")
    target = resolve(source, "reward", error=RewardError)
    if not callable(target):
        raise RewardError(f"reward '{source}' is a {type(target).__name__}: name a function or a class")
    return source.rpartition(":")[2], target


def user_modules(spec: Any, kind: Kind) -> list[Any]:
    """The modules of the user's own rewards that ``spec`` names by strings, imported already, in order."""
    if isinstance(spec, Mapping):
        parts = spec.get("rewards", ()) if spec.get("name") == "combine" else ()  # an option like any other elsewhere
        named = [*([spec["name"]] if "name" in spec else []), *parts]
        return [module for one in named for module in user_modules(one, kind)]
    if isinstance(spec, list | tuple):
        return [module for one in spec for module in user_modules(one, kind)]
    if not isinstance(spec, str) or ":" not in spec:
        return []
    return [module_of(spec.strip(), "reward", error=RewardError)]


def check_options(label: str, target: Any, options: Mapping[str, Any], kind: Kind) -> None:
    """Refuse options that ``target`` does not take, naming the nearest one that it does, and required ones left out."""
    other = _other(kind)
    if _is_built_in(target, other):
        raise RewardError(f"reward '{label}' scores {other.subject}, not {kind.subject}: choose another one")
    parameters = parameters_of(target)
    if parameters is None:
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not inspect.isclass(target):
        given = _check_call(label, parameters, kind)
        named = [p for p in named if p not in given]
    allowed = [p.name for p in named]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in options:
            if key not in allowed:
                known = sorted([*allowed, *kind.for_all])
                near = get_close_matches(str(key), known, n=1, cutoff=0.5)
                meant = f"did you mean '{near[0]}'? It takes" if near else "it takes"
                raise RewardError(f"reward '{label}' has no option '{key}': {meant} {', '.join(known)}")
    if kind.by_name and not inspect.isclass(target):
        return  # what is missing may be a column of the data
    missing = [p.name for p in named if p.default is p.empty and p.name not in options and p.name not in kind.context]
    if missing:
        raise RewardError(f"reward '{label}' needs the option '{missing[0]}'")


def _check_call(label: str, parameters: list[inspect.Parameter], kind: Kind) -> list[inspect.Parameter]:
    """The parameters that a call fills with ``kind.arguments``; RewardError where every call would fail."""
    names, other = {p.name for p in parameters}, _other(kind)
    if other.key in names and kind.key not in names:
        raise RewardError(f"reward '{label}' takes '{other.key}', so it scores {other.subject}, not {kind.subject}")
    if kind.by_name:
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        given = [p for p in by_name if p.name in kind.arguments]
        if kind.key not in {p.name for p in given} and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise RewardError(f"reward '{label}' must take the argument '{kind.key}' by name")
        return given
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise RewardError(
            f"reward '{label}' must take three arguments ({', '.join(kind.arguments)}), of which the last may be left "
            f"out, it takes {len(positional)}"
        )
    metadata = metadata_place(parameters)
    named = [p for p in parameters if p.name == "metadata"] if metadata == "named" else []
    return [*positional[: 3 if metadata == "third" else 2], *named]


def _is_built_in(target: Any, kind: Kind) -> bool:
    return (getattr(target, "__module__", ""), getattr(target, "__name__", "")) in kind.table.values()


def _other(kind: Kind) -> Kind:
    return TEXT if kind is IMAGES else IMAGES
