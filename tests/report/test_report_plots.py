import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from diffusion_align import report
from diffusion_align.report import plots
from diffusion_align.report.figures import CLIP_PANELS, PREFERENCE_PANELS, RATIO_PANELS
from diffusion_align.report.plots import PALETTE, Panel, add_legend, describe, plot_panels, reward_component_keys

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


def plot_preference(rows):
    return plot_panels(rows, PREFERENCE_PANELS)


def test_every_plot_is_a_png_and_leaves_pyplot_alone(tmp_path):
    for n, (draw, n_axes) in enumerate(
        [
            (plots.plot_reward, 1),
            (lambda rows: plot_panels(rows, CLIP_PANELS), 1),
            (lambda rows: plot_panels(rows, RATIO_PANELS), 2),
            (plots.plot_time_split, 1),
            (lambda rows: plots.plot_metrics(rows, ["rewards/gold/mean", "grad_norm"]), 2),
        ]
    ):
        figure = draw(fake_rows())
        assert len(figure.axes) == n_axes
        assert all(axes.get_title(loc="left") and axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
        assert report.save_figure(figure, tmp_path / f"{n}.png").read_bytes().startswith(PNG)

    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_the_reward_band_is_two_standard_errors():
    (axes,) = plots.plot_reward(fake_rows()).axes
    assert line_data(axes) == [[1, 2, 3, 4], [1, 2, 3, 4]]
    band = axes.collections[0].get_paths()[0].vertices
    at_two = band[band[:, 0] == 2][:, 1]
    assert (at_two.min(), at_two.max()) == (1.5, 2.5)
    assert legend_texts(axes.get_legend()) == ["mean over the epoch's samples", "± 2 standard errors"]
    # The band keeps to the epochs that have an error.
    rows = [{"epoch": 1, "reward": 1.0}, {"epoch": 2, "reward": 2.0, "reward_stderr": 0.5}]
    rows += [{"epoch": 3, "reward_stderr": 9.0}]
    (axes,) = plots.plot_reward(rows).axes
    assert axes.collections[0].get_segments()[0].tolist() == [[2, 1], [2, 3]]
    (axes,) = plots.plot_reward(rows[:1]).axes
    assert not axes.collections


def test_a_negative_kl_estimate_stays_visible():
    (axes,) = plot_panels([{"step": 1, "kl": -0.5}, {"step": 2, "kl": 0.5}], [Panel({"kl": "KL"})]).axes
    assert axes.get_ylim()[0] < -0.5


def test_clip_fraction_lines_are_not_swapped():
    (axes,) = plot_panels(fake_rows(20, updates=3), CLIP_PANELS).axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {
        "either side": [0.3] * 60,
        "below": [0.1] * 60,
        "above": [0.2] * 60,
    }, "and not smoothed"
    assert axes.get_ylabel() == "fraction of actions"


def test_ratio_is_drawn_minus_one():
    ratio, first_pass = plot_panels(fake_rows(), RATIO_PANELS).axes
    lines = {line.get_label(): line.get_ydata()[0] for line in ratio.lines}
    assert lines == pytest.approx({"largest": 0.2, "mean": 0.0, "smallest": -0.1, "as sampled": 0.0})
    assert (ratio.get_title(loc="left"), ratio.get_ylabel()) == ("Importance ratio", "ratio − 1")
    assert line_data(first_pass) == [[1, 3, 5, 7], [1e-6] * 4]


def test_preference_lines_are_not_swapped():
    figure = plot_preference(preference_rows(10))
    drawn = {
        (axes.get_title(loc="left"), line.get_label()): float(line.get_ydata()[-1])
        for axes in figure.axes
        for line in axes.lines
    }
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
    assert [axes.get_ylabel() for axes in figure.axes] == units
    assert legend_texts(figure.axes[3].get_legend()) == ["winner", "loser", "reference"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"optimizer update"}
    assert plots.figure_png(figure).startswith(PNG)


def test_preference_panels_without_metrics_are_left_out():
    figure = plot_preference(preference_rows(3, text=True))
    titles = ["Implicit accuracy", "Implicit reward, chosen − rejected", "Implicit reward"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles
    (axes,) = plot_preference([{"step": 1, "error/loser": 0.5, "error/winner": float("nan")}]).axes
    assert legend_texts(axes.get_legend()) == ["loser", "reference"]
    assert to_rgb(axes.lines[0].get_color()) == to_rgb(PALETTE[1])
    with pytest.raises(ValueError, match="no row holds"):
        plot_preference([{"epoch": 1, "rewards/accuracies": 0.5}])


def test_many_preference_updates_are_pale_under_a_centred_running_mean():
    axes = plot_preference(preference_rows(60)).axes[1]  # 60 // 20 = 3
    raw, mean, level = axes.lines
    assert list(raw.get_ydata()) == [3.0 * n for n in range(1, 61)]
    np.testing.assert_allclose(mean.get_ydata(), [4.5, *(3.0 * n for n in range(2, 60)), 178.5], rtol=1e-12)
    assert list(mean.get_xdata()) == list(raw.get_xdata()) == list(range(1, 61))
    assert raw.get_alpha() < 0.5
    assert raw.get_linewidth() < mean.get_linewidth()
    assert axes.get_xlabel() == "optimizer update (bold: mean over 3)"
    assert legend_texts(axes.get_legend()) == ["margin", "reference"]
    assert list(level.get_ydata()) == [0, 0]


def test_an_even_window_flattens_alternating_accuracies_up_to_the_ends():
    axes = plot_preference(preference_rows(80)).axes[0]
    np.testing.assert_allclose(axes.lines[1].get_ydata()[2:-1], 0.625, rtol=1e-12)
    assert "mean over 4" in axes.get_xlabel()


def test_a_line_logged_seldom_sets_the_window_of_its_panel():
    rows = preference_rows(100)
    for row in rows:
        if row["step"] % 50:
            del row["error/loser"]
    axes = plot_preference(rows).axes[3]
    assert [len(line.get_xdata()) for line in axes.lines[:2]] == [100, 2]
    assert axes.get_xlabel() == "optimizer update"


def test_preference_metrics_are_no_reward_components():
    row = {"step": 1, "epoch": 1, "rewards/accuracies": 0.5, "rewards/margins": 0.1, "rewards/chosen": 0.1}
    row |= {"rewards/mean": 1.0, "rewards/gold/std": 1.0, "rewards/gold/mean": 1.0, "rewards/a/b/mean": 1.0}
    assert reward_component_keys([row]) == ["rewards/a/b/mean", "rewards/gold/mean"]
    assert describe("rewards/gold/mean") == ("Reward: gold", "mean reward")
    assert describe("rewards/mean") == ("rewards/mean", "")


def test_time_bars_stack_up_to_the_epoch():
    (axes,) = plots.plot_time_split(fake_rows()).axes
    assert legend_texts(axes.get_legend()) == ["other", "grid", "update", "score", "sample"]
    assert axes.get_ylabel() == "seconds"
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches if bar.get_x() < 1]
    assert max(tops) == 10.0
    assert [container[0].get_height() for container in axes.containers] == [3.0, 1.0, 4.0, 0.5, 1.5]
    # Parts that are longer than the epoch leave no remainder.
    (axes,) = plots.plot_time_split([{"epoch": 1, "time/sample": 8, "time/score": 4, "time/epoch": 10}]).axes
    assert legend_texts(axes.get_legend()) == ["score", "sample"]


def test_plot_metrics_picks_the_axis_and_a_panel_a_key():
    figure = plots.plot_metrics(fake_rows(), ["loss", "reward", "rewards/gold/mean"])
    assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer update", "epoch", "epoch"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Reward", "Reward: gold"]


