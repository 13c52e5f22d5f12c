"""Settings that are refused before a model is loaded: one sentence each, exit 2, nothing written."""

import pytest

OUT_OF_RANGE = """
    sampler=3 samples_per_epoch=0 sample_batch_size=0 micro_batch_size=0 updates_per_epoch=0 inner_epochs=0
    warmup_steps=-1 max_grad_norm=0 num_threads=0 checkpoint_every=0 keep_checkpoints=0 grid_every=-1
    sampler.steps=0 sampler.guidance_scale=-1 lora.rank=0 lora.alpha=0 clip_range_nats=0 timestep_fraction=0
    timestep_fraction=1.01 group_size=0 kl_coef=-0.1 advantage_clip=0 seed=4294967296 num_threads=100000000000
"""
# overrides given to `train`, and what each sentence must hold
CASES = {
    # names
    "learning_rat=1e-4": "unknown setting 'learning_rat': did you mean 'learning_rate'?",
    "sampler.step=3": "unknown setting 'sampler.step': did you mean 'steps'?",
    "lora.rnk=3": "unknown setting 'lora.rnk': did you mean 'rank'?",
    "zzzz=3": "unknown setting 'zzzz': `diffusion-align list settings` shows what can be set",
    "samplr.steps=3": "unknown setting 'samplr': did you mean 'sampler'?",
    "method=dppo": "method='dppo' is unknown: did you mean",
    "method=grop": "method='grop' is unknown: did you mean 'grpo'",
    "method=3": "method=3 is unknown",
    "method=[ddpo]": r"method=\['ddpo'\] is unknown",
    "sampler.name=euler": "sampler.name='euler' is not allowed: .*'ddim'.*'ddpm'",
    "objective=ppo": "objective='ppo' is not allowed: .*'ratio'",
    "kl=k3": "kl='k3' is not allowed: .*closed_form",
    "advantages=loo": "advantages='loo' is not allowed: .*prompt_history",
    "mixed_precision=fp8": "mixed_precision='fp8' is not allowed: .*bf16",
    "lr_schedule=step": "lr_schedule='step' is not allowed: .*cosine",
    "trackers=[mlflow]": "trackers.0='mlflow' is not allowed: .*tensorboard",
    "lora.layers=all": "lora.layers='all' is not allowed: .*attention",
    # types
    "epochs=many": "epochs='many' is not allowed: it must be a number",
    "epochs='20'": "epochs='20' is not allowed: it must be a number",
    "lora.rank=true": "lora.rank=True is not allowed: it must be a number",
    "epochs=2.5": "epochs=2.5 is not allowed: it must be a whole number",
    "seed=[1]": r"seed=\[1\] is not allowed",
    "learning_rate=null": "learning_rate=None is not allowed",
    "resume=perhaps": "resume='perhaps' is not allowed: it must be true or false",
    "adam_betas=big": "adam_betas='big' is not allowed",
    "adam_betas=[0.9, 0.9, 0.9]": r"adam_betas=\[0.9, 0.9, 0.9\] is not allowed",
    "model=3": "model='3' is neither an embedded model",
    "output_dir=[3]": r"output_dir=\[3\] is not allowed",
    "prompts=3": "prompts.source='3': there is no such file",
    "reward=3": "a reward must be a name.*got int",
    "show_prompts=a cat": "show_prompts='a cat' is not allowed: .*list",
    # ranges
    **{one: f"^{one} is not allowed" for one in OUT_OF_RANGE.split()},
    "epochs=0": "epochs=0 is not allowed: .*greater than or equal to 1",
    "seed=-1": "seed=-1 is not allowed: .*greater than or equal to 0",
    "learning_rate=0": "learning_rate=0 is not allowed: .*greater than 0",
    "learning_rate=.inf": "learning_rate=inf is not allowed: .*finite",
    "learning_rate=.nan": "learning_rate=nan is not allowed",
    "kl_coef=.inf": "kl_coef=inf is not allowed: .*finite",
    "sampler.guidance_scale=.inf": "sampler.guidance_scale=inf is not allowed: .*finite",
    "adam_betas=[0.9, 1.0]": "adam_betas.1=1.0 is not allowed: .*less than 1",
    "adam_betas=[-0.1, 0.999]": "adam_betas.0=-0.1 is not allowed: .*greater than or equal to 0",
    "weight_decay=-1e-4": "weight_decay=-0.0001 is not allowed",
    "ema_decay=1": "ema_decay=1 is not allowed: .*less than 1",
    "sampler.eta=1.5": "sampler.eta=1.5 is not allowed: .*less than or equal to 1",
    "clip_range=1": "clip_range=1 is not allowed: .*less than 1",
    # settings that do not fit each other
    "sampler.eta=0": "sampler.eta=0 makes every step deterministic.*use eta=1",
    "samples_per_epoch=5; updates_per_epoch=1": "samples_per_epoch=5 is not a multiple of sample_batch_size=2",
    "updates_per_epoch=3": "updates_per_epoch=3 is more than samples_per_epoch=2",
    "samples_per_epoch=8; group_size=3; advantages=group": "samples_per_epoch=8 is not a multiple of group_size=3",
    "advantages=leave_one_out; clip_std=[0.1, 1.0]": [
        "advantages=leave_one_out compares images of one prompt: set group_size to 2",
        "clip_std bounds a std by which advantages=leave_one_out does not divide: leave one out",
    ],
    "advantages=group": "advantages=group compares images of one prompt: set group_size to 2",
    "history_size=4; history_min_count=5": "history_min_count=5.*history_size=4",
    "clip_std=[1.0, 0.5]": r"clip_std=\[1.0, 0.5\] must be two numbers 0 <= low <= high",
    "clip_std=[-1.0, 0.5]": r"clip_std=\[-1.0, 0.5\] must be",
    "credit=to_go; timestep_fraction=0.5; kl_coef=0.1": "credit=to_go needs the KL of every later step",
    "show_prompts=[]": "show_prompts is empty",
    # model
    "model=emoji-ds": "model='emoji-ds' is neither an embedded model.*did you mean 'emoji-sd'?",
    "model=emoji-clip": "model='emoji-clip' is not a text-to-image pipeline",
    "model=./nowhere": "model='./nowhere' is neither",
    "model=tiny-lm": "model='tiny-lm' is a language model, not a text-to-image pipeline: use a text method",
    "model=": "model=None is not allowed",
    # reward
    "reward=jpeg_compressability": "unknown reward 'jpeg_compressability': did you mean 'jpeg_comp",
    "reward=no_such_module:f": "reward 'no_such_module:f' cannot be imported",
    "reward=length": "'length' .*text",
    "reward=nowhere.py:f": "reward file 'nowhere.py' does not exist",
    "reward=math:nothing": "'math' has no 'nothing'",
    "reward=math:pi": "reward 'math:pi' is a float",
    "reward=os.path:basename": "must take three arguments",
    **dict.fromkeys(["reward={scale: 2.0}", "reward={}"], "needs the key 'name'"),
    "reward={name: jpeg_compressibility, qualty: 3}": "has no option 'qualty': did you mean 'quality'?",
    "reward={name: jpeg_compressibility, quality: 101}": "quality=101 is not allowed: ",
    "reward={name: jpeg_compressibility, scale: 0}": "scale=0 of a reward must be a finite number",
    "reward=": "reward is empty: give a name",
    # prompts
    "prompts=[]": r"prompts.source=\[\] is not allowed: give a list",
    "prompts=": "prompts=None is not allowed: give a list",
    "prompts=['a cat', '  ']": ["row 1: the prompt is empty", "prompts: fix"],
    "prompts=[a cat, 3]": ["row 1: the prompt is 3, not a text", "prompts: fix"],
    "prompts=[{words: a cat}]": "the column prompt or caption or text is needed",
    "prompts=nowhere.txt": "prompts.source='nowhere.txt': there is no such file",
    "prompts=emoji_concept": "prompts.source='emoji_concept': there is no such.*one of animals",
    # overrides
    "epochs": "'epochs' is not of the form key=value",
    "=3": "'=3' is not of the form key=value",
    "epochs.more=3": "'epochs.more' cannot be set: 'epochs' is not a section",
    "prompts=[a, b": "the value of 'prompts=.a, b' is not valid YAML",
    "sampler..steps=3": "sampler",
    # several at once
    "learning_rate=-1; sampler.stps=3; reward=nothing; model=./x; prompts=[]": [
        "learning_rate=-1",
        "unknown setting 'sampler.stps'",
        r"prompts.source=\[\] is not allowed",
        "model='./x'",
        "unknown reward 'nothing'",
    ],
    "epochs; a.b.c": ["'epochs' is not", "'a.b.c' is not"],
    "sampler.eta=0; samples_per_epoch=5; reward=nothing": [
        "samples_per_epoch=5 is not a multiple",
        "sampler.eta=0",
        "unknown reward 'nothing'",
    ],
}


