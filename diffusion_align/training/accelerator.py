"""Processes, precision and accelerator of a run: the same for pictures and for text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, set_seed

from diffusion_align.errors import UserError, first_line
from diffusion_align.training.config import TrainingConfig, load_yaml
from diffusion_align.training.launch import launched_precision, make_accelerator

Config = TypeVar("Config", bound=TrainingConfig)
Result = TypeVar("Result")


def processes() -> PartialState:
    """What Accelerator will find; made before it, PartialState does not ask the environment for a CPU by itself."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def agreed(prepare: Callable[[], Result]) -> Result:
    """What ``prepare`` returns; where it fails on one process it fails on all, and none waits for it.

    Raises:
        UserError: of another process, with its number; whatever ``prepare`` raised itself goes on as it is.
    """
    failure, result = None, None
    try:
        result = prepare()
    except Exception as error:
        failure = error
    if processes().num_processes > 1:
        said = gather_object([None if failure is None else first_line(failure)])
        first = next((rank for rank, sentence in enumerate(said) if sentence is not None), None)
        if failure is None and first is not None:
            raise UserError(f"process {first}: {said[first]}")
    if failure is not None:
        raise failure
    return cast(Result, result)


def start(config: Config, seconds_a_pass: Callable[[bool], float]) -> tuple[Config, Accelerator]:
    """The accelerator of a run and its settings, ``mixed_precision="auto"`` decided; seeds the global generators.

    Args:
        config: checked settings.
        seconds_a_pass: how long the network takes on the CPU, with bf16 (True) or without.
    """
    if config.mixed_precision == "auto":
        choice = [_faster_precision(config, seconds_a_pass)]
        processes()
        broadcast_object_list(choice)  # every process must use the same
        config = config.model_copy(update={"mixed_precision": choice[0]})
    AcceleratorState._reset_state()  # an earlier run in this process may have used another precision
    accelerator = make_accelerator(
        config.mixed_precision, log_with=config.trackers or None, project_dir=config.output_dir
    )
    set_seed(config.seed)
    return config, accelerator


def best_seconds(forward: Callable[[], object], narrow: bool) -> float:
    """The best of two forward passes on the CPU, after one to warm up."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            forward()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def _faster_precision(config: TrainingConfig, seconds_a_pass: Callable[[bool], float]) -> str:
    """A resumed run's own choice, what accelerate was launched with, a GPU's bf16, or the faster on this CPU."""
    if config.resume and (config.output_dir / "config.yaml").is_file():
        return load_yaml(config.output_dir / "config.yaml").get("mixed_precision", "no")
    if launched := launched_precision():
        return launched
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if seconds_a_pass(True) < 0.9 * seconds_a_pass(False) else "no"
