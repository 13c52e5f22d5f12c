"""Bad settings, data, models and rewards of text runs: one sentence each, exit 2, no traceback, nothing written, and
no weights read before they have to be."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.problems import assert_problem
from tests.helpers.tiny_runs import TINY, cases, changes, edit_json

SETTINGS = {key: value for key, value in TINY.items() if key != "sampler"} | {
    "output_dir": "run",
    "samples_per_epoch": 4,
    "sample_batch_size": 4,
    "micro_batch_size": 4,
    "max_completion_length": 4,
}
ONLINE = {"prompts": ["the cat", "a dog"], "reward": "length", "num_generations": 2}
PAIRS = [
    {"prompt": "the cat", "chosen": "sat", "rejected": "ran"},
    {"prompt": "a dog", "chosen": " is", "rejected": " no"},
]
LABELS = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i == 0} for i, row in enumerate(PAIRS)]
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
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))

    def make(method="grpo", **changes):
        settings = SETTINGS | {"method": method, "model": str(tiny_language_model)} | METHODS[method] | changes
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not ...}, sort_keys=False))
        return path

    return make


# What is found without weights: a method with its settings (``...`` drops one, += adds a row).
EARLY = cases("""
    # names
    grpo num_generation=2
    grpo dtype=bfloat16; lora=null
    ppo lora={rnk: 2}
    dpo dataset={source: rows.jsonl, colums: {}}
    dpo dynamic_beta={beta_mim: 0.1}
    grpo kl=k3
    dpo loss_type=sigmod
    # numbers
    dpo beta=-0.1
    grpo beta=-0.1
    kto beta=-1
    ppo kl_coef=-1
    grpo temperature=0
    ppo max_completion_length=0
    grpo num_generations=1
    dpo prompts=[the cat, a dog]; reward=length; num_generations=1; dataset=...
    grpo num_generations=3
    grpo reward_weights=[1.0, 2.0]
    grpo reward_weights=[.inf]
    ppo kl_target=1; kl_coef=0
    # data that is missing or too much
    grpo prompts=...
    ppo reward=...
    dpo dataset=...
    kto dataset=...; num_generations=2
    dpo prompts=[the cat, a dog]; reward=length; num_generations=2
    reward_model dataset=...
    grpo reward=[]
    grpo prompts=[]
    grpo prompts=3
    grpo prompts=absent.jsonl
    kto dataset=./absent
    grpo show_prompts=[]
    # columns
    dpo dataset=[{prompt: a, better: b, worse: c}]
    grpo prompts=[{question: a}]
    kto dataset=[{prompt: a, chosen: b, rejected: c}]
    dpo dataset={source: rows.jsonl, columns: {chosen: z}}
    # rows
    dpo dataset+={prompt: a, chosen: '', rejected: b}
    kto dataset+={prompt: a, completion: ' ', label: true}
    grpo prompts=[the cat, '']
    reward_model dataset+={prompt: a, chosen: b, rejected: b}
    kto dataset+={prompt: a, completion: b, label: maybe}
    grpo prompts=[the cat, aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa]
    ppo max_completion_length=100
    dpo max_completion_length=64
    grpo prompts=[{prompt: [{role: user, content: 'who?'}]}]
    dpo dataset=[{prompt: [{role: user, content: 'who?'}], chosen: me, rejected: you}]
    grpo show_prompts=[[{role: user, content: 'who?'}]]
    grpo show_prompts=[a, ' ']
    reward_model eval_dataset=[{prompt: a, chosen: b}]
    # models
    grpo model=tiny-ml
    dpo model=./absent
    grpo model=...
    grpo model=emoji-sd
    reward_model model=emoji-sd
    dpo reference_model=tiny-ml
    dpo reference_model=emoji-sd
    # rewards
    grpo reward=lenght
    grpo reward=jpeg_compressibility
    grpo reward=[length, lenght]
    grpo reward=absent.py:f
    grpo reward={name: length, targt: 3}
    grpo reward=mine.py:too_short
    ppo reward=mine.py:nan
    grpo reward=mine.py:raises
    grpo reward=mine.py:needs_answer; prompts=[{prompt: a, solution: b}]
    dpo reward=mine.py:raises
    # all at once
    grpo model=tiny-ml; num_generation=2; beta=-1; reward=lenght; prompts=absent.jsonl; mixed_precision=fp8
    grpo num_generations=3; reward_weights=[1.0, 2.0]; credit=to_go; kl=k2_loss; clip_std=[2.0, 1.0]
    grpo advantages=leave_one_out; scale_rewards=batch
    grpo advantages=leave_one_out; clip_std=[0.5, 1.0]
""")


# What only the trainer sees: data that do not fit the method.
LATE = cases("""
    kto dataset=[{prompt: a, completion: b, label: true}, {prompt: a, completion: c, label: false}]
    dpo loss_type=ipo; dataset+={prompt: a, chosen: b, rejected: [c, d]}
    dpo dataset=[{prompt: a, chosen: b, rejected: c, label: 0.3}, {prompt: d, chosen: b, rejected: c, label: 1}]
