"""Preferences that cannot be used and settings of diffusion_dpo that contradict each other: found before any model."""

import json

import pytest
from PIL import Image

from tests.helpers.problems import assert_problem, assert_problems
from tests.helpers.tiny_runs import cases, changes

DPO = {"method": "diffusion_dpo", "reward": ..., "prompts": ..., "pairs": "pairs/pairs.jsonl", "beta": 1.0}
ONLINE = {"pairs": ..., "prompts": ["a red apple", "a cat"], "reward": "jpeg_compressibility", "group_size": 2}


@pytest.fixture
def config(tmp_path, write_settings, tiny_sd):
    """``config(rows=None, **changes)``: the path of a configuration, with pairs/ beside it."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, colour, size in (("red", "red", 16), ("blue", "blue", 16), ("same", "red", 16), ("large", "blue", 24)):
        Image.new("RGB", (size, size), colour).save(folder / f"{name}.png")
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:50])
    (folder / "note.png").write_text("no image")

    def make(rows=None, **changes):
        rows = [{}] if rows is None else rows
        good = {"prompt": "a cat", "chosen": "red.png", "rejected": "blue.png"}
        text = "".join(json.dumps(row if "label_0" in row else good | row) + "\n" for row in rows)
        (folder / "pairs.jsonl").write_text(text)
        return write_settings(**DPO | {"model": str(tiny_sd)} | changes)

    return make


def label(value, **changes):
    return {"caption": "a cat", "jpg_0": "red.png", "jpg_1": "blue.png", "label_0": value} | changes


ROWS = {
    "a missing image": [{"chosen": "gone.png"}],
    "among good ones": [{}, {"rejected": "gone.png"}],
    "a truncated image": [{}, {"rejected": "cut.png"}],
    "no image": [{}, {"chosen": "note.png"}],
    "one image twice": [{}, {"rejected": "red.png"}],
    "two equal images": [{}, {"rejected": "same.png"}],
    "unequal sizes": [{}, {"rejected": "large.png"}],
    "an empty caption": [{}, {"prompt": "  "}],
    "no caption": [{}, {"prompt": None}],
    "a caption that is no text": [{}, {"prompt": 3}],
    "a label that is none": [label(1), label(0.7)],
    "nothing but ties": [label(0.5)] * 2,
    "no rows": [],
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_cannot_be_used(refused, golden, config, no_model, case):
    golden(f"rows: {case}", refused("train", config(ROWS[case])))


def test_images_that_cannot_be_used_and_none_is_left(refused, config, no_model):
    path = config([{"chosen": "cut.png"}])
    found = refused("train", path)
    assert_problems(found, ("pairs", "row 0"), ("pairs.source", "no usable pair (1 rows, 0 ties, 1 bad rows)"))
    assert refused("train", path, "pairs={source: pairs/pairs.jsonl, skip_bad_rows: true}") == found


def test_bad_rows_can_be_left_out(cli, config, tmp_path):
    """All kinds at once: what is left trains, and the line says what was left out."""
    rows = [row | {} for rows in ROWS.values() for row in rows if "label_0" not in row]
    outcome = cli("train", config([{}, *rows]), "pairs={source: pairs/pairs.jsonl, skip_bad_rows: true}")
    assert outcome.status == 0, outcome.err
    bad = [i for i, row in enumerate([{}, *rows]) if row]
    assert f"left out: 0 ties, {len(bad)} bad rows ({', '.join(map(str, bad[:10]))})" in " ".join(outcome.out.split())
    assert (tmp_path / "run" / "final").is_dir()


SETTINGS = cases("""
    pairs=nowhere
    pairs=pairs/no.jsonl
    pairs=pairs/red.png
    pairs={source: emoji_style, split: test}
    pairs={source: pairs/pairs.jsonl, split: test}
    pairs={source: pairs/pairs.jsonl, columns: {chosen: z}}
    pairs={source: pairs/pairs.jsonl, columns: {choosen: chosen}}
    pairs={source: emoji_style, max: 3}
    pairs={split: train}
    pairs={source: emoji_style, max_pairs: 0}
    pairs=3
    beta=0
    beta=-1
    beta=.inf
    beta=.nan
    beta=much
    beta_dpo=2000
    beta=...
    prompts=[a cat]
    pairs=...; group_size=2
    online; reward=...
    target=logged
    online; target=logged; sampler={steps: 2, eta: 0.0}
    variant=corrected; loss_type=ipo
    variant=corrected; label_smoothing=0.1
    loss_type=ipo; label_smoothing=0.1
    reward_mode=logratio
    old_refresh=epoch
    variant=corected
    loss_type=dpo
    target=x0
    weighting=snr
    online; group_size=1
    online; group_size=4; samples_per_epoch=2
    label_smoothing=0.7
    caption_dropout=1
    decisions_per_pair=0
    timestep_range=[0.6, 0.2]
    timestep_range=[0, 1.5]
    timestep_range=[0.5]
    kl_coef=-0.1
    max_winner_error=1
    max_winner_error=inf
    show_prompts=[]
    clip_range=0.1
    model=tiny-lm
    reward=taste
    method=difusion_dpo
