"""Rows that Python hands over in whatever holds them: read as those of a file, and named in config.yaml."""

import datasets
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

from diffusion_align.data import sources as tables
from diffusion_align.data.image_pairs import PairsConfig, open_pairs
from diffusion_align.data.prompts import PromptsConfig, load_prompts
from diffusion_align.data.sources import GivenRows, ListTable, in_python
from diffusion_align.data.text_encoding import TextEncoder
from diffusion_align.data.text_rows import TextDataConfig, labelled_rows, preference_rows, prompt_rows
from diffusion_align.errors import ConfigError, short
from diffusion_align.models.language_models import load_tokenizer
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.training.reading import dump_config

ROWS = [{"prompt": "three apples", "n": 3}, {"prompt": "a cat", "n": 1}]
TABLES = {
    "Dataset": datasets.Dataset.from_list,
    "chosen rows of a Dataset": lambda rows: datasets.Dataset.from_list([{"prompt": "x", "n": 0}, *rows]).select(
        [1, 2]
    ),
    "DataFrame": pd.DataFrame,
}
LISTS = {
    "list": list,
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "numpy": lambda rows: [{"prompt": np.str_(row["prompt"]), "n": np.int64(row["n"])} for row in rows],
    "IterableDataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
}
RUN = {"model": "emoji-sd", "reward": "jpeg_compressibility", "output_dir": "run"}
TEXT = {"method": "dpo", "model": "tiny-lm", "output_dir": "run"}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(load_tokenizer("tiny-lm")[0], max_completion_length=20)


@pytest.mark.parametrize("kind", [*TABLES, *LISTS])
def test_prompts_are_the_same_whatever_holds_them(encoder, kind):
    make = (TABLES | LISTS)[kind]
    expected = [(row["prompt"], {"n": row["n"]}) for row in ROWS]
    found = load_prompts(make(ROWS))
    assert found == expected
    assert all(type(metadata["n"]) is int for _, metadata in found)
    assert load_prompts({"source": make(ROWS), "max_prompts": 1}) == expected[:1]
    text = prompt_rows(TextDataConfig.model_validate(make(ROWS)), encoder).rows
    assert [(row.prompt, row.columns) for row in text] == expected

    config = check_config(RUN | {"prompts": make(ROWS), "evaluation": {"prompts": make(ROWS)}})
    assert load_prompts(config.prompts) == load_prompts(config.evaluation.prompts) == expected
    written = yaml.safe_load(dump_config(config))
    if kind in LISTS:
        assert written["prompts"] == ROWS
    else:
        assert written["prompts"].startswith("2 rows given in Python, sha256 ")
        again = yaml.safe_load(dump_config(check_config(RUN | {"prompts": make(ROWS)})))
        other = yaml.safe_load(
            dump_config(check_config(RUN | {"prompts": make([ROWS[0], {"prompt": "a cat", "n": 2}])}))
        )
        assert written["prompts"] == again["prompts"] != other["prompts"]


def test_texts_alone():
    for texts in (
        ("a", "b "),
        iter(["a", "b "]),
        pd.Series(["a", "b "]),
        datasets.Dataset.from_dict({"t": ["a", "b "]})["t"],
    ):
        assert load_prompts(texts) == [("a", {}), ("b ", {})]
    config = check_config(TEXT | {"method": "grpo", "reward": "length", "prompts": (text for text in "abc")})
    assert config.prompts.source == ["a", "b", "c"]


def test_a_list_too_long_for_a_configuration_is_named_in_it(encoder, monkeypatch):
    """Which is read again on resume and to load the run, and up to 10 MB only."""
    monkeypatch.setattr(tables, "_MOST_IN_YAML", tables._MOST_IN_YAML // 40)
    texts = [f"{i} {'x' * 1000}" for i in range(101)]
    for rows, given in ((texts, texts), ([{"prompt": text, "n": 1} for text in texts], {"max_prompts": 101})):
        source = rows if given is rows else {"source": rows, **given}
        config = check_config(RUN | {"prompts": source})
        assert load_prompts(config.prompts) == [(text, {} if rows is texts else {"n": 1}) for text in texts]
        written = dump_config(config)
        assert "101 rows given in Python, sha256" in written
        assert len(written) < 10_000
        again = type(config).model_validate(config.model_dump(mode="json") | {"prompts": source})
        assert dump_config(again) == written, "as checkpoints of older versions hold it"
    assert [row.prompt for row in prompt_rows(TextDataConfig(source=texts), encoder).rows] == texts


PAIRS = [
    {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": "no"},
    {"prompt": [{"role": "user", "content": "ho"}], "chosen": "no", "rejected": "yes"},
]


@pytest.mark.parametrize("kind", [*TABLES, *LISTS])
def test_preferences_and_labels(encoder, kind):
    make = (TABLES | LISTS)[kind] if kind != "numpy" else list
    if kind == "chosen rows of a Dataset":
        make = lambda rows: datasets.Dataset.from_list([rows[0], *rows]).select([1, 2])  # noqa: E731
    rows = [row | {"prompt": row["prompt"][0]["content"]} for row in PAIRS]
    config = check_config(TEXT | {"dataset": make(rows)})
    wanted = preference_rows(TextDataConfig(source=rows), encoder)
    assert preference_rows(config.dataset, encoder) == wanted
    labels = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i == 0} for i, row in enumerate(rows)]
    config = check_config(TEXT | {"method": "kto", "dataset": make(labels)})
    assert [row.desirable for row in labelled_rows(config.dataset, encoder).rows] == [True, False]


