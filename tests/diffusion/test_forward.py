"""Forward-process training: losses and gradients in closed form, the KL in nats, draws, the old policy, passes."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusion_align.diffusion.forward import ForwardTrainer, consistency_warning, probes_of
from diffusion_align.diffusion.forward_settings import ForwardConfig
from diffusion_align.diffusion.schedule import training_schedule
from diffusion_align.diffusion.transitions import (
    add_noise,
    nats_per_squared_error,
    network_target,
    predicted_x_0_and_eps,
)
from diffusion_align.errors import Interrupted
from diffusion_align.models.families.flow_matching import set_linear_timesteps
from tests.helpers.linear_policy import BETAS, KINDS, LinearPolicy, in_float64

F64 = torch.float64
GROUP, K = 3, 2
OBJECTIVES = {
    "nft": {"objective": "nft"},
    "nft, beta": {"objective": "nft", "beta": 0.2},
    "awm": {"objective": "awm", "clip_range_nats": 50.0},
    "dgpo": {"objective": "dgpo", "beta": 0.02},
    "crd": {"objective": "crd", "beta": 0.3},
}


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def make_trainer(tmp_path):
    """``make_trainer(kind="flow", policy=None, **settings)``: two prompts of three images each per epoch."""

    def make(kind="flow", policy=None, **settings):
        known = {"model": "emoji-flow" if kind == "flow" else "emoji-sd", "output_dir": tmp_path / "run"}
        known |= {"prompts": ["a cat", "moon"], "reward": brightness, "sampler": {"steps": 4}, "advantages": "group"}
        known |= {"group_size": GROUP, "samples_per_epoch": 6, "sample_batch_size": 3, "micro_batch_size": 6}
        config = ForwardConfig(**(known | {"steps_per_image": K, "mixed_precision": "no"} | settings))
        config.output_dir.mkdir(exist_ok=True)
        prompts = [(text, {}) for text in config.prompts.source]
        return ForwardTrainer(config, policy or LinearPolicy(kind), brightness, prompts)

    return make


def epoch_of(trainer):
    """The batch and plan of an epoch."""
    collected, _ = trainer.collect()
    return trainer.estimate(collected)[:2]


def exact_batch(trainer):
    """An epoch's in float64, at images of a size of 1, with advantages centred in their groups."""
    batch = in_float64(trainer, epoch_of(trainer)[0])
    stream = torch.Generator().manual_seed(3)
    advantages = torch.randn(2, GROUP, generator=stream, dtype=F64)
    advantages = (advantages - advantages.mean(1, keepdim=True)).flatten()
    return replace(batch, x_0=torch.randn(batch.x_0.shape, generator=stream, dtype=F64), advantages=advantages)


def losses_of(trainer, batch):
    """Losses and statistics of all units and draws, in the order of ``whole``, and the gradient of their sum."""
    members = trainer.config.members
    units = torch.arange(0, len(batch.x_0), members)
    indices = torch.cartesian_prod(units, torch.arange(batch.steps.shape[1]))
    for parameter in trainer.policy.trainable.values():
        parameter.grad = None
    losses, statistics = [], []
    for part, some in trainer.micro_batches(batch, indices):
        found, seen = trainer.loss(part, *some.unbind(1))
        found.sum().backward()
        losses.append(found.detach())
        statistics.append(seen)
    gradient = torch.cat([trainer.policy.network[name].grad for name in "ABC"], dim=1)
    joined = {name: torch.cat([one[name] for one in statistics]) for name in statistics[0]}
    return torch.cat(losses), joined, gradient.clone()


