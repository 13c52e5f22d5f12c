import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

import diffusion_align.report as report
from diffusion_align.report.charts import held_out_charts
from diffusion_align.report.summary import summary
from tests.helpers.html_page import Page

EVIL = "<script>alert('x')</script> & \"quotes\""

UPDATES = [
    {"step": 1, "epoch": 1, "loss": 0.0, "kl": 0.001, "kl_path": 0.02, "grad_norm": 1.0}
    | {"ratio/first_pass_deviation": 2.4e-6, "ratio/mean": 1.0, "clip_ratio/region_mean": 0.1},
    {"step": 2, "epoch": 2, "loss": 0.1, "kl": 0.010, "kl_path": 0.2, "ratio/first_pass_deviation": 1e-7},
    {"step": 3, "epoch": 2, "loss": 0.1, "kl": 0.030, "kl_path": 0.6},
]
EPOCHS = [
    {"step": 1, "epoch": 1, "reward": 4.0, "reward_stderr": 0.06, "samples_used": 60, "time/epoch": 90.0},
    {"step": 3, "epoch": 2, "reward": 5.0, "reward_stderr": 0.08, "samples_used": 64, "time/epoch": 60.0},
]
PREFERENCES = [
    {"step": n + 1, "epoch": n // 50 + 1, "loss": 0.6, "kl": 0.2, "rewards/accuracies": 0.5 + n / 500 + n % 2 / 10}
    | {"rewards/margins": n / 10 + n % 2, "rewards/chosen": n / 20, "rewards/rejected": -n / 20}
    | {"error/winner": -n / 50, "error/loser": 1.0, "weight": 0.5, "beta_nats": 0.1}
    for n in range(100)
]
PAIR_EPOCHS = [
    {"step": step, "epoch": epoch, "pairs_used": 400, "samples_used": 800, "time/epoch": 90.0}
    for epoch, step in ((1, 50), (2, 100))
]
ROWS = [UPDATES[0], EPOCHS[0], *UPDATES[1:], EPOCHS[1]]


def make_run(folder, *, rows=(), epochs=(0, 1, 2), config="method: ddpo\nmodel: emoji-sd\nreward: aesthetic\n"):
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    for epoch in epochs:
        shade = torch.full((1, 3, 8, 8), epoch / 100)
        report.save_png(report.image_grid(shade), folder / "samples" / f"epoch_{epoch:04d}.png")
    both = report.before_after(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8), captions=["a", EVIL])
    report.save_png(both, folder / "samples" / "before_after.png")
    return folder


def page_of(folder):
    path = report.write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.glob(".*"))
    return Page(path.read_text(encoding="utf-8"))


