"""The KL of a path from few actions: which, the estimate and its error."""

import math

import pytest
import torch

from diffusion_align.diffusion.path_kl import choose_actions, path_kl
from diffusion_align.training.settings import StopConfig
from diffusion_align.training.statistics import UpdateStatistics

# Of the embedded model in ten steps, docs/ddpo.md: the last step outweighs all others.
WEIGHTS = torch.tensor([0.002, 0.008, 0.02, 0.04, 0.08, 0.13, 0.20, 0.33, 0.67, 65.0], dtype=torch.float64)
STEPS = torch.arange(3, 13)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("samples", "most", "each"), [(40, 0, 1), (40, 20, 2), (20, 40, 4), (5, 30, 3), (3, 90, 3)])
def test_every_step_is_looked_at_in_different_samples(samples, most, each):
    steps = STEPS.expand(samples, -1)
    chosen = choose_actions(steps, STEPS, torch.ones(10), most, stream())
    assert torch.equal(chosen, choose_actions(steps, STEPS, torch.ones(10), most, stream()))
    assert not torch.equal(chosen, choose_actions(steps, STEPS, torch.ones(10), most, stream(1)))
    looked = steps[chosen[:, 0], chosen[:, 1]]
    assert torch.bincount(looked)[3:].tolist() == [min(each, samples)] * 10
    assert len({tuple(pair) for pair in chosen.tolist()}) == len(chosen)
    taken = torch.bincount(chosen[:, 0], minlength=samples)
    assert taken.max() - taken.min() <= 1


def test_only_what_was_recorded_is_looked_at():
    steps = torch.stack([STEPS[torch.randperm(10, generator=stream(i))[:3].sort().values] for i in range(30)])
    chosen = choose_actions(steps, STEPS, torch.ones(10), 20, stream())
    looked = steps[chosen[:, 0], chosen[:, 1]]
    assert torch.bincount(looked)[3:].tolist() == [2] * 10
    one = STEPS[:1]  # of a single step an error needs two actions
    assert choose_actions(one.expand(4, -1), one, torch.ones(1), 2, stream()).shape == (2, 2)
    weighted = choose_actions(STEPS.expand(40, -1), STEPS, WEIGHTS, 20, stream())
    assert torch.bincount(weighted[:, 1]).tolist() == [1] * 9 + [11]


@pytest.mark.parametrize("most", [10, 20, 40])
def test_the_estimate_is_unbiased_and_its_error_is_what_it_says(most):
    samples = 400
    spread = torch.randn(samples, 10, generator=stream(), dtype=torch.float64)
    kl = WEIGHTS * (0.5 * spread).exp() * torch.linspace(2, 1, 10, dtype=torch.float64)  # 53 % between samples
    whole = kl.mean(0).sum().item()
    found = []
    for seed in range(300):
        rows, columns = choose_actions(STEPS.expand(samples, -1), STEPS, WEIGHTS, most, stream(seed)).unbind(1)
        found.append(path_kl(STEPS[columns], kl[rows, columns], STEPS, WEIGHTS))
    estimates, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    true_error = estimates.std().item()
    assert estimates.mean().item() == pytest.approx(whole, abs=3 * true_error / math.sqrt(300))
    assert 0.8 * true_error < errors.square().mean().sqrt().item() < 1.6 * true_error
    # Skewed as the KLs are, a low estimate has a low error. What a rule stops at is hardly ever more than the truth.
    assert ((estimates - whole).abs() < 2 * errors).double().mean() > 0.75
    assert (estimates - 2 * errors > whole).double().mean() < 0.025
    assert true_error < 0.75 * whole / math.sqrt(most - 9)  # most are spent on the last step


def test_what_is_all_known_has_the_plain_error_and_gaps_are_filled_by_weight():
    kl = torch.tensor([1.0, 3.0, 10.0, 14.0])
    steps = torch.tensor([5, 5, 7, 7])
    estimate, error = path_kl(steps, kl, torch.tensor([5, 7]), torch.ones(2))
    assert estimate == 14
    assert error >= math.sqrt(2 / 2 + 8 / 2)
    assert path_kl(steps[:2], kl[:2], torch.tensor([5, 7]), torch.tensor([1.0, 3.0]))[0] == pytest.approx(8)
    assert path_kl(steps[:1], kl[:1], steps[:1], torch.ones(1)) == (1.0, 1.0)  # of one action nothing is known
    assert path_kl(steps, 0 * kl, torch.tensor([5, 7]), torch.ones(2)) == (0.0, 0.0)
    with pytest.raises(ValueError, match="kl is empty"):
        path_kl(steps[:0], kl[:0], steps[:1], torch.ones(1))


def test_the_rule_waits_until_the_estimate_is_sure():
    rules = StopConfig(kl_above=8)
    assert rules.broken({"kl_path": 9.0, "kl_path_stderr": 0.5}, None) == []
    [reason] = rules.broken({"kl_path": 9.0, "kl_path_stderr": 0.49}, None)
    assert "is 9 nats (standard error 0.49), above stop_when.kl_above=8" in reason


class OneProcess:
    num_processes = 1


def test_standard_errors_of_an_update_do_not_depend_on_micro_batches():
    values = torch.tensor([1e6, 1e6 + 1, 1e6 + 3, 1e6 + 4], dtype=torch.float64)
    statistics = UpdateStatistics()
    for part, samples in zip(values.split(3), torch.arange(4).split(3), strict=True):
        statistics.add({"kl_path": part, "kl_path_stderr": part}, samples)
    found = statistics.over_processes(OneProcess())
    assert found["kl_path_stderr"] == pytest.approx(values.std().item() / 2)
    assert found["kl_path"] == pytest.approx(values.mean().item())


def test_the_steps_of_a_sample_go_together_in_its_standard_error():
    """A sample that has gone far has gone far in every step: its steps are no independent values."""
    level = torch.rand(50, 1, generator=stream(), dtype=torch.float64)
    kl = (level + 0.1 * torch.rand(50, 8, generator=stream(1), dtype=torch.float64)).flatten()
    order = torch.randperm(400, generator=stream(2))
    statistics = UpdateStatistics()
    for places in order.split(7):
        statistics.add({"kl_path_stderr": kl[places]}, places // 8)
    found = statistics.over_processes(OneProcess())["kl_path_stderr"]
    assert found == pytest.approx(kl.view(50, 8).mean(1).std().item() / math.sqrt(50))
    assert found > 2.5 * kl.std().item() / math.sqrt(400)
    statistics = UpdateStatistics()
    statistics.add({"kl_path_stderr": kl[:8]}, torch.zeros(8))
    assert "kl_path_stderr" not in statistics.over_processes(OneProcess())  # of one sample nothing is known
