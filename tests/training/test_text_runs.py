"""Whole runs of language models: stopped at any place and resumed, they end as the one that was left alone, bit for
bit (CPU, float32), with every completion they sampled on the way."""

import json
import signal
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusion_align.yaml_text import dump
from tests.helpers.hard_runs import HARD_RUN, PREFERENCES, assert_same_run, labels_of, newest, rows_of
from tests.helpers.kills import HOOK, KILL, QUICK, STEP, TERMINATE, TRAINER, place, resumed_with

OF_IMAGES = ("reward", "prompts", "history_size", "history_min_count", "sampler", "method")
CHANGES = {"epochs": 4, "samples_per_epoch": 8, "sample_batch_size": 4, "micro_batch_size": 3, "learning_rate": 3e-3}
CHANGES |= {"max_completion_length": 8, "keep_checkpoints": 1}
SETTINGS = {name: value for name, value in HARD_RUN.items() if name not in OF_IMAGES} | CHANGES
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
LABELS = labels_of(PREFERENCES)
PREFERENCES = [row | {"rejected": row["rejected"][0]} for row in PREFERENCES]
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
COLLECTION, REFERENCES = "diffusion_align.llm.collection", "diffusion_align.llm.reference_file"
SAMPLING = place("diffusion_align.llm.trainer", "rollout", 4)
SCORING = place(f"{COLLECTION}.WeightedRewards", "calls", 2)
ASKING = place(f"{REFERENCES}.ReferenceFile", "put_into", 1)
READING = place(TRAINER, "accumulate", 3)


def settings_of(scratch, kind, model):
    (scratch / "noisy.py").write_text(NOISY)
    changes = {"model": str(model)} | KINDS[kind]
    if "prompts" in changes:
        noisy = f"{scratch}/noisy.py:noisy"
        changes["reward"] = [noisy, f"{scratch}/noisy.py:wanted"] if kind == "grpo" else noisy
    return SETTINGS | changes


