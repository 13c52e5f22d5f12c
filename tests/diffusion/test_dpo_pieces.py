"""Diffusion-DPO's arithmetic on one epoch of pairs, against the papers' formulas by hand, in float64."""

import contextlib
import functools
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn.functional import logsigmoid

from diffusion_align.diffusion.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from diffusion_align.diffusion.latent_cache import LatentCache
from diffusion_align.diffusion.rollout import replay
from diffusion_align.diffusion.settings import LoRAConfig
from diffusion_align.diffusion.transitions import add_noise, nats_per_squared_error, posterior
from diffusion_align.errors import ConfigError, Interrupted, TrainingError
from diffusion_align.estimators import beta_in_nats
from diffusion_align.models.lora import lora_layers
from diffusion_align.training.collection import BatchScores
from diffusion_align.training.reading import parse_config
from tests.helpers import exact_terms
from tests.helpers.hard_runs import rows_of
from tests.helpers.problems import problem

F64 = torch.float64
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPTS = ["red apple", "a cat", "blue car", "moon", "tree", "dog"]
DIMENSIONS = 4 * 8 * 8
BETA = 0.1
T = 999  # stochastic steps of the schedule the models were trained on
CLOSE = {"atol": 1e-9, "rtol": 1e-7}
SHORT = {"epochs": 2, "grid_every": 0, "learning_rate": 1e-3, "weight_decay": 0}


@pytest.fixture(scope="module")
def moved_policy(make_policy):
    """``moved_policy(model, noise)``: one for all tests, which leave its weights as they are."""
    return functools.cache(lambda model, noise: make_policy(model, noise=noise))


class Pairs:
    """Random images in place of a ``PairSet``."""

    def __init__(self, count=6, prompts=PROMPTS, ties=0, skipped=0):
        stream = torch.Generator().manual_seed(3)
        self.pixels = torch.rand(2, count, 3, 16, 16, generator=stream)
        self.prompts = [prompts[i % len(prompts)] for i in range(count)]
        self.rows = list(range(count))
        self.ties, self.skipped = ties, dict.fromkeys(range(skipped), "bad")

    def __len__(self):
        return len(self.prompts)

    def identity(self, i):
        return [self.rows[i], self.prompts[i]]

    def images(self, i, size, out):
        assert size == (16, 16)
        return out.copy_(self.pixels[:, i])


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


@pytest.fixture
def make_trainer(make_policy, tmp_path):
    """``make_trainer(model, noise=, lora=, pairs=, reward=, prompts=, **settings)``: offline unless given a reward."""

    def make(model="tiny_sd", *, noise=0.3, pairs=None, reward=None, prompts=None, policy=None, **settings):
        lora = {"lora": settings["lora"]} if "lora" in settings else {}
        guidance = settings.get("sampler", {}).get("guidance_scale", 1.0)
        policy = policy or make_policy(model, noise=noise, guidance_scale=guidance, **lora)
        defaults = {
            "model": "emoji-sd",
            "output_dir": tmp_path / "run",
            "sampler": {"steps": 4, "guidance_scale": 1.0},
            "samples_per_epoch": 4,
            "sample_batch_size": 4,
            "micro_batch_size": 3,
            "group_size": 2,
            "weighting": "exact",
        }
        if reward is None:
            pairs = pairs or Pairs()
            defaults["pairs"] = "emoji_style"
        else:
            prompts = prompts or [(p, {}) for p in PROMPTS]
            defaults |= {"prompts": [p for p, _ in prompts], "reward": reward}
        if "beta_dpo" not in settings:
            defaults["beta"] = BETA
        config = DiffusionDPOConfig(**(defaults | settings))
        Path(config.output_dir).mkdir(exist_ok=True)  # train() makes it
        return DiffusionDPOTrainer(config, policy, pairs=pairs, reward=reward, prompts=prompts)

    return make


def in_float64(trainer, batch):
    """Both in float64."""
    for unet in (trainer.policy.network, trainer.policy._frozen):
        if unet is not None:
            unet.double()
    exact_terms.in_float64(trainer)
    named = {name: getattr(batch, name) for name in ("x_0", "noise")}
    return replace(batch, **{name: value.double() for name, value in named.items() if value is not None})


def collected(trainer):
    batch, _ = trainer.collect()
    return in_float64(trainer, batch)


def everything(batch):
    """Every action of every sample, in a mixed order."""
    pairs = torch.cartesian_prod(*(torch.arange(n) for n in batch.steps.shape))
    return pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(5))].unbind(1)


def gradient(trainer, losses):
    """Of the losses times different factors, so that no two actions can stand for each other."""
    factors = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
    parts = torch.autograd.grad((losses * factors).sum(), trainer.trainable.values(), retain_graph=True)
    return torch.cat([g.flatten() for g in parts])


def assert_same_gradient(trainer, losses, others, tolerance=1e-9):
    ours, theirs = gradient(trainer, losses), gradient(trainer, others)
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@contextlib.contextmanager
def the_reference(policy):
    """The pretrained UNet, without a method of the policy."""
    if policy._frozen is not None:
        yield policy._frozen
        return
    policy.network.disable_adapters()
    yield policy.network
    policy.network.enable_adapters()


def outputs(trainer, batch, samples, actions, images):
    """x_0, eps, x_t, t and the UNet's output for images, of the policy (with gradient) and of the reference."""
    policy = trainer.policy
    t = 999 - batch.steps[samples, actions]
    x_0, eps = batch.x_0[images[samples]], batch.noise[0, samples, actions]
    x_t = DDPMScheduler(**BETAS).add_noise(x_0, eps, t)
    conditioning = {k: v[samples].double() for k, v in batch.conditioning.items()}
    text, added = conditioning.pop("encoder_hidden_states"), conditioning or None
    now = policy.network(x_t, t, text, added_cond_kwargs=added).sample
    with torch.no_grad(), the_reference(policy) as unet:
        reference = unet(x_t, t, text, added_cond_kwargs=added).sample
    return x_0, eps, x_t, t, now, reference


def nats(x, mean, var):
    return ((x - mean) ** 2 / (2 * var)).flatten(1).sum(1)


