"""DDPO's arithmetic on one recorded epoch, against the formulas by hand; and two short trainings."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from diffusion_align.diffusion.collection import Collected
from diffusion_align.diffusion.ddpo import DDPOBatch, DDPOConfig, DDPOTrainer
from diffusion_align.diffusion.rollout import rollout, transition
from diffusion_align.estimators import PromptStatistics
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.image import ImageAlignmentPipeline
from diffusion_align.pipelines.run import run
from diffusion_align.training.statistics import equal_reward_metric

PROMPTS = ["red apple", "a cat"]


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


@pytest.fixture
def make_trainer(make_policy, tmp_path):
    def make(model="tiny_sd", *, noise=0.05, scheduler=None, **settings):
        policy = make_policy(model, noise=noise)
        if scheduler is not None:
            policy.pipeline.scheduler = scheduler
        defaults = {
            "model": "tiny",
            "output_dir": tmp_path / "run",
            "prompts": PROMPTS,
            "reward": redness,
            "sampler": {"steps": 4, "guidance_scale": 1.0},
            "samples_per_epoch": 4,
            "sample_batch_size": 4,
            "micro_batch_size": 5,
            "group_size": 2,
            "advantages": "group",
        }
        config = DDPOConfig(**(defaults | settings))
        return DDPOTrainer(config, policy, redness, [(p, {}) for p in PROMPTS])

    return make


def recorded(trainer, streams, rewards=(1.0, 3.0, 2.0, 2.0)):
    """An epoch of four pictures, two a prompt, as ``collect`` would return it."""
    texts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    conditioning = trainer.policy.encode(texts)
    path = rollout(trainer.policy, trainer.schedule, conditioning, streams(4), reduction=trainer.config.logp_reduction)
    samples = [(text, {}) for text in texts]
    scores = torch.tensor(rewards)
    return Collected(samples, path, conditioning, scores[:, None], scores, {})


def everything(batch):
    pairs = torch.cartesian_prod(*(torch.arange(n) for n in batch.steps.shape))
    return pairs.unbind(1)


def means(trainer, batch):
    """The policy's mean of every recorded decision, and the reference's, in float64; and the stds."""
    found = []
    with torch.no_grad():
        for _ in range(2):
            rows = []
            for k in range(batch.steps.shape[1]):
                timestep = trainer.schedule.table.timestep[batch.steps[:, k]]
                prediction = trainer.policy.predict(batch.x_t[:, k], timestep, batch.conditioning)
                step = trainer.schedule.at(batch.steps[:, k])
                x_0 = (batch.x_t[:, k] - step.sigma_t * prediction) / step.alpha_t
                rows.append(step.x_0_weight * x_0 + step.eps_weight * prediction)
            found.append(torch.stack(rows, dim=1).double())
            trainer.policy.pipeline.unet.disable_adapters()
        trainer.policy.pipeline.unet.enable_adapters()
    std = trainer.schedule.table.std[batch.steps].double()[:, :, None, None, None]
    return found[0], found[1], std


def reduced(x, reduction):
    return x.flatten(2).sum(2) if reduction == "sum" else x.flatten(2).mean(2)


SCORES = torch.tensor([[1.0, 50.0], [3.0, 20.0], [2.0, 10.0], [6.0, 90.0]])
WEIGHTS = torch.tensor([2.0, -0.5])


@pytest.mark.parametrize("advantages", ["group", "prompt_history", "leave_one_out"])
@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_several_rewards_are_summed_before_or_after_they_are_normalised(advantages, how, make_trainer, streams):
    trainer = make_trainer(
        advantages=advantages, multi_objective_aggregation=how, reward=[redness, redness], advantage_clip=100
    )
    apart = how == "normalize_then_sum"
    trainer.weights = WEIGHTS if apart else torch.ones(1)
    trainer.statistics = [PromptStatistics(8, 2) for _ in trainer.weights]
    batch = replace(recorded(trainer, streams, rewards=(SCORES @ WEIGHTS).tolist()), scores=SCORES)
    batch, *_ = trainer.estimate(batch)
    columns, weights = (SCORES, WEIGHTS) if apart else ((SCORES @ WEIGHTS)[:, None], torch.ones(1))
    groups = columns.double().view(2, 2, -1)
    std = groups.std(dim=1, correction=1 if advantages == "group" else 0, keepdim=True)
    expected = ((groups - groups.mean(dim=1, keepdim=True)) / std).flatten(0, 1) @ weights.double()
    if advantages == "leave_one_out":  # of two: less the other one
        expected = (groups - groups.flip(1)).flatten(0, 1) @ weights.double()
    torch.testing.assert_close(batch.advantages[:, 0].double(), expected, rtol=1e-6, atol=1e-6)
    assert (batch.advantages[:, 0] != batch.advantages[0, 0]).any()


def test_clip_range_in_nats_of_the_joint_ratio(make_trainer):
    """1e-4 a dimension is 1.64 nats at Stable Diffusion 1.5's d = 16 384 and 6.6 at SDXL's 65 536."""
    trainer = make_trainer(clip_range=1e-4)
    assert trainer.dimensions == 4 * 8 * 8
    assert trainer.clip_nats == pytest.approx(256 * math.log1p(1e-4))
    for dimensions, nats in [(16384, 1.64), (65536, 6.55)]:
        trainer.dimensions = dimensions
        assert trainer.clip_nats == pytest.approx(nats, abs=0.005)


@pytest.mark.parametrize(("reduction", "power"), [("mean", 256), ("sum", 1)])
def test_clip_range_nats_bounds_the_joint_ratio_on_both_sides(reduction, power, make_trainer):
    trainer = make_trainer(clip_range_nats=1.64, logp_reduction=reduction)
    assert power * math.log1p(trainer.clip_high) == pytest.approx(1.64)
    assert power * math.log1p(-trainer.clip) == pytest.approx(-1.64)
    assert trainer.clip_nats == pytest.approx(1.64)


@pytest.mark.parametrize(("size", "expected"), [(1, None), (2, 0.5), (4, 0.0)])
def test_groups_of_one_have_no_spread_to_log(size, expected):
    rewards = torch.tensor([1.0, 1.0, 2.0, 1.5])
    assert equal_reward_metric(rewards, size).get("frac_reward_zero_std") == expected


def test_pictures_without_advantage_are_left_out(make_trainer, streams):
    trainer = make_trainer()
    batch = recorded(trainer, streams)
    batch, (keep, decisions, _), metrics = trainer.estimate(batch)
    assert keep.tolist() == [0, 1]
    assert decisions == 4
    assert metrics["frac_reward_zero_std"] == 0.5
    half = math.sqrt(0.5)
    expected = torch.tensor([-half, half, 0, 0])[:, None].expand(4, 4)
    torch.testing.assert_close(batch.advantages, expected)
    assert batch.reference_mean is None


def test_with_a_kl_every_picture_counts(make_trainer, streams):
    trainer = make_trainer(kl_coef=0.1)
    _, (keep, _, _), _ = trainer.estimate(recorded(trainer, streams))
    assert keep.tolist() == [0, 1, 2, 3]


def test_advantages_are_clipped(make_trainer, streams):
    trainer = make_trainer(advantage_clip=0.5)
    batch = recorded(trainer, streams)
    batch, *_ = trainer.estimate(batch)
    assert batch.advantages[:, 0].tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_prompt_history_is_per_prompt(make_trainer, streams):
    trainer = make_trainer(advantages="prompt_history", history_size=8, history_min_count=2)
    batch = recorded(trainer, streams)
    batch, *_ = trainer.estimate(batch)
    torch.testing.assert_close(batch.advantages[:, 0], torch.tensor([-1.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("objective", ["ratio", "score_function"])
def test_loss_is_the_formula(objective, reduction, make_trainer, streams):
    """eq. 26 (or 22-24) plus kl_coef times eq. 71, per decision, in one unit."""
    trainer = make_trainer(kl_coef=0.3, objective=objective, logp_reduction=reduction)
    batch = recorded(trainer, streams)
    batch, *_ = trainer.estimate(batch)
    now, reference, std = means(trainer, batch)
    samples, decisions = everything(batch)
    losses, statistics = trainer.loss(batch, samples, decisions)
    logp = reduced(Normal(now, std).log_prob(batch.x_s.double()), reduction)
    kl = kl_divergence(Normal(now, std), Normal(reference, std))
    policy = -batch.advantages if objective == "ratio" else -batch.advantages * logp
    expected = policy + 0.3 * reduced(kl, reduction)
    torch.testing.assert_close(losses.double().view(4, 4), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(statistics["kl"].double().view(4, 4), reduced(kl, "sum"), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(
        statistics["ratio/mean"], torch.ones(16), atol=1e-5 if reduction == "mean" else 1e-2, rtol=0
    )
    assert statistics["kl"].min() > 1e-6


def test_cached_reference_equals_the_reference_on_the_fly(make_trainer, streams):
    trainer = make_trainer(kl_coef=0.3, inner_epochs=2)
    batch = recorded(trainer, streams)
    batch, *_ = trainer.estimate(batch)
    assert batch.reference_mean is not None
    samples, decisions = everything(batch)
    cached, with_cache = trainer.loss(batch, samples, decisions)
    batch = replace(batch, reference_mean=None)
    fresh, without = trainer.loss(batch, samples, decisions)
    torch.testing.assert_close(cached, fresh, atol=1e-6, rtol=0)
    torch.testing.assert_close(with_cache["kl"], without["kl"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(with_cache["kl_path"], 4 * with_cache["kl"])


def test_one_pass_asks_the_reference_as_it_goes(make_trainer, streams):
    trainer = make_trainer(kl_coef=0.3, inner_epochs=1)
    batch = recorded(trainer, streams)
    batch, *_ = trainer.estimate(batch)
    assert batch.reference_mean is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("kl", "credit"), [("k1_reward", "step"), ("k1_reward", "to_go"), ("closed_form", "to_go")])
def test_kl_in_the_reward_by_hand(kl, credit, reduction, make_trainer, streams):
    """k1 of this step, of this and the later ones, or of the later ones where the closed form has this one."""
    trainer = make_trainer(kl_coef=0.2, kl=kl, credit=credit, logp_reduction=reduction)
    batch = recorded(trainer, streams)
    batch, *_ = trainer.estimate(batch)
    now, reference, std = means(trainer, batch)
    x_s = batch.x_s.double()
    k1 = reduced(Normal(now, std).log_prob(x_s) - Normal(reference, std).log_prob(x_s), "sum")  # always nats
    plain = torch.tensor([-math.sqrt(0.5), math.sqrt(0.5), 0, 0], dtype=torch.float64)
    for b in range(4):
        for k in range(4):
            charged = {
                ("k1_reward", "step"): k1[b, k],
                ("k1_reward", "to_go"): k1[b, k:].sum(),
                ("closed_form", "to_go"): k1[b, k + 1 :].sum(),
            }[kl, credit]
            assert batch.advantages[b, k].item() == pytest.approx((plain[b] - 0.2 * charged).item(), abs=2e-4)
    samples, decisions = everything(batch)
    _, statistics = trainer.loss(batch, samples, decisions)
    losses = trainer.loss(batch, samples, decisions)[0]
    in_loss = (losses.detach() - statistics["loss/policy"]).abs().max()
    assert (in_loss > 1e-9) == (kl == "closed_form")


def test_a_deterministic_last_step_takes_no_part(make_trainer, tmp_path, monkeypatch):
    scheduler = DDIMScheduler(steps_offset=1, set_alpha_to_one=True, clip_sample=False)
    trainer = make_trainer(scheduler=scheduler, noise=0, kl_coef=0.1, epochs=1, grid_every=0, learning_rate=1e-2)
    assert trainer.schedule.stochastic_steps.tolist() == [0, 1, 2]
    seen, loss = [], trainer.loss

    def watched(batch, samples, decisions):
        losses, statistics = loss(batch, samples, decisions)
        seen.extend(batch.steps[samples, decisions].tolist())
        assert losses.isfinite().all()
        return losses, statistics

    monkeypatch.setattr(trainer, "loss", watched)
    trainer.train()
    assert sorted(seen) == sorted([0, 1, 2] * 4)


SHORT = {
    "reward": redness,
    "prompts": PROMPTS,
    "epochs": 2,
    "samples_per_epoch": 4,
    "sample_batch_size": 2,
    "micro_batch_size": 4,
    "learning_rate": 1e-3,
    "grid_every": 2,
}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_tiny_sdxl_trains_and_samples(tiny_sdxl, tmp_path):
    folder = tmp_path / "run"
    raw = SHORT | {"model": str(tiny_sdxl), "output_dir": folder, "sampler": {"steps": 3, "guidance_scale": 2.0}}
    config = check_config(raw | {"kl_coef": 0.01, "lora": {"rank": 2, "layers": "attention+convolutions"}})
    trainer = run(config)
    rows = rows_of(folder)
    assert max(row.get("ratio/first_pass_deviation", 0) for row in rows) < 1e-5
    assert rows[-1]["epoch"] == 2
    assert [row["kl"] for row in rows if "kl" in row][-1] > 0
    assert any(p.abs().max() > 0 for n, p in trainer.policy.trainable.items() if ".lora_B" in n)
    assert (folder / "samples" / "before_after.png").is_file()
    assert (folder / "report.html").is_file()

    trained = ImageAlignmentPipeline.from_pretrained(folder, device="cpu")
    assert trained.sampler.steps == 3
    untrained = ImageAlignmentPipeline.from_pretrained(tiny_sdxl, device="cpu")
    pictures = [p(PROMPTS, steps=3, guidance_scale=2.0, eta=0.0).images for p in (trained, untrained)]
    assert [p.size for p in pictures[0]] == [(16, 16)] * 2
    live = ImageAlignmentPipeline(trainer.policy.pipeline, model="tiny")
    for ours, theirs in zip(live(PROMPTS, steps=3, guidance_scale=2.0, eta=0.0).images, pictures[0], strict=True):
        difference = torch.tensor(list(ours.tobytes())).float() - torch.tensor(list(theirs.tobytes()))
        assert difference.abs().max() <= 1


def test_full_fine_tuning_trains_and_samples(tiny_sd2, tmp_path):
    folder = tmp_path / "run"
    sampler = {"name": "ddpm", "steps": 3, "guidance_scale": 1.0}
    raw = SHORT | {"model": str(tiny_sd2), "output_dir": folder, "lora": None, "sampler": sampler, "inner_epochs": 2}
    run(check_config(raw))
    assert max(row.get("ratio/first_pass_deviation", 0) for row in rows_of(folder)) < 1e-5
    trained = ImageAlignmentPipeline.from_pretrained(folder, device="cpu").pipeline.unet.state_dict()
    before = ImageAlignmentPipeline.from_pretrained(tiny_sd2, device="cpu").pipeline.unet.state_dict()
    assert set(trained) == set(before)
    assert any(not torch.equal(trained[n], before[n]) for n in trained)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_k1_in_the_reward_and_the_closed_form_have_one_expected_gradient(reduction, make_trainer, streams):
    """[000] eq. 30 and 31, the action noise integrated exactly: +-sqrt(d) e_i is a degree-3 rule for N(0, I)."""
    gradients = {}
    for kl in ("closed_form", "k1_reward"):
        trainer = make_trainer(kl_coef=0.2, kl=kl, logp_reduction=reduction, objective="score_function")
        collected = recorded(trainer, streams)
        d = trainer.dimensions
        rule = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)]).view(-1, *trainer.policy.latent_shape)
        index = collected.trajectory.steps[:1, 1].expand(len(rule))
        conditioning = {
            name: value[:1].expand(len(rule), *value.shape[1:]) for name, value in collected.conditioning.items()
        }
        x_t = collected.trajectory.x_t[:1, 1].expand(len(rule), *trainer.policy.latent_shape)
        with torch.no_grad():
            decision = transition(trainer.policy, trainer.schedule, x_t, index, conditioning)
            x_s = decision.sample(rule)
            logp_old = decision.log_prob(x_s, reduction=reduction)
        batch = DDPOBatch(
            x_t=x_t[:, None],
            x_s=x_s[:, None],
            steps=index[:, None],
            logp_old=logp_old[:, None],
            advantages=torch.zeros(len(rule), 1),
            conditioning=conditioning,
        )
        if kl == "k1_reward":
            batch = replace(batch, reference_mean=trainer._reference_means(batch))
            batch = replace(batch, advantages=-0.2 * trainer._kl_in_reward(batch))
        losses, _ = trainer.loss(batch, torch.arange(len(rule)), torch.zeros(len(rule), dtype=torch.int64))
        gradients[kl] = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), trainer.trainable.values())])
    assert gradients["closed_form"].norm() > 0
    difference = gradients["k1_reward"] - gradients["closed_form"]
    assert difference.norm() < 1e-3 * gradients["closed_form"].norm()