def test_what_pandas_makes_of_a_parquet_file(encoder, tmp_path):
    """Arrays of objects for conversations, numpy's truths for labels, NaN for what is missing."""
    frame = pd.DataFrame({"prompt": ["q", "r"], "completion": ["a", None], "label": np.array([True, False])})
    config = TextDataConfig.model_validate({"source": frame, "skip_bad_rows": True})
    assert [(row.prompt, row.desirable) for row in labelled_rows(config, encoder).rows] == [("q", True)]
    pd.DataFrame(PAIRS).to_parquet(tmp_path / "a.parquet")
    [row, _] = in_python(pd.read_parquet(tmp_path / "a.parquet")).table.rows
    assert row == PAIRS[0]


def rows_of_images(as_they_are):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    return [{"prompt": "a", "chosen": as_they_are(red), "rejected": as_they_are(blue)}]


@pytest.mark.parametrize("kind", ["list", "arrays", "DataFrame", "generator", "Dataset", "files"])
def test_pairs_of_images(kind, tmp_path):
    rows = rows_of_images(np.asarray if kind == "arrays" else lambda image: image)
    if kind == "files":
        for side in ("chosen", "rejected"):
            rows[0][side].save(tmp_path / f"{side}.png")
            rows[0][side] = f"{side}.png"
    if kind == "Dataset":
        features = datasets.Features(
            {"prompt": datasets.Value("string")} | dict.fromkeys(("chosen", "rejected"), datasets.Image())
        )
        given = datasets.Dataset.from_list(rows, features=features)
    else:
        given = {"DataFrame": pd.DataFrame, "generator": iter}.get(kind, list)(rows)
    settings = {"method": "diffusion_dpo", "model": "emoji-sd", "output_dir": "run", "beta": 1.0, "pairs": given}
    config = check_config(settings | {"samples_per_epoch": 8})
    pairs = open_pairs(config.pairs).check_images()
    chosen, rejected = pairs.images(0, (8, 8))
    assert [image.mean((1, 2)).tolist() for image in (chosen, rejected)] == [[1, 0, 0], [0, 0, 1]]
    written = yaml.safe_load(dump_config(config))["pairs"]["source"]
    assert written == rows if kind == "files" else written.startswith("1 rows given in Python, sha256 ")
    assert len(pairs.identity(0)) == 4


def test_what_is_no_image_is_said_with_its_row():
    with pytest.raises(ConfigError, match=r"^pairs: row 0: chosen is <PIL"):
        open_pairs(PairsConfig(source=rows_of_images(lambda image: image.convert("F"))))


def test_rows_that_yaml_cannot_hold_are_named_by_their_content(encoder):
    def config(value):
        return TextDataConfig.model_validate([{"prompt": "a", "image": value}])

    arrays = [config(np.full(3, value)) for value in (1, 1, 2)]
    names = [one.model_dump(mode="json")["source"] for one in arrays]
    assert names[0] == names[1] != names[2]
    assert names[0] == str(arrays[0].source) == repr(arrays[0].source)
    assert prompt_rows(arrays[0], encoder).rows[0].columns["image"].tolist() == [1, 1, 1]
    strange = [GivenRows(ListTable([{"a": object()}], None)) for _ in range(2)]
    assert str(strange[0]) == str(strange[1])  # not by where it lies in memory


@pytest.mark.parametrize(
    "value", [3, None, "", b"abc", {"a": 1}, [], iter(()), pd.DataFrame({"prompt": []}), object(), True]
)
def test_what_holds_no_rows(value):
    for config in (PromptsConfig, TextDataConfig, PairsConfig):
        with pytest.raises(ValidationError) as caught:
            config.model_validate({"source": value})
        assert len(caught.value.errors()) == 1


def test_a_split_has_to_be_chosen():
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    for read in (load_prompts, lambda rows: check_config(RUN | {"prompts": rows})):
        with pytest.raises(ConfigError, match=r"splits train, test: give one of them, as in data\['train'\]$"):
            read(both)
    with pytest.raises(ConfigError, match="a table holds one split, train; leave it out"):
        load_prompts({"source": both["train"], "split": "test"})


def test_a_value_of_several_lines_is_shown_in_one():
    assert short(np.eye(2)) == "array([[1., 0.], [0., 1.]])"
    assert short("a \n b") == r"'a \n b'"
    with pytest.raises(ConfigError) as caught:
        load_prompts(datasets.Dataset.from_list(ROWS).select([]))
    assert "\n" not in str(caught.value)
