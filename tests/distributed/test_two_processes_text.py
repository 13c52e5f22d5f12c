"""Language models in two processes: the same rows, gradients and weights as in one, and nobody waits in vain."""

import json

import pytest

from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.yaml_text import dump
from tests.helpers.hard_runs import PREFERENCES, labels_of, rows_of
from tests.helpers.kills import QUICK
from tests.helpers.problems import assert_problem
from tests.helpers.two_processes import (
    PLAIN_STEPS,
    assert_same_gradients,
    assert_same_weights,
    end_in_a_sentence,
    run_both,
)

REWARDS = """
import os
from diffusion_align.rewards import text_of

def letters(completions, **columns):
    return [float(sum(map(ord, text)) % 17) for text in completions]

def wanted(completions, letter):
    return [None if one is None else float(text.count(one)) for text, one in zip(completions, letter)]

def flat(completions, tied):
    return [1.0 if t else float(sum(map(ord, text)) % 17) for text, t in zip(completions, tied)]

def only_one_fails(completions, **columns):
    if os.environ.get("RANK") == "1" and "" not in completions:  # the batch of the check holds an empty one
        raise RuntimeError("no answer")
    return [float(len(text)) for text in completions]

def only_one_refuses(completions, **columns):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("not here")
    return [float(len(text)) for text in completions]

def silent(completions, tied):
    return [None if t else 1.0 for t in tied]
"""
TEXTS = ["the cat", "a dog is", "who?", "one and two"]
# In the first epoch of two groups the first is of process 0 and the second of process 1.
ORDER = items_of_epoch(TEXTS, 0, 0, 2)
PROMPTS = [{"prompt": text, "letter": "a" if text == ORDER[0] else None, "tied": text == ORDER[1]} for text in TEXTS]
LABELS = labels_of(PREFERENCES)
SETTINGS = {
    "epochs": 2,
    "samples_per_epoch": 8,
    "sample_batch_size": 2,
    "micro_batch_size": 3,
    "updates_per_epoch": 2,
    "learning_rate": 0.02,
    "max_grad_norm": 100.0,
    "lora": {"rank": 2},
    "max_completion_length": 12,
    "grid_every": 0,
    "num_threads": 1,
}
ONLINE = {"prompts": PROMPTS, "reward": ["letters"], "num_generations": 4}
HELD_OUT = {"reward": "length", "samples": 5}  # two of process 0 and three of process 1
DPO = {"method": "dpo", "dataset": PREFERENCES, "beta": 0.5}
CASES = {
    "grpo, KL in the reward": ONLINE | {"method": "grpo", "beta": 0.1, "credit": "to_go", "loss_type": "grpo"},
    "grpo, a reward with nothing to say on one process": ONLINE
    | {
        "method": "grpo",
        "reward": ["letters", "wanted"],
        "reward_weights": [1.0, 2.0],
        "multi_objective_aggregation": "normalize_then_sum",
        "inner_epochs": 2,
        "ratio_level": "sequence",
    },
    "grpo, all weights": ONLINE | {"method": "grpo", "lora": None, "beta": 0.1, "kl": "full_vocabulary"},
    "ppo": ONLINE
    | {"method": "ppo", "num_generations": 2, "kl_target": 0.05, "kl_horizon": 20, "inner_epochs": 2}
    | {"evaluation": HELD_OUT},
    "dpo, several rejected": DPO | {"precompute_ref_log_probs": True, "sft_weight": 0.1, "evaluation": HELD_OUT},
    "dpo, adapters drop out": DPO | {"lora": {"rank": 2, "dropout": 0.3}},
    "dpo, dynamic beta": DPO | {"dynamic_beta": {"hidden": 8}, "inner_epochs": 2},
    "dpo, online": DPO | ONLINE | {"dataset": None, "pair_selection": "best_rest"},
    "kto": {"method": "kto", "dataset": LABELS, "beta": 0.5, "kl_samples": 3, "evaluation": HELD_OUT},
    "kto, online": ONLINE | {"method": "kto", "beta": 0.5},
    "reward_model": {"method": "reward_model", "dataset": PREFERENCES, "eval_dataset": PREFERENCES[:3]},
}


