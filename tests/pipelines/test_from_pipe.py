"""Models that are loaded already, adapters and all: sampled as they are, aligned from what they are, and resumed."""

import copy
import shutil
import warnings

import pytest
import torch
import yaml
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration, pipeline

from diffusion_align.diffusion.rollout import scheduler_of
from diffusion_align.diffusion.schedule import SamplerConfig
from diffusion_align.errors import UserError
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline
from diffusion_align.pipelines.configuration import check_config, read_config
from diffusion_align.pipelines.run import run
from diffusion_align.training.callbacks import Callback
from tests.helpers.tiny_runs import TINY

PROMPTS = ["a red apple", "a cat"]
IMAGES = TINY | {"prompts": PROMPTS, "samples_per_epoch": 4, "sample_batch_size": 4, "learning_rate": 0.02, "epochs": 1}
IMAGES |= {"checkpoint_every": 1}
TEXTS = {"prompts": ["the cat", "a dog is"], "reward": "length", "samples_per_epoch": 4, "num_generations": 2}
TEXTS |= {"sample_batch_size": 4, "max_completion_length": 4, "beta": 0.1, "lora": {"rank": 2}, "epochs": 1}
TEXTS |= {"grid_every": 0, "num_threads": 1, "updates_per_epoch": 1, "micro_batch_size": 4, "learning_rate": 0.01}
TEXTS |= {"checkpoint_every": 1}


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def broken(images, prompts, metadata):
    return torch.full((len(images),), torch.nan)


@torch.no_grad()
def predictions(loaded):
    """Of the UNet and of the text encoder of a diffusers pipeline."""
    noise = torch.Generator().manual_seed(0)
    x_t, states = torch.randn(2, 4, 8, 8, generator=noise), torch.randn(2, 8, 16, generator=noise)
    ids = torch.arange(8)[None]
    encoded = loaded.text_encoder(ids)[0]
    return torch.cat(
        [loaded.unet(x_t, torch.tensor([100, 900]), encoder_hidden_states=states).sample.flatten(), encoded.flatten()]
    )


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(3, 23)[None]).logits


class Reference(Callback):
    """What the reference says when the run ends, of which ``ask`` makes a tensor."""

    def __init__(self, ask):
        self.ask = ask

    def on_end(self, trainer):
        with trainer.policy.reference():
            self.found = self.ask(trainer.policy)


def on(network, name, **options):
    layers = ["q_proj"] if hasattr(network, "text_model") or "CLIP" in type(network).__name__ else ["to_q", "conv1"]
    torch.manual_seed(len(name))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is more than one
        inject_adapter_in_model(config, network, name)
    network._hf_peft_config_loaded = True


def several(loaded):
    on(loaded.unet, "default_0")
    on(loaded.unet, "default_1")
    loaded.set_adapters(["default_0", "default_1"], [0.7, 0.2])


def with_text_encoder(loaded):
    on(loaded.unet, "default_0")
    on(loaded.text_encoder, "default_0")


def fused(loaded):
    several(loaded)
    loaded.fuse_lora(lora_scale=0.5)


def fused_and_unloaded(loaded):
    fused(loaded)
    loaded.unload_lora_weights()


def switched_off(loaded):
    on(loaded.unet, "default_0")
    loaded.disable_lora()


def dora(loaded):
    on(loaded.unet, "default_0", use_dora=True)


def named_as_ours(loaded):
    on(loaded.unet, "default")


STATES = [several, with_text_encoder, fused, fused_and_unloaded, switched_off, dora, named_as_ours]


@pytest.fixture(scope="module")
def tiny(tiny_sd):
    loaded = load_pipeline(str(tiny_sd))
    loaded.set_progress_bar_config(disable=True)
    loaded.scheduler = scheduler_of(SamplerConfig(steps=2, eta=0.0), loaded.scheduler)
    return loaded


@pytest.fixture
def given(tiny):
    """A pipeline of diffusers on which the user has put adapters."""

    def make(state):
        loaded = copy.deepcopy(tiny)
        state(loaded)
        return loaded

    return make