def features_and_targets(trainer, batch):
    """(n, K, 2 C + TEXT, pixels) and (n, K, C, pixels): the network is W f, and should be the target."""
    schedule, kind = trainer.exact_schedule, trainer.schedule.prediction_type
    table = schedule.table
    alpha, sigma = (column[batch.steps][..., None, None, None] for column in (table.alpha_t, table.sigma_t))
    x_0, eps = batch.x_0[:, None], batch.noise[batch.groups]
    x_t = (alpha * x_0 + sigma * eps).flatten(3)
    u = (schedule.table.timestep[batch.steps].double() / 1000)[..., None, None]
    text = batch.conditioning["text"].double()[:, None, :, None].expand(*x_t.shape[:2], -1, x_t.shape[3])
    target = {"flow": eps - x_0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x_0}[kind]
    return torch.cat([x_t, u * x_t, text], dim=2), target.flatten(3)


def closed_form(trainer, batch, w, w_old):
    """Losses (n, K) before the mean over a group, their sum's gradient and the errors (n, K), by hand."""
    config = trainer.config
    features, target = features_and_targets(trainer, batch)
    output, old = w @ features, w_old @ features
    d, nats = target[0, 0].numel(), nats_per_squared_error(trainer.exact_schedule)[trainer.trained_steps].sum()
    error, error_old = ((x - target).square().mean((2, 3)) for x in (output, old))
    a, beta = batch.advantages[:, None], config.strength

    def slope(weights, rest):  # of the sum of weights * |rest|², rest linear in w
        return 2 / d * torch.einsum("nk,nkcp,nkfp->cf", weights.expand(rest.shape[:2]), rest, features)

    def per_group(x):
        return x.view(-1, GROUP, x.shape[1]).mean(1).repeat_interleave(GROUP, 0)

    if config.objective == "nft":
        c, u, e = config.advantage_clip, output - old, target - old
        losses = c * beta * u.square().mean((2, 3)) - 2 * a * (u * e).mean((2, 3)) + c / beta * error_old
        return losses, slope(torch.tensor(c * beta), u) - slope(a, e), error
    if config.objective == "awm":
        ratio = (nats * (error_old - error)).exp()
        bound = config.clip_nats / d
        limited = ratio.clamp(math.exp(-bound), math.exp(bound))
        losses = -torch.minimum(a * ratio, a * limited) / nats
        inside = a * ratio <= a * limited
        return losses, slope(a * ratio * inside, output - target), error
    price = beta * d * nats
    if config.objective == "dgpo":
        weight = 2 / (1 + (-per_group(a * price * (error - error_old))).exp())
        return weight * a * error, slope(weight * a, output - target), error
    gap = price * (error_old - error) - a
    gap = gap - per_group(gap)
    return gap.square() / (2 * price), slope(-gap, output - target), error


