"""A batch is sampled without waiting for the device: noise comes in one piece, and nothing is read back in a step."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from diffusion_align.diffusion.policy import PROMPT, LoRAConfig
from diffusion_align.diffusion.rollout import noise_in_turn, normal_noise, rollout
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.diffusion.tail import sample_head, sample_tail
from tests.helpers.flow_models import noisy_policy, schedule_of

PROMPTS = ["red apple", "a cat"]
SHAPES = [(1,), (3, 1, 1), (4, 1, 1), (1, 3, 5), (16,), (17,), (4, 2, 3), (3, 3, 3), (4, 4, 4), (4, 5, 7), (4, 64, 64)]


@pytest.mark.parametrize("count", [1, 2, 11, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_drawn_at_once_has_the_bits_of_noise_drawn_step_by_step(shape, count, streams, monkeypatch):
    one_by_one = streams(3)
    expected = [torch.stack([torch.randn(shape, generator=g) for g in one_by_one]) for _ in range(count)]
    calls, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *given, **named: calls.append(given) or randn(*given, **named))
    at_once = streams(3)
    found = list(noise_in_turn(at_once, count, shape, torch.device("cpu")))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(at_once, one_by_one, strict=True))
    assert len(calls) == (3 if math.prod(shape) % 16 == 0 else 3 * count)


def test_noise_goes_on_where_it_ended(streams):
    whole, parts = streams(2), streams(2)
    expected = torch.stack(list(noise_in_turn(whole, 5, (4, 8, 8), torch.device("cpu"))))
    first = normal_noise(parts, (4, 8, 8), torch.device("cpu"))
    rest = list(noise_in_turn(parts, 4, (4, 8, 8), torch.device("cpu")))
    assert torch.equal(torch.stack([first, *rest]), expected)


CASES = [
    ("tiny_sd", {"guidance_scale": 1.0}),
    ("tiny_sd", {"guidance_scale": 3.0, "negative_prompt": "blurry"}),
    ("tiny_sd", {"guidance_scale": 3.0, "lora": LoRAConfig(rank=4, text_encoder=True)}),
    ("tiny_sdxl", {"guidance_scale": 3.0}),
    ("tiny_sdxl", {"guidance_scale": 3.0, "lora": LoRAConfig(rank=4, text_encoder=True)}),
    ("tiny_sd3", {"guidance_scale": 3.0}),
    ("tiny_flux", {"guidance_scale": 3.0}),
    ("tiny_z_image", {"guidance_scale": 3.0}),
]


@pytest.fixture(params=CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def elsewhere(request, model_path, make_policy):
    """A policy on the meta device, from which nothing can be read, its schedule and its conditioning.

    What ``prepare`` reads, once for a batch, is on the CPU.
    """
    name, settings = request.param
    if name in ("tiny_sd", "tiny_sdxl"):
        policy = make_policy(name, **settings)
        schedule = build_schedule(policy.pipeline.scheduler, 4, eta=1.0).to("cpu")
    else:
        policy = noisy_policy(model_path(name), noise=0.1, **settings)
        schedule = schedule_of(policy, eta=1.0)
    conditioning = policy.encode(PROMPTS)
    policy.prepare(conditioning)  # encodes the negative prompt
    policy._prompt_cache = {prompt: moved(told) for prompt, told in policy._prompt_cache.items()}
    for part in policy.pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to("meta")
    policy.device = torch.device("meta")
    return policy, schedule.to("meta"), moved(conditioning)


def moved(conditioning):
    return {name: value if name in (PROMPT, "mask") else value.to("meta") for name, value in conditioning.items()}


def test_no_step_reads_from_the_device(elsewhere, streams):
    policy, schedule, conditioning = elsewhere
    path = rollout(policy, schedule, conditioning, streams(2), record_means=True)
    assert path.latents.is_meta
    assert path.latents.shape == (2, *policy.latent_shape)
    assert path.logp_old.shape == path.steps.shape


def test_no_step_of_a_tail_with_a_graph_reads_from_the_device(elsewhere, streams):
    policy, schedule, conditioning = elsewhere
    if PROMPT in conditioning or "mask" in conditioning:
        pytest.skip("each pass of a graph encodes its prompts, or reads their lengths")
    tail = sample_tail(policy, schedule, conditioning, streams(2), first=2)
    assert tail.latents.is_meta
    assert tail.latents.requires_grad


@pytest.mark.parametrize("sample", [rollout, partial(sample_head, end=4)], ids=["rollout", "head"])
def test_what_is_told_in_every_step_is_made_once(sample, make_policy, streams, monkeypatch):
    policy = make_policy("tiny_sd", guidance_scale=3.0)
    schedule = build_schedule(policy.pipeline.scheduler, 4).to("cpu")
    told, run = [], policy._run
    monkeypatch.setattr(policy, "_run", lambda x_t, t, inputs: told.append(inputs) or run(x_t, t, inputs))
    sample(policy, schedule, policy.encode(PROMPTS), streams(2))
    assert len(told) == 4
    assert all(one is told[0] for one in told)
