"""From what a config or a caller says to a reward: names, references to your own code, options, scale.

Rewards for images and for text differ by their table of names and by how they are called; both are a `Kind`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_align.bounds import LARGEST
from diffusion_align.errors import did_you_mean, short
from diffusion_align.inputs import check_path
from diffusion_align.references import module_of, resolve
from diffusion_align.rewards.base import (
    Reward,
    RewardError,
    ask_reward,
    check_prompts,
    foreign_code,
    metadata_place,
    parameters_of,
    reward_name,
    runs_in_background,
)
from diffusion_align.rewards.image.clip import unshared
from diffusion_align.rewards.settings import RewardSettings, describe_options, description
from diffusion_align.rewards.text.base import Text, TextReward, call_text_reward, extras_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# name: (module, the class of its settings), see ``settings.RewardSettings``.
REWARDS: dict[str, tuple[str, str]] = {
    "aesthetic": ("diffusion_align.rewards.image.aesthetic", "AestheticSettings"),
    "brisque": ("diffusion_align.rewards.image.brisque", "Brisque"),
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
        switches: the options that every reward takes besides ``scale``; true or false.
    """

    subject: str
    table: Mapping[str, tuple[str, str]]
    arguments: tuple[str, ...]
    key: str
    by_name: bool
    context: tuple[str, ...]
    switches: tuple[str, ...]

    @property
    def other(self) -> Kind:
        return TEXT if self is IMAGES else IMAGES


IMAGES = Kind(
    subject="images",
    table=REWARDS,
    arguments=("images", "prompts", "metadata"),
    key="images",
    by_name=False,
    context=("model", "device"),
    switches=("background", "offload"),
)
TEXT = Kind("text", TEXT_REWARDS, ("prompts", "completions"), "completions", True, ("device",), ("background",))


class Wrapped:
    """A reward around another one, which is called in that one's thread, shown its prompts, and moved with it."""

    def __init__(self, reward: Any, name: str):
        self.reward, self.name, self.background = reward, name, runs_in_background(reward)
        self.scorer = getattr(reward, "scorer", None)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        check_prompts(self.reward, prompts, metadata)

    def to(self, device: str | torch.device) -> Wrapped:
        if hasattr(self.reward, "to"):
            self.reward.to(device)
        return self


class ScaledReward(Wrapped):
    """``scale`` times another reward; -1 turns its sign."""

    def __init__(self, reward: Any, scale: float):
        super().__init__(reward, f"{scale:g}*{reward_name(reward)}")
        self.scale, self.differentiable = scale, bool(getattr(reward, "differentiable", False))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.scale * ask_reward(self.reward, images, prompts, metadata)


class ScaledTextReward(Wrapped):
    """``scale`` times another text reward; -1 turns its sign. None stays None."""

    def __init__(self, reward: Any, scale: float):
        super().__init__(reward, f"{scale:g}*{reward_name(reward)}")
        self.scale = scale
        # Besides the columns it names what the reward inside does, and is given no more than that.
        *own, columns = inspect.signature(self).parameters.values()
        inside = [p for p in parameters_of(reward) or () if p.name in extras_of(reward)]
        extras = [p.replace(kind=p.KEYWORD_ONLY) for p in inside]
        self.__signature__ = inspect.Signature([*own, *extras, columns])

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        extras = {name: columns.pop(name) for name in extras_of(self.reward) if name in columns}
        scores = call_text_reward(self.reward, prompts, completions, columns, **extras)
        return [None if math.isnan(score) else self.scale * score for score in scores.tolist()]


class OffloadedReward(Wrapped):
    """A reward whose model is on ``device`` only while it scores, and in main memory otherwise: without gradients."""

    differentiable = False

    def __init__(self, reward: Any, device: str | torch.device):
        super().__init__(reward, reward_name(reward))
        self.device = device
        reward.to("cpu")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        self.reward.to(self.device)
        try:
            return ask_reward(self.reward, images, prompts, metadata)
        finally:
            self.reward.to("cpu")

    def to(self, device: str | torch.device) -> OffloadedReward:
        self.device = device
        return self


def build_reward(spec: Any, *, model: str | None = None, device: str | torch.device = "cpu") -> Reward:
    """The reward that ``spec`` describes, ready on ``device``.

    Args:
        spec: one of

            - a name from `REWARDS`, such as ``"jpeg_compressibility"``;
            - a reference to your own: ``"package.module:function"`` or ``"path/to/file.py:function"``. A function or
              a callable object is the reward itself; a class is built first, given ``model`` and ``device`` if it names
              them;
            - a callable;
            - a mapping ``{"name": any of these, **options}``. Options go to the builder or class, or, for a function,
              into every call. Three are for all: ``scale`` multiplies the scores, so ``scale: -1.0`` turns the sign;
              ``background: true`` calls it in a thread of its own, in training while the next batch is sampled;
              ``offload: true`` keeps the reward's model in main memory and on ``device`` only while it scores;
            - a list of these: their sum, see `combine`.
        model: name or path of the diffusion model whose images are scored. The default CLIP and aesthetic head are the
            published ones, which judge photographs, and for ``emoji-sd`` and ``emoji-flow`` the embedded ones, which
            judge emoji drawings.

    Raises:
        RewardError: ``declare`` refuses it, or the reward's model cannot be loaded.
    """
    declared = declare(IMAGES, spec)
    with unshared() if declared.offload else nullcontext():
        reward = _built(declared, {"model": model, "device": device})
    if declared.offload:
        if not hasattr(reward, "to"):
            raise RewardError(f"reward '{reward_name(reward)}' has no to(device) to offload it by: leave offload out")
        reward = OffloadedReward(reward, device if declared.device is None else declared.device)
    return reward if declared.scale == 1.0 else ScaledReward(reward, declared.scale)


