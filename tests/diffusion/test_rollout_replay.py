"""Replay with unchanged weights returns the recorded log-probs: for every sampler setting, guidance and batch size."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion_align.diffusion.evaluation import sample_images
from diffusion_align.diffusion.rollout import Trajectory, concatenate, replay, rollout, transition
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.diffusion.settings import LoRAConfig

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPTS = ["red apple", "a cat", "blue car", "tree"]
DORA = {"dora": True, "layers": "attention+feed_forward+convolutions"}
# steps_offset acts on "leading" only, set_alpha_to_one on DDIM only, fixed_small_log is fixed_small.
SPACINGS = [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)]
ENDS = [("ddim", {"set_alpha_to_one": False}), ("ddim", {"set_alpha_to_one": True})] + [
    ("ddpm", {"variance_type": v}) for v in ("fixed_small", "fixed_large")
]
GRID = [
    (
        sampler,
        1.0,
        end | {"timestep_spacing": spacing, "steps_offset": offset, "prediction_type": p, "clip_sample": c},
        z,
    )
    for (sampler, end), (spacing, offset), p, c, z in itertools.product(
        ENDS, SPACINGS, ["epsilon", "v_prediction", "sample"], [False, True], [False, True]
    )
    if not (z and p == "epsilon" and spacing != "leading")  # refused
]
GRID += [(sampler, 0.2, config, z) for sampler, _, config, z in GRID if sampler == "ddim" and not config["clip_sample"]]


def name(case):
    sampler, eta, config, zero_snr = case
    return (
        f"{sampler}-{eta}-"
        + "-".join(str(int(v) if isinstance(v, bool) else v) for v in config.values())
        + f"-{int(zero_snr)}"
    )


def make_schedule(case, steps=3):
    sampler, eta, config, zero_snr = case
    scheduler = DDIMScheduler if sampler == "ddim" else DDPMScheduler
    config = BETAS | config | {"rescale_betas_zero_snr": zero_snr}
    return build_schedule(scheduler(**config), steps, sampler=sampler, eta=eta).to("cpu")


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy("tiny_sd", noise=0.05)


@pytest.fixture
def guided(request, policy):
    policy.guidance_scale = 3.0 if request.param else 1.0
    yield policy
    policy.guidance_scale = 1.0


with_and_without_guidance = pytest.mark.parametrize("guided", [False, True], indirect=True, ids=["plain", "guided"])


def replay_steps(policy, schedule, path, conditioning, **options):
    """Each recorded step of all samples together: the batch shape of sampling."""
    columns = range(path.steps.shape[1])
    return torch.stack(
        [
            replay(policy, schedule, path.x_t[:, k], path.x_s[:, k], path.steps[:, k], conditioning, **options)[0]
            for k in columns
        ],
        dim=1,
    )


def replay_mixed(policy, schedule, path, conditioning, size, **options):
    """(sample, step) pairs in a random order, ``size`` at a time: micro-batches of mixed timesteps."""
    pairs = torch.cartesian_prod(*(torch.arange(n) for n in path.steps.shape))
    result = torch.full(path.steps.shape, math.nan)
    for chunk in pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(7))].split(size):
        b, k = chunk.unbind(1)
        some = {key: value[b] for key, value in conditioning.items()}
        logp, _ = replay(policy, schedule, path.x_t[b, k], path.x_s[b, k], path.steps[b, k], some, **options)
        result[b, k] = logp.detach()
    return result


# The whole grid with and without guidance is `-m "slow or not slow"`; by default each setting is run one way, and the
# parity of its digits sees to it that every value of every axis meets both.
def _both_ways():
    for case in GRID:
        half = sum(map(ord, name(case))) % 2
        for guidance in (0, 1):
            marks = [pytest.mark.slow] if guidance == half else []
            yield pytest.param(case, bool(guidance), marks=marks, id=f"{name(case)}-{('plain', 'guided')[guidance]}")


@pytest.mark.parametrize(("case", "guided"), list(_both_ways()), indirect=["guided"])
def test_ratio_is_one(case, guided, streams):
    schedule = make_schedule(case)
    conditioning = guided.encode(PROMPTS[:2])
    path = rollout(guided, schedule, conditioning, streams(2))
    assert path.steps.tolist() == [schedule.stochastic_steps.tolist()] * 2
    assert path.logp_old.isfinite().all()
    assert path.latents.isfinite().all()
    ratio = torch.exp(replay_steps(guided, schedule, path, conditioning) - path.logp_old)
    assert torch.equal(ratio, torch.ones_like(ratio))
    ratio = torch.exp(replay_mixed(guided, schedule, path, conditioning, 4) - path.logp_old)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


@with_and_without_guidance
@pytest.mark.parametrize(
    ("model", "adapter"),
    [*((model, {}) for model in ("tiny_sd", "tiny_sd2", "tiny_sdxl", "emoji-sd")), ("tiny_sd", DORA)],
)
def test_ratio_is_one_at_any_micro_batch_size(model, adapter, guided, make_policy, streams):
    policy = make_policy(model, noise=0.02, lora=LoRAConfig(rank=4, **adapter))
    policy.guidance_scale = guided.guidance_scale
    schedule = build_schedule(policy.pipeline.scheduler, 3 if model == "emoji-sd" else 5).to("cpu")
    conditioning = policy.encode(PROMPTS)
    path = rollout(policy, schedule, conditioning, streams(4))
    with torch.no_grad():
        at_once = replay_steps(policy, schedule, path, conditioning)
        mixed = [replay_mixed(policy, schedule, path, conditioning, size) for size in (1, 3, 5)]
    assert torch.equal(at_once, path.logp_old)
    for logp in mixed:
        torch.testing.assert_close(torch.exp(logp - path.logp_old), torch.ones(logp.shape), atol=1e-5, rtol=0)


def test_emoji_sd_records_its_last_step(make_policy, streams):
    """Its scheduler (trailing, zero terminal SNR, set_alpha_to_one off) has a density at every step, first and last."""
    policy = make_policy("emoji-sd")
    assert build_schedule(policy.pipeline.scheduler, 10).stochastic_steps.tolist() == list(range(10))


def test_replay_sees_changed_weights(make_policy, streams):
    """The identity above could fail: with other weights the ratios are not 1."""
    policy = make_policy("tiny_sd", noise=0.05)
    schedule = build_schedule(policy.pipeline.scheduler, 4).to("cpu")
    conditioning = policy.encode(PROMPTS)
    path = rollout(policy, schedule, conditioning, streams(4))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.mul_(1.5)
    assert (replay_steps(policy, schedule, path, conditioning) - path.logp_old).abs().min() > 1e-6


def test_sum_is_mean_times_dimensions(policy, streams):
    schedule = build_schedule(policy.pipeline.scheduler, 4).to("cpu")
    conditioning = policy.encode(PROMPTS)
    mean, summed = (rollout(policy, schedule, conditioning, streams(4), reduction=r) for r in ("mean", "sum"))
    assert torch.equal(mean.x_s, summed.x_s)
    torch.testing.assert_close(summed.logp_old, mean.logp_old * 4 * 8 * 8, atol=0, rtol=1e-5)
    assert torch.equal(replay_steps(policy, schedule, summed, conditioning, reduction="sum"), summed.logp_old)


def test_logged_log_probs_are_those_of_the_recorded_latents(policy, streams):
    """The log-prob is of the latent that goes on, and the next action starts from it."""
    schedule = build_schedule(policy.pipeline.scheduler, 4).to("cpu")
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(4))
    assert torch.equal(path.x_s[:, :-1], path.x_t[:, 1:])
    assert torch.equal(path.x_s[:, -1], path.latents)
    for k in range(4):
        with torch.no_grad():
            action = transition(policy, schedule, path.x_t[:, k], path.steps[:, k], policy.encode(PROMPTS))
        normal = torch.distributions.Normal(action.mean.double(), action.std.double().view(-1, 1, 1, 1))
        expected = normal.log_prob(path.x_s[:, k].double()).flatten(1).mean(1)
        torch.testing.assert_close(path.logp_old[:, k].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_noise_is_standard_normal_and_each_samples_own(sampler, policy, streams):
    """(x_s - mean)/std is what the sample's own generator gives, after the initial latent."""
    schedule = build_schedule(policy.pipeline.scheduler, 4, sampler=sampler).to("cpu")
    conditioning = policy.encode(PROMPTS)
    path = rollout(policy, schedule, conditioning, streams(4))
    for b, generator in enumerate(streams(4)):
        assert torch.equal(path.x_t[b, 0], torch.randn(4, 8, 8, generator=generator))
        for k in range(path.steps.shape[1]):
            one = {key: value[[b]] for key, value in conditioning.items()}
            with torch.no_grad():
                action = transition(policy, schedule, path.x_t[b, [k]], path.steps[b, [k]], one)
            noise = (path.x_s[b, [k]] - action.mean) / action.std
            torch.testing.assert_close(noise[0], torch.randn(4, 8, 8, generator=generator), atol=2e-4, rtol=0)


