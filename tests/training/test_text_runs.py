"""Whole runs of language models: stopped at any place and resumed, they end as the one that was left alone, bit for
bit (CPU, float32), with every completion they sampled on the way."""

import json
import runpy
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusion_align.yaml_text import dump

_here = Path(__file__).parent
_shared = runpy.run_path(str(_here / "conftest.py"))
_interrupted = runpy.run_path(str(_here / "test_interrupt_and_resume.py"))
flat, newest = _shared["flat"], _shared["newest"]
KILL, HOOK = _interrupted["KILL"], _interrupted["HOOK"]

# Every part of the state matters: the rate changes each step, an average is kept, and `noisy` draws from the three
# global random states.
SETTINGS = {
    "epochs": 4,
    "samples_per_epoch": 8,
    "sample_batch_size": 4,
    "micro_batch_size": 3,
    "updates_per_epoch": 2,
    "learning_rate": 3e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "lora": {"rank": 2},
    "max_completion_length": 8,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "grid_every": 0,
    "num_threads": 1,
}
NOISY = """
import random
import numpy
import torch

def noisy(completions, **columns):
    noise = torch.rand(len(completions)) + torch.from_numpy(numpy.random.rand(len(completions))) + random.random()
    return noise.float() + torch.tensor([float(len(text)) for text in completions])

def wanted(completions, letter):
    return [None if one is None else float(text.count(one)) for text, one in zip(completions, letter)]
"""
PROMPTS = [
    {"prompt": "the cat", "letter": "a"},
    {"prompt": "a dog is", "letter": None},
    {"prompt": "who?", "letter": "e"},
    {"prompt": "one and two", "letter": "s"},
    {"prompt": "x", "letter": "z"},
]
PREFERENCES = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " ran off"},
    {"prompt": "a dog", "chosen": " is here.", "rejected": " no"},
    {"prompt": "one", "chosen": " two", "rejected": " 3"},
    {"prompt": "who", "chosen": "?", "rejected": " is it"},
    {"prompt": "x + 1", "chosen": " = 2", "rejected": " = 123"},
]
LABELS = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PREFERENCES
    for side in ("chosen", "rejected")
]
ONLINE = {"prompts": PROMPTS, "num_generations": 4}
KINDS = {
    "grpo": ONLINE | {"method": "grpo", "beta": 0.1, "reward_weights": [1.0, 0.5], "inner_epochs": 2},
    "ppo": ONLINE | {"method": "ppo", "num_generations": 1, "kl_target": 0.1, "kl_horizon": 20, "inner_epochs": 2},
    "dpo, all weights": {"method": "dpo", "dataset": PREFERENCES, "precompute_ref_log_probs": True, "lora": None},
    "dpo, dynamic beta": {
        "method": "dpo",
        "dataset": PREFERENCES,
        "dynamic_beta": {"hidden": 8},
        "precompute_ref_log_probs": True,
    },
    "dpo, online": ONLINE | {"method": "dpo", "inner_epochs": 2},
    "kto": {"method": "kto", "dataset": LABELS},
    "kto, online": ONLINE | {"method": "kto", "desirable_above": 6.0},
    "reward_model": {"method": "reward_model", "dataset": PREFERENCES, "eval_dataset": PREFERENCES[:3]},
}
QUICK = "import diffusion_align.report as report\nreport.write_report = lambda folder: None\n"


def place(module, owner, name, n, *, after=False):
    """Python that sets what HOOK reads: the ``n``-th pass through ``owner.name``; ``owner`` "" is the module."""
    what = f"from {module} import {owner} as owner" if owner else f"import {module} as owner"
    return f"{what}\nname, n, after = {name!r}, {n}, {after}\n"


LOOP, COLLECTION = "diffusion_align.training.trainer", "diffusion_align.llm.collection"
BETWEEN_UPDATES = place("diffusion_align.training.optimization", "Optimization", "step", 2)
BEFORE_THE_CHECKPOINT = place(LOOP, "Trainer", "save", 1)
SAMPLING = place("diffusion_align.llm.trainer", "", "rollout", 4)
SCORING = place(COLLECTION, "WeightedRewards", "calls", 2)
ASKING = place("diffusion_align.llm.reference_file", "ReferenceFile", "put_into", 1)
WRITING_REFERENCE = place("diffusion_align.llm.reference_file", "ReferenceFile", "_identity", 1)
READING = place(LOOP, "Trainer", "accumulate", 3)
# Asks the run to stop instead, as a batch system does.
TERMINATE = """
import os, signal
def die():
    os.kill(os.getpid(), signal.SIGTERM)
    globals()["die"] = lambda: None  # a second one would end the run at once
"""