def moved(policy, by, seed=7):
    """Move the policy away from ``old``, which stays; returns its weights."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in policy.network.values():
            value.add_(by * torch.randn(value.shape, generator=stream, dtype=value.dtype))
    return policy.weights()


# -- targets and losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_target_is_what_stands_for_the_image_and_its_noise(prediction_type):
    flow = prediction_type == "flow"
    scheduler = KINDS["flow"] if flow else DDIMScheduler(**BETAS, prediction_type=prediction_type)
    schedule = training_schedule(scheduler)
    assert schedule.prediction_type == prediction_type
    stream = torch.Generator().manual_seed(0)
    steps = torch.randint(len(schedule) - 1, (8,), generator=stream)
    x_0, eps = torch.randn(2, 8, 2, 4, 4, generator=stream, dtype=F64)
    x_t, step = add_noise(x_0, eps, steps, schedule), schedule.at(steps)
    target = network_target(x_0, eps, step, prediction_type)
    found = predicted_x_0_and_eps(x_t, target, step, prediction_type)
    torch.testing.assert_close(found, (x_0, eps), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_old_policy_all_objectives_have_one_gradient(kind, make_trainer):
    gradients, values = {}, {}
    for name, settings in OBJECTIVES.items():
        trainer = make_trainer(kind, **settings)
        batch = exact_batch(trainer)
        w = trainer.policy.weights()
        losses, _, gradient = losses_of(trainer, batch)
        gradients[name] = gradient * trainer.config.members
        expected, _, error = closed_form(trainer, batch, w, w)
        values[name] = losses.sum() * trainer.config.members
        torch.testing.assert_close(values[name], expected.sum(), atol=0, rtol=1e-12)
        features, target = features_and_targets(trainer, batch)
        wanted = (
            2
            / target[0, 0].numel()
            * torch.einsum("n,nkcp,nkfp->cf", batch.advantages, w @ features - target, features)
        )
        assert wanted.norm() > 0.1
        assert (gradients[name] - wanted).norm() < 1e-12 * wanted.norm(), name
        if name == "dgpo":  # half of what follows A err as a DPO loss, times 2
            torch.testing.assert_close(values[name], (batch.advantages[:, None] * error).sum(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("settings", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_in_closed_form(kind, settings, make_trainer):
    trainer = make_trainer(kind, **settings, old_decay=0.5)
    batch = exact_batch(trainer)
    w_old = trainer.policy.weights()
    w = moved(trainer.policy, 0.03)
    if settings["objective"] == "awm":  # some are clipped, and some are not
        errors = (closed_form(trainer, batch, x, w_old)[2] for x in (w, w_old))
        change = trainer.nats * trainer.dimensions * torch.sub(*errors).abs()
        trainer.config = trainer.config.model_copy(update={"clip_range_nats": 1.001 * change.median().item()})
    losses, statistics, gradient = losses_of(trainer, batch)
    expected, slope, error = closed_form(trainer, batch, w, w_old)
    members = trainer.config.members
    torch.testing.assert_close(losses, expected.view(-1, members, K).mean(1).flatten(), atol=1e-12, rtol=1e-11)
    assert (members * gradient - slope).norm() < 1e-11 * slope.norm()
    torch.testing.assert_close(statistics["error"], error.view(-1, members, K).mean(1).flatten(), atol=0, rtol=1e-11)
    features, _ = features_and_targets(trainer, batch)
    own = nats_per_squared_error(trainer.exact_schedule)
    apart = ((w - w_old) @ features).square().sum((2, 3)) * own[batch.steps] * len(trainer.trained_steps)
    wanted = apart.view(-1, members, K).mean(1).flatten()
    torch.testing.assert_close(statistics["kl_old"], wanted, atol=1e-12, rtol=1e-10)


def test_a_bound_that_no_ratio_reaches_is_none(make_trainer):
    found = []
    for bound in (1e9, math.inf):
        trainer = make_trainer(objective="awm", clip_range_nats=bound, old_decay=0.5)
        batch, w_old = exact_batch(trainer), trainer.policy.weights()
        w = moved(trainer.policy, 0.01)
        found.append(losses_of(trainer, batch)[0])
        error, error_old = (closed_form(make_trainer(), batch, x, w_old)[2] for x in (w, w_old))
        wanted = -batch.advantages[:, None] * (trainer.nats * (error_old - error)).exp() / trainer.nats
        torch.testing.assert_close(found[-1], wanted.flatten(), atol=1e-12, rtol=1e-10)
    assert torch.equal(*found)


def test_an_image_better_than_the_others_is_learned_from(make_trainer):
    """A step against the gradient lowers the error where A > 0 and raises it where A < 0."""
    for settings in OBJECTIVES.values():
        trainer = make_trainer(**settings)
        batch = exact_batch(trainer)
        before = losses_of(trainer, batch)[1]["error"].sum()
        _, _, gradient = losses_of(trainer, batch)
        w = trainer.policy.weights()
        error = [closed_form(trainer, batch, x, w)[2].mean(1) for x in (w, w - 1e-4 * gradient)]
        assert (batch.advantages * (error[1] - error[0])).sum() < 0
        assert before > 0


def test_an_epochs_advantages_are_those_of_its_images(make_trainer):
    trainer = make_trainer()
    batch, plan = epoch_of(trainer)
    rewards = brightness(trainer.policy.decode(batch.x_0), None, None).view(2, GROUP)
    assert torch.equal(batch.advantages.view(2, GROUP) > 0, rewards > rewards.mean(1, keepdim=True))
    assert plan.sample_indices.tolist() == list(range(6))


# -- KL in nats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "logit_normal", "exact"])
@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_the_kl_is_that_of_the_path_in_nats_whatever_is_drawn(kind, weighting, make_trainer):
    """Every step drawn once, each as likely as it is: the sum of w_t |output - reference|², and its gradient."""
    price = 0.7
    trainer = make_trainer(kind, objective="awm", weighting=weighting, kl_coef=price)
    batch, steps = exact_batch(trainer), trainer.trained_steps
    stream = torch.Generator().manual_seed(5)
    noise = torch.randn(1, len(steps), *batch.x_0.shape[1:], generator=stream, dtype=F64)
    batch = replace(batch, steps=steps.repeat(6, 1), noise=noise.expand(6, -1, -1, -1, -1), advantages=torch.zeros(6))
    batch = replace(batch, advantages=batch.advantages.double())
    features, _ = features_and_targets(trainer, batch)
    w_ref = torch.cat([trainer.policy.frozen[name] for name in "ABC"], dim=1)
    apart = (trainer.policy.weights() - w_ref) @ features
    own = nats_per_squared_error(trainer.exact_schedule)[steps]
    wanted = (own * apart.square().sum((2, 3))).sum(1)
    slope = 2 * torch.einsum("k,kcp,kfp->cf", own, apart[0], features[0])

    found = []
    for parameter in trainer.policy.trainable.values():
        parameter.grad = None
    for image in range(6):
        losses, statistics = trainer.loss(batch, torch.full((len(steps),), image), torch.arange(len(steps)))
        found.append((trainer.probabilities * statistics["kl_path"]).sum())
        torch.testing.assert_close(statistics["kl"] * len(steps), statistics["kl_path"], atol=0, rtol=1e-12)
        if image == 0:
            (trainer.probabilities * losses).sum().backward()
    torch.testing.assert_close(torch.stack(found), wanted, atol=0, rtol=1e-10)
    gradient = torch.cat([trainer.policy.network[name].grad for name in "ABC"], dim=1)
    in_nats = trainer.nats * trainer.dimensions
    assert trainer.nats == pytest.approx(own.sum().item(), rel=1e-12)
    assert (gradient - price / in_nats * slope).norm() < 1e-9 * (price / in_nats * slope).norm()


def test_without_a_price_a_few_noised_images_of_any_level_are_looked_at(make_trainer):
    """On average over epochs the KL of the loss, where 2 of 6 x 2 noised images are looked at."""
    settings = {"kind": "flow", "sampler": {"steps": 2}, "steps_per_image": 3}
    trainer, priced = make_trainer(**settings), make_trainer(**settings, kl_coef=1.0)
    assert probes_of(trainer.config) == 2
    found, wanted, levels = [], [], set()
    for epoch in range(400):
        trainer.epoch = priced.epoch = epoch
        if epoch == 0:
            batch, _ = epoch_of(trainer)
        batch = trainer._noised(batch.x_0, batch.advantages, batch.conditioning, epoch, [0, 0, 0, 1, 1, 1])
        with torch.no_grad():
            wanted.append(losses_of_kl(priced, batch))
        seen = len(trainer.policy.seen)
        found.append(trainer._measure_kl(batch)["kl_path"])
        assert [rows for rows, _ in trainer.policy.seen[seen:]] == [2, 2]
        levels |= {tuple(batch.steps[0].tolist())}
    found, wanted = torch.tensor(found), torch.tensor(wanted)
    assert abs((found - wanted).mean()) < 4 * (found - wanted).std() / 20
    assert (found - wanted).std() / 20 < 0.1 * wanted.mean()  # one level of three alone is off by more than .4
    assert trainer.after_updates().keys() == {"kl", "kl_path", "kl_path_stderr"}
    assert trainer.after_updates() == {}, "looked at once"


@pytest.mark.parametrize("objective", ["nft", "crd"])
def test_the_kls_standard_error_is_that_of_groups_which_share_their_noise(objective, make_trainer):
    """Images of a group that are alike tell no more than one: whatever a group's size, the error is that of groups."""
    found = {}
    for price in (0.1, 0.0):
        trainer = make_trainer(objective=objective, kl_coef=price, steps_per_image=1, sampler={"steps": 400})
        batch = exact_batch(trainer)
        moved(trainer.policy, 0.03)
        text = batch.conditioning["text"][batch.groups * GROUP]
        batch = replace(batch, x_0=batch.x_0[batch.groups * GROUP], conditioning={"text": text})  # all alike
        if price:
            indices = torch.cartesian_prod(torch.arange(0, 6, trainer.config.members), torch.arange(1))
            row = trainer.accumulate(batch, indices, 1.0).over_processes(trainer.accelerator)
            each = [trainer.loss(batch, torch.tensor([i]), torch.zeros(1, dtype=torch.int64))[1] for i in (0, GROUP)]
            kl = torch.cat([one["kl_path"] for one in each]).detach()
        else:
            assert probes_of(trainer.config) == 6, "all of them"
            row = trainer._measure_kl(batch)
        found[price] = row["kl_path_stderr"]
        assert row["kl_path"] == pytest.approx(kl.mean().item(), rel=1e-6)
        assert found[price] == pytest.approx((kl[0] - kl[1]).abs().item() / 2, rel=1e-6)


