"""A method is one object: the class of its trainer, which says what it needs, costs and logs (see ``Trainer``).

No other file names the methods.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffusion_align.errors import ConfigError, short
from diffusion_align.training.config import nearest

if TYPE_CHECKING:
    from diffusion_align.training.trainer import Trainer

DEFAULT = "ddpo"
"""The method of a configuration that names none."""
SHIPPED = {
    "ddpo": "diffusion_align.diffusion.ddpo:DDPOTrainer",
    "diffusion_dpo": "diffusion_align.diffusion.dpo:DiffusionDPOTrainer",
    "grpo": "diffusion_align.llm.grpo:GRPOTrainer",
    "ppo": "diffusion_align.llm.ppo:PPOTrainer",
    "dpo": "diffusion_align.llm.dpo:DPOTrainer",
    "kto": "diffusion_align.llm.kto:KTOTrainer",
    "reward_model": "diffusion_align.llm.reward_model:RewardModelTrainer",
}
"""Name -> trainer class, imported when it is asked for."""
_MODELS = {"image": "a text-to-image model", "text": "this language model"}


def method_of(name: Any, kind: str | None = None) -> type[Trainer[Any]]:
    """The trainer class that ``method: name`` stands for.

    Args:
        name: as in a configuration.
        kind: the ``model_kind`` it must have, if any.

    Raises:
        ConfigError: there is none of that name, or it trains another kind of model.
    """
    known = isinstance(name, str) and name in SHIPPED
    if kind is not None and (not known or _imported(name).model_kind != kind):
        fitting = ", ".join(other for other in SHIPPED if _imported(other).model_kind == kind)
        raise ConfigError([f"method={short(name)} does not train {_MODELS[kind]}: use one of {fitting}"])
    if not known:
        raise ConfigError([f"method={short(name)} is unknown: {nearest(str(name), list(SHIPPED))}"])
    return _imported(name)


def _imported(name: str) -> type[Trainer[Any]]:
    module, _, attribute = SHIPPED[name].partition(":")
    found: type[Trainer[Any]] = getattr(importlib.import_module(module), attribute)
    return found
