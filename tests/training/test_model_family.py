"""A model family in one file of the user's, examples/pixart.py: its policy, its runs, and what is made of these."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
from diffusion_align.diffusion.rollout import replay, rollout
from diffusion_align.diffusion.schedule import SamplerConfig
from diffusion_align.doctor.describe import describe_config
from diffusion_align.doctor.memory import Passes, network_cost, parameter_counts
from diffusion_align.errors import CheckpointError, ConfigError, UserError
from diffusion_align.models.families import find_family
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.pipelines.compare import compare_models
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.scoring import as_batch
from diffusion_align.references import resolve
from diffusion_align.training.reading import load_yaml
from tests.helpers.problems import assert_problem
from tests.helpers.tiny_runs import IMAGE_RUN

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ["a lion", "a red apple"]
# Of the published PixArt-Sigma-XL-2-512-MS, what is not the default of its class.
PUBLISHED = {"sample_size": 64, "in_channels": 4, "caption_channels": 4096, "use_additional_conditions": False}


@pytest.fixture(scope="module")
def tiny_pixart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "pixart"
    resolve(f"{EXAMPLES / 'tiny_pixart.py'}:tiny_pixart", "example")().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def family(tmp_path):
    """Where a copy of the example is."""
    shutil.copy(EXAMPLES / "pixart.py", tmp_path)
    return f"{tmp_path / 'pixart.py'}:PixArt"


@pytest.fixture
def settings(tiny_pixart, family, tmp_path):
    return IMAGE_RUN | {"model": tiny_pixart, "family": family, "output_dir": str(tmp_path / "run")}


@pytest.fixture
def policy(request, tiny_pixart, family):
    """With an adapter that is off zero, and with settings of the test's own."""
    torch.manual_seed(0)
    pipeline = load_pipeline(tiny_pixart, family=find_family(family))
    policy = DenoisingPolicy(pipeline, lora=LoRAConfig(rank=4), guidance_scale=3.0, **getattr(request, "param", {}))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


OTHER = {"height": 32, "width": 24, "negative_prompt": "a dark cave"}


@pytest.mark.parametrize("policy", [{}, OTHER], ids=["its own size", "another"], indirect=True)
def test_images_are_those_of_diffusers_own_pipeline(policy, streams):
    from diffusers import DDIMScheduler

    policy.pipeline.scheduler.register_to_config(timestep_spacing="leading")  # diffusers' DDIM leaves other lists
    latents = torch.stack([torch.randn(policy.latent_shape, generator=g) for g in streams(2)])
    schedule = SamplerConfig(steps=5, eta=0.0).schedule(policy.pipeline.scheduler).to("cpu")
    none = torch.zeros(2, 0, dtype=torch.int64)
    own = rollout(policy, schedule, policy.encode(PROMPTS), streams(2), record=none).latents
    policy.pipeline.scheduler = DDIMScheduler.from_config({"clip_sample": False, **policy.pipeline.scheduler.config})
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, **policy.family.call_options}
    options |= dict(zip(("height", "width"), policy.image_size))
    options |= {"negative_prompt": [policy.negative_prompt] * 2} if policy.negative_prompt else {}
    for kind, found in (("latent", own), ("pt", policy.decode(own))):
        theirs = policy.pipeline(PROMPTS, latents=latents.clone(), output_type=kind, **options).images
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


