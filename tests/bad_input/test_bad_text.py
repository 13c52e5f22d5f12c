"""Bad settings, data, models and rewards of text runs: one sentence each, exit 2, no traceback, nothing written, and
no weights read before they have to be."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.tiny_runs import TINY, changes, edit_json

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


BOTH = "prompts are completed and judged online, dataset has completions: leave one of them out"
MEND = "dataset: fix the rows above"
NO_TEMPLATE = "the rows hold conversations but the tokenizer has no chat template"
NEEDS = "reward 'needs_answer' needs 'answer', which is neither an option nor a column of the data: it has 'solution'"
UNDIVIDED = "is of a std by which advantages=leave_one_out does not divide: leave one out"
# What is found without weights: a method with its settings (``...`` drops one, += adds a row), and the sentences.
EARLY = {
    # names
    "grpo num_generation=2": "unknown setting 'num_generation': did you mean 'num_gen",
    "grpo dtype=bfloat16; lora=null": "dtype=bfloat16 is of frozen weights and lora=null trains them all",
    "ppo lora={rnk: 2}": "unknown setting 'lora.rnk': did you mean 'rank'",
    "dpo dataset={source: rows.jsonl, colums: {}}": "unknown setting 'dataset.colums': did you mean 'columns'",
    "dpo dynamic_beta={beta_mim: 0.1}": "unknown setting 'dynamic_beta.beta_mim': did you mean 'beta_m",
    "grpo kl=k3": "kl='k3' is not allowed: .*'k1_reward'",
    "dpo loss_type=sigmod": "loss_type='sigmod' is not allowed: .*'sigmoid'",
    # numbers
    "dpo beta=-0.1": "beta=-0.1 is not allowed: .*greater than 0",
    "grpo beta=-0.1": "beta=-0.1 is not allowed: .*greater than or equal to 0",
    "kto beta=-1": "beta=-1 is not allowed: .*greater than 0",
    "ppo kl_coef=-1": "kl_coef=-1 is not allowed",
    "grpo temperature=0": "temperature=0 is not allowed: .*greater than or equal to 0.001",
    "ppo max_completion_length=0": "max_completion_length=0 is not allowed",
    "grpo num_generations=1": "num_generations=1 leaves nothing to compare .* use 2 or more",
    "dpo prompts=[the cat, a dog]; reward=length; num_generations=1; dataset=...": "num_generations=1 leaves nothing",
    "grpo num_generations=3": "samples_per_epoch=4 is not a multiple of num_generations=3: change one of them",
    "grpo reward_weights=[1.0, 2.0]": r"reward_weights=\[1.0, 2.0\] are 2 numbers for 1 rewards: give one for each",
    "grpo reward_weights=[.inf]": r"reward_weights.0=inf is not allowed: .*finite",
    "ppo kl_target=1; kl_coef=0": "kl_target moves kl_coef by a factor",
    # data that is missing or too much
    "grpo prompts=...": "prompts and reward must both be given",
    "ppo reward=...": "prompts and reward must both be given",
    "dpo dataset=...": "give dataset, or prompts and a reward",
    "kto dataset=...; num_generations=2": "give dataset, or prompts and a reward",
    "dpo prompts=[the cat, a dog]; reward=length; num_generations=2": BOTH,
    "reward_model dataset=...": "dataset is required: set it",
    "grpo reward=[]": "reward is an empty list: give at least one",
    "grpo prompts=[]": r"prompts.source=\[\] is not allowed: give a list of rows",
    "grpo prompts=3": "prompts.source='3': there is no such file",
    "grpo prompts=absent.jsonl": "prompts.source='absent.jsonl': there is no such",
    "kto dataset=./absent": "dataset.source='./absent': there is no such",
    "grpo show_prompts=[]": "show_prompts is empty: leave it out",
    # columns
    "dpo dataset=[{prompt: a, better: b, worse: c}]": "columns chosen, rejected are needed; .*'better', 'worse': map",
    "grpo prompts=[{question: a}]": "prompts.columns: the column prompt is needed; .* are 'question': map our",
    "kto dataset=[{prompt: a, chosen: b, rejected: c}]": "the columns prompt, completion, label are needed; .*ed'",
    "dpo dataset={source: rows.jsonl, columns: {chosen: z}}": "there is no column 'z'; .* 'prompt', 'chosen', 'reject",
    # rows
    "dpo dataset+={prompt: a, chosen: '', rejected: b}": ["dataset: row 2: chosen is empty", MEND],
    "kto dataset+={prompt: a, completion: ' ', label: true}": ["dataset: row 2: the completion is empty", MEND],
    "grpo prompts=[the cat, '']": ["prompts: row 1: the prompt is empty", "prompts: fix the rows above"],
    "reward_model dataset+={prompt: a, chosen: b, rejected: b}": ["row 2: chosen and rejected are the same", MEND],
    "kto dataset+={prompt: a, completion: b, label: maybe}": ["row 2: label is 'maybe', not true, false, 1 or 0", MEND],
    f"grpo prompts=[the cat, {'a' * 70}]": [
        "prompts: row 1: a prompt of 70 tokens leaves no room for a completion of 4 in the model's context of 64: "
        "set max_prompt_length=60 or less",
        "prompts: fix the rows above",
    ],
    "ppo max_completion_length=100": "leaves no room for a prompt in the model's context of 64 tokens: set",
    "dpo max_completion_length=64": "max_completion_length=64 leaves no room for a prompt",
    "grpo prompts=[{prompt: [{role: user, content: 'who?'}]}]": f"prompts: {NO_TEMPLATE}: give plain texts, or set",
    "dpo dataset=[{prompt: [{role: user, content: 'who?'}], chosen: me, rejected: you}]": f"dataset: {NO_TEMPLATE}",
    "grpo show_prompts=[[{role: user, content: 'who?'}]]": f"show_prompts: {NO_TEMPLATE}",
    "grpo show_prompts=[a, ' ']": "show_prompts: row 1: the prompt is empty",
    "reward_model eval_dataset=[{prompt: a, chosen: b}]": "eval_dataset.columns: .* found are 'prompt', 'chosen'",
    # models
    "grpo model=tiny-ml": "model='tiny-ml' is neither .*: did you mean 'tiny-lm'",
    "dpo model=./absent": "model='./absent' is neither",
    "grpo model=...": "model is required: set it",
    "grpo model=emoji-sd": "model='emoji-sd' is an image model, not a language model",
    "reward_model model=emoji-sd": "model='emoji-sd' is an image model, not a language model",
    "dpo reference_model=tiny-ml": "reference_model='tiny-ml' is neither",
    "dpo reference_model=emoji-sd": "reference_model='emoji-sd' is an image",
    # rewards
    "grpo reward=lenght": "unknown reward 'lenght': did you mean 'length'",
    "grpo reward=jpeg_compressibility": "'jpeg_compressibility' .*image",
    "grpo reward=[length, lenght]": "unknown reward 'lenght'",
    "grpo reward=absent.py:f": "reward file 'absent.py' does not exist",
    "grpo reward={name: length, targt: 3}": "no option 'targt': did you mean",
    "grpo reward=mine.py:too_short": "reward 'too_short' returned 1 score for 2 comp",
    "ppo reward=mine.py:nan": "reward 'nan' returned nan for completion 0",
    "grpo reward=mine.py:raises": "reward 'raises' raised KeyError: 'label'",
    "grpo reward=mine.py:needs_answer; prompts=[{prompt: a, solution: b}]": NEEDS,
    "dpo reward=mine.py:raises": "reward 'raises' raised KeyError: 'label'",
    # all at once
    "grpo model=tiny-ml; num_generation=2; beta=-1; reward=lenght; prompts=absent.jsonl; mixed_precision=fp8": [
        "mixed_precision='fp8' is not allowed",
        "beta=-1 is not allowed",
        "unknown setting 'num_generation'",
        "model='tiny-ml' is neither",
        "unknown reward 'lenght'",
        "prompts.source='absent.jsonl': there is no such",
    ],
    "grpo num_generations=3; reward_weights=[1.0, 2.0]; credit=to_go; kl=k2_loss; clip_std=[2.0, 1.0]": [
        "reward_weights=.* are 2 numbers for 1 rewards",
        "samples_per_epoch=4 is not a multiple of num_generations=3",
        "clip_std=",
        "kl=k2_loss has no effect while beta=0",
        "credit=to_go belongs to kl=k1_reward",
    ],
    "grpo advantages=leave_one_out; scale_rewards=batch": f"scale_rewards=batch {UNDIVIDED}",
    "grpo advantages=leave_one_out; clip_std=[0.5, 1.0]": f"clip_std {UNDIVIDED}",
}


# What only the trainer sees: data that do not fit the method.
LATE = {
    "kto dataset=[{prompt: a, completion: b, label: true}, {prompt: a, completion: c, label: false}]": (
        "dataset holds one prompt, and KTO's reference point needs two or more: add some"
    ),
    "dpo loss_type=ipo; dataset+={prompt: a, chosen: b, rejected: [c, d]}": (
        "dataset: row 2 has 2 rejected, and loss_type=ipo compares with one: use loss_type=sigmoid"
    ),
    "dpo dataset=[{prompt: a, chosen: b, rejected: c, label: 0.3}, {prompt: d, chosen: b, rejected: c, label: 1}]": (
        "dataset: row 0 has the label 0.3, and loss_type=sigmoid takes every chosen for preferred: use loss_type="
    ),
}


def settings_of(case):
    """The method of a case, and its settings."""
    method, _, text = case.partition(" ")
    settings = changes(text)
    for key in [key for key in settings if key.endswith("+")]:
        settings[key[:-1]] = [*METHODS[method][key[:-1]], settings.pop(key)]
    return {"method": method} | settings


@pytest.mark.parametrize("case", EARLY)
def test_refused_before_weights_are_read(refused, write, no_model, case):
    refused("train", write(**settings_of(case)), wanted=EARLY[case])


@pytest.mark.parametrize("case", LATE)
def test_data_that_a_method_cannot_use(refused, write, case):
    refused("train", write(**settings_of(case)), wanted=LATE[case])


def test_a_reference_with_other_tokens(refused, write, no_model, tmp_path, make_language_model):
    make_language_model(tmp_path / "other", extra="!")
    wanted = r"reference_model='.*other' has 47 tokens, not the 46 of model='.*': use a reference with the model's own"
    refused("train", write("dpo", reference_model="other"), wanted=wanted)


def test_a_reference_with_a_larger_vocabulary(refused, write, tmp_path, make_language_model, tiny_language_model):
    """The tokens are the same, but its network has one more."""
    make_language_model(tmp_path / "other", extra="!")
    for file in tiny_language_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    wanted = "the reference has a vocabulary of 47 tokens and the model one of 46: use a reference with the model's own"
    refused("train", write("dpo", reference_model="other"), wanted=wanted)


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
    "empty": (lambda path: [file.unlink() for file in path.iterdir()], "model='model': the folder has no config.json"),
    "weights cut off": (cut_weights, "model='.*model' "),
    "weights missing": (lambda path: (path / "model.safetensors").unlink(), "model='.*model' "),
    "configuration broken": (lambda path: (path / "config.json").write_text("{"), "model='model'"),
    "tokenizer missing": (lambda path: [f.unlink() for f in path.glob("*token*")], "model='.*model'.* tokenizer"),
    "no end of sequence": (without_end, "the tokenizer has no end-of-sequence token: set tokenizer.eos_token"),
    "an encoder": (
        edit_json("config.json", model_type="bert", architectures=["BertModel"]),
        "model='model' is a BertModel, not a causal language model",
    ),
    "an image pipeline": (
        lambda path: (path / "model_index.json").write_text("{}"),
        "model='model' is the folder of a text-to-image pipeline, not of a language",
    ),
}


@pytest.mark.parametrize("method", ["grpo", "reward_model"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_folder_that_cannot_be_used(refused, write, model, damage, method):
    harm, wanted = DAMAGES[damage]
    harm(model)
    refused("train", write(method, model="model"), wanted=wanted)


@pytest.mark.parametrize(
    ("reward", "wanted"),
    [
        ("later", "reward 'later' returned nan for completion 0 .prompt '.*'.: every score must be finite"),
        ("silent", "no reward has anything to say about sample 0 .prompt '.*'.: at least one must return a number"),
    ],
)
def test_a_reward_that_breaks_at_once_leaves_nothing_and_the_same_command_runs_once_it_is_mended(
    cli, refused, write, tmp_path, reward, wanted
):
    refused("train", write(reward=f"mine.py:{reward}"), wanted=wanted)
    mended = REWARDS.replace('else float("nan")', "else 2.0").replace("[None]", "[1.0]")
    (tmp_path / "mine.py").write_text(mended)
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
        wanted = "resume=true, but run is a run of method='dpo': choose a new output_dir"
        refused("train", config, "resume=true", wanted=wanted)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("beta=0.2", "belongs to another run: beta was 0.1 and is 0.2; put it back or choose a new output_dir"),
        ("lora=null", "belongs to another run: lora was .* and is None"),
        ("temperature=0.5", "belongs to another run: temperature was 1.0 and is 0.5"),
        ("max_prompt_length=3", "belongs to another run: max_prompt_length was None and is 3"),
        (
            "dataset=[{prompt: a, chosen: b, rejected: c}]",
            "belongs to another run: dataset was .* and is .*'chosen': 'b'",
        ),
    ],
)
def test_resume_from_another_run(refused, finished, override, wanted):
    refused("train", finished, "resume=true", "epochs=3", override, wanted=wanted)


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
