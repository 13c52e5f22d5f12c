"""Calls as users of diffusers and TRL type them from memory: each works, or one sentence says the right call."""

import random

import pytest
import torch
import transformers

import diffusion_align
from diffusion_align import DDPOConfig, DDPOTrainer, DiffusionDPOConfig, ImageAlignmentPipeline, TextAlignmentPipeline
from diffusion_align.errors import UserError
from diffusion_align.llm import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, PPOConfig
from diffusion_align.models.image_pipelines import load_pipeline
from tests.helpers.problems import problems
from tests.helpers.tiny_runs import TINY, cases

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
        "random": random,
        "torch": torch,
        "transformers": transformers,
        "diffusion_align": diffusion_align,
        "reward": reward,
        "labels": [{"prompt": "a", "completion": "b", "label": True}],
        "rows": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        "image": image,
        "text": text,
        "plain": plain,
        "sd": str(tiny_sd),
        "lm": str(tiny_language_model),
        "out": {"output_dir": tmp_path / "run"},
        "tiny": TINY | {"output_dir": tmp_path / "run", "prompts": ["a cat"]},
    }


WORKS = cases("""
    ImageAlignmentPipeline.from_pretrained(sd, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    ImageAlignmentPipeline.from_pretrained(sd, torch_dtype='bfloat16').dtype == torch.bfloat16
    ImageAlignmentPipeline.from_pretrained(pretrained_model_name_or_path=sd).model == sd
    len(image(prompt='a red apple', num_inference_steps=2).images) == 1
    len(image('a red apple', num_inference_steps=2, guidance_scale=5.0).images) == 1
    image('a', negative_prompt='blurry', height=24, width=32, steps=1).images[0].size == (32, 24)
    image.to('cpu') is image and image.device == torch.device('cpu')
    repr(image).endswith("run=None, adapter=False, device='cpu', dtype='float32')")
    repr(text) == f"TextAlignmentPipeline(model={lm!r}, run=None, adapter=False, device='cpu', dtype='float32')"
    ImageAlignmentPipeline.from_pipe(plain, model=sd)(prompt=['a', 'b'], steps=2).prompts == ['a', 'b']
    ImageAlignmentPipeline.from_pipe(plain).model == sd
    ImageAlignmentPipeline.from_pipe(pipeline=plain).metrics == []
    TextAlignmentPipeline.from_pipe(text.model, text.tokenizer).name == lm
    TextAlignmentPipeline.from_pipe(transformers.pipeline('text-generation', lm)).name == lm
    DDPOConfig(**tiny | {'prompts': lambda: ('a cat', {'n': 1})}, model=sd, reward=reward).prompts.source[0]['n'] == 1
    len(DDPOConfig(**tiny | {'prompts': lambda: random.choice('ab')}, model=sd, reward=reward).prompts.source) == 1000
    GRPOConfig(model=lm, prompts=lambda: 'hi', reward='length', **out).prompts.source == [{'prompt': 'hi'}]
    isinstance(diffusion_align.build_trainer(DDPOConfig(**tiny, model=sd, reward=reward)), DDPOTrainer)
    diffusion_align.DPOTrainer is DPOTrainer and diffusion_align.GRPOConfig is GRPOConfig
    image.pipeline.unet.config.in_channels == 4
    DiffusionDPOConfig(model=sd, pairs='emoji_style', beta_dpo=5000, **out).beta_dpo == 5000
    DPOConfig(model=lm, dataset=rows, beta=.1, loss_type='sigmoid', label_smoothing=.1, **out).beta == .1
    KTOConfig(model=lm, dataset=labels, desirable_weight=1, **out).desirable_weight == 1
    PPOConfig(model=lm, prompts=['a'], reward='length', kl_coef=.05, gamma=1, **out).kl_coef == .05
    image.score(image('a', steps=1).images, ['a'], reward).shape == (1,)
    len(text('hello', max_tokens=2).texts) == 1
    len(text(prompt='hello', max_new_tokens=2, temperature=.7).texts) == 1
    TextAlignmentPipeline.from_pretrained(lm, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    PPOConfig(model=lm, prompts=['a'], reward='length', num_ppo_epochs=3, **out).inner_epochs == 3
    GRPOConfig(model=lm, prompts=['a'], reward='length', num_iterations=3, **out).inner_epochs == 3
    {'ImageAlignmentPipeline', 'TextAlignmentPipeline', 'llm', 'rewards'} <= set(dir(diffusion_align))
    'GRPOTrainer' in dir(diffusion_align.llm)
""")
SAYS = cases("""
    TextAlignmentPipeline.from_pretrained(lm, torch_dtype='auto')
    ImageAlignmentPipeline.from_pretrained(sd, torch_dtype='int8')
    image('a', generator=torch.Generator())
    image('a', num_images_per_prompt=2)
    image('a', output_type='np')
    image('a', step=3)
    image('a', steps=2, num_inference_steps=2)
    image('a', prompt='b')
    ImageAlignmentPipeline.from_pretrained(sd, safety_checker=None)
    ImageAlignmentPipeline.from_pretrained(sd, device_map='auto')
    ImageAlignmentPipeline.from_pipe(plain, torch_dtype=torch.float16)
    TextAlignmentPipeline.from_pipe(text.model, text.tokenizer, device='cpu')
    image.to(device='cpu', dtype=torch.float16)
    image.to(torch.float16)
    image.unet
    image.load_lora_weights('x')
    text.generate('x')
    text('a', do_sample=True)
    text('a', top_p=.9)
    text('a', max_length=20)
    ImageAlignmentPipeline.from_pipe(text)
    image.align('ddpo', reward_fn=reward, prompts=['a'], **out)
    image.align(reward=reward, promts=['a'], **out)
    image.align(reward=reward, prompts=lambda: 3, **out)
    image.align(reward=reward, prompts=lambda: ('a', 3), **out)
    image.align(reward=reward, prompts=lambda i: 'a', **out)
    text.align(reward='length', prompts=lambda: None, **out)
    diffusion_align.build_trainer('quickstart')
    diffusion_align.build_trainer(DDPOConfig)
    image.report()
    image.enable_model_cpu_offload()
    image.set_progress_bar_config(disable=True)
    image('a', resolution=512)
    image('a', width=100)
    image.align(reward=reward, prompts=['a'], lr=1e-4, **out)
    image.align(reward=reward, prompts=['a'], num_train_epochs=2, **out)
    DDPOTrainer(DDPOConfig(**tiny, model=sd, reward=reward), reward, lambda: 'a', image)
    DDPOTrainer(DDPOConfig(**tiny, model=sd, reward=reward))
    DDPOTrainer(config=None, reward_function=reward, prompt_function=None, sd_pipeline=image)
    DDPOConfig(**tiny, model=sd, reward=reward, num_epochs=2)
    DDPOConfig(**tiny, model=sd, reward=reward, sample_num_steps=9)
    DDPOConfig(**tiny, model=sd, reward=reward, train_batch_size=9)
    DDPOConfig(**tiny, model=sd, reward=reward, report_to='wandb')
    DiffusionDPOConfig(model=sd, pairs='emoji_style', num_inference_steps=9, **out)
    GRPOTrainer(model=lm, reward_funcs=reward, args=None, train_dataset=[])
    DPOTrainer(lm, None, None)
    GRPOConfig(model=lm, prompts=['a'], reward='length', per_device_train_batch_size=2, **out)
    GRPOConfig(model=lm, prompts=['a'], reward='length', gradient_accumulation_steps=2, **out)
    DPOConfig(model=lm, dataset=[], max_length=512, **out)
    PPOConfig(model=lm, prompts=['a'], reward='length', cliprange=.2, **out)
    KTOConfig(model=lm, dataset=[], lora_r=8, **out)
""")


@pytest.mark.parametrize("call", WORKS)
def test_works(call, places):
    assert eval(call, places) is True


@pytest.mark.parametrize("call", SAYS)
def test_says_the_right_call(call, golden, places):
    with pytest.raises((UserError, AttributeError)) as raised:
        eval(call, places)
    golden(call, problems(raised))
