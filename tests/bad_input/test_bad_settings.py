"""Settings that are refused before a model is loaded: one sentence each, exit 2, nothing written."""

import pytest

# overrides given to `train`, and what each sentence must hold
CASES = {
    # names
    "unknown key": (["learning_rat=1e-4"], ["unknown setting 'learning_rat': did you mean 'learning_rate'?"]),
    "unknown nested key": (["sampler.step=3"], ["unknown setting 'sampler.step': did you mean 'steps'?"]),
    "unknown lora key": (["lora.rnk=3"], ["unknown setting 'lora.rnk': did you mean 'rank'?"]),
    "unknown key near nothing": (["zzzz=3"], ["unknown setting 'zzzz': known are .*learning_rate"]),
    "unknown section": (["samplr.steps=3"], ["unknown setting 'samplr': did you mean 'sampler'?"]),
    "unknown method": (["method=dppo"], ["method='dppo' is unknown: did you mean"]),
    "method not a name": (["method=3"], ["method=3 is unknown"]),
    "method a list": (["method=[ddpo]"], [r"method=\['ddpo'\] is unknown"]),
    "unknown sampler": (["sampler.name=euler"], ["sampler.name='euler' is not allowed: .*'ddim'.*'ddpm'"]),
    "unknown objective": (["objective=ppo"], ["objective='ppo' is not allowed: .*'ratio'"]),
    "unknown kl": (["kl=k3"], ["kl='k3' is not allowed: .*closed_form"]),
    "unknown advantages": (["advantages=loo"], ["advantages='loo' is not allowed: .*prompt_history"]),
    "unknown precision": (["mixed_precision=fp8"], ["mixed_precision='fp8' is not allowed: .*bf16"]),
    "unknown schedule": (["lr_schedule=step"], ["lr_schedule='step' is not allowed: .*cosine"]),
    "unknown tracker": (["trackers=[mlflow]"], ["trackers.0='mlflow' is not allowed: .*tensorboard"]),
    "unknown lora layers": (["lora.layers=all"], ["lora.layers='all' is not allowed: .*attention"]),
    # types
    "text for a number": (["epochs=many"], ["epochs='many' is not allowed: it must be a number"]),
    "a number in quotes": (["epochs='20'"], ["epochs='20' is not allowed: it must be a number"]),
    "true for a number": (["lora.rank=true"], ["lora.rank=True is not allowed: it must be a number"]),
    "fraction for a count": (["epochs=2.5"], ["epochs=2.5 is not allowed: it must be a whole number"]),
    "list for a number": (["seed=[1]"], [r"seed=\[1\] is not allowed"]),
    "null for a number": (["learning_rate=null"], ["learning_rate=None is not allowed"]),
    "number for a section": (["sampler=3"], ["sampler=3 is not allowed"]),
    "text for a flag": (["resume=perhaps"], ["resume='perhaps' is not allowed: it must be true or false"]),
    "text for a pair": (["adam_betas=big"], ["adam_betas='big' is not allowed"]),
    "three for a pair": (["adam_betas=[0.9, 0.9, 0.9]"], [r"adam_betas=\[0.9, 0.9, 0.9\] is not allowed"]),
    "number for a model": (["model=3"], ["model='3' is neither an embedded model"]),
    "list for a folder": (["output_dir=[3]"], [r"output_dir=\[3\] is not allowed"]),
    "number for prompts": (["prompts=3"], ["prompts.source='3': there is no such file"]),
    "number for a reward": (["reward=3"], ["a reward must be a name.*got int"]),
    "text for show_prompts": (["show_prompts=a cat"], ["show_prompts='a cat' is not allowed: .*list"]),
    # ranges
    "no epochs": (["epochs=0"], ["epochs=0 is not allowed: .*greater than or equal to 1"]),
    "negative seed": (["seed=-1"], ["seed=-1 is not allowed: .*greater than or equal to 0"]),
    "no samples": (["samples_per_epoch=0"], ["samples_per_epoch=0 is not allowed"]),
    "no sample batch": (["sample_batch_size=0"], ["sample_batch_size=0 is not allowed"]),
    "no micro-batch": (["micro_batch_size=0"], ["micro_batch_size=0 is not allowed"]),
    "no updates": (["updates_per_epoch=0"], ["updates_per_epoch=0 is not allowed"]),
    "no inner epochs": (["inner_epochs=0"], ["inner_epochs=0 is not allowed"]),
    "no learning rate": (["learning_rate=0"], ["learning_rate=0 is not allowed: .*greater than 0"]),
    "infinite learning rate": (["learning_rate=.inf"], ["learning_rate=inf is not allowed: .*finite"]),
    "nan learning rate": (["learning_rate=.nan"], ["learning_rate=nan is not allowed"]),
    "negative warm-up": (["warmup_steps=-1"], ["warmup_steps=-1 is not allowed"]),
    "infinite kl": (["kl_coef=.inf"], ["kl_coef=inf is not allowed: .*finite"]),
    "infinite guidance": (["sampler.guidance_scale=.inf"], ["sampler.guidance_scale=inf is not allowed: .*finite"]),
    "beta of 1": (["adam_betas=[0.9, 1.0]"], ["adam_betas.1=1.0 is not allowed: .*less than 1"]),
    "negative beta": (["adam_betas=[-0.1, 0.999]"], ["adam_betas.0=-0.1 is not allowed: .*greater than or equal to 0"]),
    "negative decay": (["weight_decay=-1e-4"], ["weight_decay=-0.0001 is not allowed"]),
    "no gradient norm": (["max_grad_norm=0"], ["max_grad_norm=0 is not allowed"]),
    "ema of 1": (["ema_decay=1"], ["ema_decay=1 is not allowed: .*less than 1"]),
    "no threads": (["num_threads=0"], ["num_threads=0 is not allowed"]),
    "no checkpoints": (["checkpoint_every=0"], ["checkpoint_every=0 is not allowed"]),
    "keep none": (["keep_checkpoints=0"], ["keep_checkpoints=0 is not allowed"]),
    "negative grid": (["grid_every=-1"], ["grid_every=-1 is not allowed"]),
    "no steps": (["sampler.steps=0"], ["sampler.steps=0 is not allowed"]),
    "eta above 1": (["sampler.eta=1.5"], ["sampler.eta=1.5 is not allowed: .*less than or equal to 1"]),
    "negative guidance": (["sampler.guidance_scale=-1"], ["sampler.guidance_scale=-1 is not allowed"]),
    "rank 0": (["lora.rank=0"], ["lora.rank=0 is not allowed"]),
    "alpha 0": (["lora.alpha=0"], ["lora.alpha=0 is not allowed"]),
    "clip of 1": (["clip_range=1"], ["clip_range=1 is not allowed: .*less than 1"]),
    "clip of 0 nats": (["clip_range_nats=0"], ["clip_range_nats=0 is not allowed"]),
    "fraction 0": (["timestep_fraction=0"], ["timestep_fraction=0 is not allowed"]),
    "fraction above 1": (["timestep_fraction=1.01"], ["timestep_fraction=1.01 is not allowed"]),
    "no group": (["group_size=0"], ["group_size=0 is not allowed"]),
    "negative kl": (["kl_coef=-0.1"], ["kl_coef=-0.1 is not allowed"]),
    "no advantage clip": (["advantage_clip=0"], ["advantage_clip=0 is not allowed"]),
    # settings that do not fit each other
    "eta 0": (["sampler.eta=0"], ["sampler.eta=0 makes every step deterministic.*use eta=1"]),
    "batches that do not fit": (
        ["samples_per_epoch=5", "updates_per_epoch=1"],
        ["samples_per_epoch=5 is not a multiple of sample_batch_size=2"],
    ),
    "more updates than samples": (["updates_per_epoch=3"], ["updates_per_epoch=3 is more than samples_per_epoch=2"]),
    "groups that do not fit": (
        ["samples_per_epoch=8", "group_size=3", "advantages=group"],
        ["samples_per_epoch=8 is not a multiple of group_size=3"],
    ),
    "leave one out of one": (
        ["advantages=leave_one_out", "clip_std=[0.1, 1.0]"],
        [
            "advantages=leave_one_out compares images of one prompt: set group_size to 2",
            "clip_std bounds a std by which advantages=leave_one_out does not divide: leave one out",
        ],
    ),
    "groups of one": (["advantages=group"], ["advantages=group compares images of one prompt: set group_size to 2"]),
    "history smaller than its minimum": (
        ["history_size=4", "history_min_count=5"],
        ["history_min_count=5.*history_size=4"],
    ),
    "clip_std reversed": (["clip_std=[1.0, 0.5]"], [r"clip_std=\[1.0, 0.5\] must be two numbers 0 <= low <= high"]),
    "clip_std negative": (["clip_std=[-1.0, 0.5]"], [r"clip_std=\[-1.0, 0.5\] must be"]),
    "credit with a fraction": (
        ["credit=to_go", "timestep_fraction=0.5", "kl_coef=0.1"],
        ["credit=to_go needs the KL of every later step: set timestep_fraction=1"],
    ),
    "no prompts to show": (["show_prompts=[]"], ["show_prompts is empty"]),
    # model
    "unknown model": (["model=emoji-ds"], ["model='emoji-ds' is neither an embedded model.*did you mean 'emoji-sd'?"]),
    "a model that does not draw": (["model=emoji-clip"], ["model='emoji-clip' is not a text-to-image pipeline"]),
    "model folder missing": (["model=./nowhere"], ["model='./nowhere' is neither"]),
    "empty model": (["model="], ["model=None is not allowed"]),
    # reward
    "unknown reward": (
        ["reward=jpeg_compressability"],
        ["unknown reward 'jpeg_compressability': did you mean 'jpeg_comp"],
    ),
    "reward module missing": (["reward=no_such_module:f"], ["reward 'no_such_module:f' cannot be imported"]),
    "reward file missing": (["reward=nowhere.py:f"], ["reward file 'nowhere.py' does not exist"]),
    "reward function missing": (["reward=math:nothing"], ["'math' has no 'nothing'"]),
    "reward that is no function": (["reward=math:pi"], ["reward 'math:pi' is a float"]),
    "reward of one argument": (["reward=os.path:basename"], ["must take three arguments"]),
    "reward without a name": (["reward={scale: 2.0}"], ["needs the key 'name'"]),
    "unknown reward option": (
        ["reward={name: jpeg_compressibility, qualty: 3}"],
        ["has no option 'qualty': did you mean 'quality'?"],
    ),
    "reward option out of range": (
        ["reward={name: jpeg_compressibility, quality: 101}"],
        ["quality=101 is not allowed: "],
    ),
    "reward scale 0": (
        ["reward={name: jpeg_compressibility, scale: 0}"],
        ["scale=0 of a reward must be a finite number"],
    ),
    "empty reward": (["reward="], ["reward is empty: give a name"]),
    # prompts
    "seed that numpy refuses": (["seed=4294967296"], ["seed=4294967296 is not allowed"]),
    "more threads than there can be": (["num_threads=100000000000"], ["num_threads=100000000000 is not allowed"]),
    "empty prompt list": (["prompts=[]"], [r"prompts.source=\[\] is not allowed: give a list"]),
    "empty prompts": (["prompts="], ["prompts=None is not allowed: give a list"]),
    "blank prompt": (["prompts=['a cat', '  ']"], ["row 1: the prompt is empty", "prompts: mend"]),
    "number among prompts": (["prompts=[a cat, 3]"], ["row 1: the prompt is 3, not a text", "prompts: mend"]),
    "prompt mapping without a prompt": (
        ["prompts=[{words: a cat}]"],
        ["the column prompt or caption or text is needed"],
    ),
    "prompt file missing": (["prompts=nowhere.txt"], ["prompts.source='nowhere.txt': there is no such file"]),
    "unknown shipped list": (
        ["prompts=emoji_concept"],
        ["prompts.source='emoji_concept': there is no such.*one of animals"],
    ),
    # overrides
    "override without =": (["epochs"], ["'epochs' is not of the form key=value"]),
    "override without a key": (["=3"], ["'=3' is not of the form key=value"]),
    "override into a value": (["epochs.more=3"], ["'epochs.more' cannot be set: 'epochs' is not a section"]),
    "override that is no YAML": (["prompts=[a, b"], ["the value of 'prompts=.a, b' is not valid YAML"]),
    "override of a part of nothing": (["sampler..steps=3"], ["sampler"]),
    # several at once
    "three mistakes": (
        ["learning_rate=-1", "sampler.stps=3", "reward=nothing", "model=./x", "prompts=[]"],
        [
            "learning_rate=-1",
            "unknown setting 'sampler.stps'",
            "unknown reward 'nothing'",
            "model='./x'",
            r"prompts.source=\[\] is not allowed",
        ],
    ),
    "two overrides": (["epochs", "a.b.c"], ["'epochs' is not", "'a.b.c' is not"]),
    "cross checks beside other problems": (
        ["sampler.eta=0", "samples_per_epoch=5", "reward=nothing"],
        ["samples_per_epoch=5 is not a multiple", "sampler.eta=0", "unknown reward 'nothing'"],
    ),
}