def decode(uri):
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_the_report_holds_everything_it_shows(tmp_path):
    run = make_run(tmp_path / "run", rows=ROWS)
    page = page_of(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert page.links == page.images
    for image in page.images:
        decode(image).load()
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|file:|url\(|@import|<script|<link", outside)
    assert str(tmp_path) not in text
    for heading in (
        "DDPO · aesthetic · emoji-sd",
        "Before and after",
        "Training",
        "Samples over time",
        "Configuration",
    ):
        assert heading in page.text
    assert len(page.images) == 1 + 3, "before/after; three grids"
    titles = re.findall(r'aria-label="Plot: ([^"]*)"', text)
    for part in (
        "Reward",
        "KL to the reference, per step",
        "Clipped actions",
        "Importance ratio",
        "Gradient norm",
        "Loss",
    ):
        assert part in titles
    assert len(titles) == len(set(titles)) == page.tags.count("svg") - text.count('viewBox="0 0 18 8"')


def test_the_summary_states_the_figures_of_the_rows(tmp_path):
    page = page_of(make_run(tmp_path / "run", rows=ROWS))
    assert summary(ROWS) in page.text
    for figure in (
        "rose from 4.00 ± 0.12 to 5.00 ± 0.16 (± 2 standard errors)",
        "a change of 10.0 standard errors",
        "over 2 epochs, 124 samples trained on and 2.5 minutes",
        "0.02 nats per step and 0.4 nats over all trained steps",
        "strayed from 1 by at most 2.4e-06",
    ):
        assert figure in page.text


def test_the_summary_of_a_falling_reward_and_of_rows_that_lack_keys():
    fallen = [EPOCHS[0], EPOCHS[1] | {"reward": 3.0}]
    assert "fell from 4.00 ± 0.12 to 3.00 ± 0.16" in summary(fallen)
    assert "KL to the reference was not logged." in summary(fallen)
    assert "importance ratio" not in summary(fallen)  # some methods have none
    assert "rose from 1 to 2, over 2 epochs." in summary([{"epoch": 1, "reward": 1}, {"epoch": 2, "reward": 2}])
    assert "only epoch so far is 4.00 ± 0.12" in summary(ROWS[:2])
    assert "No reward was logged" in summary(UPDATES)
    assert "exactly 1 everywhere" in summary([{"step": 1, "ratio/first_pass_deviation": 0.0}])
    assert "at most nan" in summary([{"step": 1, "ratio/first_pass_deviation": float("nan")}])
    assert summary([]) == "No metrics have been written yet."


def test_the_summary_of_a_preference_run():
    text = summary([*PREFERENCES[:50], PAIR_EPOCHS[0], *PREFERENCES[50:], PAIR_EPOCHS[1]])
    # standard deviations of ten updates: 0.0541 (accuracy), 0.652 (margin), 0.0606 (winner); 2 / sqrt(10) of each
    assert text == (
        "The implicit accuracy rose from 0.559 ± 0.034 in the first tenth of 100 updates to 0.739 ± 0.034 in the last "
        "(chance is 0.5; ± 2 standard errors). There the implicit reward margin was 9.95 ± 0.41, the winner's error "
        "minus the reference's was -1.890 ± 0.038 nats and the loser's error minus the reference's was "
        "1.000 ± 0.000 nats. The run took 2 epochs, 800 pairs trained on and 3.0 minutes. In the last epoch the policy "
        "was 0.2 nats per step away from the reference (KL, mean over its updates)."
    )


def test_the_summary_of_a_preference_run_with_a_reward_or_with_few_updates():
    judged = summary([*PREFERENCES, *(row | {"reward": row["epoch"]} for row in PAIR_EPOCHS)])
    assert judged.startswith("The mean reward rose from 1 to 2, over 2 epochs, 800 pairs trained on and 3.0 minutes.")
    assert "The implicit accuracy rose from 0.559 ± 0.034" in judged
    assert "The run took" not in judged
    assert "first pass" not in judged
    assert "first pass over its samples" in summary([*PREFERENCES, {"step": 101, "ratio/first_pass_deviation": 0.1}])
    fallen = [{"step": n, "rewards/accuracies": accuracy} for n, accuracy in ((1, 0.75), (2, 0.5), (3, 0.25))]
    assert summary(fallen) == (
        "The implicit accuracy fell from 0.75 in the first of 3 updates to 0.25 in the last (chance is 0.5)."
    )
    assert "went from 0.75 in the first of 2 updates to 0.75 in the last" in summary(
        [fallen[0], fallen[0] | {"step": 2}]
    )
    assert "of the only update so far is 0.75 (chance is 0.5)." in summary(fallen[:1])
    assert "1 epoch and 1 pair trained on" in summary([*fallen, {"epoch": 1, "pairs_used": 1}])


def test_the_report_of_a_preference_run(tmp_path):
    config = "method: diffusion_dpo\nreward: null\nmodel: emoji-sd\npairs:\n  source: emoji_style\n"
    run = make_run(tmp_path / "run", rows=[*PREFERENCES, *PAIR_EPOCHS], config=config, epochs=())
    page = page_of(run)
    assert "DIFFUSION-DPO · emoji_style · emoji-sd" in page.text
    assert "The loss only depends on the gap between chosen and rejected" in page.text
    text = (run / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r'aria-label="Plot: ([^"]*)"', text)
    assert titles[:3] == ["Implicit accuracy", "Implicit reward, chosen − rejected", "Implicit reward"]
    assert titles[-5:] == ["Beta", "Loss", "Pairs trained on", "Samples trained on", "Weight of the corrected loss"]
    assert titles.count("Implicit accuracy") == 1


def test_the_title_names_the_reward_before_the_pairs(tmp_path):
    pairs = "pairs:\n  source: team/some_pairs\n"
    titles = [
        ("dpo\nreward: jpeg", "DPO · jpeg"),
        ("dpo", "DPO · some_pairs"),
        ("my_own.py:My_DPO", "My_DPO · some_pairs"),
    ]
    for n, (method, title) in enumerate(titles):
        assert title in page_of(make_run(tmp_path / str(n), config=f"method: {method}\n{pairs}")).text
    assert "DPO · m" in page_of(make_run(tmp_path / "odd", config="method: dpo\nmodel: m\npairs: here\n")).text
    rows = "method: reward_model\nmodel: tiny-lm\ndataset:\n  source: team/prefs\n"
    assert "REWARD-MODEL · prefs · tiny-lm" in page_of(make_run(tmp_path / "rows", config=rows)).text


def test_markup_in_the_configuration_is_shown_not_run(tmp_path):
    config = f"method: ddpo\nreward: '<b>bold</b>'\nprompts:\n- {json.dumps(EVIL)}\nsampler:\n  eta: 1.0\n"
    run = make_run(tmp_path / "<i>run", config=config)
    page = page_of(run)
    assert EVIL in page.text.replace("''", "'")
    assert not {"script", "b", "i"} & set(page.tags)
    assert "sampler.eta" in page.text


def test_a_configuration_that_is_no_yaml_is_shown_as_it_is(tmp_path):
    page = page_of(make_run(tmp_path / "run", config="method: [ddpo\n<b>"))
    assert "method: [ddpo\n<b>" in page.text
    assert "run" in page.text


def test_at_most_six_grids_with_the_first_and_the_last(tmp_path):
    page = page_of(make_run(tmp_path / "run", epochs=range(0, 41)))
    labels = re.findall(r"Before training|After epoch \d+", page.text)
    assert labels == ["Before training", *(f"After epoch {n}" for n in (8, 16, 24, 32, 40))]
    shades = [decode(image).getpixel((70, 70))[0] for image in page.images[-6:]]
    assert shades == [round(n / 100 * 255) for n in (0, 8, 16, 24, 32, 40)]


def test_before_training_comes_before_after(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    image = decode(page.images[0]).convert("RGB")
    assert image.getpixel((image.width - 60, 60)) == (0, 0, 0)
    assert image.getpixel((image.width - 60, 200)) == (255, 255, 255)


def test_wide_grids_are_shrunk_in_the_report_only(tmp_path):
    run = make_run(tmp_path / "run", epochs=())
    wide = run / "samples" / "epoch_0000.png"
    Image.new("RGB", (3200, 400)).save(wide)
    page = page_of(run)
    assert decode(page.images[-1]).size == (1600, 200)
    assert Image.open(wide).size == (3200, 400)


def test_a_damaged_image_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "samples" / "epoch_0002.png").write_bytes(b"\x89PNG\r\n")
    assert "After epoch 2" not in page_of(run).text


@pytest.mark.parametrize(
    "rows", [[], [{}], [{"step": 1}], ROWS[:1], ROWS[:2], [{"reward": 1.0}], [{"kl": 1, "loss": 2}]]
)
def test_few_rows_still_give_a_report(tmp_path, rows):
    page = page_of(make_run(tmp_path / "run", rows=rows))
    assert "Before and after" in page.text


def test_a_run_that_only_has_its_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("method: ddpo\n")
    page = page_of(tmp_path)
    assert page.images == []
    assert "No metrics have been written yet." in page.text
    assert "Not finished there is no final/ folder" in page.text
    (tmp_path / "final").mkdir()
    assert "Finished" in page_of(tmp_path).text


def test_metrics_of_another_method_are_drawn_under_other_metrics(tmp_path):
    rows = [{"step": n, "epoch": 1, "loss": 0.69, "logps/margins": 0.1 * n, "logps/chosen": -5.0} for n in (1, 2, 3)]
    page = page_of(make_run(tmp_path / "run", rows=rows))
    assert "Other metrics" in page.text
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'aria-label="Plot: ([^"]*)"', text) == ["logps/chosen", "logps/margins", "Loss"]


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="is not a run folder"):
            report.write_report(folder)
    assert list(tmp_path.iterdir()) == []


