"""What ``mixed_precision`` and ``dtype`` are where the settings leave them to the machine; and TF32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusion_align.training.config import TrainingConfig

Config = TypeVar("Config", bound=TrainingConfig)
BEFORE = {"mixed_precision": "no", "dtype": "float32"}
"""Values of runs whose ``config.yaml`` lacks them or says null."""


@dataclass(frozen=True)
class Machine:
    """What a run trains on.

    Attributes:
        gpu: whether that is a GPU.
        bf16: whether it computes in bfloat16 without emulation.
        launched: "fp16" or "bf16" where ``accelerate launch`` was told so.
    """

    gpu: bool = False
    bf16: bool = False
    launched: str | None = None


def with_precision(config: Config, machine: Machine, own: Mapping[str, Any] | None = None) -> Config:
    """``config`` with values for ``mixed_precision`` and ``dtype`` where they are null; "auto" is left on a CPU alone.

    On a GPU with bfloat16 the network runs in it, and under LoRA the frozen weights are kept in it: in float32 those of
    linear layers and convolutions would be cast again in every pass. (CUDA's autocast wants those of normalizations in
    float32: see ``cast_norms_once``.) Elsewhere both are float32; in float16, which overflows, a run trains only if
    told to.

    Args:
        own: the settings of the run that is resumed, which keeps its own.
    """
    given = getattr(config, "dtype", None)
    mixed: str | None = config.mixed_precision
    if mixed in (None, "auto"):
        if own is not None:
            mixed = own.get("mixed_precision") or BEFORE["mixed_precision"]
        elif machine.launched is not None:
            mixed = machine.launched
        elif machine.bf16 and (mixed == "auto" or given != "float16"):
            mixed = "bf16"
        elif mixed == "auto":
            mixed = "fp16" if machine.gpu else "auto"
        else:
            mixed = "no"
    found = {"mixed_precision": mixed}
    if given is None and "dtype" in type(config).model_fields:
        narrow = machine.bf16 and mixed == "bf16" and getattr(config, "lora", None) is not None
        found["dtype"] = "bfloat16" if narrow else "float32"
        if own is not None:
            found["dtype"] = own.get("dtype") or BEFORE["dtype"]
    return config.model_copy(update=found)


@contextmanager
def matrix_products_in_tf32(wanted: bool) -> Iterator[None]:
    """Inside, float32 matrix products on a GPU are in TF32, if ``wanted``; else as the process has them.

    Convolutions are in TF32 by torch's own default.
    """
    if not wanted:  # torch refuses even to look where the process has set ``torch.backends``' ``fp32_precision``
        yield
        return
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
