"""Gradients through a real UNet's adapters: the KL, the reference, and the objectives."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
from diffusion_align.diffusion.rollout import replay, rollout, transition
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.diffusion.transitions import denoise
from diffusion_align.estimators import clipped_surrogate, score_function_loss

PROMPTS = ["red apple", "a cat", "blue car"]
EVERYTHING = LoRAConfig(rank=3, alpha=6, layers="attention+feed_forward+convolutions")
KINDS = {"lora": EVERYTHING, "dora": EVERYTHING.model_copy(update={"dora": True}), "full": None}


@pytest.fixture(params=KINDS)
def policy(request, make_policy):
    return make_policy("tiny_sd", lora=KINDS[request.param], guidance_scale=2.0)


def moved(policy, scale=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def pairs(policy, streams):
    """One recorded action of each sample, at different times, with its conditioning and schedule."""
    schedule = build_schedule(policy.pipeline.scheduler, 5).to("cpu")
    conditioning = policy.encode(PROMPTS)
    path = rollout(policy, schedule, conditioning, streams(3))
    rows, columns = torch.arange(3), torch.tensor([0, 2, 4])
    return schedule, path.x_t[rows, columns], path.x_s[rows, columns], columns, conditioning


def gradient(policy, value):
    parts = torch.autograd.grad(value, list(policy.trainable.values()), retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(parts, policy.trainable.values())]
    )


def reference_of(policy, schedule, x_t, steps, conditioning):
    with torch.no_grad(), policy.reference():
        return transition(policy, schedule, x_t, steps, conditioning)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_kl_gradient_equals_autograd_on_torch_distributions(policy, reduction, streams):
    schedule, x_t, _, steps, conditioning = pairs(moved(policy), streams)
    reference = reference_of(policy, schedule, x_t, steps, conditioning)
    now = transition(policy, schedule, x_t, steps, conditioning)
    kl = now.kl(reference, reduction=reduction)
    std = now.std.view(-1, 1, 1, 1)
    expected = kl_divergence(Normal(now.mean, std), Normal(reference.mean, std)).flatten(1)
    expected = expected.sum(1) if reduction == "sum" else expected.mean(1)
    assert (kl > 1e-8).all()
    torch.testing.assert_close(kl, expected, atol=0, rtol=1e-4)
    found, right = gradient(policy, kl.sum()), gradient(policy, expected.sum())
    assert found.norm() > 1e-4
    torch.testing.assert_close(found, right, atol=1e-5 * float(right.abs().max()), rtol=0)


def test_kl_is_exactly_zero_at_the_reference_and_not_after_a_step(policy, streams):
    schedule, x_t, x_s, steps, conditioning = pairs(policy, streams)
    reference = reference_of(policy, schedule, x_t, steps, conditioning)
    logp, now = replay(policy, schedule, x_t, x_s, steps, conditioning)
    kl = now.kl(reference)
    assert torch.equal(kl, torch.zeros(3))
    assert torch.equal(gradient(policy, kl.sum()), torch.zeros(sum(p.numel() for p in policy.trainable.values())))

    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=1e-2)
    (-logp.sum()).backward()
    optimizer.step()
    assert (transition(policy, schedule, x_t, steps, conditioning).kl(reference) > 0).all()
    again = reference_of(policy, schedule, x_t, steps, conditioning)
    assert torch.equal(again.mean, reference.mean)  # the reference did not move


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)]
)
def test_kl_is_exactly_zero_at_the_reference_with_narrow_frozen_weights(dtype, autocast, make_policy, streams):
    narrow = make_policy("tiny_sd", lora=None).pipeline
    narrow.unet.to(dtype)
    context = lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast)  # noqa: E731
    policy = DenoisingPolicy(narrow, lora=KINDS["dora"], autocast=context)
    schedule, x_t, _, steps, conditioning = pairs(policy, streams)
    reference = reference_of(policy, schedule, x_t, steps, conditioning)
    assert torch.equal(transition(policy, schedule, x_t, steps, conditioning).kl(reference), torch.zeros(3))


def test_reference_is_left_again_even_after_an_error(policy, streams):
    schedule, x_t, _, steps, conditioning = pairs(moved(policy), streams)
    with torch.no_grad():
        before = transition(policy, schedule, x_t, steps, conditioning).mean
        with pytest.raises(KeyError, match="lost"), policy.reference():
            raise KeyError("lost")
        assert torch.equal(transition(policy, schedule, x_t, steps, conditioning).mean, before)
        with policy.reference():
            assert not torch.equal(transition(policy, schedule, x_t, steps, conditioning).mean, before)
        assert torch.equal(transition(policy, schedule, x_t, steps, conditioning).mean, before)


def test_reference_is_the_loaded_model(make_policy, model_path, streams):
    from diffusers import UNet2DConditionModel

    plain = UNet2DConditionModel.from_pretrained(model_path("tiny_sd"), subfolder="unet")
    for lora in KINDS.values():
        policy = moved(make_policy("tiny_sd", lora=lora))
        conditioning = policy.encode(PROMPTS)
        x_t, timestep = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
        with torch.no_grad():
            expected = plain(x_t, timestep, conditioning["encoder_hidden_states"]).sample
            with policy.reference():
                torch.testing.assert_close(policy.predict(x_t, timestep, conditioning), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("layers", ["attention", "attention+convolutions", "attention+feed_forward"])
def test_lora_trains_its_adapters_only(layers, dora, make_policy):
    policy = make_policy("tiny_sd", lora=LoRAConfig(rank=2, alpha=8, layers=layers, dora=dora))
    trained = {n for n, p in policy.pipeline.unet.named_parameters() if p.requires_grad}
    assert trained == set(policy.trainable)
    assert all(".lora_" in n for n in trained)
    assert any("conv1" in n for n in trained) == ("convolutions" in layers)
    for part in ("ff.net.0.proj", "ff.net.2"):
        assert any(part in n for n in trained) == ("feed_forward" in layers)
    assert sum("magnitude" in n for n in trained) == dora * sum("lora_A" in n for n in trained)
    assert any("to_out.0" in n for n in trained)
    assert not any(p.requires_grad for m in (policy.pipeline.vae, policy.pipeline.text_encoder) for p in m.parameters())
    assert policy._frozen is None  # the adapter switched off is the reference; no second copy in memory
    scales = {s for m in policy.pipeline.unet.modules() for s in getattr(m, "scaling", {}).values()}
    assert scales == {4.0}


def test_full_fine_tuning_trains_everything_and_keeps_a_frozen_copy(make_policy):
    policy = make_policy("tiny_sd", lora=None)
    assert set(policy.trainable) == {n for n, _ in policy.pipeline.unet.named_parameters()}
    assert all(p.requires_grad for p in policy.trainable.values())
    assert not any(p.requires_grad for p in policy._frozen.parameters())
    own = {p.data_ptr() for p in policy.trainable.values()}
    assert not own & {p.data_ptr() for p in policy._frozen.parameters()}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_first_ratio_gradient_is_the_score_functions(policy, reduction, streams):
    """Before any update the PPO-2 objective is REINFORCE, whatever the clip."""
    schedule, x_t, x_s, steps, conditioning = pairs(moved(policy), streams)
    logp, _ = replay(policy, schedule, x_t, x_s, steps, conditioning, reduction=reduction)
    advantages = torch.tensor([1.5, -0.7, 0.4])
    ratio = gradient(policy, clipped_surrogate(logp, logp.detach(), advantages, clip=1e-4).mean())
    score = gradient(policy, score_function_loss(logp, advantages).mean())
    assert score.norm() > 1e-4
    torch.testing.assert_close(ratio, score, atol=1e-6 * float(score.abs().max()), rtol=0)


def test_kl_penalty_pulls_in_the_direction_of_equation_76(policy, streams):
    """The gradient of the mean loss with eq. 30 is that of A |x_s - mu|²/2std² + beta |mu - mu_ref|²/2std²."""
    schedule, x_t, x_s, steps, conditioning = pairs(moved(policy), streams)
    reference = reference_of(policy, schedule, x_t, steps, conditioning)
    logp, now = replay(policy, schedule, x_t, x_s, steps, conditioning, reduction="sum")
    advantages, beta = torch.tensor([1.5, -0.7, 0.4]), 0.3
    found = gradient(policy, (score_function_loss(logp, advantages) + beta * now.kl(reference)).mean())
    errors = (x_s - now.mean).square().flatten(1).sum(1), (now.mean - reference.mean).square().flatten(1).sum(1)
    by_hand = (advantages * errors[0] + beta * errors[1]) / (2 * now.std**2)
    right = gradient(policy, by_hand.mean())
    torch.testing.assert_close(found, right, atol=1e-5 * float(right.abs().max()), rtol=0)


def test_guidance_has_its_own_gradient(make_policy, streams):
    """Training differentiates the guided prediction: its gradient is not the conditional one's."""
    policy = moved(make_policy("tiny_sd", lora=EVERYTHING))
    schedule, x_t, x_s, steps, conditioning = pairs(policy, streams)
    found = []
    for scale in (1.0, 4.0):
        policy.guidance_scale = scale
        found.append(gradient(policy, replay(policy, schedule, x_t, x_s, steps, conditioning)[0].sum()))
    empty = {k: v.expand(3, *v.shape[1:]) for k, v in policy.encode([""]).items()}
    timestep = schedule.table.timestep[steps]
    policy.guidance_scale = 1.0
    with_prompt, without = (policy.predict(x_t, timestep, c) for c in (conditioning, empty))
    by_hand = denoise(x_t, without + 4 * (with_prompt - without), steps, schedule).log_prob(x_s, reduction="mean").sum()
    right = gradient(policy, by_hand)
    torch.testing.assert_close(found[1], right, atol=1e-4 * float(right.abs().max()), rtol=0)
    assert (found[1] - found[0]).norm() > 0.1 * right.norm()


def test_a_copy_of_the_weights_is_the_same_policy(make_policy, streams):
    """Nothing that decides is kept outside the trained parameters."""
    a, b = moved(make_policy("tiny_sd", seed=1)), make_policy("tiny_sd", seed=2)
    with torch.no_grad():
        for name, parameter in b.trainable.items():
            parameter.copy_(a.trainable[name])
    schedule = build_schedule(a.pipeline.scheduler, 3).to("cpu")
    paths = [rollout(p, schedule, p.encode(PROMPTS), streams(3)) for p in (a, b)]
    assert torch.equal(paths[0].logp_old, paths[1].logp_old)
