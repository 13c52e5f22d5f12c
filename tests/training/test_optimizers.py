"""Optimizers by name: the step of their own library, what they keep, and that a run with them resumes."""

import importlib.util

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion_align.errors import CheckpointError, ConfigError
from diffusion_align.training import optimizers
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.optimization import Optimization
from diffusion_align.training.optimizers import STATE_BYTES
from diffusion_align.training.processes import Processes
from tests.helpers.hard_runs import assert_same_checkpoints
from tests.helpers.toy import Toy

LACKING = {name for name, (package, _) in optimizers._PACKAGES.items() if importlib.util.find_spec(package) is None} | (
    {"adamw_8bit"} if importlib.util.find_spec("bitsandbytes") and not optimizers.runs_in_8_bits() else set()
)
EACH = [
    pytest.param(name, marks=pytest.mark.skipif(name in LACKING, reason="an extra that is not here"))
    for name in STATE_BYTES
]
RATE = {"adamw": 1e-2, "adamw_8bit": 1e-2, "adafactor": 1e-2, "prodigy": 1.0}


def settings(folder, name, **changes):
    return TrainingConfig(model="toy", output_dir=folder, optimizer=name, learning_rate=RATE[name], **changes)


def weights(seed=0):
    """A matrix, LoRA's B before training, and a vector."""
    torch.manual_seed(seed)
    tensors = {"matrix": torch.randn(96, 64), "zeros": torch.zeros(64, 8), "vector": torch.randn(5)}
    return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}


def of_its_library(name, parameters):
    """The optimizer as its own documentation makes it, at this project's settings."""
    common = {"lr": RATE[name], "weight_decay": 0.1}
    if name == "adamw":
        return torch.optim.AdamW(parameters, betas=(0.8, 0.95), **common)
    if name == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, betas=(0.8, 0.95), **common)
    if name == "adafactor":
        from transformers import Adafactor

        return Adafactor(parameters, scale_parameter=False, relative_step=False, warmup_init=False, **common)
    from prodigyopt import Prodigy

    return Prodigy(parameters, betas=(0.8, 0.95), use_bias_correction=True, safeguard_warmup=True, **common)


