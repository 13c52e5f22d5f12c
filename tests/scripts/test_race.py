"""The race behind docs/which_method.md: what it counts, what it runs next, and what it says of its rows."""

import math
import re
from types import SimpleNamespace

import pytest
import race_course as race
import race_page
import race_run
import torch
from race_course import PLAIN, SHIPPED, Course
from torch import nn

from diffusion_align.data.prompts import load_prompts
from diffusion_align.pipelines.configuration import read_config


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


def final(method, passes, held_out, reached=True):
    """The final runs of the three seeds, which reach the target 1 after ``passes`` if they do."""
    made = []
    for seed, (count, score) in enumerate(zip(passes, held_out, strict=True)):
        one = row(method, 0.003, seed, "final", [0, 1.0 if reached else 0.5], passes=count)
        for e in one["evaluations"]:
            e |= {"held_out": score, "diversity": 0.8, "kl": 5.0, "cpu_seconds": 60.0, "seconds": 70.0}
        made.append(one)
    return made


def test_passes_are_compared_by_their_logarithms_and_held_out_rewards_by_standard_errors():
    rows = final(PLAIN, (800, 1600, 3200), (0.70, 0.71, 0.72))
    rows += final("DDPO, windows", (100, 200, 400), (0.68, 0.69, 0.70))
    course = Course("emoji-sd", "aesthetic", rows, 1.0)
    plain, windows = (race_page.finish(course, method) for method in (PLAIN, "DDPO, windows"))
    spread = 2.776 * math.log(2) * (2 / 3) ** 0.5  # ln 2 is the standard deviation of both methods' log-passes
    assert race_page.fewer(plain, windows) == pytest.approx((8, 8 * math.exp(-spread), 8 * math.exp(spread)))
    assert race_page.falls_below(plain, windows)  # by .02, of which a standard error is .0082
    worse = final("DDPO, windows", (100, 200, 400), (0.685, 0.695, 0.705))
    assert not race_page.falls_below(plain, race_page.finish(Course("", "", worse, 1.0), "DDPO, windows"))


def test_a_plain_run_that_never_reached_the_target_counts_with_what_it_spent():
    rows = final(PLAIN, (800, 1600), (0.70, 0.71)) + final(PLAIN, (0, 0, 3200), (0, 0, 0.9), reached=False)[2:]
    rows += final("DDPO, windows", (100, 200, 400), (0.67, 0.68, 0.69))
    course = Course("emoji-sd", "aesthetic", rows, 1.0)
    plain, windows = (race_page.finish(course, method) for method in (PLAIN, "DDPO, windows"))
    assert race_page.fewer(plain, windows)[0] == pytest.approx(8)
    assert race_page.falls_below(plain, windows)  # .68 and .705: the run without an end has no say
    assert "| over 8.0 × (" in race_page.tables([course])


def test_losers_are_in_the_table_too_and_the_first_comes_first():
    rows = final(PLAIN, (800, 1600, 3200), (0.7, 0.71, 0.72)) + final("DDPO, windows", (100, 200, 400), (0.6, 0.6, 0.6))
    rows += final("online Diffusion-DPO", (900, 900, 900), (0.7, 0.7, 0.7), reached=False)
    lines = race_page.tables([Course("emoji-sd", "aesthetic", rows, 1.0)]).splitlines()[4:]
    assert [line.split("|")[1].strip() for line in lines] == ["DDPO, windows", PLAIN, "online Diffusion-DPO"]
    assert "8.0 × (1.7 to 38.5)" in lines[0]
    assert race_page.MARK in lines[0]
    assert "not in 900; at most 0.500" in lines[2]
    rows = [one | {"reward": "jpeg_compressibility"} for one in rows]
    last = race_page.tables([Course("emoji-sd", "jpeg_compressibility", rows, 1.0)]).splitlines()[-1]
    assert last == "| DRaFT |  | the reward has no gradient |  |  |  |  |  |  |"


def test_a_curve_is_the_mean_of_runs_between_their_evaluations_and_at_their_end():
    rows = [row(PLAIN, 1, 0, "final", [9, 1, 3]), row(PLAIN, 1, 1, "final", [9, 5])]
    xs, values = race_page._curves(rows, lambda e: e["reward"])
    assert xs.tolist() == [100, 200]
    assert values.tolist() == [[1, 3], [5, 5]]


