"""Rollouts of Stable Diffusion 3 and FLUX.1 against diffusers' own pipelines, and their replay."""

import pytest
import torch

from diffusion_align.diffusion.rollout import replay, rollout
from diffusion_align.models.families.flux import unpack
from tests.helpers.flow_models import noisy_policy, schedule_of
from tests.helpers.plain_diffusers import initial

PROMPTS = ["red apple", "a cat"]
READS = {"max_sequence_length": 20}
SAMPLERS = [
    {"eta": 1.0},
    {"eta": 0.3},
    {"name": "ddim", "eta": 0.5},
    {"name": "flow_sde"},
    {"name": "cps"},
    {"name": "dance"},
]


@pytest.fixture
def flow_policy(model_path):
    """``flow_policy(name, dynamic=None, noise=0.1, **settings)``, see ``noisy_policy``; ``dynamic``: the shift."""

    def make(name, *, dynamic=None, **settings):
        shift = None if dynamic is None else {"use_dynamic_shifting": dynamic}
        return noisy_policy(model_path(name), scheduler=shift, **({"reads": READS, "noise": 0.1} | settings))

    return make


CASES = [
    ("tiny_sd3", dynamic, {"guidance_scale": scale, "negative_prompt": negative})
    for dynamic in (False, True)
    for scale, negative in ((1.0, None), (4.0, None), (4.0, "a dark cave"))
]
CASES += [("tiny_flux", dynamic, {"guidance_scale": scale}) for dynamic in (False, True) for scale in (1.0, 3.5)]
CASES += [("tiny_schnell", dynamic, {"guidance_scale": 1.0}) for dynamic in (False, True)]


@pytest.mark.parametrize("size", [(16, 16), (16, 24)], ids=["square", "wide"])
@pytest.mark.parametrize(("name", "dynamic", "guided"), CASES)
def test_without_noise_a_rollout_is_diffusers_pipeline(name, dynamic, guided, size, flow_policy, streams):
    """In float64, where 1e-6 of latents of a few units is what diffusers' float32 scheduler leaves."""
    height, width = size
    policy = flow_policy(
        name, dynamic=dynamic, dtype=torch.float64, noise=0, height=height, width=width, attention="sdpa", **guided
    )
    for parameter in policy.trainable.values():
        parameter.data = parameter.data.double()
    schedule = schedule_of(policy, torch.float64, eta=0.0)
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(2))
    noise = initial(streams, policy.latent_shape)
    options = {k: [v] * 2 if k == "negative_prompt" else v for k, v in guided.items() if v is not None}
    theirs = policy.pipeline(
        PROMPTS,
        latents=policy.family.as_in_pipeline(noise),
        num_inference_steps=4,
        height=height,
        width=width,
        output_type="latent",
        **options,
        **READS,
    ).images
    latents = theirs if name == "tiny_sd3" else unpack(theirs, noise.shape[2:])
    torch.testing.assert_close(path.latents.double(), latents, rtol=0, atol=1e-6)
    assert torch.equal(schedule.table.timestep, policy.pipeline.scheduler.timesteps)
    assert latents.std() > 0.5


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux", "tiny_schnell"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda one: one.get("name", f"flow {one.get('eta')}"))
@pytest.mark.parametrize("kernels", ["float32", "bfloat16", "autocast"])
def test_replay_is_the_rollout(name, sampler, kernels, flow_policy, streams):
    """The ratio is exactly 1 at the rollout's batch; one by one a log-prob, the mean over a latent's numbers, is within
    1e-5 in float32 (seen: 2.4e-7) and 1e-2 in bfloat16 (seen: 0), whose products another CPU may round otherwise."""
    import contextlib

    narrow = {"dtype": torch.bfloat16} if kernels == "bfloat16" else {}
    autocast = contextlib.nullcontext
    if kernels != "float32":
        autocast = lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # noqa: E731
    scale = 1.0 if name == "tiny_schnell" else 3.0
    policy = flow_policy(name, guidance_scale=scale, autocast=autocast, **narrow)
    schedule = schedule_of(policy, **sampler)
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(2))
    assert path.steps.shape[1] == 3, "the last step is deterministic"
    both = torch.arange(2)
    for action in range(3):
        logp, _ = replay(policy, schedule, *path.at(both, torch.full((2,), action)))
        assert torch.equal(logp, path.logp_old[:, action])
        for sample in range(2):
            alone, _ = replay(policy, schedule, *path.at(both[[sample]], torch.tensor([action])))
            bound = 1e-5 if kernels == "float32" else 1e-2
            assert (alone - path.logp_old[sample, action]).abs() <= bound