""")


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_used(refused, golden, config, no_model, case):
    online = ONLINE if case.startswith("online; ") else {}
    golden(case, refused("train", config(**online | changes(case.removeprefix("online; ")))))


def test_settings_that_do_not_fit_each_other_are_all_said_at_once(refused, golden, config, no_model):
    settings = changes("beta_dpo=5000; variant=corrected; loss_type=ipo; target=logged; timestep_range=[1, 0]")
    settings |= changes("prompts=[a cat]; reward=taste; model=./nowhere")
    golden("all at once", refused("train", config([{"chosen": "gone.png"}], **settings)))


def test_values_that_are_not_allowed_are_all_said_at_once(refused, golden, config, no_model):
    settings = changes("beta=0; label_smoothing=0.7; group_size=1; variant=new; model=./nowhere")
    rows = [{"prompt": ""}, {"chosen": "gone.png"}]
    golden("all values at once", refused("train", config(rows, **settings)))


def test_all_bad_images_are_said_at_once_and_before_any_model(refused, config, no_model):
    rows = [{}, {"chosen": "cut.png"}, {"rejected": "same.png"}, {"rejected": "large.png"}, {"chosen": "note.png"}]
    found = refused("train", config(rows))
    assert_problems(found, *(("pairs", f"row {i}") for i in (1, 2, 3, 4)), ("pairs", "fix the rows above"))


# -- what only the model tells -----------------------------------------------------------------------------------------


def write_scheduler(model, scheduler):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", type(scheduler).__name__]}))
    scheduler.save_pretrained(model / "scheduler")


@pytest.mark.parametrize("online", [False, True])
def test_flow_matching(refused, config, model, online):
    from diffusers import FlowMatchEulerDiscreteScheduler

    write_scheduler(model, FlowMatchEulerDiscreteScheduler())
    settings = {"model": "model"} | (ONLINE if online else {})
    assert_problem(refused("train", config(**settings)), "the model's scheduler", "flow matching")


@pytest.mark.parametrize("online", [False, True])
def test_no_signal_at_the_start_and_epsilon(refused, config, model, online):
    from diffusers import DDIMScheduler

    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}
    write_scheduler(model, DDIMScheduler(**options))
    settings = {"model": "model"} | (ONLINE if online else {})
    assert_problem(refused("train", config(**settings)), "the scheduler", "rescale_betas_zero_snr")


def test_a_range_that_leaves_too_few_steps(refused, config):
    settings = {"timestep_range": [0.5, 0.503], "steps_per_pair": 3}
    assert_problem(refused("train", config(**settings)), "timestep_range", "leaves 2 of the steps")