def test_damaged_metrics_leave_the_old_report(tmp_path):
    run = make_run(tmp_path / "run")
    old = report.write_report(run).read_bytes()
    (run / "metrics.jsonl").write_text('garbage\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        report.write_report(run)
    assert (run / "report.html").read_bytes() == old


GOLD = [
    {"step": 0, "epoch": 0, "gold": 1.0, "gold_stderr": 0.5, "diversity": 0.8, "time/evaluation": 2.0},
    *(row | {"gold": gold, "gold_stderr": 0.25, "diversity": 0.5} for row, gold in zip(EPOCHS, (3.0, 2.0))),
]


def test_the_held_out_reward_is_drawn_with_its_best_and_its_band():
    gold, diversity = held_out_charts(GOLD)
    assert [list(values) for values in gold.curves[0][:2]] == [[0, 1, 2], [1, 3, 2]]
    assert gold.mark == (1, "best")
    (band,) = gold.bands
    assert (band.low.min(), band.high.max()) == (0.0, 3.5)  # 1 - 2 * 0.5 and 3 + 2 * 0.25
    assert list(diversity.curves[0].ys) == [0.8, 0.5, 0.5]
    assert len(held_out_charts([{"epoch": 1, "diversity": 0.5}])) == 1


def test_the_report_says_what_the_held_out_reward_did_and_why_the_run_stopped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOLD))
    page = Page(report.write_report(tmp_path).read_text())
    assert "held-out reward was 1 after epoch 0, 3 at its best after epoch 1 and 2 after epoch 2." in page.text
    assert "over 2 epochs" in page.text, "what is before training is no epoch"
    assert "stopped by a rule" not in page.text
    (tmp_path / "evaluation.json").write_text(json.dumps({"best": None, "stopped": "gold & KL"}))
    assert "The run was stopped by a rule: gold & KL." in Page(report.write_report(tmp_path).read_text()).text