@pytest.fixture
def write(tmp_path, tiny_language_model):
    """``write(**changes)``: the path of a configuration; rewards are called by their names in mine.py."""
    (tmp_path / "mine.py").write_text(REWARDS)

    def make(**changes):
        settings = SETTINGS | {"model": str(tiny_language_model)} | changes
        if settings.get("reward"):
            settings["reward"] = [f"{tmp_path}/mine.py:{name}" for name in settings["reward"]]
        path = tmp_path / "tiny.yaml"
        path.write_text(dump(settings))
        return path

    return make


def assert_same(folders, gradients, *, without=()):
    """Rows but for the metrics ``without``, gradients and weights to rounding, and something that could differ."""
    assert_same_gradients(gradients, 1e-5)
    a, b = (rows_of(folder) for folder in folders)
    assert [row.keys() for row in a] == [row.keys() for row in b]
    without = {"ratio/first_pass_deviation", *without}  # the first is rounding and nothing else
    for mine, theirs in zip(a, b):
        # Before the first update rounding decides whether a completion is ahead of another.
        unsure = without | {"rewards/accuracies"} if mine["step"] == 1 else without
        mine, theirs = ({k: v for k, v in row.items() if k not in unsure} for row in (mine, theirs))
        assert mine == pytest.approx(theirs, rel=1e-5, abs=5e-6)  # differences of float32 sums of tens of nats
    assert_same_weights(folders)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(forked, write, tmp_path, case):
    folders, gradients = run_both(forked, write(**CASES[case]), tmp_path, PLAIN_STEPS)
    assert_same(folders, gradients)


CHECKPOINTED = """
import os
from diffusion_align.models import memory
computed = memory._checkpointed
def noted(*arguments, **named):
    if torch.is_grad_enabled():
        name = f"checkpointed_{os.environ.get('WORLD_SIZE', 1)}_{os.environ.get('RANK', 0)}"
        open(f"{SCRATCH}/{name}", "w").close()
    return computed(*arguments, **named)
memory._checkpointed = noted
"""


@pytest.mark.parametrize("case", ["ppo", "grpo, all weights", "dpo, adapters drop out", "kto", "reward_model"])
def test_checkpointed_activations_in_two_processes_are_those_of_one(forked, write, tmp_path, case):
    config = write(**CASES[case] | {"gradient_checkpointing": True})
    folders, gradients = run_both(forked, config, tmp_path, PLAIN_STEPS + CHECKPOINTED)
    assert_same(folders, gradients)
    assert all((tmp_path / f"checkpointed_{name}").is_file() for name in ("1_0", "2_0", "2_1"))
    if case != "kto":  # of the others test_saving_memory_runs.py compares runs of one process
        return
    plain = tmp_path / "plain"
    run = forked("train", write(**CASES[case]), f"output_dir={plain}", prelude=QUICK + PLAIN_STEPS, timeout=90)
    assert set(run.statuses) == {0}, run.errors
    ends = [rows_of(folder) for folder in (folders[0], plain)]
    assert ends[0] == ends[1]


