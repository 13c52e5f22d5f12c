import json
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from diffusion_align import report
from diffusion_align.report import charts, metrics
from diffusion_align.report.charts import Chart, Curve, Panel, panel_charts, reward_component_keys
from diffusion_align.report.figures import CLIP_PANELS, PREFERENCE_PANELS, RATIO_PANELS
from diffusion_align.report.names import describe
from diffusion_align.report.plots import PALETTE
from diffusion_align.report.svg import COLUMNS, shapes, thinned

PNG = b"\x89PNG\r\n\x1a\n"


def fake_rows(epochs=4, shift=0.0, updates=2):
    rows, step = [], 0
    for epoch in range(1, epochs + 1):
        for update in range(updates):
            step += 1
            rows.append(
                {"step": step, "epoch": epoch, "loss": 0.1, "kl": 0.01 * step, "kl_path": 0.2 * step}
                | {"clip_ratio/region_mean": 0.3, "clip_ratio/low_mean": 0.1, "clip_ratio/high_mean": 0.2}
                | {"ratio/mean": 1.0, "ratio/min": 0.9, "ratio/max": 1.2, "grad_norm": 0.5 + shift}
                | ({"ratio/first_pass_deviation": 1e-6} if update == 0 else {})
            )
        rows.append(
            {"step": step, "epoch": epoch, "reward": epoch + shift, "reward_stderr": 0.25, "rewards/gold/mean": 1.0}
            | {"time/sample": 3.0, "time/score": 1.0, "time/update": 4.0, "time/grid": 0.5, "time/epoch": 10.0}
        )
    return rows


def preference_rows(updates, *, text=False):
    rows = []
    for n in range(1, updates + 1):
        row = {"step": n, "epoch": 1, "loss": 0.6, "kl": 0.1, "rewards/accuracies": 0.5 + n % 2 / 4}
        row |= {"rewards/chosen": 2.0 * n, "rewards/rejected": -1.0 * n, "rewards/margins": 3.0 * n}
        errors = {"error/winner": -4.0 * n, "error/loser": -5.0 * n, "error/winner_ratio": 1 - 0.01 * n}
        rows.append(row | ({} if text else errors | {"kl/winner": 0.1 * n, "kl/loser": 0.2 * n}))
    return rows