@pytest.mark.parametrize("model", race_run.TRAINED_RANGE)
@pytest.mark.parametrize("reward", race.REWARDS)
@pytest.mark.parametrize("method", race.ENTRANTS)
def test_every_entrant_trains_the_same_adapters_on_the_same_prompts_without_guidance(method, reward, model):
    entrant = race.ENTRANTS[method]
    if reward in entrant.without:
        return
    recipe, overrides = entrant.settings(reward, model)
    shipped, none = race.ENTRANTS[SHIPPED].settings(reward, model)
    common = [f"reward={reward}", f"model={model}", "output_dir=unused"]
    mine, theirs = read_config(recipe, [*overrides, *common]), read_config(shipped, [*none, *common])
    assert [text for text, _ in load_prompts(mine.prompts)] == race_run.PROMPTS
    for name in ("lora", "attention", "max_sequence_length", "t5"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert mine.sampler.guidance_scale == 1
    assert mine.evaluation is None


@pytest.mark.parametrize("model", race_run.TRAINED_RANGE)
@pytest.mark.parametrize("method", [name for name, entrant in race.ENTRANTS.items() if entrant.searched])
def test_every_entrant_searches_three_rates_on_every_model(method, model):
    rows = [row(SHIPPED, 0.003, seed, "final", [0, 1]) for seed in (0, 1, 2)]
    assert len(list(Course(model, "aesthetic", rows, 1.0).jobs(method))) == 3


@pytest.mark.parametrize(
    ("role", "passes", "own", "reward", "why"),
    [
        ("search", 100, 0.0, 1.0, "the target is reached"),
        ("search", 100, 0.0, 0.9, None),
        ("search", 500, 0.0, 0.24, "it is hopeless"),
        ("search", 500, 0.0, 0.26, None),
        ("final", 500, 0.0, 0.0, None),
        ("final", 1000, 0.0, 0.9, "the budget is spent"),
    ],
)
def test_a_run_ends_at_its_limits(role, passes, own, reward, why):
    evaluations = race_run.Evaluations(race_run.Job("a", "b", "c", 1, 1, role), race_run.Limits(1.0, 1000), None)
    evaluations._counter = SimpleNamespace(passes=passes)
    evaluations.found = [{"reward": 0.0, "passes": 0}]
    evaluations._evaluate = lambda trainer, last: evaluations.found.append({"reward": reward, "passes": passes})
    trainer = SimpleNamespace(epoch=1, config=SimpleNamespace(epochs=9))
    assert evaluations.on_epoch_end(trainer, {"reward": own}) == why


def test_far_from_the_target_it_is_evaluated_less_often():
    evaluations = race_run.Evaluations(race_run.Job("a", "b", "c", 1, 1, "final"), race_run.Limits(1.0, 1e6), None)
    evaluations.found, seen = [{"reward": 0.0, "passes": 0}], []
    evaluations._evaluate = lambda trainer, last: evaluations.found.append({"reward": 0.5, "passes": passes})
    for epoch, own in enumerate([0.1] * 6 + [0.3] * 3, start=1):
        passes = 100 * epoch
        evaluations._counter = SimpleNamespace(passes=passes)
        evaluations.on_epoch_end(SimpleNamespace(epoch=epoch, config=SimpleNamespace(epochs=99)), {"reward": own})
        seen.append(evaluations.found[-1]["passes"])
    assert sorted(set(seen)) == [100, 200, 300, 500, 700, 800, 900]


RESULTS = race_run.ROOT / "docs" / "race"
PAGE = (race_run.ROOT / "docs" / "which_method.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_of_its_rows():
    courses = [race.course(RESULTS, *name.split("/")) for name in race.read_targets(RESULTS)]
    assert race_page.put_between_marks(PAGE, race_page.tables(courses)) == PAGE


def test_the_figure_has_a_colour_for_every_entrant():
    courses = [race.course(RESULTS, *name.split("/")) for name in race.read_targets(RESULTS)]
    figure = race_page.draw(courses)
    ran = [method for method in race.ENTRANTS if any(course.of(method, "final") for course in courses)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ran
    assert len({line.get_color() for line in legend.get_lines()}) == len(ran)


def test_the_numbers_of_the_answer_are_in_the_tables():
    answer, table = PAGE.split(race_page.BEGIN)
    found = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", answer)
    assert found
    assert [number for number in found if number not in table] == []


def test_a_row_is_of_a_commit_and_only_there_once():
    rows = race.read_rows(RESULTS)
    keys = [tuple(row[name] for name in ("method", "reward", "model", "learning_rate", "seed", "role")) for row in rows]
    assert len(set(keys)) == len(keys)
    for one in rows:
        assert re.fullmatch("[0-9a-f]{40}", one["commit"])
        assert one["command"].startswith("diffusion-align train ")
        passes = [e["passes"] for e in one["evaluations"]]
        assert passes == sorted(set(passes))
        assert passes[-1] == one["passes"]