def test_an_image_does_not_depend_on_its_batch(policy, streams):
    schedule = build_schedule(policy.pipeline.scheduler, 5).to("cpu")
    together = rollout(policy, schedule, policy.encode(PROMPTS), streams(4))
    for subset in ([2], [3, 0], [1, 2, 3]):
        own = [streams(4)[i] for i in subset]
        apart = rollout(policy, schedule, policy.encode([PROMPTS[i] for i in subset]), own)
        torch.testing.assert_close(apart.latents, together.latents[subset], atol=1e-4, rtol=0)
        torch.testing.assert_close(apart.logp_old, together.logp_old[subset], atol=1e-5, rtol=0)


def test_shown_images_do_not_depend_on_how_many_are_shown(policy):
    schedule = build_schedule(policy.pipeline.scheduler, 3).to("cpu")
    prompts = [PROMPTS[i % 4] for i in range(10)]  # more than one batch
    images = sample_images(policy, schedule, prompts, seed=3)
    assert images.shape == (10, 3, 16, 16)
    torch.testing.assert_close(sample_images(policy, schedule, prompts[:3], seed=3), images[:3], atol=1e-4, rtol=0)
    assert (sample_images(policy, schedule, prompts[:3], seed=4) - images[:3]).abs().max() > 0.01
    assert (images[0] - images[4]).abs().max() > 0.01  # one prompt, two places, two images


