"""The latents of pairs on disk: every image is decoded once, bad ones are named, and nothing is made twice."""

import json
import struct
import zlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn.functional import avg_pool2d

from diffusion_align.data import image_pairs
from diffusion_align.data.image_pairs import PairsConfig, open_pairs
from diffusion_align.diffusion import latent_cache
from diffusion_align.diffusion.latent_cache import LatentCache
from diffusion_align.errors import ConfigError, Interrupted, UserError
from diffusion_align.images import open_image
from tests.helpers.noise_pairs import write_noise_pairs
from tests.helpers.rows_on_disk import write_rows

SIZE = (16, 16)
BATCH = 3


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(latent_cache, "_SHARD", 4)


@pytest.fixture
def decoded(monkeypatch):
    """Names of the images that were decoded."""
    names = []
    monkeypatch.setattr(image_pairs, "open_image", lambda source: names.append(source.name) or open_image(source))
    return names


class Policy:
    """Latents are means of 2 x 2 pixels."""

    image_size = SIZE

    def __init__(self):
        self.encoded = 0

    def encode(self, prompts, sizes):
        return {"text": torch.zeros(len(prompts), 1)}

    def encode_images(self, images):
        self.encoded += len(images)
        return avg_pool2d(images, 2)


class Alone:
    """The processes of a run of one process that is interrupted after ``rounds`` files."""

    index, count = 0, 1

    def __init__(self, rounds=99):
        self.rounds = rounds

    def wait(self):
        pass

    def stop_if_interrupted(self):
        if not self.rounds:
            raise Interrupted("stop")
        self.rounds -= 1

    def raise_together(self, failure, kind):
        assert kind is UserError
        if failure is not None:
            raise failure


BARS = SimpleNamespace(task=lambda *_: nullcontext(lambda count: None), print_start=lambda line: None)


def checked(folder, **settings):
    return open_pairs(PairsConfig(source=str(folder), **settings)).check_images()


def filled(folder, pairs, policy=None, rounds=99, **settings):
    cache = LatentCache(folder, pairs, policy or Policy(), **settings)
    cache.fill({}, batch_size=BATCH, processes=Alone(rounds), bars=BARS)
    return cache


def assert_right(cache):
    """Every pair's latents are of its own images."""
    chosen, rejected = cache.read(range(len(cache.pairs)))
    for i in range(len(cache.pairs)):
        wanted = avg_pool2d(cache.pairs.images(i, SIZE), 2).to(cache.dtype).float()
        assert torch.equal(torch.stack([chosen[i], rejected[i]]), wanted)


@pytest.fixture
def folder(tmp_path):
    return write_noise_pairs(tmp_path / "pairs", [(16, 16), (16, 20), (24, 16)] * 3, ["a", "b"])


def test_every_image_is_decoded_once_and_never_again(folder, decoded, tmp_path):
    cache = filled(tmp_path / "latents", checked(folder))
    assert sorted(decoded) == sorted(path.name for path in folder.glob("*.png"))
    assert len(list(cache.folder.iterdir())) == 3
    decoded.clear()
    again = filled(tmp_path / "latents", checked(folder))
    assert (decoded, again.policy.encoded) == ([], 0)
    assert_right(again)


def test_what_was_interrupted_decodes_what_is_missing(folder, decoded, tmp_path):
    with pytest.raises(Interrupted):
        filled(tmp_path / "latents", checked(folder), rounds=1)
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["00000.safetensors"]
    decoded.clear()
    cache = filled(tmp_path / "latents", checked(folder))
    assert len(decoded) == cache.policy.encoded == 2 * 5
    assert_right(cache)


def test_only_the_file_of_a_changed_image_is_made_again(folder, decoded, tmp_path):
    filled(tmp_path / "latents", checked(folder))
    decoded.clear()
    Image.new("RGB", (20, 16), (9, 99, 199)).save(folder / "rejected_4.png")
    cache = filled(tmp_path / "latents", checked(folder))
    assert cache.policy.encoded == len(decoded) == 2 * 4
    assert_right(cache)


