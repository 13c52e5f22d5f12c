"""Prompts for images from every source, what of a row becomes metadata, the shipped lists, and a run on both."""

import csv
import datetime
import decimal
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from diffusion_align.assets import asset_path, shipped_prompts
from diffusion_align.cli.listing import LISTINGS
from diffusion_align.data.drawings import load_preferences
from diffusion_align.data.prompts import PromptsConfig, load_prompts
from diffusion_align.diffusion.ddpo import DDPOConfig
from diffusion_align.errors import ConfigError, problems_of
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.run import run as train_as
from diffusion_align.training.reading import dump_config
from tests.helpers.problems import assert_problem
from tests.helpers.rows_on_disk import write_rows

ROWS = [{"prompt": "three apples", "count": 3}, {"prompt": "a, b", "count": 1}, {"prompt": "three apples", "count": 3}]
PROMPTS = [("three apples", {"count": 3}), ("a, b", {"count": 1}), ("three apples", {"count": 3})]
DDPO = {
    "model": "emoji-sd",
    "reward": "jpeg_compressibility",
    "epochs": 1,
    "samples_per_epoch": 4,
    "sample_batch_size": 4,
    "updates_per_epoch": 1,
    "sampler": {"steps": 2, "guidance_scale": 1.0},
    "lora": {"rank": 2},
    "grid_every": 0,
    "num_threads": 1,
}
pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def problems(source):
    return problems_of(load_prompts, source)


def bad_rows(source):
    """The sentences about rows, but for the last, which says how to leave them out."""
    *found, hint = problems(source)
    assert "prompts.skip_bad_rows=true" in hint
    return found


@pytest.mark.parametrize("kind", ["tuple", ".jsonl", ".parquet", "folder of prompts.jsonl", "hub"])
def test_prompts_are_the_same_whatever_holds_them(tmp_path, hub_rows, kind):
    source = tuple(ROWS)
    if kind.startswith("."):
        source = write_rows(tmp_path / f"rows{kind}", ROWS)
    elif kind == "hub":
        write_rows(hub_rows / "train.parquet", ROWS)
        source = "some/rows"
    elif kind != "tuple":
        write_rows(tmp_path / "prompts.jsonl", ROWS)
        write_rows(tmp_path / "others.jsonl", ROWS[:1])
        source = tmp_path
    assert load_prompts(source) == PROMPTS, "every row is kept, in its order"
    assert load_prompts({"source": source, "max_prompts": 2}) == PROMPTS[:2]
    assert load_prompts(PromptsConfig(source=source, max_prompts=99)) == PROMPTS


def test_a_row_of_a_csv_file_may_be_short(tmp_path):
    (tmp_path / "short.csv").write_text("prompt,count\na cat\n")
    assert load_prompts(tmp_path / "short.csv") == [("a cat", {"count": None})]


def test_texts_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_align.data.prompts.shipped_prompts", lambda: {"mine": tmp_path / "a.txt"})
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog  \na cat\n", encoding="utf-8")
    expected = [("a cat", {}), ("  a dog  ", {}), ("a cat", {})]
    assert load_prompts(tmp_path / "a.txt") == load_prompts(["a cat", "  a dog  ", "a cat"]) == expected
    assert load_prompts("mine") == expected
    config = {"source": "mine", "max_prompts": 1}
    assert load_prompts(config) == expected[:1]


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"caption": "a cat", "n": 1}, None, ("a cat", {"n": 1})),
        ({"text": "a cat", "n": 1}, None, ("a cat", {"n": 1})),
        ({"text": "CAT", "caption": "a cat"}, None, ("a cat", {"text": "CAT"})),
        ({"text": "CAT", "caption": "a", "prompt": "a cat"}, None, ("a cat", {"text": "CAT", "caption": "a"})),
        ({"prompt": "cat", "words": "a cat"}, {"prompt": "words"}, ("a cat", {"prompt": "cat"})),
    ],
)
def test_the_column_with_the_prompts(tmp_path, row, columns, expected):
    for source in ([row], write_rows(tmp_path / "a.jsonl", [row]), write_rows(tmp_path / "a.parquet", [row])):
        assert load_prompts({"source": source, "columns": columns}) == [expected]


