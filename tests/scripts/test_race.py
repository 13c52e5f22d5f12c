"""The race behind docs/which_method.md: what it counts, what it runs next, and what it says of its rows."""

import race
import race_run
import torch
from race import PLAIN, SHIPPED, Course
from torch import nn


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return (self.factor * x,)


def test_a_pass_is_a_row_and_its_backward_pass_two_more():
    network = Doubling()
    counter = race_run.PassCounter(network)
    with torch.no_grad():
        network(torch.ones(5, 2))
    assert counter.passes == 5
    network(torch.ones(4, 2))
    assert counter.passes == 5 + 3 * 4
    with counter.off():
        network(torch.ones(7, 2))
    assert counter.passes == 17
    counter.close()
    network(torch.ones(7, 2))
    assert counter.passes == 17


def row(method, rate, seed, role, rewards, *, passes=100):
    evaluations = [{"epoch": i, "passes": passes * i, "reward": r} for i, r in enumerate(rewards)]
    about = {"method": method, "reward": "aesthetic", "model": "emoji-sd", "commit": "c" * 40}
    return about | {
        "learning_rate": rate,
        "seed": seed,
        "role": role,
        "passes": evaluations[-1]["passes"],
        "evaluations": evaluations,
    }


def next_of(method, rows, target):
    return [
        (job.learning_rate, job.seed, job.role, limits.budget)
        for job, limits in Course("emoji-sd", "aesthetic", rows, target).jobs(method)
    ]


def test_the_shipped_recipe_runs_first_to_its_end_then_every_method_searches_before_its_three_seeds():
    assert next_of(SHIPPED, [], None) == [(0.003, seed, "final", None) for seed in (0, 1, 2)]
    assert next_of(PLAIN, [], None) == []
    rows = [row(SHIPPED, 0.003, seed, "final", [0, 1]) for seed in (0, 1, 2)]
    assert next_of(SHIPPED, rows, 1.0) == []
    windows = "DDPO, windows"
    assert next_of(windows, rows, 1.0) == [(rate, 100, "search", 150) for rate in (0.003, 0.009, 0.001)]
    rows += [row(windows, 0.003, 100, "search", [0, 0.5, 1.1], passes=50)]  # the others need not take longer
    assert next_of(windows, rows, 1.0) == [(rate, 100, "search", 100) for rate in (0.009, 0.001)]
    rows += [row(windows, 0.009, 100, "search", [0, 1.2], passes=50), row(windows, 0.001, 100, "search", [0, 0.9])]
    assert next_of(windows, rows, 1.0) == [(0.009, seed, "final", 150) for seed in (0, 1, 2)]
    rows += [row(windows, 0.009, seed, "final", [0, 1.0]) for seed in (0, 1, 2)]
    assert next_of(windows, rows, 1.0) == []


def test_where_no_learning_rate_reaches_the_target_the_highest_reward_goes_on():
    rows = [row(PLAIN, rate, 100, "search", [0, reward, 0]) for rate, reward in ((1e-3, 0.2), (3e-3, 0.7), (9e-3, 0.5))]
    assert Course("emoji-sd", "aesthetic", rows, 1.0).best(PLAIN) == 3e-3


def test_a_target_is_the_mean_end_of_the_shipped_runs_and_stays(tmp_path):
    rows = [row(SHIPPED, 0.003, seed, "final", [9, end]) for seed, end in ((0, 1.0), (1, 2.0))]
    write = lambda: (tmp_path / "rows.jsonl").write_text("".join(race.json.dumps(one) + "\n" for one in rows))  # noqa: E731
    write()
    race.fix_target(tmp_path, "emoji-sd", "aesthetic")
    assert race.read_targets(tmp_path) == {}
    rows.append(row(SHIPPED, 0.003, 2, "final", [9, 6.0]))
    write()
    race.fix_target(tmp_path, "emoji-sd", "aesthetic")
    assert race.read_targets(tmp_path)["emoji-sd/aesthetic"]["target"] == 3.0
    rows[0]["evaluations"][-1]["reward"] = 100
    write()
    race.fix_target(tmp_path, "emoji-sd", "aesthetic")
    assert race.read_targets(tmp_path)["emoji-sd/aesthetic"]["target"] == 3.0
