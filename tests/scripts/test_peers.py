"""scripts/peers.py: the tables, the commands, and our half at a tiny size; TRL runs only where somebody asks for it."""

import json
import sys
import time
from pathlib import Path

import peer_environment
import peer_growth
import peer_side
import peers
import pytest
import torch
from typer.testing import CliRunner


def epoch(wall, *, cpu=None, sampling=0.0, parts=None, work=None, peak=900.0):
    told = {"wall": wall, "cpu": 2 * wall if cpu is None else cpu, "sampling": sampling, "parts": parts or {}}
    return told | {"work": work or {"sampled": 640, "trained": 640}, "rise": 0.0, "resident": 800.0, "peak": peak}


def test_a_ratio_is_taken_within_each_round():
    ours, theirs = [epoch(1.0, sampling=0.5), epoch(10.0, sampling=5.0), epoch(2.0)], [epoch(2.0), epoch(11.0)]
    assert peers.advantage(ours[:2], theirs, "epoch") == (1.55, 1.1, 2.0)
    assert peers.advantage(ours[:2], [epoch(9.0, sampling=1.0)] * 2, "sampling")[1:] == (0.2, 2.0)
    assert peers.training(ours[0]) == 0.5
    assert peers.advantage(ours[2:], [epoch(3.0)], "sampling")[0] != 0  # nothing was sampled: not a number


def test_tables_have_a_line_for_each_variant_and_a_column_for_each_of_theirs():
    found = {"ours 8/8": [epoch(2.0, sampling=0.5)], "TRL 8/8": [epoch(3.0, sampling=1.0, work={"sampled": 64})]}
    head, ours, theirs = peers.epoch_table(found)
    assert "training s" in head
    assert ours.split() == ["ours", "8/8", "2.00", "(2.00-2.00)", "4.00", "0.50", "1.50", "900", "640", "640"]
    assert theirs.split()[-2:] == ["64", "0"]
    head, line = peers.ratio_table(found, ["ours 8/8"], ["TRL 8/8"], "epoch")
    assert head.split() == ["TRL", "8/8"]
    assert line.split() == ["ours", "8/8", "1.50", "(1.50-1.50)"]


def test_what_has_no_name_is_a_line_of_its_own():
    found = {"ours": [epoch(4.0, parts={"VAE": 1.0, "reward": 0.5}), epoch(6.0, parts={"VAE": 2.0})]}
    lines = [line.split() for line in peers.parts_table(found)]
    assert lines == [
        ["ours"],
        ["VAE", "1.500", "s", "30.0%"],
        ["reward", "0.250", "s", "5.0%"],
        ["without", "a", "name", "3.250", "s", "65.0%"],
    ]


def test_levers_are_compared_with_none_of_them():
    task = peers.Images(32, 10)
    names = list(peers.levers(task))
    assert names[0] == "none"
    assert "sample_batch_size=32" in peers.levers(task)["batch"]
    found = {name: [epoch(2.0 if name == "none" else 1.0)] for name in names}
    lines = peers.lever_table(found)
    assert lines[1].split()[3:5] == ["1.00", "(1.00-1.00)"]
    assert lines[2].split()[3:5] == ["2.00", "(2.00-2.00)"]


def test_both_sides_are_given_the_same_task():
    task = peers.Images(32, 10, 5.0, threads=2)
    ours = task.ours("ours", peers.shape(8, 8, "no"))
    theirs = task.theirs(Path("python"), Path("model"), 8, 8, "no")
    assert ours.command[:2] == [sys.executable, str(peers.SCRIPTS / "peer_ours.py")]
    settings = json.loads(ours.command[2])["overrides"]
    assert {"samples_per_epoch=32", "updates_per_epoch=2", "sample_batch_size=8", "num_threads=2"} <= set(settings)
    given = json.loads(theirs.command[2])
    assert (given["samples"], given["steps"], given["guidance"], given["updates"], given["threads"]) == (
        32,
        10,
        5,
        2,
        2,
    )
    assert theirs.name == "TRL 8/8 float32"
    assert set(task.shapes()) == {(32, 16), (32, 8), (16, 16), (16, 8), (8, 8)}
    assert all(training <= 16 for _, training in task.shapes()), "two updates"


def test_pip_is_asked_for_packages_alone():
    for name, packages in peer_environment.REQUIREMENTS.items():
        command = peer_environment.install_command(Path("python"), name)
        assert command[:4] == ["python", "-m", "pip", "install"]
        assert command[-len(packages) :] == list(packages)
        assert not any("://" in word or "index" in word for word in command)


def test_an_environment_that_is_there_is_not_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(peer_environment.venv, "create", lambda place, **_: made.append(place))
    place = tmp_path / "trl-newest"
    place.mkdir()
    (place / "requirements.txt").write_text("trl")
    assert peer_environment.python_of("trl-newest", tmp_path).is_relative_to(place)
    assert not made
    (place / "requirements.txt").write_text("trl==1.0")
    with pytest.raises(OSError):  # noqa: PT011 (there is no Python in what was not made)
        peer_environment.python_of("trl-newest", tmp_path)
    assert made == [place]
    monkeypatch.setenv("PYTHONPATH", "here")
    assert "PYTHONPATH" not in peer_environment.environment(A="1")


