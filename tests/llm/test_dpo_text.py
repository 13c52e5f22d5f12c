"""DPO and its family for text: values and gradients, the reference, what is judged online, and a run that learns."""

import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.data.text_rows import PreferenceRow
from diffusion_align.errors import CheckpointError, ConfigError
from diffusion_align.estimators import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
    trajectory_dpo_loss,
)
from diffusion_align.llm.dpo import DPOConfig, DPOTrainer, best_against, rso_pairs
from diffusion_align.llm.reference_file import ReferenceFile
from diffusion_align.llm.settings import LoRAConfig
from diffusion_align.models.lora import lora_layers
from diffusion_align.training.randomness import generator
from tests.helpers.enumerable import (
    COMPLETIONS,
    PROMPT,
    enumerable_policy,
    gradient,
    log_tables,
    reference_tables,
    token_log_probs,
)
from tests.helpers.hard_runs import rows_of
from tests.helpers.oracles import F64
from tests.helpers.problems import problem
from tests.helpers.text_trainers import (
    PROMPTS,
    Part,
    estimated,
    plain,
    preference_trainer,
    problems_of,
    score,
    scores_of,
)
from tests.helpers.tiny_runs import changes

BETA = 0.3
EXACT = {"atol": 1e-10, "rtol": 1e-8}


def row(prompt, chosen, *rejected, label=1.0):
    return PreferenceRow(" ".join(map(str, prompt)), prompt, chosen, list(rejected), label)


PAIRS = [
    row([5, 6, 7], [30, 31, 3], [12, 3]),
    row([8, 9, 10, 11, 12, 13], [14, 3], [21, 22, 23, 24, 25, 3]),
    row([20], [21, 22, 23, 3], [9, 9, 9, 3]),
    row([4, 4], [35, 3], [36, 3]),
]
RAGGED = [
    PAIRS[0],
    row([8, 9, 10, 11, 12, 13], [14, 3], [21, 22, 23, 24, 25, 3], [7, 3], [15, 16, 3]),
    row([20], [21, 22, 23, 3], [9, 9, 9, 3], [9, 3]),
    PAIRS[3],
]
LABELLED = [row(r.ids, r.chosen, *r.rejected, label=p) for r, p in zip(PAIRS, (1.0, 0.5, 0.0, 0.75))]


def test_all_completions_of_a_row_lose_the_same(make_language_policy, make):
    """Of a row with one, and of one with three rejected; in whatever micro-batch."""
    gradients, seen = [], []
    for size in (1, 4):
        policy = make_language_policy("llama", noise=0.1, dtype=F64, lora=LoRAConfig(rank=4, dropout=0.5))
        trainer = make(RAGGED, policy, micro_batch_size=size)
        batch, plan, _ = estimated(trainer)
        for layer in lora_layers(policy.model).values():
            layer.lora_dropout["default"].register_forward_hook(lambda _, given, found: seen.append((given[0], found)))
        keep = plan.sample_indices
        trainer.accumulate(batch, torch.stack([keep, torch.zeros_like(keep)], dim=1), len(keep))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable.values()]))
    given, found = seen[-1]
    lost = (found == 0) & (given != 0)
    own = lost[:, 0]  # of the first token
    # They stand row after row, of each the chosen one first; the pass has all chosen ones first.
    places = [*batch.chosen.tolist(), *(i for i in range(11) if i not in batch.chosen)]
    rows = [int((batch.chosen <= place).sum()) for place in places]
    assert len(own) == len(rows) == 11
    assert all(torch.equal(own[i], own[rows.index(row)]) for i, row in enumerate(rows))
    assert len({tuple(one.tolist()) for one in own}) == 4
    torch.testing.assert_close(*gradients)


@pytest.fixture
def make(make_language_policy, tmp_path):
    """``make(rows, policy=..., **settings)``: a trainer that is ready to collect."""

    def build(rows=PAIRS, policy=None, *, folder=tmp_path, **settings):
        policy = policy or make_language_policy("llama", noise=0.1, dtype=F64)
        beta = {} if settings.get("loss_type") == "orpo" else {"beta": BETA}
        return preference_trainer(DPOTrainer, policy, folder, rows, **(beta | settings))

    return build


def losses_of(trainer):
    """Losses and statistics of the epoch's local samples, in the order of ``epoch_rows``."""
    batch, *_ = estimated(trainer)
    samples = torch.arange(len(batch.chosen))
    return trainer.loss(batch, samples, torch.zeros_like(samples))


