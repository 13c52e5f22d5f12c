"""What attention, memory order and matrix products are computed with: as the settings ask, with the same results."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_align.diffusion.ddpo_settings import DDPOConfig
from diffusion_align.diffusion.settings import LoRAConfig
from diffusion_align.errors import ConfigError, RewardError, UserError
from diffusion_align.llm.settings import GRPOConfig, RewardModelConfig
from diffusion_align.models.language_models import load_language_model, use_attention
from diffusion_align.models.memory import in_channels_last
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.precision import matrix_products_in_tf32
from tests.helpers.hard_runs import PREFERENCES
from tests.helpers.tiny_runs import TINY

RUN = TINY | {"reward": "jpeg_compressibility", "prompts": ["a red apple", "a cat"], "learning_rate": 1e-2}
TEXT = {name: value for name, value in TINY.items() if name != "sampler"}
TEXT |= {"method": "grpo", "reward": "length", "prompts": ["the cat"], "group_size": 2, "max_completion_length": 4}
CONVOLUTIONS = LoRAConfig(rank=2, layers="attention+convolutions")


class Calls(TorchDispatchMode):
    """Names of the operations inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})

    @property
    def fused(self):
        return any(name.startswith("_scaled_dot_product") for name in self.names)


def gradients(policy, inside=None):
    """Of what is trained, by a pass of two samples."""
    torch.manual_seed(0)
    x_t, conditioning = torch.randn(2, *policy.latent_shape), policy.encode(["a cat", "a dog"])
    with inside or nullcontext():
        policy.predict(x_t, torch.tensor([1, 500]), conditioning).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable.values()])


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_the_attention_that_is_computed_is_the_one_that_was_asked_for(make_policy, model):
    found = {}
    for name in ("auto", "eager", "sdpa"):
        found[name] = gradients(make_policy(model, noise=0.1, attention=name), calls := Calls())
        assert calls.fused == (name == "sdpa")
    assert torch.equal(found["auto"], found["eager"])  # on a CPU
    torch.testing.assert_close(found["sdpa"], found["eager"], rtol=1e-3, atol=1e-6 * found["eager"].abs().max().item())


def test_xformers_is_left_to_diffusers(make_policy, monkeypatch):
    calls = []
    kind = type(make_policy("tiny_sd").network)
    monkeypatch.setattr(kind, "enable_xformers_memory_efficient_attention", lambda self: calls.append(self))
    policy = make_policy("tiny_sd", attention="xformers")
    assert calls == [policy.network]