def test_recorded_subsets_agree_with_the_full_recording(policy, streams):
    schedule = build_schedule(policy.pipeline.scheduler, 5).to("cpu")
    conditioning = policy.encode(PROMPTS)
    full = rollout(policy, schedule, conditioning, streams(4))
    record = torch.tensor([[0, 4], [1, 2], [3, 4], [0, 1]])
    some = rollout(policy, schedule, conditioning, streams(4), record=record)
    rows = torch.arange(4)[:, None]
    assert torch.equal(some.steps, record)
    for column in ("x_t", "x_s", "logp_old"):
        assert torch.equal(getattr(some, column), getattr(full, column)[rows, record])
    assert torch.equal(some.latents, full.latents)
    none = rollout(policy, schedule, conditioning, streams(4), record=torch.empty(4, 0, dtype=torch.int64))
    assert none.x_t.shape == (4, 0, 4, 8, 8)
    assert torch.equal(none.latents, full.latents)


def test_a_latent_between_two_recorded_steps_is_stored_once(policy, streams):
    schedule = make_schedule(GRID[0], steps=6)
    conditioning = policy.encode(PROMPTS[:2])

    def sampled(record):
        return rollout(policy, schedule, conditioning, streams(2), record=record, record_means=True)

    whole = sampled(None)
    for first, count in ((0, len(schedule.stochastic_steps)), (1, 3), (2, 1)):
        steps = torch.arange(first, first + count).expand(2, -1)
        path = concatenate([sampled(steps), sampled(steps)])
        storage = path.x_t.untyped_storage()
        assert storage.data_ptr() == path.x_s.untyped_storage().data_ptr()
        assert storage.nbytes() == 4 * 4 * (count + 1) * path.latents[0].numel()
        for name in ("x_t", "x_s", "logp_old", "mean_old"):
            expected = getattr(whole, name)[:, first : first + count]
            assert torch.equal(getattr(path, name), torch.cat([expected, expected])), name
    apart = sampled(torch.tensor([[0, 2], [1, 4]]))
    for row, steps in enumerate(([0, 2], [1, 4])):
        for name in ("x_t", "x_s", "logp_old", "mean_old"):
            assert torch.equal(getattr(apart, name)[row], getattr(whole, name)[row, steps]), name
    mixed = concatenate([whole, whole, sampled(whole.steps.flip(1))])
    assert torch.equal(mixed.x_t[4:], whole.x_t.flip(1))
    assert torch.equal(mixed.x_s[4:], whole.x_s.flip(1))
    last = {field.name: getattr(whole, field.name)[1:] for field in fields(Trajectory) if field.name != "conditioning"}
    last = Trajectory(**last, conditioning={name: value[1:] for name, value in conditioning.items()})
    assert torch.equal(concatenate([last, last]).x_t, whole.x_t[[1, 1]])
    nothing = sampled(torch.empty(2, 0, dtype=torch.int64))
    assert nothing.x_t.shape == nothing.mean_old.shape == (2, 0, *policy.latent_shape)
    assert nothing.logp_old.shape == (2, 0)
    assert torch.equal(nothing.latents, whole.latents)