def epoch_rows(trainer):
    batch, _ = trainer.collect()
    tokens = batch.sequences.tokens
    return [next(r for r in trainer.rows if r.chosen == tokens[i]) for i in batch.chosen]


def plain_pair(policy, one):
    """Of a row: log-probs and the reference's, a list of (T,) each, the chosen one's first."""
    sides = [one.chosen, *one.rejected]
    now = [plain(policy, one.ids, side) for side in sides]
    with torch.no_grad(), policy.reference():
        return now, [plain(policy, one.ids, side) for side in sides]


def sums(now, ref):
    gaps = [(a - b).sum() for a, b in zip(now, ref)]
    return gaps[0][None], torch.stack(gaps[1:])[None]


def means(now):
    return now[0].mean()[None], now[1].mean()[None]


def one_rejected(loss, **options):
    def value(now, ref, label):
        chosen, rejected = sums(now, ref)
        return loss(chosen, rejected[:, 0], BETA, **options)

    return value


FAMILY = {
    "sigmoid": ({}, lambda now, ref, label: dpo_loss(*sums(now, ref), BETA)),
    "conservative": (
        {"label_smoothing": 0.2},
        lambda now, ref, label: dpo_loss(*sums(now, ref), BETA, label_smoothing=0.2),
    ),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.2}, one_rejected(robust_dpo_loss, label_smoothing=0.2)),
    "ipo": ({"loss_type": "ipo"}, one_rejected(ipo_loss)),
    "hinge": ({"loss_type": "hinge"}, one_rejected(hinge_loss)),
    "simpo": (
        {"loss_type": "simpo", "simpo_margin": 0.4},
        lambda now, ref, label: simpo_loss(*means(now), BETA, margin=0.4),
    ),
    "orpo": ({"loss_type": "orpo", "orpo_weight": 0.7}, lambda now, ref, label: orpo_loss(*means(now), 0.7)),
    "trajectory": (
        {"loss_type": "trajectory", "gamma": 0.8},
        lambda now, ref, label: trajectory_dpo_loss(
            *[(a - b)[None] for a, b in zip(now, ref)], torch.tensor([label], dtype=F64), BETA, gamma=0.8
        ),
    ),
    "with the chosen's log-prob": (
        {"sft_weight": 0.6},
        lambda now, ref, label: dpo_loss(*sums(now, ref), BETA) - 0.6 * now[0].mean(),
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_value_and_gradient_are_those_of_plain_forward_passes(make, name):
    settings, formula = FAMILY[name]
    rows = LABELLED if name == "trajectory" else PAIRS if "loss_type" in settings else RAGGED
    trainer = make(rows, **settings)
    losses, _ = losses_of(trainer)
    expected = torch.cat([formula(*plain_pair(trainer.policy, r), r.label) for r in epoch_rows(trainer)])
    torch.testing.assert_close(losses, expected, **EXACT)
    weights = torch.tensor([0.5, 1.0, -2.0, 3.0], dtype=F64)
    found, wanted = (gradient((weights * x).sum(), trainer.policy) for x in (losses, expected))
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, **EXACT)


def test_at_the_reference_the_loss_is_the_log_of_the_number_of_completions(make, make_language_policy):
    trainer = make(RAGGED, make_language_policy("gpt2", dtype=F64))
    losses, statistics = losses_of(trainer)
    expected = torch.tensor([math.log(1 + len(r.rejected)) for r in epoch_rows(trainer)], dtype=F64)
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=0)
    assert statistics["rewards/accuracies"].tolist() == [0.5] * 4
    for name in ("rewards/margins", "rewards/chosen", "drift"):
        assert statistics[name].abs().max() < 1e-12


