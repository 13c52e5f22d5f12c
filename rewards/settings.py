"""The options of a reward, declared once: types, ranges, defaults and help. Check, builder and listing read them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from diffusion_align import inputs
from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.errors import RewardError, problems_of, short
from diffusion_align.references import place_of, reference_to
from diffusion_align.rewards.base import reward_name
from diffusion_align.training.section import sentences

if TYPE_CHECKING:
    import torch


class RewardSettings(BaseModel):
    """The options of a reward: subclass it, with a field for each option and a docstring that says what is scored.

    Its first line reads "WHAT: HOW.", or "WHAT."; a table of rewards shows WHAT.
    A subclass with ``__call__`` is the reward itself. One that loads a model has a ``build`` that returns the reward.
    A check of your own (a pydantic validator) may raise ValueError, whose sentence follows the option's name and value,
    or RewardError, whose sentence stands alone. Nothing is loaded before ``build``.

    Attributes:
        about: what ``diffusion-align list rewards`` prints besides the options.

    Raises:
        RewardError: an option is unknown or not allowed.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )
    about: ClassVar[dict[str, Any]] = {}
    differentiable: ClassVar[bool] = False

    def __init__(self, /, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            own = error.errors()[0].get("ctx", {}).get("error")
            sentence = str(own) if isinstance(own, RewardError) else sentences(type(self), error)[0]
            part = sentence.startswith("reward '")  # of a reward inside of this one
            raise RewardError(sentence if part else f"reward '{reward_name(type(self))}': {sentence}") from None

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> Any:
        """The reward, ready on ``device``; ``model`` is the diffusion model that is trained."""
        return self


def check_device(device: Any) -> Any:
    inputs.check_device(device, f"device={device!r}", error=RewardError)
    return device


Device = Annotated[
    Any, AfterValidator(check_device), Field(description="where its network runs, if not where the model is trained")
]
Seconds = Annotated[float, Field(gt=0, le=LARGEST)]


def description(settings: type[RewardSettings]) -> str:
    """What is scored: the first line of the docstring."""
    return (inspect.getdoc(settings) or "").splitlines()[0]


def describe_options(settings: type[RewardSettings]) -> dict[str, str]:
    """Option -> the values it takes, its default and its help; bounds beyond any use are left out."""
    rows = {}
    for name, field in settings.model_fields.items():
        found = [(word, getattr(one, sign, None)) for one in field.metadata for sign, word in _BOUNDS.items()]
        bounds = [f"{word} {bound:g}" for word, bound in found if bound is not None and abs(bound) < MOST]
        default = "optional" if field.default is None else f"default {short(field.default)}"
        about = [" ".join([_values(field.annotation), *bounds]), "required" if field.is_required() else default]
        rows[name] = f"({', '.join(filter(None, about))}): {field.description}"
    return rows


_BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
_VALUES: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "",
    list: "list",
    tuple: "list",
    dict: "mapping",
    Any: "",
    type(None): "",
}


def _values(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin is Annotated:
        return _values(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(filter(None, dict.fromkeys(map(_values, inner))))
    return _VALUES.get(origin or annotation, "")


def _by_name(reward: Any) -> Any:
    """A function cannot be written to YAML; its name can."""
    if isinstance(reward, list | tuple):
        return [_by_name(one) for one in reward]
    if isinstance(reward, RewardSettings):  # a name and options, which resume compares
        own = not type(reward).__module__.startswith("diffusion_align.rewards.")
        name = reference_to(type(reward)) if own else reward_name(reward)
        reward = {"name": name, **reward.model_dump(exclude_defaults=True)}
    if isinstance(reward, Mapping):
        written = {key: _by_name(value) if key in ("name", "rewards") else value for key, value in reward.items()}
        inner = written.get("name")
        return {**written, **inner} if isinstance(inner, dict) else written
    return f"{place_of(str(reward.__module__))}:{reward_name(reward)}" if callable(reward) else reward


RewardSetting = Annotated[Any, PlainSerializer(_by_name)]
"""What ``build_reward`` takes: a name, 'module:function', a mapping with options or a function."""


def reward_checks(reward: Any, kind: Literal["image", "text"]) -> Iterator[str]:
    """A sentence about each reward of a setting that cannot be built; imports your code if it names some, no model."""
    from diffusion_align.rewards import build  # which imports what rewards are made of, this file too

    if reward is None:
        return
    given = reward if isinstance(reward, list | tuple) else [reward]
    if not given:
        yield "reward is an empty list: give at least one"
    elif kind == "image":  # a list is their sum
        given = [reward]
    for one in given:
        yield from problems_of(build.declare, build.IMAGES if kind == "image" else build.TEXT, one)


def gradient_checks(reward: Any, held_out: Any) -> Iterator[str]:
    """A sentence about each image reward of a setting that is known to have no gradient, and one if ``held_out``, the
    setting of a held-out reward, shares a reward with it."""
    from diffusion_align.rewards import gradients  # which imports what rewards are made of, this file too

    yield from gradients.differentiable_checks(reward)
    if gradients.share_a_reward(reward, held_out):
        yield (
            "evaluation.reward is the reward that is trained on, so it would not notice what that overlooks: set "
            "evaluation.reward to another one, or evaluation=null"
        )


def check_diversity(measure: str) -> None:
    """``measure``: pixels, clip or the CLIP that embeds images to compare them.

    Raises:
        UserError: there is no such CLIP.
    """
    from diffusion_align.rewards.image.clip import check_clip

    if measure not in ("clip", "pixels"):
        check_clip(measure)


def weight_checks(reward: Any, weights: Sequence[float] | None, *, name: str = "reward_weights") -> Iterator[str]:
    """A sentence about the setting ``name`` if it has not one weight per reward; ``reward``: one, or a list."""
    count = len(reward) if isinstance(reward, list | tuple) else 1
    if weights is not None and len(weights) != count:
        yield f"{name}={weights} must be a list of {count}: one weight per reward"
