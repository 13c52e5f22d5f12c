"""Windows of noisy steps: where they lie, the schedule they make, what DDPO samples, records and trains with them."""

import json
from dataclasses import fields

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion_align.diffusion.ddpo import DDPOConfig, DDPOTrainer
from diffusion_align.diffusion.rollout import rollout, transition
from diffusion_align.diffusion.sampler_settings import SamplerConfig
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.diffusion.settings import DenoisingConfig
from diffusion_align.diffusion.step import Step
from diffusion_align.diffusion.windows import mix, window
from diffusion_align.errors import ConfigError
from tests.helpers.oracles import assert_same
from tests.helpers.problems import assert_problem

PROMPTS = ["red apple", "a cat"]
STEPS = torch.arange(2, 9)  # 7 of them
ETA_0 = {"steps": 6, "guidance_scale": 1.0, "eta": 0.0}
WINDOW = {"steps": 6, "guidance_scale": 1.0, "noisy_steps": 2}


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def make_trainer(make_policy, tmp_path):
    def make(*, noise=0.05, kind=DDPOTrainer, **settings):
        defaults = {
            "model": "emoji-sd",
            "output_dir": tmp_path / "run",
            "prompts": PROMPTS,
            "reward": brightness,
            "sampler": WINDOW,
            "samples_per_epoch": 4,
            "sample_batch_size": 4,
            "micro_batch_size": 4,
            "group_size": 2,
            "advantages": "group",
        }
        policy = make_policy("tiny_sd", noise=noise)
        return kind(DDPOConfig(**(defaults | settings)), policy, brightness, [(p, {}) for p in PROMPTS])

    return make


# -- where it lies -----------------------------------------------------------------------------------------------------


def test_a_random_window_lies_everywhere_equally_often_and_follows_from_seed_and_epoch():
    """5 places in 2000 epochs: each count has mean 400 and std 17.9; five standard deviations are allowed."""
    found = [window(STEPS, 3, order="random", seed=1, epoch=epoch) for epoch in range(2000)]
    assert all(len(one) == 3 and (one.diff() == 1).all() for one in found)
    counts = torch.stack(found)[:, 0].bincount(minlength=9)
    assert counts[:2].sum() == counts[7:].sum() == 0
    assert (counts[2:7] - 400).abs().max() < 90
    again = [window(STEPS, 3, order="random", seed=1, epoch=epoch) for epoch in range(50)]
    other = [window(STEPS, 3, order="random", seed=2, epoch=epoch) for epoch in range(50)]
    assert all(torch.equal(a, b) for a, b in zip(again, found))
    assert not all(torch.equal(a, b) for a, b in zip(again, other))


def test_a_progressive_window_moves_from_noise_to_image_and_begins_again():
    found = [window(STEPS, 3, order="progressive", seed=1, epoch=epoch).tolist() for epoch in range(6)]
    assert found == [[2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8], [2, 3, 4]]


@pytest.mark.parametrize("order", ["random", "progressive"])
def test_a_window_as_wide_as_the_steps_is_all_of_them_and_a_wider_one_is_refused(order):
    assert torch.equal(window(STEPS, 7, order=order, seed=0, epoch=5), STEPS)
    for count in (0, 8):
        with pytest.raises(ValueError, match=f"count={count} must be from 1 to the 7 steps"):
            window(STEPS, count, order=order, seed=0, epoch=0)


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_a_mixed_schedule_takes_the_rows_of_the_window_from_the_noisy_one(make_policy):
    scheduler = make_policy("tiny_sd").pipeline.scheduler
    noisy, quiet = (build_schedule(scheduler, 6, eta=eta) for eta in (0.8, 0.0))
    mixed = mix(noisy, quiet, torch.tensor([1, 2]))
    for name in (f.name for f in fields(Step)):
        column, with_noise, without = (getattr(s.table, name) for s in (mixed, noisy, quiet))
        assert torch.equal(column[1:3], with_noise[1:3])
        assert torch.equal(column[[0, 3, 4, 5]], without[[0, 3, 4, 5]])
        assert column.dtype == with_noise.dtype
    assert mixed.stochastic_steps.tolist() == [1, 2]
    assert torch.equal(mix(noisy, quiet, torch.arange(6)).table.std, noisy.table.std)
    with pytest.raises(ValueError, match="differ in timestep"):
        mix(noisy, build_schedule(scheduler, 5, eta=0.0), torch.tensor([1]))