def by_hand(trainer, batch, samples, actions):
    """err, err_ref and KL of the chosen and of the rejected images, plain nats: Ho et al. 2020, eq. 6, 7 and 11."""
    v_prediction = trainer.policy.pipeline.scheduler.config.get("prediction_type") == "v_prediction"
    ab = DDPMScheduler(**BETAS).alphas_cumprod.double()
    found = []
    for images in (batch.chosen, batch.rejected):
        x_0, _, x_t, t, *predictions = outputs(trainer, batch, samples, actions, images)
        ab_t, ab_s = ab[t].view(-1, 1, 1, 1), ab[t - 1].view(-1, 1, 1, 1)
        alpha = ab_t / ab_s
        var = (1 - ab_s) / (1 - ab_t) * (1 - alpha)
        to_x_0, to_x_t = ab_s.sqrt() * (1 - alpha) / (1 - ab_t), alpha.sqrt() * (1 - ab_s) / (1 - ab_t)
        means = []
        for output in predictions:
            if v_prediction:
                means.append(to_x_0 * (ab_t.sqrt() * x_t - (1 - ab_t).sqrt() * output) + to_x_t * x_t)
            else:
                means.append((x_t - (1 - alpha) / (1 - ab_t).sqrt() * output) / alpha.sqrt())
        target = to_x_0 * x_0 + to_x_t * x_t
        found.append((nats(target, means[0], var), nats(target, means[1], var), nats(means[0], means[1], var)))
    return found


# -- at the reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2", "tiny_sdxl"])
def test_at_the_reference_the_loss_is_ln_2_and_both_variants_have_one_gradient(model, how, make_trainer, make_policy):
    lora = {"lora": None} if how == "full" else {}
    policy = make_policy(model, **lora)
    rounding = 0 if how == "lora" else 1e-10  # a copy of the weights may lie differently in memory
    losses = {}
    for variant in ("original", "corrected"):
        trainer = make_trainer(policy=policy, steps_per_pair=2, variant=variant, kl_coef=0, **lora)
        batch = collected(trainer)
        losses[variant], statistics = trainer.loss(batch, *everything(batch))
        assert losses[variant].dtype == F64
        if how == "lora":
            assert (statistics["rewards/accuracies"] == 0.5).all()
        assert (statistics["weight"] - 0.5).abs().max() <= rounding
        for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "error/winner", "error/loser", "kl"):
            assert statistics[name].abs().max() <= rounding, name
        assert (statistics["error/reference"] > 0).all()
    torch.testing.assert_close(losses["original"], torch.full((8,), math.log(2), dtype=F64), atol=1e-12, rtol=0)
    assert_same_gradient(trainer, losses["corrected"], losses["original"], 1e-10)


# -- the losses ----------------------------------------------------------------------------------------------------

LOSSES = {
    "sigmoid": {},
    "smoothing": {"label_smoothing": 0.2},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "sigmoid and kl": {"kl_coef": 0.03},
    "loser_weight": {"loser_weight": 0.3},
    "ipo loser_weight": {"loss_type": "ipo", "loser_weight": 0.3},
    "loser_clip": {"loser_clip": 1e-6},
    "corrected": {"variant": "corrected"},
    "corrected, eq. 36": {"variant": "corrected", "kl_coef": 0},
    "corrected, signed": {"variant": "corrected", "reward_mode": "signed_kl", "kl_coef": 0.005},
    "corrected, log-ratio": {"variant": "corrected", "reward_mode": "logratio", "kl_coef": 0},
    "corrected, loser": {"variant": "corrected", "loser_weight": 0.3, "loser_clip": 1e-6},
}


def expected_losses(config, beta, values):
    """The module docstring's formulas of (err, ref, kl) of w and l, each times T."""
    (err_w, ref_w, kl_w), (err_l, ref_l, kl_l) = ([T * v for v in side] for side in values)
    gain_w, gain_l = ref_w - err_w, ref_l - err_l
    if config.loser_clip is not None:
        err_l = torch.where(err_l > ref_l + config.loser_clip, (ref_l + config.loser_clip).detach(), err_l)
    h = (ref_w - err_w) - config.loser_weight * (ref_l - err_l)
    if config.variant == "corrected":
        r_w, r_l = {
            "kl": (kl_w, kl_l),
            "signed_kl": (kl_w * gain_w.sign(), kl_l * gain_l.sign()),
            "logratio": (gain_w, gain_l),
        }[config.reward_mode]
        weight = (1 / (1 + (beta * (r_w - r_l)).exp())).detach()
        losses = beta * weight * (err_w - config.loser_weight * err_l)
    elif config.loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif config.loss_type == "hinge":
        losses = torch.where(beta * h < 1, 1 - beta * h, torch.zeros_like(h))
    else:
        s = config.label_smoothing
        losses = -(1 - s) * logsigmoid(beta * h) - s * logsigmoid(-beta * h)
    default = 2 * beta if config.variant == "corrected" else 0
    kl_coef = default if config.kl_coef is None else config.kl_coef
    return losses + kl_coef * (kl_w + kl_l) / 2


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_loss_and_gradient_by_the_papers_formulas(settings, model, make_trainer, moved_policy):
    noise = 0.05 if "loser_clip" in settings else 0.3  # little noise makes some losers worse and some better
    trainer = make_trainer(policy=moved_policy(model, noise), steps_per_pair=3, **settings)
    batch = collected(trainer)
    samples, actions = everything(batch)
    losses, statistics = trainer.loss(batch, samples, actions)
    values = by_hand(trainer, batch, samples, actions)
    expected = expected_losses(trainer.config, BETA, values)
    torch.testing.assert_close(losses, expected, **CLOSE)
    assert_same_gradient(trainer, losses, expected, 1e-7)
    preference = statistics["loss/preference"]
    torch.testing.assert_close(losses.detach() - preference, trainer.kl_coef * statistics["kl_path"], **CLOSE)
    if trainer.config.loser_clip is not None:  # the case is only one if some are clipped and some not
        clipped = T * (values[1][0] - values[1][1]) > trainer.config.loser_clip
        assert clipped.any()
        assert not clipped.all()
    if settings.get("loss_type") == "hinge":
        assert losses.min() == 0 < losses.max()
    assert statistics["kl"].min() > 1e-7


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_with_log_ratios_for_weights_the_corrected_gradient_is_the_originals(beta, make_trainer, make_policy):
    policy = make_policy("tiny_sd", noise=0.3)
    losses = {}
    for name, settings in {
        "original": {},
        "corrected": {"variant": "corrected", "reward_mode": "logratio", "kl_coef": 0},
        "kl": {"variant": "corrected", "kl_coef": 0},
    }.items():
        trainer = make_trainer(policy=policy, beta=beta, **settings)
        batch = collected(trainer)
        losses[name] = trainer.loss(batch, *everything(batch))[0]
    assert_same_gradient(trainer, losses["corrected"], losses["original"], 1e-10)
    with pytest.raises(AssertionError):
        assert_same_gradient(trainer, losses["kl"], losses["original"], 1e-3)


