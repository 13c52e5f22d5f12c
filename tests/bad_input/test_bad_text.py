"""Bad settings, data, models and rewards of text runs: one sentence each, exit 2, no traceback, nothing written, and
no weights read before they have to be."""

import runpy
from pathlib import Path

import pytest
import yaml

refused = runpy.run_path(str(Path(__file__).parent / "test_bad_runs.py"))["refused"]
SETTINGS = {
    "output_dir": "run",
    "epochs": 1,
    "samples_per_epoch": 4,
    "sample_batch_size": 4,
    "micro_batch_size": 4,
    "updates_per_epoch": 1,
    "lora": {"rank": 2},
    "max_completion_length": 4,
    "grid_every": 0,
    "num_threads": 1,
}
ONLINE = {"prompts": ["the cat", "a dog"], "reward": "length", "num_generations": 2}
PAIRS = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " ran"},
    {"prompt": "a dog", "chosen": " is", "rejected": " no"},
]
LABELS = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i == 0} for i, row in enumerate(PAIRS)]
TALK = [{"role": "user", "content": "who?"}]
METHODS = {
    "grpo": ONLINE,
    "ppo": ONLINE,
    "dpo": {"dataset": PAIRS},
    "kto": {"dataset": LABELS},
    "reward_model": {"dataset": PAIRS},
}
REWARDS = """
def too_short(completions, **columns):
    return [1.0] * (len(completions) - 1)

def nothing(completions, **columns):
    pass

def nan(completions, **columns):
    return [float("nan")] * len(completions)

def raises(completions, **columns):
    raise KeyError("label")

def needs_answer(completions, answer):
    return [1.0] * len(completions)

def silent(completions, **columns):
    return [None] * len(completions)

def later(completions, **columns):
    return [1.0 if "" in completions else float("nan")] * len(completions)
"""