def test_statistics_by_hand(make):
    trainer = make(RAGGED)
    _, statistics = losses_of(trainer)
    for i, one in enumerate(epoch_rows(trainer)):
        now, ref = plain_pair(trainer.policy, one)
        chosen, rejected = (x.squeeze(0).detach() for x in sums(now, ref))
        wanted = {
            "rewards/chosen": BETA * chosen,
            "rewards/rejected": BETA * rejected.mean(),
            "rewards/margins": BETA * (chosen - rejected.mean()),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "logps/chosen": now[0].sum().detach(),
            "logps/rejected": torch.stack([x.sum() for x in now[1:]]).mean().detach(),
        }
        for name, value in wanted.items():
            torch.testing.assert_close(statistics[name][i], value, msg=name, **EXACT)
    gaps = torch.cat([(a - b).detach() for r in RAGGED for a, b in zip(*plain_pair(trainer.policy, r))])
    expected = (gaps.exp() - 1 - gaps).mean()  # k3 of KL(ref||pi)
    assert statistics["drift"].mean().item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_row_preferred_the_other_way_counts_the_other_way(make):
    trainer = make([row(r.ids, r.chosen, *r.rejected, label=0.25) for r in PAIRS], loss_type="trajectory")
    sides = [sums(*plain_pair(trainer.policy, r)) for r in epoch_rows(trainer)]
    expected = [0.25 if chosen.item() > rejected.item() else 0.75 for chosen, rejected in sides]
    assert set(expected) == {0.25, 0.75}
    assert losses_of(trainer)[1]["rewards/accuracies"].tolist() == expected


@pytest.mark.parametrize("selected", [{}, {"loss_type": "ipo"}])
def test_expected_gradient_is_that_of_the_enumerated_objective(make, selected):
    """Of sum mu(y) mu(y') P(y > y') loss over all pairs of the 16 completions, written out with plain tables."""
    policy = enumerable_policy()
    rewards = torch.linspace(-1, 1, 16, dtype=F64)[torch.randperm(16, generator=generator(0, "r"))]
    pairs = list(itertools.permutations(range(16), 2))
    trainer = make([row(PROMPT, COMPLETIONS[w], COMPLETIONS[r]) for w, r in pairs], policy, **selected)
    places = {(*COMPLETIONS[w], *COMPLETIONS[r]): i for i, (w, r) in enumerate(pairs)}

    now, ref = (token_log_probs(tables).sum(1) for tables in (log_tables(policy), reference_tables(policy)))
    chance = torch.stack([(ref[w] + ref[r]).exp() * torch.sigmoid(rewards[w] - rewards[r]) for w, r in pairs])
    batch, _ = trainer.collect()
    ids = batch.sequences.completions
    order = [places[tuple(ids[w].tolist() + ids[r].tolist())] for w, (r,) in zip(batch.chosen, batch.rejected)]
    samples = torch.arange(len(pairs))
    losses, _ = trainer.loss(batch, samples, samples * 0)
    found = gradient((chance[order] * losses).sum(), policy)

    jacobian = torch.stack([gradient(x, policy) for x in _separate(policy)])
    expected = torch.zeros_like(found)
    for (w, r), p in zip(pairs, chance):
        h = (now[w] - ref[w] - now[r] + ref[r]).item()
        slope = 2 * (h - 1 / (2 * BETA)) if selected else -BETA / (1 + math.exp(BETA * h))
        expected += p * slope * (jacobian[w] - jacobian[r])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-8)


def _separate(policy):
    """log pi of each completion, each with a graph of its own."""
    for i in range(16):
        yield token_log_probs(log_tables(policy))[i].sum()


def test_neither_padding_nor_the_micro_batch_changes_loss_or_gradient(make):
    whole = make(RAGGED, sft_weight=0.3)
    batch, _ = whole.collect()

    def of(*parts):
        losses = torch.cat([whole.loss(batch, torch.tensor(p), torch.zeros(len(p)))[0] for p in parts])
        return losses.detach(), gradient(losses.sum(), whole.policy)

    losses, slope = of([0, 1, 2, 3])
    alone, slope_alone = of([0], [1], [2], [3])
    turned, slope_turned = of([3, 1], [2, 0])
    torch.testing.assert_close(alone, losses, **EXACT)
    torch.testing.assert_close(turned, losses[[3, 1, 2, 0]], **EXACT)
    torch.testing.assert_close(slope_alone, slope, **EXACT)
    torch.testing.assert_close(slope_turned, slope, **EXACT)
    batch.sequences.ids[batch.sequences.attention_mask == 0] = 17
    torch.testing.assert_close(of([0, 1, 2, 3])[0], losses, **EXACT)


