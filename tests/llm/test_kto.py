"""KTO: values and gradients against plain forward passes, the reference point, judging online, a run that learns."""

import math
from dataclasses import replace

import pytest
import torch

from diffusion_align.data.text_rows import LabelledRow
from diffusion_align.errors import ConfigError
from diffusion_align.estimators import kto_loss
from diffusion_align.llm.kto import KTOConfig, KTOTrainer, mismatched_prompts
from diffusion_align.llm.policy import LoRAConfig
from tests.helpers.enumerable import gradient
from tests.helpers.hard_runs import rows_of
from tests.helpers.oracles import F64
from tests.helpers.problems import assert_problem
from tests.helpers.text_trainers import (
    Part,
    estimated,
    losses_of,
    plain,
    preference_trainer,
    problems_of,
    score,
    scores_of,
)
from tests.helpers.tiny_runs import changes

BETA = 0.3
EXACT = {"atol": 1e-10, "rtol": 1e-8}
ROWS = [
    LabelledRow("x", [5, 6, 7], [30, 31, 3], True),
    LabelledRow("x", [5, 6, 7], [12, 3], False),
    LabelledRow("x", [8, 9, 10, 11, 12, 13], [14, 3], True),
    LabelledRow("x", [8, 9, 10, 11, 12, 13], [21, 22, 23, 24, 25, 3], False),
    LabelledRow("x", [20], [21, 22, 23, 3], True),
    LabelledRow("x", [4, 4], [36, 3], False),
]


@pytest.fixture
def make(make_language_policy, tmp_path):
    def build(rows=ROWS, policy=None, **settings):
        policy = policy or make_language_policy("llama", noise=0.1, dtype=F64)
        return preference_trainer(KTOTrainer, policy, tmp_path, rows, **({"beta": BETA} | settings))

    return build


def ratio(policy, ids, completion):
    """log pi - log pi_ref of one completion."""
    now = plain(policy, ids, completion).sum()
    with torch.no_grad(), policy.reference():
        ref = plain(policy, ids, completion).sum()
    return now - ref


def texts_of(sequences):
    """Prompt and completion of each, as lists of tokens."""
    prompts = [ids[:start].tolist() for ids, start in zip(sequences.ids, sequences.starts)]
    return list(zip(prompts, sequences.tokens, strict=True))


def reference_point(policy, rows, most=64):
    pairs = [(other, rows[i][1]) for i, other in mismatched_prompts([ids for ids, _ in rows], most)]
    return torch.stack([ratio(policy, *pair) for pair in pairs]).mean().detach()


@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_value_and_gradient_are_those_of_plain_forward_passes(make, inner_epochs):
    trainer = make(desirable_weight=1.3, undesirable_weight=0.6, inner_epochs=inner_epochs)
    policy = trainer.policy
    batch, (keep, actions, _), metrics = estimated(trainer)
    assert (len(keep), actions) == (6, 1)
    rows = texts_of(batch.sequences)
    z = reference_point(policy, rows)
    assert abs(z) > 1e-3
    assert metrics["reference_point_raw"] == pytest.approx(z.item(), abs=1e-10)
    assert metrics["reference_point"] == max(metrics["reference_point_raw"], 0)

    l = torch.stack([ratio(policy, *one) for one in rows])  # noqa: E741 - the paper's symbol
    labels = {tuple(r.completion): r.desirable for r in ROWS}
    desirable = torch.tensor([labels[tuple(completion)] for _, completion in rows])
    z = z.clamp(min=0)
    expected = torch.where(desirable, 1.3 * torch.sigmoid(BETA * (z - l)), 0.6 * torch.sigmoid(BETA * (l - z)))
    losses, statistics = trainer.loss(batch, torch.arange(6), torch.zeros(6))
    torch.testing.assert_close(losses, expected, **EXACT)
    torch.testing.assert_close(gradient(losses.sum(), policy), gradient(expected.sum(), policy), **EXACT)
    torch.testing.assert_close(statistics["rewards/chosen"], BETA * l[desirable].detach(), **EXACT)
    torch.testing.assert_close(statistics["rewards/rejected"], BETA * l[~desirable].detach(), **EXACT)
    right = torch.where(desirable, l > z, l < z)
    assert torch.equal(statistics["rewards/accuracies"], right.double())


@pytest.mark.parametrize("point", [0.7, -0.7])
def test_the_loss_is_the_estimators_with_the_epochs_reference_point(make, point):
    trainer = make()
    batch, *_ = estimated(trainer)
    batch = replace(batch, reference_point=torch.tensor(point, dtype=F64))
    losses = losses_of(trainer, batch, range(6))
    l = torch.stack([ratio(trainer.policy, *one) for one in texts_of(batch.sequences)])  # noqa: E741
    torch.testing.assert_close(losses, kto_loss(l, batch.desirable, torch.tensor(max(point, 0.0)), BETA), **EXACT)