# Half of the completions, those of process 1 or all, count as cut off by the limit of length.
CUT_OFF = """
import dataclasses
from diffusion_align.llm.trainer import TextTrainer
sample = TextTrainer.sample
def cut(*arguments):
    rows, collected = sample(*arguments)
    finished = torch.arange(len(collected.finished)) < {first}
    return rows, dataclasses.replace(collected, finished=finished)
TextTrainer.sample = cut
"""
IDLE = {
    "grpo, tied on process 1": (ONLINE | {"method": "grpo", "reward": ["flat"]}, "", 4),
    "grpo, cut off on process 1": (
        ONLINE | {"method": "grpo", "mask_truncated_completions": True, "beta": 0.1},
        CUT_OFF.format(first=4),
        4,
    ),
    "grpo, all cut off": (
        ONLINE | {"method": "grpo", "mask_truncated_completions": True, "beta": 0.1},
        CUT_OFF.format(first=0),
        0,
    ),
    "dpo, tied on process 1": (CASES["dpo, online"] | {"reward": ["flat"]}, "", 1),
    "kto, tied on process 1": (CASES["kto, online"] | {"reward": ["flat"]}, "", None),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_process_without_work_is_not_waited_for(forked, write, tmp_path, case):
    changes, fault, used = IDLE[case]
    config = write(**changes | {"epochs": 1, "updates_per_epoch": 1})
    folders, gradients = run_both(forked, config, tmp_path, PLAIN_STEPS + fault)
    [row] = [row for row in rows_of(folders[1]) if "samples_used" in row]
    if used is None:
        assert 0 < row["samples_used"] <= 4
    else:
        assert row["samples_used"] == used
    if used == 0:
        assert gradients == [[], [], []]
    else:
        assert_same(folders, gradients)


WIDTHS = """
from diffusion_align.llm.ppo import PPOTrainer
whitened = PPOTrainer._whitened
def noted(self, x, mask):
    with open(f"{SCRATCH}/width_{self.accelerator.num_processes}_{self.accelerator.process_index}", "w") as file:
        file.write(str(x.shape[1]))
    return whitened(self, x, mask)
PPOTrainer._whitened = noted
"""


def test_advantages_are_whitened_over_processes_whose_completions_differ_in_length(forked, write, tmp_path):
    changes = ONLINE | {"method": "ppo", "num_generations": 1, "samples_per_epoch": 4, "epochs": 1}
    folders, gradients = run_both(forked, write(**changes, max_completion_length=24), tmp_path, PLAIN_STEPS + WIDTHS)
    widths = [int((tmp_path / f"width_{name}").read_text()) for name in ("1_0", "2_0", "2_1")]
    assert widths[1] != widths[2], "nothing to pad"
    assert max(widths[1:]) == widths[0]
    assert_same(folders, gradients)


@pytest.mark.parametrize("method", ["grpo", "ppo", "dpo", "kto"])
def test_a_reward_that_fails_on_one_process_ends_both(forked, write, tmp_path, method):
    config = write(**ONLINE | {"method": method, "reward": ["only_one_fails"]})
    for said in end_in_a_sentence(forked, config, tmp_path):
        assert_problem([said], "reward 'only_one_fails'", "raised")
    assert not (tmp_path / "run").exists()  # nothing was trained, so the same command can be run again


def test_a_check_that_fails_on_one_process_ends_both_and_one_says_what_is_left_out(forked, write, tmp_path):
    config = write(**ONLINE | {"method": "grpo", "loss_type": "grpo", "reward": ["only_one_refuses"]})
    run = forked("train", config, "method=kto", f"output_dir={tmp_path}/run", processes=2, timeout=60)
    assert not run.timed_out, "a process went on waiting for one that is gone"
    assert run.statuses == [2, 2], run.errors
    first, second = (error.strip().splitlines() for error in run.errors)
    assert first[0] == "method=kto does not use from the recipe: loss_type"
    assert first[-1].startswith("error: process 1: reward 'only_one_refuses' raised")
    assert len(second) == 1


def test_a_reward_with_nothing_to_say_on_one_process_ends_both(forked, write, tmp_path):
    config = write(**ONLINE | {"method": "kto", "reward": ["silent"]})
    for said in end_in_a_sentence(forked, config, tmp_path):
        assert_problem([said], "every reward", f"sample 0 (prompt {ORDER[1]!r})")


def test_a_prompts_completions_that_would_be_divided_are_refused(forked, write, tmp_path):
    config = write(**ONLINE | {"method": "dpo", "samples_per_epoch": 12, "sample_batch_size": 3})
    for said in end_in_a_sentence(forked, config, tmp_path):
        assert_problem([said], "samples_per_epoch", "multiple of 2 processes x group_size=4")
    assert not (tmp_path / "run").exists()


def test_one_process_writes_what_is_shown(forked, write, tmp_path):
    """The main one, while the other goes on; and completions do not depend on how many there are."""
    config = write(**CASES["grpo, KL in the reward"] | {"grid_every": 1, "epochs": 1, "learning_rate": 1e-6})
    folders, _ = run_both(forked, config, tmp_path, PLAIN_STEPS)
    names = ["before_after.jsonl", "epoch_0000.jsonl", "epoch_0001.jsonl"]
    one, two = ([(folder / "samples" / name).read_text() for name in names] for folder in folders)
    assert one == two
    assert len(json.loads(one[0].splitlines()[0])["before"]) > 0
