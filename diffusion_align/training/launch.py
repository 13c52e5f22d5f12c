"""What a run takes from accelerate's environment: where it runs, never how it trains.

accelerate reads some forty variables, most of them set by ``accelerate launch``. Each is in ``ENVIRONMENT`` or begins
with one of ``BEHIND_A_SWITCH``: honoured, overruled by the settings, or refused in a sentence before a model is loaded.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from diffusion_align.errors import ConfigError, UserError, first_line, problems_of
from diffusion_align.inputs import check_device
from diffusion_align.training.config import AUTO, BATCH_SIZES, FP16_NEEDS_GPU, TrainingConfig
from diffusion_align.training.precision import Machine, with_precision
from diffusion_align.training.reading import load_yaml

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.state import PartialState

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


def check_launch(mixed_precision: Any = None, environment: Mapping[str, str] | None = None) -> None:
    """Look at what the environment requests from accelerate.

    Args:
        mixed_precision: the setting; "auto" and None take what the environment says.
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
    of_device = problems_of(check_device, device, f"ACCELERATE_TORCH_DEVICE={device!r}")
    problems += [f"{problem}, or unset it" for problem in of_device]
    launched = given.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = "no" if mixed_precision is False else mixed_precision
    if launched == "fp8" or (launched not in ("", "no", wanted) and wanted not in (None, "auto")):
        remedy = "" if launched == "fp8" else f"set mixed_precision={launched}, or "
        problems.append(
            f"accelerate was launched with mixed_precision={launched} and the settings have mixed_precision={wanted}: "
            f"{remedy}launch with --mixed_precision no"
        )
    if problems:
        raise ConfigError(problems)


def launched_precision() -> str | None:
    """ "fp16" or "bf16" where ``accelerate launch`` was told so, for a ``mixed_precision`` that is not given."""
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
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

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


Config = TypeVar("Config", bound=TrainingConfig)
Result = TypeVar("Result")
Decided = tuple[dict[str, Any], str]
"""Setting -> what it was measured to be; and a line about that."""
FASTER = 0.9
"""On a CPU bf16 must take no more than this share of the time to be taken."""


def processes() -> PartialState:
    """What Accelerator will find; made before it, PartialState does not read ACCELERATE_USE_CPU by itself."""
    from accelerate.state import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def is_first_process() -> bool:
    """Told by the variables that launchers set, before anything connects the processes."""
    given = (os.environ.get(name, "") for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"))
    return int(next((rank for rank in given if rank.isdigit()), 0)) == 0


def agreed(prepare: Callable[[], Result]) -> Result:
    """What ``prepare`` returns; where it fails on one process it fails on all, and none waits for it.

    Raises:
        UserError: of another process, with its number; whatever ``prepare`` raised itself is raised unchanged.
    """
    from accelerate.utils import gather_object

    failure, result = None, None
    try:
        result = prepare()
    except Exception as error:
        failure = error
    if processes().num_processes > 1:
        failures = gather_object([None if failure is None else first_line(failure)])
        first = next((rank for rank, sentence in enumerate(failures) if sentence is not None), None)
        if failure is None and first is not None:
            raise UserError(f"process {first}: {failures[first]}")
    if failure is not None:
        raise failure
    return cast(Result, result)


def start(config: Config, seconds_per_pass: Callable[[bool], float]) -> tuple[Config, Accelerator]:
    """The accelerator of a run and its settings, their precision decided; seeds the global generators.

    Args:
        config: checked settings.
        seconds_per_pass: how long the network takes on the CPU, with bf16 (True) or without.
    """
    config = decide_precision(config)
    if config.mixed_precision == "auto":

        def faster() -> Decided:
            bf16 = seconds_per_pass(True) < FASTER * seconds_per_pass(False)
            return {"mixed_precision": "bf16" if bf16 else "no"}, ""

        config = measured(config, faster)
    accelerator = run_accelerator(config)
    seed_generators(config)
    return config, accelerator


def seed_generators(config: TrainingConfig) -> None:
    """Those that are global; what is trained is initialized with them."""
    from accelerate.utils import set_seed

    set_seed(config.seed)


def run_accelerator(config: TrainingConfig) -> Accelerator:
    """Of a run whose precision is decided; it draws no random number."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # an earlier run in this process may have used another precision
    return make_accelerator(config.mixed_precision, log_with=config.trackers or None, project_dir=config.output_dir)


def measured(config: Config, measure: Callable[[], Decided]) -> Config:
    """``config`` with what the first process measures, in every process; the first prints a line about it."""
    alone = processes().is_main_process
    found, told = agreed(lambda: measure() if alone else ({}, ""))
    if alone and told:
        print(told, file=sys.stderr, flush=True)
    return _as_first_process(config.model_copy(update=found))


def kept_sizes(config: Config) -> Config:
    """``config`` with the batch sizes of the run that is resumed, which measures none again."""
    unknown = [name for name in BATCH_SIZES if getattr(config, name) == AUTO]
    own = (_resumed(config) if unknown else None) or {}
    return config.model_copy(update={name: own[name] for name in unknown if isinstance(own.get(name), int)})


def _resumed(config: TrainingConfig) -> Mapping[str, Any] | None:
    """The settings of the run that is resumed, if it has begun."""
    file = config.output_dir / "config.yaml"
    return agreed(lambda: load_yaml(file) if config.resume and file.is_file() else None)


def decide_precision(config: Config) -> Config:
    """``with_precision`` of this machine and of the run that is resumed, in every process as the first has it.

    It is known before a model is loaded, but for ``mixed_precision="auto"`` on a CPU, which ``start`` measures.

    Raises:
        ConfigError: ``config.yaml`` of the run cannot be read; or it, or ``accelerate launch``, says fp16 on a CPU.
    """
    if config.mixed_precision in (None, "auto") or getattr(config, "dtype", "float32") is None:
        config = _as_first_process(with_precision(config, this_machine(), _resumed(config)))
    agreed(lambda: _check_precision(config.mixed_precision))
    return config


def _check_precision(mixed_precision: str | None) -> None:
    if mixed_precision == "fp16" and not this_machine().gpu:
        raise ConfigError([FP16_NEEDS_GPU])


def this_machine() -> Machine:
    import torch

    gpu = processes().device.type == "cuda"
    bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return Machine(gpu=gpu, bf16=bf16, launched=launched_precision())


def _as_first_process(config: Config) -> Config:
    """Broadcast what is decided: all processes compute in the same precision and batches, whatever GPU each has and
    whatever it measured."""
    from accelerate.utils import broadcast_object_list

    names = [name for name in ("mixed_precision", "dtype", *BATCH_SIZES) if name in type(config).model_fields]
    found = [getattr(config, name) for name in names]
    processes()
    broadcast_object_list(found)
    return config.model_copy(update=dict(zip(names, found, strict=True)))


def time_forward(forward: Callable[[], object], use_bf16: bool) -> float:
    """The best of two forward passes on the CPU, after one to warm up."""
    import torch

    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            forward()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])
