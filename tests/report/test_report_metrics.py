import numpy as np
import pytest

from diffusion_align.report.metrics import natural_x, numeric_keys, read_metrics, series


def write(tmp_path, data: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("tail", [b'{"step": 2, "ep', b"{", b'{"step": 2, "note": "\xe2\x82', b""])
def test_a_cut_last_line_is_ignored(tmp_path, tail):
    assert read_metrics(write(tmp_path, b'{"step": 1}\n' + tail)) == [{"step": 1}]


def test_a_whole_last_line_without_newline_counts(tmp_path):
    assert read_metrics(write(tmp_path, b'{"step": 1}\n\n{"step": 2}')) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", [b'{"step": 2, "ep', b"garbage", b"[1]", b"3", b"\xff"])
def test_garbage_elsewhere_names_its_line(tmp_path, line):
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_metrics(write(tmp_path, b'{"step": 1}\n' + line + b'\n{"step": 3}\n'))


def test_a_last_line_that_is_no_cut_row_is_garbage(tmp_path):
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(write(tmp_path, b'{"step": 1}\nTraceback'))
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(write(tmp_path, b'{"step": 1}\n{"step": \n'))


def test_an_empty_file_has_no_rows_and_a_missing_one_is_an_error(tmp_path):
    assert read_metrics(write(tmp_path, b"")) == []
    with pytest.raises(ValueError, match="does not exist"):
        read_metrics(tmp_path / "absent.jsonl")


def test_series_sorts_skips_and_lets_the_last_row_win():
    rows = [
        {"step": 3, "a": 30},
        {"step": 1, "a": 10},
        {"step": 2, "a": None},
        {"step": 4, "a": True},
        {"a": 5},
        {"step": 3, "a": 31.5},
    ]
    xs, values = series(rows, "a")
    np.testing.assert_array_equal(xs, [1, 3])
    np.testing.assert_array_equal(values, [10, 31.5])


def test_numeric_keys_and_natural_x():
    rows = [
        {"step": 1, "epoch": 1, "loss": 1.0},
        {"step": 2, "epoch": 1, "loss": 1.0},
        {"step": 2, "epoch": 1, "reward": 2, "name": "x", "bad": float("nan")},
    ]
    assert numeric_keys(rows) == ["loss", "reward"]
    assert natural_x([rows], "loss") == "step"
    assert natural_x([rows], "reward") == "epoch"
