"""Pairs streamed from the Hub, for which a local folder stands in, and what `datasets` may say meanwhile: nothing."""

import gc
import io
import logging

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from diffusion_align.data.image_pairs import PairsConfig, open_pairs
from diffusion_align.errors import problems_of
from tests.helpers.problems import assert_problem

HUB = "some/rows"
START = f"pairs.source='{HUB}', split 'train', cannot be loaded ("
END = "): check the name, the network and your access to it"
pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture
def bars():
    """Progress bars as they are without the other tests' doing."""
    before = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    yield
    (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def image(seed, size=8):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def rows(labels, start=0, size=8):
    return [
        {
            "caption": f"c{i}",
            "jpg_0": image(2 * i, size),
            "jpg_1": image(2 * i + 1, size),
            "label_0": label,
            "more": [i],
        }
        for i, label in enumerate(labels, start)
    ]


def write(folder, shards, kind="image", split="train", block=3):
    """One parquet file for each list of rows; a shard that is bytes is written as it is."""
    for number, shard in enumerate(shards):
        path = folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
        if isinstance(shard, bytes):
            path.write_bytes(shard)
            continue
        if kind == "bytes":
            shard = [row | {side: row[side]["bytes"] for side in ("jpg_0", "jpg_1")} for row in shard]
        dataset = datasets.Dataset.from_list(shard)
        for side in ("jpg_0", "jpg_1") if kind == "image" else ():
            dataset = dataset.cast_column(side, datasets.Image())
        dataset.to_parquet(path, batch_size=block)


def open_(source=HUB, **settings):
    return open_pairs(PairsConfig(source=str(source), **settings))


def kept():
    """What is left in the cache folder, but for the locks of `datasets`."""
    return [path.name for path in datasets.config.HF_DATASETS_CACHE.iterdir() if path.suffix != ".lock"]


def problems(**settings):
    return problems_of(open_, **settings)


@pytest.mark.parametrize("kind", ["image", "struct", "bytes"])
def test_a_streamed_prefix_is_the_prefix_of_the_whole(hub_rows, kind):
    labels = [0.5, 1.0, 0.0, 7.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    write(hub_rows, [rows(labels[:4]), rows(labels[4:], 4)], kind)
    for count in (1, 2, 3, 5, 100):
        streamed, whole = (open_(source, max_pairs=count, skip_bad_rows=True) for source in (HUB, hub_rows))
        assert (streamed.prompts, streamed.rows, streamed.ties, streamed.skipped) == (
            (whole.prompts, whole.rows, whole.ties, whole.skipped)
        )
        assert len(streamed) == min(count, 5)
        assert len(streamed._table) == (len(labels) if count == 100 else streamed.rows[-1] + 1)
        streamed = streamed.check_images()
        for i in range(len(streamed)):
            for a, b in zip(streamed.images(i, (8, 8)), whole.images(i, (8, 8))):
                assert torch.equal(a, b)


def test_later_files_are_not_read(hub_rows):
    write(hub_rows, [rows([1.0, 0.5, 0.0]), b"PAR1 no"])
    assert open_(max_pairs=2).rows == [0, 2]
    [problem] = problems(max_pairs=3)
    assert problem.startswith(START)
    assert problem.endswith(END)
    [problem] = problems()  # a whole download
    assert problem.startswith(START)


def test_only_the_images_in_use_are_in_memory(hub_rows):
    write(hub_rows, [rows([1.0] * 20, size=192)], block=20)
    open_(max_pairs=1)
    gc.collect()
    before = pa.total_allocated_bytes()
    pairs = open_(max_pairs=20).check_images()
    gc.collect()
    assert len(pairs) == 20
    assert pa.total_allocated_bytes() - before < 1_000_000  # of 4.4 MB
    assert kept() == []


def test_splits(hub_rows):
    write(hub_rows, [rows([1.0])])
    write(hub_rows, [rows([0.0, 1.0], 5)], split="validation")
    assert open_(split="validation", max_pairs=9).prompts == ["c5", "c6"]
    assert open_(split="validation").prompts == ["c5", "c6"]
    [problem] = problems(split="heldout", max_pairs=9)
    assert_problem(problem, f"pairs.source='{HUB}', split 'heldout'", f"Available splits: ['train', 'validation']{END}")


def test_columns(hub_rows):
    write(hub_rows, [rows([0.0, 0.0])])
    names = {"prompt": "caption", "chosen": "jpg_1", "rejected": "jpg_0"}
    assert open_(columns=names, max_pairs=1)._first_wins == [True]
    assert_problem(problems(columns={"prompt": "text"}, max_pairs=1)[0], "pairs.columns", "no column 'text'")


def test_bad_rows_end_the_download(hub_rows):
    write(hub_rows, [rows([1.0] + [3.0] * 12), b"PAR1 no"])
    *found, hint = problems(max_pairs=50)
    assert [problem.partition(": label_0")[0] for problem in found] == [f"pairs: row {i}" for i in range(1, 11)]
    assert "pairs.skip_bad_rows=true" in hint


def test_no_usable_pair(hub_rows):
    write(hub_rows, [rows([0.5] * 3)])
    assert_problem(problems(max_pairs=50)[0], f"pairs.source='{HUB}'", "(3 rows, 3 ties, 0 bad rows)")
    write(hub_rows, [rows([0.5])[:0]])
    assert len(problems(max_pairs=50)) == 1


def test_a_connection_that_breaks(hub_rows, monkeypatch):
    write(hub_rows, [rows([1.0] * 5)])
    whole = datasets.IterableDataset.iter

    def breaking(self, batch_size):
        for number, batch in enumerate(whole(self, batch_size)):
            if number == at:
                raise ConnectionError("the line is dead\nreally")
            yield batch

    monkeypatch.setattr(datasets.IterableDataset, "iter", breaking)
    for at in (0, 2):  # noqa: B007
        assert problems(max_pairs=4) == [f"{START}the line is dead{END}"]
    at = 4
    assert len(open_(max_pairs=4)) == 4
    assert kept() == []


def test_nothing_is_printed(hub_rows, bars, capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    write(hub_rows, [rows([1.0] * 5)])
    write(hub_rows, [b"PAR1 no"], split="test")
    levels = [logging.getLogger(name).level for name in ("datasets", "huggingface_hub")]
    capfd.readouterr()
    for settings in ({"source": hub_rows / "train-00000-of-00001.parquet"}, {"max_pairs": 2}):
        assert open_(**settings)
    for settings in ({"source": hub_rows}, {"split": "test", "max_pairs": 1}, {"split": "test"}):
        assert len(problems(**settings)) == 1
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert not datasets.are_progress_bars_disabled()
    assert [logging.getLogger(name).level for name in ("datasets", "huggingface_hub")] == levels


def test_the_rows_are_counted_on_a_terminal(hub_rows, monkeypatch, capfd):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    write(hub_rows, [rows([1.0] * 5)])
    open_(max_pairs=3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3 rows downloaded" in err
