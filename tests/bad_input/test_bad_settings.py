"""Settings that are refused before a model is loaded: one sentence each, exit 2, nothing written."""

import pytest

from tests.helpers.problems import assert_problem
from tests.helpers.tiny_runs import cases

# What is given to `train`.
CASES = cases("""
    # names
    learning_rat=1e-4
    sampler.step=3
    lora.rnk=3
    zzzz=3
    samplr.steps=3
    method=dppo
    method=grop
    method=3
    method=[ddpo]
    sampler.name=euler
    objective=ppo
    kl=k3
    advantages=loo
    mixed_precision=fp8
    lr_schedule=step
    trackers=[mlflow]
    lora.layers=all
    # types
    epochs='20'
    epochs=2.5
    lora.rank=true
    learning_rate=null
    resume=perhaps
    adam_betas=[0.9, 0.9, 0.9]
    model=3
    prompts=3
    reward=3
    show_prompts=a cat
    # settings that do not fit each other
    sampler.eta=0
    samples_per_epoch=5; updates_per_epoch=1
    updates_per_epoch=3
    samples_per_epoch=8; group_size=3; advantages=group
    advantages=leave_one_out; clip_std=[0.1, 1.0]
    advantages=group
    history_size=4; history_min_count=5
    clip_std=[1.0, 0.5]
    clip_std=[-1.0, 0.5]
    credit=to_go; timestep_fraction=0.5; kl_coef=0.1
    kl_bound_nats=1; clip_range=1e-3; clip_range_nats=1
    kl_bound_nats=1; ratio=guard
    kl_bound_nats=1; ratio=guard; objective=score_function
    ratio=guard; clip_range_nats=1
    sampler.noisy_order=progressive; sampler.noisy_range=[0, 0.5]
    sampler.noisy_range=[0.5, 0.5]; sampler.noisy_steps=2
    sampler.noisy_steps=60
    sampler.noisy_steps=2; sampler.name=ddpm
    sampler.noisy_steps=2; sampler.eta=0
    sampler.noisy_steps=2; timestep_range=[0, 0.5]; timestep_fraction=0.5
    method=rwr; temperature=0
    method=rwr; softmax_over=prompt; sampler.eta=0
    method=rwr; softmax_over=group; timestep_range=[0.5, 0.5]
    method=rwr; softmax_over=group; group_size=3
    method=rwr; clip_range=1e-3
    show_prompts=[]
    # model
    model=emoji-ds
    model=emoji-clip
    model=./nowhere
    model=tiny-lm
    model=
    # reward
    reward=jpeg_compressability
    reward=no_such_module:f
    reward=length
    reward=nowhere.py:f
    reward=math:nothing
    reward=math:pi
    reward=os.path:basename
    reward={scale: 2.0}
    reward={}
    reward={name: jpeg_compressibility, qualty: 3}
    reward={name: jpeg_compressibility, quality: 101}
    reward={name: jpeg_compressibility, scale: 0}
    reward=
    # prompts
    prompts=[]
    prompts=
    prompts=['a cat', '  ']
    prompts=[a cat, 3]
    prompts=[{words: a cat}]
    prompts=nowhere.txt
    prompts=emoji_concept
    # overrides
    epochs
    =3
    epochs.more=3
    prompts=[a, b
    sampler..steps=3
    # several at once
    learning_rate=-1; sampler.stps=3; reward=nothing; model=./x; prompts=[]
    epochs; a.b.c
    sampler.eta=0; samples_per_epoch=5; reward=nothing
""")
# The nearest values that are not allowed, or those without a place in an order.
OUT_OF_RANGE = cases("""
    sampler=3
    samples_per_epoch=0
    sample_batch_size=0
    micro_batch_size=0
    updates_per_epoch=0
    inner_epochs=0
    warmup_steps=-1
    max_grad_norm=0
    num_threads=0
    checkpoint_every=0
    keep_checkpoints=0
    grid_every=-1
    sampler.steps=0
    sampler.noisy_steps=0
    sampler.guidance_scale=-1
    lora.rank=0
    lora.alpha=0
    clip_range_nats=0
    kl_bound_nats=-0.1
    timestep_fraction=0
    timestep_fraction=1.01
    group_size=0
    kl_coef=-0.1
    advantage_clip=0
    seed=-1
    seed=4294967296
    num_threads=100000000000
    epochs=0
    learning_rate=0
    learning_rate=.inf
    learning_rate=.nan
    kl_coef=.inf
    sampler.guidance_scale=.inf
    weight_decay=-1e-4
    ema_decay=1
    sampler.eta=1.5
    clip_range=1
    adam_betas=[0.9,1.0]
    adam_betas=[-0.1,0.999]
""")


@pytest.mark.parametrize("overrides", [*CASES, *OUT_OF_RANGE])
def test_train_refuses(refused, golden, write_settings, no_model, overrides):
    golden(overrides, refused("train", write_settings(), *overrides.split("; ")))


@pytest.mark.parametrize("key", ["model", "reward", "prompts", "output_dir"])
def test_a_setting_that_must_be_given(refused, write_settings, key):
    assert_problem(refused("train", write_settings(**{key: ...})), key, "required")


NUMBER_AS_KEY = "epochs: 1\n1: 2\nmodel: emoji-sd\nreward: jpeg_compressibility\nprompts: [a]\noutput_dir: run\n"
FILES = {
    "missing": None,
    "empty": b"",
    "comment": b"# all of it is a comment\n",
    "list": b"- a\n- b\n",
    "text": b"just text\n",
    "open bracket": b"a: [1\nb: 2\n",
    "two colons": b"a: b: c\n",
    "tab": b"\ta: 1\n",
    "not text": b"\xff\xfe\x00",
    "control": b"a: \x07\n",
    "number as key": NUMBER_AS_KEY.encode(),
}


@pytest.mark.parametrize("command", ["train", "doctor"])
@pytest.mark.parametrize("case", FILES)
def test_a_configuration_file_that_cannot_be_used(refused, golden, tmp_path, case, command):
    if FILES[case] is not None:
        (tmp_path / "my.yaml").write_bytes(FILES[case])
    golden(f"config: {case}", refused(command, "my.yaml"))


PROMPT_FILES = {
    "blank.txt": b"\n  \n",
    "cut.jsonl": b'{"prompt": "a cat"}\n{"prompt": \n',
    "column.jsonl": b'{"words": "a cat"}\n',
    "empty.jsonl": b"",
    "null.jsonl": b"null\n",
    "ending.tsv": b"a cat\n",
    "latin.txt": b"\xff\xfe\xfa\n",
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_a_prompt_file_that_cannot_be_used(refused, golden, write_settings, tmp_path, name):
    (tmp_path / name).write_bytes(PROMPT_FILES[name])
    golden(f"prompts: {name}", refused("train", write_settings(prompts=name)))


def test_a_good_configuration_is_not_refused(cli, write_settings):
    outcome = cli("doctor", write_settings(), "epochs=3", "learning_rate=1e-4")
    assert outcome.status == 0, outcome.err
    assert "no problem found" in outcome.out