def test_at_the_reference_the_loss_is_one_half(make, make_language_policy):
    trainer = make(policy=make_language_policy(dtype=F64))
    batch, _, metrics = estimated(trainer)
    losses, statistics = trainer.loss(batch, torch.arange(6), torch.zeros(6))
    assert metrics["reference_point_raw"] == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(losses, torch.full((6,), 0.5, dtype=F64), atol=1e-12, rtol=0)
    assert (statistics["drift"].abs() < 1e-12).all()


def test_neither_batches_nor_their_order_change_the_point_the_loss_or_the_gradient(make):
    whole = make()
    policy = whole.policy
    batch, *_ = estimated(whole)
    losses = losses_of(whole, batch, range(6))
    slope = gradient(losses.sum(), policy)
    for size in (1, 2, 3):
        other = make(policy=policy, sample_batch_size=size, micro_batch_size=size)
        again, *_ = estimated(other)
        torch.testing.assert_close(again.reference_point, batch.reference_point, atol=1e-12, rtol=0)
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    parts = losses_of(whole, batch, *order.split(2))
    torch.testing.assert_close(parts, losses[order], **EXACT)
    torch.testing.assert_close(gradient(parts.sum(), policy), slope, **EXACT)
    batch.sequences.ids[batch.sequences.attention_mask == 0] = 17
    torch.testing.assert_close(losses_of(whole, batch, range(6)), losses, **EXACT)


@pytest.mark.parametrize("most", [64, 5, 3])
def test_two_processes_have_the_sum_of_one_between_them(make, most):
    whole = make(sample_batch_size=1, kl_samples=most)
    batch, *_ = estimated(whole)
    parts = [Part(0), Part(1)]
    for part in parts:
        trainer = make(policy=whole.policy, sample_batch_size=1, accelerator=part, kl_samples=most)
        own, *_ = estimated(trainer)
        assert own.pairs == batch.pairs == min(most, 6)
        assert len(own.sequences) == 3
        torch.testing.assert_close(own.reference_point * batch.pairs, part.reduced[0])  # of all, not of its own
    total = sum(part.reduced[0] for part in parts)
    torch.testing.assert_close(total / batch.pairs, batch.reference_point, atol=1e-12, rtol=0)


def test_a_pair_is_never_matched_and_they_are_spread():
    a, b, c = [1], [2], [3]
    assert mismatched_prompts([a, b, c], 64) == [(0, b), (1, c), (2, a)]
    assert mismatched_prompts([a, a, b, b], 64) == [(0, b), (1, b), (2, a), (3, a)]
    assert [i for i, _ in mismatched_prompts([a, b] * 6, 4)] == [0, 3, 6, 9]
    assert mismatched_prompts([a, a], 64) == []


def test_a_long_prompt_of_another_row_is_cut_to_fit(make):
    """The model has 64 positions; the prompt's end is what is kept."""
    long, short = list(range(4, 36)) + [5] * 28, [20]
    rows = [LabelledRow("x", long, [7, 8, 3], True), LabelledRow("x", short, [9] * 20 + [3], False)]
    trainer = make(rows)
    batch, *_ = estimated(trainer)
    found = {tuple(c): p for p, c in texts_of(batch.mismatched)}
    assert found == {(7, 8, 3): short, (*[9] * 20, 3): long[-43:]}


# -- online ------------------------------------------------------------------------------------------------------------


def test_online_better_than_the_groups_mean_is_desirable(make):
    trainer = make(reward=score)
    batch, metrics = trainer.collect()
    rewards = scores_of(batch)
    mean = rewards.view(6, 4).mean(1).repeat_interleave(4)
    assert torch.equal(batch.keep, (rewards != mean).nonzero().squeeze(1))
    assert torch.equal(batch.desirable, rewards > mean)
    assert metrics["desirable"] == (rewards > mean).double().mean().item()
    assert 0 < batch.desirable.sum() < 24
    starts = batch.mismatched.starts.tolist()
    assert all(
        other[:s].tolist() != own[:e].tolist()
        for other, s, own, e in zip(batch.mismatched.ids, starts, batch.sequences.ids, batch.sequences.starts.tolist())
    )


def test_online_above_a_given_reward_is_desirable_and_equal_is_dropped(make):
    trainer = make(reward=score)
    rewards = scores_of(trainer.collect()[0])
    limit = rewards.sort().values[12].item()  # one of them
    batch, _ = make(policy=trainer.policy, reward=score, desirable_above=limit).collect()
    assert torch.equal(batch.keep, (rewards != limit).nonzero().squeeze(1))
    assert len(batch.keep) < 24
    assert torch.equal(batch.desirable[batch.keep], rewards[batch.keep] > limit)