def one_sentence(text):
    assert text == text.strip()
    assert text
    assert "\n" not in text
    assert not text.endswith(".")
    assert len(text) < 900  # the longest lists every setting
    assert "Traceback" not in text
    assert "pydantic" not in text


@pytest.mark.parametrize(("overrides", "wanted"), CASES.values(), ids=CASES.keys())
def test_train_refuses(cli, write_settings, tree, overrides, wanted):
    import re

    config = write_settings()
    before = tree()
    outcome = cli("train", config, *overrides)
    assert outcome.status == 2
    assert outcome.err.count("error: ") == len(outcome.err.splitlines()) == len(wanted), outcome.err
    for sentence in outcome.sentences:
        one_sentence(sentence)
    for pattern in wanted:
        assert any(re.search(pattern, sentence) for sentence in outcome.sentences), (pattern, outcome.err)
    assert outcome.out == ""
    assert tree() == before


@pytest.mark.parametrize("key", ["model", "reward", "prompts", "output_dir"])
def test_a_setting_that_must_be_given(cli, write_settings, tree, key):
    config = write_settings(**{key: ...})
    before = tree()
    outcome = cli("train", config)
    assert (outcome.status, outcome.err) == (2, f"error: {key} is required: set it\n")
    assert tree() == before


@pytest.mark.parametrize("command", ["train", "doctor"])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "config 'my.yaml' is neither a file nor a shipped recipe: "),
        ("", "my.yaml holds no settings: write a mapping of them, as in epochs: 3"),
        ("# all of it is a comment\n", "my.yaml holds no settings: "),
        ("- a\n- b\n", "my.yaml must hold a mapping of settings, not "),
        ("just text\n", "my.yaml must hold a mapping of settings, not "),
        ("a: [1\nb: 2\n", "my.yaml is not valid YAML (line "),
        ("a: b: c\n", "my.yaml is not valid YAML (line 1)"),
        ("\ta: 1\n", "my.yaml is not valid YAML (line 1)"),
        (b"\xff\xfe\x00", "my.yaml "),
        (b"a: \x07\n", "my.yaml is not valid YAML"),
        (
            "epochs: 1\n1: 2\nmodel: emoji-sd\nreward: jpeg_compressibility\nprompts: [a]\noutput_dir: run\n",
            "1=1 is not allowed: it must be strings",
        ),
    ],
    ids=[
        "missing",
        "empty",
        "comment",
        "list",
        "text",
        "open bracket",
        "two colons",
        "tab",
        "not text",
        "control",
        "number as key",
    ],
)
def test_a_configuration_file_that_cannot_be_used(cli, tmp_path, tree, text, wanted, command):
    if text is not None:
        (tmp_path / "my.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = tree()
    outcome = cli(command, "my.yaml")
    assert outcome.status == 2
    assert len(outcome.sentences) == len(outcome.err.splitlines()) == 1, outcome.err
    assert wanted in outcome.sentences[0]
    one_sentence(outcome.sentences[0])
    assert tree() == before


def test_a_misspelt_recipe_is_named(cli):
    outcome = cli("train", "quickstrat")
    assert outcome.sentences == [
        "config 'quickstrat' is neither a file nor a shipped recipe: did you mean 'quickstart'?"
    ]


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("p.txt", "\n  \n", "prompts.source='p.txt' holds no prompt"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": \n', "line 2 is not a JSON object"),
        ("p.jsonl", '{"words": "a cat"}\n', "the columns found are 'words': map our names to these"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.jsonl", "null\n", "line 1 is not a JSON object"),
        ("p.tsv", "a cat\n", "use a .txt, .jsonl, .jsonl.gz, .json, .csv or .parquet file"),
        ("p.txt", b"\xff\xfe\xfa\n", "cannot be read"),
    ],
    ids=["blank txt", "broken jsonl", "jsonl without prompt", "empty jsonl", "null", "tsv", "not text"],
)
def test_a_prompt_file_that_cannot_be_used(cli, write_settings, tmp_path, tree, name, text, wanted):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    config = write_settings(prompts=name)
    before = tree()
    outcome = cli("train", config)
    assert outcome.status == 2
    assert len(outcome.sentences) == len(outcome.err.splitlines()) == 1
    assert wanted in outcome.sentences[0]
    one_sentence(outcome.sentences[0])
    assert tree() == before


def test_a_good_configuration_is_not_refused(cli, write_settings):
    outcome = cli("doctor", write_settings(), "epochs=3", "learning_rate=1e-4")
    assert outcome.status == 0, outcome.err
    assert "no problem found" in outcome.out
