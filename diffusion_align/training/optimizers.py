"""The optimizers that the setting ``optimizer`` names, each as a well-kept library has it.

adamw       torch's AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101)
adamw_8bit  bitsandbytes' AdamW, whose two moments have 8 bits (Dettmers et al. 2021, arXiv:2110.02861)
adafactor   transformers' Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): second moments of a matrix by row and
            column, no first moment; ``learning_rate`` as it is given, as transformers' own Trainer calls it.
            torch's Adafactor scales each step with the size of the weight, and LoRA's B starts at 0.
prodigy     prodigyopt's Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101): it finds the learning rate, and
            ``learning_rate`` is a factor on that; with the corrections that diffusers' training scripts use
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from diffusion_align.training.config import TrainingConfig

OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "prodigy"]
STATE_BYTES: dict[OptimizerName, int] = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0, "prodigy": 16}
"""Bytes of state per trained weight; Adafactor's, a row and a column of each matrix, are counted as none."""
_PACKAGES: dict[OptimizerName, tuple[str, str]] = {
    "adamw_8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "prodigy"),
}
"""Optimizer -> the package it is from, and the extra that installs it."""
_SMALLEST_FACTOR = 0.01  # of Prodigy's; a smaller one was meant as another optimizer's learning rate


def optimizer_checks(config: TrainingConfig) -> Iterator[str]:
    """Sentences about an optimizer that is not installed, cannot run here, or ignores a setting."""
    name, rate = config.optimizer, config.learning_rate
    package, extra = _PACKAGES.get(name, (None, None))
    if package is not None and importlib.util.find_spec(package) is None:
        yield f"optimizer={name} needs {package}: pip install 'diffusion-align[{extra}]'"
    elif name == "adamw_8bit" and not runs_in_8_bits():
        yield "optimizer=adamw_8bit needs a GPU with this version of bitsandbytes: use adamw, or install a newer one"
    if name == "prodigy" and rate < _SMALLEST_FACTOR:
        yield (
            f"learning_rate={rate:g} is a factor on the learning rate that optimizer=prodigy finds by itself: set "
            "learning_rate=1"
        )
    if name == "adafactor" and config.adam_betas != type(config).model_fields["adam_betas"].default:
        yield "adam_betas has no effect with optimizer=adafactor: leave one of them out"


@functools.cache
def runs_in_8_bits() -> bool:
    """Whether bitsandbytes can take a step on this machine: on CUDA it can, on a CPU from version 0.50 on."""
    import torch

    if torch.cuda.is_available():
        return True
    weight = torch.nn.Parameter(torch.zeros(4096, device=torch.accelerator.current_accelerator(True)))
    weight.grad = torch.zeros_like(weight)
    try:
        _bitsandbytes().AdamW8bit([weight]).step()
    except Exception:  # its versions fail in many ways
        return False
    return True


def make_optimizer(
    config: TrainingConfig, parameters: Sequence[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of a run; its state is tensors and numbers, and a step the same on every process."""
    import torch

    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, betas=config.adam_betas, fused=device.type == "cuda", **common)
        case "adamw_8bit":
            eight_bit: torch.optim.Optimizer = _bitsandbytes().AdamW8bit(parameters, betas=config.adam_betas, **common)
            return eight_bit
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(parameters, scale_parameter=False, relative_step=False, **common)
        case "prodigy":
            from prodigyopt import Prodigy

            with contextlib.redirect_stdout(io.StringIO()):  # it prints how weights decay
                found: torch.optim.Optimizer = Prodigy(
                    parameters, betas=config.adam_betas, use_bias_correction=True, safeguard_warmup=True, **common
                )
            return found


def _bitsandbytes() -> Any:
    """Its optimizers, without what it logs about kernels that these do not use."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.optim

    return bitsandbytes.optim