def test_one_forward_pass_a_micro_batch_and_one_for_the_reference(make):
    trainer = make(RAGGED)
    seen = []
    score_ = trainer.policy.score
    trainer.policy.score = lambda s, **o: seen.append(len(s)) or score_(s, **o)
    losses_of(trainer)
    completions = sum(1 + len(r.rejected) for r in RAGGED)
    assert seen == [completions, completions]


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_losses_without_a_reference_never_ask_it(make, make_language_policy, loss_type):
    policy = make_language_policy(lora=None, needs_reference=False)
    trainer = make(PAIRS, policy, loss_type=loss_type, inner_epochs=2)
    assert not trainer.config.needs_reference
    losses, statistics = losses_of(trainer)
    assert losses.isfinite().all()
    assert "drift" not in statistics
    trainer.train()


# -- the reference -----------------------------------------------------------------------------------------------------


def test_looking_once_an_epoch_is_looking_every_time(make):
    policy = make().policy
    every, once = make(RAGGED, policy), make(RAGGED, policy, inner_epochs=2)
    batch, *_ = estimated(once)
    policy.reference = None  # any further look would fail
    known = once.loss(batch, torch.arange(4), torch.zeros(4))[0].detach()
    del policy.reference
    torch.testing.assert_close(known, losses_of(every)[0].detach(), **EXACT)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_precomputed_log_probs_are_the_live_ones(make, make_language_policy, tmp_path, lora):
    """Also of a fully trained model that keeps no frozen copy; the file is read by whoever comes next."""
    settings = {"noise": 0.1} if lora else {"lora": None}
    live = make(RAGGED, make_language_policy(dtype=F64, **settings), folder=tmp_path / "live")
    if not lora:
        live.policy._frozen.double()
    kept = settings if lora else {"lora": None, "needs_reference": False}
    policy = make_language_policy(dtype=F64, **kept)
    trainer = make(RAGGED, policy, precompute_ref_log_probs=True, sample_batch_size=2)
    assert not trainer.config.needs_reference
    trainer.collect()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["reference.safetensors"]

    for one in (live.policy, policy):  # train a little, alike
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in one.trainable.values():
                parameter.add_(0.05 * torch.randn_like(parameter))
    again = make(RAGGED, policy, precompute_ref_log_probs=True)
    again.step = 1
    losses, expected = losses_of(again)[0], losses_of(live)[0]
    assert (expected - math.log(2)).abs().min() > 1e-4
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient(losses.sum(), policy), gradient(expected.sum(), live.policy), **EXACT)


def test_a_resumed_run_reads_the_file_and_goes_on_as_if_uninterrupted(
    make, make_language_policy, tmp_path, monkeypatch
):
    settings = {"precompute_ref_log_probs": True, "lora": None, "checkpoint_every": 1, "learning_rate": 1e-3}

    def run(folder, epochs, **more):
        policy = make_language_policy(lora=None, needs_reference=False)
        make(RAGGED, policy, folder=tmp_path / folder, epochs=epochs, **settings, **more).train()
        return rows_of(tmp_path / folder)

    whole = run("whole", 3)
    run("parts", 1)
    monkeypatch.setattr(ReferenceFile, "_compute", lambda *_: pytest.fail("computed again"))
    assert run("parts", 3, resume=True) == whole
    (tmp_path / "parts" / "reference.safetensors").unlink()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"reference.safetensors is gone and the model has been trained since"):
        run("parts", 4, resume=True)


def test_a_file_of_other_rows_or_a_damaged_one_is_refused_and_a_kill_leaves_none(make, tmp_path, monkeypatch):
    path = tmp_path / "reference.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(RAGGED, precompute_ref_log_probs=True).collect()
    assert not path.exists()
    make(RAGGED, precompute_ref_log_probs=True).collect()
    others = [*RAGGED[:3], row([4, 4], [35, 3], [37, 3])]
    with pytest.raises(CheckpointError, match="the rows have changed since this run began"):
        make(others, precompute_ref_log_probs=True).collect()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is damaged"):
        make(RAGGED, precompute_ref_log_probs=True).collect()


def test_two_processes_divide_the_rows_of_one(make):
    policy = make().policy
    whole = losses_of(make(RAGGED, policy, sample_batch_size=2))[0].detach()
    halves = [losses_of(make(RAGGED, policy, sample_batch_size=2, accelerator=Part(p)))[0].detach() for p in (0, 1)]
    torch.testing.assert_close(torch.cat(halves), whole, **EXACT)


# -- online ------------------------------------------------------------------------------------------------------------


def judged(make, *, reward=score, **settings):
    trainer = make(reward=reward, **settings)
    batch, metrics = trainer.collect()
    return trainer, batch, metrics, scores_of(batch)