def write_run(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def line_data(axes, n=0):
    return [list(values) for values in axes.lines[n].get_data()]


def points(curve):
    return [list(curve.xs), list(curve.ys)]


def legend_of(chart):
    return [text for _, text in shapes(chart)["legend"]]


def preference_charts(rows):
    return panel_charts(rows, PREFERENCE_PANELS)


def test_every_figure_of_the_report_is_drawn():
    for draw, count in [
        (charts.reward_chart, 1),
        (lambda rows: panel_charts(rows, CLIP_PANELS), 1),
        (lambda rows: panel_charts(rows, RATIO_PANELS), 2),
        (charts.time_chart, 1),
        (lambda rows: charts.metric_charts(rows, ["rewards/gold/mean", "grad_norm"]), 2),
    ]:
        drawn = draw(fake_rows())
        assert len(drawn) == count
        assert all(chart.title and chart.x and chart.unit for chart in drawn)
        assert all(shapes(chart)["paths"] for chart in drawn)


def test_the_reward_band_is_two_standard_errors():
    (chart,) = charts.reward_chart(fake_rows())
    assert points(chart.curves[0]) == [[1, 2, 3, 4], [1, 2, 3, 4]]
    (band,) = chart.bands
    assert (band.low[1], band.high[1]) == (1.5, 2.5)
    assert legend_of(chart) == ["mean over the epoch's samples", "± 2 standard errors"]
    # The band keeps to the epochs that have an error.
    rows = [{"epoch": 1, "reward": 1.0}, {"epoch": 2, "reward": 2.0, "reward_stderr": 0.5}]
    rows += [{"epoch": 3, "reward_stderr": 9.0}]
    (band,) = charts.reward_chart(rows)[0].bands
    assert [list(part) for part in (band.xs, band.low, band.high)] == [[2], [1], [3]]
    assert charts.reward_chart(rows[:1])[0].bands == []


def test_a_negative_kl_estimate_stays_visible():
    (chart,) = panel_charts([{"step": 1, "kl": -0.5}, {"step": 2, "kl": 0.5}], [Panel({"kl": "KL"})])
    ticks = [float(text.replace("−", "-")) for _, text in shapes(chart)["y_ticks"]]
    assert min(ticks) < 0
    assert max(float(y) for _, _, y in shapes(chart)["dots"]) < 208, "above the lower end of the plot"
    (chart,) = panel_charts([{"step": 1, "kl": 0.4}, {"step": 2, "kl": 0.5}], [Panel({"kl": "KL"})])
    assert shapes(chart)["y_ticks"][0] == ("208.0", "0.0"), "and what cannot be negative begins at 0"


def test_clip_fraction_lines_are_not_swapped():
    (chart,) = panel_charts(fake_rows(20, updates=3), CLIP_PANELS)
    assert {curve.label: list(curve.ys) for curve in chart.curves} == {
        "either side": [0.3] * 60,
        "below": [0.1] * 60,
        "above": [0.2] * 60,
    }, "and not smoothed"
    assert chart.unit == "fraction of actions"


def test_ratio_is_drawn_minus_one():
    ratio, first_pass = panel_charts(fake_rows(), RATIO_PANELS)
    lines = {curve.label: curve.ys[0] for curve in ratio.curves}
    assert lines == pytest.approx({"largest": 0.2, "mean": 0.0, "smallest": -0.1})
    assert (ratio.level, ratio.title, ratio.unit) == ((0.0, "as sampled"), "Importance ratio", "ratio − 1")
    assert points(first_pass.curves[0]) == [[1, 3, 5, 7], [1e-6] * 4]
    assert shapes(first_pass)["factor"] == "×1e-6"


def test_preference_lines_are_not_swapped():
    found = preference_charts(preference_rows(10))
    drawn = {(chart.title, curve.label): float(curve.ys[-1]) for chart in found for curve in chart.curves}
    drawn |= {(chart.title, chart.level[1]): chart.level[0] for chart in found if chart.level}
    assert drawn == pytest.approx(
        {
            ("Implicit accuracy", "accuracy"): 0.5,
            ("Implicit accuracy", "chance"): 0.5,
            ("Implicit reward, chosen − rejected", "margin"): 30,
            ("Implicit reward, chosen − rejected", "reference"): 0,
            ("Implicit reward", "chosen"): 20,
            ("Implicit reward", "rejected"): -10,
            ("Implicit reward", "reference"): 0,
            ("Error − the reference's", "winner"): -40,
            ("Error − the reference's", "loser"): -50,
            ("Error − the reference's", "reference"): 0,
            ("KL to the reference, per step", "winner"): 1,
            ("KL to the reference, per step", "loser"): 2,
            ("Winner's error / the reference's", "winner"): 0.9,
            ("Winner's error / the reference's", "reference"): 1,
        }
    )
    units = ["fraction of pairs", "beta × nats", "beta × nats", "nats", "nats", "ratio"]
    assert [chart.unit for chart in found] == units
    assert legend_of(found[3]) == ["winner", "loser", "reference"]
    assert {chart.x for chart in found} == {"optimizer update"}


def test_preference_panels_without_metrics_are_left_out():
    titles = ["Implicit accuracy", "Implicit reward, chosen − rejected", "Implicit reward"]
    assert [chart.title for chart in preference_charts(preference_rows(3, text=True))] == titles
    (chart,) = preference_charts([{"step": 1, "error/loser": 0.5, "error/winner": float("nan")}])
    assert legend_of(chart) == ["loser", "reference"]
    assert chart.curves[0].colour == 1
    with pytest.raises(ValueError, match="no row holds"):
        preference_charts([{"epoch": 1, "rewards/accuracies": 0.5}])


def test_many_preference_updates_are_pale_under_a_centred_running_mean():
    chart = preference_charts(preference_rows(60))[1]  # 60 // 20 = 3
    raw, mean = chart.curves
    assert list(raw.ys) == [3.0 * n for n in range(1, 61)]
    np.testing.assert_allclose(mean.ys, [4.5, *(3.0 * n for n in range(2, 60)), 178.5], rtol=1e-12)
    assert list(mean.xs) == list(raw.xs) == list(range(1, 61))
    assert (raw.style, mean.style) == ("pale", "bold")
    assert chart.x == "optimizer update (bold: mean over 3)"
    assert legend_of(chart) == ["margin", "reference"]
    assert chart.level == (0.0, "reference")


def test_an_even_window_flattens_alternating_accuracies_up_to_the_ends():
    chart = preference_charts(preference_rows(80))[0]
    np.testing.assert_allclose(chart.curves[1].ys[2:-1], 0.625, rtol=1e-12)
    assert "mean over 4" in chart.x


def test_a_line_logged_seldom_sets_the_window_of_its_panel():
    rows = preference_rows(100)
    for row in rows:
        if row["step"] % 50:
            del row["error/loser"]
    chart = preference_charts(rows)[3]
    assert [len(curve.xs) for curve in chart.curves] == [100, 2]
    assert chart.x == "optimizer update"


def test_preference_metrics_are_no_reward_components():
    row = {"step": 1, "epoch": 1, "rewards/accuracies": 0.5, "rewards/margins": 0.1, "rewards/chosen": 0.1}
    row |= {"rewards/mean": 1.0, "rewards/gold/std": 1.0, "rewards/gold/mean": 1.0, "rewards/a/b/mean": 1.0}
    assert reward_component_keys([row]) == ["rewards/a/b/mean", "rewards/gold/mean"]
    assert describe("rewards/gold/mean") == ("Reward: gold", "mean reward")
    assert describe("rewards/mean") == ("rewards/mean", "")


def test_time_bars_stack_up_to_the_epoch():
    (chart,) = charts.time_chart(fake_rows())
    assert legend_of(chart) == ["sample", "score", "update", "grid", "other"]
    assert chart.unit == "seconds"
    assert [part.heights[0] for part in chart.bars] == [3.0, 1.0, 4.0, 0.5, 1.5]
    assert [part.base[0] for part in chart.bars] == [0, 3, 4, 8, 8.5]
    # Parts that are longer than the epoch leave no remainder.
    (chart,) = charts.time_chart([{"epoch": 1, "time/sample": 8, "time/score": 4, "time/epoch": 10}])
    assert legend_of(chart) == ["sample", "score"]


def test_bars_of_many_epochs_are_means_that_say_so():
    rows = [{"epoch": n, "time/sample": float(n), "time/epoch": float(n)} for n in range(1, 451)]
    (chart,) = charts.time_chart(rows)  # 450 epochs in at most 200 bars: 3 in each
    (bars,) = chart.bars
    assert len(bars.xs) == 150
    assert (bars.xs[0], bars.heights[0], bars.heights[-1]) == (2, 2, 449)
    assert "a bar: mean over 3" in chart.x


def test_metric_charts_pick_the_axis_and_a_panel_a_key():
    found = charts.metric_charts(fake_rows(), ["loss", "reward", "rewards/gold/mean"])
    assert [chart.x for chart in found] == ["optimizer update", "epoch", "epoch"]
    assert [chart.title for chart in found] == ["Loss", "Reward", "Reward: gold"]


def nonsense_charts(rows):
    return charts.metric_charts(rows, ["nonsense"])


@pytest.mark.parametrize(
    "draw", [charts.reward_chart, charts.held_out_charts, charts.time_chart, preference_charts, nonsense_charts]
)
def test_absent_metrics_are_one_sentence(draw):
    with pytest.raises(ValueError, match=r"no row holds .*: the metrics"):
        draw([{"step": 1, "loss": 1.0}])


def test_one_row_and_numbers_that_are_not_finite_are_drawn():
    row = {"step": 1, "epoch": 1, "kl": float("nan"), "grad_norm": 0.0, "reward": 1.0, "reward_stderr": 0.1}
    later = [row | {"step": 2, "kl": 1.0}, row | {"step": 3, "kl": float("inf")}, row | {"step": 4, "kl": -1e300}]
    for chart in [*charts.reward_chart([row]), *charts.metric_charts([row, *later], ["grad_norm", "kl"])]:
        drawn = shapes(chart)
        assert drawn["paths"]
        assert not re.search("nan|inf", str([drawn["paths"], drawn["dots"], drawn["y_ticks"]]))


@pytest.mark.parametrize(
    ("low", "high", "texts", "factor"),
    [
        (0, 4, ["0", "1", "2", "3", "4"], ""),
        (0.93, 1.02, ["0.94", "0.96", "0.98", "1.00", "1.02"], ""),
        (-3e-6, 2e-6, ["−3", "−2", "−1", "0", "1", "2"], "×1e-6"),
        (0, 250_000, ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5"], "×1e5"),
        (7, 7, ["6.8", "7.0", "7.2"], ""),
    ],
)
def test_scales_have_few_round_numbers(low, high, texts, factor):
    drawn = shapes(Chart("", "", "", [Curve(np.array([1.0, 2.0]), np.array([low, high], dtype=float))]))
    assert ([text for _, text in drawn["y_ticks"]], drawn["factor"]) == (texts, factor)
    heights = [float(place) for place, _ in drawn["y_ticks"]]
    assert heights == sorted(heights, reverse=True), "the largest on top"


def test_a_long_line_keeps_every_extreme_and_few_points():
    xs = np.arange(100_000.0)
    ys = np.sin(xs / 5000)
    ys[[777, 50_001]] = 9, -9
    ys[20_000:30_000] = np.nan
    few_xs, few_ys = thinned(xs, ys)
    assert len(few_xs) <= 4 * COLUMNS + 4
    assert {(777, 9), (50_001, -9), (0, ys[0]), (99_999, ys[-1])} <= {*zip(few_xs, few_ys)}
    assert list(few_xs) == sorted(few_xs)
    column = xs * COLUMNS / xs[-1] // 1
    few_column = few_xs * COLUMNS / xs[-1] // 1
    for n in (0, 3, 150, COLUMNS - 1):
        for extreme in (np.min, np.max):
            assert extreme(few_ys[few_column == n]) == extreme(ys[column == n])
    assert np.isnan(few_ys[(few_xs > 20_300) & (few_xs < 29_700)]).all(), "a gap stays one"
    assert thinned(xs[:1000], ys[:1000]) == (pytest.approx(xs[:1000]), pytest.approx(ys[:1000]))


def test_the_work_grows_with_the_rows_no_faster(tmp_path, monkeypatch):
    looks, is_number = [], metrics.is_number
    monkeypatch.setattr(metrics, "is_number", lambda value: looks.append(1) or is_number(value))
    work = []
    for epochs in (50, 100, 200):
        looks.clear()
        report.write_report(write_run(tmp_path / str(epochs), fake_rows(epochs)))
        work.append(len(looks))
    assert work[2] - work[1] == 2 * (work[1] - work[0]), "a line through the three"
    assert work[2] < 5 * sum(map(len, fake_rows(200))), "and each value is looked at a few times"


def test_compare_runs_averages_seeds_and_bands_their_range(tmp_path):
    seeds = [write_run(tmp_path / f"s{n}", fake_rows(shift=shift)) for n, shift in enumerate((0.0, 1.0, 5.0))]
    other = write_run(tmp_path / "other", fake_rows(shift=-1.0))
    path = tmp_path / "figures" / "compare.png"
    figure = report.compare_runs({"ours": seeds, "flipped": str(other)}, ["reward", "grad_norm"], path)
    assert path.read_bytes().startswith(PNG)
    reward, norm = figure.axes
    assert [line.get_label() for line in reward.lines] == ["ours", "flipped"]
    assert legend_texts(figure.legends[0]) == ["ours", "flipped"]
    assert [to_rgb(line.get_color()) for line in reward.lines] == [to_rgb(color) for color in PALETTE[:2]]
    assert line_data(reward) == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert line_data(reward, 1)[1] == [0, 1, 2, 3]
    assert len(reward.collections) == 1
    band = reward.collections[0].get_paths()[0].vertices
    at_one = band[band[:, 0] == 1][:, 1]
    assert (at_one.min(), at_one.max()) == (1, 6)
    assert norm.get_xlabel() == "optimizer update"


def test_compare_runs_averages_only_where_every_seed_arrived(tmp_path):
    long, short = write_run(tmp_path / "a", fake_rows(4)), write_run(tmp_path / "b", fake_rows(2, shift=1.0))
    figure = report.compare_runs({"x": [long, short]}, ["reward"])
    assert line_data(figure.axes[0]) == [[1, 2], [1.5, 2.5]]


def test_compare_runs_leaves_out_a_label_without_the_key(tmp_path):
    a, b = write_run(tmp_path / "a", fake_rows()), write_run(tmp_path / "b", [{"step": 1, "epoch": 1, "loss": 1.0}])
    figure = report.compare_runs({"a": a, "b": b}, ["reward", "loss"])
    assert [[line.get_label() for line in axes.lines] for axes in figure.axes] == [["a"], ["a", "b"]]
    assert figure.axes[0].lines[0].get_color() == figure.axes[1].lines[0].get_color()
    assert legend_texts(figure.legends[0]) == ["a", "b"]


def test_compare_runs_bad_input(tmp_path):
    run = write_run(tmp_path / "a", fake_rows())
    with pytest.raises(ValueError, match="does not exist"):
        report.compare_runs({"a": tmp_path / "absent"}, ["reward"])
    with pytest.raises(ValueError, match="no row holds nonsense"):
        report.compare_runs({"a": run}, ["nonsense"])
    with pytest.raises(ValueError, match="at least one run"):
        report.compare_runs({}, ["reward"])
    apart = write_run(tmp_path / "b", [{"step": 99, "epoch": 99, "reward": 1.0}])
    with pytest.raises(ValueError, match="have no epoch of 'reward' in common"):
        report.compare_runs({"a": [run, apart]}, ["reward"])


def test_names_of_rewards_are_text_and_no_formulas(tmp_path):
    rows = [row | {"rewards/$\\frac{$/mean": 1.0, "rewards/$x^2$/mean": 2.0} for row in fake_rows()]
    run = write_run(tmp_path / "a", rows)
    figure = report.compare_runs({"$x$": run}, reward_component_keys(rows), tmp_path / "figure.png")
    assert [axes.get_title(loc="left") for axes in figure.axes][:2] == ["Reward: $\\frac{$", "Reward: $x^2$"]


def test_plots_leave_pyplot_alone(tmp_path):
    report.compare_runs({"a": write_run(tmp_path / "a", fake_rows())}, ["reward"], tmp_path / "figure.png")
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