def test_all_steps_but_those_of_the_window_are_the_odes(make_trainer, streams):
    trainer = make_trainer()
    first = trainer.trained_steps[0]
    conditioning = trainer.policy.encode(PROMPTS)
    path = rollout(trainer.policy, trainer.schedule, conditioning, streams(2))
    x_t = torch.stack([torch.randn(trainer.policy.latent_shape, generator=g) for g in streams(2)])
    ode = SamplerConfig(**ETA_0).schedule(trainer.policy.pipeline.scheduler).to("cpu")
    with torch.no_grad():
        for i in range(6):
            step = transition(trainer.policy, ode, x_t, torch.full((2,), i), conditioning)
            if i in trainer.trained_steps:
                assert torch.equal(path.x_t[:, i - first], x_t)
                assert not torch.equal(path.x_s[:, i - first], step.mean)
                x_t = path.x_s[:, i - first]
            else:
                x_t = step.mean
    assert torch.equal(path.latents, x_t)


@pytest.mark.parametrize("name", ["flow", "ddim", "flow_sde", "cps", "dance"])
def test_flow_matching_has_windows_with_every_sampler(name):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler = SamplerConfig(name=name, steps=10, noisy_steps=3)
    noisy, quiet = sampler.schedule(scheduler), sampler.quiet.schedule(scheduler)
    assert len(quiet.stochastic_steps) == 0
    mixed = mix(noisy, quiet, torch.arange(2, 5))
    assert mixed.stochastic_steps.tolist() == [2, 3, 4]
    assert mixed.prediction_type == "flow"
    assert mixed.table.timestep.dtype == torch.float32
    # The Euler step of the ODE, x_s = x_t + (s - t)(eps - x_0), of x_t = (1 - t) x_0 + t eps.
    t = mixed.table.sigma_t
    s = torch.cat([t[1:], t.new_zeros(1)])
    without = torch.tensor([i for i in range(10) if i not in (2, 3, 4)])
    x_0 = mixed.table.x_0_weight + mixed.table.x_t_weight * (1 - t)
    eps = mixed.table.eps_weight + mixed.table.x_t_weight * t
    assert_same(x_0[without], (1 - s)[without])
    assert_same(eps[without], s[without])


# -- training ----------------------------------------------------------------------------------------------------------


def test_only_the_window_is_recorded_trained_and_compared_with_the_reference(make_trainer):
    trainer = make_trainer(kl_coef=0.1)
    seen = set()
    for trainer.epoch in range(6):
        collected, metrics = trainer.collect()
        place = trainer.trained_steps
        assert torch.equal(place, window(torch.arange(6), 2, order="random", seed=0, epoch=trainer.epoch))
        assert metrics["first_noisy_step"] == place[0] + 1
        seen.add(int(place[0]))
        path = collected.trajectory
        assert path.steps.tolist() == [place.tolist()] * 4
        assert trainer.schedule.stochastic_steps.tolist() == place.tolist()
        batch, plan, _ = trainer.estimate(collected)
        assert plan.steps_per_sample == 2
        rows = torch.arange(4)
        for column in range(2):  # the batch shape of sampling, so equal to the last bit
            _, statistics = trainer.loss(batch, rows, torch.full((4,), column))
            assert (statistics["ratio/mean"] == 1).all()
            assert (statistics["kl"] > 0).all()
            assert statistics["kl"].isfinite().all()
            torch.testing.assert_close(statistics["kl_path"], 2 * statistics["kl"])
    assert len(seen) > 1


def test_previews_and_evaluations_have_no_noise(make_trainer):
    trainer = make_trainer()
    assert len(trainer.sampling_schedule.stochastic_steps) == 0
    assert trainer.previews.schedule is trainer.sampling_schedule
    plain = make_trainer(sampler=ETA_0 | {"eta": 1.0})
    assert torch.equal(plain.sampling_schedule.table.std, plain.schedule.table.std)
    assert SamplerConfig(**WINDOW).preview == SamplerConfig(**ETA_0)
    cps = SamplerConfig(name="cps", noisy_steps=2)
    assert cps.preview == SamplerConfig(name="cps", noise_level=0.0)


def test_the_schedule_of_a_window_of_all_steps_is_the_usual_one(make_trainer):
    whole, plain = (make_trainer(sampler={"steps": 6, "noisy_steps": n}) for n in (6, None))
    for f in fields(Step):
        assert torch.equal(getattr(whole.schedule.table, f.name), getattr(plain.schedule.table, f.name))
    assert torch.equal(whole.trained_steps, plain.trained_steps)


def test_the_kl_of_the_window_is_estimated_where_it_has_no_price(make_trainer):
    trainer = make_trainer(samples_per_epoch=16, sample_batch_size=16, group_size=1, advantages="prompt_history")
    for trainer.epoch in range(3):
        collected, _ = trainer.collect()
        batch, *_ = trainer.estimate(collected)
        trainer.check_update({}, first=False)
        found = trainer.after_updates()
        every = torch.cartesian_prod(torch.arange(16), torch.arange(2))
        samples, actions = every.unbind(1)
        x_t, _, steps, conditioning = batch.path.at(samples, actions)
        with torch.no_grad():
            now = transition(trainer.policy, trainer.schedule, x_t, steps, conditioning)
            kl = now.kl(trainer._reference(batch, samples, actions))
        expected = sum(kl[steps == s].mean().item() for s in trainer.trained_steps)
        assert abs(found["kl_path"] - expected) < 3 * found["kl_path_stderr"]