def losses_of_kl(trainer, batch):
    indices = torch.cartesian_prod(torch.arange(6), torch.arange(batch.steps.shape[1]))
    return trainer.loss(batch, *indices.unbind(1))[1]["kl_path"].mean().item()


# -- draws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "logit_normal", "exact"])
def test_draws_are_stratified_and_follow_their_weights(weighting, make_trainer):
    trainer = make_trainer("flow", weighting=weighting, steps_per_image=4, group_size=1, advantages="prompt_history")
    steps, p = trainer.trained_steps, trainer.probabilities
    own = nats_per_squared_error(trainer.exact_schedule)[steps]
    if weighting == "exact":
        torch.testing.assert_close(p, own / own.sum(), atol=0, rtol=1e-12)
    count = 1500
    x_0 = torch.zeros(count, 2, 4, 4)
    drawn = trainer._noised(x_0, torch.zeros(count), {}, 0, range(count)).steps
    ends = torch.cat([p.new_zeros(1), p.cumsum(0)])
    for part, column in enumerate(drawn.unbind(1)):  # one in each of four parts of equal probability
        assert (ends[column + 1] > part / 4 - 1e-9).all()
        assert (ends[column] < (part + 1) / 4 + 1e-9).all()
    shares = torch.bincount(drawn.flatten(), minlength=len(steps))[steps].double() / drawn.numel()
    distance = (shares.cumsum(0) - p.cumsum(0)).abs().max()
    assert distance < 1.95 / math.sqrt(drawn.numel())  # Kolmogorov: p < .001, less where stratified