@pytest.mark.parametrize(
    ("config", "name", "module"),
    [(DDPOConfig, "xformers", "xformers"), (GRPOConfig, "flash_attention_2", "flash_attn")],
)
def test_what_is_not_installed_or_has_no_gpu_is_refused_in_a_sentence(monkeypatch, config, name, module):
    settings = {"reward": "length" if config is GRPOConfig else "jpeg_compressibility", "prompts": ["a cat"]}
    settings |= {"model": "tiny-lm" if config is GRPOConfig else "emoji-sd", "output_dir": "run"}
    find = "diffusion_align.training.attention.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda wanted: None if wanted == module else wanted)
    with pytest.raises(ConfigError, match=f"^attention={name} is not installed: pip install "):
        config(**settings, attention=name)
    monkeypatch.setattr(find, lambda wanted: wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"^attention={name} needs a GPU: set attention=sdpa"):
        config(**settings, attention=name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert config(**settings, attention=name).attention == name


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_language_models_attention(run_here, tiny_language_model, tmp_path, name):
    with Calls() as calls:
        trainer = run_here(TEXT | {"model": str(tiny_language_model), "output_dir": str(tmp_path), "attention": name})
    assert trainer.policy.model.config._attn_implementation == name
    assert calls.fused == (name == "sdpa")


def test_a_reward_models_attention(run_here, tiny_language_model, tmp_path):
    settings = {name: value for name, value in TINY.items() if name != "sampler"} | {"method": "reward_model"}
    settings |= {"model": str(tiny_language_model), "dataset": PREFERENCES, "attention": "eager"}
    settings["max_completion_length"] = 16
    with Calls() as calls:
        run_here(settings | {"output_dir": str(tmp_path)})
    assert not calls.fused
    with pytest.raises(ConfigError, match="attention=flash_attention_2 is not installed"):
        RewardModelConfig(**settings | {"output_dir": "run", "attention": "flash_attention_2"})


def test_a_model_that_cannot_is_refused_in_a_sentence(tiny_language_model):
    model, _ = load_language_model(str(tiny_language_model))
    with pytest.raises(UserError, match=r"^attention=flash_attention_2 is not possible: .*: leave it out$"):
        use_attention(model, "flash_attention_2")  # which is not installed


# -- the order of weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("lora", [CONVOLUTIONS, None])
def test_convolutions_run_in_channels_last(make_policy, model, lora):
    policy, usual = (make_policy(model, noise=0.1, lora=lora, channels_last=wanted) for wanted in (True, False))
    policy.network.load_state_dict(usual.network.state_dict())  # noise is drawn in the order of the weights
    orders = []
    for part in (policy.network, policy.pipeline.vae):
        for layer in part.modules():
            if type(layer) is torch.nn.Conv2d and layer.kernel_size != (1, 1):
                assert layer.weight.is_contiguous(memory_format=torch.channels_last)
                layer.register_forward_hook(lambda _, __, output: orders.append(output))
    found = gradients(policy)
    images = policy.decode(torch.zeros(2, *policy.latent_shape))
    assert len(orders) > 10
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in orders)
    torch.testing.assert_close(found, gradients(usual), rtol=1e-3, atol=1e-5 * found.abs().max().item())
    torch.testing.assert_close(images, usual.decode(torch.zeros(2, *policy.latent_shape)), rtol=0, atol=1e-5)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "sdpa"},
        {"channels_last": True, "lora": {"rank": 2, "layers": "attention+convolutions"}},
        {"channels_last": True, "lora": None},
    ],
    ids=["sdpa", "channels_last", "channels_last, all weights"],
)
def test_resumed_bit_for_bit_with_a_ratio_of_1(train, tmp_path, changes):
    settings = RUN | {"epochs": 2} | changes
    _, rows = train(settings, "whole")
    assert all(row["ratio/first_pass_deviation"] == 0 for row in rows if "ratio/first_pass_deviation" in row)
    train(settings | {"epochs": 1}, "harried")
    train(settings | {"resume": True}, "harried")
    weights = "unet/diffusion_pytorch_model" if changes.get("lora", {}) is None else "pytorch_lora_weights"
    whole, harried = (load_file(tmp_path / name / f"final/{weights}.safetensors") for name in ("whole", "harried"))
    assert all(torch.equal(value, harried[name]) for name, value in whole.items())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_pipeline_keeps_its_own_order(tiny_sd, tmp_path, own, fails):
    pipe = ImageAlignmentPipeline.from_pretrained(str(tiny_sd), device="cpu")
    parts, seen = (pipe.pipeline.unet, pipe.pipeline.vae), []
    for part in parts if own else ():
        part.to(memory_format=torch.channels_last)

    def reward(images, prompts, metadata):
        seen.append([in_channels_last(part) for part in parts])
        if fails and len(seen) > 1:
            raise ValueError("no")
        return images.mean((1, 2, 3))

    given = {name: value for name, value in RUN.items() if name not in ("model", "output_dir")}
    settings = given | {"reward": reward, "channels_last": True, "output_dir": tmp_path / "run"}
    with pytest.raises(RewardError) if fails else nullcontext():
        pipe.align(**settings)
    assert seen[-1] == [True, True]
    assert [in_channels_last(part) for part in (pipe.pipeline.unet, pipe.pipeline.vae)] == [own, own]


def test_they_may_change_on_resume(train, capfd):
    train(RUN)
    trainer, _ = train(RUN | {"epochs": 2, "resume": True, "attention": "sdpa", "channels_last": True})
    assert trainer.epoch == 2
    assert "resumed with attention=sdpa (was auto), channels_last=True (was False)" in capfd.readouterr().err


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_tf32_holds_for_the_run_alone(run_here, tiny_sd, tmp_path, wanted, fails):
    inside = []

    class Look(Callback):
        def on_update(self, trainer, row):
            inside.append(torch.get_float32_matmul_precision())

    def reward(images, prompts, metadata):
        if fails and inside:
            raise RuntimeError
        return images.mean(dim=(1, 2, 3))

    settings = RUN | {"model": str(tiny_sd), "output_dir": str(tmp_path / "run"), "reward": reward, "epochs": 2}
    config = check_config(settings | {"callbacks": [Look()]}).model_copy(update={"tf32": wanted})  # without a GPU
    with pytest.raises(UserError) if fails else nullcontext():
        run_here(config)
    assert set(inside) == {"high" if wanted else "highest"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_without_tf32_torch_is_left_alone(monkeypatch):
    """It refuses to be asked in a process that has set ``torch.backends.cuda.matmul.fp32_precision``."""
    for name in ("get_float32_matmul_precision", "set_float32_matmul_precision"):
        monkeypatch.setattr(torch, name, lambda *given: 1 / 0)
    with matrix_products_in_tf32(False):
        pass
    with pytest.raises(ZeroDivisionError), matrix_products_in_tf32(True):
        pass


def test_tf32_needs_a_gpu(monkeypatch):
    settings = RUN | {"model": "emoji-sd", "output_dir": "run", "tf32": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^tf32=true needs a GPU: leave it out$"):
        DDPOConfig(**settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert DDPOConfig(**settings).tf32