def test_only_what_is_trained_has_a_gradient(make_trainer):
    for settings in ({}, {"lora": None}):
        trainer = make_trainer(**settings)
        batch = collected(trainer)
        losses, statistics = trainer.loss(batch, *everything(batch))
        losses.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainer.trainable.values())
        frozen = trainer.policy._frozen or trainer.policy.network
        assert all(p.grad is None for n, p in frozen.named_parameters() if ".lora_" not in n)
        assert not any(v.requires_grad for v in statistics.values())


# -- Diffusion-DPO's convention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
@pytest.mark.parametrize("timestep_range", [(0.0, 1.0), (0.25, 0.8)])
def test_beta_dpo_is_the_fields(timestep_range, model, make_trainer, make_policy):
    """``-logsigmoid(-0.5 beta_dpo (model_diff - ref_diff))`` of mean squared errors of the output (eps, or v)."""
    policy = make_policy(model, noise=0.3)
    common = {"weighting": "uniform", "timestep_range": timestep_range, "steps_per_pair": 2}
    trainer = make_trainer(policy=policy, beta_dpo=2000, **common)
    batch = collected(trainer)
    samples, actions = everything(batch)
    losses, statistics = trainer.loss(batch, samples, actions)
    errors = []
    for images in (batch.chosen, batch.rejected):
        x_0, eps, _, t, now, reference = outputs(trainer, batch, samples, actions, images)
        truth = eps if model == "tiny_sd" else DDPMScheduler(**BETAS).get_velocity(x_0, eps, t)
        errors.append([(truth - v).square().mean(dim=(1, 2, 3)) for v in (now, reference)])
    (w, w_ref), (l, l_ref) = errors  # noqa: E741
    expected = -logsigmoid(-0.5 * 2000 * ((w - w_ref) - (l - l_ref)))
    torch.testing.assert_close(losses, expected, atol=1e-8, rtol=1e-6)
    assert_same_gradient(trainer, losses, expected, 1e-6)
    torch.testing.assert_close(statistics["rewards/chosen"], 1000 * (w_ref - w).detach(), atol=1e-8, rtol=1e-6)

    first, last = (round(share * T) for share in timestep_range)
    assert trainer.trained_steps.tolist() == list(range(first, last))
    weights = nats_per_squared_error(trainer.schedule)[first:last]
    nats = beta_in_nats(2000, dimensions=DIMENSIONS, weight_sum=weights.sum().item())
    assert trainer.estimate(batch)[2]["beta_nats"] == pytest.approx(nats, rel=1e-9)
    again = make_trainer(policy=policy, beta=nats, **common)
    batch = collected(again)
    others, _ = again.loss(batch, samples, actions)
    torch.testing.assert_close(others, losses, atol=1e-10, rtol=1e-9)
    assert_same_gradient(trainer, others, losses, 1e-9)


# -- steps and noise -----------------------------------------------------------------------------------------------


def asked(trainer, batch, samples, actions, monkeypatch):
    """What the policy's network was shown: x_t, timestep and conditioning of w, and of l."""
    calls, predict = [], trainer.policy.predict

    def watched(x_t, timestep, conditioning, **settings):
        calls.append((x_t, timestep, conditioning, settings))
        return predict(x_t, timestep, conditioning, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.policy, "predict", watched)
        trainer.loss(batch, samples, actions)
    assert len(calls) == 2  # reference and policy, of both images at once
    for first, second in zip(calls[0][:2], calls[1][:2], strict=True):
        assert torch.equal(first, second)
    x_t, timestep, conditioning, settings = calls[1]
    return x_t.chunk(2), timestep.chunk(2), {k: v.chunk(2) for k, v in conditioning.items()}, settings


def test_both_images_share_step_and_noise(make_trainer, monkeypatch):
    trainer = make_trainer(steps_per_pair=3)
    batch = collected(trainer)
    samples, actions = everything(batch)
    x_t, t, conditioning, settings = asked(trainer, batch, samples, actions, monkeypatch)
    assert settings["guidance_scale"] == 1
    assert torch.equal(*t)
    assert torch.equal(*conditioning["encoder_hidden_states"])
    ab = DDPMScheduler(**BETAS).alphas_cumprod.double()[t[0]].view(-1, 1, 1, 1)
    eps = [
        (x - ab.sqrt() * batch.x_0[p[samples]]) / (1 - ab).sqrt() for x, p in zip(x_t, (batch.chosen, batch.rejected))
    ]
    torch.testing.assert_close(eps[0], eps[1], atol=1e-9, rtol=0)
    flat = eps[0].flatten(1)
    assert (flat @ flat.T / DIMENSIONS).triu(1).abs().max() < 0.5  # no two actions share a noise: 8 sigma
    assert flat.mean().abs() < 5 / flat.numel() ** 0.5
    assert flat.var().item() == pytest.approx(1, abs=5 * (2 / flat.numel()) ** 0.5)


def test_guidance_has_no_part_in_the_noising_process(make_trainer, monkeypatch):
    trainer = make_trainer(sampler={"steps": 4, "guidance_scale": 3.0})
    batch = collected(trainer)
    *_, settings = asked(trainer, batch, *everything(batch), monkeypatch)
    assert settings["guidance_scale"] == 1
    values = by_hand(trainer, batch, *everything(batch))  # without guidance
    expected = expected_losses(trainer.config, BETA, values)
    torch.testing.assert_close(trainer.loss(batch, *everything(batch))[0], expected, **CLOSE)


def test_pairs_epochs_and_seeds_have_steps_and_noises_of_their_own(make_trainer, make_policy):
    policy = make_policy("tiny_sd")
    seen = []
    for seed in (0, 1):
        trainer = make_trainer(policy=policy, seed=seed, steps_per_pair=2)
        for trainer.epoch in (0, 1):
            batch, _ = trainer.collect()
            again, _ = trainer.collect()
            assert torch.equal(batch.noise, again.noise)
            assert torch.equal(batch.steps, again.steps)
            seen.append(batch)
    noises = torch.cat([b.noise.flatten(0, 2).flatten(1) for b in seen])
    assert len(noises) == 2 * 2 * 4 * 2
    assert (noises @ noises.T / DIMENSIONS).triu(1).abs().max() < 0.5
    assert len({tuple(row) for b in seen for row in b.steps.tolist()}) == 16


def test_each_pairs_steps_do_not_depend_on_the_others(make_trainer, make_policy):
    """Sample i of an epoch of 8 is sample i of an epoch of 4."""
    policy = make_policy("tiny_sd")
    short, long = (make_trainer(policy=policy, samples_per_epoch=n).collect()[0] for n in (4, 8))
    assert torch.equal(short.noise, long.noise[:, :4])
    assert torch.equal(short.steps, long.steps[:4])
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(
            short.x_0[getattr(short, side)], long.x_0[getattr(long, side)[:4]], atol=1e-6, rtol=0
        )