def test_the_best_completion_is_chosen_over_the_worst(make):
    _, batch, metrics, rewards = judged(make)
    groups = rewards.view(6, 4)
    decided = groups.amax(1) > groups.amin(1)
    assert len(batch.keep) == decided.sum() > 0
    for sample in batch.keep.tolist():
        group = slice(sample // 4 * 4, sample // 4 * 4 + 4)
        other = int(batch.rejected[sample, 0])
        assert group.start <= other < group.stop
        assert rewards[sample] == rewards[group].max()
        assert rewards[other] == rewards[group].min()
        assert batch.chosen[sample] == sample
    assert metrics["frac_reward_zero_std"] == metrics["frac_without_pair"] == 1 - decided.double().mean().item()
    assert metrics["reward_gap"] == pytest.approx((groups.amax(1) - groups.amin(1)).mean().item())


def test_the_best_completion_is_chosen_over_all_worse_ones(make):
    _, batch, _, rewards = judged(make, pair_selection="best_rest")
    assert batch.rejected.shape == (24, 4)
    for sample in batch.keep.tolist():
        group = range(sample // 4 * 4, sample // 4 * 4 + 4)
        wanted = {i for i in group if rewards[i] < rewards[sample]}
        assert set(batch.rejected[sample][batch.counts[sample]].tolist()) == wanted
        assert rewards[sample] == rewards[list(group)].max()


def test_ties_are_dropped_and_counted(make):
    trainer, batch, metrics, _ = judged(make, reward=lambda completions: [1.0] * len(completions))
    assert len(batch.keep) == 0
    assert metrics["frac_reward_zero_std"] == metrics["frac_without_pair"] == 1.0
    before = [p.clone() for p in trainer.trainable.values()]
    trainer.train()  # nothing to learn from: no step
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.trainable.values()))