@pytest.mark.parametrize("overrides", CASES)
def test_train_refuses(refused, write_settings, no_model, overrides):
    assert refused("train", write_settings(), *overrides.split("; "), wanted=CASES[overrides]).out == ""


@pytest.mark.parametrize("key", ["model", "reward", "prompts", "output_dir"])
def test_a_setting_that_must_be_given(refused, write_settings, key):
    refused("train", write_settings(**{key: ...}), wanted=f"^{key} is required: set it$")


NUMBER_AS_KEY = "epochs: 1\n1: 2\nmodel: emoji-sd\nreward: jpeg_compressibility\nprompts: [a]\noutput_dir: run\n"
FILES = {
    "missing": (None, "config 'my.yaml' is neither a file nor a shipped recipe: "),
    "empty": (b"", "my.yaml holds no settings: write a mapping of them, as in epochs: 3"),
    "comment": (b"# all of it is a comment\n", "my.yaml holds no settings: "),
    "list": (b"- a\n- b\n", "my.yaml must hold a mapping of settings, not "),
    "text": (b"just text\n", "my.yaml must hold a mapping of settings, not "),
    "open bracket": (b"a: [1\nb: 2\n", r"my.yaml is not valid YAML \(line "),
    "two colons": (b"a: b: c\n", r"my.yaml is not valid YAML \(line 1\)"),
    "tab": (b"\ta: 1\n", r"my.yaml is not valid YAML \(line 1\)"),
    "not text": (b"\xff\xfe\x00", "my.yaml "),
    "control": (b"a: \x07\n", "my.yaml is not valid YAML"),
    "number as key": (NUMBER_AS_KEY.encode(), "1=1 is not allowed: it must be strings"),
}


