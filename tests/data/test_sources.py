"""Reading rows from every kind of source, a setting's own name in every sentence, and no row more than asked for."""

import csv
import gzip
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
    [problem] = problems(str(tmp_path), split="dev")
    assert problem.startswith(f"data.source='{tmp_path}', split 'dev', cannot be loaded (Unknown split")


def test_a_file_of_the_name_in_the_settings_stands_for_its_folder(tmp_path):
    write_rows(tmp_path / "mine.jsonl", ROWS[:1])
    write_rows(tmp_path / "other.jsonl", ROWS[:2])
    assert read(str(tmp_path), stem="mine") == ROWS[:1]
    write_rows(tmp_path / "mine.csv", [{"a": 1}])
    assert problems(str(tmp_path), stem="mine") == [
        f"data.source='{tmp_path}' holds mine.jsonl and mine.csv: give the file that is meant"
    ]


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
    sentence = "data.split='train[:2]' cannot be used with data.{}: name the split without [...]"
    assert problems("some/rows", split="train[:2]", max_rows=1) == [sentence.format("max_rows")]
    assert problems("some/rows", split="train[:2]", max_rows=1, limit="most") == [sentence.format("most")]
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
        assert problems(source) == [
            f"data.source={source!r} needs the package datasets: pip install 'diffusion-align[datasets]'"
        ]
    assert read(write_rows(tmp_path / "a.jsonl", ROWS)) == read(ROWS) == ROWS


def test_sources_that_cannot_be_read(tmp_path):
    places = "a .jsonl, .jsonl.gz, .json, .csv or .parquet file, a folder, or a Hub dataset owner/name"
    assert problems("no.jsonl") == [f"data.source='no.jsonl': there is no such file or folder: give {places}"]
    assert problems("no", allowed="this or that")[0].endswith("there is no such file or folder: give this or that")
    (tmp_path / "a.txt").write_text("x")
    assert problems(str(tmp_path / "a.txt")) == [
        f"data.source='{tmp_path / 'a.txt'}': use a .jsonl, .jsonl.gz, .json, .csv or .parquet file"
    ]
    source = write_rows(tmp_path / "a.jsonl", ROWS)
    for place, what in ((source, "file"), (ROWS, "list")):
        assert problems(place, split="dev") == [
            f"data.split='dev' is not known: a {what} holds one split, train; leave it out"
        ]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n[1]\n{\n' + "[" * 100_000)
    assert problems(source) == [
        f"data.source={source!r}: line {n} is not a JSON object: fix or remove it" for n in (3, 4, 5)
    ]
    (tmp_path / "a.jsonl").write_text("?\n" * 15)
    assert problems(source)[10:] == ["data: 5 more lines are bad"]
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    assert problems(source)[0].startswith(f"data.source={source!r} cannot be read: ")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    [problem] = problems(str(tmp_path / "a.parquet"))
    assert problem.startswith(f"data.source='{tmp_path / 'a.parquet'}', split 'train', cannot be loaded (")
    assert problem.endswith("): fix it")
    (tmp_path / "a.csv").write_text('a,b\n1,"2\n')
    assert "line 2 is not valid CSV (" in problems(str(tmp_path / "a.csv"))[0]
    (tmp_path / "a.csv").write_text("a,b,a,,\n1,2,3,,\n")
    twice = f"data.source='{tmp_path / 'a.csv'}': two columns are called 'a': rename or remove one"
    assert problems(str(tmp_path / "a.csv")) == [twice]


def test_files_of_rows_that_are_none(tmp_path):
    path = tmp_path / "a.json"
    for text in ('{"a": 1}', "", "null", '{"a": 1}\n{"a": 2}', "[1,", "[" * 100_000, "7"):
        path.write_text(text)
        assert problems(str(path)) == [
            f"data.source='{path}' is not a JSON list: give a list of rows, [{{...}}, ...], or call a file of one "
            "object a line .jsonl"
        ]
    path.write_text('[{"a": 1}, 7, null]')
    assert problems(str(path)) == [
        f"data.source='{path}': row {i} is {value}, not a JSON object: fix or remove it"
        for i, value in ((1, "7"), (2, "None"))
    ]
    whole = gzip.compress(b'{"a": 1}\n' * 100)
    for content in (b'{"a": 1}\n', whole[:-12], whole[:12] + b"\0" * 9 + whole[12:], gzip.compress(b"\xff\xfe")):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        assert problems(str(tmp_path / "a.jsonl.gz"))[0].startswith(
            f"data.source='{tmp_path / 'a.jsonl.gz'}' cannot be read: "
        )


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


def test_a_list_of_anything_but_mappings():
    assert problems([{"a": 1}, 7, "x"]) == [
        f"data.source: row {i} is {value}, not a mapping of column to value: fix or remove it"
        for i, value in ((1, "7"), (2, "'x'"))
    ]
    assert problems([7] * 11)[10:] == ["data: 1 more row is bad"]
    assert problems([7] * 12)[10:] == ["data: 2 more rows are bad"]


LAYOUTS = ({"text": "prompt", "good": "chosen"}, {"good": "chosen"})


def test_columns_by_our_names():
    assert mapping("data", LAYOUTS, None, ["chosen", "prompt", "x"]) == {"text": "prompt", "good": "chosen"}
    assert mapping("data", LAYOUTS, None, ["chosen"]) == {"good": "chosen"}
    assert mapping("data", LAYOUTS, {"good": "x"}, ["chosen", "x"]) == {"good": "x"}
    assert mapping("data", LAYOUTS, {"text": "x"}, ["chosen", "x"]) == {"text": "x", "good": "chosen"}


def test_columns_that_are_not_there():
    def refused(columns, found):
        [problem] = problems_of(mapping, "data", LAYOUTS, columns, found)
        return problem

    end = "; the columns found are 'a', 'b': map our names to these"
    assert refused(None, ["a", "b"]) == "data.columns: the column chosen is needed" + end
    assert refused({"text": "a"}, ["a", "b"]) == "data.columns: the columns a, chosen are needed" + end
    assert refused({"good": "c"}, ["a", "b"]) == "data.columns: there is no column 'c'" + end

    assert problems_of(check_columns, "data", LAYOUTS, {"goood": "a", "text": "a"}) == [
        "data.columns: unknown name 'goood': did you mean 'good'?",
        "data.columns: two names stand for one column: give each its own",
    ]
    apart = ({"a": "a"}, {"b": "b"})
    assert problems_of(check_columns, "data", apart, {"a": "x", "b": "y"}) == ["data.columns: give a or b, not both"]
    for fine in ({"good": "x"}, None):
        check_columns("data", LAYOUTS, fine)


def test_lists_of_sentences_and_long_values():
    assert listed(["x"] * 10, "data") == ["x"] * 10
    assert listed(["x"] * 11, "data", "line")[10:] == ["data: 1 more line is bad"]
    assert short("ab") == "'ab'"
    assert len(short("a" * 99)) == 80
