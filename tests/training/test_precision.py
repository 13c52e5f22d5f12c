"""The precision that settings leave to the machine: what is chosen, that a run keeps it, and that nothing is cast."""

from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_align.diffusion.ddpo_settings import DDPOConfig
from diffusion_align.errors import ConfigError
from diffusion_align.llm.settings import RewardModelConfig
from diffusion_align.training import launch
from diffusion_align.training.launch import this_machine
from diffusion_align.training.precision import Machine, with_precision
from diffusion_align.training.reading import load_yaml
from diffusion_align.yaml_text import dump
from tests.helpers.hard_runs import PREFERENCES
from tests.helpers.tiny_runs import TINY

CPU, GPU, OLD_GPU = Machine(), Machine(gpu=True, bf16=True), Machine(gpu=True)
RUN = TINY | {"reward": "jpeg_compressibility", "prompts": ["a red apple", "a cat"]}


def config_of(**settings):
    return DDPOConfig(**RUN | {"model": "emoji-sd", "output_dir": "run"} | settings)


@pytest.mark.parametrize(
    ("settings", "machine", "expected"),
    [
        ({}, CPU, ("no", "float32")),
        ({}, OLD_GPU, ("no", "float32")),
        ({}, GPU, ("bf16", "bfloat16")),
        ({"lora": None}, GPU, ("bf16", "float32")),
        ({"mixed_precision": "no"}, GPU, ("no", "float32")),
        ({"mixed_precision": "fp16"}, GPU, ("fp16", "float32")),
        ({"mixed_precision": "bf16"}, GPU, ("bf16", "bfloat16")),
        ({"mixed_precision": "bf16"}, CPU, ("bf16", "float32")),
        ({"mixed_precision": "auto"}, GPU, ("bf16", "bfloat16")),
        ({"mixed_precision": "auto"}, OLD_GPU, ("fp16", "float32")),
        ({"mixed_precision": "auto"}, CPU, ("auto", "float32")),  # measured when the model is loaded
        ({"dtype": "float32"}, GPU, ("bf16", "float32")),
        ({"dtype": "bfloat16"}, CPU, ("no", "bfloat16")),
        ({"dtype": "float16"}, GPU, ("no", "float16")),
        ({}, Machine(launched="bf16"), ("bf16", "float32")),
        ({}, Machine(gpu=True, bf16=True, launched="fp16"), ("fp16", "float32")),
    ],
)
def test_what_is_chosen(monkeypatch, settings, machine, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # fp16 is refused without
    chosen = with_precision(config_of(**settings), machine)
    assert (chosen.mixed_precision, chosen.dtype) == expected
    assert with_precision(chosen, GPU) == chosen or chosen.mixed_precision == "auto"


@pytest.mark.parametrize("own", [{}, {"mixed_precision": None, "dtype": None}, {"mixed_precision": False}])
def test_a_run_of_before_had_float32(own):
    chosen = with_precision(config_of(), GPU, own)
    assert (chosen.mixed_precision, chosen.dtype) == ("no", "float32")
    chosen = with_precision(config_of(), CPU, {"mixed_precision": "bf16", "dtype": "bfloat16"})
    assert (chosen.mixed_precision, chosen.dtype) == ("bf16", "bfloat16")


def test_a_reward_model_has_no_dtype():
    config = RewardModelConfig(model="tiny-lm", dataset=PREFERENCES, output_dir="run")
    assert with_precision(config, GPU).mixed_precision == "bf16"
    assert not hasattr(with_precision(config, GPU), "dtype")


@pytest.mark.parametrize("emulated", [False, True])
def test_an_emulated_bf16_is_none(monkeypatch, emulated):
    monkeypatch.setattr(launch, "processes", lambda: SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or emulated
    )
    assert this_machine() == Machine(gpu=True, bf16=emulated)
    monkeypatch.setattr(launch, "processes", lambda: SimpleNamespace(device=torch.device("cpu")))
    assert this_machine() == Machine()  # ACCELERATE_USE_CPU beside a GPU


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on(monkeypatch):
    """``on(machine)``: what runs begin on, as far as their precision goes."""
    return lambda machine: monkeypatch.setattr(launch, "this_machine", lambda: machine)


def written(folder):
    settings = load_yaml(folder / "config.yaml")
    return settings["mixed_precision"], settings["dtype"]


def test_images_on_a_gpu(train, on, tmp_path):
    on(GPU)
    trainer, rows = train(RUN | {"epochs": 2})
    kinds = {name: p.dtype for name, p in trainer.policy.network.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for p in trainer.trainable.values()} == {torch.float32}
    assert trainer.policy.pipeline.text_encoder.dtype == torch.bfloat16
    assert rows[0]["ratio/first_pass_deviation"] == 0
    assert written(tmp_path / "run") == ("bf16", "bfloat16")


@pytest.mark.parametrize(("began", "resumed"), [(GPU, CPU), (CPU, GPU)])
def test_a_resumed_run_keeps_its_own(train, on, tmp_path, began, resumed):
    settings = RUN | {"epochs": 2, "learning_rate": 1e-2}
    on(began)
    train(settings, "whole")
    train(settings | {"epochs": 1}, "harried")
    on(resumed)
    train(settings | {"resume": True}, "harried")
    assert written(tmp_path / "harried") == written(tmp_path / "whole")
    whole, harried = (
        load_file(tmp_path / name / "final/pytorch_lora_weights.safetensors") for name in ("whole", "harried")
    )
    assert all(torch.equal(value, harried[name]) for name, value in whole.items())


def test_a_run_of_an_older_version_is_resumed(train, on, tmp_path):
    train(RUN)
    file = tmp_path / "run" / "config.yaml"
    settings = load_yaml(file)
    file.write_text(dump({name: value for name, value in settings.items() if name not in ("mixed_precision", "dtype")}))
    on(GPU)
    trainer, _ = train(RUN | {"epochs": 2, "resume": True})
    assert trainer.epoch == 2
    assert written(tmp_path / "run") == ("no", "float32")


@pytest.mark.parametrize("resumes", [False, True])
def test_fp16_that_a_launcher_or_the_run_says_is_refused_on_a_cpu(on, tmp_path, resumes):
    """Before a model is loaded; accelerate would raise afterwards."""
    on(CPU if resumes else Machine(launched="fp16"))
    (tmp_path / "config.yaml").write_text(dump({"mixed_precision": "fp16", "dtype": "float32"}))
    with pytest.raises(ConfigError, match=r"^mixed_precision='fp16' needs a GPU: use no, bf16 or auto$"):
        launch.decide_precision(config_of(output_dir=str(tmp_path), resume=resumes))


def test_text_on_a_gpu(run_here, on, tiny_language_model, tmp_path):
    on(GPU)
    settings = {name: value for name, value in TINY.items() if name != "sampler"}
    settings |= {"method": "grpo", "model": str(tiny_language_model), "output_dir": str(tmp_path / "run")}
    settings |= {"reward": "length", "prompts": ["the cat"], "group_size": 2, "max_completion_length": 4}
    trainer = run_here(settings)
    kinds = {name: p.dtype for name, p in trainer.policy.model.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for p in trainer.trainable.values()} == {torch.float32}
    assert written(tmp_path / "run") == ("bf16", "bfloat16")


# -- casts -----------------------------------------------------------------------------------------------------------


@contextmanager
def casts_by(name_of):
    """How often each tensor for which ``name_of`` has a name is cast inside."""
    counts = {}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and (name := name_of(args[0])):
                counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs or {})

    with Casts():
        yield counts


