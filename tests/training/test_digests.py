"""Digests of content: what they see, what they do not depend on, and how long they take."""

import dataclasses
import importlib
import json
import os
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion_align.training import digests
from diffusion_align.training.digests import (
    changed_content,
    code_files,
    content_digest,
    file_digest,
    hub_commit,
    model_digest,
    place_digest,
    same_content,
)


@pytest.fixture
def sampled(monkeypatch):
    """Files of more than a kilobyte are read in blocks, of 64 bytes."""
    monkeypatch.setattr(digests, "WHOLE", 1000)
    monkeypatch.setattr(digests, "_BLOCK", 64)
    monkeypatch.setattr(digests, "_SPACING_IN_TENSORS", 2000)
    monkeypatch.setattr(digests, "_SPACING", 500)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}": torch.randn(64, 32 * i + 1, generator=generator) for i in range(8)} | {"b": torch.ones(3)}


@pytest.mark.parametrize("name", sorted(tensors()))
def test_every_tensor_of_a_large_file_counts(sampled, tmp_path, name):
    path, weights = tmp_path / "model.safetensors", tensors()
    save_file(weights, path)
    before = file_digest(path)
    assert path.stat().st_size > 100_000
    weights[name] = weights[name] * 1.5  # the header stays as it is
    save_file(weights, path)
    assert file_digest(path) != before
    save_file(tensors(), path)
    os.utime(path, (1, 1))
    assert file_digest(path) == before


def test_both_ends_of_a_tensor_count_and_the_header(sampled, tmp_path):
    path = tmp_path / "model.safetensors"
    found = set()
    for change in (lambda w: w, lambda w: w[0].fill_(7), lambda w: w[-1].fill_(7), lambda w: w[5000].fill_(7)):
        weights = {"w": torch.zeros(10_000)}
        change(weights["w"])
        save_file(weights, path)
        found.add(file_digest(path))
    assert len(found) == 3  # one number between two blocks is not seen: not what happens to weights
    save_file({"v": torch.zeros(10_000)}, path)
    assert file_digest(path) not in found