@pytest.mark.parametrize("state", STATES)
def test_a_pipeline_with_adapters_is_sampled_and_aligned_as_it_is(given, tiny, tiny_sd, tmp_path, state):
    loaded = given(state)
    before = predictions(loaded)
    assert torch.equal(before, predictions(tiny)) is (state is switched_off)
    own = loaded(PROMPTS[:1], num_inference_steps=2, guidance_scale=5.0, generator=torch.Generator().manual_seed(3))
    pipe = ImageAlignmentPipeline.from_pipe(loaded)
    assert pipe.model == str(tiny_sd)
    assert pipe(PROMPTS[:1], steps=2, seed=3).images[0].tobytes() == own.images[0].tobytes()

    reference = Reference(lambda policy: predictions(policy.pipeline))
    pipe.align(reward=redness, output_dir=tmp_path / "run", callbacks=[reference], **IMAGES)
    torch.testing.assert_close(reference.found, before, atol=2e-5, rtol=0)
    assert (predictions(loaded) - before).abs().max() > 1e-3
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["model"] == str(
        tmp_path / "run" / "base"
    )
    again = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu")
    torch.testing.assert_close(predictions(again.pipeline), predictions(pipe.pipeline), atol=1e-6, rtol=0)
    assert again.origin == pipe.origin == str(tiny_sd)
    assert (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8").count("# sd aligned with DDPO") == 1
    for result in (pipe, again):
        with pytest.raises(UserError, match="base is not on the Hub: give merged=True"):
            result.push_to_hub("owner/name")


def test_such_a_run_resumes_from_its_own_base(given, tmp_path):
    whole = ImageAlignmentPipeline.from_pipe(given(with_text_encoder))
    whole.align(reward="jpeg_compressibility", output_dir=tmp_path / "whole", **IMAGES | {"epochs": 2})
    first = ImageAlignmentPipeline.from_pipe(given(with_text_encoder))
    first.align(reward="jpeg_compressibility", output_dir=tmp_path / "run", **IMAGES)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")

    run(read_config(str(tmp_path / "run" / "config.yaml"), ["resume=true", "epochs=2"]))
    final = [(tmp_path / name / "final" / "pytorch_lora_weights.safetensors").read_bytes() for name in ("run", "whole")]
    assert final[0] == final[1]

    settings = IMAGES | {"epochs": 2, "output_dir": tmp_path / "copy", "resume": True}
    with pytest.raises(UserError, match=r"resume=True needs the reference .* load '.*copy/base' by from_pretrained"):
        ImageAlignmentPipeline.from_pipe(given(with_text_encoder)).align(reward="jpeg_compressibility", **settings)
    # In the same session the run is simply continued.
    first.align(reward="jpeg_compressibility", **settings | {"output_dir": tmp_path / "run", "epochs": 3})
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "run")
    moved = ImageAlignmentPipeline.from_pretrained(tmp_path / "elsewhere" / "run", device="cpu")
    torch.testing.assert_close(predictions(moved.pipeline), predictions(first.pipeline), atol=1e-6, rtol=0)


def test_a_run_that_fails_leaves_the_pipeline_and_no_base(given, tmp_path):
    loaded = given(with_text_encoder)
    pipe, before = ImageAlignmentPipeline.from_pipe(loaded), predictions(loaded)
    for settings in (IMAGES, IMAGES | {"lora": None}):
        with pytest.raises(UserError, match="nan"):
            pipe.align(reward=broken, output_dir=tmp_path / "a" / "run", **settings)
        assert torch.equal(predictions(loaded), before)
        assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="there is no trained adapter to save"):
        pipe.save_lora(tmp_path / "lora")
    pipe.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(predictions(load_pipeline(str(tmp_path / "merged"))), before, atol=2e-5, rtol=0)
    assert torch.equal(predictions(loaded), before)


def test_adapters_put_on_after_loading_belong_to_the_weights(tiny_sd, tmp_path):
    pipe = ImageAlignmentPipeline.from_pretrained(tiny_sd, device="cpu")
    pipe.align(reward=redness, output_dir=tmp_path / "first", **IMAGES)
    on(pipe.pipeline.unet, "default_0")
    pipe.pipeline.set_adapters(["default", "default_0"])
    before = predictions(pipe.pipeline)
    reference = Reference(lambda policy: predictions(policy.pipeline))
    pipe.align(reward=redness, output_dir=tmp_path / "run", callbacks=[reference], **IMAGES)
    torch.testing.assert_close(reference.found, before, atol=2e-5, rtol=0)
    assert (tmp_path / "run" / "base" / "model_index.json").is_file()