""")


def settings_of(case):
    """The method of a case, and its settings."""
    method, _, text = case.partition(" ")
    settings = changes(text)
    for key in [key for key in settings if key.endswith("+")]:
        settings[key[:-1]] = [*METHODS[method][key[:-1]], settings.pop(key)]
    return {"method": method} | settings


@pytest.mark.parametrize("case", EARLY)
def test_refused_before_weights_are_read(refused, golden, write, no_model, case):
    golden(case, refused("train", write(**settings_of(case))))


@pytest.mark.parametrize("case", LATE)
def test_data_that_a_method_cannot_use(refused, golden, write, case):
    golden(case, refused("train", write(**settings_of(case))))


def test_a_reference_with_other_tokens(refused, write, no_model, tmp_path, make_language_model):
    make_language_model(tmp_path / "other", extra="!")
    found = refused("train", write("dpo", reference_model="other"))
    assert_problem(found, "reference_model", "has 47 tokens, not the 46 of model")


def test_a_reference_with_a_larger_vocabulary(refused, write, tmp_path, make_language_model, tiny_language_model):
    """The tokens are the same, but its network has one more."""
    make_language_model(tmp_path / "other", extra="!")
    for file in tiny_language_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    found = refused("train", write("dpo", reference_model="other"))
    assert_problem(found, "the reference", "a vocabulary of 47 tokens and the model one of 46")


@pytest.fixture
def model(tmp_path, tiny_language_model):
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_language_model, tmp_path / "model"))


def cut_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def without_end(path):
    edit_json("tokenizer_config.json", eos_token=...)(path)
    (path / "special_tokens_map.json").unlink(missing_ok=True)


DAMAGES = {
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
    "weights cut off": cut_weights,
    "weights missing": lambda path: (path / "model.safetensors").unlink(),
    "configuration broken": lambda path: (path / "config.json").write_text("{"),
    "tokenizer missing": lambda path: [f.unlink() for f in path.glob("*token*")],
    "no end of sequence": without_end,
    "an encoder": edit_json("config.json", model_type="bert", architectures=["BertModel"]),
    "an image pipeline": lambda path: (path / "model_index.json").write_text("{}"),
}


@pytest.mark.parametrize("method", ["grpo", "reward_model"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_folder_that_cannot_be_used(refused, golden, write, model, damage, method):
    DAMAGES[damage](model)
    golden(f"model: {damage}", refused("train", write(method, model="model")))


@pytest.mark.parametrize("reward", ["later", "silent"])
def test_a_reward_that_breaks_at_once_leaves_nothing_and_the_same_command_runs_once_it_is_fixed(
    cli, refused, golden, write, tmp_path, reward
):
    golden(f"reward: {reward}", refused("train", write(reward=f"mine.py:{reward}")))
    fixed = REWARDS.replace('else float("nan")', "else 2.0").replace("[None]", "[1.0]")
    (tmp_path / "mine.py").write_text(fixed)
    sys.modules.pop("mine", None)
    outcome = cli("train", tmp_path / "tiny.yaml")
    assert outcome.status == 0, outcome.err


# -- run folders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(tiny_language_model, finish):
    """A run of dpo that asked its reference once, and its settings."""
    settings = SETTINGS | METHODS["dpo"] | {"method": "dpo", "model": str(tiny_language_model)}
    return finish(settings | {"epochs": 2, "checkpoint_every": 1, "precompute_ref_log_probs": True})


@pytest.fixture
def finished(finished_run, write, tmp_path):
    """The configuration of a finished run of which run/ is a copy."""
    folder, settings = finished_run
    shutil.copytree(folder, tmp_path / "run")
    return write(**{"prompts": ..., "reward": ..., "num_generations": ...} | settings)


def test_resume_of_another_methods_run(refused, write, finished, no_model):
    for method in ("kto", "grpo"):
        config = write(method)
        assert_problem(refused("train", config, "resume=true"), "resume=true", "a run of method='dpo'")


@pytest.mark.parametrize(
    "override",
    [
        "beta=0.2",
        "lora=null",
        "temperature=0.5",
        "max_prompt_length=3",
        "dataset=[{prompt: a, chosen: b, rejected: c}]",
    ],
)
def test_resume_from_another_run(refused, golden, finished, override):
    golden(f"resume: {override}", refused("train", finished, "resume=true", "epochs=3", override))


def test_rows_that_have_changed_since(cli, write, tmp_path):
    """The settings are the same and the file is another: its reference log-probs are not those of the run."""
    rows = tmp_path / "rows.jsonl"
    config = write("dpo", dataset="rows.jsonl", precompute_ref_log_probs=True)
    assert cli("train", config).status == 0
    rows.write_text("".join(json.dumps(row) + "\n" for row in reversed(PAIRS)))
    outcome = cli("train", config, "resume=true", "epochs=2")
    assert (outcome.status, len(outcome.sentences)) == (2, 1), outcome.err
    assert f"belongs to a run with other content of dataset ({rows}): put it back" in outcome.sentences[0]
    kept = (tmp_path / "run" / "reference.safetensors").read_bytes()
    assert cli("train", config, "resume=true", "epochs=2", "accept_changed=[dataset]").status == 0
    assert (tmp_path / "run" / "reference.safetensors").read_bytes() != kept


def test_a_damaged_file_of_the_reference(cli, tree, finished, tmp_path):
    file = tmp_path / "run" / "reference.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    outcome = cli("train", finished, "resume=true", "epochs=3")
    assert (outcome.status, len(outcome.sentences)) == (2, 1), outcome.err
    assert "reference.safetensors is damaged" in outcome.sentences[0]
