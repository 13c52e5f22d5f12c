"""TRL's completion_ids and trainer_state reach the rewards that name them, wherever rewards are called."""

import json

import pytest
import torch
import yaml

from diffusion_align.data.text_rows import PromptRow
from diffusion_align.llm.collection import WeightedRewards
from diffusion_align.llm.grpo import GRPOConfig, GRPOTrainer
from diffusion_align.llm.policy import Sequences
from diffusion_align.llm.previews import TextPreviews
from diffusion_align.llm.rollout import rollout
from diffusion_align.pipelines.text import TextAlignmentPipeline
from diffusion_align.rewards import RewardError
from diffusion_align.rewards.text.base import TrainerState
from diffusion_align.training.randomness import generator
from tests.helpers.hard_runs import rows_of
from tests.helpers.text_trainers import TINY

END, OTHER_END = 3, 7  # of the tokenizer, and of the model besides
ROWS = [PromptRow("a", [4, 5, 6], {}), PromptRow("b", [9], {})]
SETTINGS = TINY | {"prompts": ["a", "b"], "epochs": 3, "samples_per_epoch": 8, "sample_batch_size": 4}
SETTINGS |= {"micro_batch_size": 4, "num_generations": 4, "updates_per_epoch": 2, "max_completion_length": 8}
SETTINGS |= {"lora": {"rank": 2}, "num_threads": 1}
STEPS = 3 * 2 * 2  # epochs, updates and inner epochs


@pytest.fixture
def train(tmp_path, make_language_policy):
    """``train(reward, ...)``: the trainer, after a run whose model has two ends."""

    def run(*functions, **settings):
        policy = make_language_policy("gpt2", noise=0.1)
        policy.ends = torch.tensor([END, OTHER_END])
        settings = SETTINGS | {"output_dir": tmp_path / "run", "inner_epochs": 2, "grid_every": 0} | settings
        trainer = GRPOTrainer(
            GRPOConfig(**settings), policy, ROWS, WeightedRewards(functions, torch.ones(len(functions)))
        )
        trainer.train()
        return trainer

    return run


class Spy:
    """A reward that keeps what it is called with; the shown texts are told apart by their state."""

    name = "spy"

    def __init__(self):
        self.calls = []

    def __call__(self, completions, completion_ids, trainer_state):
        self.calls.append((completions, completion_ids, trainer_state))
        return [float(len(ids)) for ids in completion_ids]