def write(folder, model, kind):
    """The path of a configuration of that kind."""
    (folder / "noisy.py").write_text(NOISY)
    changes = dict(KINDS[kind])
    if "prompts" in changes:
        noisy = f"{folder}/noisy.py:noisy"
        changes["reward"] = [noisy, f"{folder}/noisy.py:wanted"] if kind == "grpo" else noisy
    config = folder / "tiny.yaml"
    config.write_text(dump(SETTINGS | {"model": str(model), "output_dir": "run"} | changes))
    return config


@pytest.fixture(scope="module")
def calm(forked, tiny_language_model, tmp_path_factory):
    """``calm(kind)``: configuration and folder of a run of that kind that was left alone; one for all tests."""
    runs = {}

    def make(kind):
        if kind not in runs:
            scratch = tmp_path_factory.mktemp("calm")
            config = write(scratch, tiny_language_model, kind)
            run = forked("train", config, f"output_dir={scratch}/run", prelude=QUICK)
            assert run.status == 0, run.error
            runs[kind] = config, scratch / "run"
        return runs[kind]

    return make


def assert_same_run(folder, other, read_rows):
    """Two run folders hold the same rows, samples, weights, averages and optimizer state, bit for bit."""
    assert read_rows(folder) == read_rows(other)
    mine, theirs = newest(folder), newest(other)
    assert mine.name == theirs.name
    assert_same_weights(mine, theirs)
    assert_same_weights(folder / "final", other / "final")
    a, b = (flat(torch.load(path / "tensors.pt", weights_only=True)) for path in (mine, theirs))
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key
    mine, theirs = ({p.name: p.read_bytes() for p in (f / "samples").glob("*")} for f in (folder, other))
    assert mine == theirs


def assert_same_weights(folder, other):
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors")) != []
    for name in names:
        a, b = (load_file(path / name) for path in (folder, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_as_the_one_left_alone(forked, calm, tmp_path, read_rows, kind):
    """One run: killed between two updates, then before a checkpoint, then asked to stop while it collects."""
    (config, left_alone), harried = calm(kind), tmp_path / "harried"
    expected = read_rows(left_alone)
    collecting = ASKING if "precompute_ref_log_probs" in KINDS[kind] else READING
    moments = [
        (BETWEEN_UPDATES, -signal.SIGKILL),
        (BEFORE_THE_CHECKPOINT, -signal.SIGKILL),
        (SAMPLING if "prompts" in KINDS[kind] else collecting, 130),
    ]
    for hook, status in moments:
        fatal = KILL if status < 0 else TERMINATE
        # Only the signal can have written a checkpoint after the first two epochs.
        often = [] if status < 0 else ["checkpoint_every=100"]
        run = forked(
            "train", config, f"output_dir={harried}", "resume=true", *often, prelude=QUICK + fatal + hook + HOOK
        )
        assert run.status == status, (hook, run)
        assert "Traceback" not in run.error
        written = read_rows(harried)
        assert written == expected[: len(written)], hook
    epochs = max(row["epoch"] for row in written)
    assert run.error.strip().splitlines()[-1] == (
        f"stopped after epoch {epochs} of 4; go on with resume=true output_dir={harried}"
    )
    assert 0 < epochs < 4
    run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK)
    assert run.status == 0, run.error
    assert_same_run(harried, left_alone, read_rows)
    assert not list(harried.rglob(".*")), "something aside was left behind"


def test_the_runs_are_worth_comparing(calm, read_rows):
    """Weights move, averages differ from them, completions end early, rewards and the KL coefficient change."""
    for kind in KINDS:
        folder = calm(kind)[1]
        trained, ema = (load_file(newest(folder) / f"{name}.safetensors") for name in ("trained", "ema"))
        assert any(not torch.equal(trained[name], ema[name]) for name in ema), kind
        rows = read_rows(folder)
        assert len({row["grad_norm"] for row in rows if "grad_norm" in row}) > 4, kind
        if "prompts" in KINDS[kind]:
            epochs = [row for row in rows if "reward" in row]
            assert len({row["reward"] for row in epochs}) == 4, kind
            assert any(row["completions/min_length"] < 8 for row in epochs), kind
    assert len({row["kl_coef"] for row in read_rows(calm("ppo")[1]) if "kl_coef" in row}) == 4
    assert all({"rewards/noisy/mean", "rewards/wanted/mean"} <= row.keys() for row in grpo_epochs(calm, read_rows))
    assert all(row["kl"] != 0 for row in grpo_epochs(calm, read_rows)[1:])


def grpo_epochs(calm, read_rows):
    return [row for row in read_rows(calm("grpo")[1]) if "reward" in row]


FAULTS = {
    "kl coefficient": ("ppo", "from diffusion_align.llm.ppo import PPOTrainer as t\nt.load_extra_state = lambda *a: 0"),
    "random state": (
        "grpo",
        "from diffusion_align.training import checkpoint\ncheckpoint.set_rng_state = lambda state: None",
    ),
}


@pytest.mark.parametrize("part", FAULTS)
def test_the_comparison_notices_a_part_that_is_not_restored(forked, calm, tmp_path, read_rows, part):
    kind, fault = FAULTS[part]
    (config, left_alone), harried = calm(kind), tmp_path / "harried"
    moment = QUICK + KILL + place(LOOP, "Trainer", "save", 2) + HOOK
    assert forked("train", config, f"output_dir={harried}", prelude=moment).status == -signal.SIGKILL
    run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK + fault)
    assert run.status == 0, run.error
    with pytest.raises(AssertionError):
        assert_same_run(harried, left_alone, read_rows)


