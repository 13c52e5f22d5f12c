"""A method is one object: the class of its trainer, which says what it needs, costs and logs (see ``Trainer``).

Its settings are another class, so that those of a shipped method are known without importing what trains. A method is
found by name, by ``module:Class`` or ``file.py:Class``, or by an entry point of an installed package, group
``diffusion_align.methods``. No other file names the methods.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_align.errors import ConfigError, UserError, foreign_code, nearest, short
from diffusion_align.references import reference_to, resolve
from diffusion_align.training.config import PLUG_INS, TrainingConfig

if TYPE_CHECKING:
    from diffusion_align.training.trainer import Trainer

DEFAULT = "ddpo"
"""The method of a configuration that names none."""


class Shipped(NamedTuple):
    """``module:Class`` of a shipped method's trainer and of its settings, imported on first use."""

    trainer: str
    settings: str


_IMAGE, _TEXT = "diffusion_align.diffusion", "diffusion_align.llm"
SHIPPED = {
    "ddpo": Shipped(f"{_IMAGE}.ddpo:DDPOTrainer", f"{_IMAGE}.ddpo_settings:DDPOConfig"),
    "diffusion_dpo": Shipped(f"{_IMAGE}.dpo:DiffusionDPOTrainer", f"{_IMAGE}.dpo_settings:DiffusionDPOConfig"),
    "forward": Shipped(f"{_IMAGE}.forward:ForwardTrainer", f"{_IMAGE}.forward_settings:ForwardConfig"),
    "rwr": Shipped(f"{_IMAGE}.reward_weighted:RWRTrainer", f"{_IMAGE}.reward_weighted_settings:RWRConfig"),
    "reward_gradient": Shipped(
        f"{_IMAGE}.reward_gradient:RewardGradientTrainer", f"{_IMAGE}.reward_gradient_settings:RewardGradientConfig"
    ),
    "grpo": Shipped(f"{_TEXT}.grpo:GRPOTrainer", f"{_TEXT}.settings:GRPOConfig"),
    "ppo": Shipped(f"{_TEXT}.ppo:PPOTrainer", f"{_TEXT}.settings:PPOConfig"),
    "dpo": Shipped(f"{_TEXT}.dpo:DPOTrainer", f"{_TEXT}.settings:DPOConfig"),
    "kto": Shipped(f"{_TEXT}.kto:KTOTrainer", f"{_TEXT}.settings:KTOConfig"),
    "reward_model": Shipped(f"{_TEXT}.reward_model:RewardModelTrainer", f"{_TEXT}.settings:RewardModelConfig"),
}
_MODELS = {"image": "a text-to-image model", "text": "this language model"}


class Outline(NamedTuple):
    """What is known of a shipped method before its trainer is imported: see ``Trainer`` and ``TrainingConfig``.

    ``summary`` is the first line of a docstring: what the method does.
    """

    config_class: type[TrainingConfig]
    model_kind: str | None
    dataset_kind: str
    summary: str


def method_of(method: Any, kind: str | None = None) -> type[Trainer[Any]]:
    """The trainer class that a configuration's ``method`` stands for.

    Args:
        method: a shipped method's name, ``package.module:Class``, ``path/to/file.py:Class``, the name of an entry point
            of ``PLUG_INS``, or the class itself.
        kind: the ``model_kind`` it must have, if any.

    Raises:
        ConfigError: it is unknown, no trainer, or trains another kind of model.
    """
    found = _find(method)
    if kind is not None and (found is None or found.model_kind != kind):
        fitting = ", ".join(name for name in SHIPPED if outline_of(name).model_kind == kind)
        raise ConfigError([f"method={_shown(method)} does not train {_MODELS[kind]}: use one of {fitting}"])
    if found is None:
        raise ConfigError([f"method={_shown(method)} is unknown: {nearest(str(method), [*SHIPPED, *plug_ins()])}"])
    return found


def outline_of(method: Any) -> Outline:
    """What has to be known of a method to check its settings; of a shipped one its trainer is not imported.

    Args, Raises: as of ``method_of``.
    """
    if isinstance(method, str) and method in SHIPPED:
        found = config_class = _imported(SHIPPED[method].settings)
    else:
        found = method_of(method)
        config_class = found.config_class
    summary = (inspect.getdoc(found) or "").split("\n")[0].rstrip(".")
    return Outline(config_class, found.model_kind, found.dataset_kind, summary)


def method_name(method: Any) -> Any:
    """What stands in ``config.yaml`` for a method that may be given as a class."""
    if not isinstance(method, type):
        return method
    path = reference_to(method)
    return next((name for name, shipped in SHIPPED.items() if shipped.trainer == path), path)


def plug_ins() -> dict[str, EntryPoint]:
    """Name -> entry point of the methods that installed packages bring."""
    return {point.name: point for point in entry_points(group=PLUG_INS) if point.name not in SHIPPED}


def describe_methods() -> list[tuple[str, list[str]]]:
    """(name, what it does and what it trains) of the shipped methods and of plug-ins."""
    entries = []
    for name in (*SHIPPED, *plug_ins()):
        try:
            found = outline_of(name)
        except ConfigError as error:  # a plug-in that is broken hides no other
            entries.append((name, error.problems))
            continue
        trained = {"image": "a text-to-image model", "text": "a language model", "classifier": "a reward model"}
        entries.append((name, [found.summary, f"trains: {trained.get(str(found.model_kind), 'what it loads itself')}"]))
    return [*entries, ("any other", ["your own trainer class: module:Class or file.py:Class"])]


def _find(method: Any) -> type[Trainer[Any]] | None:
    """None where there is nothing of that name."""
    if isinstance(method, str) and method in SHIPPED:
        return _imported(SHIPPED[method].trainer)
    found = method
    if isinstance(method, str):
        point = None if ":" in method else plug_ins().get(method)
        if point is None and ":" not in method:
            return None
        try:
            if point is None:
                found = resolve(method, "method", noun="Class")
            else:
                with foreign_code(f"method '{method}' cannot be imported (", ")"):
                    found = point.load()
        except UserError as error:
            raise ConfigError([str(error)]) from error
    elif not isinstance(method, type):
        return None
    return _checked(found, f"method={_shown(method)}")


def _checked(found: Any, subject: str) -> type[Trainer[Any]]:
    """What was found, which must be a whole trainer class."""
    from diffusion_align.training.trainer import Trainer

    if not isinstance(found, type) or not issubclass(found, Trainer):
        raise ConfigError(f"{subject} is not a trainer: write a subclass of DenoisingTrainer, TextTrainer or Trainer")
    if missing := getattr(found, "__abstractmethods__", None):
        raise ConfigError(f"{subject} lacks {', '.join(sorted(missing))}: a trainer must define them")
    if not isinstance(found.config_class, type) or not issubclass(found.config_class, TrainingConfig):
        own = short(found.config_class)
        raise ConfigError(f"{subject} has config_class={own}: it must be a subclass of TrainingConfig")
    return found


def _imported(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _shown(method: Any) -> str:
    return short(method.__name__ if isinstance(method, type) else method)