def test_the_tokens_of_a_completion_end_with_its_first_end():
    ids = torch.tensor([[4, 5, 8, 9, END], [4, END, 0, 0, 0], [4, 5, 6, 8, 8]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    assert Sequences(ids, torch.tensor([2, 1, 3]), mask).tokens == [[8, 9, END], [END], [8, 8]]


def test_training_gives_tokens_as_sampled_and_where_the_run_stands(train, tokenizer):
    spy = Spy()
    trainer = train(spy)
    calls = [call for call in spy.calls if call[2] is not None]
    assert [state for _, _, state in calls] == [
        TrainerState(global_step=4 * epoch, epoch=float(epoch), max_steps=STEPS) for epoch in range(3) for _ in range(2)
    ]
    assert trainer.step == STEPS
    last = set()
    for texts, ids, _ in calls:
        assert texts == [tokenizer.decode(one) for one in ids]
        for one in ids:
            assert 1 <= len(one) <= 8
            assert not {END, OTHER_END} & set(one[:-1])
            assert one[-1] in (END, OTHER_END) or len(one) == 8
            last.add(one[-1])
    assert {END, OTHER_END} < last  # and some were cut off by the limit
    rows = rows_of(trainer.folder)
    means = [row["completions/mean_length"] for row in rows if "reward" in row]
    assert means == [pytest.approx(row["reward"]) for row in rows if "reward" in row]


def test_a_run_that_goes_on_says_so(train):
    train(Spy(), epochs=1)
    spy = Spy()
    train(spy, resume=True)
    assert next(s for _, _, s in spy.calls if s is not None) == TrainerState(4, 1.0, STEPS)


def test_a_reward_that_names_no_tokens_gets_none(train):
    seen = []

    def plain(completions, trainer_state, **columns):
        seen.append(trainer_state)
        assert set(columns) == {"prompts"}
        return [float(len(text)) for text in completions]

    assert not WeightedRewards([plain], torch.ones(1)).want_ids
    train(plain, epochs=1)
    assert {state.global_step for state in seen if state is not None} == {0}


def needy(completions, trainer_state):
    return [float(trainer_state.global_step)] * len(completions)


def hesitant(completions):
    return [None, *[2.0] * (len(completions) - 1)]


def test_a_reward_that_cannot_do_without_the_run_fails_in_one_sentence():
    rewards = WeightedRewards([needy], torch.ones(1))
    assert rewards.scores(ROWS, ["x", "y"], None, TrainerState(3, 1.0, 9)).tolist() == [[3.0], [3.0]]
    with pytest.raises(RewardError, match="reward 'needy' raised AttributeError"):
        rewards.scores(ROWS, ["x", "y"])
    with pytest.raises(RewardError, match="reward 'spy' needs 'completion_ids'"):
        WeightedRewards([Spy()], torch.ones(1)).scores(ROWS, ["x", "y"])


def test_shown_texts_are_scored_with_their_tokens_and_without_a_state(make_language_policy, tmp_path):
    policy, spy = make_language_policy("gpt2", noise=0.1), Spy()
    rewards = WeightedRewards([spy], torch.ones(1))
    previews = TextPreviews(policy, ROWS, rewards, seed=0, batch_size=1, max_completion_length=6)
    previews.write_pairs(*previews.before_after(tmp_path), tmp_path / "shown.jsonl")

    def expected():
        parts = [
            rollout(policy, [row.ids], [generator(0, "show", i)], max_new_tokens=6).sequences
            for i, row in enumerate(ROWS)
        ]
        return [part.tokens[0] for part in parts]

    after = expected()
    with policy.reference():
        before = expected()
    assert [ids for _, ids, _ in spy.calls] == [before, after]
    assert {state for _, _, state in spy.calls} == {None}
    lines = [json.loads(line) for line in (tmp_path / "shown.jsonl").read_text().splitlines()]
    assert [(line["reward_before"], line["reward_after"]) for line in lines] == [
        (len(old), len(new)) for old, new in zip(before, after)
    ]


@pytest.mark.parametrize(("reward", "shown"), [(needy, [None, None]), (hesitant, [None, 2.0])])
def test_a_shown_text_has_no_reward_where_none_can_say(make_language_policy, tmp_path, reward, shown):
    """Which needs the state of a run, or has nothing to say about one text; the others keep theirs."""
    rewards, policy = WeightedRewards([reward], torch.ones(1)), make_language_policy("gpt2")
    previews = TextPreviews(policy, ROWS, rewards, seed=0, batch_size=2, max_completion_length=2)
    previews.write(previews.sample(), tmp_path / "shown.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "shown.jsonl").read_text().splitlines()]
    assert [line.get("reward") for line in lines] == shown
    assert {"prompt", "completion"} == set(lines[0])


def test_scoring_makes_tokens_with_an_end_and_has_no_state(tiny_language_model, tiny_chat_model):
    texts = ["a cat", "", "who?</s>"]
    for folder in (tiny_language_model, tiny_chat_model):
        pipe, spy = TextAlignmentPipeline.from_pretrained(folder, device="cpu"), Spy()
        prompts = ["x", "y", "z"]
        if pipe.tokenizer.chat_template:
            prompts = [[{"role": "user", "content": text}] for text in prompts]
        end = pipe.tokenizer.eos_token_id
        wanted = [[*map(pipe.tokenizer.convert_tokens_to_ids, text), end] for text in ("a cat", "", "who?")]
        assert pipe.score(prompts, texts, {"name": spy, "scale": -1.0}).tolist() == [-6.0, -1.0, -5.0]
        [(_, ids, state)] = spy.calls
        assert ids == wanted
        assert state is None


def test_scoring_makes_no_tokens_for_nothing(tiny_language_model):
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")
    pipe.tokenizer = None
    assert pipe.score(["x"], ["a cat"], "length").tolist() == [2.0]


@pytest.mark.parametrize("method", ["grpo", "ppo", "dpo", "kto"])
def test_a_run_tries_rewards_with_tokens_and_its_state_before_it_starts(tiny_language_model, tmp_path, method):
    spy = Spy()
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")
    settings = SETTINGS | {"prompts": ["a cat", "a dog"], "grid_every": 0, "epochs": 1}
    del settings["model"], settings["reward"]
    pipe.align(method, reward=spy, output_dir=tmp_path / "run", inner_epochs=1, **settings)
    (texts, ids, state), *others = spy.calls
    assert state == TrainerState(0, 0.0, 2)
    end = pipe.tokenizer.eos_token_id
    assert [one[-1] for one in ids] == [end] * len(texts)
    assert [pipe.tokenizer.decode(one[:-1]) for one in ids][1:] == texts[1:]
    assert {state for _, _, state in others} == {TrainerState(0, 0.0, 2), None}  # None for what is shown


REWARD = """
def mixed(completion_ids, completions, trainer_state):
    step = 0 if trainer_state is None else 100 * trainer_state.global_step + trainer_state.epoch
    return [step + sum(ids) % 17 for ids in completion_ids]
"""


def test_two_processes_give_rewards_what_one_does(forked, tiny_language_model, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    changes = {
        "method": "grpo",
        "model": str(tiny_language_model),
        "reward": f"{tmp_path}/mine.py:mixed",
        "prompts": ["a cat", "a dog"],
        "sample_batch_size": 2,
        "epochs": 2,
        "grid_every": 1,
    }
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(SETTINGS | changes))
    quick = "import diffusion_align.report as report\nreport.write_report = lambda folder: None\n"
    alone, both = tmp_path / "in_1", tmp_path / "in_2"
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")
    pipe.align(output_dir=alone, **{name: value for name, value in (SETTINGS | changes).items() if name != "model"})
    run = forked("train", config, f"output_dir={both}", processes=2, prelude=quick, timeout=90)
    assert not run.timed_out, run.errors
    assert set(run.statuses) == {0}, run.errors
    found = []
    for folder in (alone, both):
        rows = [row for row in rows_of(folder) if "reward" in row]
        found.append([(row["reward_min"], row["reward_max"], row["reward"]) for row in rows])
        shown = [json.loads(line) for line in (folder / "samples" / "epoch_0000.jsonl").read_text().splitlines()]
        assert all(0 <= line["reward"] < 17 for line in shown)
    assert found[0] == [pytest.approx(row) for row in found[1]]
    assert 0 <= found[0][0][0] < found[0][0][1] < 17
    assert 201 <= found[0][1][0] < found[0][1][1] < 218  # two steps and an epoch later
