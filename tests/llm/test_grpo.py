"""GRPO: its expected gradient is the enumerated gradient of its objective; what is skipped, counted and invariant."""

import dataclasses
import itertools
import math

import pytest
import torch

from diffusion_align.errors import TrainingError
from diffusion_align.estimators import aggregate, group_advantages
from diffusion_align.llm.collection import Collected
from diffusion_align.llm.grpo import GRPOConfig, GRPOTrainer
from diffusion_align.llm.rollout import Completions
from diffusion_align.llm.settings import OnlineConfig
from diffusion_align.llm.trainer import per_sample
from diffusion_align.training.statistics import equal_reward_metric
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

PAIRS = list(itertools.product(range(16), repeat=2))  # all groups of two
BETA = 0.4


def trainer_of(policy, tmp_path, **settings):
    settings = {"num_generations": 2, "scale_rewards": "none", "loss_type": "dr_grpo"} | settings
    return exact_trainer(GRPOTrainer, policy, tmp_path, 2 * len(PAIRS), **settings)


def expected_gradient(trainer, policy, behaviour):
    """Of the trainer's loss, over all groups of two that ``behaviour`` (its log tables) can sample."""
    indices = [i for pair in PAIRS for i in pair]
    logp_old = token_log_probs(behaviour).detach()
    chances = logp_old.sum(1).exp()
    finished = torch.ones(len(indices), dtype=torch.bool)
    completions = Completions(sequences_of(indices), logp_old[indices], finished)
    collected = Collected(completions, finished, REWARDS[indices, None], REWARDS[indices], {})
    batch, (keep, actions, _), metrics = trainer.estimate(collected)
    assert actions == 1
    losses = torch.zeros(len(indices), dtype=torch.float64)
    computed, _ = trainer.loss(batch, keep, torch.zeros_like(keep))
    losses = losses.index_put((keep,), computed)  # what is skipped has no gradient
    weights = torch.tensor([chances[a] * chances[b] for a, b in PAIRS]).repeat_interleave(2) / 2
    return gradient((weights * losses).sum(), policy), metrics


def expected_reward(tables):
    return (token_log_probs(tables).sum(1).exp() * REWARDS).sum()


def stepwise_kl(tables, reference):
    """Every state's KL, the states' own distribution not differentiated."""
    first, second = per_state_kl(tables, reference)
    return first + (tables[0].exp().detach() * second).sum()


def path_kl(tables, reference):
    first, second = per_state_kl(tables, reference)
    return first + (tables[0].exp() * second).sum()


