"""Batch sizes and precision that a run measures: the rule, what is measured, and that nothing else changes by it."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.diffusion import pass_times
from diffusion_align.diffusion.ddpo import DDPOTrainer
from diffusion_align.diffusion.pass_times import PolicyPasses, measure_policy
from diffusion_align.errors import ConfigError
from diffusion_align.methods import method_of
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.training import batch_sizes
from diffusion_align.training.batch_sizes import Stopwatch, Work, choose, decide, doubling, search
from diffusion_align.training.config import multiple_checks
from diffusion_align.training.launch import kept_sizes
from diffusion_align.training.reading import load_yaml
from tests.helpers.tiny_runs import TINY

AUTO = {"sample_batch_size": "auto", "micro_batch_size": "auto"}
RUN = TINY | {"reward": "jpeg_compressibility", "prompts": ["a red apple", "a cat"], "samples_per_epoch": 8}
METHODS = {
    "ddpo": {"method": "ddpo"},
    "rwr": {"method": "rwr"},
    "forward": {"method": "forward"},
    "forward, groups": {"method": "forward", "objective": "dgpo", "group_size": 2},
    "reward_gradient": {"method": "reward_gradient", "reward": "aesthetic", "evaluation": None, "last_steps": 2},
    "diffusion_dpo": {"method": "diffusion_dpo", "beta": 1.0, "group_size": 2},
}


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),  # nothing gained
        ({1: 1.0, 2: 1.0, 4: 1.0}, 4),
        ({1: 1.0, 2: 1.2, 4: 2.35}, 2),  # 2 % are no gain
        ({1: 1.0, 2: 1.2, 4: 2.3}, 4),  # 4 % are
        ({1: 1.0, 2: 1.0, 4: 3.0}, 2),  # slower again
    ],
)
def test_choose(seconds, expected):
    assert choose(list(seconds), list(seconds.values())) == expected
    assert choose(list(seconds)[::-1], list(seconds.values())[::-1]) == expected


def test_choose_refuses_what_it_was_not_told():
    with pytest.raises(ValueError, match="must be as many"):
        choose([1, 2], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        choose([], [])


@pytest.mark.parametrize(
    ("count", "divisors", "powers"),
    [
        (1, [1], [1]),
        (8, [1, 2, 4, 8], [1, 2, 4, 8]),
        (24, [1, 2, 4, 8, 24], [1, 2, 4, 8, 16, 24]),
        (10, [1, 2, 5, 10], [1, 2, 4, 8, 10]),
        (7, [1, 7], [1, 2, 4, 7]),
    ],
)
def test_doubling(count, divisors, powers):
    assert doubling(count) == divisors
    assert doubling(count, dividing=False) == powers


class Clock:
    """Time passes only where something is measured."""

    def __init__(self, seconds):
        self.now, self.seconds, self.asked = 0.0, seconds, []

    def __call__(self):
        return self.now

    def of(self, size):
        self.asked.append(size)
        if size not in self.seconds:
            raise torch.OutOfMemoryError
        self.now += self.seconds[size]
        return self.seconds[size]


UP_TO_64 = [1, 2, 4, 8, 16, 32, 64]


def flat(sizes):
    return dict.fromkeys(sizes, 0.1)


def test_a_search_ends_with_the_gain():
    clock = Clock(flat(UP_TO_64) | {32: 0.2})
    assert search(UP_TO_64, clock.of, clock=clock) == ({1: 0.1, 8: 0.1, 16: 0.1, 32: 0.2}, False)
    clock = Clock(flat(UP_TO_64) | {8: 1.0, 16: 1.0})  # what 8 does not gain is no end
    assert list(search(UP_TO_64, clock.of, clock=clock).seconds) == [1, 8, 16, 32, 64]
    clock = Clock(flat([3, 12, 24]))
    assert list(search([3, 12, 24], clock.of, clock=clock).seconds) == [3, 12, 24]


def test_a_search_ends_after_some_seconds():
    clock = Clock(flat(UP_TO_64) | {16: 2.1})
    assert list(search(UP_TO_64, clock.of, clock=clock).seconds) == [1, 8, 16]
    clock = Clock(dict.fromkeys(UP_TO_64, 1.5))
    assert list(search(UP_TO_64, clock.of, clock=clock).seconds) == [1, 8, 16]


def test_where_one_sample_takes_too_long_it_is_the_usual_size():
    slow = {1: 3.0}
    clock = Clock(slow)
    found = decide(Work(clock.of, clock.of, samples=24, actions=20), "auto", "auto", clock=clock)
    assert (found.sample, found.micro) == (8, 8)
    assert found.seconds == 6.0
    assert clock.asked == [1, 1]


def test_others_on_the_machine_do_not_move_its_clock(monkeypatch):
    wall, cpu = iter([0.0, 9.0]), iter([0.0, 2.0])
    monkeypatch.setattr(batch_sizes.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(batch_sizes.time, "process_time", lambda: next(cpu))
    assert batch_sizes.own_seconds()() == 2.0


@pytest.mark.parametrize(
    ("fit", "asked", "measured"),
    [
        ([1, 2, 4, 8, 16], [1, 8, 16, 32], [1, 8, 16]),
        ([1, 2], [1, 8, 4, 2], [1, 2]),
        ([1], [1, 8, 4, 2], [1]),
        ([], [1], []),
    ],
)
def test_a_search_ends_with_the_memory(fit, asked, measured):
    clock = Clock(flat(fit))
    assert search(UP_TO_64, clock.of, clock=clock) == (flat(measured), True)
    assert clock.asked == asked


def work(sampling, training, **changes):
    given = {"samples": 64, "actions": 64, "passes": 1.0} | changes
    return Work(Clock(sampling).of, Clock(training).of, **given)


def test_memory_halves_the_batch_that_is_trained_on_alone():
    fit = flat([1, 2, 4, 8, 16])
    found = decide(work(fit, fit), "auto", "auto")
    assert (found.sample, found.micro) == (16, 8)
    assert found.told == [
        "sample_batch_size 16 (2x of 8, more does not fit)",
        "micro_batch_size 8 (8x of 1, more does not fit)",
    ]
    found = decide(work(fit, fit, together=True), "auto", "auto")
    assert (found.sample, found.micro) == (8, 8)
    found = decide(work(fit, flat([1, 2, 4, 8])), "auto", "auto")
    assert found.micro == 4  # which was not measured
    found = decide(work(flat([1]), {}), "auto", "auto")
    assert (found.sample, found.micro) == (1, 1)


def test_both_are_equal_where_they_must_be():
    sampling, training = flat(UP_TO_64), {size: 0.1 * size for size in UP_TO_64}
    apart = decide(work(sampling, training), "auto", "auto", clock=lambda: 0.0)
    assert (apart.sample, apart.micro) == (64, 1)
    one = decide(work(sampling, training, passes=0.1, together=True), "auto", "auto", clock=lambda: 0.0)
    assert one.sample == one.micro == 64
    assert one.told == ["sample_batch_size and micro_batch_size 64 (1.9x of 8)"]
    # No batch of another size is left over: 64 images in batches of 16 and 80 of their steps in five.
    one = decide(work(sampling, training, passes=0.1, together=True, actions=80), "auto", "auto", clock=lambda: 0.0)
    assert one.sample == one.micro == 16


def test_a_size_that_is_given_stays():
    nothing = work({}, {})
    assert decide(nothing, 4, 2)[:2] == (4, 2)
    assert decide(dataclasses.replace(nothing, together=True), 4, "auto")[:2] == (4, 4)
    assert decide(dataclasses.replace(nothing, together=True), "auto", 2)[:2] == (2, 2)
    assert decide(work(flat(UP_TO_64), {}, together=True), "auto", 3)[:2] == (64, 3)  # which divides no epoch
    assert decide(work({}, flat(UP_TO_64)), 4, "auto")[:2] == (4, 64)
    assert decide(work({}, flat([6, 12]), unit=6, actions=12), 4, "auto")[:2] == (4, 12)
    assert math.isnan(decide(nothing, 4, 2).seconds)
    compared = decide(work({1: 0.2, 4: 0.4}, {1: 0.5, 2: 0.6}, passes=10.0), 4, 2, compared=True)
    assert compared.seconds == pytest.approx(0.4 / 4 + 10 * 0.6 / 2)


def test_a_batch_that_main_memory_is_not_expected_to_hold_is_not_tried(monkeypatch):
    resident = iter([10**9])
    monkeypatch.setattr(batch_sizes, "_peak_resident", lambda: next(resident) + 10**15)
    watch, ran = Stopwatch(torch.device("cpu")), []
    assert watch.time(lambda: ran.append(1), 1) >= 0
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 2 is expected not to fit"):
        watch.time(lambda: ran.append(2), 2)
    assert ran == [1, 1, 1]


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("lots", "it must be a number or auto"),
        ("8", "it must be a number or auto"),
        (True, "it must be a number or auto"),
        (0, "it must be greater than or equal to 1"),
        (1.5, "it must be a whole number"),
    ],
)
def test_one_sentence_about_a_bad_value(name, value, reason):
    with pytest.raises(ConfigError) as error:
        check_config(RUN | {"model": "emoji-sd", "output_dir": "run", name: value})
    assert error.value.problems == [f"{name}={value!r} is not allowed: {reason}"]


def test_text_is_not_measured():
    settings = {"method": "grpo", "model": "tiny-lm", "prompts": ["a"], "reward": "length", "output_dir": "run"}
    with pytest.raises(
        ConfigError, match=r"^sample_batch_size=auto is measured with image models alone: give a number"
    ):
        check_config(settings | {"group_size": 2, "sample_batch_size": "auto"})


def config_of(**changes):
    return check_config(RUN | {"model": "emoji-sd", "output_dir": "run"} | AUTO | changes)


def test_a_resumed_run_keeps_its_sizes(tmp_path):
    (tmp_path / "config.yaml").write_text("sample_batch_size: 4\nmicro_batch_size: 16\n")
    config = config_of(sample_batch_size=2).model_copy(update={"output_dir": tmp_path})
    kept = kept_sizes(config.model_copy(update={"resume": True}))
    assert (kept.sample_batch_size, kept.micro_batch_size) == (2, 16)
    assert kept_sizes(config).micro_batch_size == "auto"


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """``pretend(seconds)``: every pass runs once and takes ``seconds(size)``; the sizes that are measured, in order."""

    def use(seconds=lambda size: 1.0):
        sizes = []

        def time(self, run, size):
            run()
            sizes.append(size)
            return seconds(size)

        monkeypatch.setattr(Stopwatch, "time", time)
        return sizes

    return use


@pytest.mark.parametrize("name", METHODS)
def test_the_passes_are_those_of_the_method(make_policy, pretend, name):
    """As many rows as ``EpochCost`` tells ``doctor``, with guidance, and as many passes in one graph."""
    pretend()
    config = config_of(**METHODS[name], sampler={"steps": 3, "guidance_scale": 3.0}, model="emoji-sd")
    policy = make_policy("tiny_sd", guidance_scale=3.0)
    passes = PolicyPasses(config, method_of(config.method), policy, ["a cat", "a dog", "a lion"])
    rows = []
    policy.network.register_forward_hook(
        lambda network, given, output: rows.append((len(given[0]), torch.is_grad_enabled()))
    )
    passes.sampling(4)
    assert rows == [(8, False)]
    rows.clear()
    passes.training(4)
    cost = passes.cost
    assert rows == [(4 * cost.width, True)] * cost.graphs
    assert cost.graphs == (2 if name == "reward_gradient" else 1)
    assert passes.work.unit == (2 if name == "forward, groups" else 1)
    assert passes.work.actions == cost.actions // config.updates_per_epoch


@pytest.mark.parametrize("lora", [True, False])
def test_a_measurement_leaves_no_trace(make_policy, pretend, lora):
    pretend()
    policy = make_policy("tiny_sd", noise=0.1, **({} if lora else {"lora": None}))
    before = {name: p.detach().clone() for name, p in policy.network.named_parameters()}
    autocast, state = policy.autocast, torch.get_rng_state()
    values, line = measure_policy(config_of(mixed_precision="auto"), DDPOTrainer, policy, ["a cat"])
    assert values.keys() == {*AUTO, "mixed_precision"}
    assert "sample_batch_size" in line
    assert "mixed_precision=no" in line
    assert policy.autocast is autocast
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in policy.network.named_parameters())
    assert all(p.requires_grad for p in policy.trainable.values())


@pytest.mark.parametrize(("narrow", "expected"), [(0.8, "bf16"), (0.95, "no")])
def test_the_precision_is_measured_at_the_sizes_of_the_run(make_policy, monkeypatch, narrow, expected):
    sizes = []

    def time(self, run, size):
        run()
        sizes.append((size, torch.is_autocast_enabled("cpu")))
        return 1.0

    def sampled(self, size):
        with self.policy.autocast():
            return time(self, lambda: None, size) * (narrow if torch.is_autocast_enabled("cpu") else 1.0)

    monkeypatch.setattr(PolicyPasses, "sampling", sampled)
    monkeypatch.setattr(PolicyPasses, "training", sampled)
    config = config_of(mixed_precision="auto", sample_batch_size=4, micro_batch_size=8)
    values, line = measure_policy(config, DDPOTrainer, make_policy("tiny_sd"), ["a cat"])
    assert values == {"sample_batch_size": 4, "micro_batch_size": 8, "mixed_precision": expected}
    assert sizes == [(n, wide) for wide in (False, True) for n in (1, 4, 1, 8)]
    assert f"mixed_precision={expected} (bf16 is {1 / narrow:.2g}x of no)" in line


@pytest.mark.parametrize(("precision", "together"), [("no", False), ("bf16", True)])
def test_where_both_sizes_must_be_equal(make_policy, precision, together):
    policy = make_policy("tiny_sd", autocast=pass_times.autocast(precision, torch.device("cpu")))
    assert PolicyPasses(config_of(), DDPOTrainer, policy, ["a cat"]).work.together == together
    config = config_of(method="forward")
    assert not PolicyPasses(config, method_of("forward"), policy, ["a cat"]).work.together


# -- runs --------------------------------------------------------------------------------------------------------------


def weights_of(folder):
    return load_file(folder / "final/pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_of_its_own_sizes_is_that_of_the_numbers(train, pretend, tmp_path, precision):
    """Bit for bit; and a resumed one measures nothing."""
    given = RUN | {"samples_per_epoch": 16, "epochs": 2, "learning_rate": 1e-2, "mixed_precision": precision}
    measured = pretend(lambda size: 1.0 if size <= 8 else 2.0)
    _, rows = train(given | AUTO, "auto")
    assert measured
    written = load_yaml(tmp_path / "auto" / "config.yaml")
    numbers = {name: written[name] for name in AUTO}
    assert numbers == {"sample_batch_size": 8, "micro_batch_size": 8}
    measured.clear()
    _, others = train(given | numbers, "numbers")
    train(given | AUTO | {"epochs": 1}, "resumed")
    measured.clear()
    train(given | AUTO | {"resume": True}, "resumed")
    assert not measured
    assert load_yaml(tmp_path / "resumed" / "config.yaml")["sample_batch_size"] == 8
    auto, plain, resumed = (weights_of(tmp_path / name) for name in ("auto", "numbers", "resumed"))
    assert all(torch.equal(value, plain[name]) and torch.equal(value, resumed[name]) for name, value in auto.items())
    assert [row.get("reward") for row in rows] == [row.get("reward") for row in others]
    assert rows[0]["ratio/first_pass_deviation"] == 0  # equal shapes


def test_a_trainer_made_in_python_measures_too(make_policy, pretend, tmp_path, capsys):
    pretend()
    config = config_of(output_dir=str(tmp_path / "run"))
    trainer = DDPOTrainer(config, make_policy("tiny_sd"), lambda images, *_: images.mean((1, 2, 3)), [("a cat", {})])
    assert (trainer.config.sample_batch_size, trainer.config.micro_batch_size) == (8, 16)
    assert trainer.previews.batch_size == 8
    assert "sample_batch_size 8 (8x of 1), micro_batch_size 16 (2x of 8)" in capsys.readouterr().err


def test_a_trainer_made_in_python_keeps_the_sizes_of_the_run_it_resumes(make_policy, pretend, tmp_path):
    measured = pretend()
    (tmp_path / "config.yaml").write_text("sample_batch_size: 4\nmicro_batch_size: 16\n")
    config = config_of().model_copy(update={"output_dir": tmp_path, "resume": True})
    trainer = DDPOTrainer(config, make_policy("tiny_sd"), lambda images, *_: images.mean((1, 2, 3)), [("a cat", {})])
    assert (trainer.config.sample_batch_size, trainer.config.micro_batch_size) == (4, 16)
    assert not measured


def test_samples_that_processes_cannot_share_are_refused_before_anything_is_measured():
    problem = "samples_per_epoch=8 is not a multiple of 3 processes x sample_batch_size=auto: change one of them"
    assert list(multiple_checks(config_of(), "sample_batch_size", 3)) == [problem]
