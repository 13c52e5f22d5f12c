import numpy as np
import pytest

from diffusion_align.report.metrics import natural_x, numeric_keys, read_metrics, series

ONE, TWO = b'{"step": 1}\n', b'{"step": 2}'
CUT = [b'{"step": 2, "ep', b"{", b'{"step": 2, "note": "\xe2\x82', b""]  # a kill leaves such last lines
GARBAGE = [b"garbage", b"[1]", b"3", b"\xff"]


def read(tmp_path, data: bytes):
    (tmp_path / "metrics.jsonl").write_bytes(data)
    return read_metrics(tmp_path / "metrics.jsonl")


def test_a_cut_last_line_is_ignored_and_a_whole_one_without_newline_counts(tmp_path):
    for tail in CUT:
        assert read(tmp_path, ONE + tail) == [{"step": 1}]
    assert read(tmp_path, ONE + b"\n" + TWO) == [{"step": 1}, {"step": 2}]
    assert read(tmp_path, b"") == []


def test_garbage_names_its_line_and_a_missing_file_is_an_error(tmp_path):
    elsewhere = [ONE + line + b"\n" + TWO + b"\n" for line in [*CUT[:1], *GARBAGE]]
    for data in [*elsewhere, ONE + b"Traceback", ONE + b'{"step": \n']:
        with pytest.raises(ValueError, match="line 2 is not a JSON object"):
            read(tmp_path, data)
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