def build_text_reward(spec: Any, *, device: str | torch.device = "cpu") -> TextReward:
    """The text reward that ``spec`` describes, ready on ``device``.

    Args:
        spec: as for `build_reward`: a name from `TEXT_REWARDS`, ``"package.module:function"``,
            ``"path/to/file.py:function"``, a callable, or a mapping ``{"name": any of these, **options}``, among
            them ``scale`` and ``background``. A function is the reward itself and must take ``completions`` by name; a
            class is built first, given ``device`` if it names it.

    Raises:
        RewardError: ``declare`` refuses it, or the reward's model cannot be loaded.
    """
    declared = declare(TEXT, spec)
    reward = _built(declared, {"device": device})
    return reward if declared.scale == 1.0 else ScaledTextReward(reward, declared.scale)


class Declared(NamedTuple):
    """A reward that is known and whose options are checked: ``target`` is its settings, its class or itself."""

    label: str
    target: Any
    options: dict[str, Any]
    scale: float
    device: Any = None
    background: bool | None = None
    offload: bool | None = None


def declare(kind: Kind, spec: Any) -> Declared:
    """What ``spec`` says of a reward of ``kind``. Every check that needs no model is made here, and nothing is loaded.

    Imports your code if it names some. Whether the data has the columns that a text reward needs is for
    `check_text_reward` to say.

    Raises:
        RewardError: what is wrong with it.
    """
    if kind is IMAGES:
        spec = _combined(spec)
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    switches = {name: options.pop(name) for name in kind.switches if name in options}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise RewardError(f"reward.{name}={short(value)} is not allowed: it must be true or false")
    if "name" not in options:
        raise RewardError(f"reward={short(spec)} has no key 'name': add it, with the name of the reward")
    source, scale, device = options.pop("name"), options.pop("scale", 1.0), options.get("device")
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or scale == 0 or not -LARGEST <= scale <= LARGEST:
        raise RewardError(
            f"reward.scale={short(scale)} is not allowed: it must be a number other than 0, at most {LARGEST:g}"
        )
    if isinstance(source, str):
        label, target = find(source.strip(), kind)
    elif callable(source) or isinstance(source, RewardSettings):
        label, target = reward_name(source), source
        if isinstance(source, RewardSettings) and options:
            raise RewardError(f"reward '{label}' has its own options: give {', '.join(options)} to it, not beside it")
    else:
        raise RewardError(
            f"reward={short(source)} is not allowed: it must be a name, 'module:function', a callable or a mapping"
        )
    _check_options(label, target, options, kind)
    if inspect.isclass(target) and issubclass(target, RewardSettings):
        with foreign_code(f"reward '{label}': an option cannot be used (", ")"):
            target, options = target(**options), {}
    return Declared(label, target, options, float(scale), device, **switches)


def _combined(spec: Any) -> Any:
    """A list of rewards as the mapping that it stands for; the thread of a sum is for those of its parts to say."""
    if isinstance(spec, list | tuple):
        return {"name": "combine", "rewards": list(spec)}
    if not isinstance(spec, Mapping) or spec.get("name") != "combine" or "background" not in spec:
        return spec
    parts, others = spec.get("rewards"), {key: value for key, value in spec.items() if key != "background"}
    if not isinstance(parts, list | tuple):
        return others
    named = [dict(one) if isinstance(one := _combined(part), Mapping) else {"name": one} for part in parts]
    return others | {"rewards": [{"background": spec["background"], **one} for one in named]}


def _built(declared: Declared, context: Mapping[str, Any]) -> Any:
    """The reward itself. ``context``: for ``RewardSettings.build``, and for classes that name its keys."""
    label, target, options = declared.label, declared.target, declared.options
    reward: Any = target
    is_placed = False
    with foreign_code(f"reward '{label}' could not be built: "):
        if isinstance(target, RewardSettings):
            device = getattr(target, "device", None)
            reward = target.build(**(context if device is None else {**context, "device": device}))
            is_placed = reward is not target
        elif inspect.isclass(target):
            given = {key: value for key, value in context.items() if key in inspect.signature(target).parameters}
            reward = target(**given | options)
            is_placed = "device" in given
        elif options:
            reward = functools.partial(target, **options)
            reward.background = runs_in_background(target)
            reward.name, reward.differentiable = label, getattr(target, "differentiable", False)
        if hasattr(reward, "to") and not is_placed:
            reward.to(context["device"])
    if not callable(reward):
        raise RewardError(f"reward '{label}' is a {type(reward).__name__}, which is not callable: define __call__")
    return _called_in(reward, declared.background, own=reward is not target)