LAST = {
    "SD3": (FlowMatchEulerDiscreteScheduler(shift=3.0), 10, None, 0.0089),
    "FLUX": (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 10, 256, None),
    "leading": (DDIMScheduler(**BETAS, steps_offset=1), 10, None, 1),
    "trailing": (DDIMScheduler(**BETAS, timestep_spacing="trailing"), 10, None, 99),
}


@pytest.mark.parametrize("weighting", ["uniform", "logit_normal"])
@pytest.mark.parametrize(("scheduler", "count", "tokens", "last"), LAST.values(), ids=LAST)
def test_the_last_noise_level_is_the_samplers(scheduler, count, tokens, last, weighting):
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    setter = partial(set_linear_timesteps, tokens=tokens) if tokens else None
    given = {"model": "emoji-flow" if flow else "emoji-sd", "output_dir": "run", "prompts": ["a"], "reward": brightness}
    config = ForwardConfig(**given, sampler={"steps": count}, weighting=weighting)
    assert config.decided_by(scheduler).timestep_range is None
    schedule = ForwardTrainer.trained_schedule(config, scheduler, setter)
    steps = ForwardTrainer.steps_trained_on(config, schedule)
    assert len(schedule) == 1000, "weightings are of all levels"
    sampled = config.sampler.schedule(scheduler, setter).table
    sigma, final = schedule.table.sigma_t, sampled.sigma_t[-1]
    if flow:
        assert last is None or final == pytest.approx(last, abs=1e-4)
    else:
        assert schedule.table.timestep[steps[-1]] == sampled.timestep[-1] == last
    assert sigma[steps].min() >= final * (1 - 1e-6)
    assert sigma[steps[-1] + 1] <= final * (1 + 1e-6), "no level is left out"
    whole = ForwardConfig(**given, sampler={"steps": count}, timestep_range=(0.0, 1.0))
    every = ForwardTrainer.steps_trained_on(whole, ForwardTrainer.trained_schedule(whole, scheduler, setter))
    assert every.tolist() == list(range(999))