def test_a_worst_one_that_ties_with_the_best_is_no_rejected_one():
    rewards = torch.tensor([[1.0, 3.0, 3.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
    best, rejected, counts = best_against(rewards, rest=True)
    assert best.tolist() == [1, 0]
    assert [r[c].tolist() for r, c in zip(rejected, counts)] == [[0, 3], []]
    best, rejected, counts = best_against(rewards, rest=False)
    assert best.tolist() == [1, 0]
    assert rejected[0].tolist() == [0]
    assert counts.tolist() == [[True], [False]]


def test_rejection_sampling_accepts_and_pairs_as_it_should():
    """Acceptance at its probability; of three that are accepted each pair is as likely; the better one is chosen."""
    rewards = torch.tensor([0.0, 0.5, 1.0]).double()
    n, beta = 4000, 0.7
    streams = [generator(0, "test", i) for i in range(n)]
    accepted, chosen, rejected, counts = rso_pairs(rewards.expand(n, 3), beta, streams)
    chance = ((rewards - 1) / beta).exp()
    deviation = (accepted.double().mean(0) - chance) / (chance * (1 - chance) / n).sqrt().clamp(min=1e-9)
    assert deviation.abs().max() < 4
    assert torch.equal(counts.squeeze(1), accepted.sum(1) >= 2)
    both = counts.squeeze(1)
    assert (chosen > rejected.squeeze(1))[both].all()
    assert accepted.gather(1, chosen[:, None])[both].all()
    assert accepted.gather(1, rejected)[both].all()
    three = accepted.all(1)
    count = int(three.sum())
    for pair in ((1, 0), (2, 0), (2, 1)):
        share = ((chosen == pair[0]) & (rejected.squeeze(1) == pair[1]))[three].double().mean().item()
        assert abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / count)


def test_rejection_sampling_judges_the_references_completions(make):
    settings = {"pair_selection": "rso", "sample_from": "reference", "rso_beta": 8.0}
    trainer, batch, metrics, rewards = judged(make, **settings)
    assert len(batch.keep) == round(6 * (1 - metrics["frac_without_pair"])) > 0
    for sample in batch.keep.tolist():
        assert rewards[sample] > rewards[int(batch.rejected[sample, 0])]
    losses, _ = trainer.loss(batch, batch.keep, batch.keep * 0)
    assert losses.isfinite().all()
    with torch.no_grad():  # what the policy becomes does not change what the reference writes
        for parameter in trainer.policy.trainable.values():
            parameter.add_(0.5 * torch.randn_like(parameter))
    again, _ = trainer.collect()
    assert torch.equal(again.sequences.ids, batch.sequences.ids)
    assert torch.equal(again.keep, batch.keep)
    other = make(policy=trainer.policy, reward=score)
    assert other.collect()[0].sequences.ids.tolist() != batch.sequences.ids.tolist()


def test_a_process_finds_its_own_rejected_ones(make, monkeypatch):
    trainer, batch, _, _ = judged(make)
    halves = []
    for index in (0, 1):
        part = make(policy=trainer.policy, reward=score, accelerator=Part(index))
        monkeypatch.setattr(part, "sample", lambda *_, part=part: _own_part(trainer, part))
        halves.append(part.collect()[0])
    for index, half in enumerate(halves):
        assert torch.equal(half.keep, batch.keep)
        mine = batch.keep[(batch.keep >= 12 * index) & (batch.keep < 12 * index + 12)]
        assert torch.equal(half.rejected[mine - 12 * index], batch.rejected[mine] - 12 * index)


def _own_part(whole, part):
    """What the whole run sampled, of which a process holds its part."""
    rows, collected = whole.sample(whole.prompts, whole.config.num_generations)
    own = torch.arange(part.local_samples.start, part.local_samples.stop)
    completions = SimpleNamespace(sequences=collected.completions.sequences[own])
    return rows, SimpleNamespace(completions=completions, rewards=collected.rewards, metrics={})


def test_a_group_never_straddles_processes(make):
    with pytest.raises(ConfigError, match=problem("samples_per_epoch=12", "2 processes x group_size=4")):
        make(reward=score, accelerator=Part(0), samples_per_epoch=12, sample_batch_size=2)


# -- runs and settings -------------------------------------------------------------------------------------------------


def test_a_short_run_learns_the_preferences(make, make_language_policy, tmp_path):
    trainer = make(RAGGED, make_language_policy(), epochs=15, learning_rate=5e-3)
    trainer.train()
    steps = [r for r in rows_of(tmp_path) if "rewards/accuracies" in r]
    assert steps[0]["rewards/accuracies"] == 0.5
    assert steps[0]["loss"] == pytest.approx((2 * math.log(2) + math.log(4) + math.log(3)) / 4, abs=1e-5)
    assert steps[-1]["rewards/accuracies"] == 1.0
    assert steps[-1]["rewards/margins"] > 0.5
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert load_file(tmp_path / "final" / "adapter_model.safetensors")


def test_online_rounds_raise_the_reward(make, make_language_policy, tmp_path):
    def low(completions):
        return [-x for x in score(completions)]

    settings = {"samples_per_epoch": 32, "sample_batch_size": 32, "num_generations": 4, "updates_per_epoch": 4}
    more = {"epochs": 8, "learning_rate": 2e-2, "max_completion_length": 1, "beta": 0.1}
    make(reward=low, prompts=PROMPTS[:2], policy=make_language_policy(), **settings, **more).train()
    rewards = [r["reward"] for r in rows_of(tmp_path) if "reward" in r]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 5


SAMPLED = "dataset=null; prompts=[x]; reward=length"
WRONG = ["beta=-0.1", "dataset=null", "prompts=[x]", "gamma=0.5", "label_smoothing=0.5", "sample_from=reference"]
WRONG += ["loss_type=ipo; label_smoothing=0.1", "loss_type=orpo; sft_weight=1.0", "dynamic_beta={beta_min: 2.0}"]
WRONG += ["loss_type=simpo; precompute_ref_log_probs=true; reference_model=tiny-lm"]
WRONG += [f"{SAMPLED}; {more}" for more in ("num_generations=1", "precompute_ref_log_probs=true")]
WRONG += [f"{SAMPLED}; pair_selection={how}" for how in ("rso", "best_rest; loss_type=ipo")]


@pytest.mark.parametrize("settings", WRONG)
def test_settings_that_do_not_fit_are_one_sentence_each(settings, golden):
    [sentence] = problems_of(DPOConfig, **changes(settings))
    golden(settings, sentence)


def test_rows_that_a_loss_would_misread_are_refused(make):
    with pytest.raises(ConfigError, match="row 1 has 3 rejected, and loss_type=ipo"):
        make(RAGGED, loss_type="ipo")
    with pytest.raises(ConfigError, match=r"row 1 has the label 0\.5, and loss_type=sigmoid"):
        make(LABELLED)