@pytest.mark.parametrize("command", ["train", "doctor"])
@pytest.mark.parametrize("case", FILES)
def test_a_configuration_file_that_cannot_be_used(refused, tmp_path, case, command):
    content, wanted = FILES[case]
    if content is not None:
        (tmp_path / "my.yaml").write_bytes(content)
    refused(command, "my.yaml", wanted=wanted)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("p.txt", b"\n  \n", "prompts.source='p.txt' holds no prompt"),
        ("p.jsonl", b'{"prompt": "a cat"}\n{"prompt": \n', "line 2 is not a JSON object"),
        ("p.jsonl", b'{"words": "a cat"}\n', "the columns found are 'words': map our names to these"),
        ("p.jsonl", b"", "holds no prompt"),
        ("p.jsonl", b"null\n", "line 1 is not a JSON object"),
        ("p.tsv", b"a cat\n", "use a .txt, .jsonl, .jsonl.gz, .json, .csv or .parquet file"),
        ("p.txt", b"\xff\xfe\xfa\n", "cannot be read"),
    ],
)
def test_a_prompt_file_that_cannot_be_used(refused, write_settings, tmp_path, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    refused("train", write_settings(prompts=name), wanted=wanted)


def test_a_good_configuration_is_not_refused(cli, write_settings):
    outcome = cli("doctor", write_settings(), "epochs=3", "learning_rate=1e-4")
    assert outcome.status == 0, outcome.err
    assert "no problem found" in outcome.out
