"""PPO: rewards of tokens, values, whitening, the adaptive coefficient; its expected gradient by enumeration."""

from dataclasses import replace

import pytest
import torch

from diffusion_align.estimators import gae, masked_whiten
from diffusion_align.llm.collection import Collected
from diffusion_align.llm.policy import pack
from diffusion_align.llm.ppo import PPOTrainer, adapted
from diffusion_align.llm.rollout import Completions
from tests.helpers.enumerable import (
    REWARDS,
    enumerable_policy,
    gradient,
    log_tables,
    per_state_kl,
    reference_tables,
    sequences_of,
    token_log_probs,
)
from tests.helpers.hard_runs import rows_of
from tests.helpers.text_trainers import (
    assert_micro_batches_do_not_matter,
    estimated,
    exact_trainer,
    losses_of,
    online_trainer,
    short,
)

BETA = 0.4


def trainer_of(policy, tmp_path, **settings):
    settings = {"whiten_advantages": False, "gamma": 1.0, "lam": 1.0, "kl_coef": BETA} | settings
    trainer = exact_trainer(PPOTrainer, policy, tmp_path, settings.pop("samples_per_epoch", 16), **settings)
    trainer.value_head.double()
    return trainer


def all_completions(behaviour):
    return sampled(sequences_of(list(range(16))), token_log_probs(behaviour).detach(), REWARDS)


def sampled(sequences, logp_old, rewards):
    finished = torch.ones(len(rewards), dtype=torch.bool)
    return Collected(Completions(sequences, logp_old, finished), finished, rewards[:, None], rewards, {})


def test_expected_gradient_is_that_of_reward_less_path_kl(tmp_path):
    """With gamma = lambda = 1 a token is charged with the KL of all later ones too, and the value is a baseline."""
    policy = enumerable_policy()
    trainer = trainer_of(policy, tmp_path, value_coef=0.0)
    with torch.no_grad():
        trainer.value_head.weight.normal_()
    tables, reference = log_tables(policy), reference_tables(policy)
    batch = all_completions(tables)
    batch, (keep, actions, _), metrics = trainer.estimate(batch)
    assert (keep.tolist(), actions) == (list(range(16)), 1)
    assert batch.values_old.abs().min() > 0
    losses = losses_of(trainer, batch, keep)
    chances = token_log_probs(tables).sum(1).exp()
    first, second = per_state_kl(tables, reference)
    kl = first + (tables[0].exp() * second).sum()
    objective = (chances * REWARDS).sum() - BETA * kl
    found = gradient((chances.detach() * losses).sum(), policy)
    torch.testing.assert_close(found, -gradient(objective, policy) / 2, atol=1e-12, rtol=1e-9)  # a mean over 2 tokens
    assert metrics["kl_coef"] == BETA


def test_the_value_loss_draws_to_the_returns(tmp_path):
    policy = enumerable_policy()
    trainer = trainer_of(policy, tmp_path, value_coef=0.7, value_clip=None, kl_coef=0.0)
    batch = all_completions(log_tables(policy))
    batch, (keep, _, _), _ = trainer.estimate(batch)
    torch.testing.assert_close(batch.returns, REWARDS[:, None].expand(16, 2))  # no KL, gamma = 1, values 0
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    losses, statistics = trainer.loss(batch, keep, torch.zeros_like(keep))
    torch.testing.assert_close(losses, 0.7 * REWARDS.square() / 2)
    slope = torch.autograd.grad(losses.sum(), trainer.value_head.bias)[0]
    torch.testing.assert_close(slope, (-0.7 * REWARDS.sum()).reshape(1))
    torch.testing.assert_close(statistics["loss/value"].mean(), REWARDS.square().mean() / 2)


def test_the_last_token_that_counts_gets_the_reward(tmp_path, make_language_policy):
    policy = make_language_policy(noise=0.05, dtype=torch.float64)
    trainer = trainer_of(policy, tmp_path, samples_per_epoch=3, max_completion_length=4, lam=0.9)
    sequences = pack([[5], [6, 7], [8]], [[9, 10, 3], [11], [12, 13, 14, 15]], pad=3)
    logp_old = torch.where(sequences.mask, -1.5, 0.0).double()
    rewards = torch.tensor([1.0, -2.0, 0.5]).double()
    batch, *_ = trainer.estimate(sampled(sequences, logp_old, rewards))
    with torch.no_grad(), policy.reference():
        logp_ref = policy.log_probs(policy.score(sequences))
    token_rewards = -BETA * torch.where(sequences.mask, logp_old - logp_ref, 0.0)
    for row, last in enumerate((2, 0, 3)):
        token_rewards[row, last] += rewards[row]
    expected, returns = gae(token_rewards, torch.zeros_like(token_rewards), sequences.mask, gamma=1.0, lam=0.9)
    torch.testing.assert_close(batch.advantages, expected)
    torch.testing.assert_close(batch.returns, returns)
    assert (batch.advantages[~sequences.mask] == 0).all()


