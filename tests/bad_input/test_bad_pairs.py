"""Preferences that cannot be used and settings of diffusion_dpo that contradict each other: found before any model."""

import json

import pytest
from PIL import Image

from tests.helpers.tiny_runs import changes

DPO = {"method": "diffusion_dpo", "reward": ..., "prompts": ..., "pairs": "pairs/pairs.jsonl", "beta": 1.0}
ONLINE = {"pairs": ..., "prompts": ["a red apple", "a cat"], "reward": "jpeg_compressibility", "group_size": 2}
MEND = "^pairs: fix the rows above, or set pairs.skip_bad_rows=true to leave them out$"


@pytest.fixture
def config(tmp_path, write_settings, tiny_sd):
    """``config(rows=None, **changes)``: the path of a configuration, with pairs/ beside it."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, colour, size in (("red", "red", 16), ("blue", "blue", 16), ("same", "red", 16), ("large", "blue", 24)):
        Image.new("RGB", (size, size), colour).save(folder / f"{name}.png")
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:50])
    (folder / "note.png").write_text("no picture")

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
    "a missing picture": (
        [{"chosen": "gone.png"}],
        ["pairs: row 0: the image gone.png is missing", "holds no usable pair"],
    ),
    "among good ones": ([{}, {"rejected": "gone.png"}], ["pairs: row 1: the image gone.png is missing", MEND]),
    "a truncated picture": ([{}, {"rejected": "cut.png"}], ["row 1: rejected is no PNG, JPEG", MEND]),
    "no picture": ([{}, {"chosen": "note.png"}], ["row 1: chosen is no PNG, JPEG", MEND]),
    "one picture twice": ([{}, {"rejected": "red.png"}], ["row 1: .* are the same image", MEND]),
    "two equal pictures": ([{}, {"rejected": "same.png"}], ["row 1: .* are the same image", MEND]),
    "unequal sizes": ([{}, {"rejected": "large.png"}], ["row 1: chosen is 16x16 and rejected 24x24", MEND]),
    "an empty caption": ([{}, {"prompt": "  "}], ["row 1: the prompt is empty", MEND]),
    "no caption": ([{}, {"prompt": None}], ["row 1: the prompt is empty", MEND]),
    "a caption that is no text": ([{}, {"prompt": 3}], ["row 1: the prompt is 3, not a text", MEND]),
    "a label that is none": ([label(1), label(0.7)], [r"row 1: label_0 is 0\.7, not one of 0, 0\.5, 1", MEND]),
    "nothing but ties": ([label(0.5)] * 2, r"holds no usable pair \(2 rows, 2 ties, 0 bad rows\): give at least one"),
    "no rows": ([], "pairs.source='pairs/pairs.jsonl' holds no usable pair .0 rows"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_cannot_be_used(refused, config, no_model, case):
    rows, wanted = ROWS[case]
    refused("train", config(rows), wanted=wanted)


def test_pictures_that_cannot_be_used_and_none_is_left(refused, config, no_model):
    wanted = [r"row 0: chosen is no PNG, JPEG", r"holds no usable pair \(1 rows, 0 ties, 1 bad rows\)"]
    path = config([{"chosen": "cut.png"}])
    refused("train", path, wanted=wanted)
    skip = "pairs={source: pairs/pairs.jsonl, skip_bad_rows: true}"
    refused("train", path, skip, wanted=wanted)


def test_bad_rows_can_be_left_out(cli, config, tmp_path):
    """All kinds at once: what is left trains, and the line says what was left out."""
    rows = [row | {} for rows, _ in ROWS.values() for row in rows if "label_0" not in row]
    outcome = cli("train", config([{}, *rows]), "pairs={source: pairs/pairs.jsonl, skip_bad_rows: true}")
    assert outcome.status == 0, outcome.err
    bad = [i for i, row in enumerate([{}, *rows]) if row]
    assert f"left out: 0 ties, {len(bad)} bad rows ({', '.join(map(str, bad[:10]))})" in " ".join(outcome.out.split())
    assert (tmp_path / "run" / "final").is_dir()


SETTINGS = {
    "pairs=nowhere": r"pairs\.source='nowhere': there is no such file or folder: give emoji",
    "pairs=pairs/no.jsonl": r"pairs\.source='pairs/no.jsonl': there is no such file",
    "pairs=pairs/red.png": r"pairs\.source='pairs/red.png': use a \.jsonl",
    "pairs={source: emoji_style, split: test}": r"pairs\.split='test' is not known: choose train, heldout or all",
    "pairs={source: pairs/pairs.jsonl, split: test}": r"pairs\.split='test' is not",
    "pairs={source: pairs/pairs.jsonl, columns: {chosen: z}}": "no column 'z'; .* 'prompt', 'chosen', 'rejected': map",
    "pairs={source: pairs/pairs.jsonl, columns: {choosen: chosen}}": "unknown name 'choosen': did you mean 'chosen'",
    "pairs={source: emoji_style, max: 3}": r"unknown setting 'pairs\.max'",
    "pairs={split: train}": r"pairs\.source is required",
    "pairs={source: emoji_style, max_pairs: 0}": r"pairs\.max_pairs=0 is not allowed",
    "pairs=3": r"pairs.source='3': there is no such file",
    "beta=0": r"beta=0 is not allowed: it must be greater than 0",
    "beta=-1": r"beta=-1 is not allowed: it must be greater than 0",
    "beta=.inf": r"beta=inf is not allowed",
    "beta=.nan": r"beta=nan is not allowed",
    "beta=much": r"beta='much' is not allowed: it must be a number",
    "beta_dpo=2000": r"give either beta \(per nat\) or beta_dpo",
    "beta=...": r"give either beta \(per nat\) or beta_dpo",
    "prompts=[a cat]": r"prompts are sampled and judged online.*leave one of the two out",
    "pairs=...; group_size=2": r"give pairs, or prompts and a reward to sample and judge pairs",
    "online; reward=...": r"give pairs, or prompts and a reward",
    "target=logged": r"target=logged needs the sampler's noisy steps: judge online",
    "online; target=logged; sampler={steps: 2, eta: 0.0}": r"target=logged needs .* set sampler\.eta above 0",
    "variant=corrected; loss_type=ipo": r"variant=corrected has a loss of its own",
    "variant=corrected; label_smoothing=0.1": r"variant=corrected has a loss of its",
    "loss_type=ipo; label_smoothing=0.1": r"loss_type=ipo has no label_smoothing",
    "reward_mode=logratio": r"reward_mode and old_refresh belong to variant=corr",
    "old_refresh=epoch": r"reward_mode and old_refresh belong to variant=corr",
    "variant=corected": r"variant='corected' is not allowed: .*'original' or 'corrected'",
    "loss_type=dpo": r"loss_type='dpo' is not allowed: .*'sigmoid', 'ipo' or 'hinge'",
    "target=x0": r"target='x0' is not allowed",
    "weighting=snr": r"weighting='snr' is not allowed",
    "online; group_size=1": r"group_size=1 is not allowed: .*greater than or equal to 2",
    "online; group_size=4; samples_per_epoch=2": "samples_per_epoch=2 is not a multiple of group_size=4",
    "label_smoothing=0.7": r"label_smoothing=0\.7 is not allowed: .*equal to 0\.5",
    "caption_dropout=1": r"caption_dropout=1 is not allowed: .*less than 1",
    "decisions_per_pair=0": r"decisions_per_pair=0 is not allowed",
    "timestep_range=[0.6, 0.2]": r"timestep_range=\[0\.6, 0\.2\] must be two numbers",
    "timestep_range=[0, 1.5]": r"timestep_range=\[0\.0, 1\.5\] must be two numbers",
    "timestep_range=[0.5]": r"timestep_range",
    "kl_coef=-0.1": r"kl_coef=-0\.1 is not allowed",
    "max_winner_error=1": r"max_winner_error=1 is not allowed: .*greater than 1",
    "max_winner_error=inf": r"max_winner_error='inf' is not allowed",
    "show_prompts=[]": r"show_prompts is empty: leave it out, or set grid_every=0",
    "clip_range=0.1": r"unknown setting 'clip_range'",
    "model=tiny-lm": "model='tiny-lm' is a language model, not a text-to-image pipeline: use a text method",
    "reward=taste": r"unknown reward 'taste'",
    "method=difusion_dpo": r"method='difusion_dpo' is unknown: did you mean 'diffusion_dpo'",
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_used(refused, config, no_model, case):
    online = ONLINE if case.startswith("online; ") else {}
    refused("train", config(**online | changes(case.removeprefix("online; "))), wanted=SETTINGS[case])


def test_settings_that_do_not_fit_each_other_are_all_said_at_once(refused, config, no_model):
    settings = changes("beta_dpo=5000; variant=corrected; loss_type=ipo; target=logged; timestep_range=[1, 0]")
    settings |= changes("prompts=[a cat]; reward=taste; model=./nowhere")
    wanted = ["give either beta", "leave one of the two out", "target=logged", "timestep_range="]
    wanted += ["variant=corrected has a loss of its own", "model='./nowhere'", "unknown reward 'taste'"]
    wanted += ["row 0: the image gone.png is missing", "holds no usable pair"]
    refused("train", config([{"chosen": "gone.png"}], **settings), wanted=wanted)


def test_values_that_are_not_allowed_are_all_said_at_once(refused, config, no_model):
    settings = changes("beta=0; label_smoothing=0.7; group_size=1; variant=new; model=./nowhere")
    rows = [{"prompt": ""}, {"chosen": "gone.png"}]
    wanted = ["group_size=1", "variant='new'", r"label_smoothing=0\.7", "beta=0", "model='./nowhere'"]
    wanted += ["row 0: the prompt is empty", r"row 1: the image gone\.png is missing", "holds no usable pair"]
    assert refused("train", config(rows, **settings), wanted=wanted).out == ""


def test_all_bad_pictures_are_said_at_once_and_before_any_model(refused, config, no_model):
    rows = [{}, {"chosen": "cut.png"}, {"rejected": "same.png"}, {"rejected": "large.png"}, {"chosen": "note.png"}]
    refused("train", config(rows), wanted=["row 1", "row 2", "row 3", "row 4", MEND])


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
    refused("train", config(**settings), wanted=r"has no beta schedule \(flow matching\?\): use a Stable Diffusion")


@pytest.mark.parametrize("online", [False, True])
def test_no_signal_at_the_start_and_epsilon(refused, config, model, online):
    from diffusers import DDIMScheduler

    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}
    write_scheduler(model, DDIMScheduler(**options))
    settings = {"model": "model"} | (ONLINE if online else {})
    refused("train", config(**settings), wanted=r"starts without signal \(rescale_betas_zero_snr\) but .* epsilon")


def test_a_range_that_leaves_too_few_steps(refused, config):
    settings = {"timestep_range": [0.5, 0.503], "decisions_per_pair": 3}
    wanted = r"timestep_range=\[0\.5, 0\.503\] leaves 2 of the steps to train on, fewer than decisions_per_pair=3"
    refused("train", config(**settings), wanted=wanted)