def test_adapters_that_cannot_be_merged(given, tmp_path):
    loaded = given(lambda loaded: None)
    config = LoraConfig(target_modules=["to_q"], lora_bias=True)
    with warnings.catch_warnings():  # peft's own, of newer versions
        warnings.simplefilter("ignore")
        loaded.unet.add_adapter(config, adapter_name="default_0")
    with pytest.raises(UserError, match=r"the adapters of unet cannot be merged into its weights \("):
        ImageAlignmentPipeline.from_pipe(loaded).align(reward=redness, output_dir=tmp_path / "run", **IMAGES)
    assert not (tmp_path / "run").exists()


def test_what_an_emoji_model_is_stays_known():
    loaded = load_pipeline("emoji-sd")
    on(loaded.unet, "default_0")
    assert ImageAlignmentPipeline.from_pipe(loaded).origin.endswith("emoji-sd")


# -- language models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def language_model(tiny_language_model):
    path = str(tiny_language_model)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def adapted(model):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def test_language_models_that_are_loaded(language_model, tiny_language_model):
    model, tokenizer = language_model
    path = str(tiny_language_model)
    expected = TextAlignmentPipeline.from_pretrained(path, device="cpu")("the cat", max_new_tokens=4).texts
    whole = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for given in ((model, tokenizer), (whole,)):
        pipe = TextAlignmentPipeline.from_pipe(*given)
        assert pipe.name == path
        assert pipe.model is model
        assert pipe("the cat", max_new_tokens=4).texts == expected
    shapes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 8}
    for given, sentence in (
        ((T5ForConditionalGeneration(T5Config(**shapes)), tokenizer), "is not supported: give a causal"),
        ((model, path), "the tokenizer is a str: load it"),
        ((model,), "comes without a tokenizer: give it as well"),
        ((tokenizer,), "is not supported: give a causal language model"),
    ):
        with pytest.raises(UserError, match=sentence):
            TextAlignmentPipeline.from_pipe(*given)


@pytest.mark.parametrize("off", [False, True])
def test_a_model_of_peft_is_aligned_as_it_is(language_model, tmp_path, off):
    model, tokenizer = language_model
    plain = logits(model)
    given = adapted(model)
    if off:
        given.base_model.disable_adapter_layers()
    before = logits(given)
    assert torch.equal(before, plain) is off
    pipe = TextAlignmentPipeline.from_pipe(given, tokenizer)
    torch.testing.assert_close(logits(pipe.model), before, atol=5e-5, rtol=0)
    reference = Reference(lambda policy: logits(policy.model))
    pipe.align(output_dir=tmp_path / "run", callbacks=[reference], **TEXTS)
    torch.testing.assert_close(reference.found, before, atol=5e-5, rtol=0)
    assert torch.equal(logits(given), before)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["model"] == str(
        tmp_path / "run" / "base"
    )
    again = TextAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu")
    torch.testing.assert_close(logits(again.model), logits(pipe.model), atol=5e-5, rtol=0)


def test_learned_prompts_cannot_be_merged(language_model):
    model, tokenizer = language_model
    given = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match=r"cannot be merged into its weights \(they are learned prompts\)"):
        TextAlignmentPipeline.from_pipe(given, tokenizer)


def test_such_a_run_on_text_resumes(language_model, tmp_path):
    model, tokenizer = language_model
    given = adapted(model)
    for name, epochs in (("whole", 2), ("run", 1)):
        pipe = TextAlignmentPipeline.from_pipe(given, tokenizer)
        pipe.align(output_dir=tmp_path / name, **TEXTS | {"epochs": epochs})
    with pytest.raises(UserError, match="base is not on the Hub: give merged=True"):
        pipe.push_to_hub("owner/name")
    with pytest.raises(UserError, match=r"load '.*run/base' by from_pretrained"):
        TextAlignmentPipeline.from_pipe(given, tokenizer).align(output_dir=tmp_path / "run", resume=True, **TEXTS)
    raw = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    run(check_config(raw | {"resume": True, "epochs": 2}))
    final = [(tmp_path / name / "final" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert final[0] == final[1]
