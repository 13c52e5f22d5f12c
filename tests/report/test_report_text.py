"""The report of a text run: its samples as tables, its sentences and its plots."""

import json
import re

import pytest

from diffusion_align import report
from diffusion_align.report import texts
from diffusion_align.report.charts import panel_charts
from diffusion_align.report.figures import SCORE_PANELS
from diffusion_align.report.metrics import TEXT_KL
from diffusion_align.report.summary import summary
from diffusion_align.report.svg import shapes
from tests.helpers.html_page import Page

EVIL = "<script>alert('x')</script> & \"quotes\" </td></table>"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Why?\n{EVIL}"}]
PAIR = {"prompt": "Once", "before": "was", "after": "upon a time", "reward_before": 0.25, "reward_after": 1.5}

UPDATES = [
    {"step": n, "epoch": (n + 1) // 2, "loss": 0.1, "entropy": 2.0 - n / 10, "loss/policy": 0.1, "loss/value": 0.2}
    | {"ratio/mean": 1.0, "ratio/min": 0.9, "ratio/max": 1.1, "clip_ratio/region_mean": 0.1, "grad_norm": 1.0}
    | ({"ratio/first_pass_deviation": 1e-6} if n % 2 else {})
    for n in range(1, 5)
]
EPOCHS = [
    {"step": 2 * n, "epoch": n, "reward": float(n), "kl": 0.01 * n, "kl_path": 0.5 * n, "kl_coef": 0.05}
    | {"completions/mean_length": 40.0 * n, "completions/min_length": 3.0, "completions/max_length": 64.0}
    | {"completions/clipped_ratio": 0.125 * n, "rewards/a/mean": 1.0 * n, "rewards/b/mean": 2.0}
    | {"frac_reward_zero_std": 0.5, "samples_used": 8, "time/epoch": 6.0, "time/sample": 3.0}
    for n in (1, 2)
]
ROWS = [*UPDATES[:2], EPOCHS[0], *UPDATES[2:], EPOCHS[1]]
PREFERENCES = [
    {"step": n, "epoch": n, "loss": 0.6, "rewards/accuracies": 0.5 + n / 10, "rewards/margins": n / 2, "drift": n / 100}
    | {"rewards/chosen": -0.1 * n, "rewards/rejected": -0.6 * n}
    for n in (1, 2, 3)
]
SCORES = [
    row
    for n in (1, 2, 3)
    for row in (
        {"step": n, "epoch": n, "loss": 0.6, "accuracy": 0.5 + n / 10, "margin": n / 2, "scores/chosen": n}
        | {"scores/rejected": -n},
        {"step": n, "epoch": n, "eval/accuracy": 0.5 + n / 20, "eval/margin": n / 4},
        {"step": n, "epoch": n, "pairs_used": 8.0, "time/epoch": 60.0},
    )
]


def make_run(folder, *, method="grpo", rows=(), samples=None, before_after=None, own="max_completion_length: 64"):
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"method: {method}\nmodel: tiny-lm\ndataset:\n  source: team/prefs\n{own}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"epoch_{n:04d}": lines for n, lines in (samples or {}).items()}
    for name, lines in (files | ({"before_after": before_after} if before_after else {})).items():
        written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / "samples" / f"{name}.jsonl").write_text("\n".join(written))
    return folder


def page_of(folder):
    return Page(report.write_report(folder).read_text(encoding="utf-8"))


def cells(folder):
    """The rows of every table of samples, as they stand in the file."""
    page = report.write_report(folder).read_text(encoding="utf-8")
    tables = re.findall(r'<table class="texts">.*?</table>', page, flags=re.S)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, flags=re.S) for table in tables]
    return [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S) for row in table] for table in rows]


def test_before_and_after_stand_side_by_side(tmp_path):
    other = PAIR | {"before": "x", "reward_before": 0.75, "reward_after": 2.5}
    run = make_run(tmp_path / "run", before_after=[PAIR, other], rows=[{"reward": 1.0, "epoch": 1}])
    (table,) = cells(run)
    assert table[0] == ["Prompt", "Before, mean reward 0.5", "After, mean reward 2"]
    assert [re.findall(r">([^<>]+)</", cell) for cell in table[1]] == [
        ["Once"],
        ["0.25", "was"],
        ["1.5", "upon a time"],
    ]
    assert len(table) == 3
    page = page_of(run)
    assert page.text.index("Before and after") < page.text.index("Training")
    assert "damaged" not in page.text


def test_everything_in_the_samples_is_escaped(tmp_path):
    line = {"prompt": CHAT, "completion": EVIL * 20}
    run = make_run(
        tmp_path / "run", samples={0: [line]}, before_after=[{"prompt": EVIL, "before": EVIL, "after": EVIL}]
    )
    page = page_of(run)
    assert "script" not in page.tags
    assert page.tags.count("table") == 3  # of the configuration as well
    assert page.text.count(EVIL) >= 4 + 19
    assert "system: Be brief.\nuser: Why?\n<script>" in page.text


