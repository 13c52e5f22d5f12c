"""Calls as users of diffusers and TRL type them from memory: each works, or one sentence says the right call."""

import re

import pytest
import torch
from peft import LoraConfig

import diffusion_align
from diffusion_align import DDPOConfig, DDPOTrainer, DiffusionDPOConfig, ImageAlignmentPipeline, TextAlignmentPipeline
from diffusion_align.errors import UserError
from diffusion_align.llm import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, PPOConfig
from diffusion_align.models.image_pipelines import load_pipeline
from tests.helpers.tiny_runs import TINY

SIZE = "images have the size that the model was made for"
ALIGN = r"GRPOTrainer takes its config and a loaded policy: call TextAlignmentPipeline\.from_pretrained\(model\)\.align"


CLASSES = (
    *(ImageAlignmentPipeline, DDPOConfig, DDPOTrainer, DiffusionDPOConfig),
    *(TextAlignmentPipeline, DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, PPOConfig),
)


def reward(images, prompts, metadata):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def image(tiny_sd):
    return ImageAlignmentPipeline.from_pretrained(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def text(tiny_language_model):
    return TextAlignmentPipeline.from_pretrained(str(tiny_language_model), device="cpu")


@pytest.fixture(scope="module")
def plain(tiny_sd):
    return load_pipeline(str(tiny_sd))


@pytest.fixture
def places(image, text, plain, tiny_sd, tiny_language_model, tmp_path):
    return {one.__name__: one for one in CLASSES} | {
        "torch": torch,
        "diffusion_align": diffusion_align,
        "reward": reward,
        "image": image,
        "text": text,
        "plain": plain,
        "sd": str(tiny_sd),
        "lm": str(tiny_language_model),
        "out": {"output_dir": tmp_path / "run"},
        "tiny": TINY | {"output_dir": tmp_path / "run", "prompts": ["a cat"]},
    }


WORKS = """
ImageAlignmentPipeline.from_pretrained(sd, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
ImageAlignmentPipeline.from_pretrained(pretrained_model_name_or_path=sd).model == sd
len(image(prompt='a red apple', num_inference_steps=2).images) == 1
len(image('a red apple', num_inference_steps=2, guidance_scale=5.0).images) == 1
image.to('cpu') is image and image.device == torch.device('cpu')
repr(image).endswith("run=None, adapter=False, device='cpu', dtype='float32')")
repr(text) == f"TextAlignmentPipeline(model={lm!r}, run=None, adapter=False, device='cpu', dtype='float32')"
ImageAlignmentPipeline.from_pipe(plain, model=sd)(prompt=['a', 'b'], steps=2).prompts == ['a', 'b']
ImageAlignmentPipeline.from_pipe(plain).model == sd
len(text('hello', max_tokens=2).texts) == 1
len(text(prompt='hello', max_new_tokens=2, temperature=.7).texts) == 1
TextAlignmentPipeline.from_pretrained(lm, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
PPOConfig(model=lm, prompts=['a'], reward='length', num_ppo_epochs=3, **out).inner_epochs == 3
GRPOConfig(model=lm, prompts=['a'], reward='length', num_iterations=3, **out).inner_epochs == 3
{'ImageAlignmentPipeline', 'TextAlignmentPipeline', 'llm', 'rewards'} <= set(dir(diffusion_align))
'GRPOTrainer' in dir(diffusion_align.llm)
""".strip().splitlines()
SAYS = {
    "image('a', negative_prompt='blurry')": "the pipeline has no argument negative_prompt: the empty prompt guides",
    "image('a', height=512)": f"the pipeline has no argument height: {SIZE}",
    "image('a', generator=torch.Generator())": "has no argument generator: give seed, of which image i uses seed",
    "image('a', num_images_per_prompt=2)": "no argument num_images_per_prompt: give a prompt once per image",
    "image('a', output_type='np')": "no argument output_type: images are PIL images",
    "image('a', step=3)": r"no argument step: did you mean steps\?",
    "image('a', steps=2, num_inference_steps=2)": "num_inference_steps is another name of steps: give one of them",
    "image('a', prompt='b')": "prompt is another name of prompts: give one of them",
    "ImageAlignmentPipeline.from_pretrained(sd, safety_checker=None)": "no argument safety_checker: leave it out",
    "ImageAlignmentPipeline.from_pretrained(sd, device_map='auto')": "no argument device_map: give device",
    "image.to(torch.float16)": r"dtype=torch\.float16 is for loading a model: give it to from_pretrained",
    "image.unet": r"has no attribute 'unet': use \.pipeline\.unet",
    "image.load_lora_weights('x')": r"no attribute 'load_lora_weights': use \.pipeline\.load_lora_weights",
    "text.generate('x')": r"has no attribute 'generate': use \.model\.generate",
    "text('a', do_sample=True)": "no argument do_sample: a small temperature is nearly greedy",
    "text('a', top_p=.9)": "no argument top_p: completions are sampled from the whole distribution",
    "ImageAlignmentPipeline.from_pipe(text)": "TextAlignmentPipeline is not supported: use one of StableDiffusion",
    "image.align('ddpo', reward_fn=reward, prompts=['a'], **out)": "unknown setting 'reward_fn': set reward",
    "image.align(reward=reward, prompts=['a'], lr=1e-4, **out)": "unknown setting 'lr': set learning_rate",
    "image.align(reward=reward, prompts=['a'], num_train_epochs=2, **out)": "'num_train_epochs': set epochs",
    "DDPOTrainer(DDPOConfig(**tiny, model=sd, reward=reward), reward, lambda: 'a', image)": "call ImageAlignmentPipel",
    "DDPOTrainer(config=None, reward_function=reward, prompt_function=None, sd_pipeline=image)": "DDPOTrainer takes",
    "DDPOConfig(**tiny, model=sd, reward=reward, num_epochs=2)": "unknown setting 'num_epochs': set epochs",
    "DDPOConfig(**tiny, model=sd, reward=reward, sample_num_steps=9)": "'sample_num_steps': set sampler.steps",
    "DDPOConfig(**tiny, model=sd, reward=reward, train_batch_size=9)": "'train_batch_size': set micro_batch_size",
    "DDPOConfig(**tiny, model=sd, reward=reward, report_to='wandb')": "'report_to': set trackers",
    "DiffusionDPOConfig(model=sd, pairs='emoji_style', num_inference_steps=9, **out)": "set sampler.steps",
    "GRPOTrainer(model=lm, reward_funcs=reward, args=None, train_dataset=[])": ALIGN,
    "DPOTrainer(lm, None, None)": "DPOTrainer takes its config and a loaded policy: call TextAlignmentPipeline",
    "GRPOConfig(model=lm, prompts=['a'], reward='length', per_device_train_batch_size=2, **out)": "set micro_batch",
    "GRPOConfig(model=lm, prompts=['a'], reward='length', gradient_accumulation_steps=2, **out)": "it follows from",
    "DPOConfig(model=lm, dataset=[], max_length=512, **out)": "set max_prompt_length or max_completion_length",
    "PPOConfig(model=lm, prompts=['a'], reward='length', cliprange=.2, **out)": "unknown setting 'cliprange': set eps",
    "KTOConfig(model=lm, dataset=[], lora_r=8, **out)": "unknown setting 'lora_r': set lora.rank",
}


def test_a_pipeline_with_adapters_is_not_taken(tiny_sd):
    loaded = load_pipeline(str(tiny_sd))
    loaded.unet.add_adapter(LoraConfig(target_modules=["to_q"]), adapter_name="default_0")
    with pytest.raises(UserError, match="carries LoRA weights: give their folder as lora to from_pretrained"):
        ImageAlignmentPipeline.from_pipe(loaded, model=tiny_sd)


@pytest.mark.parametrize("call", WORKS)
def test_works(call, places):
    assert eval(call, places) is True


@pytest.mark.parametrize("call", SAYS)
def test_says_the_right_call(call, places):
    with pytest.raises((UserError, AttributeError)) as raised:
        eval(call, places)
    assert re.search(SAYS[call], str(raised.value))