@pytest.fixture
def write(tmp_path, tiny_language_model):
    """``write(method, **changes)``: tiny.yaml in the scratch folder; a value of ``...`` drops the key."""
    (tmp_path / "mine.py").write_text(REWARDS)

    def make(method="grpo", **changes):
        settings = SETTINGS | {"method": method, "model": str(tiny_language_model)} | METHODS[method] | changes
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not ...}))
        return path

    return make


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever reads weights is wrong."""
    from diffusion_align.pipelines import text

    def read(*arguments, **options):
        raise AssertionError("weights are read though the fault could be seen before")

    monkeypatch.setattr(text, "load_language_model", read)
    monkeypatch.setattr(text, "load_sequence_classifier", read)


# What is found without weights: changes of a configuration by method, and the sentences.
EARLY = {
    # names
    "unknown setting": ("grpo", {"num_generation": 2}, ["unknown setting 'num_generation': did you mean 'num_gen"]),
    "unknown setting of lora": ("ppo", {"lora": {"rnk": 2}}, ["unknown setting 'lora.rnk': did you mean 'rank'"]),
    "unknown setting of data": (
        "dpo",
        {"dataset": {"source": PAIRS, "colums": {}}},
        ["unknown setting 'dataset.colums': did you mean 'columns'"],
    ),
    "unknown setting of beta": (
        "dpo",
        {"dynamic_beta": {"beta_mim": 0.1}},
        ["unknown setting 'dynamic_beta.beta_mim': did you mean 'beta_m"],
    ),
    "unknown kl": ("grpo", {"kl": "k3"}, ["kl='k3' is not allowed: .*'k1_reward'"]),
    "unknown loss": ("dpo", {"loss_type": "sigmod"}, ["loss_type='sigmod' is not allowed: .*'sigmoid'"]),
    # numbers
    "negative beta": ("dpo", {"beta": -0.1}, ["beta=-0.1 is not allowed: .*greater than 0"]),
    "negative beta of grpo": ("grpo", {"beta": -0.1}, ["beta=-0.1 is not allowed: .*greater than or equal to 0"]),
    "negative beta of kto": ("kto", {"beta": -1}, ["beta=-1 is not allowed: .*greater than 0"]),
    "negative kl": ("ppo", {"kl_coef": -1}, ["kl_coef=-1 is not allowed"]),
    "no temperature": ("grpo", {"temperature": 0}, ["temperature=0 is not allowed: .*greater than 0"]),
    "no completion": ("ppo", {"max_completion_length": 0}, ["max_completion_length=0 is not allowed"]),
    "a group of one": (
        "grpo",
        {"num_generations": 1},
        ["num_generations=1 leaves nothing to compare .* use 2 or more"],
    ),
    "a group of one, dpo": (
        "dpo",
        ONLINE | {"dataset": ..., "num_generations": 1},
        ["num_generations=1 leaves nothing"],
    ),
    "groups that do not fit": (
        "grpo",
        {"num_generations": 3},
        ["samples_per_epoch=4 is not a multiple of num_generations=3: change one of them"],
    ),
    "weights that do not fit": (
        "grpo",
        {"reward_weights": [1.0, 2.0]},
        [r"reward_weights=\[1.0, 2.0\] are 2 numbers for 1 rewards: give one for each"],
    ),
    "infinite weight": ("grpo", {"reward_weights": [float("inf")]}, [r"reward_weights=\[inf\] must be finite"]),
    "kl_target without a coefficient": ("ppo", {"kl_target": 1, "kl_coef": 0}, ["kl_target moves kl_coef by a factor"]),
    # data that is missing or too much
    "no prompts": ("grpo", {"prompts": ...}, ["prompts and reward must both be given"]),
    "no reward": ("ppo", {"reward": ...}, ["prompts and reward must both be given"]),
    "neither dataset nor prompts": ("dpo", {"dataset": ...}, ["give dataset, or prompts and a reward"]),
    "neither, kto": ("kto", {"dataset": ...}, ["give dataset, or prompts and a reward"]),
    "both dataset and prompts": (
        "dpo",
        ONLINE,
        ["prompts are completed and judged online, dataset has completions: leave one of them out"],
    ),
    "no dataset for a reward model": ("reward_model", {"dataset": ...}, ["dataset is missing: it has to be given"]),
    "no rewards in the list": ("grpo", {"reward": []}, ["reward is an empty list: give at least one"]),
    "no prompts in the list": ("grpo", {"prompts": []}, [r"prompts.source=\[\] is not allowed: give a list of rows"]),
    "prompts that are a number": ("grpo", {"prompts": 3}, ["prompts=3 is not allowed"]),
    "a file that is absent": ("grpo", {"prompts": "absent.jsonl"}, ["prompts.source='absent.jsonl': there is no such"]),
    "a dataset that is absent": ("kto", {"dataset": "./absent"}, ["dataset.source='./absent': there is no such"]),
    "no prompts to show": ("grpo", {"show_prompts": []}, ["show_prompts is empty: leave it out"]),
    # columns
    "wrong columns": (
        "dpo",
        {"dataset": [{"prompt": "a", "better": "b", "worse": "c"}]},
        [
            "dataset.columns: the columns .* are needed; the columns found are 'prompt', 'better', 'worse': map our names"
        ],
    ),
    "wrong columns, prompts": (
        "grpo",
        {"prompts": [{"question": "a"}]},
        ["prompts.columns: the column prompt is needed; the columns found are 'question': map our names"],
    ),
    "wrong columns, labels": (
        "kto",
        {"dataset": PAIRS},
        ["the columns prompt, completion, label are needed; the columns found are 'prompt', 'chosen', 'rejected'"],
    ),
    "columns mapped to nothing": (
        "dpo",
        {"dataset": {"source": PAIRS, "columns": {"chosen": "winner"}}},
        ["there is no column 'winner'; the columns found are 'prompt', 'chosen', 'rejected'"],
    ),
    # rows
    "empty completion": (
        "dpo",
        {"dataset": [*PAIRS, {"prompt": "a", "chosen": "", "rejected": "b"}]},
        ["dataset: row 2: chosen is empty", "dataset: mend the rows above"],
    ),
    "empty completion, kto": (
        "kto",
        {"dataset": [*LABELS, {"prompt": "a", "completion": " ", "label": True}]},
        ["dataset: row 2: the completion is empty", "dataset: mend the rows above"],
    ),
    "empty prompt": (
        "grpo",
        {"prompts": ["the cat", ""]},
        ["prompts: row 1: the prompt is empty", "prompts: mend the rows above"],
    ),
    "equal completions": (
        "reward_model",
        {"dataset": [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}]},
        ["dataset: row 2: chosen and rejected are the same", "dataset: mend the rows above"],
    ),
    "a label that is none": (
        "kto",
        {"dataset": [*LABELS, {"prompt": "a", "completion": "b", "label": "maybe"}]},
        ["dataset: row 2: label is 'maybe', not true, false, 1 or 0", "dataset: mend the rows above"],
    ),
    "a prompt longer than the context": (
        "grpo",
        {"prompts": ["the cat", "a" * 70]},
        [
            "prompts: row 1: a prompt of 70 tokens leaves no room for a completion of 4 in the model's context of 64: "
            "set max_prompt_length=60 or less",
            "prompts: mend the rows above",
        ],
    ),
    "completions longer than the context": (
        "ppo",
        {"max_completion_length": 100},
        ["max_completion_length=100 leaves no room for a prompt in the model's context of 64 tokens: set it lower"],
    ),
    "completions as long as the context, data": (
        "dpo",
        {"max_completion_length": 64},
        ["max_completion_length=64 leaves no room for a prompt"],
    ),
    "conversations without a template": (
        "grpo",
        {"prompts": [{"prompt": TALK}]},
        ["prompts: the rows hold conversations but the tokenizer has no chat template: give plain texts, or set"],
    ),
    "conversations without a template, data": (
        "dpo",
        {"dataset": [{"prompt": TALK, "chosen": "me", "rejected": "you"}]},
        ["dataset: the rows hold conversations but the tokenizer has no chat template"],
    ),
    "a conversation to show without a template": (
        "grpo",
        {"show_prompts": [TALK]},
        ["show_prompts: the rows hold conversations but the tokenizer has no chat template"],
    ),
    "an empty prompt to show": ("grpo", {"show_prompts": ["a", " "]}, ["show_prompts: row 1: the prompt is empty"]),
    "eval rows": (
        "reward_model",
        {"eval_dataset": [{"prompt": "a", "chosen": "b"}]},
        ["eval_dataset.columns: .*the columns found are 'prompt', 'chosen'"],
    ),
    # models
    "unknown model": ("grpo", {"model": "tiny-ml"}, ["model='tiny-ml' is neither .*: did you mean 'tiny-lm'"]),
    "a folder that is absent": ("dpo", {"model": "./absent"}, ["model='./absent' is neither"]),
    "no model": ("grpo", {"model": ...}, ["model is missing: it has to be given"]),
    "an image model": ("grpo", {"model": "emoji-sd"}, ["model='emoji-sd' is an image model, not a language model"]),
    "an image model for a reward model": (
        "reward_model",
        {"model": "emoji-sd"},
        ["model='emoji-sd' is an image model, not a language model"],
    ),
    "an unknown reference": ("dpo", {"reference_model": "tiny-ml"}, ["reference_model='tiny-ml' is neither"]),
    "an image model as reference": ("dpo", {"reference_model": "emoji-sd"}, ["reference_model='emoji-sd' is an image"]),
    # rewards
    "unknown reward": ("grpo", {"reward": "lenght"}, ["unknown reward 'lenght': did you mean 'length'"]),
    "an image reward": ("grpo", {"reward": "jpeg_compressibility"}, ["'jpeg_compressibility' .*image"]),
    "one of two unknown": ("grpo", {"reward": ["length", "lenght"]}, ["unknown reward 'lenght'"]),
    "a reward file that is absent": ("grpo", {"reward": "absent.py:f"}, ["reward file 'absent.py' does not exist"]),
    "unknown reward option": ("grpo", {"reward": {"name": "length", "targt": 3}}, ["no option 'targt': did you mean"]),
    "too few scores": ("grpo", {"reward": "mine.py:too_short"}, ["reward 'too_short' returned 1 score for 2 comp"]),
    "no scores": ("ppo", {"reward": "mine.py:nothing"}, ["reward 'nothing' returned NoneType"]),
    "a score that is no number": ("grpo", {"reward": "mine.py:nan"}, ["reward 'nan' returned nan for completion 0"]),
    "a reward that raises": ("grpo", {"reward": "mine.py:raises"}, ["reward 'raises' raised KeyError: 'label'"]),
    "a column that is not there": (
        "grpo",
        {"reward": "mine.py:needs_answer", "prompts": [{"prompt": "a", "solution": "b"}]},
        [
            "reward 'needs_answer' needs 'answer', which is neither an option nor a column of the data: it has 'solution'"
        ],
    ),
    "the reward of what is shown": (
        "dpo",
        {"reward": "mine.py:raises"},
        ["reward 'raises' raised KeyError: 'label'"],
    ),
    # all at once
    "several": (
        "grpo",
        {
            "model": "tiny-ml",
            "num_generation": 2,
            "beta": -1,
            "reward": "lenght",
            "prompts": "absent.jsonl",
            "mixed_precision": "fp8",
        },
        [
            "unknown setting 'num_generation'",
            "beta=-1 is not allowed",
            "mixed_precision='fp8' is not allowed",
            "model='tiny-ml' is neither",
            "prompts.source='absent.jsonl': there is no such",
            "unknown reward 'lenght'",
        ],
    ),
    "several that do not fit": (
        "grpo",
        {
            "num_generations": 3,
            "reward_weights": [1.0, 2.0],
            "credit": "to_go",
            "kl": "k2_loss",
            "clip_std": [2.0, 1.0],
        },
        [
            "reward_weights=.* are 2 numbers for 1 rewards",
            "samples_per_epoch=4 is not a multiple of num_generations=3",
            "clip_std=",
            "credit=to_go belongs to kl=k1_reward",
        ],
    ),
}


@pytest.mark.parametrize("case", EARLY)
def test_refused_before_weights_are_read(cli, write, tree, no_weights, case):
    method, changes, wanted = EARLY[case]
    if "lora" in changes:
        changes = changes | {"lora": changes["lora"]}
    refused(cli, tree, "train", write(method, **changes), wanted=wanted)
