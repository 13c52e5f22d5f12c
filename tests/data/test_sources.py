"""Reading rows from every kind of source, a setting's own name in every sentence, and no row more than asked for."""

import csv
import gzip
import json
import sys

import numpy as np
import pytest
import torch

from diffusion_align.data.schemas import check_columns, mapping
from diffusion_align.data.sources import (
    ArrowTable,
    ListTable,
    TableSource,
    check_hub,
    first_rows,
    is_hub,
    listed,
    open_table,
    scalar,
    short,
)
from diffusion_align.errors import ConfigError, problems_of
from tests.helpers.problems import assert_problem
from tests.helpers.rows_on_disk import write_rows

ROWS = [{"prompt": f"p{i}", "turns": [{"role": "user", "content": f"c{i}"}], "n": i} for i in range(7)]
pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def read(source, count=None, **settings):
    return list(first_rows(open_table(TableSource("data", source, **settings)), count))


def problems(source, **settings):
    return problems_of(open_table, TableSource("data", source, **settings))


@pytest.mark.parametrize("kind", ["list", ".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_rows_are_the_same_whatever_holds_them(tmp_path, kind):
    source = ROWS if kind == "list" else write_rows(tmp_path / f"rows{kind}", ROWS)
    assert read(source) == ROWS
    assert read(source, 3) == ROWS[:3]
    assert read(source, 100) == ROWS
    table = open_table(TableSource("data", source))
    assert isinstance(table, ArrowTable if kind == ".parquet" else ListTable)
    assert table.cells(4, ["n", "prompt"]) == [4, "p4"]
    assert list(table.scan(["n", "prompt"])) == [(i, f"p{i}") if kind == ".parquet" else [i, f"p{i}"] for i in range(7)]


ODD_LINES = [
    '{"a": 1, "a": 2}',
    '{"a": NaN, "b": -Infinity, "c": 1e400}',
    '{"a": "\\ud800"}',
    '{"a": 123456789012345678901234567890, "b": 0.1234567890123456789, "c": -0.0, "d": 5e-324}',
    '{"a": ' + "[" * 300 + "]" * 300 + "}",
    '{"\\u0041": "\\ud83d\\ude00", "b": "x\u2028y\\u0000"}\r',
    ' \t{"a": true, "b": null, "c": [1, {"d": 1.0}]} ',
]


def test_lines_are_read_as_python_reads_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\n\n".join(ODD_LINES)).encode())
    rows = open_table(TableSource("data", str(tmp_path / "a.jsonl"))).rows
    assert [repr(row) for row in rows] == [repr(json.loads(line)) for line in ODD_LINES]


def test_rows_of_a_long_list_share_the_names_of_their_columns(tmp_path):
    rows = open_table(TableSource("data", write_rows(tmp_path / "a.jsonl", ROWS * 30))).rows
    assert len({id(name) for row in rows for name in row}) == 3


def test_cells_of_a_csv_file_are_texts(tmp_path):
    assert read(write_rows(tmp_path / "a.csv", [{"prompt": "a,b", "n": 1}])) == [{"prompt": "a,b", "n": "1"}]


def test_a_cell_that_a_row_lacks_is_none():
    assert read([{"a": 1}, {"b": 2}]) == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_a_folder_in_the_format_of_datasets(tmp_path):
    for split, rows in (("train", ROWS[:2]), ("test", ROWS[2:5])):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    assert read(str(tmp_path)) == ROWS[:2]
    assert read(str(tmp_path), split="test") == ROWS[2:5]
    assert read(str(tmp_path), split="test[1:]") == ROWS[3:5]
    assert_problem(problems(str(tmp_path), split="dev")[0], f"data.source='{tmp_path}', split 'dev'", "Unknown split")


def test_a_file_of_the_name_in_the_settings_stands_for_its_folder(tmp_path, golden):
    write_rows(tmp_path / "mine.jsonl", ROWS[:1])
    write_rows(tmp_path / "other.jsonl", ROWS[:2])
    assert read(str(tmp_path), stem="mine") == ROWS[:1]
    write_rows(tmp_path / "mine.csv", [{"a": 1}])
    golden("two files of the name", problems(str(tmp_path), stem="mine"))


def test_a_scan_over_several_blocks(tmp_path):
    source = write_rows(tmp_path / "a.parquet", [{"n": i, "x": bytes([i % 256])} for i in range(2501)])
    assert [row["n"] for row in read(source)] == list(range(2501))
    assert [row["n"] for row in read(source, 1001)] == list(range(1001))
    outlined = list(open_table(TableSource("data", source)).scan(["n", "x"], ["x"]))
    assert outlined == [(i, b".") for i in range(2501)]


def test_the_first_rows_of_a_hub_dataset_are_streamed_and_no_more(hub_rows):
    write_rows(hub_rows / "train-00000-of-00002.parquet", ROWS[:4])
    (hub_rows / "train-00001-of-00002.parquet").write_bytes(b"PAR1 no")
    for count in (1, 3, 4):
        table = open_table(TableSource("data", "some/rows", max_rows=count))
        assert list(first_rows(table, count)) == ROWS[:count]
        assert len(table) == count
    table = open_table(TableSource("data", "some/rows", max_rows=5))
    with pytest.raises(ConfigError, match=r"^data\.source='some/rows', split 'train', cannot be loaded \("):
        list(first_rows(table, 5))
    (hub_rows / "train-00001-of-00002.parquet").unlink()
    write_rows(hub_rows / "train-00001-of-00002.parquet", ROWS[4:])
    assert read("some/rows", 6, max_rows=6) == ROWS[:6]
    assert read("some/rows") == ROWS


def test_a_part_of_a_split_cannot_be_streamed(hub_rows):
    for limit in ("max_rows", "most"):
        [problem] = problems("some/rows", split="train[:2]", max_rows=1, limit=limit)
        assert_problem(problem, "data.split='train[:2]'", f"with data.{limit}: name the split without [...]")
    check_hub(TableSource("data", "some/rows", split="train[:2]"))


def test_what_is_a_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub("some/rows")
    (tmp_path / "some" / "rows").mkdir(parents=True)
    for source in ("some/rows", "rows", "a/b.jsonl", "a/b.jsonl.gz", "a/b.json", "a/b/c", "./a", [{"a": 1}]):
        assert not is_hub(source)


def test_missing_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("some/rows", write_rows(tmp_path / "a.parquet", ROWS)):
        assert_problem(problems(source)[0], f"data.source={source!r}", "pip install 'diffusion-align[datasets]'")
    assert read(write_rows(tmp_path / "a.jsonl", ROWS)) == read(ROWS) == ROWS


def test_sources_that_are_not_there(tmp_path, golden):
    golden("no file", problems("no.jsonl"))
    assert problems("no", allowed="this or that")[0].endswith(": give this or that")
    for place, what in ((write_rows(tmp_path / "a.jsonl", ROWS), "file"), (ROWS, "list")):
        golden(f"split of a {what}", problems(place, split="dev"))


GZIP = gzip.compress(b'{"a": 1}\n' * 100)
UNREADABLE: dict[str, list[bytes]] = {
    "a.txt": [b"x"],
    "a.jsonl": [b'{"a": 1}\n\n[1]\n{\n' + b"[" * 100_000, b"?\n" * 15, b"\xff\xfe\x00"],
    "a.json": [b'{"a": 1}', b"", b"null", b'{"a": 1}\n{"a": 2}', b"[1,", b"[" * 100_000, b"7", b'[{"a": 1}, 7, null]'],
    "a.jsonl.gz": [b'{"a": 1}\n', GZIP[:-12], GZIP[:12] + b"\0" * 9 + GZIP[12:], gzip.compress(b"\xff\xfe")],
    "a.parquet": [b"PAR1 no"],
    "a.csv": [b'a,b\n1,"2\n', b"a,b,a,,\n1,2,3,,\n"],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, all_ in UNREADABLE.items() for i in range(len(all_))])
def test_files_that_cannot_be_read(tmp_path, golden, name, number):
    (tmp_path / name).write_bytes(UNREADABLE[name][number])
    found = problems(str(tmp_path / name))
    start, library, _ = found[0].partition("cannot be loaded (" if name == "a.parquet" else "cannot be read: ")
    golden(f"{name}, {number}", start + library if library else found)  # what follows are a library's words


def test_lines_end_at_line_breaks_only_and_keep_their_blanks(tmp_path):
    lines = ["one ", "\ttwo", "three\u2028still", "fo\x85ur", "fi\x0cve", "s\x0bi\x1cx"]
    (tmp_path / "a.txt").write_bytes("\r\n".join(lines[:3]).encode() + b"\n \n\r" + "\r".join(lines[3:]).encode())
    assert read(str(tmp_path / "a.txt"), lines="prompt") == [{"prompt": line} for line in lines]


def test_a_byte_order_mark_and_separators_inside_a_text_end_no_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": "a\u2028b\x85c"}\r\n', encoding="utf-8", newline="")
    assert read("~/a.jsonl") == [{"a": "a\u2028b\x85c"}]


def test_a_cell_may_be_long(tmp_path):
    rows = [{"prompt": "a" * 300_000, "n": "1"}]
    before = csv.field_size_limit()
    assert read(write_rows(tmp_path / "a.csv", rows)) == rows
    assert csv.field_size_limit() == before


def test_a_single_number():
    found = [scalar(value) for value in (np.int64(3), np.bool_(True), torch.tensor(0.5), np.array(2))]
    assert [(value, type(value)) for value in found] == [(3, int), (True, bool), (0.5, float), (2, int)]
    for value in (3, "a", [1], np.ones(2), torch.ones(1), None):
        assert scalar(value) is value


def test_a_list_of_anything_but_mappings(golden):
    golden("a list of texts", problems([{"a": 1}, 7, "x"]))
    assert problems([7] * 11)[10:] == ["data: 1 more row is bad"]
    assert problems([7] * 12)[10:] == ["data: 2 more rows are bad"]


COLUMN_SCHEMAS = ({"text": "prompt", "good": "chosen"}, {"good": "chosen"})


def test_columns_by_our_names():
    assert mapping("data", COLUMN_SCHEMAS, None, ["chosen", "prompt", "x"]) == {"text": "prompt", "good": "chosen"}
    assert mapping("data", COLUMN_SCHEMAS, None, ["chosen"]) == {"good": "chosen"}
    assert mapping("data", COLUMN_SCHEMAS, {"good": "x"}, ["chosen", "x"]) == {"good": "x"}
    assert mapping("data", COLUMN_SCHEMAS, {"text": "x"}, ["chosen", "x"]) == {"text": "x", "good": "chosen"}


def test_columns_that_are_not_there(golden):
    for columns in (None, {"text": "a"}, {"good": "c"}):
        golden(f"columns={columns}", problems_of(mapping, "data", COLUMN_SCHEMAS, columns, ["a", "b"]))
    golden("two names", problems_of(check_columns, "data", COLUMN_SCHEMAS, {"goood": "a", "text": "a"}))
    golden("columns of both", problems_of(check_columns, "data", ({"a": "a"}, {"b": "b"}), {"a": "x", "b": "y"}))
    for fine in ({"good": "x"}, None):
        check_columns("data", COLUMN_SCHEMAS, fine)


def test_lists_of_sentences_and_long_values():
    assert listed(["x"] * 10, "data") == ["x"] * 10
    assert listed(["x"] * 11, "data", "line")[10:] == ["data: 1 more line is bad"]
    assert short("ab") == "'ab'"
    assert len(short("a" * 99)) == 80