def test_a_deterministic_last_step_moves_the_latent_and_is_not_recorded(policy, streams):
    scheduler = DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=True, clip_sample=False)
    schedule = build_schedule(scheduler, 4).to("cpu")
    conditioning = policy.encode(PROMPTS)
    path = rollout(policy, schedule, conditioning, streams(4))
    assert path.steps.tolist() == [[0, 1, 2]] * 4
    with torch.no_grad():
        last = transition(policy, schedule, path.x_s[:, -1], torch.full((4,), 3), conditioning)
    assert torch.equal(path.latents, last.mean)
    assert (path.latents - path.x_s[:, -1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="deterministic step"):
        rollout(policy, schedule, conditioning, streams(4), record=torch.tensor([[0, 3]] * 4))


def test_eta_zero_samples_without_a_density(policy, streams):
    schedule = build_schedule(policy.pipeline.scheduler, 4, eta=0.0).to("cpu")
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(4))
    assert path.logp_old.shape == (4, 0)
    assert path.latents.isfinite().all()


def test_each_step_is_announced_and_no_graph_is_kept(policy, streams):
    schedule = build_schedule(policy.pipeline.scheduler, 4).to("cpu")
    calls = []
    path = rollout(policy, schedule, policy.encode(PROMPTS), streams(4), on_step=lambda: calls.append(1))
    assert len(calls) == 4
    assert not any(getattr(path, column).requires_grad for column in ("x_t", "x_s", "logp_old", "latents"))


@pytest.mark.parametrize(
    ("prompts", "record"),
    [(3, None), (4, torch.zeros(3, 1, dtype=torch.int64)), (4, torch.zeros(4, dtype=torch.int64))],
)
def test_sizes_that_differ_are_refused(prompts, record, policy, streams):
    schedule = build_schedule(policy.pipeline.scheduler, 4).to("cpu")
    with pytest.raises(ValueError, match="must hold 4 samples"):
        rollout(policy, schedule, policy.encode(PROMPTS[:prompts]), streams(4), record=record)


@with_and_without_guidance
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_bf16_autocast_keeps_actions_float32(model, guided, make_policy, streams):
    """Equal shapes replay exactly in bf16 too; other batch shapes stay well inside a nat per dimension."""
    policy = make_policy(model, noise=0.05, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    policy.guidance_scale = guided.guidance_scale
    schedule = build_schedule(policy.pipeline.scheduler, 4).to("cpu")
    conditioning = policy.encode(PROMPTS)
    path = rollout(policy, schedule, conditioning, streams(4))
    assert {getattr(path, c).dtype for c in ("x_t", "x_s", "logp_old", "latents")} == {torch.float32}
    assert torch.equal(replay_steps(policy, schedule, path, conditioning), path.logp_old)
    for size in (1, 3, 5):
        ratio = torch.exp(replay_mixed(policy, schedule, path, conditioning, size) - path.logp_old)
        assert (ratio - 1).abs().max() < 1e-3