def test_samples_of_at_most_six_epochs_of_which_the_last_is_open(tmp_path):
    samples = {n: [{"prompt": "p", "completion": f"answer {n}", "reward": n}] for n in range(0, 41)}
    page = page_of(make_run(tmp_path / "run", samples=samples))
    assert re.findall(r"answer \d+", page.text) == [f"answer {n}" for n in (0, 8, 16, 24, 32, 40)]
    opened = r"<details( open)?>\s*<summary>(After epoch 40|Before training)"
    assert re.findall(opened, (tmp_path / "run" / "report.html").read_text()) == [
        ("", "Before training"),
        (" open", "After epoch 40"),
    ]


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    good = {"prompt": "p", "completion": "fine", "reward": None}
    bad = [
        '{"prompt": "p", "compl',
        "[]",
        "7",
        '"text"',
        {"prompt": "p"},
        {"prompt": "p", "completion": 3},
        {"prompt": None, "completion": "x"},
        {"prompt": [], "completion": "x"},
        {"prompt": ["x"], "completion": "x"},
        {"prompt": [{"content": "x"}], "completion": "x"},
        "[" * 100_000,
    ]
    run = make_run(tmp_path / "run", samples={1: [good, *bad, "", good], 2: bad[:1], 3: [good]})
    (run / "samples" / "epoch_0003.jsonl").write_bytes(
        b'{"prompt": "p", "completion": "\xff"}\n' + json.dumps(good).encode()
    )
    page = page_of(run)
    assert page.text.count("fine") == 3
    assert page.text.count("11 lines are damaged and were left out.") == 1
    assert page.text.count("1 line is damaged and was left out.") == 2


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 10**400, "high", True, None])
def test_a_reward_that_is_no_number_is_not_shown(tmp_path, reward):
    lines = [
        {"prompt": "p", "completion": "said", "reward": reward},
        {"prompt": "p", "completion": "said", "reward": 0.5},
    ]
    (table,) = cells(make_run(tmp_path / "run", samples={1: lines}))
    assert table[0] == ["Prompt", "Completion, mean reward 0.5"]
    assert [row[1].count('class="reward"') for row in table[1:]] == [0, 1]


def test_long_texts_are_folded_and_nothing_of_them_is_lost():
    words = " ".join(f"word{n}" for n in range(200))
    folded = texts.passage(words)
    assert folded.start + folded.rest == words
    assert len(folded.start) <= texts.FOLDED_BEYOND < len(words)
    assert folded.start.endswith(" ")
    lines = "\n".join("abcdefghijklmnop")
    folded = texts.passage(lines)
    assert f"{folded.start}\n{folded.rest}" == lines
    assert folded.start.count("\n") == texts.FOLDED_LINES - 1
    unbroken = "xxx " + "x" * 4996
    assert texts.passage(unbroken) == texts.Passage(unbroken[:400], unbroken[400:])
    for short in ("", "a b", "x" * texts.FOLDED_BEYOND, words[: texts.FOLDED_BEYOND + 20], "\n".join("abcdefghi")):
        assert texts.passage(short) == texts.Passage(short)


def test_a_folded_text_is_whole_in_the_page_and_half_a_surrogate_pair_is_none(tmp_path):
    answer = " ".join(f"word{n}" for n in range(300))
    cut = '{"prompt": "p", "completion": "cut \\ud83d off"}'
    page = page_of(make_run(tmp_path / "run", samples={1: [{"prompt": "p", "completion": answer}, cut]}))
    assert re.findall(r"word(\d+)", page.text) == [str(n) for n in range(300)]
    assert f"… {len(texts.passage(answer).rest)} more characters" in page.text
    assert "cut ? off" in page.text


def test_more_samples_than_a_table_shows_are_said(tmp_path):
    lines = [{"prompt": "p", "completion": f"answer {n}."} for n in range(texts.MAX_ROWS + 3)]
    page = page_of(make_run(tmp_path / "run", samples={4: lines}))
    assert page.text.count("answer ") == texts.MAX_ROWS
    assert (
        f"The first {texts.MAX_ROWS} of {texts.MAX_ROWS + 3} samples; the others are in samples/epoch_0004.jsonl"
        in (page.text)
    )


