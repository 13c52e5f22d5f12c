"""Preferences that cannot be used and settings of diffusion_dpo that contradict each other: found before any model."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

DPO = {"method": "diffusion_dpo", "reward": ..., "prompts": ..., "pairs": "pairs/pairs.jsonl", "beta": 1.0}
ONLINE = {"pairs": ..., "prompts": ["a red apple", "a cat"], "reward": "jpeg_compressibility", "group_size": 2}
MEND = "pairs: mend the rows above, or set pairs.skip_bad_rows=true to leave them out"


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


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test if a model is loaded."""
    from diffusion_align.pipelines import image_context

    def load(*arguments, **options):
        pytest.fail("a model was loaded")  # no Exception, which would be put into a sentence

    monkeypatch.setattr(image_context, "load_pipeline", load)


@pytest.fixture
def refused(cli, tree):
    """The command exits 2 with exactly these sentences, no traceback, and has written nothing."""

    def check(*arguments, wanted):
        before = tree()
        outcome = cli(*arguments)
        assert outcome.status == 2, outcome.err
        assert "Traceback" not in outcome.err
        wanted = [wanted] if isinstance(wanted, str) else wanted
        assert len(outcome.sentences) == len(outcome.err.splitlines()) == len(wanted), outcome.err
        for pattern, sentence in zip(wanted, outcome.sentences):
            assert re.search(pattern, sentence), (pattern, sentence)
        assert tree() == before
        return outcome

    return check


def label(value, **changes):
    return {"caption": "a cat", "jpg_0": "red.png", "jpg_1": "blue.png", "label_0": value} | changes


