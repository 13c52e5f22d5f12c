"""A held-out reward on completions, the best weights, and rules that end a run of a language model."""

import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffusion_align.data.text_rows import PreferenceRow, PromptRow
from diffusion_align.errors import ConfigError
from diffusion_align.llm.collection import WeightedRewards
from diffusion_align.llm.dpo import DPOConfig, DPOTrainer
from diffusion_align.llm.grpo import GRPOConfig, GRPOTrainer
from diffusion_align.llm.ppo import PPOConfig, PPOTrainer
from diffusion_align.llm.rollout import rollout
from diffusion_align.llm.trainer import TextEvaluation
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.run import run as run_config
from diffusion_align.rewards import RewardError
from diffusion_align.training.checkpoint import list_checkpoints
from diffusion_align.training.randomness import generator
from tests.helpers.hard_runs import rows_of
from tests.helpers.text_trainers import SIZES

ROWS = [PromptRow("a", [4, 5, 6], {}), PromptRow("b", [9], {}), PromptRow("c", [7, 8], {})]
PAIRS = [PreferenceRow("a", [4, 5], [6, 3], [[7, 3]]), PreferenceRow("b", [9], [5], [[8, 8, 3]])]
SETTINGS = SIZES | {"epochs": 6, "samples_per_epoch": 8, "sample_batch_size": 4, "updates_per_epoch": 1}
SETTINGS |= {"lora": {"rank": 2}, "num_threads": 1, "checkpoint_every": 1, "keep_checkpoints": 9}
HELD_OUT = {"reward": "length"}  # what the settings say; the trainers here are given functions
ONLINE = {"prompts": ["a"], "reward": "length", "num_generations": 4}


def length(completions):
    return [float(len(text)) for text in completions]


class Scripted:
    """The k-th evaluation gives ``golds[k]``; an exception there is raised, once."""

    def __init__(self, *golds):
        self.golds = list(golds)

    def __call__(self, completions):
        gold = self.golds.pop(0)
        if isinstance(gold, Exception):
            raise gold
        return [gold - 1, gold + 1]


@pytest.fixture
def train(tmp_path, make_language_policy):
    """``train(kind, gold, name=..., samples=..., **settings)``: the finished trainer."""

    def run(kind="grpo", gold=None, *, name="run", samples=2, every=1, **settings):
        AcceleratorState._reset_state(reset_partial_state=True)
        evaluation = None
        if gold is not None:
            evaluation = TextEvaluation(ROWS, samples, every, WeightedRewards([gold], torch.ones(1)))
            settings = {"evaluation": HELD_OUT} | settings
        settings = SETTINGS | {"output_dir": tmp_path / name} | settings
        policy, rewards = make_language_policy("gpt2", noise=0.1), WeightedRewards([length], torch.ones(1))
        if kind == "dpo":
            config = DPOConfig(dataset=[{"prompt": "a", "chosen": "b", "rejected": "c"}], **settings)
            trainer = DPOTrainer(config, policy, rows=PAIRS, evaluation=evaluation)
        else:
            config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "ppo": (PPOConfig, PPOTrainer)}[kind]
            config = config(**(ONLINE | settings))
            trainer = trainer(config, policy, ROWS, rewards, evaluation=evaluation)
        trainer.train()
        return trainer

    return run


def rows(folder, key):
    return [(row["epoch"], row[key]) for row in rows_of(folder) if key in row]


def adapter(folder, name="adapter_model"):
    return sorted(load_file(folder / f"{name}.safetensors").values(), key=lambda value: value.sum().item())


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def test_what_is_logged_is_what_the_fixed_completions_score(train, tmp_path):
    trainer = train("dpo", length, samples=5, every=2, epochs=2)
    assert [epoch for epoch, _ in rows(tmp_path / "run", "gold")] == [0, 2]
    scores, ratios = [], []
    for i in range(5):
        found = rollout(trainer.policy, [ROWS[i % 3].ids], [generator(0, "evaluation", i)], max_new_tokens=6)
        scores.append(float(len(trainer.policy.decode(found.sequences)[0])))
        with trainer.policy.reference(), torch.no_grad():
            logp_ref = trainer.policy.log_probs(trainer.policy.score(found.sequences))
        ratios.append((found.logp_old - logp_ref).sum().item())
    golds, ratios = torch.tensor(scores, dtype=torch.float64), torch.tensor(ratios, dtype=torch.float64)
    last = {key: rows(tmp_path / "run", key)[-1][1] for key in ("gold", "gold_stderr", "kl_path", "kl_path_stderr")}
    assert last["gold"] == pytest.approx(golds.mean().item())
    assert last["gold_stderr"] == pytest.approx(golds.std().item() / math.sqrt(5))
    assert last["kl_path"] == pytest.approx(ratios.mean().item(), abs=1e-5)
    assert last["kl_path_stderr"] == pytest.approx(ratios.std().item() / math.sqrt(5), abs=1e-5)
    assert (last["kl_path"], rows(tmp_path / "run", "kl_path")[0]) != (0.0, (0, 0.0)), "the noise is in the adapter"


def test_evaluation_changes_nothing_of_the_training(train, tmp_path):
    train(gold=length, name="with", epochs=2)
    train(name="without", epochs=2)
    assert same(adapter(tmp_path / "with/final"), adapter(tmp_path / "without/final"))
    assert rows(tmp_path / "with", "kl_path") == rows(tmp_path / "without", "kl_path"), "GRPO logs its own KL"


