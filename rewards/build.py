"""From what a config or a caller says to a reward: names, references to your own code, options, scale."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from diffusion_align.bounds import LARGEST
from diffusion_align.errors import short
from diffusion_align.rewards.base import (
    Reward,
    RewardError,
    ask_reward,
    check_prompts,
    parameters_of,
    reward_name,
)
from diffusion_align.rewards.foreign import foreign_code, runs_in_background
from diffusion_align.rewards.image.clip import unshared
from diffusion_align.rewards.resolve import IMAGES, Kind, check_options, find
from diffusion_align.rewards.settings import RewardSettings, describe_options, description


class ScaledReward:
    """``scale`` times another reward; -1 turns its sign."""

    def __init__(self, reward: Any, scale: float):
        self.reward, self.scale = reward, scale
        self.name = f"{scale:g}*{reward_name(reward)}"
        self.differentiable = bool(getattr(reward, "differentiable", False))
        self.background = runs_in_background(reward)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.scale * ask_reward(self.reward, images, prompts, metadata)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        check_prompts(self.reward, prompts, metadata)

    def to(self, device: str | torch.device) -> "ScaledReward":
        if hasattr(self.reward, "to"):
            self.reward.to(device)
        return self


class OffloadedReward:
    """A reward whose model is on ``device`` only while it scores, and in main memory otherwise: without gradients."""

    differentiable = False

    def __init__(self, reward: Any, device: str | torch.device):
        self.reward, self.device, self.name = reward, device, reward_name(reward)
        self.background = runs_in_background(reward)
        reward.to("cpu")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        self.reward.to(self.device)
        try:
            return ask_reward(self.reward, images, prompts, metadata)
        finally:
            self.reward.to("cpu")

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        check_prompts(self.reward, prompts, metadata)

    def to(self, device: str | torch.device) -> "OffloadedReward":
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
        model: name or path of the diffusion model being trained; the default CLIP depends on it.

    Raises:
        RewardError: whatever `reward_problem` reports, or the reward's model cannot be loaded.
    """
    spec, offload = _without(_combined(spec), "offload")
    with unshared() if offload else nullcontext():
        reward, scale = build(IMAGES, spec, {"model": model, "device": device})
    if offload:
        if not hasattr(reward, "to"):
            raise RewardError(f"reward '{reward_name(reward)}' has no to(device), so offload=true cannot move it")
        reward = OffloadedReward(reward, spec.get("device", device))
    return reward if scale == 1.0 else ScaledReward(reward, scale)


def reward_problem(spec: Any) -> str | None:
    """What is wrong with ``spec``, in one sentence, or None. Imports your code if it names some; loads no model."""
    try:
        spec, _ = _without(_combined(spec), "offload")
    except RewardError as error:
        return str(error)
    return problem(IMAGES, spec)


def _combined(spec: Any) -> Any:
    """A list of rewards as the mapping that it stands for; the thread of a sum is for those of its parts to say."""
    if isinstance(spec, list | tuple):
        return {"name": "combine", "rewards": list(spec)}
    if not isinstance(spec, Mapping) or spec.get("name") != "combine" or "background" not in spec:
        return spec
    spec, background = _without(spec, "background")
    parts = spec.get("rewards")
    if isinstance(parts, list | tuple):
        named = [dict(one) if isinstance(one := _combined(part), Mapping) else {"name": one} for part in parts]
        spec["rewards"] = [{"background": background, **one} for one in named]
    return spec


def _without(spec: Any, option: str) -> tuple[Any, bool | None]:
    """``spec`` without an option that is for rewards of every kind, and its value, None where it has none."""
    if not isinstance(spec, Mapping) or option not in spec:
        return spec, None
    if not isinstance(spec[option], bool):
        raise RewardError(f"{option}={spec[option]!r} of a reward must be true or false")
    return {key: value for key, value in spec.items() if key != option}, spec[option]


class _WithFlag(functools.partial):
    """A reward of the user's and attributes of its own; what it lacks is asked of that reward."""

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


def describe_rewards() -> list[dict[str, Any]]:
    """One dict a built-in reward: name, description, range, extra, licence, differentiable, options."""
    return describe(IMAGES)


def build(kind: Kind, spec: Any, context: Mapping[str, Any]) -> tuple[Any, float]:
    """The reward of ``kind`` that ``spec`` describes, and the scale to multiply its scores with.

    ``context``, with the key ``device``: for ``RewardSettings.build``, and for classes that name its keys.
    """
    spec, background = _without(spec, "background")
    label, target, options, scale = _prepare(kind, spec)
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
        raise RewardError(f"reward '{label}' gives a {type(reward).__name__}, which is not callable")
    return _called_in(reward, background, own=reward is not target), scale


def problem(kind: Kind, spec: Any) -> str | None:
    """What is wrong with ``spec`` as a reward of ``kind``, in one sentence, or None."""
    try:
        _prepare(kind, _without(spec, "background")[0])
    except RewardError as error:
        return str(error)
    return None


def describe(kind: Kind) -> list[dict[str, Any]]:
    """One dict per built-in reward of ``kind``: name, description, what is said ``about`` it, and its options."""
    rows = []
    for name in kind.table:
        _, settings = find(name, kind)
        options = describe_options(settings)
        about = {"name": name, "description": description(settings), **settings.about, "options": options}
        rows.append({"extra": None} | about)
    return rows


def _prepare(kind: Kind, spec: Any) -> tuple[str, Any, dict[str, Any], float]:
    """Label, settings or class or callable, checked options, scale. Every check that needs no model is made here."""
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    if "name" not in options:
        raise RewardError(f"a reward given as a mapping needs the key 'name', got {sorted(map(str, options))}")
    source, scale = options.pop("name"), options.pop("scale", 1.0)
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or scale == 0 or not -LARGEST <= scale <= LARGEST:
        raise RewardError(f"scale={short(scale)} of a reward must be a finite number other than 0, at most {LARGEST:g}")
    if isinstance(source, str):
        label, target = find(source.strip(), kind)
    elif callable(source) or isinstance(source, RewardSettings):
        label, target = reward_name(source), source
        if isinstance(source, RewardSettings) and options:
            raise RewardError(f"reward '{label}' is settings already: give its options ({', '.join(options)}) to those")
    else:
        raise RewardError(
            f"a reward must be a name, 'module:function', a callable or a mapping, got {type(source).__name__}"
        )
    check_options(label, target, options, kind)
    if inspect.isclass(target) and issubclass(target, RewardSettings):
        with foreign_code(f"reward '{label}': an option cannot be used (", ")"):
            target, options = target(**options), {}
    return label, target, options, float(scale)
