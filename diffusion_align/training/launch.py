"""What a run takes from accelerate's environment: where it runs, never how it trains.

accelerate reads some forty variables, most of them set by ``accelerate launch``. Each is in ``ENVIRONMENT`` or begins
with one of ``BEHIND_A_SWITCH``: honoured, overruled by the settings, or refused in a sentence before a model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from diffusion_align.devices import device_problem
from diffusion_align.errors import ConfigError

Treatment = Literal["honoured", "overruled", "compared", "refused", "idle"]
ENVIRONMENT: dict[str, Treatment] = {
    # Where and with what a run runs.
    "ACCELERATE_USE_CPU": "honoured",
    "ACCELERATE_TORCH_DEVICE": "honoured",
    "ACCELERATE_CPU_AFFINITY": "honoured",
    "ACCELERATE_NUM_PROCESSES": "honoured",
    "ACCELERATE_IN_TPU_POD": "honoured",
    "ACCELERATE_DEBUG_MODE": "honoured",
    "ACCELERATE_DEBUG_RDV_FILE": "honoured",
    "ACCELERATE_LOG_LEVEL": "honoured",
    "ACCELERATE_ENABLE_RICH": "honoured",
    "ACCELERATE_INIT_INCLUDE_BUFFERS": "honoured",
    "ACCELERATE_USE_IPEX": "honoured",  # by accelerate 1.10
    # micro_batch_size and updates_per_epoch say what is accumulated; accelerate would divide every gradient by it.
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "overruled",
    # The setting of that name decides. ``accelerate launch`` writes "no" where it was told nothing.
    "ACCELERATE_MIXED_PRECISION": "compared",
    # Other ways to train, which nothing here supports yet.
    "ACCELERATE_USE_DEEPSPEED": "refused",
    "ACCELERATE_USE_FSDP": "refused",
    "ACCELERATE_USE_MEGATRON_LM": "refused",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "refused",
    "ACCELERATE_DYNAMO_BACKEND": "refused",
    "ACCELERATE_USE_SAGEMAKER": "refused",  # with a data-parallel library of its own; plain jobs are not
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "refused",
    # Read only behind one of those, on a TPU, or where accelerate prepares a model, which it never does here.
    "ACCELERATE_CONFIG_DS_FIELDS": "idle",
    "ACCELERATE_GRADIENT_CLIPPING": "idle",
    "ACCELERATE_ALLOW_CP_STANDALONE": "idle",
    "ACCELERATE_BYPASS_DEVICE_MAP": "idle",
    "ACCELERATE_DOWNCAST_BF16": "idle",
}
BEHIND_A_SWITCH = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_DYNAMO_", "ACCELERATE_FP8_")
"""Options of what is refused (``_BACKEND`` of dynamo is its switch, and in the table)."""

_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
_FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY")
_TRUE, _FALSE = {"y", "yes", "t", "true", "on", "1"}, {"n", "no", "f", "false", "off", "0"}
_UNSUPPORTED_STATES = ("DEEPSPEED", "FSDP", "MEGATRON_LM")


def check_launch(mixed_precision: Any = "no", environment: Mapping[str, str] | None = None) -> None:
    """Look at what the environment asks of accelerate.

    Args:
        mixed_precision: the setting; "auto" takes what the environment says.
        environment: ``os.environ`` when not given.

    Raises:
        ConfigError: with a sentence about each thing that a run cannot do.
    """
    given = os.environ if environment is None else environment
    problems = []
    for name, engine in _ENGINES.items():
        if given.get(name, "").lower() in _TRUE:
            problems.append(
                f"{name}={given[name]} asks for {engine}, which is not supported: launch without it (plain processes, "
                "`accelerate launch --multi_gpu`), or unset it"
            )
    if (backend := given.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() not in ("", "no"):
        problems.append(
            f"ACCELERATE_DYNAMO_BACKEND={backend} asks for torch.compile, which is not supported: launch with "
            "--dynamo_backend no, or unset it"
        )
    distributed = given.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "")
    if given.get("ACCELERATE_USE_SAGEMAKER", "").lower() == "true" and distributed != "NO":
        problems.append(
            f"ACCELERATE_USE_SAGEMAKER with ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE={distributed} asks for SageMaker's "
            "own data parallelism, which is not supported: set the latter to NO"
        )
    for name in _FLAGS:
        if name in given and given[name].lower() not in _TRUE | _FALSE:
            problems.append(f"{name}={given[name]!r} must be true or false: set it to one, or unset it")
    device = given.get("ACCELERATE_TORCH_DEVICE")
    if problem := device_problem(device):
        problems.append(f"ACCELERATE_TORCH_DEVICE={device!r} {problem}: correct or unset it")
    launched = given.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = "no" if mixed_precision is False else mixed_precision
    if launched == "fp8" or (launched not in ("", "no", wanted) and wanted != "auto"):
        remedy = "" if launched == "fp8" else f"set mixed_precision={launched}, or "
        problems.append(
            f"accelerate was launched with mixed_precision={launched} and the settings have mixed_precision={wanted}: "
            f"{remedy}launch with --mixed_precision no"
        )
    if problems:
        raise ConfigError(problems)


def launched_precision() -> str | None:
    """ "fp16" or "bf16" where ``accelerate launch`` was told so, for ``mixed_precision=auto``."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return launched if launched in ("fp16", "bf16") else None


def make_accelerator(mixed_precision: str | None = None, **options: Any) -> Accelerator:
    """An ``Accelerator`` of which the environment decides where it runs, and nothing else.

    Args:
        mixed_precision: that of the settings; when not given, what this process began with, or none.
        options: of ``Accelerator``.

    Raises:
        ConfigError: see ``check_launch``.
    """
    begun = AcceleratorState().mixed_precision if AcceleratorState._shared_state else None
    check_launch(mixed_precision or begun or "no")
    return Accelerator(
        mixed_precision=mixed_precision or begun or "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        **options,
    )


def check_accelerator(accelerator: Any) -> None:
    """Look at an ``Accelerator`` made elsewhere.

    Raises:
        ConfigError: the numbers of a run would be wrong under it.
    """
    problems = []
    if (steps := getattr(accelerator, "gradient_accumulation_steps", 1)) != 1:
        problems.append(
            f"the Accelerator has gradient_accumulation_steps={steps} and would divide every gradient by it: make it "
            "without; micro_batch_size and updates_per_epoch say what is accumulated"
        )
    kind = getattr(getattr(accelerator, "distributed_type", None), "value", "NO")
    if kind in _UNSUPPORTED_STATES:
        problems.append(f"the Accelerator is one of {kind}, which is not supported: use plain processes")
    if problems:
        raise ConfigError(problems)