def train(optimization, parameters, steps=3, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimization.step(step)
        optimization.advance_schedule()


@pytest.mark.parametrize("name", EACH)
def test_a_step_is_that_of_its_own_library(tmp_path, name):
    betas = {} if name == "adafactor" else {"adam_betas": (0.8, 0.95)}
    config = settings(tmp_path, name, weight_decay=0.1, max_grad_norm=float("inf"), **betas)
    ours, theirs = weights(), weights()
    train(Optimization(ours, config, Processes(Accelerator(cpu=True))), ours.values())
    optimizer = of_its_library(name, list(theirs.values()))
    for step in range(3):
        torch.manual_seed(100 + step)
        for parameter in theirs.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for key, weight in ours.items():
        assert torch.equal(weight, theirs[key]), key
        assert not torch.equal(weight, weights()[key]), key


def bytes_of(value):
    """Of all tensors in a state."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(bytes_of, value.values())) if isinstance(value, dict) else 0


@pytest.mark.parametrize("name", EACH)
def test_what_is_kept_beside_a_large_matrix(tmp_path, name):
    weight = nn.Parameter(torch.zeros(1024, 1024))
    optimization = Optimization({"weight": weight}, settings(tmp_path, name), Processes(Accelerator(cpu=True)))
    train(optimization, [weight], steps=1)
    each = bytes_of(optimization.tensors()["optimizer"]["state"]) / weight.numel()
    # Prodigy keeps no copy of a weight that begins at 0.
    assert each == pytest.approx(STATE_BYTES[name] - 4 * (name == "prodigy"), abs=0.05)


@pytest.mark.parametrize("name", EACH)
def test_a_step_that_overflows_in_fp16_changes_nothing(tmp_path, name):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trained, before = weights(), weights()
    optimization = Optimization(trained, settings(tmp_path, name), Processes(accelerator))
    optimization.backward(sum(weight.sum() for weight in trained.values()) * torch.inf)
    optimization.step(1)
    assert all(torch.equal(trained[key], before[key]) for key in before)
    assert optimization.steps == 0
    optimization.backward(sum(weight.square().sum() for weight in trained.values()))
    optimization.step(2)
    assert optimization.steps == 1
    assert not torch.equal(trained["matrix"], before["matrix"])


class Matrix(Toy):
    """Of a matrix that is large enough to be factored, and to be kept in 8 bits."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.weights = nn.Parameter(torch.linspace(-1, 1, 4096).view(64, 64))

    def loss(self, batch, samples, actions):
        wanted = batch[samples].view(-1, 1, 1) * torch.linspace(-1, 2, 64)
        return (self.weights - wanted).square().mean((1, 2)), {}


@pytest.mark.parametrize("offload", [False, True], ids=["", "ema_offload"])
@pytest.mark.parametrize("name", EACH)
def test_a_resumed_run_equals_one_that_was_left_alone(tmp_path, name, offload):
    changes = {"optimizer": name, "learning_rate": RATE[name], "ema_decay": 0.9, "warmup_steps": 3}
    changes |= {"ema_offload": offload, "checkpoint_every": 1, "epochs": 4}
    Matrix(tmp_path / "alone", **changes).train()
    Matrix(tmp_path / "run", **changes | {"epochs": 2}).train()
    resumed = Matrix(tmp_path / "run", **changes, resume=True)
    resumed.train()
    assert resumed.resumed
    assert_same_checkpoints(tmp_path / "run", tmp_path / "alone")


def test_another_optimizer_is_another_run(tmp_path):
    Toy(tmp_path / "run", epochs=1).train()
    with pytest.raises(CheckpointError, match="another run: optimizer was 'adamw' and is 'adafactor'"):
        Toy(tmp_path / "run", epochs=2, optimizer="adafactor", resume=True).train()


# -- what does not fit -------------------------------------------------------------------------------------------------


def refused(tmp_path, **changes):
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(model="toy", output_dir=tmp_path, **changes)
    return caught.value.problems


def test_an_extra_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in (("adamw_8bit", "bitsandbytes"), ("prodigy", "prodigy")):
        [problem] = refused(tmp_path, optimizer=name, learning_rate=1)
        assert problem.endswith(f": pip install 'diffusion-align[{extra}]'")


def test_eight_bits_where_bitsandbytes_cannot_take_a_step(tmp_path, monkeypatch):
    class Failing:
        def AdamW8bit(self, parameters):
            raise RuntimeError("All input tensors need to be on the same GPU")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(optimizers, "_bitsandbytes", Failing)
    optimizers.runs_in_8_bits.cache_clear()
    [problem] = refused(tmp_path, optimizer="adamw_8bit")
    optimizers.runs_in_8_bits.cache_clear()
    assert problem == (
        "optimizer=adamw_8bit needs a GPU with this version of bitsandbytes: use adamw, or install a newer one"
    )


def test_settings_that_do_not_fit_an_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert refused(tmp_path, optimizer="prodigy") == [
        "learning_rate=0.0003 is a factor on the learning rate that optimizer=prodigy finds by itself: set "
        "learning_rate=1"
    ]
    assert refused(tmp_path, optimizer="adafactor", adam_betas=(0.9, 0.99)) == [
        "adam_betas has no effect with optimizer=adafactor: leave one of them out"
    ]
    assert refused(tmp_path, ema_offload=True) == [
        "ema_offload has no effect without ema_decay: set ema_decay, or leave it out"
    ]


def test_other_libraries_names(tmp_path):
    assert TrainingConfig(model="toy", output_dir=tmp_path, optimizer="adamw_torch").optimizer == "adamw"


# -- the average in main memory ----------------------------------------------------------------------------------------


class OnGPU:
    """An accelerator whose device is a GPU that is not there."""

    device, num_processes, scaler = torch.device("cuda"), 1, None

    def prepare_optimizer(self, optimizer):
        return optimizer

    def clip_grad_norm_(self, parameters, most):
        return torch.ones(())


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 needs a driver for fake CUDA tensors")
@pytest.mark.parametrize(("offload", "place"), [(False, "cuda"), (True, "cpu")])
def test_the_average_is_in_main_memory_if_asked_for(tmp_path, monkeypatch, offload, place):
    from diffusers.training_utils import EMAModel

    pinned = []
    monkeypatch.setattr(EMAModel, "pin_memory", lambda ema: pinned.append(ema))
    monkeypatch.setattr(torch.optim, "AdamW", _plain)
    config = settings(tmp_path, "adamw", ema_decay=0.9, ema_offload=offload)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = nn.Parameter(torch.zeros(4, 4, device="cuda"))
        optimization = Optimization({"weight": weight}, config, Processes(OnGPU()))
        for _ in range(2):
            optimization._ema.step(optimization._beside_ema())  # which refuses tensors of two devices
        assert {shadow.device.type for shadow in optimization.weights()["ema"].values()} == {place}
        with optimization.ema_weights():
            assert weight.device.type == "cuda"
    assert len(pinned) == offload


def _plain(parameters, lr, betas, weight_decay, fused):
    assert fused
    return torch.optim.SGD(parameters, lr=lr)


def test_the_average_is_the_same_wherever_it_is(tmp_path):
    found = []
    for offload in (False, True):
        trained = weights()
        config = settings(tmp_path, "adamw", ema_decay=0.9, ema_offload=offload)
        optimization = Optimization(trained, config, Processes(Accelerator(cpu=True)))
        train(optimization, trained.values(), steps=5)
        found.append(optimization.weights()["ema"])
        assert not any(torch.equal(found[-1][key], trained[key]) for key in trained)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