def test_steps_fall_one_into_each_part_evenly(make_trainer):
    """Chi-square of 10 bins in each of 4 parts, n = 4000: 15 % more in half of the bins would be found with p > .99."""
    trainer = make_trainer(steps_per_pair=4, timestep_range=(0.2, 0.9), samples_per_epoch=4000)
    first, count = 200, 699
    assert trainer.trained_steps.tolist() == list(range(first, first + count))
    steps = torch.stack([trainer._sampled_steps(i) for i in range(4000)]).double()
    places = (steps - first) / count
    for part in range(4):
        inside = 4 * places[:, part] - part
        assert inside.min() >= -4 / count
        assert inside.max() < 1
        counts = torch.histc(inside, 10, 0, 1)
        assert ((counts - 400) ** 2 / 400).sum() < 33.7  # p = 1e-4 with 9 degrees of freedom
    correlations = torch.corrcoef((places % 0.25).T).triu(1).abs()
    assert correlations.max() < 5 / 4000**0.5


def test_the_draw_changes_how_often_a_step_is_trained_on_and_not_its_loss(make_trainer, make_policy):
    """Metrics of the KL stand for all steps alike: in expectation they do not depend on the draw."""
    policy = make_policy("tiny_sd", noise=0.3)
    trainers = {draw: make_trainer(policy=policy, step_draw=draw, kl_coef=0.03) for draw in ("uniform", "logit_normal")}
    batches = {draw: collected(trainer) for draw, trainer in trainers.items()}
    assert not torch.equal(batches["uniform"].steps, batches["logit_normal"].steps)
    likely = trainers["logit_normal"].probabilities
    for steps in (batches["uniform"].steps, batches["logit_normal"].steps):
        found = {}
        for draw, trainer in trainers.items():
            batch = replace(batches[draw], steps=steps)
            found[draw] = trainer.loss(batch, *everything(batch))
        assert torch.equal(found["uniform"][0], found["logit_normal"][0])
        for name, values in found["uniform"][1].items():
            other = found["logit_normal"][1][name]
            if name.partition("_")[0] != "kl":
                assert torch.equal(values, other), name
        shown = likely[steps[everything(batch)]]
        for name, even in (("kl", 1 / T), ("kl_path", 1.0)):
            plain = (found["uniform"][1]["kl/winner"] + found["uniform"][1]["kl/loser"]) / 2
            torch.testing.assert_close(found["logit_normal"][1][name], even * plain / shown, atol=1e-9, rtol=1e-6)


def test_timestep_range_cuts_the_draw(make_trainer, make_policy):
    trainer = make_trainer(policy=make_policy("tiny_sd"), timestep_range=(0.5, 1.0), step_draw="logit_normal")
    steps = torch.stack([trainer._sampled_steps(i) for i in range(400)]).double()
    assert steps.min() >= 500
    half = 1000 / (1 + math.exp(-0.6744898))  # of a half-normal
    assert ((steps < half).double().mean() - 0.5).abs() < 5 * 0.5 / 400**0.5


def test_timestep_range_goes_from_noise_to_image(make_trainer, make_policy):
    policy = make_policy("tiny_sd")
    for timestep_range, first, last in (((0.0, 0.5), 0, 500), ((0.5, 1.0), 500, 999), ((0.0, 1.0), 0, 999)):
        trainer = make_trainer(policy=policy, timestep_range=timestep_range, samples_per_epoch=64)
        steps = torch.stack([trainer._sampled_steps(i) for i in range(64)])
        assert first <= steps.min() < first + 40
        assert last - 40 <= steps.max() < last
        scales = trainer.terms(policy.latent_shape).scales
        assert scales[first:last].tolist() == [last - first] * (last - first)
        assert scales.count_nonzero() == last - first


def test_too_narrow_a_range_is_refused(make_trainer, make_policy):
    policy = make_policy("tiny_sd")
    make_trainer(policy=policy, timestep_range=(0.5, 0.502), steps_per_pair=1)
    with pytest.raises(ConfigError, match=problem("timestep_range=[0.5, 0.502]", "fewer than steps_per_pair=2")):
        make_trainer(policy=policy, timestep_range=(0.5, 0.502), steps_per_pair=2)


def test_captions_are_dropped_from_both_images(make_trainer, monkeypatch):
    """n = 400, p = .3: a frequency between .2 and .4 is 4.4 sigma wide."""
    trainer = make_trainer(caption_dropout=0.3, samples_per_epoch=400, sample_batch_size=8)
    batch = collected(trainer)
    empty = trainer.policy.encode([""])["encoder_hidden_states"]
    rows = batch.conditioning["encoder_hidden_states"]
    dropped = (rows == empty).flatten(1).all(1)
    assert 80 < dropped.sum() < 160
    plain, _ = make_trainer(policy=trainer.policy, samples_per_epoch=400, sample_batch_size=8).collect()
    texts = plain.conditioning["encoder_hidden_states"]
    assert not (texts == empty).flatten(1).all(1).any()
    assert torch.equal(rows[~dropped], texts[~dropped])
    some = torch.cat([dropped.nonzero()[:3, 0], (~dropped).nonzero()[:3, 0]])
    _, _, conditioning, _ = asked(trainer, batch, some, torch.zeros_like(some), monkeypatch)
    for shown in conditioning["encoder_hidden_states"]:
        assert torch.equal(shown[:3], empty.expand(3, -1, -1))
        assert torch.equal(shown[3:], rows[some[3:]])
    trainer.epoch = 1
    other, _ = trainer.collect()
    assert not torch.equal((other.conditioning["encoder_hidden_states"] == empty).flatten(1).all(1), dropped)


def test_posterior_sample_has_the_posteriors_mean_and_std(make_trainer):
    trainer = make_trainer(target="posterior_sample", samples_per_epoch=16, steps_per_pair=4)
    batch = collected(trainer)
    samples, actions = everything(batch)
    target = trainer._transitions(batch, samples, actions).target
    steps, eps = batch.steps[samples, actions], batch.noise[0, samples, actions]
    draws = []
    for x_s, std, images in zip(target.mean.chunk(2), target.std.chunk(2), (batch.chosen, batch.rejected)):
        x_0 = batch.x_0[images[samples]]
        mean = posterior(add_noise(x_0, eps, steps, trainer.schedule), x_0, eps, steps, trainer.schedule)
        torch.testing.assert_close(std, mean.std, atol=0, rtol=1e-12)
        draws.append((x_s - mean.mean) / mean.std.view(-1, 1, 1, 1))
    torch.testing.assert_close(draws[0], draws[1], atol=1e-6, rtol=0)
    draws, eps = draws[0].flatten(), eps.flatten()
    n = draws.numel()
    assert n == 64 * DIMENSIONS
    assert draws.mean().abs() < 5 / n**0.5
    assert draws.var().item() == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
    assert (draws * eps).mean().abs() < 5 / n**0.5