@pytest.mark.parametrize("content", [b"x" * 5000, b"\xff" * 5000, b"\x10" + b"\0" * 7 + b'{"a": [1, 2, 3]}' * 300])
def test_large_files_of_other_formats_are_read_in_blocks(sampled, tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    before = file_digest(path)
    for start in (0, 2000, len(content) - 600):
        path.write_bytes(content[:start] + b"y" * 600 + content[start + 600 :])
        assert file_digest(path) != before


def test_small_files_are_read_whole(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(1_000_000))
    before = file_digest(path)
    path.write_bytes(bytes(500_001) + b"\1" + bytes(499_998))
    assert file_digest(path) != before


def test_what_of_a_models_folder_counts(tmp_path):
    folder = tmp_path / "sd"
    for part in ("unet", "vae", "safety_checker", "old"):
        (folder / part).mkdir(parents=True)
        (folder / part / "model.safetensors").write_text(part)
    index = {"_class_name": "X", "unet": ["a", "b"], "vae": ["a", "b"], "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    before = model_digest(folder)
    for place in ("README.md", "unet/notes.md", "old/model.safetensors", "safety_checker/model.safetensors"):
        (folder / place).write_text("other")
        assert model_digest(folder) == before
    os.rename(folder, tmp_path / "moved")
    assert model_digest(tmp_path / "moved") == before
    (tmp_path / "moved" / "vae" / "config.json").write_text("{}")
    assert model_digest(tmp_path / "moved") != before
    plain = tmp_path / "lm"
    plain.mkdir()
    (plain / "model.safetensors").write_text("a")
    before = model_digest(plain)
    (plain / "tokenizer.model").write_text("a")
    assert model_digest(plain) != before


@pytest.mark.parametrize("index", ["[]", "7", "{", '{"unet": "x"}', '["a"]', "[" * 100_000])
def test_of_a_damaged_model_nothing_is_known(tmp_path, index):
    (tmp_path / "model_index.json").write_text(index)
    digest = place_digest(tmp_path)
    assert (digest is None) == (index != '{"unet": "x"}')


def test_a_hub_id_is_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    cache = {"config.json": str(tmp_path / "models--a--b" / "snapshots" / "abc123" / "config.json")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: cache.get(name))
    assert hub_commit("a/b") == "abc123"
    assert place_digest("a/b") == place_digest("gpt2") == "abc123"  # some of the oldest have no owner
    cache.clear()
    assert place_digest("a/b") is None
    assert place_digest("gone") is None
    assert place_digest(tmp_path / "gone") is None


@dataclasses.dataclass
class Row:
    text: str
    ids: list


def test_values_count_by_content():
    rows = [["a", {"n": 1}], ("b", float("nan"), None), Row("a", [1, 2]), b"bytes"]
    rows += [np.arange(3), torch.ones(2, dtype=torch.bfloat16), {1, 2}]
    assert content_digest(rows) == content_digest(list(rows))
    others = [["a", {"n": 2}], ("b", 0.0, None), Row("a", [1, 3]), b"byteS", np.arange(3.0), torch.ones(2), {1, 3}]
    found = {content_digest([*rows[:i], other, *rows[i + 1 :]]) for i, other in enumerate(others)}
    assert len(found | {content_digest(rows), content_digest(rows[::-1])}) == len(rows) + 2
    assert content_digest([object()]) == content_digest([object()])
    assert content_digest([{(1, 2): object()}]) == content_digest([{(1, 2): object()}])
    assert content_digest([np.array([1, "a"], dtype=object)]) == content_digest([np.array([1, "a"], dtype=object)])


def test_the_files_of_a_rewards_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "id_constants.py").write_text("SCALE = 2\n")
    (tmp_path / "id_helper.py").write_text("import id_constants\ndef help(): return id_constants.SCALE\n")
    (tmp_path / "id_unused.py").write_text("")
    (tmp_path / "id_reward.py").write_text(
        "import json, torch, id_unused\nfrom id_helper import help\nfrom diffusion_align.rewards.image import jpeg\n"
        "def f(images, prompts, metadata): return help()\n"
    )
    module = importlib.import_module("id_reward")
    names = [path.name for path in code_files(module)]
    assert names == ["id_reward.py", "id_constants.py", "id_helper.py", "id_unused.py"]
    assert code_files(json) == [pytest.importorskip("pathlib").Path(json.__file__)]  # the one that is named, always
    assert code_files(sys.modules["diffusion_align.rewards.image.jpeg"]) == []


def test_comparing():
    now = {"model": [("/a", "1"), ("/b", None)], "prompts": [("/p", "2")], "reward": []}
    assert changed_content({}, now) == {}
    assert changed_content({"model": [["/x", "1"], ["/y", "9"]], "pairs": [["/p", "1"]]}, now) == {}
    assert changed_content({"model": [["/a", "0"], ["/b", "9"]], "prompts": [["/p", "3"]]}, now) == {
        "model": ["/a"],
        "prompts": ["/p"],
    }
    assert changed_content({"reward": [["/r", "1"]]}, now) == {"reward": ["/r"]}
    assert same_content({"model": [["/a", "1"], ["/b", None]], "prompts": [["/q", "2"]], "reward": []}, now) == {
        "prompts"
    }


@pytest.mark.slow
def test_seven_gigabytes_take_less_than_two_seconds(tmp_path):
    for shard in range(2):
        header = {
            f"layer.{i}": {"dtype": "F16", "shape": [10**7], "data_offsets": [i * 2 * 10**7, (i + 1) * 2 * 10**7]}
            for i in range(175)
        }
        text = json.dumps(header).encode()
        with (tmp_path / f"model-{shard}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 175 * 2 * 10**7)  # sparse: what is measured is what is read
    started = time.perf_counter()
    assert model_digest(tmp_path)
    assert time.perf_counter() - started < 2