def test_online_ties_are_dropped_and_counted(make):
    batch, metrics = make(reward=lambda completions: [0.1] * len(completions)).collect()
    assert len(batch.keep) == 0
    assert metrics["frac_reward_zero_std"] == 1.0


# -- runs and settings -------------------------------------------------------------------------------------------------


def test_a_short_run_learns_the_labels(make, make_language_policy, tmp_path):
    make(policy=make_language_policy(), epochs=12, learning_rate=5e-3).train()
    rows = rows_of(tmp_path)
    steps = [r for r in rows if "rewards/accuracies" in r]
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert steps[0]["rewards/accuracies"] == 0.5
    assert steps[-1]["rewards/accuracies"] > 0.8
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"] + 0.5
    assert steps[-1]["rewards/margins"] == pytest.approx(steps[-1]["rewards/chosen"] - steps[-1]["rewards/rejected"])
    assert steps[-1]["loss"] < 0.45
    assert all(math.isfinite(r["reference_point_raw"]) for r in rows if "reference_point_raw" in r)


@pytest.mark.parametrize("reward", [None, score], ids=["labels", "online"])
def test_adapters_drop_out_in_training_passes_alone(make, make_language_policy, reward):
    """What is sampled, the reference point and losses outside of a training pass are those without dropout."""

    def trained(dropout, step=0):
        policy = make_language_policy("llama", noise=0.1, dtype=F64, lora=LoRAConfig(rank=4, dropout=dropout))
        trainer = make(policy=policy, reward=reward)
        batch, plan, _ = estimated(trainer)
        trainer.step, keep = step, plan.sample_indices
        evaluated = losses_of(trainer, batch, keep)
        training = trainer.accumulate(batch, torch.stack([keep, torch.zeros_like(keep)], 1), len(keep))
        loss = training.over_processes(trainer.accelerator)["loss"]
        slope = torch.cat([p.grad.flatten() for p in policy.trainable.values()])
        assert torch.equal(losses_of(trainer, batch, keep), evaluated)
        return texts_of(batch.sequences), batch.reference_point, evaluated, loss, slope

    (texts, point, losses, loss, slope), dropped = trained(0.0), trained(0.5)
    assert loss == pytest.approx(losses.mean().item())
    assert str(dropped[0]) == str(texts)
    assert torch.equal(dropped[1], point)
    assert torch.equal(dropped[2], losses)
    assert abs(dropped[3] - loss) > 1e-3
    assert (dropped[4] - slope).abs().max() > 0.01 * slope.abs().max()
    again, later = trained(0.5), trained(0.5, step=1)
    assert torch.equal(again[4], dropped[4])
    assert abs(later[3] - dropped[3]) > 1e-3, "each update has masks of its own"


def test_a_short_run_with_dropout_learns_the_labels(make, make_language_policy, tmp_path):
    policy = make_language_policy(lora=LoRAConfig(rank=4, dropout=0.2))
    make(policy=policy, epochs=12, learning_rate=5e-3).train()
    steps = [r for r in rows_of(tmp_path) if "rewards/accuracies" in r]
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"] + 0.5
    assert steps[-1]["loss"] < 0.45


def test_an_update_with_one_label_only_has_no_margin(make, make_language_policy, tmp_path):
    rows = [LabelledRow("x", r.ids, r.completion, True) for r in ROWS]
    make(rows, make_language_policy()).train()
    steps = rows_of(tmp_path)
    assert "rewards/chosen" in steps[0]
    assert not {"rewards/rejected", "rewards/margins"} & steps[0].keys()


SAMPLED = "dataset=null; prompts=[x]; reward=length; "


@pytest.mark.parametrize(
    ("settings", "name", "kind"),
    [
        ("beta=0", "beta=0", "greater than 0"),
        ("desirable_weight=0; undesirable_weight=0", "desirable_weight and undesirable_weight", "both 0"),
        ("desirable_above=0.5", "desirable_above", "dataset has labels"),
        (SAMPLED + "num_generations=64", "samples_per_epoch=64", "one prompt"),
        (SAMPLED + "num_generations=1", "group_size=1", "nothing to compare"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence_each(settings, name, kind):
    assert_problem(*problems_of(KTOConfig, **changes(settings)), name, kind)


def test_data_with_one_prompt_is_refused(make):
    with pytest.raises(ConfigError, match=r"^dataset holds one prompt"):
        make(ROWS[:2])