def test_parts_of_a_message_and_messages_without_content():
    parts = [{"type": "text", "text": "see "}, {"type": "image"}, "?", {"type": "text", "text": "this"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert texts.plain_text(messages) == "user: see this\nassistant: "


def test_the_summary_of_a_run_with_rewards():
    assert summary(ROWS, TEXT_KL) == (
        "The mean reward rose from 1 to 2, over 2 epochs, 16 samples trained on and 0.2 minutes. The mean length "
        "of completions went from 40 to 80 tokens; the limit cut 25 % of them off in the last epoch. In the last "
        "epoch the policy was 0.02 nats per token and 1 nats per completion away from the reference (KL, mean over its "
        "samples). On the first pass over its samples the importance ratio strayed from 1 by at most 1e-06."
    )
    assert "0.02 nats per step and 1 nats over all trained steps" in summary(ROWS)
    assert "was 40 tokens; the limit cut 12.5 %" in summary(ROWS[:3], TEXT_KL)
    assert "KL to the reference was not logged." in summary(UPDATES, TEXT_KL)


def test_the_summary_of_preferences_says_nothing_of_a_kl_that_is_not_needed():
    text = summary(PREFERENCES, TEXT_KL)
    assert text == (
        "The implicit accuracy rose from 0.6 in the first of 3 updates to 0.8 in the last (chance is 0.5). There the "
        "implicit reward margin was 1.5."
    )
    assert "KL" not in summary([{"step": 1, "loss": 0.6}], TEXT_KL)
    assert "0.1 nats per token" in summary([*PREFERENCES, {"step": 3, "epoch": 3, "kl": 0.1}], TEXT_KL)


def test_the_summary_of_a_reward_model():
    assert summary(SCORES, TEXT_KL) == (
        "The accuracy rose from 0.6 in the first of 3 updates to 0.8 in the last (chance is 0.5). There the chosen one "
        "scored 1.5 more. On the held-out pairs it was 0.55 after the first epoch and 0.65 after the last. The run "
        "took 3 epochs, 24 pairs trained on and 3.0 minutes."
    )
    assert "it was 0.55 after the first epoch." in summary(SCORES[:3], TEXT_KL)


def plots_of(folder):
    """The titles of each figure's panels."""
    report.write_report(folder)
    figures = (folder / "report.html").read_text(encoding="utf-8").split("<figure")[1:]
    titles = [re.findall(r'aria-label="Plot: ([^"]*)"', figure) for figure in figures]
    return ["; ".join(each) for each in titles if each]


def test_the_plots_of_each_method(tmp_path):
    online = plots_of(make_run(tmp_path / "ppo", method="ppo", rows=ROWS))
    assert online[:4] == [
        "Reward",
        "Reward: a; Reward: b",
        "KL to the reference, per token; KL to the reference, per completion; Price of the KL",
        "Length of the completions; Completions without an end; Entropy per token",
    ]
    assert online[-1] == "Groups with equal rewards; Loss; Policy loss; Value loss; Samples trained on"
    assert plots_of(make_run(tmp_path / "dpo", method="dpo", rows=PREFERENCES))[0].split("; ") == [
        "Implicit accuracy",
        "Implicit reward, chosen − rejected",
        "Implicit reward",
        "Distance from the reference on the data",
    ]
    assert plots_of(make_run(tmp_path / "rm", method="reward_model", rows=SCORES))[0] == (
        "Accuracy; Score, chosen − rejected; Scores"
    )
    image = plots_of(make_run(tmp_path / "ddpo", method="ddpo", rows=ROWS, own="sampler: {steps: 10}"))
    assert "KL to the reference, per step; KL to the reference, all trained steps; Price of the KL" in image
    # A run says itself what its metrics mean; what no plot of the report shows has one of its own.
    folder = make_run(tmp_path / "own", method="file.py:Own", rows=[row | {"weight_largest": 2.0} for row in ROWS])
    described = {"title": "Largest weight", "unit": "times the mean", "reading": "One sample alone is too few."}
    far = {"title": "KL to the reference, a frame", "unit": "nats a frame", "reading": "How far it is."}
    (folder / "metrics.json").write_text(json.dumps({"kl": far, "weight_largest": described}))
    own = plots_of(folder)
    assert "Largest weight" in own
    assert "KL to the reference, a frame; kl_path; Price of the KL" in own
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "One sample alone is too few." in text
    assert "0.02 nats a frame" in text
    (folder / "metrics.json").write_text("[1]")  # damaged: as if there were none
    assert "KL to the reference, per token; KL to the reference, per completion; Price of the KL" in plots_of(folder)


def test_held_out_values_are_drawn_as_they_are_beside_smoothed_ones():
    rows = [{"step": n, "epoch": n // 20, "accuracy": n % 2, "margin": 1.0} for n in range(1, 101)]
    rows += [{"step": 20 * n, "epoch": n, "eval/accuracy": n / 10} for n in range(1, 6)]
    accuracy, margin = panel_charts(rows, SCORE_PANELS)
    pale, bold, held_out = accuracy.curves
    assert (len(pale.xs), len(bold.xs)) == (100, 100)
    assert abs(bold.ys[50] - 0.5) <= 0.1 < abs(pale.ys[50] - 0.5)
    assert list(held_out.xs) == [20, 40, 60, 80, 100]
    assert list(held_out.ys) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert accuracy.level == (0.5, "chance")
    assert [text for _, text in shapes(accuracy)["legend"]] == ["trained on", "held out", "chance"]
    assert margin.x == "optimizer update (bold: mean over 5)"