@pytest.mark.parametrize("kind", ["grpo", "ppo", "dpo"])
def test_the_best_weights_are_kept_and_a_falling_gold_reward_ends_the_run(train, tmp_path, kind):
    trainer = train(kind, Scripted(0.0, 1.0, 3.0, 2.0, 2.9, 7.0), stop_when={"gold_falling": 2})
    folder = tmp_path / "run"
    assert trainer.epoch == 4
    assert "below its best, 3 after epoch 2" in trainer.stopped
    if kind != "ppo":  # whose checkpoint also holds the value head
        checkpoints = list_checkpoints(folder / "checkpoints")
        assert same(adapter(folder / "best"), adapter(checkpoints[1], "trained"))
        assert same(adapter(folder / "final"), adapter(checkpoints[3], "trained"))
    assert not same(adapter(folder / "best"), adapter(folder / "final"))
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary == {"best": {"epoch": 2, "gold": 3.0}, "stopped": trainer.stopped}


@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_a_failed_evaluation_is_made_up_for_and_the_run_ends_as_one_that_never_failed(train, tmp_path, kind):
    settings = {"epochs": 3, "checkpoint_every": 9, "stop_when": {"gold_falling": 9}}
    train(kind, Scripted(0.0, 1.0, 2.0, 3.0), name="calm", **settings)
    with pytest.raises(RewardError, match="raised OSError: gone"):
        train(kind, Scripted(0.0, 1.0, OSError("gone")), name="hurt", **settings)
    trainer = train(kind, Scripted(2.0, 3.0), name="hurt", resume=True, **settings)
    assert trainer.evaluation.history == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    for key in ("gold", "loss", "kl_path"):
        assert rows(tmp_path / "hurt", key) == rows(tmp_path / "calm", key), key
    for folder in ("final", "best"):
        assert same(adapter(tmp_path / "hurt" / folder), adapter(tmp_path / "calm" / folder))


def test_a_kl_that_only_evaluations_measure_ends_a_run(train):
    trainer = train("dpo", length, samples=8, learning_rate=0.3, stop_when={"kl_above": 0.01}, loss_type="simpo")
    assert trainer.epoch < 6
    assert "above stop_when.kl_above=0.01" in trainer.stopped


def test_a_run_from_settings_alone(tmp_path):
    settings = SETTINGS | {
        "method": "kto",
        "model": "tiny-lm",
        "output_dir": str(tmp_path / "run"),
        "dataset": [
            {"prompt": prompt, "completion": completion, "label": completion == " sat", "wanted": "s"}
            for prompt in ("the cat", "a dog")
            for completion in (" sat", " no")
        ],
        "epochs": 1,
        "evaluation": {
            "dataset": [{"prompt": "who", "wanted": "e"}, {"prompt": "x", "wanted": "o"}],
            "reward": [wanted, {"name": "length", "target": 2}],
            "reward_weights": [1.0, 0.5],
            "samples": 3,
        },
    }
    trainer = run_config(check_config(settings))
    assert [row.prompt for row in trainer.evaluation.prompts] == ["who", "x"]
    assert [epoch for epoch, _ in rows(tmp_path / "run", "gold")] == [0, 1]
    assert "evaluation" in trainer.identity
    AcceleratorState._reset_state(reset_partial_state=True)
    settings["evaluation"] = {"reward": wanted}
    trainer = run_config(check_config(settings | {"output_dir": str(tmp_path / "other")}))
    assert [(row.prompt, row.columns) for row in trainer.evaluation.prompts] == [
        ("the cat", {"wanted": "s"}),
        ("a dog", {"wanted": "s"}),
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    changed = settings | {"resume": True, "epochs": 2, "accept_changed": ["evaluation"]}
    trainer = run_config(check_config(changed))
    assert [epoch for epoch, _ in trainer.evaluation.history] == [0, 1, 2]


def wanted(completions, wanted):
    return [float(one in text) for text, one in zip(completions, wanted)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stop_when": {"gold_falling": 2}}, "stop_when.gold_falling needs evaluations"),
        ({"stop_when": {"kl_above": 2}}, "stop_when.kl_above needs the KL"),
        ({"evaluation": {"reward": "lenght"}}, "evaluation.reward='lenght' is unknown"),
        ({"evaluation": {"samples": 4}}, "evaluation.reward is required"),
        ({"evaluation": {"reward": "length", "prompts": "nowhere.txt"}}, "evaluation.prompts.source='nowhere.txt'"),
        (
            {"evaluation": {"reward": ["length"], "reward_weights": [1, 2]}},
            "evaluation.reward_weights=[1.0, 2.0] must be",
        ),
        ({"evaluation": {"reward": "length", "pictures": 3}}, "unknown setting 'evaluation.pictures'"),
    ],
)
def test_settings_that_make_no_sense(changes, expected, tmp_path):
    given = {"method": "ppo", "kl_coef": 0, "prompts": ["a"], "reward": "length", "model": "tiny-lm"}
    with pytest.raises(ConfigError) as caught:
        check_config(SETTINGS | given | {"output_dir": str(tmp_path / "x"), "num_generations": 1} | changes)
    assert expected in str(caught.value)