def test_epochs_go_through_all_pairs_and_their_images_are_read(make_trainer):
    pairs = Pairs(6, ties=2, skipped=3)
    trainer = make_trainer(pairs=pairs)
    latents = trainer.policy.encode_images(pairs.pixels.flatten(0, 1)).unflatten(0, (2, 6))
    seen = []
    for trainer.epoch in range(3):
        batch, metrics = trainer.collect()
        chosen, rejected = batch.x_0[batch.chosen], batch.x_0[batch.rejected]
        for i in range(4):
            distance = (latents[0] - chosen[i]).flatten(1).norm(dim=1)
            pair = int(distance.argmin())
            assert distance[pair] < 1e-5
            torch.testing.assert_close(rejected[i], latents[1, pair], atol=1e-5, rtol=0)
            text = trainer.policy.encode([pairs.prompts[pair]])["encoder_hidden_states"][0]
            assert torch.equal(batch.conditioning["encoder_hidden_states"][i], text)
            seen.append(pair)
        assert metrics == {
            "data_epochs": pytest.approx((trainer.epoch + 1) * 4 / 6),
            "pairs": 6,
            "pairs_tied": 2,
            "pairs_skipped": 3,
        }
        batch, plan, _ = trainer.estimate(batch)
        assert plan.sample_indices.tolist() == [0, 1, 2, 3]
        assert batch.reference_mean is None  # asked as one pass goes
        assert batch.implicit_reward is None
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


# -- judged online -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("target", ["posterior_mean", "logged"])
def test_the_best_and_the_worst_are_the_pair(target, sign, make_trainer):
    trainer = make_trainer(
        reward=lambda *a: sign * redness(*a), samples_per_epoch=12, group_size=4, steps_per_pair=2, target=target
    )
    batch, metrics = trainer.collect()
    batch, (keep, actions, _), _ = trainer.estimate(batch)
    assert actions == 2
    assert len(keep) == 3
    seen = (trainer.policy.decode(batch.x_0) * 255).round() / 255  # as rewards see images
    scores = redness(seen, None, None).view(3, 4)
    best, worst = (scores.argmax(1), scores.argmin(1)) if sign > 0 else (scores.argmin(1), scores.argmax(1))
    first = torch.tensor([0, 4, 8])
    assert keep.tolist() == (first + best).tolist()
    assert batch.chosen[keep].tolist() == (first + best).tolist()
    assert batch.rejected[keep].tolist() == (first + worst).tolist()
    gaps = (scores.max(1).values - scores.min(1).values).mean().item()
    assert metrics["reward_gap"] == pytest.approx(gaps, rel=1e-3)
    assert metrics["reward"] == pytest.approx(sign * scores.mean().item(), abs=1e-5)
    assert metrics["frac_reward_zero_std"] == 0
    assert (batch.noise is None) == (target == "logged")
    if target == "posterior_mean":
        assert batch.path is None


def test_ties_are_left_out_and_counted(make_trainer, streams):
    """Values by image, 3 prompts of 4; the judge is asked in batches of 4 and sees prompt and metadata."""
    values = iter([[0.5, 2.0, -1.0, 2.0], [3.0] * 4, [0.0, 0.0, 0.0, 1e-3]])
    calls = []

    def judge(images, prompts, metadata):
        calls.append((prompts, metadata))
        return next(values)

    prompts = [(p, {"number": i}) for i, p in enumerate(PROMPTS[:3])]
    trainer = make_trainer(reward=judge, prompts=prompts, samples_per_epoch=12, group_size=4)
    batch, metrics = trainer.collect()
    assert batch.keep.tolist() == [1, 11]
    assert batch.rejected[[1, 11]].tolist() == [2, 8]
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert metrics["reward_gap"] == pytest.approx((3 + 0 + 1e-3) / 3)
    assert sorted(p[0] for p, _ in calls) == sorted(PROMPTS[:3])
    for (texts, metadata), rows in zip(calls, batch.conditioning["encoder_hidden_states"].split(4), strict=True):
        assert len(set(texts)) == 1
        assert metadata == [{"number": PROMPTS.index(texts[0])}] * 4
        assert torch.equal(rows, trainer.policy.encode(texts)["encoder_hidden_states"])


def test_winners_are_global_and_losers_this_processs_own(make_trainer, monkeypatch):
    """The second of two processes: it draws samples 4 to 7 of 8, and all rewards are gathered."""
    trainer = make_trainer(reward=redness, samples_per_epoch=8, group_size=4)
    trainer.local_samples = range(4, 8)
    others = torch.tensor([[0.0], [9.0], [1.0], [-9.0]])
    gather = BatchScores.gather
    with monkeypatch.context() as patch:
        patch.setattr(BatchScores, "gather", lambda *arguments: torch.cat([others, gather(*arguments)]))
        batch, metrics = trainer.collect()
    scores = redness(trainer.policy.decode(batch.x_0), None, None)
    assert batch.keep.tolist() == [1, 4 + int(scores.argmax())]
    assert batch.chosen.tolist() == [0, 1, 2, 3]
    assert batch.rejected[scores.argmax()] == scores.argmin()
    assert len(batch.x_0) == len(batch.steps) == 4
    assert metrics["frac_reward_zero_std"] == 0
    alone = make_trainer(policy=trainer.policy, reward=redness, samples_per_epoch=8, group_size=4)
    whole, _ = alone.collect()
    assert torch.equal(batch.steps, whole.steps[4:])
    assert torch.equal(batch.noise, whole.noise[:, 4:])
    torch.testing.assert_close(batch.x_0, whole.x_0[4:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("settings", [{"inner_epochs": 2}, {"variant": "corrected", "old_refresh": "epoch"}])
def test_an_epoch_of_ties_trains_on_nothing(settings, model, make_trainer, monkeypatch):
    trainer = make_trainer(model, reward=lambda images, *_: [1.0] * len(images), **SHORT, **settings)
    monkeypatch.setattr(trainer, "finish", lambda: None)
    before = [p.detach().clone() for p in trainer.trainable.values()]
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.trainable.values(), before, strict=True))
    rows = rows_of(trainer.folder)
    assert [row["samples_used"] for row in rows] == [0, 0]
    assert [row["frac_reward_zero_std"] for row in rows] == [1.0, 1.0]