def test_images_of_one_prompt_share_levels_and_noise_whoever_holds_them(make_trainer):
    trainer = make_trainer()
    batch, _ = epoch_of(trainer)
    steps = batch.steps.view(2, GROUP, K)
    assert all(torch.equal(steps[:, 0], steps[:, i]) for i in range(GROUP))
    assert batch.noise.shape == (2, K, *batch.x_0.shape[1:]), "kept once for each group"
    assert batch.groups.tolist() == [0] * GROUP + [1] * GROUP
    for values in (steps, batch.noise, batch.noise.transpose(0, 1)):
        assert not torch.equal(values[0], values[1])
    other = make_trainer()
    other.local_samples = range(3, 6)  # of two processes the second
    half, _ = epoch_of(other)
    assert torch.equal(half.steps, batch.steps[3:])
    assert torch.equal(half.noise[half.groups], batch.noise[batch.groups[3:]])
    assert torch.equal(half.x_0, batch.x_0[3:])
    trainer.epoch = 1
    assert not torch.equal(epoch_of(trainer)[0].noise, batch.noise)


def test_too_few_noise_levels(make_trainer):
    from diffusion_align.errors import ConfigError

    with pytest.raises(ConfigError, match=r"timestep_range=\[0.5, 0.501\] leaves 0 of the noise levels, fewer than"):
        make_trainer(timestep_range=(0.5, 0.501))
    with pytest.raises(ConfigError, match=r"^sampler.steps=1 leaves 1 of the noise levels, fewer.*: set timestep"):
        make_trainer(sampler={"steps": 1})


# -- self-consistency ----------------------------------------------------------------------------------------------


class Gaussian(LinearPolicy):
    """The velocity of N(m(c), .5²), times ``scaled``; what is trained is added to it, and is 0."""

    scaled = 1.0

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.mean = self.network["C"].detach().clone() / 0.3
            for value in self.network.values():
                value.zero_()

    def velocity(self, weights, x_t, u, text):
        t, mean = u.view(-1, 1, 1, 1), (text.to(x_t) @ self.mean.T)[:, :, None, None]
        kept = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
        x_0 = mean + kept * (x_t - (1 - t) * mean)
        return self.scaled * (x_t - x_0) / t + super().velocity(weights, x_t, u, text)


CONSISTENT = {"sampler": {"steps": 40}, "consistency_images": 48, "sample_batch_size": 6, "steps_per_image": 2}


def test_an_exact_velocity_is_consistent_with_itself(make_trainer):
    """Also where the images that are trained on share their noise: .02, and .09 if these did."""
    found = []
    for group_size in (1, 48):
        groups = {"group_size": group_size, "samples_per_epoch": 48, "advantages": "prompt_history"}
        found.append(make_trainer(policy=Gaussian(), **CONSISTENT | groups).self_consistency())
    assert found[0] == found[1]
    assert abs(found[0].share) < 3 * found[0].stderr
    assert found[0].stderr < 0.06
    assert consistency_warning(found[0]) is None