def test_an_epoch_costs_the_passes_of_its_window():
    settings = {"model": "emoji-sd", "output_dir": "run", "prompts": PROMPTS, "reward": brightness}
    sampler = {"steps": 10, "guidance_scale": 1.0}
    whole, part = (
        DDPOTrainer.epoch_cost(DDPOConfig(**settings, sampler=sampler | noisy)) for noisy in ({}, {"noisy_steps": 3})
    )
    assert (part.trained, part.recorded, part.actions) == tuple(
        0.3 * n for n in (whole.trained, whole.recorded, whole.actions)
    )
    assert part.sampling == whole.sampling == 64 * 10
    assert part.what == ("images per epoch", "64, each 10 steps, 3 of them noisy")


TRAINING = {
    "method": "ddpo",
    "reward": brightness,
    "prompts": PROMPTS,
    "epochs": 4,
    "samples_per_epoch": 4,
    "sample_batch_size": 2,
    "micro_batch_size": 3,
    "updates_per_epoch": 2,
    "inner_epochs": 2,
    "learning_rate": 1e-3,
    "grid_every": 0,
    "checkpoint_every": 1,
}


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.mark.parametrize(
    ("order", "settings"), [("random", {"kl_bound_nats": 0.0005}), ("progressive", {"ratio": "guard"})]
)
def test_a_run_that_is_resumed_and_lengthened_is_the_uninterrupted_one(order, settings, tiny_sd, tmp_path, monkeypatch):
    from diffusion_align.pipelines.configuration import check_config
    from diffusion_align.pipelines.run import run

    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    common = (
        TRAINING
        | settings
        | {"model": str(tiny_sd), "sampler": WINDOW | {"noisy_order": order, "noisy_range": [0.0, 0.8]}}
    )
    straight, twice = tmp_path / "straight", tmp_path / "twice"
    run(check_config(common | {"output_dir": straight}))
    run(check_config(common | {"output_dir": twice, "epochs": 2}))
    run(check_config(common | {"output_dir": twice, "resume": True}))
    assert rows_of(straight) == rows_of(twice)
    if "kl_bound_nats" in settings:
        assert {row["kl_bound/dropped"] for row in rows_of(straight) if row["step"] % 4 == 1 and "loss" in row} == {0}
        assert any(0 < row.get("kl_bound/dropped", 0) < 1 for row in rows_of(straight))
    places = [row["first_noisy_step"] for row in rows_of(straight) if "first_noisy_step" in row]
    assert len(places) == 4
    assert len(set(places)) > 1
    assert all(1 <= place <= 4 for place in places)  # of 5 steps
    described = json.loads((straight / "metrics.json").read_text())
    assert described["first_noisy_step"]["unit"] == "step"
    assert "trained steps" in described["kl_path"]["title"]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own", "ddpm"])
def test_a_sampler_whose_noise_cannot_be_switched_off_is_refused(name, make_trainer, tmp_path):
    (tmp_path / "mine.py").write_text("from diffusion_align.diffusion.samplers import ddpm as own\n")
    name = f"{tmp_path}/mine.py:own" if name == "own" else name
    with pytest.raises(ConfigError) as caught:
        make_trainer(sampler=WINDOW | {"name": name})
    (problem,) = caught.value.problems
    assert f"noisy_steps=2 needs a sampler that is deterministic with eta=0, and name={name} is not" in problem


def test_a_sampler_of_ones_own_that_reads_eta_has_windows(make_trainer, tmp_path):
    (tmp_path / "mine.py").write_text("from diffusion_align.diffusion.samplers import ddim as own\n")
    own = make_trainer(sampler=WINDOW | {"name": f"{tmp_path}/mine.py:own"})
    assert torch.equal(own.schedule.table.std, make_trainer().schedule.table.std)


def test_a_range_with_fewer_steps_than_the_window_is_refused(make_trainer):
    with pytest.raises(ConfigError) as caught:
        make_trainer(sampler=WINDOW | {"noisy_range": [0.0, 0.2]})
    assert caught.value.problems == [
        "sampler.steps=6 with noisy_range=[0.0, 0.2] leaves 1 of the stochastic steps, fewer than noisy_steps=2: lower "
        "it, or use more steps or a wider range"
    ]


def test_a_method_of_ones_own_has_none_unless_it_says_so():
    with pytest.raises(ConfigError) as caught:
        DenoisingConfig(model="emoji-sd", output_dir="run", sampler={"noisy_steps": 2})
    assert_problem(caught.value.problems, "sampler.noisy_steps=2", "for methods that train on the steps they sampled")