class _WithFlag(functools.partial):
    """A reward of the user's and attributes of its own; what it lacks is looked up on that reward."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.func, name)


def _called_in(reward: Any, background: bool | None, *, own: bool) -> Any:
    """``reward``, to be called in the background or not. What is not our ``own`` is left as it is and wrapped."""
    if background is None or runs_in_background(reward) is background:
        return reward
    if own:
        with suppress(AttributeError):  # a class with __slots__
            reward.background = background
            return reward
    wrapped: Any = _WithFlag(reward)
    if isinstance(reward, functools.partial):  # flat, so that its options are known for such
        wrapped = _WithFlag(reward.func, *reward.args, **reward.keywords)
        vars(wrapped).update(vars(reward))
    if (parameters := parameters_of(reward)) is not None:
        wrapped.__signature__ = inspect.Signature(parameters)
    wrapped.name, wrapped.background = reward_name(reward), background
    return wrapped


def describe_rewards(kind: Kind = IMAGES) -> list[dict[str, Any]]:
    """One dict per built-in reward: name, description, options, and ``about``: range, needs, extra, licence."""
    rows = []
    for name in kind.table:
        _, settings = find(name, kind)
        options = describe_options(settings)
        about = {"extra": None, "needs": None} | ({"differentiable": False} if kind is IMAGES else {}) | settings.about
        rows.append({"name": name, "description": description(settings), **about, "options": options})
    return rows


def describe_text_rewards() -> list[dict[str, Any]]:
    """The same for text."""
    return describe_rewards(TEXT)


def find(source: str, kind: Kind) -> tuple[str, Any]:
    """What a string names: label and object; of a built-in reward the class of its settings."""
    if source in kind.table:
        module, settings = kind.table[source]
        return source, getattr(importlib.import_module(module), settings)
    if source:
        check_path(source, f"reward {short(source)}", error=RewardError)
    if ":" not in source:
        ours = f"{', '.join(kind.table)}, or your own as 'module:function' or 'file.py:function'"
        if source in kind.other.table:
            raise RewardError(f"reward '{source}' scores {kind.other.subject}, not {kind.subject}: use one of {ours}")
        remedy = did_you_mean(source, kind.table) or f"use one of {ours}"
        raise RewardError(f"reward={short(source)} is unknown: {remedy}")
    target = resolve(source, "reward", error=RewardError)
    if not callable(target):
        raise RewardError(f"reward '{source}' is a {type(target).__name__}: name a function or a class")
    return source.rpartition(":")[2], target


def user_modules(spec: Any) -> list[Any]:
    """The modules of the user's own rewards that ``spec`` names by strings, imported already, in order."""
    if isinstance(spec, Mapping):
        parts = spec.get("rewards", ()) if spec.get("name") == "combine" else ()  # an option like any other elsewhere
        spec = [*([spec["name"]] if "name" in spec else []), *parts]
    if isinstance(spec, list | tuple):
        return [module for one in spec for module in user_modules(one)]
    if not isinstance(spec, str) or ":" not in spec:
        return []
    return [module_of(spec.strip(), "reward", error=RewardError)]


def _check_options(label: str, target: Any, options: Mapping[str, Any], kind: Kind) -> None:
    """Refuse options that ``target`` does not take, naming the nearest one that it does, and required ones left out."""
    if (getattr(target, "__module__", ""), getattr(target, "__name__", "")) in kind.other.table.values():
        raise RewardError(f"reward '{label}' scores {kind.other.subject}, not {kind.subject}: choose another one")
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
                known = sorted([*allowed, *kind.switches, "scale"])
                remedy = did_you_mean(str(key), known) or f"it takes {', '.join(known)}"
                raise RewardError(f"reward '{label}' has no option '{key}': {remedy}")
    if kind.by_name and not inspect.isclass(target):
        return  # what is missing may be a column of the data
    missing = [p.name for p in named if p.default is p.empty and p.name not in options and p.name not in kind.context]
    if missing:
        raise RewardError(f"reward '{label}' needs the option '{missing[0]}': set it")


def _check_call(label: str, parameters: list[inspect.Parameter], kind: Kind) -> list[inspect.Parameter]:
    """The parameters that a call fills with ``kind.arguments``; RewardError where every call would fail."""
    names, other = {p.name for p in parameters}, kind.other
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
            f"reward '{label}' takes too few arguments ({len(positional)}): it must take "
            f"{', '.join(kind.arguments[:-1])} and, optionally, {kind.arguments[-1]}"
        )
    metadata = metadata_place(parameters)
    named = [p for p in parameters if p.name == "metadata"] if metadata == "named" else []
    return [*positional[: 3 if metadata == "third" else 2], *named]
