"""Preference pairs: every source and layout, every bad row, images against an independent computation."""

import gc
import io
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.data import image_pairs
from diffusion_align.data.drawings import load_preferences
from diffusion_align.data.image_pairs import PairsConfig, PairSet, open_pairs
from diffusion_align.errors import ConfigError, problems_of
from diffusion_align.images import open_image
from tests.helpers.problems import assert_problem
from tests.helpers.rows_on_disk import write_rows

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def colour(i):
    return (37 * i % 256, 91 * i % 256, (200 + 53 * i) % 256)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def plain(i, size=(8, 8)):
    return encoded(Image.new("RGB", size, colour(i)))


def noise(size, seed=0, low=0, high=256):
    return Image.fromarray(np.random.default_rng(seed).integers(low, high, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Images 0.png ... 29.png of one colour each."""
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(plain(i))
    return tmp_path


def binary_rows(labels):
    return [
        {"caption": f"c{i}", "jpg_0": f"{2 * i}.png", "jpg_1": f"{2 * i + 1}.png", "label_0": label}
        for i, label in enumerate(labels)
    ]


def direct_rows(count):
    return [{"prompt": f"c{i}", "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png"} for i in range(count)]


def packed(rows, how):
    """``rows`` with the images in place of their names."""

    def cell(name, value):
        if name not in ("chosen", "rejected", "jpg_0", "jpg_1"):
            return value
        data = plain(int(value.split(".")[0]))
        return {"bytes": data, "path": value} if how == "struct" else data

    return [{name: cell(name, value) for name, value in row.items()} for row in rows]


def open_(source, **settings):
    return open_pairs(PairsConfig(source=str(source), **settings))


def shown(pairs, size=(8, 8)):
    """(colour of chosen, colour of rejected) of each pair, as 8-bit numbers."""
    corner = [
        [tuple((side[:, 0, 0] * 255).round().int().tolist()) for side in pairs.images(i, size)]
        for i in range(len(pairs))
    ]
    return [tuple(pair) for pair in corner]


def problems_ahead(config):
    return problems_of(config.open_ahead, "pairs", "pairs")


def problems(source, *, decode=False, **settings):
    config = PairsConfig(source=str(source), **settings)
    found = problems_of(open_pairs(config).check_images) if decode else problems_of(open_pairs, config)
    assert problems_ahead(config) == ([] if decode else found)
    return found


def bad_rows(source, **settings):
    """The sentences about rows, but for the last, which says how to leave them out."""
    *found, hint = problems(source, **settings)
    assert "pairs.skip_bad_rows=true" in hint
    return found


def test_embedded_pairs_are_the_shipped_ones():
    for split in ("heldout", "all"):
        pairs, wanted = open_("emoji_style", split=split), load_preferences(split)
        assert pairs.prompts == [pair.prompt for pair in wanted]
        assert pairs.rows == list(range(len(wanted)))
        assert (pairs.ties, pairs.skipped) == (0, {})
        for i in range(0, len(wanted), 7):
            chosen, rejected = pairs.images(i, (64, 64))
            assert torch.equal(chosen, wanted[i].chosen)
            assert torch.equal(rejected, wanted[i].rejected)
    assert len(open_("emoji_style")) == len(load_preferences("train"))


def test_embedded_images_are_resized_and_cannot_be_spoilt():
    pairs = open_("emoji_style", split="heldout", max_pairs=2).check_images()
    assert len(pairs) == 2
    first = pairs.images(0, (64, 64))[0].clone()
    pairs.images(0, (64, 64))[0].zero_()
    assert torch.equal(pairs.images(0, (64, 64))[0], first)
    small = pairs.images(0, (32, 32))[0]
    assert small.shape == (3, 32, 32)
    assert small.dtype == torch.float32
    torch.testing.assert_close(small, torch.nn.functional.avg_pool2d(first, 2), atol=0.25, rtol=0)


def test_embedded_settings_that_do_not_fit(golden):
    golden("embedded", problems("emoji_style", split="test", columns={"prompt": "x"}))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_both_layouts_in_every_kind_of_file(folder, suffix, as_folder):
    path = folder / f"pairs{suffix}"
    source = folder if as_folder else path
    write_rows(path, direct_rows(3))
    direct = open_(source)
    assert (direct.prompts, direct.rows, direct.ties) == (["c0", "c1", "c2"], [0, 1, 2], 0)
    assert shown(direct) == [(colour(2 * i), colour(2 * i + 1)) for i in range(3)]
    write_rows(path, binary_rows([1, 0.5, 0, 1.0, 0.5]))
    binary = open_(source)
    assert (binary.prompts, binary.rows, binary.ties, len(binary)) == (["c0", "c2", "c3"], [0, 2, 3], 2, 3)
    assert shown(binary) == [(colour(0), colour(1)), (colour(5), colour(4)), (colour(6), colour(7))]
    assert problems_ahead(PairsConfig(source=str(source))) == []
    assert isinstance(binary.check_images(), PairSet)


@pytest.mark.parametrize("how", ["struct", "bytes"])
def test_parquet_with_the_images_inside(tmp_path, how):
    pairs = open_(write_rows(tmp_path / "p[1]*.parquet", packed(binary_rows([0, 0.5, 1]), how)))
    assert (pairs.rows, pairs.ties) == ([0, 2], 1)
    assert shown(pairs.check_images()) == [(colour(1), colour(0)), (colour(4), colour(5))]


def test_a_changed_parquet_file_is_read_again(tmp_path):
    source = write_rows(tmp_path / "a.parquet", packed(direct_rows(2), "bytes"))
    assert len(open_(source)) == 2
    write_rows(tmp_path / "a.parquet", packed(direct_rows(5), "bytes"))
    assert len(open_(source)) == 5


@pytest.mark.parametrize("declared", [True, False])
def test_a_folder_that_datasets_can_load(tmp_path, declared):
    """What the Hub's path does, without a network; ``declared`` as Image columns, as Pick-a-Pic is on the Hub."""
    from datasets import Dataset, Image

    (tmp_path / "data").mkdir()
    for split, labels in (("train", [1.0, 0.0, 0.5]), ("validation", [0.0])):
        dataset = Dataset.from_list(packed(binary_rows(labels), "struct"))
        if declared:
            dataset = dataset.cast_column("jpg_0", Image()).cast_column("jpg_1", Image())
        dataset.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    pairs = open_(tmp_path)
    assert (pairs.prompts, pairs.ties) == (["c0", "c1"], 1)
    assert shown(pairs.check_images()) == [(colour(0), colour(1)), (colour(3), colour(2))]
    assert shown(open_(tmp_path, split="validation")) == [(colour(1), colour(0))]
    assert open_(tmp_path, split="train[1:]").prompts == ["c1"]
    assert_problem(problems(tmp_path, split="heldout"), f"pairs.source='{tmp_path}', split 'heldout'", "Unknown split")


def test_an_image_folder_with_metadata(folder):
    rows = [{"prompt": "x", "chosen_file_name": "0.png", "rejected_file_name": "1.png"}]
    write_rows(folder / "metadata.jsonl", rows)
    assert shown(open_(folder)) == [(colour(0), colour(1))]


@pytest.mark.parametrize("source", ["nothing", "no/such/folder/at/all", "a/b.jsonl", "~", " ", "x" * 5000, "a\0b"])
def test_a_source_that_is_not_there(source, monkeypatch, tmp_path, golden):
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    [problem] = problems(source)
    golden(f"source={source!r}", problem)
    assert len(problem) < 300


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n"), ("a.csv", ""), ("a.csv", "prompt,chosen,rejected\n")])
def test_no_rows(tmp_path, name, text, golden):
    (tmp_path / name).write_text(text)
    golden(f"an empty {name}", problems(tmp_path / name))


def test_parquet_without_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": pa.array([], pa.string())}), tmp_path / "a.parquet")
    [problem] = problems(tmp_path / "a.parquet")  # datasets refuses a file and a slice without rows
    assert problem.endswith("): fix it")
    write_rows(tmp_path / "a.parquet", [{"x": "y"}])
    [problem] = problems(tmp_path, split="train[1:]")
    assert "no data" in problem


def test_columns_are_mapped(folder):
    rows = [{"text": "t", "good": "0.png", "bad": "1.png", "a": "2.png", "b": "3.png", "left": 0}]
    source = write_rows(folder / "a.jsonl", rows)
    direct = open_(source, columns={"prompt": "text", "chosen": "good", "rejected": "bad"})
    assert shown(direct) == [(colour(0), colour(1))]
    binary = open_(source, columns={"prompt": "text", "first": "a", "second": "b", "first_wins": "left"})
    assert shown(binary) == [(colour(3), colour(2))]


def test_mappings_that_do_not_fit(folder, golden):
    source = write_rows(folder / "a.jsonl", [{"text": "t", "good": "0.png", "bad": "1.png"}])
    golden("other columns", problems(source))
    golden("columns of both", problems(source, columns={"prompt": "text", "chosen": "good", "first": "bad"}))
    assert len(problems("nothing", columns={"promt": "text", "chosn": "good"})) == 3
    row = {name if name != "caption" else "text": value for name, value in binary_rows([0])[0].items()}
    left_out = open_(write_rows(folder / "a.csv", [row]), columns={"prompt": "text"})
    assert shown(left_out) == [(colour(1), colour(0))], "the other names keep their defaults"


GOOD = {"prompt": "fine", "chosen": "20.png", "rejected": "21.png"}
BAD: list[dict] = [
    *({"chosen": name} for name in ("a/b.png", "x" * 9999, "a\0.png", "\ud800.png", None)),
    *({"rejected": value} for value in (".", " ", 3, [1], "20.png")),
    *({"prompt": value} for value in ("", ["a", "b"])),
]


@pytest.mark.parametrize("change", BAD, ids=range(12))
def test_a_bad_row_is_named_and_can_be_left_out(folder, change, golden):
    source = write_rows(folder / "a.jsonl", [GOOD, GOOD, GOOD | change, GOOD])
    [problem] = bad_rows(source)
    golden(f"a row with {change}", problem)
    pairs = open_(source, skip_bad_rows=True)
    assert pairs.rows == [0, 1, 3]
    assert pairs.skipped == {2: problem}
    assert problems_ahead(PairsConfig(source=source, skip_bad_rows=True)) == []


@pytest.mark.parametrize("label", [0.7, 2, -1, None, "", "yes", float("nan"), [1], 10**400])
def test_labels_that_are_none(folder, label):
    rows = binary_rows([1, 0, 0.5])
    rows[1]["label_0"] = label
    [problem] = bad_rows(write_rows(folder / "a.jsonl", rows))
    assert_problem(problem, "pairs: row 1: label_0", "not one of 0, 0.5, 1")
    assert len(problem) < 160


def test_a_tie_is_dropped_whatever_else_its_row_holds(folder):
    rows = [*binary_rows([1]), {"caption": "", "jpg_0": None, "jpg_1": "no.png", "label_0": 0.5}]
    pairs = open_(write_rows(folder / "a.jsonl", rows))
    assert (len(pairs), pairs.ties, pairs.skipped) == (1, 1, {})


def test_labels_and_sides_of_a_bad_image_agree(folder, golden):
    rows = binary_rows([0, 1, 1])
    rows[0]["jpg_0"], rows[1]["jpg_0"] = 5, 5
    golden("labels and sides", bad_rows(write_rows(folder / "a.jsonl", rows)))


@pytest.mark.parametrize("skip", [False, True])
def test_no_usable_pair(folder, skip, golden):
    source = write_rows(folder / "a.jsonl", binary_rows([0.5, 0.5, 7]))
    golden("ties and bad rows", problems(source, skip_bad_rows=skip))


@pytest.mark.parametrize("how", ["struct", "bytes"])
def test_bad_rows_of_a_parquet_file(folder, how, golden):
    rows = packed(direct_rows(3), how)
    rows[0]["chosen"] = None
    rows[1]["rejected"] = {"bytes": None, "path": None} if how == "struct" else b""
    rows[2]["prompt"] = None
    golden("rows of a parquet file", problems(write_rows(folder / "a.parquet", rows)))
    for odd in (7, [1, 2], {"x": 1}, {"bytes": None}, {"bytes": 3, "path": "0.png"}, {"bytes": [1]}, {"path": 4}, None):
        rows = [row | {"chosen": odd} for row in direct_rows(2)]
        [problem, _, _] = problems(write_rows(folder / "b.parquet", rows))
        assert_problem(problem, "pairs: row 0: chosen", "not the path or the bytes")


def test_images_by_path_inside_structs(folder):
    rows = [
        {name: value if name == "prompt" else {"path": value, "bytes": None} for name, value in row.items()}
        for row in direct_rows(2)
    ]
    for name in ("a.parquet", "a.jsonl"):
        assert shown(open_(write_rows(folder / name, rows)))[1] == (colour(2), colour(3))


@pytest.mark.parametrize(
    ("side", "data"), [("chosen", b"not an image"), ("rejected", encoded(noise((64, 64)))[:-2000])]
)
def test_files_that_are_no_images(folder, side, data, golden):
    """Of which kinds there are, the tests of images know."""
    (folder / "odd.png").write_bytes(data)
    source = write_rows(folder / "a.jsonl", [GOOD, GOOD | {side: "odd.png"}, GOOD])
    assert problems_ahead(PairsConfig(source=source)) == []
    [problem] = bad_rows(source, decode=True)
    golden(f"{side} is no image", problem)
    assert problems_of(open_(source).images, 1, (8, 8)) == [problem]
    left = open_(source, skip_bad_rows=True).check_images()
    assert (left.rows, left.skipped) == ([0, 2], {1: problem})
    assert shown(left) == [(colour(20), colour(21))] * 2


def test_pairs_whose_images_do_not_compare(folder, golden):
    (folder / "narrow.png").write_bytes(plain(1, (4, 8)))
    (folder / "copy.png").write_bytes(encoded(Image.new("RGBA", (8, 8), (*colour(20), 255))))
    rows = [GOOD, GOOD | {"rejected": "narrow.png"}, GOOD | {"rejected": "copy.png"}, GOOD | {"prompt": ""}]
    source = write_rows(folder / "a.jsonl", rows)
    found = bad_rows(write_rows(folder / "b.jsonl", rows[:2]), decode=True)
    left = open_(source, skip_bad_rows=True).check_images()
    assert left.rows == [0, 2]  # a copy in other bytes is seen when it is decoded
    found += problems_of(left.images, 1, (8, 8))
    golden("images that do not compare", found)
    assert list(left.skipped.items()) == [(1, found[0]), (3, "pairs: row 3: the prompt is empty")]
    left = left.without({2: found[1]})
    assert (left.rows, left.prompts, list(left.skipped)) == ([0], ["fine"], [1, 2, 3])
    assert left.left_out == "1 pairs; left out: 0 ties, 3 bad rows (1, 2, 3)"


@pytest.mark.parametrize("other", ["20.png", "./20.png", "sub/..//../{}/20.png", ".//20.png", "{}"])
def test_one_file_by_two_names(folder, other):
    """As far as names tell: what ``..`` stands for, links decide."""
    other = other.format(folder / "20.png" if other == "{}" else folder.name)
    (folder / "sub").mkdir()
    source = write_rows(folder / "a.jsonl", [GOOD, GOOD | {"rejected": other}])
    [problem] = bad_rows(source, decode=".." in other)
    assert problem == "pairs: row 1: chosen and rejected are the same image"


def test_a_file_that_stands_for_both_sides_twice(folder):
    (folder / "twin.png").write_bytes((folder / "20.png").read_bytes())
    source = write_rows(folder / "a.jsonl", [GOOD, GOOD | {"rejected": "twin.png"}])
    [problem] = bad_rows(source, decode=True)
    assert problem == "pairs: row 1: chosen and rejected are the same image"


def test_an_image_whose_file_is_whole_is_not_decoded_ahead(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr(image_pairs, "open_image", lambda source: decoded.append(source.name) or open_image(source))
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    for i, kind in enumerate(kinds):
        for side in "wl":
            noise((16, 24), i, *((0, 100) if side == "w" else (100, 256))).save(folder / f"{side}{i}", kind)
    rows = [{"prompt": "p", "chosen": f"w{i}", "rejected": f"l{i}"} for i in range(len(kinds))]
    pairs = open_(write_rows(folder / "a.jsonl", rows)).check_images()
    assert sorted(decoded) == ["l3", "l4", "l5", "w3", "w4", "w5"]
    assert [pairs.size(i) for i in range(6)] == [(24, 16)] * 6


def test_images_are_the_bits_of_their_bytes(folder):
    images = [noise((97, 64), seed) for seed in (0, 1)]
    for name, image in zip(("x.png", "y.png"), images):
        image.save(folder / name)
    pairs = open_(write_rows(folder / "a.jsonl", [{"prompt": "p", "chosen": "x.png", "rejected": "y.png"}]))
    wanted = [torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255 for image in images]
    place = torch.empty(2, 2, 3, 64, 97)
    assert torch.equal(pairs.images(0, (64, 97), place[:, 1]), torch.stack(wanted))
    assert torch.equal(place[:, 1], torch.stack(wanted))


def test_no_pair_is_left_after_decoding(folder, golden):
    (folder / "odd.png").write_bytes(b"")
    source = write_rows(folder / "a.jsonl", [GOOD | {"rejected": "odd.png"}, GOOD | {"prompt": ""}])
    golden("none left", problems(source, decode=True, skip_bad_rows=True))


def test_labels_stay_with_their_rows_when_a_row_is_left_out(folder):
    (folder / "0.png").write_bytes(b"")
    left = open_(write_rows(folder / "a.jsonl", binary_rows([1, 0, 0.5, 1, 0])), skip_bad_rows=True).check_images()
    assert (left.prompts, left.rows, left.ties) == (["c1", "c3", "c4"], [1, 3, 4], 1)
    assert shown(left) == [(colour(3), colour(2)), (colour(6), colour(7)), (colour(9), colour(8))]


def test_an_image_that_vanishes(folder):
    pairs = open_(write_rows(folder / "a.jsonl", [GOOD, GOOD]))
    (folder / "21.png").unlink()
    with pytest.raises(ConfigError, match=r"^pairs: row 1: the image 21\.png is missing$"):
        pairs.images(1, (8, 8))
    with pytest.raises(ConfigError, match=r"row 0: the image 21\.png is missing\n.*row 1: the image"):
        pairs.check_images()


def test_every_pair_advances_once_also_a_bad_one(folder):
    (folder / "odd.png").write_bytes(b"")
    source = write_rows(folder / "a.jsonl", [*direct_rows(5), GOOD | {"chosen": "odd.png"}, GOOD | {"prompt": ""}])
    calls = []
    left = open_(source, skip_bad_rows=True).check_images(lambda: calls.append(1))
    assert (len(calls), len(left)) == (6, 5)


def by_hand(image, size):
    """Scale the whole image until it covers ``size``, then cut the middle out."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    whole = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    return torch.tensor(np.asarray(whole)[top : top + height, left : left + width] / 255.0).permute(2, 0, 1).float()


@pytest.mark.parametrize("source", [(64, 64), (96, 64), (64, 97), (131, 57), (20, 33)])
@pytest.mark.parametrize("size", [(64, 64), (32, 48), (50, 33)])
def test_images_are_scaled_and_cut_in_the_middle(folder, source, size):
    both = [noise(source, seed, 80, 176) for seed in (0, 1)]  # nothing is clipped between PIL's two passes
    for name, image in zip(("x.png", "y.png"), both):
        image.save(folder / name)
    pairs = open_(write_rows(folder / "a.jsonl", [{"prompt": "p", "chosen": "x.png", "rejected": "y.png"}]))
    for result, image in zip(pairs.images(0, size), both):
        assert (result.shape, result.dtype) == ((3, *size), torch.float32)
        torch.testing.assert_close(result, by_hand(image, size), atol=1.01 / 255, rtol=0)


def test_an_image_of_the_right_height_is_cut_to_the_pixel(folder):
    image = noise((97, 64))
    image.save(folder / "x.png")
    pairs = open_(write_rows(folder / "a.jsonl", [GOOD | {"chosen": "x.png"}]))
    wanted = torch.tensor(np.asarray(image)[:, 16:80]).permute(2, 0, 1) / 255
    assert torch.equal(pairs.images(0, (64, 64))[0], wanted)


def test_a_very_long_image_takes_no_more_memory_than_it_has_to(folder):
    noise((1, 40_000)).save(folder / "x.png")
    pairs = open_(write_rows(folder / "a.jsonl", [GOOD | {"chosen": "x.png"}]))
    assert pairs.images(0, (512, 512))[0].shape == (3, 512, 512)


def test_the_first_pairs_only(folder):
    rows = binary_rows([0.5, 1, 1, 0.5, 1, 1])
    rows[5]["caption"] = ""
    source = write_rows(folder / "a.jsonl", rows)
    pairs = open_(source, max_pairs=2)
    assert (pairs.rows, pairs.ties) == ([1, 2], 1)
    assert open_(source, max_pairs=3).rows == [1, 2, 4]
    assert problems(source, max_pairs=4)[0] == "pairs: row 5: the prompt is empty"
    assert len(open_(source, max_pairs=100, skip_bad_rows=True)) == 3


@pytest.mark.parametrize("how", ["path", "bytes", "struct"])
def test_images_are_read_when_asked_for(tmp_path, how):
    """60 images of 110 kB: neither opening nor looking at all of them holds a third of them."""
    import pyarrow as pa

    size, rows = (192, 192), []
    for i in range(30):
        both = {side: encoded(noise(size, 2 * i + j)) for j, side in enumerate(("chosen", "rejected"))}
        if how == "path":
            for side, data in both.items():
                (tmp_path / f"{side}{i}.png").write_bytes(data)
        cells = {
            side: {"path": f"{side}{i}.png", "bytes": data, "struct": {"bytes": data, "path": None}}[how]
            for side, data in both.items()
        }
        rows.append({"prompt": f"p{i}", **cells})
    source = write_rows(tmp_path / "a.parquet", rows)
    open_(source)  # the cache of datasets is built, its modules are loaded
    del rows, cells, both
    gc.collect()
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    pairs = open_(source)
    held = [tracemalloc.get_traced_memory()[1]]
    pairs = pairs.check_images()
    for i in range(len(pairs)):
        pairs.images(i, (64, 64))
    gc.collect()
    held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    held.append(pa.total_allocated_bytes() - arrow)
    assert len(pairs) == 30
    assert max(held) < 2_000_000, held