def test_a_row_has_only_the_keys_it_was_given(tmp_path):
    rows = [{"prompt": "a cat"}, {"prompt": "a dog", "k": [1, {"a": None}]}]
    expected = [("a cat", {}), ("a dog", {"k": [1, {"a": None}]})]
    assert load_prompts(["a cat", rows[1]]) == load_prompts(write_rows(tmp_path / "a.jsonl", rows)) == expected


def test_metadata_are_plain_and_columns_of_bytes_are_not_even_read(tmp_path, monkeypatch):
    import pyarrow as pa

    from diffusion_align.data.sources import ArrowTable

    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "text": pa.array(["a cat"]),
        "image": pa.array([{"bytes": b"PNG", "path": "a"}], image),
        "images": pa.array([[{"bytes": b"PNG", "path": "a"}]], pa.list_(image)),
        "raw": pa.array([b"PNG"], pa.large_binary()),
        "hash": pa.array([b"PNG"], pa.binary(3)),
        "binary": pa.array([True]),
        "box": pa.array([{"x": 1.5, "label": ["b"]}]),
        "made": pa.array([datetime.datetime(2024, 5, 1, 12)]),
        "price": pa.array([decimal.Decimal("1.50")]),
        "none": pa.nulls(1),
    }
    scanned, scan = [], ArrowTable.scan
    monkeypatch.setattr(ArrowTable, "scan", lambda self, names: scanned.append(list(names)) or scan(self, names))
    [(prompt, metadata)] = load_prompts(write_rows(tmp_path / "a.parquet", pa.table(columns)))
    assert prompt == "a cat"
    assert metadata == {
        "binary": True,
        "box": {"x": 1.5, "label": ["b"]},
        "made": "2024-05-01 12:00:00",
        "price": "1.50",
        "none": None,
    }
    assert scanned == [["text", *metadata]]
    assert json.loads(json.dumps(metadata)) == metadata


def test_values_of_a_list_that_are_not_plain_are_refused(golden):
    day = datetime.date(2024, 5, 1)
    assert load_prompts([{"prompt": "a cat", "day": day, "box": (1, 2)}]) == [
        ("a cat", {"day": "2024-05-01", "box": [1, 2]})
    ]
    rows = ["a dog", {"prompt": "a cat", "image": b"x"}, {"prompt": "a cat", "a": {"b": [{1}]}}]
    golden("metadata that are not plain", bad_rows(rows))


def test_bad_rows_are_named_or_left_out(tmp_path, golden):
    rows = ["a cat", "  ", {"prompt": None}, {"prompt": 3}, {"prompt": "\ud800"}, {"n": 1, "m": 2}, "a dog"]
    golden("bad rows", bad_rows(rows))
    skipping = {"source": rows, "skip_bad_rows": True}
    assert [text for text, _ in load_prompts(skipping)] == ["a cat", "a dog"]
    assert [text for text, _ in load_prompts(skipping | {"max_prompts": 2})] == ["a cat", "a dog"]
    assert load_prompts({"source": rows, "max_prompts": 1}) == [("a cat", {})], "no row beyond is looked at"
    assert len(problems(["a", *[" "] * 12])) == 12
    golden("none left", problems({"source": [" "], "skip_bad_rows": True}))
    (tmp_path / "a.csv").write_text("prompt,count\na cat, on a mat,3\na dog,1\n")
    golden("commas", bad_rows(tmp_path / "a.csv"))


def test_a_text_that_yaml_took_for_a_mapping(golden):
    golden("mappings", bad_rows(yaml.safe_load("[a cat, a sign: stop, {prompt: a dog}, at: 10, {caption: a}]")))
    assert "row 0: the prompt is a mapping" in problems([{"a sign": "stop"}])[0]


