"""DDPO's arithmetic on one recorded epoch, against the formulas by hand; and two short trainings."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from diffusion_align.diffusion.ddpo import DDPOBatch, DDPOConfig, DDPOTrainer
from diffusion_align.diffusion.rollout import Trajectory, rollout, transition
from diffusion_align.diffusion.sampled_steps import kl_probes
from diffusion_align.diffusion.trainer import Collected
from diffusion_align.errors import TrainingError
from diffusion_align.estimators import PromptStatistics
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.image import ImageAlignmentPipeline
from diffusion_align.pipelines.run import run
from diffusion_align.training.statistics import equal_reward_metric
from tests.helpers.hard_runs import rows_of

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
            "model": "emoji-sd",
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
    """An epoch as ``collect`` would return it, of which nothing is trained."""
    count = len(rewards)
    texts = [PROMPTS[i // trainer.config.group_size % 2] for i in range(count)]
    record = torch.stack([trainer._recorded_steps(i) for i in range(count)])
    reduction = trainer.config.logp_reduction
    conditioning = trainer.policy.encode(texts)
    path = rollout(trainer.policy, trainer.schedule, conditioning, streams(count), record=record, reduction=reduction)
    scores = torch.tensor(rewards)
    return Collected([(text, {}) for text in texts], path, scores[:, None], scores, {})


def everything(batch):
    pairs = torch.cartesian_prod(*(torch.arange(n) for n in batch.path.steps.shape))
    return pairs.unbind(1)


def means(trainer, batch):
    """The policy's mean of every recorded action, and the reference's, in float64; and the stds."""
    path, found = batch.path, []
    with torch.no_grad():
        for _ in range(2):
            rows = []
            for k in range(path.steps.shape[1]):
                timestep = trainer.schedule.table.timestep[path.steps[:, k]]
                prediction = trainer.policy.predict(path.x_t[:, k], timestep, path.conditioning)
                step = trainer.schedule.at(path.steps[:, k])
                x_0 = (path.x_t[:, k] - step.sigma_t * prediction) / step.alpha_t
                rows.append(step.x_0_weight * x_0 + step.eps_weight * prediction)
            found.append(torch.stack(rows, dim=1).double())
            trainer.policy.pipeline.unet.disable_adapters()
        trainer.policy.pipeline.unet.enable_adapters()
    std = trainer.schedule.table.std[path.steps].double()[:, :, None, None, None]
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
    trainer.advantages.weights = WEIGHTS if apart else torch.ones(1)
    trainer.advantages.statistics = [PromptStatistics(8, 2) for _ in trainer.advantages.weights]
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
        assert trainer.config.clip_bounds(dimensions)[2] == pytest.approx(nats, abs=0.005)


@pytest.mark.parametrize(("reduction", "power"), [("mean", 256), ("sum", 1)])
def test_clip_range_nats_bounds_the_joint_ratio_on_both_sides(reduction, power, make_trainer):
    trainer = make_trainer(clip_range_nats=1.64, logp_reduction=reduction)
    assert power * math.log1p(trainer.clip_high) == pytest.approx(1.64)
    assert power * math.log1p(-trainer.clip) == pytest.approx(-1.64)
    assert trainer.clip_nats == pytest.approx(1.64)
    beyond = trainer.config.model_copy(update={"clip_range_nats": 1e4, "logp_reduction": "sum"})
    assert beyond.clip_bounds(256) == (1.0, math.inf, math.inf)


HALF = math.sqrt(0.5)
HISTORY = {"advantages": "prompt_history", "history_size": 8, "history_min_count": 2}


@pytest.mark.parametrize(
    ("settings", "advantages", "kept"),
    [
        ({}, [-HALF, HALF, 0.0, 0.0], [0, 1]),
        ({"advantage_clip": 0.5}, [-0.5, 0.5, 0.0, 0.0], [0, 1]),
        (HISTORY, [-1.0, 1.0, 0.0, 0.0], [0, 1]),  # per prompt
        ({"kl_coef": 0.1}, [-HALF, HALF, 0.0, 0.0], [0, 1, 2, 3]),
    ],
)
def test_advantages_and_which_images_are_trained_on(settings, advantages, kept, make_trainer, streams):
    trainer = make_trainer(**settings)
    batch, (keep, actions, normalizer), metrics = trainer.estimate(recorded(trainer, streams))
    torch.testing.assert_close(batch.advantages, torch.tensor(advantages)[:, None].expand(4, 4))
    assert keep.tolist() == kept
    assert (actions, normalizer) == (4, 4)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert batch.reference_mean is None  # one pass asks the reference as it goes


@pytest.mark.parametrize(("size", "expected"), [(1, None), (2, 0.5), (4, 0.0)])
def test_groups_of_one_have_no_spread_to_log(size, expected):
    rewards = torch.tensor([1.0, 1.0, 2.0, 1.5])
    assert equal_reward_metric(rewards, size).get("frac_reward_zero_std") == expected


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("objective", ["ratio", "score_function"])
def test_loss_is_the_formula(objective, reduction, make_trainer, streams):
    """eq. 26 (or 22-24) plus kl_coef times eq. 71, per action, in one unit."""
    trainer = make_trainer(kl_coef=0.3, objective=objective, logp_reduction=reduction)
    batch, *_ = trainer.estimate(recorded(trainer, streams))
    now, reference, std = means(trainer, batch)
    samples, actions = everything(batch)
    losses, statistics = trainer.loss(batch, samples, actions)
    logp = reduced(Normal(now, std).log_prob(batch.path.x_s.double()), reduction)
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
    batch, *_ = trainer.estimate(recorded(trainer, streams))
    assert batch.reference_mean is not None
    samples, actions = everything(batch)
    cached, with_cache = trainer.loss(batch, samples, actions)
    batch = replace(batch, reference_mean=None)
    fresh, without = trainer.loss(batch, samples, actions)
    torch.testing.assert_close(cached, fresh, atol=1e-6, rtol=0)
    torch.testing.assert_close(with_cache["kl"], without["kl"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(with_cache["kl_path"], 4 * with_cache["kl"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("kl", "credit"), [("k1_reward", "step"), ("k1_reward", "to_go"), ("closed_form", "to_go")])
def test_kl_in_the_reward_by_hand(kl, credit, reduction, make_trainer, streams):
    """k1 of this step, of this and the later ones, or of the later ones where the closed form has this one."""
    trainer = make_trainer(kl_coef=0.2, kl=kl, credit=credit, logp_reduction=reduction)
    batch, *_ = trainer.estimate(recorded(trainer, streams))
    now, reference, std = means(trainer, batch)
    x_s = batch.path.x_s.double()
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
    samples, actions = everything(batch)
    losses, statistics = trainer.loss(batch, samples, actions)
    in_loss = (losses.detach() - statistics["loss/policy"]).abs().max()
    assert (in_loss > 1e-9) == (kl == "closed_form")


def test_a_deterministic_last_step_takes_no_part(make_trainer, tmp_path, monkeypatch):
    scheduler = DDIMScheduler(steps_offset=1, set_alpha_to_one=True, clip_sample=False)
    trainer = make_trainer(scheduler=scheduler, noise=0, kl_coef=0.1, epochs=1, grid_every=0, learning_rate=1e-2)
    assert trainer.schedule.stochastic_steps.tolist() == [0, 1, 2]
    seen, loss = [], trainer.loss

    def watched(batch, samples, actions):
        losses, statistics = loss(batch, samples, actions)
        seen.extend(batch.path.steps[samples, actions].tolist())
        assert losses.isfinite().all()
        return losses, statistics

    monkeypatch.setattr(trainer, "loss", watched)
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    trainer.train()
    assert sorted(seen) == sorted([0, 1, 2] * 4)


# -- how far the policy is from the reference -------------------------------------------------------------------


@pytest.fixture
def watched_epoch(make_trainer, streams):
    """``watched_epoch(noise=0.05, **settings)``: a trainer without a price of the KL, and an epoch of 16 images."""
    common = {"samples_per_epoch": 16, "sample_batch_size": 16, "micro_batch_size": 7, "group_size": 1}
    common |= {"advantages": "prompt_history", "sampler": {"steps": 6, "guidance_scale": 1.0}}

    def make(noise=0.05, **settings):
        trainer = make_trainer(noise=noise, **common | settings)
        return trainer, recorded(trainer, streams, torch.arange(16.0).tolist())

    return make


def estimated(trainer, collected, updates):
    trainer.estimate(collected)
    for _ in range(updates):
        trainer.check_update({}, first=False)
    return trainer.after_updates()


@pytest.mark.parametrize("settings", [{}, {"timestep_fraction": 0.5}, {"inner_epochs": 12}])
def test_the_estimate_agrees_with_the_whole_and_costs_little(watched_epoch, monkeypatch, settings):
    trainer, collected = watched_epoch(**settings)
    steps = len(trainer.trained_steps)
    looked, reference, predict = [], [False], trainer.policy.predict

    @contextlib.contextmanager
    def watched(enter=trainer.policy.reference):
        reference[0] = True
        with enter():
            yield
        reference[0] = False

    monkeypatch.setattr(trainer.policy, "reference", watched)
    monkeypatch.setattr(
        trainer.policy, "predict", lambda x, *a, **k: (looked.append((len(x), reference[0])), predict(x, *a, **k))[1]
    )
    found = estimated(trainer, collected, 2 * settings.get("inner_epochs", 1))
    count = sum(n for n, of_reference in looked if of_reference)
    assert count == sum(n for n, of_reference in looked if not of_reference)
    trained = collected.trajectory.steps.numel() * settings.get("inner_epochs", 1)
    assert count <= max(steps, 0.01 * (16 * 6 + 3 * trained))
    assert 2 * steps < count if "inner_epochs" in settings else count == steps

    priced, _ = watched_epoch(kl_coef=1e-9, **settings)
    every = torch.cartesian_prod(torch.arange(16), torch.arange(collected.trajectory.steps.shape[1]))
    batch, *_ = priced.estimate(collected)
    _, statistics = priced.loss(batch, *every.unbind(1))
    by_step = [statistics["kl"][batch.path.steps.flatten() == s].mean().item() for s in trainer.trained_steps]
    assert found["kl_path_stderr"] > 0
    assert abs(found["kl_path"] - sum(by_step)) < 2 * found["kl_path_stderr"]
    assert found["kl_path_stderr"] < found["kl_path"]
    assert found["kl"] == pytest.approx(found["kl_path"] / steps)


def test_equal_weights_have_a_kl_of_exactly_0_and_updates_without_samples_lose_nothing(watched_epoch):
    trainer, batch = watched_epoch(noise=0.0)
    assert estimated(trainer, batch, 1) == {"kl": 0.0, "kl_path": 0.0, "kl_path_stderr": 0.0}
    assert (trainer._probes.update < 0).all()
    assert kl_probes(trainer.config, 1, 4) == 2, "of a single step an error needs two"


def test_micro_batches_do_not_change_the_estimate(watched_epoch):
    values = [estimated(*watched_epoch(micro_batch_size=size), 2)["kl_path"] for size in (1, 7)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_a_priced_kl_has_its_error_too_and_one_that_is_not_finite_ends_the_run(watched_epoch):
    trainer, collected = watched_epoch(kl_coef=0.1)
    batch, *_ = trainer.estimate(collected)
    every = torch.cartesian_prod(torch.arange(16), torch.arange(batch.path.steps.shape[1]))
    _, statistics = trainer.loss(batch, *every.unbind(1))
    assert torch.equal(statistics["kl_path_stderr"], statistics["kl_path"])  # see the test of UpdateStatistics
    assert trainer.check_update({}, first=False) == trainer.after_updates() == {}
    trainer, collected = watched_epoch()
    trainer.estimate(collected)
    trainer._probes.found.append((trainer.trained_steps[:1], torch.tensor([math.nan])))
    with pytest.raises(TrainingError, match="the KL to the reference is nan"):
        trainer.after_updates()


# -- short trainings --------------------------------------------------------------------------------------------

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
    by_run = [p(PROMPTS, steps=3, guidance_scale=2.0, eta=0.0).images for p in (trained, untrained)]
    assert [p.size for p in by_run[0]] == [(16, 16)] * 2
    live = ImageAlignmentPipeline(trainer.policy.pipeline, model="tiny")
    for ours, theirs in zip(live(PROMPTS, steps=3, guidance_scale=2.0, eta=0.0).images, by_run[0], strict=True):
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
        path = recorded(trainer, streams).trajectory
        d = trainer.dimensions
        rule = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)]).view(-1, *trainer.policy.latent_shape)
        index = path.steps[:1, 1].expand(len(rule))
        conditioning = {
            name: value[:1].expand(len(rule), *value.shape[1:]) for name, value in path.conditioning.items()
        }
        x_t = path.x_t[:1, 1].expand(len(rule), *trainer.policy.latent_shape)
        with torch.no_grad():
            action = transition(trainer.policy, trainer.schedule, x_t, index, conditioning)
            x_s = action.sample(rule)
            logp_old = action.log_prob(x_s, reduction=reduction)
        steps = Trajectory(x_t[:, None], x_s[:, None], index[:, None], logp_old[:, None], x_s, conditioning)
        batch = DDPOBatch(steps, torch.zeros(len(rule), 1))
        if kl == "k1_reward":
            batch = replace(batch, reference_mean=trainer._reference_means(batch))
            batch = replace(batch, advantages=-0.2 * trainer._kl_in_reward(batch))
        losses, _ = trainer.loss(batch, torch.arange(len(rule)), torch.zeros(len(rule), dtype=torch.int64))
        gradients[kl] = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), trainer.trainable.values())])
    assert gradients["closed_form"].norm() > 0
    difference = gradients["k1_reward"] - gradients["closed_form"]
    assert difference.norm() < 1e-3 * gradients["closed_form"].norm()