def test_text_tasks_and_their_data(tmp_path):
    tasks = peers.text_tasks(["grpo", "dpo", "memory"], [8192, 49152], [32, 512], None)
    assert [(task.method, task.vocabulary, task.length, task.samples) for task in tasks] == [
        ("grpo", 8192, 32, 16),
        ("grpo", 8192, 512, 16),
        ("dpo", 8192, 64, 16),
        ("grpo", 49152, 32, 16),
        ("grpo", 49152, 512, 16),
        ("dpo", 49152, 64, 16),
        ("grpo", 49152, 256, 4),
    ]
    assert tasks[-1].rise
    ours, theirs = tasks[-1].sides(Path("python"), tmp_path)
    assert ours.variables == theirs.variables == {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    assert json.loads(theirs.command[2])["rows"] == [
        json.loads(line) for line in (tmp_path / "grpo256.jsonl").read_text().splitlines()
    ]
    rows = peers.text_rows(100, 3, 5, pairs=True)
    assert all(len(row["prompt"].split()) == 16 and len(row["chosen"].split()) == 5 for row in rows)


def test_the_inner_part_of_nested_parts_has_the_seconds(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(peer_side.time, "perf_counter", lambda: next(now))
    clock = peer_side.Clock()
    with clock.part("outer"), clock.part("inner"):
        pass
    assert clock.seconds == {"outer": 5.0, "inner": 2.0}


def test_growth_is_told_over_a_line_or_a_constant():
    points = [{"x": x, "cpu": cpu, "resident": 1.0, "peak": 2.0, "start": 3.0} for x, cpu in ((8, 1.0), (16, 3.0))]
    lines = peer_growth.growth_tables({"samples": {"linear": True, "points": points}})
    assert lines[-1].split() == ["16", "3.000", "3.00", "1.50", "3.0", "1", "2"]
    lines = peer_growth.growth_tables({"prompts": {"linear": False, "points": points}})
    assert lines[-1].split()[:4] == ["16", "3.000", "3.00", "3.00"]
    run = peer_growth.long_run([epoch(1.0 + (i == 0)) for i in range(60)])
    assert [(one["x"], one["cpu"]) for one in run] == [(2, 2.0), (10, 2.0), (50, 2.0)]


def test_the_curves_of_growth(tmp_path):
    found = {curve.name: [x for x, _ in curve.points] for curve in peer_growth.curves(tmp_path, 1)}
    assert found["samples"] == [8, 16, 32]
    assert found["pairs"] == [16, 64, 256]
    assert len((tmp_path / "prompts512.txt").read_text().splitlines()) == 512
    assert len(list((tmp_path / "pairs64").glob("*.png"))) == 128


def test_help_is_there():
    import benchmark

    result = CliRunner().invoke(benchmark.app, ["peers", "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    assert "--growth" in result.output
    assert "--levers" in result.output


def test_a_side_that_fails_is_shown_with_its_last_words():
    variant = peers.Variant("ours", Path(sys.executable), "peer_ours.py", {"recipe": "nosuch", "overrides": []})
    with pytest.raises(SystemExit, match=r"(?s)ours ended with exit status 1.*nosuch"):
        peers.Process(variant)


@pytest.mark.parametrize("kind", ["images", "text"])
def test_our_half(tmp_path, kind):
    if kind == "images":
        variant = peers.Images(4, 2, 2.0, threads=1).ours("ours", peers.shape(2, 2, "no"))
    else:
        peers.write_language_model(tmp_path, 300)
        task = peers.Text("grpo", 300, 5, samples=4, micro_batch=2, threads=1, rise=Path("/proc/self").exists())
        variant, _ = task.sides(Path("python"), tmp_path)
    with peers.Process(variant) as process:
        assert (process.told["threads"], process.told["torch"]) == (1, torch.__version__)
        time.sleep(process.epoch()["wall"])  # the other side's turn
        found = process.epoch()
    assert 0 < found["sampling"] < found["wall"]
    assert found["cpu"] > 0
    named = sum(found["parts"].values())
    assert 0.5 * found["wall"] < named <= found["wall"]
    common = {"forward pass, sampled", "forward pass, trained", "backward pass", "optimizer", "reward"}
    own = {"VAE", "prompts", "noise", "denoising step and log-prob"} if kind == "images" else {"log-probs of tokens"}
    assert found["parts"].keys() >= common | own | {"metrics and report"}
    if kind == "images":  # 4 images x 2 steps, with and without the prompt
        assert found["work"] == {"sampled": 16, "trained": 16}
    else:
        assert found["work"]["trained"] >= 4 * (16 + 1)
        assert found["rise"] >= 0