def test_values_are_of_the_state_before_the_token(tmp_path, make_language_policy):
    policy = make_language_policy(dtype=torch.float64)
    trainer = trainer_of(policy, tmp_path)
    with torch.no_grad():
        trainer.value_head.weight.normal_()
    prompts, completions = [[5, 6], [7]], [[9, 10, 11], [12]]
    sequences = pack(prompts, completions, pad=3)
    found = trainer._values(policy.score(sequences, with_hidden=True))
    torch.testing.assert_close(trainer._values(policy.hidden(sequences)), found, rtol=0, atol=1e-12)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        output = policy.model(torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False)
        values = trainer.value_head(output.hidden_states[-1][0]).squeeze(-1)
        expected = values[len(prompt) - 1 : len(prompt) + len(completion) - 1]
        torch.testing.assert_close(found[row, : len(completion)], expected)
    assert (found[1, 1:] == 0).all()


@pytest.fixture
def make_run(make_language_policy, tmp_path):
    def make(*, policy=None, **settings):
        return online_trainer(PPOTrainer, policy or make_language_policy(), tmp_path / "run", short, **settings)

    return make


def test_the_first_pass_has_ratio_one(make_run):
    trainer = make_run(kl_target=0.5, kl_horizon=100)
    trainer.train()
    rows = rows_of(trainer.folder)
    assert max(row["ratio/first_pass_deviation"] for row in rows if "ratio/first_pass_deviation" in row) < 1e-5
    found = {key for row in rows for key in row}
    assert {"kl", "kl_path", "kl_coef", "entropy", "loss/value", "value/mean", "returns/mean"} <= found


def test_advantages_are_whitened_over_the_epoch(make_run):
    trainer, plain = (make_run(whiten_advantages=white, temperature=2.0) for white in (True, False))
    whitened, raw = (estimated(one)[0] for one in (trainer, plain))
    mask = raw.sequences.mask
    torch.testing.assert_close(whitened.advantages, masked_whiten(raw.advantages, mask, (0, 1)))
    assert whitened.advantages[mask].mean().abs() < 1e-5
    assert whitened.advantages[mask].std() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(whitened.returns, raw.returns)


def test_a_completion_without_an_end_is_penalised(make_run):
    settings = {"max_completion_length": 3, "temperature": 3.0}
    returns = []
    for trainer in (make_run(**settings), make_run(missing_eos_penalty=2.5, **settings)):
        batch, _, metrics = estimated(trainer)
        mask = batch.sequences.mask
        returns.append(batch.returns.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1))  # of the last token
    difference = (returns[0] - returns[1]).round(decimals=5)
    assert set(difference.tolist()) == {0.0, 2.5}
    assert metrics["completions/clipped_ratio"] == pytest.approx((difference > 0).double().mean().item())


def test_the_coefficient_follows_the_target():
    assert adapted(0.1, 8.0, 4.0, 0.5) == pytest.approx(0.1 * 1.1)  # far above: by a fifth, half a horizon
    assert adapted(0.1, 0.0, 4.0, 0.5) == pytest.approx(0.1 * 0.9)
    assert adapted(0.1, 4.4, 4.0, 0.5) == pytest.approx(0.1 * 1.05)
    assert adapted(0.1, 4.0, 4.0, 1.0) == 0.1
    assert adapted(0.1, 0.0, 4.0, 8.0) == pytest.approx(0.08)  # an epoch longer than the horizon is one horizon


def test_the_coefficient_is_adapted_and_resumed(make_run):
    trainer = make_run(kl_target=1e-9, kl_horizon=32, kl_coef=0.1, epochs=3)
    trainer.train()
    coefficients = [row["kl_coef"] for row in rows_of(trainer.folder) if "kl_coef" in row]
    assert coefficients[0] == 0.1
    assert coefficients[2] == pytest.approx(coefficients[1] * 1.1)  # 16 of 32 completions, far above the target
    other = make_run(kl_target=1e-9, kl_horizon=32, kl_coef=0.1, epochs=3)
    other.load_extra_state(trainer.extra_state())
    assert other.kl_coef == trainer.kl_coef != 0.1


def test_loss_and_gradient_do_not_depend_on_micro_batches(make_run, make_language_policy):
    trainer = make_run(policy=make_language_policy(noise=0.05, dtype=torch.float64))
    trainer.value_head.double()
    batch, (keep, _, _), _ = estimated(trainer)
    assert_micro_batches_do_not_matter(trainer, batch, keep)


def test_it_learns_to_stop(make_run):
    size = {"samples_per_epoch": 32, "micro_batch_size": 32}
    trainer = make_run(epochs=15, learning_rate=0.02, temperature=1.5, kl_coef=0.0, **size)
    trainer.train()
    rewards = [row["reward"] for row in rows_of(trainer.folder) if "reward" in row]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0
    assert trainer.value_head.weight.abs().max() > 0