@pytest.mark.parametrize("sampler", [{"name": "ddim", "eta": 1.0}, {"name": "ddim", "eta": 0.4}, {"name": "ddpm"}])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_logged_log_ratios_are_those_of_the_sampler(guidance, sampler, make_trainer):
    """err_ref - err = log p_theta(x_s) - log p_ref(x_s) of the sampled step; Diffusion-DPO's beta counts them."""
    trainer = make_trainer(
        reward=redness,
        target="logged",
        beta_dpo=2000,
        sampler={"steps": 6, "guidance_scale": guidance} | sampler,
        steps_per_pair=3,
        samples_per_epoch=8,
        sample_batch_size=8,
    )
    policy, schedule = trainer.policy, trainer.schedule
    assert len(schedule) == 6
    batch, _ = trainer.collect()
    samples = batch.keep.repeat_interleave(3)
    actions = torch.arange(3).repeat(len(batch.keep))
    seen = trainer._transitions(batch, samples, actions)
    logps, twice = [], torch.cat([batch.chosen[samples], batch.rejected[samples]])
    steps = batch.steps[samples, actions].repeat(2)
    recorded = batch.path.at(twice, actions.repeat(2))
    assert torch.equal(recorded[2], steps)  # the pair was recorded at one step
    for reference in (False, True):
        with torch.no_grad(), policy.reference() if reference else contextlib.nullcontext():
            logps.append(replay(policy, schedule, *recorded, reduction="sum")[0])
    scales = trainer.terms(policy.latent_shape).scales[steps]
    count = len(trainer.trained_steps)
    weights = nats_per_squared_error(schedule)[trainer.trained_steps]
    torch.testing.assert_close(scales, torch.full_like(scales, count))
    assert trainer.beta == pytest.approx(2000 / (2 * DIMENSIONS * weights.sum().item()), rel=1e-5)
    found = (seen.reference_error - seen.error).detach() / scales
    torch.testing.assert_close(found, logps[0] - logps[1], atol=5e-3, rtol=1e-3)
    assert found.abs().max() > 0.1

    nats = (seen.error / scales).detach()  # the policy is the sampler's: half a chi-square of d
    assert nats.mean().item() == pytest.approx(DIMENSIONS / 2, abs=5 * math.sqrt(DIMENSIONS / 2 / len(nats)))
    _, statistics = trainer.loss(batch, samples, actions)
    torch.testing.assert_close(statistics["rewards/chosen"], trainer.beta * scales.chunk(2)[0] * found.chunk(2)[0])


# -- caches and micro-batches --------------------------------------------------------------------------------------