def test_metadata_of_numpy_are_numbers_and_a_prompt_of_megabytes_is_none():
    [(_, metadata)] = load_prompts([{"prompt": "a cat", "n": np.int64(3), "box": [np.float32(0.5)], "on": np.bool_(1)}])
    assert metadata == {"n": 3, "box": [0.5], "on": True}
    assert [type(value) for value in metadata.values()] == [int, list, bool]
    assert_problem(bad_rows(["a" * 3_000_000, "a"])[0], "prompts: row 0", "3000000 characters, more than 1000000")


SOURCES = ["no.csv", [], (), "", 3, [{"words": "a cat", "n": 1}]]
SOURCES += [{"source": "no.csv", "columns": {"promt": "a"}}, {"source": "animals", "split": "test"}]
SOURCES += [{"source": ["a"], "skip_bad_rows": "yes"}]


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_sources_that_cannot_be_used(source, golden):
    golden(repr(source), problems(source))


def test_a_file_without_prompts(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    assert_problem(problems(tmp_path / "a.txt")[0], f"prompts.source='{tmp_path / 'a.txt'}'", "holds no prompt")


def test_a_checked_configuration_opens_no_hub_dataset(monkeypatch, golden):
    import datasets

    def opened(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(datasets, "load_dataset", opened)
    source = {"source": "some/rows", "columns": {"prompt": "x"}, "max_prompts": 3}
    check_config(DDPO | {"output_dir": "run", "prompts": source})
    wrong = PromptsConfig(source="some/rows", columns={"promt": "x"}, split="train[:3]", max_prompts=2)
    golden("a part of a Hub dataset", problems_of(wrong.open_ahead, "prompts", "prompts"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    needs = problems_of(PromptsConfig(source="some/rows").open_ahead, "prompts", "prompts")
    assert_problem(needs[0], "prompts.source='some/rows'", "pip install 'diffusion-align[datasets]'")


def test_what_was_checked_is_what_is_used(tmp_path):
    """A source is opened once: the run has the rows that were checked, and whoever asks again reads the file."""
    path = tmp_path / "a.txt"
    path.write_text("a cat")
    config = check_config(DDPO | {"output_dir": str(tmp_path / "run"), "prompts": str(path)})
    path.write_text("a dog")
    assert config == DDPOConfig(**DDPO, output_dir=tmp_path / "run", prompts=str(path))
    assert load_prompts(config.prompts) == [("a cat", {})]
    assert load_prompts(config.prompts) == [("a dog", {})]


def test_all_that_is_wrong_with_a_configuration_at_once(tmp_path, golden):
    changes = {"output_dir": str(tmp_path / "run"), "epochs": 0, "prompts": ["a cat", 3, " "]}
    with pytest.raises(ConfigError) as caught:
        check_config(DDPO | changes)
    golden("all at once", caught.value.problems)
    wrong = {"source": "animals", "max_prompt": 3}
    with pytest.raises(ConfigError, match=r"^unknown setting 'prompts\.max_prompt': did you mean 'max_prompts'\?$"):
        check_config(DDPO | {"output_dir": str(tmp_path / "run"), "prompts": wrong})


@pytest.mark.parametrize("given", [["a cat", {"prompt": "a dog", "n": 1}], "animals", {"source": "a/b", "split": "c"}])
def test_the_written_configuration_says_what_was_given_and_is_read_again(given):
    config = DDPOConfig(**DDPO, output_dir="run", prompts=given)
    written = yaml.safe_load(dump_config(config))
    if isinstance(given, dict):
        assert written["prompts"].items() >= given.items()
    else:
        assert written["prompts"] == given
    assert DDPOConfig.model_validate(written).prompts == config.prompts


def test_the_generated_lists_are_what_the_script_writes(tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "build_prompts.py"))
    written = script["write"](tmp_path / "new")
    assert len(written) == len(script["LISTS"]) == 5
    for path in written:
        assert path.read_bytes() == (asset_path("emoji-prompts").parent / path.name).read_bytes(), path.name


def test_animals_and_what_they_do():
    animals = [text for text, _ in load_prompts("animals")]
    assert len(set(animals)) == len(animals) == 45
    rows = load_prompts("animals_activities")
    activities = {"washing the dishes", "riding a bike", "playing chess"}
    assert {(m["animal"], m["activity"]) for _, m in rows} == {(a, b) for a in animals for b in activities}
    assert len(rows) == 135
    assert ("an ant playing chess", {"animal": "ant", "activity": "playing chess"}) in rows


def test_the_concepts_are_split_into_trained_and_held_out():
    train, heldout, all_ = ({text for text, _ in load_prompts(f"emoji_{n}")} for n in ("train", "heldout", "concepts"))
    assert (len(train), len(heldout)) == (235, 59)
    assert not train & heldout
    assert train | heldout == all_
    assert train == {pair.prompt for pair in load_preferences("train")}, "the head was trained on the same ones"
    with asset_path("emoji-concepts").open(encoding="utf-8", newline="") as file:
        groups = {f"a {r['label']}": r["group"] for r in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    assert {groups[text] for text in heldout} == {groups[text] for text in train}


def test_counted_coloured_and_written_things_say_what_is_asked_for():
    counting, colours, texts = load_prompts("counting"), load_prompts("colours"), load_prompts("text_in_pictures")
    words = dict(zip(("one", "two", "three", "four", "five", "six"), range(1, 7)))
    assert len({text for text, _ in counting}) == 120
    assert all(words[text.split()[0]] == m["count"] and m["object"][:3] in text for text, m in counting)
    assert ("three leaves", {"object": "leaf", "count": 3}) in counting
    assert len({text for text, _ in colours}) == 160
    assert len({m["colour"] for _, m in colours}) == 8
    assert {text.split(maxsplit=1)[1] for text, _ in colours} == {f"{m['colour']} {m['object']}" for _, m in colours}
    assert ("an orange car", {"object": "car", "colour": "orange"}) in colours
    assert len({m["text"] for _, m in texts}) == len(texts) == 50
    assert all(text.count('"') == 2 and text.endswith(f' "{m["text"]}"') for text, m in texts)


def test_the_listing_says_how_many_and_which_metadata():
    (group,) = LISTINGS["prompts"]()
    entries = {entry.name: entry.text for entry in group.rows}
    assert entries["animals"] == "45 prompts for images"
    assert entries["counting"] == "120 prompts for images, with the metadata object, count"
    assert entries["text_in_pictures"] == "50 prompts for images, with the metadata text"
    assert set(shipped_prompts()) <= set(entries)


def test_metadata_reach_the_reward(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    seen = []

    def counted(images, prompts, metadata):
        seen.append(list(zip(prompts, metadata)))
        return torch.tensor([float(m["count"]) for m in metadata])

    counts = {"two apples": 2, "three apples": 3, "four apples": 4, "six apples": 6}
    source = write_rows(tmp_path / "rows.csv", [{"prompt": text, "count": n} for text, n in counts.items()])
    settings = {"prompts": source, "output_dir": str(tmp_path / "run"), "reward": counted}
    showing_two = {"show_prompts": ["six apples", "two apples"], "grid_every": 1}
    try:
        train_as(check_config(DDPO | settings | showing_two))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (row["reward"], row["reward_min"], row["reward_max"]) == (3.75, 2, 6)
    kept = {text: {"count": str(n)} for text, n in counts.items()}  # the cells of a csv file are texts
    assert all(metadata == kept[text] for call in seen for text, metadata in call)
    assert sorted(text for text, _ in seen[1]) == sorted(counts), "after the dummy batch, the epoch's four images"
    assert [text for text, _ in seen[-1]] == ["six apples", "two apples"], "and those that are shown"