@pytest.mark.parametrize("fault", ["guidance", "velocity"])
def test_a_velocity_that_is_not_that_of_its_samples_is_warned_of(fault, make_trainer, capsys):
    policy = Gaussian()
    if fault == "guidance":
        policy.scale = 5.0
    else:
        policy.scaled = 1.5
    trainer = make_trainer(policy=policy, **CONSISTENT)
    row = trainer.measure_first()
    assert row["self_consistency"] > 0.2
    assert row["self_consistency"] - 2 * row["self_consistency_stderr"] > 0.1
    printed = " ".join(capsys.readouterr().err.split())
    assert "of the gradient of an image is what a constant reward would make too" in printed
    assert "Use more sampler.steps and guidance_scale=1" in printed


def test_it_can_be_broken_off(make_trainer):
    trainer = make_trainer(consistency_images=4)
    trainer.processes.flag.raised = True
    with pytest.raises(Interrupted):
        trainer.self_consistency()
    assert trainer.policy.seen == []


def test_it_can_be_left_out(make_trainer):
    trainer = make_trainer(consistency_images=0)
    assert trainer.measure_first() == {}
    assert trainer.policy.seen == []


# -- the old policy and passes -------------------------------------------------------------------------------------


def run_epochs(trainer, count):
    """Weights after each epoch, and the passes of each: who -> rows."""
    weights, passes = [], []
    for _ in range(count):
        trainer.policy.seen.clear()
        batch, plan = epoch_of(trainer)
        trainer._update(batch, plan)
        trainer.after_updates()
        trainer.epoch += 1
        weights.append({name: value.detach().clone() for name, value in trainer.policy.trainable.items()})
        rows = dict.fromkeys(("sampling", "old", "trained", "reference"), 0)
        for number, who in trainer.policy.seen:
            rows[who] += number
        passes.append(rows)
    return weights, passes


def test_the_old_policy_is_a_decayed_average(make_trainer):
    trainer = make_trainer(old_decay=0.7, learning_rate=0.01, updates_per_epoch=2)
    first = {name: value.detach().clone() for name, value in trainer.policy.trainable.items()}
    weights, _ = run_epochs(trainer, 3)
    stored = trainer.extra_weights()["snapshot_old"]
    for name, value in first.items():
        for later in weights:
            value = 0.7 * value + 0.3 * later[name]
        torch.testing.assert_close(stored[name], value, atol=1e-6, rtol=0)
        assert (stored[name] - weights[-1][name]).abs().max() > 1e-3
        assert (stored[name] - trainer.policy.frozen[name]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"updates_per_epoch": 2},
        {"updates_per_epoch": 2, "inner_epochs": 2, "objective": "dgpo", "micro_batch_size": 3},
        {"old_decay": 0.5, "updates_per_epoch": 2},
        {"kl_coef": 0.1, "objective": "crd", "updates_per_epoch": 2},
    ],
    ids=["one update", "two updates", "groups", "a slow old policy", "a KL"],
)
def test_an_epoch_costs_the_passes_that_are_foretold(settings, make_trainer):
    """Before the first update of an epoch the old policy, if it follows at once, is the current one."""
    trainer = make_trainer(**settings, learning_rate=0.01)
    cost = ForwardTrainer.epoch_cost(trainer.config)
    for rows in run_epochs(trainer, 2)[1]:
        slow = trainer.config.old_decay > 0
        assert rows["sampling"] + rows["old"] + rows["reference"] == cost.sampling + cost.old + cost.probed + (
            cost.reference
        )
        assert rows["old"] == cost.old + slow * cost.sampling
        assert rows["reference"] == cost.reference + cost.probed // 2
        assert rows["trained"] == cost.trained
    assert cost.units * trainer.config.members == 6
    assert cost.actions == 6 * K