ROWS = {
    "a missing picture": ([{"chosen": "gone.png"}], ["pairs: row 0: the picture gone.png is missing"], 0),
    "a missing picture among good ones": (
        [{}, {"rejected": "gone.png"}],
        ["pairs: row 1: the picture gone.png is missing", re.escape(MEND)],
        1,
    ),
    "a truncated picture": ([{}, {"rejected": "cut.png"}], ["row 1: rejected is no PNG, JPEG", re.escape(MEND)], 1),
    "no picture": ([{}, {"chosen": "note.png"}], ["row 1: chosen is no PNG, JPEG", re.escape(MEND)], 1),
    "one picture twice": ([{}, {"rejected": "red.png"}], ["row 1: .* are the same picture", re.escape(MEND)], 1),
    "two equal pictures": ([{}, {"rejected": "same.png"}], ["row 1: .* are the same picture", re.escape(MEND)], 1),
    "unequal sizes": ([{}, {"rejected": "large.png"}], ["row 1: chosen is 16x16 and rejected 24x24", "mend"], 1),
    "an empty caption": ([{}, {"prompt": "  "}], ["row 1: the prompt is empty", re.escape(MEND)], 1),
    "no caption": ([{}, {"prompt": None}], ["row 1: the prompt is empty", re.escape(MEND)], 1),
    "a caption that is no text": ([{}, {"prompt": 3}], ["row 1: the prompt is 3, not a text", "mend"], 1),
    "a label that is none": (
        [label(1), label(0.7)],
        [r"row 1: label_0 is 0\.7, not one of 0, 0\.5, 1", re.escape(MEND)],
        1,
    ),
    "nothing but ties": (
        [label(0.5), label(0.5)],
        [r"holds no usable pair \(2 rows, 2 ties, 0 bad rows\): give at least one"],
        0,
    ),
    "no rows": ([], ["pairs.source='pairs/pairs.jsonl' holds no usable pair .0 rows"], 0),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_cannot_be_used(refused, config, no_model, case):
    rows, wanted, usable = ROWS[case]
    if not usable and len(wanted) == 1 and "usable" not in wanted[0]:
        wanted = [*wanted, "holds no usable pair"]
    refused("train", config(rows), wanted=wanted)


def test_pictures_that_cannot_be_used_and_none_is_left(refused, config, no_model):
    wanted = [r"row 0: chosen is no PNG, JPEG", r"holds no usable pair \(1 rows, 0 ties, 1 bad rows\)"]
    path = config([{"chosen": "cut.png"}])
    refused("train", path, wanted=wanted)
    skip = "pairs={source: pairs/pairs.jsonl, skip_bad_rows: true}"
    refused("train", path, skip, wanted=wanted)


def test_bad_rows_can_be_left_out(cli, config, tmp_path):
    """All kinds at once: what is left trains, and the line says what was left out."""
    rows = [row | {} for case, (rows, _, _) in ROWS.items() for row in rows if "label_0" not in row]
    outcome = cli("train", config([{}, *rows]), "pairs={source: pairs/pairs.jsonl, skip_bad_rows: true}")
    assert outcome.status == 0, outcome.err
    bad = [i for i, row in enumerate([{}, *rows]) if row]
    assert f"left out: 0 ties, {len(bad)} bad rows ({', '.join(map(str, bad[:10]))})" in " ".join(outcome.out.split())
    assert (tmp_path / "run" / "final").is_dir()


SETTINGS = {
    "source unknown": ({"pairs": "nowhere"}, r"pairs\.source='nowhere': there is no such file or folder: give emoji"),
    "source a missing file": ({"pairs": "pairs/no.jsonl"}, r"pairs\.source='pairs/no.jsonl': there is no such file"),
    "source of another kind": ({"pairs": "pairs/red.png"}, r"pairs\.source='pairs/red.png': use a \.jsonl"),
    "split unknown": (
        {"pairs": {"source": "emoji_style", "split": "test"}},
        r"pairs\.split='test' is not known: choose train, heldout or all",
    ),
    "split of a file": ({"pairs": {"source": "pairs/pairs.jsonl", "split": "test"}}, r"pairs\.split='test' is not"),
    "column unknown": (
        {"pairs": {"source": "pairs/pairs.jsonl", "columns": {"chosen": "winner"}}},
        r"there is no column 'winner'; the columns found are 'prompt', 'chosen', 'rejected': map",
    ),
    "name of a column unknown": (
        {"pairs": {"source": "pairs/pairs.jsonl", "columns": {"choosen": "chosen"}}},
        r"pairs\.columns: unknown name 'choosen': did you mean 'chosen'",
    ),
    "key of pairs unknown": ({"pairs": {"source": "emoji_style", "max": 3}}, r"unknown setting 'pairs\.max'"),
    "pairs without a source": ({"pairs": {"split": "train"}}, r"pairs\.source is required"),
    "no pairs at most": ({"pairs": {"source": "emoji_style", "max_pairs": 0}}, r"pairs\.max_pairs=0 is not allowed"),
    "pairs a number": ({"pairs": 3}, r"pairs.source='3': there is no such file"),
    "beta zero": ({"beta": 0}, r"beta=0 is not allowed: it must be greater than 0"),
    "beta negative": ({"beta": -1}, r"beta=-1 is not allowed: it must be greater than 0"),
    "beta infinite": ({"beta": float("inf")}, r"beta=inf is not allowed"),
    "beta nan": ({"beta": float("nan")}, r"beta=nan is not allowed"),
    "beta a text": ({"beta": "much"}, r"beta='much' is not allowed: it must be a number"),
    "beta twice": ({"beta_dpo": 2000}, r"give either beta \(a nat\) or beta_dpo"),
    "no beta": ({"beta": ...}, r"give either beta \(a nat\) or beta_dpo"),
    "pairs and prompts": ({"prompts": ["a cat"]}, r"prompts are drawn and judged online.*leave one of the two out"),
    "neither pairs nor prompts": (
        {"pairs": ..., "group_size": 2},
        r"give pairs, or prompts and a reward to draw and judge pairs",
    ),
    "prompts without a judge": (ONLINE | {"reward": ...}, r"give pairs, or prompts and a reward"),
    "logged offline": ({"target": "logged"}, r"target=logged needs the sampler's noisy steps: judge online"),
    "logged without noise": (
        ONLINE | {"target": "logged", "sampler": {"steps": 2, "eta": 0.0}},
        r"target=logged needs the sampler's noisy steps: judge online and set sampler\.eta above 0",
    ),
    "corrected ipo": ({"variant": "corrected", "loss_type": "ipo"}, r"variant=corrected has a loss of its own"),
    "corrected smoothed": ({"variant": "corrected", "label_smoothing": 0.1}, r"variant=corrected has a loss of its"),
    "ipo smoothed": ({"loss_type": "ipo", "label_smoothing": 0.1}, r"loss_type=ipo has no label_smoothing"),
    "original with a reward mode": ({"reward_mode": "logratio"}, r"reward_mode and old_refresh belong to variant=corr"),
    "original with an old policy": ({"old_refresh": "epoch"}, r"reward_mode and old_refresh belong to variant=corr"),
    "variant unknown": ({"variant": "corected"}, r"variant='corected' is not allowed: .*'original' or 'corrected'"),
    "loss unknown": ({"loss_type": "dpo"}, r"loss_type='dpo' is not allowed: .*'sigmoid', 'ipo' or 'hinge'"),
    "target unknown": ({"target": "x0"}, r"target='x0' is not allowed"),
    "weighting unknown": ({"weighting": "snr"}, r"weighting='snr' is not allowed"),
    "a group of one": (ONLINE | {"group_size": 1}, r"group_size=1 is not allowed: .*greater than or equal to 2"),
    "groups that do not fit": (
        ONLINE | {"group_size": 4, "samples_per_epoch": 2},
        r"samples_per_epoch=2 is not a multiple of group_size=4: change one of them",
    ),
    "smoothing above a half": ({"label_smoothing": 0.7}, r"label_smoothing=0\.7 is not allowed: .*equal to 0\.5"),
    "all captions dropped": ({"caption_dropout": 1}, r"caption_dropout=1 is not allowed: .*less than 1"),
    "no decisions": ({"decisions_per_pair": 0}, r"decisions_per_pair=0 is not allowed"),
    "range the wrong way": ({"timestep_range": [0.6, 0.2]}, r"timestep_range=\[0\.6, 0\.2\] must be two numbers"),
    "range beyond": ({"timestep_range": [0, 1.5]}, r"timestep_range=\[0\.0, 1\.5\] must be two numbers"),
    "range of one": ({"timestep_range": [0.5]}, r"timestep_range"),
    "kl negative": ({"kl_coef": -0.1}, r"kl_coef=-0\.1 is not allowed"),
    "guard below the reference": ({"max_winner_error": 1}, r"max_winner_error=1 is not allowed: .*greater than 1"),
    "guard switched off with a text": ({"max_winner_error": "inf"}, r"max_winner_error='inf' is not allowed"),
    "no prompts to show": ({"show_prompts": []}, r"show_prompts is empty: leave it out, or set grid_every=0"),
    "a setting of DDPO": ({"clip_range": 0.1}, r"unknown setting 'clip_range'"),
    "an unknown reward": ({"reward": "taste"}, r"unknown reward 'taste'"),
    "an unknown method": (
        {"method": "difusion_dpo"},
        r"method='difusion_dpo' is unknown: did you mean 'diffusion_dpo'",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_used(refused, config, no_model, case):
    changes, wanted = SETTINGS[case]
    refused("train", config(**changes), wanted=wanted)


def test_settings_that_do_not_fit_each_other_are_all_said_at_once(refused, config, no_model):
    changes = {
        "beta_dpo": 5000,
        "variant": "corrected",
        "loss_type": "ipo",
        "target": "logged",
        "timestep_range": [1, 0],
        "prompts": ["a cat"],
        "reward": "taste",
        "model": "./nowhere",
    }
    wanted = [
        "give either beta",
        "leave one of the two out",
        "target=logged",
        "timestep_range=",
        "variant=corrected has a loss of its own",
        "model='./nowhere'",
        "pairs: row 0: the picture gone.png is missing",
        "holds no usable pair",
        "unknown reward 'taste'",
    ]
    refused("train", config([{"chosen": "gone.png"}], **changes), wanted=wanted)


def test_values_that_are_not_allowed_are_all_said_at_once(refused, config, no_model):
    changes = {"beta": 0, "label_smoothing": 0.7, "group_size": 1, "variant": "new", "model": "./nowhere"}
    outcome = refused(
        "train",
        config([{"prompt": ""}, {"chosen": "gone.png"}], **changes),
        wanted=[
            "group_size=1",
            "variant='new'",
            r"label_smoothing=0\.7",
            "beta=0",
            "model='./nowhere'",
            "row 0: the prompt is empty",
            r"row 1: the picture gone\.png is missing",
            "holds no usable pair",
        ],
    )
    assert outcome.out == ""


def test_all_bad_pictures_are_said_at_once_and_before_any_model(refused, config, no_model):
    rows = [{}, {"chosen": "cut.png"}, {"rejected": "same.png"}, {"rejected": "large.png"}, {"chosen": "note.png"}]
    refused("train", config(rows), wanted=["row 1", "row 2", "row 3", "row 4", re.escape(MEND)])


def test_no_model_is_loaded_is_a_claim_that_can_fail(cli, config, no_model):
    outcome = cli("train", config())
    assert outcome.status == 1
    assert "a model was loaded" in outcome.err


# -- what only the model tells -----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, tiny_sd):
    """A copy of a tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def write_scheduler(model, scheduler):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", type(scheduler).__name__]}))
    scheduler.save_pretrained(model / "scheduler")


@pytest.mark.parametrize("online", [False, True])
def test_flow_matching(refused, config, model, online):
    from diffusers import FlowMatchEulerDiscreteScheduler

    write_scheduler(model, FlowMatchEulerDiscreteScheduler())
    changes = {"model": "model"} | (ONLINE if online else {})
    refused("train", config(**changes), wanted=r"has no beta schedule \(flow matching\?\): use a Stable Diffusion")


@pytest.mark.parametrize("online", [False, True])
def test_no_signal_at_the_start_and_epsilon(refused, config, model, online):
    from diffusers import DDIMScheduler

    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}
    write_scheduler(model, DDIMScheduler(**options))
    changes = {"model": "model"} | (ONLINE if online else {})
    refused("train", config(**changes), wanted=r"starts without signal \(rescale_betas_zero_snr\) but .* epsilon")


def test_a_range_that_leaves_too_few_steps(refused, config):
    changes = {"timestep_range": [0.5, 0.503], "decisions_per_pair": 3}
    wanted = r"timestep_range=\[0\.5, 0\.503\] leaves 2 of the steps to train on, fewer than decisions_per_pair=3"
    refused("train", config(**changes), wanted=wanted)


# -- the commands around it --------------------------------------------------------------------------------------------

COMPARE = ["compare", "emoji-sd", "emoji-sd", "--judge", "jpeg_compressibility", "-p", "a cat", "--per-prompt"]
PAIRS = ["pairs", "emoji-sd", "--judge", "jpeg_compressibility", "-o", "made", "-p", "a cat"]
COMMANDS = {
    "compare no pictures": ([*COMPARE, "0"], r"'--per-prompt'.* greater than or equal to 1: see .* compare --help"),
    "compare a word": ([*COMPARE, "many"], r"valid integer.*: see .* compare --help"),
    "pairs of one picture": ([*PAIRS, "--per-prompt", "1"], r"greater than or equal to 2: see .* pairs --help"),
    "pairs without a prompt": (PAIRS[:-2], "no prompt given: use --prompt TEXT"),
    "pairs of a blank prompt": ([*PAIRS, "-p", " "], "prompts: entry 1 is blank: give it a text or drop it"),
    "pairs by nothing": (["pairs", "emoji-sd", "--judge", "taste", "-o", "made", "-p", "a"], "unknown reward 'taste'"),
    "pairs from nothing": (
        ["pairs", "./nowhere", "--judge", "jpeg_compressibility", "-o", "made", "-p", "a"],
        "model='./nowhere' is neither",
    ),
    "pairs without a folder": (PAIRS[:4] + PAIRS[6:], "Missing option '--output'"),
    "pairs without a judge": (["pairs", "emoji-sd", "-o", "made", "-p", "a"], "Missing option '--judge'"),
    "pairs into a used folder": ([*PAIRS, "-o", "pairs"], "output='pairs' is already used: choose another folder"),
    "pairs resumed elsewhere": (
        [*PAIRS, "-o", "pairs", "--resume"],
        "output='pairs' cannot be resumed: it has no pairs_settings.yaml",
    ),
    "pairs below a file": ([*PAIRS, "-o", "tiny.yaml/x"], "output='tiny.yaml/x' cannot be made"),
    "doctor": (["doctor", "tiny.yaml", "beta=-1"], "beta=-1 is not allowed"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(refused, config, no_model, case):
    arguments, wanted = COMMANDS[case]
    config()
    refused(*arguments, wanted=wanted)