def test_the_pipelines_call_takes_the_steps_that_were_trained(tiny_pixart, family):
    """Of the published spacing, linspace, too."""
    pipe = ImageAlignmentPipeline.from_pretrained(tiny_pixart, family=family, device="cpu")
    pipe.sampler = SamplerConfig(steps=5, eta=1.0, guidance_scale=3.0)
    policy, schedule = DenoisingPolicy(pipe.pipeline, lora=None, guidance_scale=3.0), pipe.sampler.schedule
    assert pipe.pipeline.scheduler.config.timestep_spacing == "linspace"
    noise = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    path = rollout(policy, schedule(pipe.pipeline.scheduler).to("cpu"), policy.encode(PROMPTS), noise)
    wanted = (255 * policy.decode(path.latents)).round().to(torch.uint8)
    torch.testing.assert_close(as_batch(pipe(PROMPTS, seed=7).images), wanted.float() / 255, atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize("policy", [{}, OTHER], ids=["its own size", "another"], indirect=True)
def test_replay_gives_the_log_probs_of_the_rollout_bit_for_bit(policy, streams):
    schedule = SamplerConfig(steps=4, eta=1.0).schedule(policy.pipeline.scheduler).to("cpu")
    path, samples = rollout(policy, schedule, policy.encode(PROMPTS), streams(2)), torch.arange(2)
    for action in range(path.steps.shape[1]):
        logp, _ = replay(policy, schedule, *path.at(samples, torch.full((2,), action)))
        assert torch.equal(logp, path.logp_old[:, action])


def test_the_reference_is_the_model_without_its_adapter(policy, streams):
    given = torch.randn(1, *policy.latent_shape), torch.tensor([500]), policy.encode(PROMPTS[:1])
    with policy.reference():
        reference = policy.predict(*given)
    assert not torch.equal(reference, policy.predict(*given))
    for layer in policy._adapter_layers:
        layer.enable_adapters(False)
    assert torch.equal(reference, policy.predict(*given))


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(run_here, settings, tmp_path):
    run_here(settings | {"epochs": 2})
    moved = settings | {"output_dir": str(tmp_path / "resumed")}
    run_here(moved)
    run_here(moved | {"epochs": 2, "resume": True})
    once, twice = (load_file(tmp_path / run / "final/pytorch_lora_weights.safetensors") for run in ("run", "resumed"))
    assert once
    assert all(name.startswith("transformer.") for name in once)
    assert all(torch.equal(once[name], twice[name]) for name in once.keys() | twice.keys())


def test_resume_says_that_the_file_has_changed(run_here, settings, family):
    run_here(settings)
    file = Path(family.rpartition(":")[0])
    file.write_text(file.read_text() + "\n# another\n")
    with pytest.raises(CheckpointError, match=r"other content of family .*accept_changed=\[family\]"):
        run_here(settings | {"epochs": 2, "resume": True})
    run_here(settings | {"epochs": 2, "resume": True, "accept_changed": ["family"]})


def test_what_is_made_of_a_run_needs_no_family(run_here, settings, tiny_pixart, family, tmp_path):
    """Sampling, comparing, a run on top, a merged model that diffusers reads: all alike."""
    from diffusers import DiffusionPipeline

    run_here(settings | {"learning_rate": 0.1})
    run = tmp_path / "run"
    assert load_yaml(run / "config.yaml")["family"] == family
    aligned = ImageAlignmentPipeline.from_pretrained(run)
    by_hand = ImageAlignmentPipeline.from_pretrained(tiny_pixart, lora=run / "final", family=family)
    by_hand.sampler = aligned.sampler
    image = aligned("a lion").images[0].tobytes()
    assert by_hand("a lion").images[0].tobytes() == image
    base = ImageAlignmentPipeline.from_pretrained(tiny_pixart, family=family)
    assert compare_models(base, run, PROMPTS, "jpeg_compressibility").pairs == 2

    with pytest.raises(UserError, match="diffusers loads no LoRA for a PixArtSigmaPipeline: give merged=True"):
        aligned.push_to_hub("me/lion")
    aligned.save_pretrained(tmp_path / "merged")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    for name, weight in adapted(aligned).items():
        torch.testing.assert_close(merged.transformer.state_dict()[name], weight)
    above = settings | {"model": str(run), "family": None, "output_dir": str(tmp_path / "above")}
    assert run_here(above).config.family == family
    lines = (run / "final/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(compile(lines, "README.md", "exec"), (names := {}))
    assert names["image"].size == (16, 16)


def adapted(aligned):
    """The transformer's weights with its adapter in them, in plain names."""
    layers = {n: m for n, m in aligned.pipeline.transformer.named_modules() if hasattr(m, "get_delta_weight")}
    return {f"{n}.weight": m.get_base_layer().weight + m.get_delta_weight("default") for n, m in layers.items()}


def test_preferences_train_it_too(run_here, settings, tmp_path):
    given = {name: value for name, value in settings.items() if name not in ("prompts", "reward")}
    run_here(given | {"method": "diffusion_dpo", "beta": 0.1, "pairs": {"source": "emoji_style", "max_pairs": 4}})
    weights = load_file(tmp_path / "run/final/pytorch_lora_weights.safetensors")
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)


def test_all_of_the_network_can_be_trained(run_here, settings, tmp_path):
    from diffusers import PixArtSigmaPipeline

    run_here(settings | {"lora": None})
    assert isinstance(PixArtSigmaPipeline.from_pretrained(tmp_path / "run/final"), PixArtSigmaPipeline)
    assert ImageAlignmentPipeline.from_pretrained(tmp_path / "run")("a lion").images[0].size == (16, 16)


def test_a_loaded_pipeline_is_aligned_and_left_alone_where_training_fails(tiny_pixart, family, tmp_path, run_here):
    from diffusers import PixArtSigmaPipeline

    loaded = PixArtSigmaPipeline.from_pretrained(tiny_pixart)
    with pytest.raises(UserError, match=r"is a PixArtSigmaPipeline, which is not supported: .* set family"):
        ImageAlignmentPipeline.from_pipe(loaded)
    pipe = ImageAlignmentPipeline.from_pipe(loaded, family=resolve(family, "family"))
    before = {name: weight.clone() for name, weight in loaded.transformer.state_dict().items()}

    def fails(images, prompts, metadata):
        return images.mean((1, 2, 3)) / 0

    tiny = {k: v for k, v in IMAGE_RUN.items() if k not in ("model", "method", "reward", "output_dir")}
    with pytest.raises(UserError, match="finite"):
        pipe.align(reward=fails, output_dir=tmp_path / "failed", **tiny)
    after = loaded.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    pipe.align(reward="jpeg_compressibility", output_dir=tmp_path / "run", **tiny)
    assert load_yaml(tmp_path / "run/config.yaml")["family"] == family


def test_a_pipeline_in_memory_is_written_into_its_run(family, tmp_path, monkeypatch, run_here):
    made = resolve(f"{EXAMPLES / 'tiny_pixart.py'}:tiny_pixart", "example")()
    monkeypatch.chdir(tmp_path)  # where pixart.py is
    pipe = ImageAlignmentPipeline.from_pipe(made, family="pixart.py:PixArt")
    tiny = {k: v for k, v in IMAGE_RUN.items() if k not in ("model", "method", "output_dir")}
    pipe.align(output_dir=tmp_path / "run", **tiny)
    assert load_yaml(tmp_path / "run/config.yaml")["family"] == family
    again = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu")
    here, there = (as_batch(one("a lion").images) for one in (pipe, again))
    torch.testing.assert_close(here, there, atol=2.01 / 255, rtol=0)


WRONG = {
    "nothing there": ("{folder}/none.py:PixArt", "does not exist"),
    "no family": ("{folder}/pixart.py:Tensor", "is not a model family"),
    "half a family": ("{folder}/half.py:Half", "lacks encode, inputs, network_class, pipelines, zero_conditioning"),
    "pipelines that are no names": ("{folder}/half.py:Numbered", "pipelines=3: give a tuple"),
    "one that cannot be made": ("{folder}/half.py:Made", "raised KeyError: 'weights' (half.py, line "),
    "a function of fewer arguments": (
        "{folder}/half.py:Older",
        "latent_shape must be a function of config, latent_size, like that of ModelFamily",
    ),
    "a function without a keyword": (
        "{folder}/half.py:Unsized",
        "latent_size must be a function of config, vae, height=, width=, like that",
    ),
    "no function": ("{folder}/half.py:Number", "predict must be a function of network, x_t, timestep, conditioning"),
}


@pytest.mark.parametrize(("name", "kind"), WRONG.values(), ids=WRONG)
def test_what_is_no_family_is_refused_before_anything_is_loaded(settings, family, tmp_path, name, kind, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half.py").write_text(
        "from diffusion_align.extending import ModelFamily\nfrom pixart import PixArt\n\n"
        "class Half(ModelFamily):\n    pass\n\n"
        "class Numbered(PixArt):\n    pipelines = 3\n\n"
        "class Made(PixArt):\n    def __init__(self):\n        raise KeyError('weights')\n\n"
        "class Older(PixArt):\n    def latent_shape(self, config):\n        return 4, 8, 8\n\n"
        "class Unsized(PixArt):\n    def latent_size(self, config, vae):\n        return 8, 8\n\n"
        "class Number(PixArt):\n    predict = 3\n"
    )
    with pytest.raises(ConfigError) as error:
        check_config(settings | {"family": name.format(folder=tmp_path)})
    assert_problem(error, "family", kind)


@pytest.mark.parametrize(
    ("change", "setting", "kind"),
    [
        ({"family": None}, "model", "set family to a class of your own"),
        ({"model": "emoji-sd"}, "model", "is a StableDiffusionPipeline, and family=PixArt is for PixArtSigmaPipeline"),
        ({"lora": {"layers": "attention+convolutions"}}, "lora.layers", "not of this model, a DiT: use attention"),
    ],
)
def test_a_family_that_does_not_fit_is_refused_before_anything_is_loaded(settings, change, setting, kind):
    with pytest.raises(ConfigError) as error:
        check_config(settings | change)
    assert_problem(error, setting, kind)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("predict = ModelFamily.predict", r"predict must return \(1, 4, 8, 8\) .*returns \(1, 8, 8, 8\)"),
        (
            "def decode(self, *given):\n        return super().decode(*given)[..., :8]",
            r"decode must return \(1, 3, 16, 16\)",
        ),
        ("def encode_images(self, _, x):\n        return x[:, :1]", r"encode_images must return \(1, 4, 8, 8\)"),
        (
            "def encode(self, pipeline, prompts, size):\n        return {k: v[:, : len(prompts[0]) + 1] for k, v in "
            "super().encode(pipeline, prompts, size).items()}",
            "encode must return the same shape for every prompt",
        ),
        ("def encode_negative(self, *given):\n        return {}", "encode_negative must return what encode does"),
        (
            "def of_cropped(self, told, *given):\n        return {k: v[:, :1] for k, v in told.items()}",
            "of_cropped must return what encode does, in the same shapes",
        ),
        ("def of_cropped(self, *given):\n        return 1 / 0", r"raised ZeroDivisionError.*own.py"),
        ("def encode(self, *given):\n        return 1 / 0", r"raised ZeroDivisionError.*own.py"),
        ("def decode(self, *given):\n        return 1 / 0", r"raised ZeroDivisionError.*own.py"),
    ],
)
def test_a_mistake_in_a_family_is_one_sentence(run_here, settings, tmp_path, body, kind, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text(f"from pixart import ModelFamily, PixArt\n\nclass Own(PixArt):\n    {body}\n")
    with pytest.raises(UserError, match=f"^family '.*own.py:Own':? {kind}"):
        run_here(settings | {"family": f"{tmp_path}/own.py:Own"})


def test_doctor_counts_the_network_of_a_family(settings, family, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))  # which is YAML
    lines, problems = describe_config(str(tmp_path / "recipe.yaml"), [])
    assert problems == []
    assert dict(lines)["DiT passes per epoch"].startswith("4 forward while sampling")
    elsewhere, _ = describe_config(str(tmp_path / "recipe.yaml"), ["model=somebody/pixart"])
    assert "DiT passes per epoch" in dict(elsewhere), "of a model that is not here yet"
    pixart = find_family(family)
    assert parameter_counts(pixart, {"transformer": PUBLISHED}) == {"transformer": pytest.approx(610.9e6, rel=1e-3)}
    size = pixart.latent_shape(PUBLISHED)[1:]
    cost = network_cost(pixart, PUBLISHED, LoRAConfig(rank=16), Passes(size, 1, 1, tokens=300))
    matrices = 28 * (12 * 1152**2 * 1024 + 2 * 1152**2 * (1024 + 300))  # multiply-adds of the blocks' linear layers
    attention = 28 * 2 * 1152 * 1024 * (1024 + 300)
    assert cost.flops == pytest.approx(2 * (matrices + attention), rel=0.02)