ON_POLICY = {
    "no KL": ({"beta": 0.0}, lambda now, ref: 0.0 * now[0].sum()),
    "k1 in the reward": ({"beta": BETA}, stepwise_kl),
    "k1 in the reward, to go": ({"beta": BETA, "credit": "to_go"}, path_kl),
    "k1 as a loss": ({"beta": BETA, "kl": "k1_loss"}, stepwise_kl),
    "k2 as a loss": ({"beta": BETA, "kl": "k2_loss"}, stepwise_kl),
    "k2 as a loss, direct": ({"beta": BETA, "kl": "k2_loss", "kl_gradient": "direct"}, stepwise_kl),
    "k3 as a loss": ({"beta": BETA, "kl": "k3_loss"}, stepwise_kl),
    "the whole vocabulary": ({"beta": BETA, "kl": "full_vocabulary"}, stepwise_kl),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_expected_gradient_on_policy(name, tmp_path):
    """Groups of two without normalisation: half of grad E r (the other half is its own baseline), less beta grad KL."""
    settings, kl = ON_POLICY[name]
    policy = enumerable_policy()
    trainer = trainer_of(policy, tmp_path, **settings)
    tables, reference = log_tables(policy), reference_tables(policy)
    found, metrics = expected_gradient(trainer, policy, tables)
    objective = 0.5 * expected_reward(tables) - BETA * kl(tables, reference)
    torch.testing.assert_close(found, -gradient(objective, policy) / 2, atol=1e-12, rtol=1e-9)  # 2 tokens at most
    assert found.norm() > 1e-2
    assert metrics["frac_reward_zero_std"] == pytest.approx(16 / 256)


def test_leave_one_out_has_the_whole_gradient_of_the_expected_reward(tmp_path):
    """Where a completion is no part of its own baseline, nothing of grad E r is lost."""
    policy = enumerable_policy()
    trainer = trainer_of(policy, tmp_path, beta=0.0, advantages="leave_one_out", scale_rewards="group")
    tables = log_tables(policy)
    found, _ = expected_gradient(trainer, policy, tables)
    torch.testing.assert_close(found, -gradient(expected_reward(tables), policy) / 2, atol=1e-12, rtol=1e-9)


BIASED = {  # the coefficient of grad log pi, of each token
    "k2_reward": ({}, lambda x: x.square() / 2),
    "k3_reward": ({}, lambda x: (-x).expm1() + x),
    "k3_gradient_reward": ({}, lambda x: -(-x).expm1()),
    "k1_loss": ({"kl_gradient": "direct"}, torch.ones_like),
    "k3_loss": ({"kl_gradient": "direct"}, lambda x: -(-x).expm1()),
}


@pytest.mark.parametrize("kl", BIASED)
def test_the_biased_forms_are_what_they_are_called(kl, tmp_path):
    settings, coefficient = BIASED[kl]
    policy = enumerable_policy()
    trainer = trainer_of(policy, tmp_path, beta=BETA, kl=kl, **settings)
    tables = log_tables(policy)
    logp, logp_ref = token_log_probs(tables), token_log_probs(reference_tables(policy))
    chances = logp.detach().sum(1, keepdim=True).exp()
    penalty = (chances * coefficient((logp - logp_ref).detach()) * logp).sum()
    found, _ = expected_gradient(trainer, policy, tables)
    objective = 0.5 * expected_reward(tables) - BETA * penalty
    torch.testing.assert_close(found, -gradient(objective, policy) / 2, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("epsilon", [0.05, 0.9])
def test_expected_gradient_off_policy_with_clipping(epsilon, tmp_path):
    """[002] eq. 39: the KL of the sampler stands in the advantage, the ratio and its clip outside."""
    policy = enumerable_policy()
    behaviour = tuple(t.detach() for t in log_tables(enumerable_policy(noise=0.2)))
    trainer = trainer_of(policy, tmp_path, beta=BETA, epsilon=epsilon, epsilon_high=2 * epsilon, loss_type="grpo")
    now, old = token_log_probs(log_tables(policy)), token_log_probs(behaviour)
    penalty = BETA * (old - token_log_probs(reference_tables(policy)))
    objective, chances = 0.0, old.sum(1).exp()
    for a, b in PAIRS:
        for i, advantage in ((a, (REWARDS[a] - REWARDS[b]) / 2), (b, (REWARDS[b] - REWARDS[a]) / 2)):
            total = advantage - penalty[i]
            ratio = (now[i] - old[i]).exp()
            clipped = torch.minimum(ratio * total, ratio.clamp(1 - epsilon, 1 + 2 * epsilon) * total)
            objective = objective + chances[a] * chances[b] * clipped.mean() / 2
    found, _ = expected_gradient(trainer, policy, behaviour)
    torch.testing.assert_close(found, -gradient(objective, policy), atol=1e-12, rtol=1e-9)


def test_exact_k2_weighs_samples_of_the_old_policy(tmp_path):
    policy = enumerable_policy()
    behaviour = tuple(t.detach() for t in log_tables(enumerable_policy(noise=0.2)))
    trainer = trainer_of(policy, tmp_path, beta=BETA, kl="k2_loss", epsilon=0.999, epsilon_high=1e6)
    without = trainer_of(policy, tmp_path, beta=0.0, epsilon=0.999, epsilon_high=1e6)
    found = expected_gradient(trainer, policy, behaviour)[0] - expected_gradient(without, policy, behaviour)[0]
    tables, reference = log_tables(policy), reference_tables(policy)
    first, second = per_state_kl(tables, reference)
    # Tokens are weighed one by one: the states are those that the old policy visits.
    exact = first + (behaviour[0].exp() * second).sum()
    torch.testing.assert_close(found, BETA * gradient(exact, policy) / 2, atol=1e-12, rtol=1e-9)


def test_sequence_level_ratio(tmp_path):
    policy = enumerable_policy()
    behaviour = tuple(t.detach() for t in log_tables(enumerable_policy(noise=0.2)))
    trainer = trainer_of(policy, tmp_path, ratio_level="sequence", epsilon=0.999, epsilon_high=1e6, loss_type="grpo")
    now, old = token_log_probs(log_tables(policy)), token_log_probs(behaviour)
    ratio, chances = (now - old).mean(1).exp(), old.sum(1).exp()
    objective = sum(chances[a] * chances[b] * (ratio[a] - ratio[b]) * (REWARDS[a] - REWARDS[b]) / 4 for a, b in PAIRS)
    found, _ = expected_gradient(trainer, policy, behaviour)
    torch.testing.assert_close(found, -gradient(objective, policy), atol=1e-12, rtol=1e-9)


def test_per_sample_losses_average_to_the_aggregates():
    torch.manual_seed(0)
    losses, lengths = torch.randn(6, 5).double(), torch.tensor([5, 1, 3, 4, 2, 5])
    mask = torch.arange(5) < lengths[:, None]
    length = {"mean_length": lengths.double().mean().item(), "max_length": 7}
    for loss_type, mode in (("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "fixed_length")):
        found = per_sample(losses, mask, loss_type, **length).mean()
        expected = aggregate(losses, mask, mode, length=7 if mode == "fixed_length" else None)
        torch.testing.assert_close(found, expected, atol=1e-15, rtol=1e-12)


# -- a run ------------------------------------------------------------------------------------------------------------


def even(prompts, completions, **columns):
    return [None if not text else float(sum(int(t) % 2 == 0 for t in text.split())) for text in completions]


def by_prompt(prompts, completions, **columns):
    return [0.0 if prompt == "[9]" else float(len(text)) for prompt, text in zip(prompts, completions)]


@pytest.fixture
def make_run(make_language_policy, tmp_path):
    def make(*, rewards=(short,), policy=None, **settings):
        policy, settings = policy or make_language_policy(), {"num_generations": 4, "beta": 0.05} | settings
        return online_trainer(GRPOTrainer, policy, tmp_path / "run", *rewards, **settings)

    return make


def test_the_first_pass_has_ratio_one(make_run):
    trainer = make_run()
    trainer.train()
    rows = rows_of(trainer.folder)
    first = [row["ratio/first_pass_deviation"] for row in rows if "ratio/first_pass_deviation" in row]
    assert len(first) == 2
    assert max(first) < 1e-5
    assert any(row["ratio/max"] > 1.001 for row in rows if "ratio/max" in row)  # and later passes move it
    assert {"kl", "kl_path", "entropy", "completions/mean_length", "rewards/short/mean"} <= {k for r in rows for k in r}


def test_loss_and_gradient_do_not_depend_on_micro_batches_and_padding(make_run, make_language_policy):
    policy = make_language_policy(noise=0.05, dtype=torch.float64)
    trainer = make_run(policy=policy, kl="k2_loss", loss_type="grpo", max_completion_length=20)
    batch, (keep, _, _), _ = estimated(trainer)
    assert batch.sequences.mask.sum(1).unique().numel() > 1
    assert_micro_batches_do_not_matter(trainer, batch, keep)


def test_groups_without_spread_are_counted_and_skipped(make_run):
    trainer = make_run(rewards=(by_prompt,), beta=0.0)
    batch, (keep, _, _), metrics = estimated(trainer)
    assert metrics["frac_reward_zero_std"] == 0.25
    assert len(keep) <= 12
    assert (batch.advantages[keep] != 0).any(1).all()
    assert "kl" in metrics  # of a micro-batch, although nothing prices it


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_what_is_skipped_changes_no_gradient(make_run, make_language_policy, loss_type):
    policy = make_language_policy(noise=0.05, dtype=torch.float64)
    gradients = []
    for beta in (0.0, 1e-14):  # with a price of KL nothing is skipped
        settings = {"beta": beta, "loss_type": loss_type, "max_completion_length": 20, "temperature": 1.5}
        trainer = make_run(policy=policy, rewards=(by_prompt,), **settings)
        batch, (keep, _, counted), _ = estimated(trainer)
        losses = losses_of(trainer, batch, keep)
        gradients.append(gradient(losses.sum() / counted, policy))
        assert (len(keep) == 16) == (beta > 0)
        assert counted == 16
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-6)
    assert gradients[0].norm() > 1e-3


def test_truncated_completions_are_left_out(make_run):
    trainer = make_run(mask_truncated_completions=True, max_completion_length=20)
    batch, (keep, _, counted), metrics = estimated(trainer)
    assert 0 < metrics["completions/clipped_ratio"] < 1
    finished = trainer.collect()[0].finished
    assert keep.tolist() == finished.nonzero().squeeze(1).tolist()
    assert counted == len(keep)
    lengths = batch.sequences.mask[finished].sum(1)
    assert batch.mean_length == pytest.approx(lengths.double().mean().item())
    sampled, _ = trainer.collect()
    _, plan, _ = trainer.estimate(dataclasses.replace(sampled, finished=torch.zeros_like(finished)))
    assert len(plan.sample_indices) == 0
    assert trainer.none_left.startswith("every completion was cut off at max_completion_length")
    trainer.estimate(dataclasses.replace(sampled, finished=torch.ones_like(finished)))
    assert trainer.none_left.startswith("equal rewards"), "what is said of one epoch is not said of the next"


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_truncated_completions_add_nothing_and_are_counted_among_all(loss_type, make_run, make_language_policy):
    """Means over completions divide by all of them, as if those cut off had a loss of 0; one over tokens does not."""
    policy = make_language_policy(noise=0.05, dtype=torch.float64)
    trainer = make_run(policy=policy, mask_truncated_completions=True, max_completion_length=20, loss_type=loss_type)
    batch, (keep, _, counted), _ = estimated(trainer)
    assert 0 < len(keep) < 16
    losses = losses_of(trainer, batch, keep)
    scored = policy.score(batch.sequences)
    tokens, _ = trainer.surrogate(scored, policy.log_probs(scored), batch.logp_old, batch.advantages)
    ended = scored.mask & trainer.collect()[0].finished[:, None]
    if loss_type == "dapo":
        expected = tokens[ended].mean()
    else:
        lengths = scored.mask.sum(1) if loss_type == "grpo" else 20
        expected = (torch.where(ended, tokens, 0.0).sum(1) / lengths).sum() / 16
    torch.testing.assert_close(losses.sum() / counted, expected, atol=1e-12, rtol=1e-9)


def test_two_rewards_with_weights(make_run):
    trainer = make_run(rewards=((short, 0.5), (even, 2.0)), temperature=2.0, beta=0)
    sampled, metrics = trainer.collect()
    expected = 0.5 * sampled.scores[:, 0] + 2.0 * sampled.scores[:, 1].nan_to_num(0.0)
    torch.testing.assert_close(sampled.rewards, expected)
    batch, *_ = trainer.estimate(sampled)
    of_sum = group_advantages(expected, torch.arange(16) // 4)
    torch.testing.assert_close(batch.advantages[:, 0], of_sum.to(batch.advantages), atol=1e-6, rtol=1e-5)
    assert metrics["rewards/short/mean"] == pytest.approx(sampled.scores[:, 0].mean().item())

    each = make_run(
        rewards=((short, 0.5), (short, 2.0)), temperature=2.0, multi_objective_aggregation="normalize_then_sum", beta=0
    )
    batch, _, _ = estimated(each)
    one = make_run(rewards=(short,), temperature=2.0, beta=0)
    alone, _, _ = estimated(one)
    torch.testing.assert_close(batch.advantages[:, 0], 2.5 * alone.advantages[:, 0])
    assert each.rewards.names == ["short", "short_2"]


def test_extreme_log_probs_under_padding_leave_gradients_finite(make_run, make_language_policy):
    policy = make_language_policy(noise=0.05)
    trainer = make_run(policy=policy, kl="k3_loss", kl_gradient="direct", max_completion_length=20)
    batch, (keep, _, _), _ = estimated(trainer)
    outside = ~batch.sequences.mask
    assert outside.any()
    batch.logp_old[outside], batch.logp_ref[outside] = -math.inf, 1e30
    losses = losses_of(trainer, batch, keep)
    assert losses.isfinite().all()
    assert gradient(losses.sum(), trainer.policy).isfinite().all()


def test_a_reward_that_fails_ends_the_run_with_its_sentence(make_run):
    from diffusion_align.rewards.base import RewardError

    def too_few(prompts, completions, **columns):
        return [1.0]

    trainer = make_run(rewards=(too_few,))
    with pytest.raises(RewardError, match="'too_few' returned 1 score for 8 completions"):
        trainer.train()

    def silent(prompts, completions, **columns):
        return [None] * len(prompts)

    with pytest.raises(RewardError, match="every reward returned None for sample 0"):
        make_run(rewards=(silent,), output_dir=trainer.folder.parent / "silent").train()


def test_it_learns_to_stop(make_run):
    trainer = make_run(
        epochs=12, learning_rate=0.02, samples_per_epoch=32, micro_batch_size=32, beta=0.0, temperature=1.5
    )
    trainer.train()
    rewards = [row["reward"] for row in rows_of(trainer.folder) if "reward" in row]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0
    assert (trainer.folder / "final" / "adapter_model.safetensors").is_file()
    assert (trainer.folder / "samples" / "before_after.jsonl").is_file()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_reference_that_is_not_finite_is_named(make_run, beta, monkeypatch):
    from diffusion_align.llm.policy import LanguagePolicy

    trainer = make_run(beta=beta)
    sampled, _ = trainer.collect()
    monkeypatch.setattr(LanguagePolicy, "log_probs", lambda self, scored: torch.full(scored.mask.shape, torch.nan))
    with pytest.raises(TrainingError, match="the reference gives log-probs that are not finite"):
        trainer.estimate(sampled)


def test_a_batch_that_cannot_be_sampled_ends_the_run(make_run):
    trainer = make_run()
    with torch.no_grad():
        next(iter(trainer.trainable.values())).fill_(torch.nan)
    with pytest.raises(TrainingError, match="the language model gives log-probs that are not finite"):
        trainer.collect()


def test_a_first_pass_off_one_is_refused_in_float32_only(make_run):
    off = {"ratio/max": 1.02, "ratio/min": 0.97}
    with pytest.raises(TrainingError, match=r"the ratio is 0.03 off 1 before any update.*logp_old=recomputed"):
        make_run().check_update(off, first=True)
    with pytest.raises(TrainingError, match=r"as it scored them before: use another model$"):
        make_run(logp_old="recomputed").check_update(off, first=True)
    assert make_run().check_update(off, first=False) == {}
    rounded = {"ratio/max": 1.009, "ratio/min": 1.0}
    assert make_run().check_update(rounded, first=True)["ratio/first_pass_deviation"] == pytest.approx(0.009)
    for narrow in ({"mixed_precision": "bf16"}, {"dtype": "bfloat16"}):
        found = make_run(**narrow).check_update(off, first=True)
        assert found["ratio/first_pass_deviation"] == pytest.approx(0.03)


def test_recomputed_log_probs_are_those_of_scoring(make_run, make_language_policy, monkeypatch):
    """Whatever the sampler's log-probs are off by, as in bf16 with its cache: scored once more, ratios start at 1."""
    sample = GRPOTrainer.sample

    def off(*arguments):
        rows, found = sample(*arguments)
        found.completions.logp_old.add_(0.05 * found.completions.sequences.mask)
        return rows, found

    monkeypatch.setattr(GRPOTrainer, "sample", off)
    deviations = {}
    for kind in ("rollout", "recomputed"):
        policy = make_language_policy(noise=0.05)
        trainer = make_run(policy=policy, logp_old=kind, mixed_precision="bf16", micro_batch_size=16)
        batch, _, metrics = estimated(trainer)
        every = torch.arange(16)
        _, statistics = trainer.loss(batch, every, torch.zeros_like(every))
        ratios = {f"ratio/{end}": getattr(statistics["ratio/mean"], end)().item() for end in ("min", "max")}
        deviations[kind] = trainer.check_update(ratios, first=True)["ratio/first_pass_deviation"]
        if kind == "recomputed":
            assert metrics["ratio/rollout_deviation"] == pytest.approx(1 - math.exp(-0.05), abs=1e-4)
        else:
            assert "ratio/rollout_deviation" not in metrics
        assert batch.logp_old.masked_select(~batch.sequences.mask).abs().sum() == 0
    assert deviations["recomputed"] == 0
    assert deviations["rollout"] == pytest.approx(1 - math.exp(-0.05), abs=1e-4)


def test_a_completion_without_a_reward_has_no_advantage(make_run):
    """None from the only reward: left out of its group's mean and std, of the epoch's reward and of the updates."""

    def hesitant(prompts, completions, **columns):
        return [None if i % 4 == 1 else float(i % 4) for i in range(len(completions))]

    batch, (keep, _, _), metrics = estimated(make_run(rewards=((hesitant, 2.0),), beta=0.0))
    advantages = batch.advantages[:, 0].view(-1, 4)
    root = math.sqrt(7 / 3)  # of 0, 4 and 6: the mean is 10/3, the variance 28/3
    expected = torch.tensor([-10 / 3, 0.0, 2 / 3, 8 / 3]) / (2 * root)
    torch.testing.assert_close(advantages, expected.expand_as(advantages).to(advantages), atol=1e-6, rtol=1e-6)
    assert keep.tolist() == [i for i in range(16) if i % 4 != 1]
    assert metrics["frac_without_reward"] == 0.25
    assert metrics["reward"] == pytest.approx(10 / 3)
    assert metrics["frac_reward_zero_std"] == 0


def test_a_reference_is_kept_where_a_setting_asks_for_one():
    def kept(kind, **settings):
        return kind(model="tiny-lm", output_dir="y", prompts=["x"], reward="length", **settings).needs_reference

    stop = {"stop_when": {"kl_above": 1.0}, "evaluation": {"reward": "length"}}
    for kind in (OnlineConfig, GRPOConfig):  # the first as a method of one's own has it
        assert [kept(kind), kept(kind, **stop)] == [False, True]
    assert kept(OnlineConfig, reference_model="owner/z")
    assert kept(GRPOConfig, beta=0.1)


def test_groups_with_equal_rewards_are_counted_without_those_that_have_none():
    rewards = torch.tensor([[1, 1, math.nan], [1, math.nan, 2], [math.nan] * 3, [2, 3, 3]])
    assert equal_reward_metric(rewards.flatten(), 3)["frac_reward_zero_std"] == 0.5