def casts_of(parameters):
    names = {p.data_ptr(): name for name, p in parameters.items()}
    return casts_by(lambda tensor: names.get(tensor.data_ptr()))


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_is_cast_in_every_pass_unless_it_is_bf16(make_policy, model, dtype):
    policy = make_policy(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    for name, parameter in policy.network.named_parameters():
        parameter.data = parameter.data if ".lora_" in name else parameter.data.to(dtype)
    frozen = {n: p for n, p in policy.network.named_parameters() if ".lora_" not in n}
    layers = [part for part in policy.network.modules() if type(part) in (torch.nn.Linear, torch.nn.Conv2d)]
    x_t, timestep = torch.randn(2, *policy.latent_shape), torch.tensor([1, 2])
    conditioning = policy.encode(["a cat", "a dog"])
    every = []
    for _ in range(2):
        with casts_of(frozen) as of_frozen, casts_of(policy.trainable) as of_trained:
            policy.predict(x_t, timestep, conditioning).float().square().mean().backward()
        every.append(sum(of_frozen.values()))
        assert of_trained.keys() == policy.trainable.keys()
    assert every[0] == every[1]
    assert every[0] == 0 if dtype == torch.bfloat16 else every[0] > len(layers) / 2


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 needs a driver for fake CUDA tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_casts_no_frozen_weight_of_bf16_but_of_normalizations(make_policy, dtype):
    """Fake CUDA tensors go through torch's own autocast, which runs normalizations in float32."""
    policy = make_policy("tiny_sd")
    kind, config = getattr(diffusers, policy.family.network_class), policy.network.config
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
            network = kind.from_config(config).requires_grad_(False).eval()
            names = {id(p): name for name, p in network.named_parameters()}
            inputs = torch.empty(2, 4, 8, 8), torch.ones(2, dtype=torch.int64)
            with casts_by(lambda tensor: names.get(id(tensor))) as counts:
                network(*inputs, torch.empty(2, 8, config["cross_attention_dim"]))
    finally:
        torch.set_default_dtype(before)
        torch.set_autocast_enabled("cuda", False)
    of_norms = {name for name in counts if "norm" in name}
    assert (counts.keys() == of_norms) == (dtype == torch.bfloat16)
    assert len(of_norms) > 10 if dtype == torch.bfloat16 else len(of_norms) == 0
