"""The options of a reward, declared once: types, ranges, defaults and help. Check, builder and listing read them."""

import inspect
import types
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from diffusion_align import inputs
from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.errors import RewardError, short
from diffusion_align.rewards.base import reward_name
from diffusion_align.training.config import sentences


class RewardSettings(BaseModel):
    """The options of a reward: subclass it, with a field for each option and a docstring that says what is scored.

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


class NetworkSettings(RewardSettings):
    """The options of every reward that runs a network."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="of the network; half precision needs a GPU"
    )
    batch_size: int = Field(64, ge=1, le=MOST, description="images or texts per forward pass")
    device: Device = None


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