def plot_nonsense(rows):
    return plots.plot_metrics(rows, ["nonsense"])


@pytest.mark.parametrize(
    "draw", [plots.plot_reward, plots.plot_held_out_reward, plots.plot_time_split, plot_preference, plot_nonsense]
)
def test_absent_metrics_are_one_sentence(draw):
    with pytest.raises(ValueError, match=r"no row holds .*: the metrics"):
        draw([{"step": 1, "loss": 1.0}])


def test_one_row_and_nan_draw():
    row = {"step": 1, "epoch": 1, "kl": float("nan"), "grad_norm": 0.0, "reward": 1.0, "reward_stderr": 0.1}
    later = row | {"step": 2, "kl": 1.0}
    for figure in (plots.plot_reward([row]), plots.plot_metrics([row, later], ["grad_norm", "kl"])):
        assert plots.figure_png(figure).startswith(PNG)


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


def test_names_of_rewards_are_text_and_no_formulas():
    rows = [row | {"rewards/$\\frac{$/mean": 1.0, "rewards/$x^2$/mean": 2.0} for row in fake_rows()]
    plots.plot_metrics(rows, reward_component_keys(rows)).canvas.draw()
    axes = plot_panels(rows, [Panel({"kl": "KL"})]).axes[0]
    axes.plot([0, 1], label="$x$")
    add_legend(axes)
    assert not any(text.get_parse_math() for text in axes.get_legend().get_texts())
