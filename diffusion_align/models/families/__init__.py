"""Families of diffusers pipelines: what sets one apart, in one short file each.

``ModelFamily`` is the contract. A family of the user's is named where a model is: ``file.py:Class``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusion_align.errors import ConfigError, UserError, foreign_code, short
from diffusion_align.models.families.contract import ATTENTION, Conditioning, ModelFamily
from diffusion_align.models.families.flux import Flux
from diffusion_align.models.families.sd3 import StableDiffusion3
from diffusion_align.models.families.sdxl import StableDiffusionXL
from diffusion_align.models.families.stable_diffusion import StableDiffusion
from diffusion_align.models.families.z_image import ZImage
from diffusion_align.references import reference_to, resolve

__all__ = [
    "ATTENTION",
    "SHIPPED",
    "Conditioning",
    "Flux",
    "ModelFamily",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "ZImage",
    "check_settings",
    "family_name",
    "family_of",
    "family_of_class",
    "family_of_network",
    "find_family",
    "give_family",
]

SHIPPED: dict[str, ModelFamily] = {
    name: family
    for family in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux(), ZImage())
    for name in family.pipelines
}
"""Class of pipeline -> its family."""
_ATTRIBUTE = "model_family"
"""Of a diffusers pipeline: the family that the user named for it."""
_GIVEN_BY_EVERY_FAMILY = ("pipelines", "network_class")


def find_family(family: str | type[ModelFamily] | None) -> ModelFamily | None:
    """The family that the setting ``family`` names, ``path/to/file.py:Class`` or ``package.module:Class``, if any.

    Raises:
        UserError: it cannot be found, or is no whole family.
    """
    if family is None:
        return None
    found, subject = resolve(family, "family", noun="Class"), f"family={family_name(family)!r}"
    if not isinstance(found, type) or not issubclass(found, ModelFamily):
        raise UserError(f"{subject} is not a model family: write a subclass of ModelFamily")
    missing = [*found.__abstractmethods__, *(name for name in _GIVEN_BY_EVERY_FAMILY if not hasattr(found, name))]
    if missing:
        raise UserError(f"{subject} lacks {', '.join(sorted(missing))}: a model family must define them")
    if not isinstance(found.pipelines, tuple | list) or not all(isinstance(name, str) for name in found.pipelines):
        raise UserError(f"{subject} has pipelines={short(found.pipelines)}: give a tuple of names of diffusers classes")
    with foreign_code(f"{subject} raised "):
        made = found()
    _check_arguments(made, subject)
    return made


def _check_arguments(family: ModelFamily, subject: str) -> None:
    """UserError unless each function takes the arguments of that of ``ModelFamily``, by which it is called."""
    for name, ours in vars(ModelFamily).items():
        if name.startswith("_") or not inspect.isfunction(ours):
            continue
        _, *wanted = inspect.signature(ours).parameters.values()  # without self
        positional = [one.name for one in wanted if one.kind is one.POSITIONAL_OR_KEYWORD]
        named = [one.name for one in wanted if one.kind is one.KEYWORD_ONLY]
        try:
            inspect.signature(getattr(family, name)).bind(*positional, **dict.fromkeys(named))
        except (TypeError, ValueError):  # it takes others, or is no function
            arguments = ", ".join([*positional, *(f"{one}=" for one in named)])
            raise UserError(
                f"{subject}: {name} must be a function of {arguments}, like that of ModelFamily (docs/extending.md)"
            ) from None


def family_name(family: str | type[ModelFamily] | None) -> str | None:
    """What stands in ``config.yaml`` for a family that may be given as a class."""
    return reference_to(family) if isinstance(family, type) else family


def family_of_class(name: Any, chosen: ModelFamily | None = None, subject: str = "the pipeline") -> ModelFamily:
    """The family of the pipelines of a class of diffusers.

    Args:
        name: of the class.
        chosen: by the user.
        subject: how the sentence about a class that is not supported begins.

    Raises:
        UserError: the class is not supported, or is not of the chosen family.
    """
    if chosen is not None and name not in chosen.pipelines:
        raise UserError(
            f"{subject} is a {name}, and family={type(chosen).__name__} is for {', '.join(chosen.pipelines)}: name "
            "another model or family"
        )
    if chosen is None and name not in SHIPPED:
        raise UserError(
            f"{subject} is a {name}, which is not supported: use one of {', '.join(SHIPPED)}, or set family to a class "
            "of your own (docs/extending.md)"
        )
    return chosen or SHIPPED[name]


def family_of(pipeline: Any) -> ModelFamily:
    """The family of a diffusers pipeline; UserError as of ``family_of_class``."""
    return family_of_class(type(pipeline).__name__, getattr(pipeline, _ATTRIBUTE, None))


def give_family(pipeline: Any, chosen: ModelFamily | None) -> None:
    """Let ``pipeline`` be of the family that the user has chosen, if any; UserError as of ``family_of_class``."""
    family_of_class(type(pipeline).__name__, chosen)
    if chosen is not None:
        setattr(pipeline, _ATTRIBUTE, chosen)


def family_of_network(config: Mapping[str, Any]) -> ModelFamily:
    """The shipped family whose network has a configuration, where no pipeline is at hand."""
    if "cap_feat_dim" in config:
        return SHIPPED["ZImagePipeline"]
    if "guidance_embeds" in config:
        return SHIPPED["FluxPipeline"]
    if "joint_attention_dim" in config:
        return SHIPPED["StableDiffusion3Pipeline"]
    is_xl = config.get("addition_embed_type") == "text_time"
    return SHIPPED["StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"]


def check_settings(family: ModelFamily, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """ConfigError if settings of a run (name -> value) are not for a network of ``family`` and ``config``."""
    if problems := list(family.setting_checks(config, settings)):
        raise ConfigError(problems)