def test_a_kill_while_the_reference_is_asked_or_written_changes_nothing(forked, calm, tmp_path, read_rows):
    (config, left_alone), harried = calm("dpo, all weights"), tmp_path / "harried"
    module = "diffusion_align.llm.reference_file"
    for hook in (place(module, "", "given_preferences", 2), WRITING_REFERENCE):
        run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK + KILL + hook + HOOK)
        assert run.status == -signal.SIGKILL, run
        assert not (harried / "reference.safetensors").exists()
    run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK)
    assert run.status == 0, run.error
    assert_same_run(harried, left_alone, read_rows)
    assert (harried / "reference.safetensors").read_bytes() == (left_alone / "reference.safetensors").read_bytes()


def test_a_kill_while_a_reward_thinks_changes_nothing(forked, calm, tmp_path, read_rows):
    """It draws from the global random states."""
    (config, left_alone), harried = calm("grpo"), tmp_path / "harried"
    prelude = QUICK + KILL + SCORING + HOOK
    assert forked("train", config, f"output_dir={harried}", prelude=prelude).status == -signal.SIGKILL
    assert forked("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK).status == 0
    assert_same_run(harried, left_alone, read_rows)


@pytest.mark.parametrize("kind", ["grpo", "reward_model"])
def test_the_same_seed_gives_the_same_run(forked, calm, tmp_path, read_rows, kind):
    """A run is made of its settings, from the first weights on; and another seed is another run."""
    config, folder = calm(kind)
    drawn = "import torch\ntorch.rand(3)\n"  # as in a program that has drawn before
    for seed in (0, 1):
        again = tmp_path / str(seed)
        run = forked("train", config, f"output_dir={again}", f"seed={seed}", prelude=QUICK + drawn)
        assert run.status == 0, run.error
    assert_same_run(tmp_path / "0", folder, read_rows)
    assert read_rows(tmp_path / "1") != read_rows(folder)


def test_what_a_run_leaves_behind(forked, tiny_language_model, tmp_path, read_rows):
    """Samples of every epoch and of before and after, the report, and settings that can be read again."""
    config, folder = write(tmp_path, tiny_language_model, "grpo"), tmp_path / "run"
    overrides = [f"output_dir={folder}", "grid_every=2", "epochs=3", "show_prompts=[the cat, 'who?', never seen]"]
    run = forked("train", config, *overrides)
    assert run.status == 0, run.error
    assert f"finished: see {folder}/report.html; the weights are in {folder}/final" in run.outputs[0]
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["before_after.jsonl", "epoch_0000.jsonl", "epoch_0002.jsonl"]
    lines = [json.loads(line) for line in (folder / "samples" / "before_after.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["the cat", "who?", "never seen"]
    assert all(isinstance(line[name], str) for line in lines for name in ("before", "after"))
    first = [json.loads(line) for line in (folder / "samples" / "epoch_0000.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in first] == [line["before"] for line in lines], "the same seeds"
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["method"] == "grpo"
    assert settings["prompts"]["source"] == PROMPTS
    assert "the cat" in (folder / "report.html").read_text()
    assert [row["step"] for row in read_rows(folder) if "reward" in row] == [4, 8, 12]
