"""The loop on a tiny model in this process: what it logs, averages, skips and refuses."""

from functools import partial

import pytest
import torch

from diffusion_align.errors import TrainingError
from tests.helpers.tiny_runs import TINY


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


SETTINGS = TINY | {
    "reward": brightness,
    "prompts": ["a red apple", "a cat"],
    "epochs": 2,
    "samples_per_epoch": 4,
    "micro_batch_size": 5,
    "updates_per_epoch": 2,
    "learning_rate": 1e-3,
    "sampler": {"steps": 3, "guidance_scale": 1.0},
}


def flat(images, prompts, metadata):
    return torch.ones(len(images))


@pytest.fixture
def train(train):
    """``train(**changes)``: the finished trainer and its rows."""
    return partial(train, SETTINGS)


@pytest.mark.parametrize("objective", ["ratio", "score_function"])
@pytest.mark.parametrize(
    "kl", [{}, {"kl_coef": 0.1}, {"kl_coef": 0.1, "kl": "k1_reward"}, {"kl_coef": 0.1, "credit": "to_go"}]
)
def test_every_objective_trains(train, objective, kl):
    trainer, rows = train(objective=objective, inner_epochs=2, **kl)
    assert (trainer.epoch, trainer.step) == (2, 8)
    steps = [row for row in rows if "reward" not in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all(torch.isfinite(torch.tensor(list(row.values()), dtype=torch.float64)).all() for row in rows)
    assert all(row["grad_norm"] > 0 for row in steps)
    assert steps[0]["ratio/first_pass_deviation"] < 1e-5
    known = steps if kl else [row for row in rows if "reward" in row]  # without a price, once per epoch
    assert kl or not any("kl" in row for row in steps)
    assert known[-1]["kl"] > 0
    assert known[-1]["kl_path_stderr"] > 0
    assert not kl or steps[0]["kl"] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_the_rate_warms_up_and_follows_its_schedule(train, schedule, expected):
    _, rows = train(lr_schedule=schedule, warmup_steps=2, epochs=3)
    rates = [row["learning_rate"] / 1e-3 for row in rows if "reward" not in row]
    assert rates == pytest.approx(expected)


def test_the_average_follows_the_weights(train):
    trainer, _ = train(ema_decay=0.5)
    parameters = list(trainer.trainable.values())
    trained = [p.detach().clone() for p in parameters]
    with trainer.ema_weights():
        averaged = [p.detach().clone() for p in parameters]
    assert all(torch.equal(a, p.detach()) for a, p in zip(trained, parameters)), "the weights did not come back"
    assert any(not torch.equal(a, b) for a, b in zip(trained, averaged))
    # Adapters' B start at 0 and the average lags behind.
    norm = [sum(v.square().sum() for v in values if v.shape[1] == 2) for values in (averaged, trained)]
    assert 0 < norm[0] < norm[1]


def test_several_rewards_are_logged_one_by_one(train):
    _, rows = train(reward=[brightness, "jpeg_compressibility"], reward_weights=[2.0, -0.5])
    for row in [row for row in rows if "reward" in row]:
        parts = row["rewards/brightness/mean"], row["rewards/jpeg_compressibility/mean"]
        assert row["reward"] == pytest.approx(2 * parts[0] - 0.5 * parts[1], rel=1e-5)
        assert parts[0] > 0 > parts[1]
    _, turned = train("turned", reward=brightness, reward_weights=[-2.0])
    assert all(row["reward"] < 0 for row in turned if "reward" in row)
    trainer, _ = train("apart", reward=[brightness, flat], multi_objective_aggregation="normalize_then_sum")
    assert len(trainer.extra_state()["statistics"]) == 2


def test_equal_rewards_change_nothing(train):
    trainer, rows = train(reward=flat)
    epochs = [row for row in rows if "reward" in row]
    assert [row["samples_used"] for row in epochs] == [0, 0]
    assert not any("frac_reward_zero_std" in row for row in epochs), "groups of one have no spread to speak of"
    assert trainer.step == 4
    assert all(p.abs().max() == 0 for name, p in trainer.trainable.items() if "lora_B" in name)


def test_what_is_skipped_changes_no_gradient(train):
    def of_apples(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)) * torch.tensor(["apple" in prompt for prompt in prompts])

    norms, used = [], []
    for kl_coef in (0.0, 1e-14):  # with a price of KL nothing is skipped
        changes = {"advantages": "group", "group_size": 2, "updates_per_epoch": 1, "epochs": 1, "kl_coef": kl_coef}
        _, (update, epoch) = train(name=str(kl_coef), reward=of_apples, **changes)
        norms.append(update["grad_norm"])
        used.append(epoch["samples_used"])
    assert used == [2, 4]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("kept", "counted", "divisors"), [(4, None, [6, 6]), (2, 4, [6, 6]), (3, 4, [6, 6]), (1, 4, [6])]
)
def test_updates_divide_by_equal_shares_of_what_counts(train, monkeypatch, kept, counted, divisors):
    """Each of two updates by half of the samples that count, however few it trains on; three actions each."""
    from diffusion_align.diffusion.ddpo import DDPOTrainer
    from diffusion_align.training.method import TrainingPlan

    seen, accumulate, estimate = [], DDPOTrainer.accumulate, DDPOTrainer.estimate

    def spied(self, batch, indices, normalizer, *further):
        seen.append(normalizer)
        return accumulate(self, batch, indices, normalizer, *further)

    def chosen(self, collected):
        batch, plan, metrics = estimate(self, collected)
        return batch, TrainingPlan(torch.arange(kept), plan.steps_per_sample, counted), metrics

    monkeypatch.setattr(DDPOTrainer, "accumulate", spied)
    monkeypatch.setattr(DDPOTrainer, "estimate", chosen)
    train(epochs=1)
    assert seen == divisors


@pytest.mark.parametrize("micro_batch_size", [1, 5, 12, 100])
def test_the_gradient_does_not_depend_on_the_micro_batch(train, micro_batch_size):
    _, rows = train("whole", epochs=1, updates_per_epoch=1, micro_batch_size=12)
    _, other = train("parts", epochs=1, updates_per_epoch=1, micro_batch_size=micro_batch_size)
    assert other[0]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-5)
    assert other[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4, abs=1e-5)


def test_the_images_do_not_depend_on_the_sampling_batch(train):
    _, rows = train("pairs", epochs=1)
    _, other = train("all", epochs=1, sample_batch_size=4)
    for key in ("reward", "reward_min", "reward_max"):
        # Of images in 8 bits: rounding in the network may move a pixel by one level.
        assert other[-1][key] == pytest.approx(rows[-1][key], rel=2e-5)


def test_a_ratio_off_one_before_any_update_is_refused(train, monkeypatch):
    from diffusion_align.diffusion import ddpo

    replay = ddpo.replay

    def shifted(*arguments, **options):
        logp, now = replay(*arguments, **options)
        return logp + 0.01, now

    monkeypatch.setattr(ddpo, "replay", shifted)
    with pytest.raises(TrainingError, match="before any update, outside the clip range") as caught:
        train()
    assert "\n" not in str(caught.value)
    _, rows = train("score", objective="score_function")
    assert rows[0]["ratio/first_pass_deviation"] == pytest.approx(0.01, rel=0.01)