SOURCES = {
    "pairs": {},
    "drawn": {"target": "posterior_sample"},
    "online": {"reward": redness, "group_size": 2},
    "logged": {"reward": redness, "group_size": 2, "target": "logged", "sampler": {"steps": 5, "guidance_scale": 2.0}},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_kept_reference_gives_the_same_losses(source, make_trainer):
    trainer = make_trainer(inner_epochs=2, steps_per_pair=2, variant="corrected", kl_coef=0.1, **source)
    batch, _ = trainer.collect()
    batch, (keep, actions, _), _ = trainer.estimate(batch)
    assert batch.reference_mean is not None
    assert batch.implicit_reward is None
    samples, actions = torch.cartesian_prod(keep, torch.arange(actions)).unbind(1)
    kept, with_cache = trainer.loss(batch, samples, actions)
    batch = replace(batch, reference_mean=None)
    fresh, without = trainer.loss(batch, samples, actions)
    torch.testing.assert_close(kept, fresh, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(with_cache["kl"], without["kl"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(with_cache["rewards/margins"], without["rewards/margins"], atol=1e-3, rtol=1e-3)
    assert without["kl"].min() > 1e-4


@pytest.mark.parametrize("reward_mode", ["kl", "signed_kl", "logratio"])
def test_old_refresh(reward_mode, make_trainer, make_policy):
    """With epoch the weight stays that of the epoch's beginning while the policy moves; with update it follows."""
    policy = make_policy("tiny_sd", noise=0.3)
    common = {"policy": policy, "variant": "corrected", "reward_mode": reward_mode, "steps_per_pair": 2}
    trainers = {old: make_trainer(**common, old_refresh=old) for old in ("epoch", "update")}
    batches, weights = {}, {}
    for old, trainer in trainers.items():
        batches[old], *_ = trainer.estimate(collected(trainer))
    everyone = everything(batches["epoch"])
    start = [[T * v.detach() for v in side] for side in by_hand(trainer, batches["epoch"], *everyone)]
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved = [[T * v.detach() for v in side] for side in by_hand(trainer, batches["epoch"], *everyone)]
    for old, trainer in trainers.items():
        _, statistics = trainer.loss(batches[old], *everyone)
        weights[old] = statistics["weight"]

    def weight(values):
        rewards = []
        for err, ref, kl in values:
            gain = ref - err
            rewards.append({"kl": kl, "signed_kl": kl * gain.sign(), "logratio": gain}[reward_mode])
        return torch.sigmoid(BETA * (rewards[1] - rewards[0]))

    torch.testing.assert_close(weights["epoch"], weight(start), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights["update"], weight(moved), atol=1e-6, rtol=1e-6)
    assert (weights["epoch"] - weights["update"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "dropout"),
    [
        ({}, 0),
        ({"variant": "corrected", "inner_epochs": 2, "old_refresh": "epoch"}, 0),
        ({"variant": "corrected"}, 0.3),
    ],
)
def test_gradients_do_not_depend_on_micro_batches(settings, dropout, make_trainer, make_policy):
    policy = make_policy("tiny_sd", noise=0.3, lora=LoRAConfig(rank=4, dropout=dropout))
    found = []
    for size in (1, 3, 100):
        trainer = make_trainer(policy=policy, micro_batch_size=size, steps_per_pair=2, kl_coef=0.02, **settings)
        batch = collected(trainer)
        batch, *_ = trainer.estimate(batch)
        pairs = torch.stack(everything(batch), dim=1)
        statistics = trainer.accumulate(batch, pairs, len(pairs)).over_processes(trainer.accelerator)
        flat = torch.cat([p.grad.flatten() for p in trainer.trainable.values()])
        policy.network.zero_grad()
        found.append((flat, statistics))
    for flat, statistics in found[1:]:
        assert (flat - found[0][0]).norm() < 1e-6 * flat.norm()
        for name, value in statistics.items():
            assert value == pytest.approx(found[0][1][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("variant", ["original", "corrected"])
def test_the_images_of_a_pair_lose_the_same_and_pairs_different_parts(variant, make_trainer, make_policy):
    """One policy sees both, so that equal images have no preference and no gradient."""
    policy = make_policy("tiny_sd", noise=0.3, lora=LoRAConfig(rank=4, dropout=0.5))
    trainer = make_trainer(policy=policy, micro_batch_size=4, variant=variant, kl_coef=0)
    batch = collected(trainer)
    batch = replace(batch, x_0=batch.x_0[batch.chosen].repeat(2, 1, 1, 1))
    masks = []
    for layer in lora_layers(policy.network).values():
        layer.lora_dropout["default"].register_forward_hook(lambda _, given, found: masks.append((given[0], found)))
    statistics = trainer.accumulate(batch, torch.stack(everything(batch), dim=1), 4)
    assert len(masks) >= len(lora_layers(policy.network))
    for given, found in masks:
        kept = ((found == 0) & (given != 0)).flatten(1)
        assert torch.equal(kept[:4], kept[4:])
        assert not torch.equal(kept[0], kept[1])
    margins = statistics.over_processes(trainer.accelerator)["rewards/margins"]
    assert margins == pytest.approx(0, abs=1e-6)
    gradients = torch.cat([p.grad.flatten() for p in trainer.trainable.values()])
    assert gradients.abs().max() < 1e-6


# -- metrics and the guard -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["original", "corrected"])
def test_metrics_by_hand(variant, make_trainer):
    trainer = make_trainer(steps_per_pair=3, variant=variant, timestep_range=(0.0, 0.5), loser_clip=0.001)
    batch = collected(trainer)
    samples, actions = everything(batch)
    _, found = trainer.loss(batch, samples, actions)
    (err_w, ref_w, kl_w), (err_l, ref_l, kl_l) = (
        [v.detach() for v in side] for side in by_hand(trainer, batch, samples, actions)
    )
    count, beta = 500, BETA  # half of the steps are trained
    assert len(trainer.trained_steps) == count
    gain_w, gain_l = count * (ref_w - err_w), count * (ref_l - err_l)
    weight = beta * count * (kl_l - kl_w) if variant == "corrected" else beta * (gain_l - gain_w)
    expected = {
        "rewards/chosen": beta * gain_w,
        "rewards/rejected": beta * gain_l,
        "rewards/margins": beta * (gain_w - gain_l),
        "rewards/accuracies": (gain_w > gain_l).float(),
        "error/winner": -gain_w,
        "error/loser": -gain_l,
        "error/reference": count * ref_w,
        "kl/winner": kl_w,
        "kl/loser": kl_l,
        "kl": (kl_w + kl_l) / 2,
        "kl_path": count * (kl_w + kl_l) / 2,
        "kl_path_stderr": count * (kl_w + kl_l) / 2,
        "weight": torch.sigmoid(weight),
    }
    assert set(found) == {*expected, "loss/preference"}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-8, rtol=1e-6, check_dtype=False)
    assert 0 < found["rewards/accuracies"].mean() < 1


@pytest.mark.parametrize(
    ("variant", "remedy"), [("original", "lower learning_rate"), ("corrected", "raise kl_coef (2 beta or more)")]
)
def test_the_guard(variant, remedy, make_trainer):
    trainer = make_trainer(variant=variant, max_winner_error=1.5)
    for winner, ratio in ((0.0, 1.0), (-30.0, 0.7), (49.0, 1.49)):
        found = trainer.check_update({"error/winner": winner, "error/reference": 100.0}, first=False)
        assert found == {"error/winner_ratio": pytest.approx(ratio)}
    with pytest.raises(
        TrainingError, match=rf"1\.51 times .* experimental\.max_winner_error=1\.5,.*{re.escape(remedy)}$"
    ):
        trainer.check_update({"error/winner": 51.0, "error/reference": 100.0}, first=True)


def test_a_run_starts_at_ln_2_and_logs_what_it_should(make_trainer, monkeypatch):
    trainer = make_trainer(noise=0, **SHORT, show_prompts=["a cat"])
    monkeypatch.setattr(trainer, "finish", lambda: None)
    trainer.train()
    updates = [row for row in rows_of(trainer.folder) if "loss" in row]
    assert updates[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert updates[0]["rewards/accuracies"] == 0.5
    assert updates[0]["error/winner_ratio"] == 1
    assert updates[0]["weight"] == 0.5
    assert updates[-1]["kl"] > 0
    epochs = [row for row in rows_of(trainer.folder) if "beta_nats" in row]
    assert [row["beta_nats"] for row in epochs] == [BETA, BETA]
    assert [row["samples_used"] for row in epochs] == [4, 4]
    assert [row["data_epochs"] for row in epochs] == pytest.approx([4 / 6, 8 / 6])


def test_a_diverging_run_stops_before_the_step(make_trainer):
    settings = {"samples_per_epoch": 8, "steps_per_pair": 2, "updates_per_epoch": 1, "max_winner_error": 1.0001}
    trainer = make_trainer(noise=0.05, **SHORT, **settings)  # a policy that is off, and a little worse
    with torch.no_grad():
        for name, parameter in trainer.trainable.items():
            parameter.mul_(-1 if ".lora_B" in name else 1)
    before = [p.detach().clone() for p in trainer.trainable.values()]
    with pytest.raises(TrainingError, match="diverges: its error on the chosen images"):
        trainer.train()
    assert (trainer.epoch, trainer.step) == (0, 1)
    assert all(torch.equal(p, q) for p, q in zip(trainer.trainable.values(), before, strict=True))


# -- latents -------------------------------------------------------------------------------------------------------


MEASURED = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.5, 2.0, 0.9]}


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("config", [{}, {"shift_factor": 0.25}, MEASURED, MEASURED | {"shift_factor": -0.5}])
def test_images_are_encoded_as_they_are_decoded(config, model, make_policy, monkeypatch):
    policy = make_policy(model)
    vae = policy.pipeline.vae
    vae.register_to_config(**config)
    images = Pairs(2).pixels[0]
    latents = policy.encode_images(images)
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        raw = vae.encode(2 * images - 1).latent_dist.mode()
    mean = torch.tensor(config.get("latents_mean", [0.0] * 4)).view(1, 4, 1, 1) + config.get("shift_factor", 0.0)
    std = torch.tensor(config.get("latents_std", [1.0] * 4)).view(1, 4, 1, 1)
    torch.testing.assert_close(latents, (raw - mean) / std * vae.config.scaling_factor, atol=1e-6, rtol=1e-6)

    given = []

    def watched(latents, **_):
        given.append(latents)
        return (2 * images - 1,)

    monkeypatch.setattr(vae, "decode", watched)
    torch.testing.assert_close(policy.decode(latents), images)
    torch.testing.assert_close(given[0], raw, atol=1e-5, rtol=1e-5)


def test_latents_are_kept_in_files_of_256_pairs_and_made_once(make_trainer, monkeypatch):
    pairs = Pairs(520)
    trainer = make_trainer(pairs=pairs, samples_per_epoch=120, sample_batch_size=60)
    cache, folder = trainer.latents, trainer.folder / "latents"
    assert cache.folder == folder
    calls, encode = [], trainer.policy.encode_images

    def watched(images):
        calls.append(len(images))
        return encode(images)

    def fill(one):
        one.fill({}, batch_size=60, processes=trainer.processes, bars=trainer.bars)

    rounds = iter([None, None, Interrupted("stop")])

    def stop(**_):
        outcome = next(rounds)
        if outcome:
            raise outcome

    with monkeypatch.context() as patch:
        patch.setattr(trainer.policy, "encode_images", watched)
        patch.setattr(trainer.processes, "stop_if_interrupted", stop)
        with pytest.raises(Interrupted):
            fill(cache)
        assert sorted(p.name for p in folder.iterdir()) == ["00000.safetensors", "00001.safetensors"]
        assert calls == [120] * 4 + [32] + [120] * 4 + [32]
        (folder / "00000.safetensors").unlink()
        written = (folder / "00001.safetensors").stat().st_mtime_ns
        patch.setattr(trainer.processes, "stop_if_interrupted", lambda **_: False)
        calls.clear()
        fill(cache)
        assert calls == [120] * 4 + [32] + [16]  # the file that was there is not made again
        assert (folder / "00001.safetensors").stat().st_mtime_ns == written
        calls.clear()
        fill(cache)
        fill(LatentCache(folder, pairs, trainer.policy))
        assert calls == []
    assert sorted(p.name for p in folder.iterdir()) == [f"0000{i}.safetensors" for i in range(3)]
    rows = [519, 0, 256, 255, 300, 0, 512]
    expected = trainer.policy.encode_images(pairs.pixels[:, rows].flatten(0, 1)).unflatten(0, (2, 7))
    for side, latents in zip(cache.read(rows), expected, strict=True):
        torch.testing.assert_close(torch.stack(side), latents, atol=1e-5, rtol=0)
    again = LatentCache(folder, pairs, SimpleNamespace(image_size=(16, 16))).read(rows[::-1])  # needs no model
    for side, latents in zip(again, expected.flip(1), strict=True):
        torch.testing.assert_close(torch.stack(side), latents, atol=1e-5, rtol=0)


# -- settings ------------------------------------------------------------------------------------------------------

OFFLINE = {"model": "emoji-sd", "output_dir": "run", "pairs": "emoji_style", "beta": 0.1}
ONLINE = {"model": "emoji-sd", "output_dir": "run", "prompts": ["a"], "reward": redness, "beta": 0.1}
WRONG = {
    "offline": [
        *({"beta": None}, {"beta": math.nan}, {"beta_dpo": 2000}, {"prompts": ["a"]}, {"target": "logged"}),
        *({"timestep_range": span} for span in ([0.5, 0.5], [-0.1, 0.5], [0.0, 1.1])),
        *({"variant": "corrected", name: value} for name, value in (("loss_type", "ipo"), ("label_smoothing", 0.1))),
        *({"loss_type": "hinge", "label_smoothing": 0.1}, {"reward_mode": "logratio"}, {"old_refresh": "epoch"}),
        {"show_prompts": []},
        *({"step_draw": draw} for draw in ("lognormal", "logit-normal", 1, None)),
        {"step_draw": "logit_normal", "stop_when": {"kl_above": 1.0}},
        {"sampler": {"noisy_steps": 2}},
    ],
    "online": [
        *({"reward": None}, {"prompts": None}, {"group_size": 3}),
        *({"target": "logged"} | more for more in ({"sampler": {"eta": 0.0}}, {"caption_dropout": 0.1})),
        {"sampler": {"noisy_steps": 2}},
    ],
}


@pytest.mark.parametrize(("base", "settings"), [(base, one) for base, cases in WRONG.items() for one in cases])
def test_settings_that_do_not_fit(base, settings, golden):
    with pytest.raises(ConfigError) as caught:
        parse_config(DiffusionDPOConfig, {"offline": OFFLINE, "online": ONLINE}[base] | settings)
    golden(f"{base} {settings}", caught.value.problems)


@pytest.mark.parametrize(
    "raw",
    [
        OFFLINE,
        ONLINE,
        OFFLINE | {"beta": None, "beta_dpo": 5000},
        OFFLINE | {"group_size": 7, "reward": redness},
        OFFLINE | {"step_draw": "logit_normal"},
        OFFLINE | {"step_draw": "uniform", "stop_when": {"kl_above": 1.0}},
        ONLINE | {"target": "logged", "sampler": {"name": "ddpm", "eta": 0.0}},
        OFFLINE | {"variant": "corrected", "reward_mode": "logratio", "old_refresh": "epoch"},
        OFFLINE | {"pairs": {"source": "emoji_style", "split": "heldout"}},
    ],
)
def test_settings_that_fit(raw):
    config = parse_config(DiffusionDPOConfig, raw)
    assert config.online == ("pairs" not in raw)
    if not config.online:
        assert config.pairs.source == "emoji_style"


def test_corrected_charges_twice_beta_unless_told_otherwise(make_trainer, make_policy):
    policy = make_policy("tiny_sd")
    for settings, kl_coef in (
        ({}, 0.0),
        ({"kl_coef": 0.5}, 0.5),
        ({"variant": "corrected"}, 2 * BETA),
        ({"variant": "corrected", "kl_coef": 0.0}, 0.0),
    ):
        assert make_trainer(policy=policy, **settings).kl_coef == pytest.approx(kl_coef)


def test_groups_must_not_be_split_between_processes(make_policy, tmp_path):
    from accelerate import Accelerator

    config = DiffusionDPOConfig(**ONLINE | {"output_dir": tmp_path, "samples_per_epoch": 12, "sample_batch_size": 6})
    accelerator = Accelerator()
    two = SimpleNamespace(
        num_processes=2, process_index=0, is_main_process=True, device=accelerator.device, mixed_precision="no"
    )
    with pytest.raises(ConfigError, match=problem("samples_per_epoch=12", "2 processes x group_size=4")):
        DiffusionDPOTrainer(config, make_policy("tiny_sd"), reward=redness, prompts=[("a", {})], accelerator=two)