def test_latents_in_bfloat16(folder, tmp_path):
    wide = filled(tmp_path / "latents", checked(folder))
    before = {path.name: path.stat().st_size for path in wide.folder.iterdir()}
    cache = filled(tmp_path / "latents", checked(folder), dtype=torch.bfloat16)
    assert cache.policy.encoded == 18  # those of float32 are not taken for them
    with safe_open(cache.folder / "00000.safetensors", "pt") as file:
        assert file.get_slice("chosen").get_dtype() == "BF16"
    assert all(path.stat().st_size < 0.6 * before[path.name] for path in cache.folder.iterdir())
    assert {one.dtype for side in cache.read([0, 5]) for one in side} == {torch.float32}
    assert_right(cache)


def broken(path):
    """In place of a PNG, one whose chunks are right and whose pixels cannot be unpacked."""
    data = path.read_bytes()
    place = data.index(b"IDAT") - 4
    length = struct.unpack_from(">I", data, place)[0]
    chunk = b"IDAT" + b"\xff" * length
    path.write_bytes(data[: place + 4] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[place + 12 + length :])


@pytest.fixture
def spoilt(folder):
    """Two bad pairs of a file, and one of another, which only decoding shows."""
    broken(folder / "chosen_1.png")
    with Image.open(folder / "chosen_3.png") as image:
        image.save(folder / "rejected_3.png", compress_level=1, pnginfo=None, dpi=(72, 72))
    broken(folder / "rejected_8.png")
    return folder


def test_images_that_turn_out_to_be_bad_are_named(spoilt, tmp_path):
    pairs = checked(spoilt)
    assert len(pairs) == 9
    with pytest.raises(ConfigError) as caught:
        filled(tmp_path / "latents", pairs)
    *problems, remedy = caught.value.problems
    assert problems == [
        "pairs: row 1: chosen is not a readable PNG, JPEG, WEBP, GIF, BMP or TIFF image",
        "pairs: row 3: chosen and rejected are the same image",
    ]
    assert "pairs.skip_bad_rows=true" in remedy
    assert not (tmp_path / "latents").exists()


def test_images_that_turn_out_to_be_bad_are_left_out(spoilt, decoded, tmp_path):
    pairs = checked(spoilt, skip_bad_rows=True)
    cache = filled(tmp_path / "latents", pairs)
    assert cache.pairs.rows == [0, 2, 4, 5, 6, 7]
    assert list(cache.pairs.skipped) == [1, 3, 8]
    assert len(cache.sizes) == 6
    assert_right(cache)
    decoded.clear()
    again = filled(tmp_path / "latents", checked(spoilt, skip_bad_rows=True))
    assert (decoded, again.policy.encoded) == ([], 0)
    assert (again.pairs.rows, again.pairs.skipped) == (cache.pairs.rows, cache.pairs.skipped)
    assert_right(again)
    with pytest.raises(ConfigError, match="row 1: chosen is not a readable"):
        filled(tmp_path / "latents", checked(spoilt))


def test_a_file_of_bad_pairs_only(folder, tmp_path):
    for i in range(4):
        broken(folder / f"chosen_{i}.png")
    cache = filled(tmp_path / "latents", checked(folder, skip_bad_rows=True))
    assert cache.pairs.rows == [4, 5, 6, 7, 8]
    assert_right(cache)
    for i in range(4, 9):
        broken(folder / f"chosen_{i}.png")
    with pytest.raises(ConfigError, match="holds no usable pair"):
        filled(tmp_path / "latents", checked(folder, skip_bad_rows=True))


@pytest.mark.parametrize("change", ["vanished", "damaged"])
def test_an_image_that_is_no_longer_what_was_looked_at_is_not_left_out(folder, change, tmp_path):
    pairs = checked(folder, skip_bad_rows=True)
    if change == "vanished":
        (folder / "chosen_2.png").unlink()
    else:
        (folder / "chosen_2.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="pairs: row 2: "):
        filled(tmp_path / "latents", pairs)


def test_images_inside_tables_are_read_like_files(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    packed = [row | {side: (folder / row[side]).read_bytes() for side in ("chosen", "rejected")} for row in rows]
    source = write_rows(tmp_path / "a.parquet", packed)
    cache, files = filled(tmp_path / "a", checked(source)), filled(tmp_path / "b", checked(folder))
    assert_right(cache)
    for mine, theirs in zip(sorted(cache.folder.iterdir()), sorted(files.folder.iterdir()), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
