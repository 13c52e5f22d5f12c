"""accelerate's environment decides where a run runs and never how it trains; and processes that fail before it."""

import re
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin

from diffusion_align.errors import ConfigError, UserError
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.training import launch
from diffusion_align.training.launch import (
    BEHIND_A_SWITCH,
    ENVIRONMENT,
    agreed,
    check_accelerator,
    check_launch,
    launched_precision,
    make_accelerator,
)

# What a plain ``accelerate launch`` (1.10 to 1.15) sets, on a CPU or on several GPUs.
PLAIN = {
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_CPU_AFFINITY": "1",
}


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()


def test_every_variable_that_accelerate_reads_is_classified():
    folder = Path(accelerate.__file__).parent
    files = [path for path in folder.rglob("*.py") if "test_utils" not in path.parts]
    found = {name for path in files for name in re.findall(r"\bACCELERATE_[A-Z0-9_]+", path.read_text("utf-8"))}
    assert {"ACCELERATE_USE_CPU", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_USE_FSDP"} <= found
    unknown = {name for name in found if name not in ENVIRONMENT and not name.startswith(BEHIND_A_SWITCH)}
    assert unknown == set()


@pytest.mark.parametrize("steps", ["4", "auto"])
def test_gradients_are_not_divided_by_what_the_environment_says(monkeypatch, steps):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    weight = torch.ones(2, requires_grad=True)
    make_accelerator().backward((3 * weight).sum())
    assert weight.grad.tolist() == [3.0, 3.0]


def test_an_accelerator_that_divides_gradients_is_refused():
    made = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=4))
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=4"):
        check_accelerator(made)
    check_accelerator(make_accelerator())


@pytest.mark.parametrize("precision", ["no", False, "bf16", "auto"])
def test_a_plain_launch_is_taken(precision):
    for environment in (PLAIN, {}):
        check_launch(precision, environment)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true asks for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor, context or sequence parallelism"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "torch.compile"),
        ({"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL"}, "SageMaker"),
        ({"ACCELERATE_USE_CPU": "perhaps"}, "ACCELERATE_USE_CPU='perhaps' must be true or false"),
        ({"ACCELERATE_TORCH_DEVICE": "warp:9"}, "ACCELERATE_TORCH_DEVICE='warp:9' is not a device: give cpu"),
        (
            {"ACCELERATE_TORCH_DEVICE": "meta"},
            "ACCELERATE_TORCH_DEVICE='meta' cannot be used, as it holds no data: give cpu",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "launch with --mixed_precision no"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "set mixed_precision=bf16, or launch with --mixed_precision no"),
    ],
    ids=lambda value: next(iter(value)).removeprefix("ACCELERATE_") if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_refused_before_a_model_is_loaded(variables, sentence, monkeypatch, tmp_path):
    for name, value in (PLAIN | variables).items():
        monkeypatch.setenv(name, value)
    raw = {
        "model": "emoji-sd",
        "reward": "jpeg_compressibility",
        "prompts": ["a cat"],
        "output_dir": str(tmp_path / "r"),
        "mixed_precision": "no",
    }
    with pytest.raises(ConfigError) as error:
        check_config(raw)
    assert len(error.value.problems) == 1
    assert sentence in error.value.problems[0]
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        make_accelerator("no")


def test_the_settings_precision_may_be_the_launchs_or_take_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for precision in ("bf16", "auto", None):
        check_launch(precision)
    assert launched_precision() == "bf16"
    assert make_accelerator("bf16").mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state()
    assert make_accelerator("bf16").mixed_precision == "bf16"
    assert launched_precision() is None


def test_a_second_accelerator_is_as_the_first():
    assert make_accelerator("bf16").mixed_precision == make_accelerator().mixed_precision == "bf16"


# -- before the first collective ------------------------------------------------------------------------------------


def raising(error):
    raise error


@pytest.fixture
def others(monkeypatch):
    """``others([sentence or None, ...])``: what the processes before this one say; returns what this one says."""

    def make(said):
        own = []
        monkeypatch.setattr(launch, "processes", lambda: SimpleNamespace(num_processes=1 + len(said)))
        monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: own.extend(mine) or [*said, *mine])
        return own

    return make


def test_all_processes_raise_where_one_fails(others):
    own = others([None, None])
    assert agreed(lambda: "rows") == "rows"
    assert own == [None]
    own = others([None, "data: row 3: the prompt is empty"])
    with pytest.raises(UserError, match=r"^process 1: data: row 3: the prompt is empty$"):
        agreed(lambda: "rows")
    assert own == [None]
    for error in (ConfigError(["a: b", "c: d"]), ValueError("other"), KeyError("x")):
        own = others([None])
        with pytest.raises(type(error)) as caught:
            agreed(lambda error=error: raising(error))
        assert caught.value is error
        assert own == [str(error).splitlines()[0]]


def test_one_process_alone_asks_nobody(monkeypatch):
    monkeypatch.setattr("accelerate.utils.gather_object", None)
    assert agreed(lambda: 3) == 3
    with pytest.raises(ConfigError, match=r"^a$"):
        agreed(lambda: raising(ConfigError(["a"])))