@pytest.fixture(scope="module")
def calm(left_alone, tiny_language_model):
    return left_alone(partial(settings_of, model=tiny_language_model), QUICK)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_as_the_one_left_alone(forked, calm, tmp_path, kind):
    """One run: killed between two updates, then before a checkpoint, then asked to stop while it collects."""
    (config, left_alone), harried = calm(kind), tmp_path / "harried"
    expected = rows_of(left_alone)
    collecting = ASKING if "precompute_ref_log_probs" in KINDS[kind] else READING
    moments = [
        (place(STEP, "step", 2), -signal.SIGKILL),
        (place(TRAINER, "save", 1), -signal.SIGKILL),
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
        written = rows_of(harried)
        assert written == expected[: len(written)], hook
    epochs = max(row["epoch"] for row in written)
    command = resumed_with("train", config, f"output_dir={harried}", *often)
    assert run.error.strip().splitlines()[-2:] == [f"stopped after epoch {epochs} of 4", command]
    assert 0 < epochs < 4
    forked.finish("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK)
    assert_same_run(harried, left_alone)
    assert not list(harried.rglob(".*")), "a temporary file was left behind"


def test_the_runs_are_worth_comparing(calm):
    """Weights move, averages differ from them, completions end early, rewards and the KL coefficient change."""
    for kind in KINDS:
        folder = calm(kind)[1]
        trained, ema = (load_file(newest(folder) / f"{name}.safetensors") for name in ("trained", "ema"))
        assert any(not torch.equal(trained[name], ema[name]) for name in ema), kind
        rows = rows_of(folder)
        assert len({row["grad_norm"] for row in rows if "grad_norm" in row}) > 4, kind
        if "prompts" in KINDS[kind]:
            epochs = [row for row in rows if "reward" in row]
            assert len({row["reward"] for row in epochs}) == 4, kind
            assert any(row["completions/min_length"] < 8 for row in epochs), kind
    assert len({row["kl_coef"] for row in rows_of(calm("ppo")[1]) if "kl_coef" in row}) == 4
    assert all({"rewards/noisy/mean", "rewards/wanted/mean"} <= row.keys() for row in grpo_epochs(calm))
    assert all(row["kl"] != 0 for row in grpo_epochs(calm)[1:])


def grpo_epochs(calm):
    return [row for row in rows_of(calm("grpo")[1]) if "reward" in row]


FAULTS = {
    "kl coefficient": ("ppo", "from diffusion_align.llm.ppo import PPOTrainer as t\nt.load_extra_state = lambda *a: 0"),
    "random state": (
        "grpo",
        "from diffusion_align.training import checkpoint\ncheckpoint.set_rng_state = lambda state: None",
    ),
}


@pytest.mark.parametrize("part", FAULTS)
def test_the_comparison_notices_a_part_that_is_not_restored(forked, calm, tmp_path, part):
    kind, fault = FAULTS[part]
    (config, left_alone), harried = calm(kind), tmp_path / "harried"
    moment = QUICK + KILL + place(TRAINER, "save", 2) + HOOK
    assert forked("train", config, f"output_dir={harried}", prelude=moment).status == -signal.SIGKILL
    forked.finish("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK + fault)
    with pytest.raises(AssertionError):
        assert_same_run(harried, left_alone)


def test_a_kill_while_the_reference_is_asked_or_written_changes_nothing(forked, calm, tmp_path):
    (config, left_alone), harried = calm("dpo, all weights"), tmp_path / "harried"
    for hook in (place(REFERENCES, "given_preferences", 2), place(f"{REFERENCES}.ReferenceFile", "_identity", 1)):
        run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK + KILL + hook + HOOK)
        assert run.status == -signal.SIGKILL, run
        assert not (harried / "reference.safetensors").exists()
    forked.finish("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK)
    assert_same_run(harried, left_alone)
    assert (harried / "reference.safetensors").read_bytes() == (left_alone / "reference.safetensors").read_bytes()


def test_a_kill_while_a_reward_thinks_changes_nothing(forked, calm, tmp_path):
    """It draws from the global random states."""
    (config, left_alone), harried = calm("grpo"), tmp_path / "harried"
    prelude = QUICK + KILL + SCORING + HOOK
    assert forked("train", config, f"output_dir={harried}", prelude=prelude).status == -signal.SIGKILL
    forked.finish("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK)
    assert_same_run(harried, left_alone)


@pytest.mark.parametrize("kind", ["grpo", "reward_model"])
def test_the_same_seed_gives_the_same_run(forked, calm, tmp_path, kind):
    """A run is made of its settings, from the first weights on; and another seed is another run."""
    config, folder = calm(kind)
    drawn = "import torch\ntorch.rand(3)\n"  # as in a program that has drawn before
    for seed in (0, 1):
        again = tmp_path / str(seed)
        forked.finish("train", config, f"output_dir={again}", f"seed={seed}", prelude=QUICK + drawn)
    assert_same_run(tmp_path / "0", folder)
    assert rows_of(tmp_path / "1") != rows_of(folder)


def test_what_a_run_leaves_behind(forked, tiny_language_model, tmp_path):
    """Samples of every epoch and of before and after, the report, and settings that can be read again."""
    config, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(dump(settings_of(tmp_path, "grpo", tiny_language_model)))
    overrides = [f"output_dir={folder}", "grid_every=2", "epochs=3", "show_prompts=[the cat, 'who?', never seen]"]
    run = forked.finish("train", config, *overrides)
    assert "finished 3 epochs\nreward " in run.outputs[0]
    assert f"the weights are in {folder}/final; next:\n  xdg-open {folder}/report.html\n" in run.outputs[0]
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["before_after.jsonl", *(f"epoch_000{n}.jsonl" for n in (0, 2, 3))], "of the last epoch, too"
    lines = [json.loads(line) for line in (folder / "samples" / "before_after.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["the cat", "who?", "never seen"]
    assert all(isinstance(line[name], str) for line in lines for name in ("before", "after"))
    first = [json.loads(line) for line in (folder / "samples" / "epoch_0000.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in first] == [line["before"] for line in lines], "the same seeds"
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["method"] == "grpo"
    assert settings["prompts"]["source"] == PROMPTS
    assert "the cat" in (folder / "report.html").read_text()
    assert [row["step"] for row in rows_of(folder) if "reward" in row] == [4, 8, 12]
